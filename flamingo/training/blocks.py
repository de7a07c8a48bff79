"""The blocks of a model: what is sharded and recomputed as one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint


def blocks(model: nn.Module) -> list[nn.Module]:
    """A Flamingo's resampler, gated blocks and layers of its language model.

    Raises:
        ValueError: for a model with other parts.
    """
    parts = [getattr(model, name, None) for name in ("resampler", "cross_attn", "language")]
    resampler, cross_attn, language = parts
    if not (resampler and isinstance(cross_attn, nn.ModuleDict) and language):
        raise ValueError(
            f"train: expected a model with resampler, cross_attn and language, got {type(model).__name__}. "
            "Name its blocks: train(..., blocks=[...])."
        )
    layers = next(module for module in language.modules() if isinstance(module, nn.ModuleList))
    return [resampler, *cross_attn.values(), *layers]


@contextmanager
def recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the modules keep their inputs only, and compute again what a backward pass needs."""
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def shard(model: nn.Module, modules: Sequence[nn.Module], *, bfloat16: bool) -> None:
    """Splits the parameters of the modules, and of the rest of the model, over all processes (FSDP2).

    With `bfloat16` a block's parameters are gathered in bfloat16 and its gradients added in float32.
    """
    # Inputs are left as they are: the angles of rotary positions need their float32.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32 if bfloat16 else None,
        cast_forward_inputs=False,
    )
    for module in modules:
        fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
