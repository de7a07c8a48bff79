"""Which backend runs a call: explicit, by context, by environment, or the first that can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .._predicates import transform
from . import cpu, cuda, env, triton

Reasons = Callable[..., list[str]]

# Where "auto" takes cuda before triton: where it is at least as fast. Modelled, as no GPU has run both: the
# same bytes, and a launch that costs a call of C++. Elsewhere Triton's products are the better ones on sm_90.
_CUDA_BEFORE_TRITON = {"gated_residual"}

# operator -> backend -> function of the operator's tensors that lists why it cannot run them
_OPERATORS: dict[str, dict[str, Reasons]] = {}
# operator -> backend -> the largest sizes it takes, by name
_LIMITS: dict[str, dict[str, dict[str, int]]] = {}
# the same for backends of one operator alone, see `register`
_LIBRARIES: dict[str, dict[str, Reasons]] = {}
_INFERENCE: set[str] = set()
default_backend = env.BACKEND


class UnsupportedError(NotImplementedError):
    """No backend, or not the requested one, can run these inputs. `.reasons` maps backend to reasons."""

    def __init__(self, message: str, reasons: dict[str, list[str]]) -> None:
        super().__init__(message)
        self.reasons = reasons


def register(
    operator: str,
    sizes: Callable[..., dict[str, int]],
    differentiable: bool = True,
    libraries: Mapping[str, Callable[[torch.dtype], str]] | None = None,
    **limits: dict[str, int],
) -> None:
    """Make an operator known.

    Args:
        operator: its name.
        sizes: of its tensors, what a backend may limit, by name.
        differentiable: or for inference alone.
        libraries: backends of this operator alone, among which "auto" chooses in its own way; for each, why
            it cannot compute in a dtype now, or an empty string.
        limits: for each backend that has the operator the largest sizes it takes.
    """
    order = env.BACKENDS if operator in _CUDA_BEFORE_TRITON else ("triton", "cuda", "cpu", "reference")
    _LIMITS[operator] = {name: limits[name] for name in order if name in limits}
    if not differentiable:
        _INFERENCE.add(operator)
    _OPERATORS[operator] = {
        name: partial(_reasons, _GENERAL[name], sizes, largest) for name, largest in _LIMITS[operator].items()
    }
    _LIBRARIES[operator] = {
        name: partial(_library_reasons, why_not) for name, why_not in (libraries or {}).items()
    }


def _reasons(
    general: Reasons,
    sizes: Callable[..., dict[str, int]],
    largest: dict[str, int],
    *tensors: Tensor | None,
) -> list[str]:
    """What keeps a backend from running an operator: as such, and with these tensors."""
    reasons = general(*tensors)
    if tensors and largest:
        found = sizes(*tensors)
        reasons += [
            f"{name}={found[name]} is above {most}" for name, most in largest.items() if found[name] > most
        ]
    return reasons


def limits(operator: str) -> dict[str, dict[str, int]]:
    """For each backend that has an operator the largest sizes it takes."""
    return _LIMITS[operator]


def libraries(operator: str) -> list[str]:
    """The backends that an operator alone has."""
    return list(_LIBRARIES[operator])


def operators() -> list[str]:
    """The names of all operators."""
    return list(_OPERATORS)


def is_differentiable(operator: str) -> bool:
    """Whether an operator has gradients, or is for inference alone."""
    return operator not in _INFERENCE


def choice(operator: str, *tensors: Tensor | None) -> str:
    """The backend that runs a call which leaves it open; empty where the call would end with an error."""
    if default_backend == "auto":
        return resolve(operator, "auto", *tensors)
    return "" if _why_not(operator, default_backend, *tensors) else default_backend


def resolve(operator: str, backend: str, *tensors: Tensor | None) -> str:
    """The name of the backend that runs `operator` on these tensors; an explicit choice never falls back."""
    if backend == "auto":
        backend = default_backend
    candidates = _OPERATORS[operator]
    if backend != "auto":
        reasons = _why_not(operator, backend, *tensors)
        if reasons:
            raise UnsupportedError(
                f'{operator}: backend="{backend}" was requested but ' + "; ".join(reasons) + ".",
                {backend: reasons},
            )
        return backend
    for name, why_not in candidates.items():
        if not why_not(*tensors) and not _is_stand_in(name):
            return name
    everything = {name: why_not(*tensors) for name, why_not in candidates.items()}
    lines = "".join(f"\n  {name}: {'; '.join(reasons)}" for name, reasons in everything.items())
    raise UnsupportedError(f"{operator}: no backend supports these inputs:{lines}", everything)


def why_no_kernels() -> str:
    """Why every call runs in plain PyTorch though nobody asked for that, or an empty string."""
    if default_backend != "auto" or not all(backend.why_not() for backend in (cpu, triton, cuda)):
        return ""
    return f"no kernels run here, PyTorch computes alone: {cpu.why_not()}"


def _is_stand_in(backend: str) -> bool:
    """Whether a GPU's kernels run on the processor: never the best there is, so only when asked for."""
    return env.INTERPRET if backend == "triton" else backend == "cuda" and cuda.emulated()


def _why_not(operator: str, backend: str, *tensors: Tensor | None) -> list[str]:
    if backend in _LIBRARIES[operator]:
        return _LIBRARIES[operator][backend](*tensors)
    if backend not in env.BACKENDS:
        legal = ", ".join((*env.BACKENDS, *_LIBRARIES[operator]))
        raise ValueError(f"{operator}: backend={backend!r} is not one of auto, {legal}.")
    candidates = _OPERATORS[operator]
    if backend not in candidates:
        return [f"this version has no {backend} kernel for it (it has: {', '.join(candidates)})"]
    return candidates[backend](*tensors)


def available_backends(operator: str) -> dict[str, bool | str]:
    """Which backends of an operator this machine can run.

    Args:
        operator: an operator's name, for example "masked_cross_attention".

    Returns:
        For each backend True, or the reason why not.

    Example:
        >>> available_backends("gated_residual")["reference"]
        True
    """
    if operator not in _OPERATORS:
        raise ValueError(f"operator={operator!r} is not one of {', '.join(_OPERATORS)}.")
    names = (*env.BACKENDS, *_LIBRARIES[operator])
    return {name: "; ".join(_why_not(operator, name)) or True for name in names}


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, `backend="auto"` means this backend. It holds for the whole process.

    Args:
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Example:
        >>> with use_backend("reference"):
        ...     out = gated_residual(torch.ones(2, 4), torch.ones(2, 4), torch.zeros(1))
    """
    global default_backend
    if backend not in ("auto", *env.BACKENDS):
        raise ValueError(f"use_backend: {backend!r} is not one of auto, {', '.join(env.BACKENDS)}.")
    before, default_backend = default_backend, backend
    try:
        yield
    finally:
        default_backend = before


def _kernel_reasons(why_not: str, misplaced: Callable[[Tensor], str], *tensors: Tensor | None) -> list[str]:
    """What every kernel asks: that it can run here, tensors where it computes, a dtype it knows."""
    if why_not:
        return [why_not]
    if what := transform():
        return [f"{what} does not see into a kernel"]
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN and decides_itself(tensor):
            return [f"a tensor is a {type(tensor).__name__}, which computes in its own way"]
        if why := misplaced(tensor):
            return [why]
        if tensor.dtype not in KERNEL_DTYPES:
            return [f"dtype {tensor.dtype} is not one of float32, bfloat16, float16"]
    return []


def decides_itself(tensor: Tensor) -> bool:
    """Whether a subclass of Tensor, as those of shards, puts something else in the place of an operation."""
    ordinary = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return not ordinary and not isinstance(tensor, (FakeTensor, FunctionalTensor))


def _triton_reasons(*tensors: Tensor | None) -> list[str]:
    return _kernel_reasons(triton.why_not(), triton.misplaced, *tensors)


def _cuda_reasons(*tensors: Tensor | None) -> list[str]:
    return _kernel_reasons(cuda.why_not(), cuda.misplaced, *tensors)


def _cpu_reasons(*tensors: Tensor | None) -> list[str]:
    return _kernel_reasons(cpu.why_not(), cpu.misplaced, *tensors)


def _library_reasons(why_not: Callable[[torch.dtype], str], *tensors: Tensor | None) -> list[str]:
    """Why a library that torch can call cannot multiply tensors, the first of which says in which dtype."""
    if torch.compiler.is_compiling():
        return ["a compiler chooses the libraries of its products itself"]
    if reasons := _kernel_reasons("", cpu.misplaced, *tensors):
        return reasons
    first = tensors[0] if tensors else None
    why = why_not(torch.float32 if first is None else first.dtype)
    return [why] if why else []


def _reference_reasons(*tensors: Tensor | None) -> list[str]:
    """It runs anything."""
    return []


_PLAIN = (Tensor, nn.Parameter)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GENERAL: dict[str, Reasons] = {
    "cuda": _cuda_reasons,
    "triton": _triton_reasons,
    "cpu": _cpu_reasons,
    "reference": _reference_reasons,
}
