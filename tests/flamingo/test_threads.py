"""Commands let OpenMP's threads sleep soon; nothing else does, and never against the user's word."""

import os
import subprocess
import sys

import pytest

from flamingo.threads import DEMO_SPINS, SPINS

COMMAND = "sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'flamingo', 'train']"
SHOW = "import flamingo, os; print(os.environ.get('GOMP_SPINCOUNT'))"


def spins(*lines, **variables):
    """What a fresh process sees after it has imported flamingo."""
    unset = {
        name: each for name, each in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    shown = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *lines, SHOW])],
        env=unset | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return shown.stdout.strip()


def test_a_command_sets_it_before_torch_is_imported():
    assert spins(COMMAND) == SPINS
    assert spins(COMMAND.replace("train", "demo")) == DEMO_SPINS
    assert spins("sys.argv = ['/usr/bin/flamingo', 'train']") == SPINS


@pytest.mark.parametrize(
    ("lines", "variables", "expected"),
    [
        ([], {}, "None"),
        ([COMMAND.replace("'flamingo'", "'pytest'")], {}, "None"),
        ([COMMAND, "import torch"], {}, "None"),
        ([COMMAND], {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ([COMMAND], {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
    ids=["imported", "another command", "too late", "a policy", "a number"],
)
def test_nothing_else_does(lines, variables, expected):
    assert spins(*lines, **variables) == expected
