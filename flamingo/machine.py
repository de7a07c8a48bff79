"""What a result was computed on, as reports and pictures name it."""

import platform
from functools import cache
from pathlib import Path


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


def counted(count: int, thing: str) -> str:
    """A number of things: "1 thread", "2 threads"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
