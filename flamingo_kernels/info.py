"""What there is on this machine: versions, processor, GPU, and every operator's backends with the reasons."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import __version__, _dispatch, _env, _extension


def run(as_json: bool = False) -> int:
    """Print `collect()` for people, or as JSON."""
    found = collect()
    print(json.dumps(found, indent=1) if as_json else render(found))
    return 0


def collect() -> dict[str, Any]:
    """Everything `python -m flamingo_kernels info` shows; None stands for what is not there."""
    return {
        "versions": {
            "flamingo_kernels": __version__,
            "commit": commit(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "processor": {
            "name": processor_name(),
            "architecture": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": _extension.cpu_variant() or None,
            "usable_instruction_sets": _extension.cpu_variants(),
        },
        "gpu": _gpu(),
        "extension": _extension_file(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("FLAMINGO_KERNELS_") or name == "OMP_NUM_THREADS"
        },
        "backends": {operator: _dispatch.available_backends(operator) for operator in _dispatch.operators()},
    }


def render(found: dict[str, Any]) -> str:
    """The same as a page of text."""
    processor, extension, gpu = found["processor"], found["extension"], found["gpu"]
    usable = ", ".join(processor["usable_instruction_sets"])
    cores = f"{processor['cores']} cores, {processor['threads']} threads"
    lines = [f"{name:<17} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines += [
        "",
        f"{'processor':<17} {processor['name']}, {processor['architecture']}, {cores}",
        f"{'instruction set':<17} {processor['instruction_set'] or 'none chosen'}"
        + (f" (usable: {usable})" if usable else ""),
        f"{'gpu':<17} {', '.join(gpu['devices']) or 'none: ' + gpu['why_not']}",
        f"{'extension':<17} {extension['path']}, built {extension['built']}"
        if extension["loaded"]
        else f"{'extension':<17} none: {extension['why_not']}",
        f"{'environment':<17} {' '.join(f'{k}={v}' for k, v in found['environment'].items()) or '-'}",
    ]
    for operator, backends in found["backends"].items():
        lines += ["", operator]
        lines += [f"  {name:<15} {'yes' if able is True else able}" for name, able in backends.items()]
    return "\n".join(lines)


@cache
def processor_name() -> str:
    """The processor's name as its maker spells it, or the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field, _, value = line.partition(":")
            if field.strip() in ("model name", "Model"):
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """The commit this package is run from, "-dirty" where files were changed since; None outside a clone."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def backends_in_use() -> dict[str, str]:
    """What each operator runs on here without a choice of the caller's, as in "cpu/avx2"."""
    chosen = {operator: _dispatch.resolve(operator, "auto") for operator in _dispatch.operators()}
    variant = _extension.cpu_variant()
    return {operator: f"cpu/{variant}" if name == "cpu" else name for operator, name in chosen.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return {"devices": names, "why_not": None}
    built_for = torch.version.cuda or torch.version.hip
    why = "no driver or no device" if built_for else f"torch {torch.__version__} is built without GPU support"
    return {"devices": [], "why_not": why}


def _extension_file() -> dict[str, Any]:
    path = Path(_env.EXTENSION) if _env.EXTENSION else Path(_extension.__file__).with_name("_C.abi3.so")
    if why_not := _extension.why_not():
        return {"loaded": False, "path": str(path), "built": None, "why_not": why_not}
    built = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    return {"loaded": True, "path": str(path), "built": built, "why_not": None}
