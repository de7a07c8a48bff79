"""Tries what `make wheel` has built: its name, what it holds, and that it computes where it is installed."""

from __future__ import annotations

import argparse
import os
import re
import site
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import flamingo_kernels

CPU, CUDA = "flamingo_kernels/_C.abi3.so", "flamingo_kernels/_C_cuda.abi3.so"
TRY = """
import torch, flamingo_kernels as fk
x, gate = torch.ones(2, 4), torch.full((1,), 0.5)
assert torch.allclose(fk.gated_residual(x, x, gate, backend="cpu"), x + gate.tanh())
print(fk.__version__, fk.__file__)
"""


def main(folder: Path) -> None:
    wheels = [*folder.glob("*.whl")]
    if len(wheels) != 1:
        sys.exit(f"wheel: expected one wheel in {folder}, got {len(wheels)}: rm -r {folder}, then make wheel")
    (wheel,) = wheels
    check_content(wheel)
    with tempfile.TemporaryDirectory() as elsewhere:
        check_installed(wheel, Path(elsewhere))
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB, installed and tried")


def check_content(wheel: Path) -> None:
    version = re.escape(flamingo_kernels.__version__)
    if not re.fullmatch(rf"flamingo_kernels-{version}-cp310-abi3-\w+\.whl", wheel.name):
        sys.exit(f"wheel: expected one for every Python from 3.10 on (cp310-abi3), got {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        libraries = {name for name in archive.namelist() if name.endswith(".so")}
    wanted = {CPU, CUDA} if os.environ.get("FLAMINGO_KERNELS_BUILD") == "cuda" else {CPU}
    if libraries != wanted:
        sys.exit(f"wheel: expected the libraries {sorted(wanted)} in it, got {sorted(libraries)}")


def check_installed(wheel: Path, place: Path) -> None:
    """In a new environment, which borrows this one's torch and has nothing else of this project."""
    venv.create(place)
    python = place / "bin" / "python"
    (packages,) = place.glob("lib/python*/site-packages")
    # A .pth in a folder that a .pth names is not read, so the editable install of this checkout stays out.
    (packages / "torch.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", wheel.resolve()], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLAMINGO_KERNELS_")}
    clean["PYTHONPATH"] = ""
    said = subprocess.run(
        [python, "-c", TRY], cwd=place, env=clean, text=True, stdout=subprocess.PIPE, check=True
    ).stdout
    if said.split() != [flamingo_kernels.__version__, str(packages / "flamingo_kernels" / "__init__.py")]:
        sys.exit(f"wheel: expected the installed package to be imported, got {said.strip()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.wheel", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    main(parser.parse_args().folder)
