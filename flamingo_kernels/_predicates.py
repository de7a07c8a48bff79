"""Questions about tensors and modules that are asked before a fused kernel replaces what they would do."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ._constant import constant


@constant
def transform() -> str:
    """The name of what transforms the running code, operation by operation, or an empty string."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func or torch.vmap"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else ""


def is_batched(tensor: Tensor | None) -> bool:
    """Whether `is_grads_batched=True` made this gradient, which `transform` does not report."""
    return tensor is not None and torch._C._dispatch_keys(tensor).has("Batched")


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether forward-mode differentiation follows this tensor."""
    in_forward_mode = tensor is not None and forward_ad._current_level >= 0
    return in_forward_mode and forward_ad.unpack_dual(tensor).tangent is not None


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record the call; a call that it need not record costs less."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_recording(tensor: Tensor) -> bool:
    """Whether the running code is recorded for other values too, so that no value may be read or kept."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transform():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is a wrapper of torch.func, for a batch or a derivative."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_eager(tensor: Tensor) -> bool:
    """Whether the tensor has numbers and the running code is neither traced nor transformed."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not transform()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products under torch.autocast on this device; None where autocast is off."""
    # It does not know "meta". torch.amp.is_autocast_available does, but torch 2.10 cannot trace that.
    enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def current_stream(tensor: Tensor) -> int | None:
    """The stream on which work on this tensor is queued now; None on a device without streams."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def is_ordinary(weight: Tensor) -> bool:
    """Whether a weight is nothing but its numbers: no shard, and no integers with a scale."""
    return type(weight) in (nn.Parameter, Tensor, FakeTensor)


def is_plain(module: nn.Module, *kinds: type[nn.Module] | str) -> bool:
    """Whether calling the module runs the forward of one of these classes or names, and nothing else.

    A forward of ours says of which other it is a faster copy: its attribute `same_as`.
    """
    cls = type(module)
    return any(_runs(cls, kind) for kind in kinds) and is_unhooked(module)


def _runs(cls: type[nn.Module], kind: type[nn.Module] | str) -> bool:
    """Whether calling a class runs the forward of `kind`, and that forward is still the library's own."""
    if isinstance(kind, str):
        if f"{cls.__module__}.{cls.__name__}" != kind:
            return False
        kind = cls
    forward = getattr(cls, "forward", None)
    if getattr(forward, "same_as", forward) is not kind.forward:
        return False
    home = _library(getattr(kind.forward, "__globals__", {}).get("__name__", ""))
    return _calls_forward(cls) and any(_library(base.__module__) == home for base in kind.__mro__)


def _calls_forward(cls: type[nn.Module]) -> bool:
    """Whether a class is called as torch calls a module."""
    return cls.__call__ is nn.Module.__call__ and cls._call_impl is nn.Module._call_impl


def _library(module: str) -> str:
    return module.partition(".")[0]


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class on its parameters, and nothing else."""
    return not (_has_hooks(module) or _has_any_global_hook())


def has_hooks_below(module: nn.Module) -> bool:
    """Whether hooks see the calls that a module makes of its children: hooks on them, or on all modules."""
    return _has_any_global_hook() or any(map(_has_hooks_within, module._modules.values()))


def _has_hooks_within(module: nn.Module | None) -> bool:
    if module is None:
        return False
    return _has_hooks(module) or any(map(_has_hooks_within, module._modules.values()))


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, or equivalents: a forward of its own, or parametrised weights."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or "_call_impl" in vars(module)
        or "parametrizations" in module._modules
    )
