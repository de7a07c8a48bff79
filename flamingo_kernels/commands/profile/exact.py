"""A model in float64, which others are held against: whole, or a block at a time where that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .subject import convert

EXACT = torch.float64


@contextmanager
def in_float64(model: nn.Module, *, by_block: bool = False) -> Iterator[None]:
    """While this lasts a model computes in float64, with the numbers that it has.

    Args:
        model: the tensors stay the objects they are: a twin that shares them follows.
        by_block: the blocks of its lists of modules are in float64 only while they run, forward and without
            gradients.
    """
    dtype = next(model.parameters()).dtype
    if not by_block:
        convert(model, EXACT)
        yield
        convert(model, dtype)  # loses nothing: the numbers were of this dtype before
        return
    blocks = list(blocks_of(model))
    inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
    kept = [(tensor, tensor.data) for tensor in _tensors(model) if id(tensor) not in inside]
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_while_it_runs(block))
        for tensor, data in kept:
            tensor.data = data.to(EXACT)
        yield
    for tensor, data in kept:
        tensor.data = data


def bytes_needed(model: nn.Module, *, by_block: bool) -> int:
    """What a comparison in float64 takes.

    Whole, its weights in float64 and about as much again for its gradients; by block, the model as it is, and
    the largest block and what is outside of all blocks in float64.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    if not by_block:
        return 2 * EXACT.itemsize * size
    blocks = [list(block.parameters()) for block in blocks_of(model)]
    inside = {id(each): each.numel() for block in blocks for each in block}
    largest = max((sum(each.numel() for each in block) for block in blocks), default=0)
    as_it_is = next(model.parameters()).dtype.itemsize * size
    return as_it_is + EXACT.itemsize * (size - sum(inside.values()) + largest)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in lists; a list in a list is no block, as it does not run."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from blocks_of(child)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()]


@contextmanager
def _while_it_runs(block: nn.Module) -> Iterator[None]:
    kept: list[list[tuple[Tensor, Tensor]]] = []

    def widen(*_: Any) -> None:
        kept.append([(tensor, tensor.data) for tensor in _tensors(block)])
        for tensor, data in kept[-1]:
            tensor.data = data.to(EXACT)

    def restore(*_: Any) -> None:
        for tensor, data in kept.pop():
            tensor.data = data

    before = block.register_forward_pre_hook(widen)
    after = block.register_forward_hook(restore, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
