"""What all fused layers are, and what those of several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._anatomy import Kind
from .._backends import dispatch
from .._predicates import has_hooks_below, is_plain
from ..fold import Affine, Gate, Scale, put_originals
from ..ops import gated_residual
from ..sublayers import arguments, gated_feed_forward

ATTENTION_FOLDS = (Affine("norm", ("to_q",)), Scale("scale", ("to_q",)))
BLOCK_FOLDS = (Gate("attn_gate", "attn.to_out"), Affine("ff.0", ("ff.1",)), Gate("ff_gate", "ff.3"))


class Fused(nn.Module):
    """What every fused layer is an instance of; its repr names the backend.

    Attributes:
        fixes: the known bugs of the module it stands for that it does not repeat, see `patch`.
        folds: what `fold` may multiply into its weights.
        folded: by path what it had before `fold`; empty before.
        anatomy: what a module that it stands for is made of.
    """

    fixes: frozenset[str] = frozenset()
    folds: tuple[Affine | Gate | Scale, ...] = ()
    folded: Mapping[str, Any] = {}
    anatomy: Mapping[str, Kind] = {}

    def is_watched(self) -> bool:
        """Whether hooks see how it calls its parts. Then they are called by the forward it stands for.

        That repeats known bugs: where these are fixed the parts are called from here.
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
    """Whether it is one of ours, and nobody notices that its parts are computed elsewhere."""
    return isinstance(module, Fused) and is_plain(module, type(module)) and "attend" not in vars(module)


def gate_of(block: Any, name: str) -> Tensor | None:
    """A gate of a block, or None where `fold` has opened it."""
    return None if name in block.folded else getattr(block, name)


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """`x + tanh(gate) * y`; None stands for an open gate."""
    return x + y if gate is None else gated_residual(x, y, gate)


def add_feed_forward(x: Tensor, ff: nn.Module, gate: Tensor | None) -> Tensor:
    """`x + tanh(gate) * ff(x)`, as one sublayer where ff is a plain pre-norm network. None stands for 1."""
    parts = plain_feed_forward(ff, x)
    if parts is not None:
        return gated_feed_forward(x, gate=gate, **parts._asdict())
    return add_gated(x, ff(x), gate)


def plain_feed_forward(ff: nn.Module, x: Tensor) -> arguments.FeedForward | None:
    """The parts of a pre-norm network, where they are plain."""
    chain: list[Any] = list(ff) if isinstance(ff, nn.Sequential) and is_plain(ff, nn.Sequential) else []
    return arguments.feed_forward_of(x, *chain) if len(chain) == 4 else None
