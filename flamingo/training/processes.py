"""The same calls for one process and for several."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor


def rank() -> int:
    """The number of this process; 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def say(command: str, line: str) -> None:
    """Says something on stderr, once, whatever the number of processes."""
    if rank() == 0:
        print(f"{command}: {line}", file=sys.stderr)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Adds a tensor up over all processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """Every process's value, for all of them."""
    values = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    if world_size() > 1:
        distributed.barrier()


def whole(tensor: Tensor) -> Tensor:
    """A whole copy on the CPU of a tensor that may be sharded; all processes have to call."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has whole, placed and sharded as another."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def device_of(name: str) -> torch.device:
    """A device by its name; "auto" is this process's GPU where there is one.

    Raises:
        ValueError: if there is none of this name that can compute.
    """
    if name != "auto":
        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError) as error:  # that of a torch without CUDA
            raise ValueError(
                f'expected device to be "auto", "cpu" or a GPU of this machine as "cuda:0", got "{name}".'
            ) from error
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def process_group(device: torch.device, timeout: timedelta | None = None) -> Iterator[None]:
    """Joins the processes that torchrun has started; without torchrun it does nothing.

    Args:
        device: of this process.
        timeout: how long one waits for another; None for torch's own, 10 or 30 minutes.
    """
    if not distributed.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield
        distributed.barrier()  # the first to leave would close the connection
    finally:
        distributed.destroy_process_group()


def leave() -> NoReturn:
    """Ends this process, one of several, without the interpreter's own end.

    One of gloo's threads may still hold the tensors of the last exchange, and caches of DTensor keep it from
    being joined. Before Python 3.14 a thread that gives tensors back to an interpreter that is ending aborts
    the process ("terminate called without an active exception"), and torchrun takes the run for a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
