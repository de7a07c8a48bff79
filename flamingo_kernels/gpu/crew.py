"""Processes that share a list of tasks: kernels compile side by side, and one that dies costs one task."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


class Lost(Exception):
    """A task without a result: its process did not survive it ("failed"), or it came too late ("late")."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class Crew:
    """A number of processes, started when there is work and kept until the end of the `with` block.

    Args:
        workers: how many; 0 to work in this process, one task after the other.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.idle: list[_Worker] = []
        self.busy: dict[Connection, tuple[_Worker, Any]] = {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.idle:
            worker.stop()
        self.idle = []

    def share(
        self, work: Callable[[Task], Result], tasks: Iterable[Task], *, end: float, most: int | None = None
    ) -> Iterator[tuple[Task, Result | Lost]]:
        """Every task with its result, as they come.

        Args:
            work: does a task; a function that another process can import.
            tasks: what is to be done, the most important first.
            end: when to stop, on the clock of `time.monotonic`.
            most: how many tasks at once, where that is less than there are workers.
        """
        waiting = deque(tasks)
        side_by_side = min(self.workers, most or self.workers)
        if side_by_side:
            yield from self._share(work, waiting, end, side_by_side)
        while waiting and not side_by_side and time.monotonic() < end:
            task = waiting.popleft()
            yield task, work(task)
        for task in waiting:
            yield task, Lost("late", "no time was left")

    def _share(
        self, work: Callable[[Task], Result], waiting: deque[Task], end: float, side_by_side: int
    ) -> Iterator[tuple[Task, Result | Lost]]:
        try:
            while waiting or self.busy:
                while waiting and len(self.busy) < side_by_side:
                    self._begin(work, waiting.popleft())
                ready = wait(list(self.busy), max(0.0, end - time.monotonic()))
                if not ready:
                    break
                for connection in ready:
                    yield self._finish(connection)
        finally:
            for worker, task in self.busy.values():
                waiting.appendleft(task)
                worker.stop()
            self.busy = {}

    def _begin(self, work: Callable[[Task], Result], task: Task) -> None:
        worker = self.idle.pop() if self.idle else _Worker()
        worker.connection.send((work, task))
        self.busy[worker.connection] = worker, task

    def _finish(self, connection: Any) -> tuple[Any, Any]:
        worker, task = self.busy.pop(connection)
        try:
            result, goes_on = connection.recv()
        except EOFError:
            worker.process.join()
            result, goes_on = Lost("failed", f"its process ended with {worker.process.exitcode}"), False
        if goes_on:
            self.idle.append(worker)
        else:
            worker.stop()
        return task, result


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(connection: Connection) -> None:
    """Do tasks until there are no more, or until this process' GPU is lost."""
    torch.set_num_threads(1)  # the crew is parallel enough
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    goes_on = True
    while goes_on:
        try:
            work, task = connection.recv()
        except EOFError:
            return
        result = work(task)
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
