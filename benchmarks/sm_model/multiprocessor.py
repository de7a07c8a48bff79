"""A model of one multiprocessor: predicts the time of a kernel from the instructions that its warps execute.

Four schedulers issue one instruction a cycle each, of the warp that has been ready longest. A warp issues in
order: the next instruction waits for the stall count of the last, for the scoreboard barriers in its mask
and for its unit. Units, and L2 and memory behind them, are queues of a fixed rate.

What it assumes, beside the numbers below:

- Every warp of a launch executes the same instructions.
- Accesses of 16 bytes a lane come from memory, narrower ones (positions, sums) and those that the caller
  names from L2. Memory moves what the operator must, in all, spread evenly over its accesses; so a tile that
  L2 has, or rows that a mask leaves out, cost the average.
- Blocks are alike and start as others end. A launch costs nothing; nothing is left in a cache by the last.

Ratios of two versions of a kernel are worth something, microseconds are not until a real run has set the
numbers below. Nothing here was measured by us: they are those of public measurements of Hopper.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from .machine_code import NO_BARRIER, Instruction

SCHEDULERS = 4
L2_BYTES = 48  # a cycle, of one multiprocessor
BLOCK_START = 300  # cycles from the end of a block to the first instruction of the next
BARRIER = 12  # cycles from the last warp's arrival at a barrier to the next instruction

# Cycles from the issue to the result, where the compiler does not count them itself.
LATENCY = {
    **{"LDS": 33, "LDSM": 36, "STS": 28, "STSM": 32, "SHFL": 25, "REDUX": 30, "VOTE": 14, "ATOMS": 60},
    **{"MUFU": 22, "I2F": 20, "F2I": 20, "F2F": 20, "POPC": 16, "FLO": 16, "HMMA": 33, "R2UR": 12},
    **{"LDC": 40, "ULDC": 30, "S2R": 25, "S2UR": 25, "DADD": 40, "DMUL": 40, "DFMA": 40},
}
OTHER_LATENCY = 20
HGMMA_LATENCY, STORE = 24, 20
L2_LATENCY, MEMORY_LATENCY = 280, 650

HALF_RATE = {
    *("IADD3", "LOP3", "ISETP", "LEA", "SHF", "PRMT", "SEL", "VIADD", "IMNMX", "VIMNMX", "PLOP3", "F2FP"),
    *("MOV", "IABS", "HFMA2", "HADD2", "HMUL2", "LOP", "BMSK"),
}
GLOBAL = {"LDG", "STG", "LDGSTS"}
TO_SHARED_MEMORY_UNIT = GLOBAL | {"LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS", "RED", "REDUX"}


@dataclass(frozen=True)
class Device:
    """A GPU: its name, multiprocessors, GHz, and the bytes a nanosecond that a large copy moves."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float


H200 = Device("H200", 132, 1.98, 4300.0)
H100 = Device("H100", 132, 1.755, 3000.0)


@dataclass(frozen=True)
class Launch:
    """A kernel as it is launched.

    Args:
        code: its instructions.
        path: the places in `code` of those that a warp executes.
        blocks: in the grid.
        warps: of a block.
        resident: blocks that a multiprocessor holds at once.
        bytes: that all blocks together move from and to memory.
        cached: places in `code` of wide accesses that L2 answers, as it has what they ask for.
    """

    name: str
    code: Sequence[Instruction]
    path: Sequence[int]
    blocks: int
    warps: int
    resident: int
    bytes: float
    cached: Collection[int] = ()


@dataclass
class Prediction:
    """Microseconds of a launch, its byte floor, and the shares of the time in which units were busy."""

    name: str
    microseconds: float
    floor: float
    busy: dict[str, float] = field(default_factory=dict)


def predict(launch: Launch, device: Device) -> Prediction:
    """The time of a launch: some rounds of blocks are modelled, and the rest taken to go on like them."""
    blocks = math.ceil(launch.blocks / device.multiprocessors)
    modelled = min(blocks, 6 * launch.resident)
    busy = min(launch.blocks, device.multiprocessors)
    bytes_per_cycle = device.bandwidth / busy / device.clock
    run = Multiprocessor(launch, bytes_per_cycle).run(modelled)
    cycles = run.cycles * blocks / modelled
    microseconds = cycles / device.clock / 1e3
    rates = {"issue": SCHEDULERS, "tensor": SCHEDULERS, "exp": SCHEDULERS, "shared": 1, "memory": 1}
    shares = {name: run.busy[name] / rate / run.cycles for name, rate in rates.items()}
    return Prediction(launch.name, microseconds, launch.bytes / device.bandwidth / 1e3, shares)


def resident_blocks(registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that a multiprocessor of Hopper holds: by registers of a thread, by shared memory, by warps."""
    of_a_warp = math.ceil(registers * 32 / 256) * 256
    return max(1, min(65536 // of_a_warp // warps, 227 * 1024 // (shared_bytes + 1024), 64 // warps, 32))


@dataclass
class Block:
    """A block under way: warps that still run, and those that have arrived at its barrier."""

    running: int
    arrived: list[tuple[int, Warp]] = field(default_factory=list)


@dataclass
class Warp:
    """A warp under way: its next instruction, and when what it waits for is there."""

    block: Block
    scheduler: int
    next: int = 0
    barriers: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: list[float] = field(default_factory=list)  # not yet in a group
    groups: list[float] = field(default_factory=list)  # of asynchronous copies
    products: float = 0.0  # of a warp group


@dataclass
class Run:
    cycles: float
    busy: Counter[str]


class Multiprocessor:
    """The queues of a multiprocessor, and the warps that wait for them."""

    def __init__(self, launch: Launch, bytes_per_cycle: float):
        self.launch, self.memory_rate = launch, bytes_per_cycle
        self.from_memory = {
            place for place, each in enumerate(launch.code) if _is_wide(each) and place not in launch.cached
        }
        wide = sum(32 * launch.code[place].bits / 8 for place in launch.path if place in self.from_memory)
        moved = launch.bytes / launch.blocks / launch.warps  # by a warp
        self.moved_share = moved / wide if wide else 0.0  # of what its wide accesses name
        self.units = {name: [0.0] * SCHEDULERS for name in ("tensor", "exp", "half", "multiply", "full")}
        self.shared = self.l2 = self.memory = 0.0  # when each is free
        self.issued = [-1.0] * SCHEDULERS
        self.busy: Counter[str] = Counter()

    def run(self, blocks: int) -> Run:
        self.order, self.waiting = itertools.count(), []
        self.left, self.started, end = blocks, 0, 0.0
        for _ in range(min(self.launch.resident, blocks)):
            self.start(40.0 * self.started)
        while self.waiting:
            time, _, warp = heapq.heappop(self.waiting)
            if warp.next < len(self.launch.path):
                self.step(time, warp)
                continue
            end = max(end, time)
            warp.block.running -= 1
            if not warp.block.running:
                self.start(time + BLOCK_START)
        return Run(end, self.busy)

    def start(self, time: float) -> None:
        """Starts a block, if one is left."""
        if not self.left:
            return
        block, first = Block(self.launch.warps), self.started * self.launch.warps
        self.left, self.started = self.left - 1, self.started + 1
        for place in range(first, first + self.launch.warps):
            self.wake(time, Warp(block, place % SCHEDULERS))

    def wake(self, time: float, warp: Warp) -> None:
        heapq.heappush(self.waiting, (time, next(self.order), warp))

    def step(self, time: float, warp: Warp) -> None:
        """Issues the warp's next instruction, or has it wait until that may be possible."""
        each = self.launch.code[self.launch.path[warp.next]]
        unit, cycles = cost(each)
        ready = max(self.ready(warp, each, time), time)
        if ready == time:
            free = self.shared - 8 if unit == "shared" else self.units[unit][warp.scheduler]
            ready = max(time, self.issued[warp.scheduler] + 1, free)
        if ready > time:
            return self.wake(ready, warp)
        self.issued[warp.scheduler] = time
        self.busy.update({"issue": 1, unit: cycles})
        if unit == "shared":
            self.shared = max(self.shared, time) + cycles
        else:
            self.units[unit][warp.scheduler] = time + cycles
        self.note_result(time, warp, each)
        warp.next += 1
        if each.name.startswith("BAR.SYNC"):
            return self.arrive(time, warp, each)
        self.wake(time + max(each.stall, 1), warp)

    def ready(self, warp: Warp, each: Instruction, time: float) -> float:
        """When what an instruction waits for is there."""
        ready = max((warp.barriers[place] for place in range(6) if each.waits_for >> place & 1), default=time)
        if each.opcode == "DEPBAR" and warp.groups:
            left = int(re.findall(r"0x([0-9a-f]+)", each.operands)[-1], 16)
            done, warp.groups = warp.groups[: len(warp.groups) - left], warp.groups[len(warp.groups) - left :]
            warp.barriers[0] = max([warp.barriers[0], *done])
            ready = max([ready, *done])
        if each.name.startswith("WARPGROUP.DEPBAR"):
            ready = max(ready, warp.products)
        return ready

    def note_result(self, time: float, warp: Warp, each: Instruction) -> None:
        """When the result of what has just been issued will be there."""
        latency = float(LATENCY.get(each.opcode, OTHER_LATENCY))
        if each.opcode in GLOBAL:
            latency = self.access(time, each, self.launch.path[warp.next] in self.from_memory)
            if each.opcode == "LDGSTS":
                warp.copies.append(time + latency)
            elif each.opcode == "STG":
                latency = STORE
        elif each.opcode == "LDGDEPBAR":
            warp.groups.append(max(warp.copies, default=time))
            warp.copies = []
        elif each.opcode == "HGMMA":
            warp.products = max(warp.products, self.units["tensor"][warp.scheduler] + HGMMA_LATENCY)
        if each.write_barrier != NO_BARRIER:
            place = each.write_barrier
            warp.barriers[place] = max(warp.barriers[place], time + latency)
        if each.read_barrier != NO_BARRIER:
            place = each.read_barrier
            warp.barriers[place] = max(warp.barriers[place], time + min(latency, OTHER_LATENCY))

    def access(self, time: float, each: Instruction, from_memory: bool) -> float:
        """The latency of an access to global memory, which takes its turn in the queues."""
        named = 32 * each.bits / 8
        if not from_memory:
            self.l2 = max(self.l2, time) + named / L2_BYTES
            return max(L2_LATENCY, self.l2 - time + 0.7 * L2_LATENCY)
        moved = named * self.moved_share
        self.busy["memory"] += moved / self.memory_rate
        self.l2 = max(self.l2, time) + named / L2_BYTES
        self.memory = max(self.memory, time) + moved / self.memory_rate
        queue = max(self.memory, self.l2) - time
        return max(MEMORY_LATENCY, queue + 0.6 * MEMORY_LATENCY)

    def arrive(self, time: float, warp: Warp, each: Instruction) -> None:
        """A warp at a barrier sleeps until all others of its block have come."""
        block = warp.block
        block.arrived.append((time, warp))
        if len(block.arrived) < block.running:
            return
        last = max(time for time, _ in block.arrived)
        for _, other in block.arrived:
            self.wake(last + BARRIER + each.stall, other)
        block.arrived = []


def _is_wide(each: Instruction) -> bool:
    return each.opcode in GLOBAL and each.bits == 128


def cost(each: Instruction) -> tuple[str, int]:
    """The unit of an instruction, and the cycles it takes there: of its scheduler, or of all schedulers."""
    if each.opcode == "HGMMA":
        rows, columns, depth = map(int, re.search(r"(\d+)x(\d+)x(\d+)", each.name).groups())
        return "tensor", max(1, rows // SCHEDULERS * columns * depth // 512)
    if each.opcode == "HMMA":
        return "tensor", 6 if "16816" in each.name else 3
    if each.opcode == "MUFU":
        return "exp", 8
    if each.opcode in TO_SHARED_MEMORY_UNIT:
        if each.opcode in ("LDSM", "STSM"):
            return "shared", 4 if re.search(r"\.(x4|4)\b|\.M88\.4", each.name) else 2
        return "shared", 2 if each.opcode == "SHFL" else max(1, each.bits // 32)
    if each.opcode in HALF_RATE:
        return "half", 2
    return ("multiply", 2) if each.opcode == "IMAD" else ("full", 1)
