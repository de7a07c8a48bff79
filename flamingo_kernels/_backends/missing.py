"""Why a compiled library is not there, and what builds it."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path


def record_of_failure(path: Path) -> Path:
    """Where setup.py leaves why the latest build of a library failed."""
    return path.with_name(f"{path.name}.failed")


def failed_build(path: Path) -> str:
    """Why the latest build of a library failed, or an empty string."""
    record = record_of_failure(path)
    return " ".join(record.read_text().split()) if record.exists() else ""


def why_missing(path: Path, name: str, *, compiler: str, build: str) -> str:
    """Why there is no library at a path, and how to get it; empty if there is one."""
    if path.exists():
        return ""
    source = _source()
    where = "in a checkout of the source " if source == "." else ""
    return failed_build(path) or (
        f"{name} not built; install {compiler}, if there is none, and {where}run "
        f"`FLAMINGO_KERNELS_BUILD={build} pip install --no-deps --force-reinstall --no-cache-dir {source}`"
    )


def _source() -> str:
    """What pip has to install to build this package anew: the checkout it is in, or where it came from;
    "." where that is not known."""
    try:
        record = metadata.distribution("flamingo-kernels").read_text("direct_url.json")  # written by pip
    except metadata.PackageNotFoundError:
        record = None
    origin = json.loads(record or "{}")
    checkout = Path(__file__).parents[2]
    if (checkout / "setup.py").exists():
        where = shlex.quote(str(checkout))
        return f"--editable {where}" if origin.get("dir_info", {}).get("editable") else where
    if "vcs_info" in origin:
        return "{vcs}+{url}@{commit_id}".format(url=origin["url"], **origin["vcs_info"])
    url = origin.get("url", "flamingo-kernels")
    return "." if url.endswith(".whl") else url  # a wheel would bring again what it brought
