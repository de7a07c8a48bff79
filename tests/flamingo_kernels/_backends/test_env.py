"""What the environment means to the library."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from tests.helpers import ROOT

NOBODY = """
import pathlib
def home(): raise RuntimeError("Could not determine home directory.")  # as for a number without an account
pathlib.Path.home = home
from flamingo_kernels._backends import env
print(env.CACHE)
"""


def cache(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "FLAMINGO_KERNELS_CACHE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_user_without_a_home_keeps_what_was_measured_among_temporary_files():
    assert cache(NOBODY) == f"{tempfile.gettempdir()}/home-of-{os.getuid()}/.cache/flamingo_kernels"
    assert cache(NOBODY, FLAMINGO_KERNELS_CACHE="/elsewhere") == "/elsewhere"


def test_a_users_home_has_the_cache(tmp_path):
    code = "from flamingo_kernels._backends import env\nprint(env.CACHE)"
    assert cache(code, HOME=str(tmp_path)) == str(tmp_path / ".cache" / "flamingo_kernels")
