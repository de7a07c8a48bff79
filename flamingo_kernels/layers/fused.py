"""The base class of all fused layers, and what the layers of several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .._anatomy import Kind
from .._backends import dispatch
from .._predicates import has_hooks_below, is_plain
from ..fold import Affine, Gate, Scale, put_originals
from ..ops import gated_residual
from ..sublayers import arguments, gated_feed_forward
from .protocols import GatedBlock

ATTENTION_FOLDS = (Affine("norm", ("to_q",)), Scale("scale", ("to_q",)))
BLOCK_FOLDS = (Gate("attn_gate", "attn.to_out"), Affine("ff.0", ("ff.1",)), Gate("ff_gate", "ff.3"))


class Fused(nn.Module):
    """Base class of every fused layer; its repr names the backend.

    Attributes:
        fixes: the known bugs of the original module that this layer does not repeat, see `patch`.
        folds: what `fold` may multiply into the weights.
        folded: the values before `fold`, by path; empty unless folded.
        anatomy: what the original module is made of.
    """

    fixes: frozenset[str] = frozenset()
    folds: tuple[Affine | Gate | Scale, ...] = ()
    folded: Mapping[str, Any] = {}
    anatomy: Mapping[str, Kind] = {}

    def is_watched(self) -> bool:
        """Whether hooks see the calls of this layer's parts, so that the original's forward must make them.

        The original's forward repeats known bugs, so a layer with fixes calls its parts itself.
        """
        return not self.fixes and has_hooks_below(self)

    def train(self, mode: bool = True) -> Any:
        if mode and self.folded:
            raise RuntimeError(
                f"{type(self).__name__}: folded for inference; unfold(model) before training it."
            )
        return super().train(mode)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        put_originals(self, state, prefix)
        return state

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.folded:
            raise RuntimeError(f"{type(self).__name__}: folded for inference; unfold(model) before loading.")
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"backend={dispatch.default_backend}"]))


def is_fused(module: nn.Module) -> bool:
    """Whether a module is a fused layer without hooks and replaced methods: a block may compute its parts."""
    return isinstance(module, Fused) and is_plain(module, type(module)) and "attend" not in vars(module)


def gate_unless_open(block: Fused | GatedBlock, name: str) -> Tensor | None:
    """A gate of a block, or None if `fold` has opened it: then its factor is 1."""
    return None if name in block.folded else getattr(block, name)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """`x + tanh(gate) * y`; a gate of None is open."""
    return x + y if gate is None else gated_residual(x, y, gate)


def add_feed_forward(
    x: Tensor,
    plain: arguments.FeedForward | None,
    network: Callable[[Tensor], Tensor],
    gate: Tensor | None,
) -> Tensor:
    """`x + tanh(gate) * network(x)`, as one sublayer if the network is plain; a gate of None is open.

    Args:
        x: `[..., D]`.
        plain: the network as arguments of the sublayer, or None.
        network: the network with its norm, called if it is not plain.
        gate: alpha.
    """
    if plain is None:
        return add_gated(x, network(x), gate)
    return gated_feed_forward(x, gate=gate, **plain._asdict())


def sequential_feed_forward(ff: nn.Module, x: Tensor) -> arguments.FeedForward | None:
    """The plain norm, linear layer, activation and linear layer of an `nn.Sequential`."""
    chain = chain_of(ff)
    return None if chain is None else arguments.as_feed_forward(x, *chain)


def chain_of(ff: nn.Module) -> list[nn.Module] | None:
    """The four modules of a feed-forward network that calls one after the other and has no hooks."""
    chain: list[nn.Module] = []
    if isinstance(ff, nn.Sequential | nn.ModuleList) and is_plain(ff, nn.Sequential, nn.ModuleList):
        chain = list(ff)
    return chain if len(chain) == 4 else None


def network_of(ff: nn.Module) -> Callable[[Tensor], Tensor]:
    """The feed-forward network as a function; one in a list has no forward."""
    return partial(_call_in_turn, ff) if isinstance(ff, nn.ModuleList) else ff


def _call_in_turn(modules: nn.ModuleList, x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x
