"""Tasks are shared, a process that dies costs one of them, and none is begun too late."""

from __future__ import annotations

import os
import time

import pytest

from flamingo_kernels.commands.gpu import crew as module
from flamingo_kernels.commands.gpu.crew import Crew, Lost
from flamingo_kernels.commands.gpu.proofs import Task, perform
from flamingo_kernels.testing import GatedResidualCase

LATE = Lost("late", "no time was left")


def double(task: int) -> tuple[int, int]:
    return 2 * task, os.getpid()


def divide(task: int) -> float:
    return 1 / task


def die_of_three(task: int) -> int:
    if task == 3:
        os._exit(7)
    return 2 * task


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pytest.fixture(scope="module")
def two():
    """Their start takes most of the time of these tests."""
    with Crew(2) as crew:
        yield crew


def share(crew, work, tasks, seconds=60.0, **options):
    return dict(crew.share(work, tasks, end=time.monotonic() + seconds, **options))


def test_in_this_process():
    with Crew(0) as crew:
        assert share(crew, double, [1, 2]) == {1: (2, os.getpid()), 2: (4, os.getpid())}


def test_what_comes_too_late_is_not_begun():
    with Crew(0) as crew:
        found = share(crew, double, [1, 2], seconds=-1)
    assert found == {1: LATE, 2: LATE}


def test_processes_share_the_tasks_and_are_kept(two):
    first, second = share(two, double, range(8)), share(two, double, range(8), most=1)
    assert {task: result for task, (result, _) in first.items()} == {task: 2 * task for task in range(8)}
    pids, alone = ({pid for _, pid in found.values()} for found in (first, second))
    assert len(pids) <= 2
    assert len(alone) == 1
    assert alone <= pids
    assert os.getpid() not in pids


def test_a_proof_is_made_in_another_process(two):
    task = Task("parity", GatedResidualCase(), "reference")
    assert share(two, perform, [task]) == {task: perform(task)}


def test_a_process_that_dies_costs_its_task_alone(two):
    found = share(two, die_of_three, range(1, 6), most=1)
    assert found == {1: 2, 2: 4, 3: Lost("failed", "its process ended with 7"), 4: 8, 5: 10}


def test_a_task_that_takes_too_long_is_ended(two):
    began = time.monotonic()
    found = share(two, sleep, [300.0, 1.0], seconds=0.3, most=1)
    assert time.monotonic() - began < 100
    assert set(found.values()) == {LATE}
    assert share(two, sleep, [0.0]) == {0.0: 0.0}, "the crew goes on"


def test_a_task_that_hangs_costs_itself_alone(two):
    found = share(two, sleep, [0.0, 300.0, 0.1], each=1.5, most=1)
    assert found == {0.0: 0.0, 300.0: Lost("failed", "it hangs: not done after 2 s"), 0.1: 0.1}
    assert not two.stuck


def test_the_start_of_a_process_is_no_part_of_its_task():
    """It takes seconds to import torch, of which the task has one."""
    with Crew(1) as crew:
        found = share(crew, sleep, [300.0, 0.0], each=1.0)
    assert found == {300.0: Lost("failed", "it hangs: not done after 1 s"), 0.0: 0.0}


def test_what_a_task_raises_is_its_failure(two):
    for crew in (Crew(0), two):
        found = share(crew, divide, [0, 1])
        assert found == {0: Lost("failed", "ZeroDivisionError: division by zero"), 1: 1.0}


def test_a_process_that_cannot_be_ended_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    crew = Crew(1)
    worker = module._Worker()
    monkeypatch.setattr(worker.process, "kill", lambda: None)
    crew._stop(worker)
    assert crew.stuck
    monkeypatch.undo()
    crew.stuck = False
    worker.process.kill()
    worker.process.join()


def test_a_process_whose_gpu_is_lost_does_not_go_on(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert module._sound()
    monkeypatch.setattr(module.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "synchronize", lost)
    assert not module._sound()
