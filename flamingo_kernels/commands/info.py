"""What there is on this machine: versions, processor, GPU, and every operator's backends with the reasons."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flamingo.machine import processor_name

from .. import __version__
from .._backends import cpu, cuda, dispatch, env, missing
from .._backends.triton.config import architecture_of

ROOT = Path(__file__).parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """The command `info`: print `collect()` for people, or as JSON."""
    found = collect()
    print(json.dumps(found, indent=1) if options.json else render(found))
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
            "instruction_set": cpu.cpu_variant() or None,
            "usable_instruction_sets": cpu.cpu_variants(),
        },
        "gpu": _gpu(),
        "extension": _extension_file(),
        "cuda_extension": _cuda_extension_file(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("FLAMINGO_KERNELS_") or name in ("OMP_NUM_THREADS", "TRITON_INTERPRET")
        },
        "backends": {operator: dispatch.available_backends(operator) for operator in dispatch.operators()},
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
        f"{'gpu':<17} {', '.join(map(_render_gpu, gpu['devices'])) or 'none: ' + gpu['why_not']}",
        f"{'extension':<17} {extension['path']}, built {extension['built']}{_render_failed(extension)}"
        if extension["loaded"]
        else f"{'extension':<17} none: {extension['why_not']}",
        f"{'cuda extension':<17} {_render_cuda(found['cuda_extension'])}",
        f"{'environment':<17} {' '.join(f'{k}={v}' for k, v in found['environment'].items()) or '-'}",
    ]
    for operator, backends in found["backends"].items():
        lines += ["", operator]
        lines += [f"  {name:<15} {_render_able(name, able)}" for name, able in backends.items()]
    return "\n".join(lines)


def _render_cuda(extension: dict[str, Any]) -> str:
    if not extension["build"]:
        return f"none: {extension['why_not']}"
    loaded = "loaded" if extension["loaded"] else f"not loaded: {extension['why_not']}"
    return (
        f"{extension['path']}, built {extension['built']} ({extension['build']}), {loaded}"
        f"{_render_failed(extension)}"
    )


def _render_failed(extension: dict[str, Any]) -> str:
    """Why the latest build failed; what is loaded is then older than its sources."""
    return f"; the latest build failed: {extension['failed_build']}" if extension["failed_build"] else ""


def _render_gpu(gpu: dict[str, Any]) -> str:
    facts = f"{gpu['architecture']}, {gpu['memory_gib']:.1f} GiB, {gpu['multiprocessors']} multiprocessors"
    return f"{gpu['name']} ({facts})"


def _render_able(backend: str, able: bool | str) -> str:
    if able is True and variant(backend) == "triton/interpreter":
        return "yes, in Triton's interpreter on the cpu (TRITON_INTERPRET), and only by name"
    if able is True and variant(backend) == "cuda/emulation":
        return "yes, emulated on the cpu (FLAMINGO_KERNELS_CUDA_EXTENSION), and only by name"
    return "yes" if able is True else str(able)


@cache
def commit() -> str | None:
    """The commit this package is run from, "-dirty" where files were changed since; None if nothing says so.

    A copy without `.git` has it in a file COMMIT, if `git describe --always --dirty --exclude='*'` was
    written to one.
    """
    if not (ROOT / ".git").exists():
        return _written(ROOT / "COMMIT")
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _written(file: Path) -> str | None:
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


def sm_clock(device: str) -> int | None:
    """How fast a GPU's multiprocessors run at this moment, in MHz; None where nvidia-smi does not say."""
    if torch.device(device).type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return int(said.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def backend_in_use(operator: str, device: str = "cpu", **asked: Any) -> str:
    """What an operator runs on where the caller chooses nothing, as in "cpu/avx2".

    Args:
        operator, device: its name, and where its tensors are.
        asked: dtype and sizes of its `testing` case. Default: small ones in float32.
    """
    from ..testing import CASES

    return variant(
        dispatch.resolve(operator, "auto", *CASES[operator](device=device, **asked).tensors().values())
    )


def variant(backend: str) -> str:
    """A backend's name with what it runs on: "cpu/avx2", "triton/interpreter", "cuda/emulation"."""
    if backend == "cpu":
        return f"cpu/{cpu.cpu_variant()}"
    if backend == "triton" and env.INTERPRET:
        return "triton/interpreter"
    return "cuda/emulation" if backend == "cuda" and cuda.emulated() else backend


def device_name(device: str) -> str:
    """The name of a cpu or GPU as its maker spells it."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor_name()


def why_not_on(device: str) -> str:
    """Why nothing can run on a device, or an empty string."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    gpu = _gpu()
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        return f"expected the device cpu or cuda:0, got {device}"
    if wanted.type == "cuda" and not gpu["devices"]:
        return f"there is no GPU here that torch can use: {gpu['why_not']}"
    if wanted.type == "cuda" and (wanted.index or 0) >= len(gpu["devices"]):
        return f"there is no {device} here, the number of GPUs is {len(gpu['devices'])}"
    return ""


def tell_of_no_kernels(command: str) -> None:
    """One line on stderr where a command would see nothing but PyTorch."""
    if why := dispatch.why_no_kernels():
        print(f"{command}: {why}", file=sys.stderr)


def expect_device(device: str) -> None:
    """Raises ValueError if nothing can run on a device."""
    if why := why_not_on(device):
        raise ValueError(why)


def conditions_on(device: str) -> dict[str, Any]:
    """What a number depends on that is measured here and now."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device_type": torch.device(device).type,
        "sm_mhz": sm_clock(device),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    if torch.cuda.is_available():
        every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return {"devices": list(map(_facts, every)), "why_not": None}
    built_for = torch.version.cuda or torch.version.hip
    why = "no driver or no device" if built_for else f"torch {torch.__version__} is built without GPU support"
    return {"devices": [], "why_not": why}


def _facts(gpu: Any) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "architecture": architecture_of(gpu),
        "memory_gib": gpu.total_memory / 2**30,
        "multiprocessors": gpu.multi_processor_count,
        "cache_mib": gpu.L2_cache_size / 2**20,
    }


def _extension_file() -> dict[str, Any]:
    path = cpu.path()
    why_not, failed = cpu.why_not() or None, missing.failed_build(path) or None
    built = None if why_not else _date(path)
    return {
        "loaded": not why_not,
        "path": str(path),
        "built": built,
        "why_not": why_not,
        "failed_build": failed,
    }


def _cuda_extension_file() -> dict[str, Any]:
    path, build, why_not = cuda.path(), cuda.build() or None, cuda.why_not() or None
    built = _date(path) if build else None
    return {
        "loaded": not why_not,
        "path": str(path),
        "built": built,
        "build": build,
        "why_not": why_not,
        "failed_build": missing.failed_build(path) or None,
    }


def _date(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
