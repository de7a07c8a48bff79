"""Reads the machine code of a kernel: its instructions, with what the compiler told the hardware of each."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.helpers.cuda_binary import tool

NO_BARRIER = 7


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        address: in bytes from the kernel's first.
        name: with its modifiers, as in "LDG.E.128".
        operands: as the disassembler writes them.
        predicate: under which alone it executes, as in "!P0"; "" where it always does.
        stall: cycles until the next instruction of the warp may issue.
        write_barrier, read_barrier: the scoreboard barrier that tells when it has written its result, or read
            its operands; `NO_BARRIER` where none does.
        waits_for: the barriers that it waits for, one bit each.
    """

    address: int
    name: str
    operands: str = ""
    predicate: str = ""
    stall: int = 1
    write_barrier: int = NO_BARRIER
    read_barrier: int = NO_BARRIER
    waits_for: int = 0

    @cached_property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def bits(self) -> int:
        """Of one lane's access to memory."""
        width = re.search(r"\.(128|64|[US]?16|[US]8)\b", self.name)
        return int(width[1].lstrip("US")) if width else 32

    @cached_property
    def target(self) -> int:
        """The address that a branch goes to."""
        found = re.search(r"(?:^|[ ,`(])0x([0-9a-f]+)\)?\s*$", self.operands)
        if found is None:
            raise ValueError(f"{self.name} {self.operands} at {self.address:#x} goes to no fixed address")
        return int(found[1], 16)


# An instruction has 128 bits: what it does, and from bit 105 on how it is scheduled.
_WORDS = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;"
    r"\s*/\* 0x[0-9a-f]+ \*/\s*/\* 0x([0-9a-f]+) \*/"
)


def read(binary: Path, kernel: str = "") -> list[Instruction]:
    """The instructions of the kernel whose readable name matches a pattern, or of the only one."""
    assembly = subprocess.run(
        [str(tool()), "-sass", str(binary)], text=True, capture_output=True, check=True
    ).stdout
    parts = re.split(r"Function : (\S+)", assembly)
    found = {
        name: body for name, body in zip(parts[1::2], parts[2::2], strict=True) if is_named(name, kernel)
    }
    if len(found) != 1:
        raise ValueError(
            f"{binary.name} has {len(found)} kernels that match {kernel!r}, not one: {list(found)}"
        )
    return list(parse(*found.values()))


def parse(assembly: str) -> Iterator[Instruction]:
    """The instructions in cuobjdump's text of a kernel."""
    for address, predicate, name, operands, high in _WORDS.findall(assembly):
        control = int(high, 16) >> 41
        yield Instruction(
            address=int(address, 16),
            name=name,
            operands=operands,
            predicate=predicate,
            stall=control & 15,
            write_barrier=control >> 5 & 7,
            read_barrier=control >> 8 & 7,
            waits_for=control >> 11 & 63,
        )


def is_named(name: str, pattern: str) -> bool:
    """Whether the readable name of a kernel matches a pattern."""
    readable = subprocess.run(["c++filt", name], text=True, capture_output=True, check=True).stdout
    return re.search(pattern, readable) is not None
