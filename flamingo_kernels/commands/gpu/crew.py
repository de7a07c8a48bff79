"""Processes that share a list of tasks: kernels compile side by side; one that hangs or dies costs one task.

A call that hangs on a GPU cannot be interrupted from within its process, only with it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from ..measure.text import first_line

PATIENCE = 5.0  # seconds for a process that was killed to be gone: the driver may hold it

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lost:
    """What stands for a result: the task "failed", by itself or with its process, or was "late"."""

    status: str
    why: str


class Crew:
    """A number of processes, started when there is work and kept until the end of the `with` block.

    Args:
        workers: how many; 0 to work in this process, one task after the other.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.idle: list[_Worker] = []
        self.busy: dict[Connection, _Worker] = {}
        self.stuck = False  # a process that was killed is still there

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.idle:
            self._stop(worker)
        self.idle = []

    def share(
        self,
        work: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        end: float,
        each: float = math.inf,
        most: int | None = None,
    ) -> Iterator[tuple[Task, Result | Lost]]:
        """Every task with its result, as they come.

        Args:
            work: does a task; a function that another process can import.
            tasks: what is to be done, the most important first.
            end: when to stop, on the clock of `time.monotonic`.
            each: seconds after which a task is taken to hang, and ended with its process.
            most: how many tasks at once, where that is less than there are workers.
        """
        waiting = deque(tasks)
        side_by_side = min(self.workers, most or self.workers)
        if side_by_side:
            yield from self._share(work, waiting, end, each, side_by_side)
        while waiting and not side_by_side and time.monotonic() < end:
            task = waiting.popleft()
            yield task, _attempt(work, task)
        for task in waiting:
            yield task, Lost("late", "no time was left")

    def _share(
        self, work: Callable[[Task], Result], waiting: deque[Task], end: float, each: float, side_by_side: int
    ) -> Iterator[tuple[Task, Result | Lost]]:
        try:
            while (waiting or self.busy) and time.monotonic() < end:
                while waiting and len(self.busy) < side_by_side:
                    self._begin(work, waiting.popleft())
                longest = min(worker.began for worker in self.busy.values()) + each
                ready = wait(list(self.busy), max(0.0, min(end, longest) - time.monotonic()))
                for connection in ready:
                    yield from self._hear(connection)
                overdue = [at for at, worker in self.busy.items() if worker.began + each < time.monotonic()]
                for connection in overdue:
                    yield self._give_up(connection, each)
        finally:
            for worker in self.busy.values():
                waiting.appendleft(worker.task)
                self._stop(worker)
            self.busy = {}

    def _begin(self, work: Callable[[Task], Result], task: Task) -> None:
        worker = self.idle.pop() if self.idle else _Worker()
        worker.task, worker.began = task, time.monotonic() if worker.started else math.inf
        worker.connection.send((work, task))
        self.busy[worker.connection] = worker

    def _hear(self, connection: Any) -> Iterator[tuple[Any, Any]]:
        """A task with its result, or nothing where its process has only just started."""
        worker = self.busy[connection]
        try:
            result, goes_on = connection.recv()
        except EOFError:
            worker.process.join(PATIENCE)
            result, goes_on = Lost("failed", f"its process ended with {worker.process.exitcode}"), False
        if result is _Started:
            worker.started, worker.began = True, time.monotonic()
            return
        del self.busy[connection]
        if goes_on:
            self.idle.append(worker)
        else:
            self._stop(worker)
        yield worker.task, result

    def _give_up(self, connection: Connection, each: float) -> tuple[Any, Lost]:
        worker = self.busy.pop(connection)
        self._stop(worker)
        return worker.task, Lost("failed", f"it hangs: not done after {each:.0f} s")

    def _stop(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()
        worker.process.join(PATIENCE)
        self.stuck |= worker.process.is_alive()


class _Started:
    """What a process says first, since its start is no part of its first task."""


class _Worker:
    task: Any
    began: float
    started = False

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


def _attempt(work: Callable[[Task], Result], task: Task) -> Result | Lost:
    try:
        return work(task)
    except Exception as error:
        return Lost("failed", first_line(error))


def _serve(connection: Connection) -> None:
    """Do tasks until there are no more, or until this process' GPU is lost."""
    torch.set_num_threads(1)  # the crew is parallel enough
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    connection.send((_Started, True))
    goes_on = True
    while goes_on:
        try:
            work, task = connection.recv()
        except EOFError:
            return
        result = _attempt(work, task)
        goes_on = _sound()
        connection.send((result, goes_on))


def _sound() -> bool:
    """Whether this process can still use its GPU: after a fault in a kernel every call fails."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # for the others
    except RuntimeError:
        return False
    return True
