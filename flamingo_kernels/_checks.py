"""What every operator checks and normalises before it chooses a backend."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def expect_shape(operator: str, name: str, tensor: Tensor, expected: tuple[int | str, ...], why: str) -> None:
    """Raise ValueError unless `tensor` has the expected shape; a str in it names a free dimension."""
    if len(tensor.shape) == len(expected):
        for size, want in zip(tensor.shape, expected, strict=True):
            if size != want and not isinstance(want, str):
                break
        else:
            return
    shape = str(tuple(expected)).replace("'", "")
    raise ValueError(f"{operator}: expected {name} with shape {shape} {why}, got {tuple(tensor.shape)}.")


def expect_same_device(operator: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = given
    for name in others:
        if given[name].device != given[first].device:
            raise ValueError(
                f"{operator}: expected {name} on {given[first].device} with {first}, "
                f"got {given[name].device}; move it with .to({first}.device)."
            )


def expect_floating_point(operator: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor is a floating-point one."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"{operator}: expected a floating-point {name}, got {tensor.dtype}.")


def expect_same_dtype(operator: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors have the dtype of the first, a floating-point one."""
    first, *others = tensors
    dtype = tensors[first].dtype
    expect_floating_point(operator, **{first: tensors[first]})
    for name in others:
        if tensors[name].dtype != dtype:
            raise TypeError(
                f"{operator}: expected {name} in {dtype} like {first}, got {tensors[name].dtype}; "
                f"cast it with .to({first}.dtype) or run under torch.autocast."
            )


def expect_head_groups(operator: str, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless every key/value head serves a whole number of query heads."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{operator}: expected the {heads} heads of q to be a multiple of the heads of k, got {kv_heads}."
        )


def expect_latents(operator: str, name: str, keys: Tensor, dim: int) -> None:
    """Raise ValueError if there is no key in this dimension: of none there is no softmax."""
    if keys.shape[dim] == 0:
        raise ValueError(f"{operator}: expected at least one latent key, got {name} {tuple(keys.shape)}.")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast the tensors in its dtype, as its matrix products take them; else as they are."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in _AUTOCAST_CASTS else t for t in tensors)


_AUTOCAST_CASTS = (torch.float32, torch.bfloat16, torch.float16)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, copied only if it has none."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record the call; if not the operator is called bare, which costs less."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_recording(tensor: Tensor) -> bool:
    """Whether what runs now will be replayed with other values, for which anything kept would be stale."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_eager(tensor: Tensor) -> bool:
    """Whether the tensor has numbers, and what runs now runs once: no compiler looks on, nothing is fake."""
    return type(tensor) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def is_plain(module: nn.Module, *kinds: type[nn.Module] | str) -> bool:
    """Whether calling the module runs the forward of one of these classes, or one so named, and no more."""
    cls = type(module)
    name = f"{cls.__module__}.{cls.__name__}"
    known = any(name == kind if isinstance(kind, str) else _runs(cls, kind) for kind in kinds)
    return known and is_unhooked(module)


def _runs(cls: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a class has the forward of another, and nobody gave that one another."""
    home = getattr(kind.forward, "__globals__", {}).get("__name__")
    return cls.forward is kind.forward and any(base.__module__ == home for base in kind.__mro__)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class on its parameters, and nothing else."""
    return not (_has_hooks(module) or _has_any_global_hook())


def has_hooks_below(module: nn.Module) -> bool:
    """Whether anybody sees the calls that a module makes of those within it: their hooks, or those of all."""
    return _has_any_global_hook() or any(map(_has_hooks_within, module._modules.values()))


def _has_hooks_within(module: nn.Module | None) -> bool:
    if module is None:
        return False
    return _has_hooks(module) or any(map(_has_hooks_within, module._modules.values()))


def _has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks, or what is called as they are: a forward of its own, weights that are made."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or "parametrizations" in module._modules
    )
