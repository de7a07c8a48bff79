"""The pages of `docs/` whose commands and code run as they stand."""

import os
import re
import subprocess
import sys

import pytest
import torch

from flamingo import Flamingo, save_model
from flamingo.demo.stages import CONFIG, make_processor
from tests.helpers import ROOT

pytest.importorskip("PIL")
pytest.importorskip("sklearn", reason="the demo's digits are scikit-learn's")

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow  # a process for every command
def test_asking(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_model(Flamingo(CONFIG), make_processor(), tmp_path / "digits.safetensors")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    ran = 0
    for language, text in BLOCK.findall((ROOT / "docs/asking.md").read_text()):
        if language == "python":
            exec(text, names)
        elif "flamingo demo" not in text:  # what it writes is there
            text = text.replace("python -m", f"{sys.executable} -m")
            done = subprocess.run(["sh", "-e", "-c", text], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
            ran += 1
    assert ran == 3
    assert names["latents"].encoded == 6
