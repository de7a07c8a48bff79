"""The scripts of examples/ run, and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

SAID = {"quantize": ["quantize: ", "loaded again: equal logits", "a token: "]}


def test_every_example_is_known():
    assert sorted(SAID) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", SAID)
def test_an_example_runs(name, tmp_path):
    script = ROOT / "examples" / f"{name}.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    for line in SAID[name]:
        assert line in done.stdout
