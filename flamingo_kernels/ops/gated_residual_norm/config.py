"""How the Triton kernels of the gated residual with a norm are launched: in whole rows where these fit."""

from __future__ import annotations

from functools import cache

import torch

from ..._backends.triton.config import Choice, Device, power_of_two
from ..gated_residual.config import Rows

BLOCK = 2048  # columns: the least that a tile has elements of, and what a row is cut into
_PIPELINE = 65536  # bytes of shared memory that every device has for the rows under way


@cache
def forward(columns: int, dtype: torch.dtype, device: Device) -> Choice[Rows]:
    block = power_of_two(columns)
    return Choice.of(_tile(block, 16, device), _tile(block, 8, device), key=(columns, str(dtype)))


def block_d(columns: int, per_channel: bool) -> int:
    """The width of a tile of the backward pass: a row, or less where its sums would fill the registers."""
    row = power_of_two(columns)
    return row if row <= (4096 if per_channel or columns % 8 else 8192) else BLOCK


def most_programs(block: int, device: Device) -> int:
    """Among how many programs the backward pass divides its work: as many as the device holds at once."""
    return device.multiprocessors * (2 if block <= BLOCK else 1)


@cache
def backward(columns: int, block: int, dtype: torch.dtype, device: Device) -> Choice[Rows]:
    """The sums fill the registers, so the next rows wait in shared memory."""
    per_thread = 8 if block <= 2 * BLOCK or _is_amd(device) else 16
    if columns % 8:  # every element has its own address, and on AMD its own mask in scalar registers
        per_thread = 2 if _is_amd(device) else 4
    num_stages = min(3, 1 + _PIPELINE // (4 * dtype.itemsize * max(block, BLOCK)))
    return Choice.of(
        _tile(block, per_thread, device, num_stages),
        _tile(block, per_thread, device),
        _tile(block, 4 if columns % 8 else 16, device),
        key=(columns, block, str(dtype)),
    )


@cache
def backward_means(dtype: torch.dtype, device: Device) -> Choice[Rows]:
    return Choice.of(_tile(BLOCK, 8, device, num_stages=3), _tile(BLOCK, 8, device), key=(str(dtype),))


def _tile(block: int, per_thread: int, device: Device, num_stages: int = 1) -> Rows:
    """Each thread has so many elements, or more of a row too wide for that."""
    elements = max(block, BLOCK)
    threads = min(elements // per_thread, 1024)
    lanes = 64 if _is_amd(device) else 32  # of a warp
    return Rows(block_n=elements // block, num_warps=threads // lanes, num_stages=num_stages)


def _is_amd(device: Device) -> bool:
    return device.architecture.startswith("gfx")
