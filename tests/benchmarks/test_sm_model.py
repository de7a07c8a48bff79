"""The model of a multiprocessor: code made by hand, whose cycles are known, and what it predicts of ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.sm_model import multiprocessor
from benchmarks.sm_model.machine_code import Instruction, parse
from benchmarks.sm_model.multiprocessor import Device, Launch, predict, resident_blocks
from benchmarks.sm_model.path import follow, loops
from tests.helpers import ROOT
from tests.helpers.cuda_binary import tool

ONE = Device("one multiprocessor", multiprocessors=1, clock=1.0, bandwidth=8.0)  # 8 bytes a cycle
PREDICTED = ROOT / "benchmarks" / "sm_model" / "predicted.json"


def code(*names: str, **of_all: int) -> list[Instruction]:
    return [Instruction(16 * i, name, **of_all) for i, name in enumerate([*names, "EXIT"])]


def cycles(instructions: list[Instruction], **changes) -> float:
    launch = Launch("by hand", instructions, range(len(instructions)), 1, 1, 1, bytes=0.0)
    return 1e3 * predict(replace(launch, **changes), ONE).microseconds


def test_a_warp_waits_for_the_stall_of_each_instruction():
    assert cycles(code("FADD", "FADD", "FADD", stall=4)) == 4 * 4


def test_a_warp_waits_for_the_result_of_a_load():
    load = Instruction(0, "LDS", stall=1, write_barrier=2)
    use = Instruction(16, "FADD", stall=4, waits_for=1 << 2)
    last = Instruction(32, "EXIT", stall=1)
    assert cycles([load, use, last]) == multiprocessor.LATENCY["LDS"] + 4 + 1
    assert cycles([load, replace(use, waits_for=1 << 3), last]) == 1 + 4 + 1


def test_warps_share_the_schedulers_and_their_units():
    exps = code(*["MUFU.EX2"] * 10, stall=1)  # each takes its unit for 8 cycles
    assert cycles(exps, warps=4) == cycles(exps), "one on each of the four schedulers"
    assert cycles(exps, warps=8) == pytest.approx(2 * cycles(exps), rel=0.2)
    adds = code(*["FADD"] * 64, stall=4)  # four warps fill what one leaves of its scheduler
    assert cycles(adds, warps=16) == pytest.approx(cycles(adds), rel=0.1)
    assert cycles(adds, warps=32) == pytest.approx(2 * cycles(adds), rel=0.1)


def test_a_barrier_holds_all_warps_until_the_last_has_come():
    # the fifth warp arrives a cycle after the first, which shares its scheduler, and leaves a cycle after it
    assert cycles(code("BAR.SYNC", stall=1), warps=5) == 1 + multiprocessor.BARRIER + 1 + 1 + 1
    slow = ["MUFU"] * 10  # twenty for one unit, which takes 8 cycles for each
    assert 160 < cycles(code(*slow, "BAR.SYNC", stall=1), warps=5) < 160 + multiprocessor.BARRIER + 8


def test_memory_moves_what_a_launch_must_at_its_rate():
    loads = code(*["LDG.E.128"] * 32, stall=1, write_barrier=0)
    loads[-1] = replace(loads[-1], waits_for=1)
    named = 32 * 512
    assert cycles(loads, bytes=float(named)) == pytest.approx(named / 8 + 0.6 * 650, rel=0.01)
    assert cycles(loads, bytes=named / 4) == pytest.approx(named / 4 / 8 + 0.6 * 650, rel=0.01)
    near = cycles(loads, bytes=float(named), cached=range(32))
    assert near == pytest.approx(named / multiprocessor.L2_BYTES + 0.7 * 280, rel=0.05)


def test_blocks_beyond_those_that_fit_come_after_them():
    adds = code(*["FADD"] * 100, stall=4)
    alone = cycles(adds)
    assert cycles(adds, blocks=2, resident=2) == pytest.approx(alone, abs=45)
    assert cycles(adds, blocks=2) == pytest.approx(2 * alone + multiprocessor.BLOCK_START, abs=1)
    # six are modelled, with five gaps, and stand for all
    assert cycles(adds, blocks=24) == pytest.approx(4 * (6 * alone + 5 * multiprocessor.BLOCK_START), abs=1)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(32, 0, 4, 16), (168, 0, 4, 3), (169, 0, 4, 2), (128, 0, 8, 2), (32, 100 * 1024, 4, 2), (32, 0, 1, 32)],
)
def test_how_many_blocks_fit(registers, shared, warps, blocks):
    assert resident_blocks(registers, shared, warps) == blocks


# for (i = 0; ...) { if (!P1) A; for (j = 0; ...) B; }  if (0 < n) for (k = 0; ...) C;
LOOPS = [
    Instruction(0, "MOV"),
    Instruction(16, "BRA", "0x30", predicate="P1"),
    Instruction(32, "A"),
    Instruction(48, "B"),
    Instruction(64, "BRA", "0x30", predicate="P0"),
    Instruction(80, "BRA", "0x10", predicate="P2"),
    Instruction(96, "BRA", "0x90", predicate="P3"),
    Instruction(112, "C"),
    Instruction(128, "BRA", "0x70", predicate="P4"),
    Instruction(144, "EXIT", predicate="P5"),
    Instruction(160, "BRA.DIV", "UR4, 0x0"),
    Instruction(176, "EXIT"),
    Instruction(192, "BRA", "0xc0"),  # what the compiler ends a kernel with
]


def names(runs: list[int], taken: tuple[int, ...] = ()) -> str:
    return "".join(LOOPS[place].name for place in follow(LOOPS, runs, taken) if len(LOOPS[place].name) == 1)


def test_a_path_follows_the_loops():
    assert loops(LOOPS) == [(3, 4), (1, 5), (7, 8)]
    assert names([1, 1, 1]) == "ABC"
    assert names([3, 2, 2]) == "ABBBABBBCC"
    assert names([2, 1, 0]) == "ABB", "a branch over a loop that does not run is taken"
    assert names([2, 2, 1], taken=(0,)) == "BBBBC"
    with pytest.raises(ValueError, match=r"3 loops are in the code .*, and 2 are told of"):
        follow(LOOPS, [1, 1])


def test_a_slow_division_is_jumped_over():
    division = [
        Instruction(0, "BRA", "0x20", predicate="!P0"),
        Instruction(16, "CALL.REL.NOINC", "0x100"),
        Instruction(32, "EXIT"),
    ]
    assert follow(division, []) == [0, 2]


def test_the_control_words_are_read():
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                         /* 0x00000a00ff017b82 */
                                                                                  /* 0x000ff00000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64+0x10] ;          /* 0x0000000602048981 */
                                                                                  /* 0x004ea8000c1e1d00 */
        /*0020*/                   BRA 0x20;                                      /* 0xfffffffc00fc7947 */
                                                                                  /* 0x000fc0000383ffff */
    """
    constant, load, last = parse(text)
    assert (constant.opcode, constant.predicate, constant.stall, constant.waits_for) == ("LDC", "", 8, 0)
    assert (load.name, load.predicate, load.bits) == ("LDG.E.128", "!P0", 128)
    assert (load.write_barrier, load.read_barrier, load.waits_for, load.stall) == (2, 7, 4, 4)
    assert last.target == 0x20


@pytest.mark.slow
def test_no_prediction_has_grown(tmp_path):
    if shutil.which("nvcc") is None or tool() is None:
        pytest.skip("nvcc or cuobjdump is not on the PATH")
    pytest.importorskip("triton", reason="the Triton backend is optional")
    command = [sys.executable, "-m", "benchmarks.sm_model", "--json", tmp_path / "now.json"]
    subprocess.run(command, cwd=ROOT, check=True)
    now, before = (json.loads(file.read_text()) for file in (tmp_path / "now.json", PREDICTED))
    assert now.keys() == before.keys()
    grown = {name: (before[name], time) for name, time in now.items() if time > 1.1 * before[name]}
    assert not grown, f"{grown} (before, now); where that is meant: --json {PREDICTED.relative_to(ROOT)}"
