"""How a kernel is cut into programs, chosen from what is static: sizes, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import torch


@dataclass(frozen=True, kw_only=True)
class Config:
    """One way to launch a kernel; a subclass for each kernel adds its block sizes.

    Args:
        num_warps: warps of one program.
        num_stages: how many iterations of a loop have their loads under way.
        maxnreg: registers of a thread, at most, so that a multiprocessor holds more programs; None where the
            compiler chooses. NVIDIA alone.
    """

    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """What the kernel is launched with: block sizes in capitals, as kernels spell their constants."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        options = {f.name for f in fields(Config)}
        return {
            name if name in options else name.upper(): value
            for name, value in named.items()
            if value is not None
        }


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Choice(Generic[C]):
    """What the heuristic takes, and what tuning may take instead.

    Args:
        default: the configuration without tuning.
        candidates: all that are worth measuring, the default among them.
        key: the static sizes that the best candidate depends on; never the length of the text.
    """

    default: C
    candidates: tuple[C, ...]
    key: tuple[Any, ...]

    @classmethod
    def of(cls, default: C, *others: C, key: tuple[Any, ...]) -> Choice[C]:
        return cls(default, (default, *(each for each in dict.fromkeys(others) if each != default)), key)


class Device(NamedTuple):
    """What the heuristics ask of a device."""

    architecture: str  # "sm_90", "gfx942", "interpreter"
    multiprocessors: int


@cache
def device_of(device: torch.device) -> Device:
    """The facts of a tensor's device."""
    if device.type != "cuda":
        return Device("interpreter", 4)  # few, so that small tests reach the paths that split their work
    properties = torch.cuda.get_device_properties(device)
    return Device(architecture_of(properties), properties.multi_processor_count)


def architecture_of(properties: Any) -> str:
    """What compilers call a GPU with these properties: "sm_90", "gfx942"."""
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def power_of_two(size: int, least: int = 16) -> int:
    """The block that holds `size` elements; Triton's blocks are powers of two, those of a dot at least 16."""
    return max(least, 1 << (size - 1).bit_length())


def count_splits(programs: int, most: int, device: Device, resident: int = 2) -> int:
    """How many programs, at most `most`, share the work of each: every multiprocessor gets `resident`."""
    wanted = resident * device.multiprocessors // max(programs, 1)
    return max(1, min(wanted, most))
