"""How far a computation may be from its exact result, by nothing but the rounding of its dtype.

A sum has as many results as it has orders, and every processor, library and number of threads takes another
one. So what one library gives on one machine says little about what is right. Here the rounding is drawn
instead: the computation runs as it is written, each operation exactly, and each result is rounded up or
down at random. A sum gets what a loop over its terms in random order would have lost. What several such
runs differ from the exact result by is what rounding does to this computation, on any machine. Where
nothing need be rounded (a weight of exactly 1, a sum of one term) nothing is.

Sources: J. Vignes, Discrete stochastic arithmetic for validating results of numerical software, Numerical
Algorithms 37 (2004); N. J. Higham, The accuracy of floating point summation, SIAM J. Sci. Comput. 14
(1993).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_aten = torch.ops.aten
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_UNIT = 2.0**-24  # of float32, in which sums are kept whatever the dtype
_SUMS = (
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten.sum.default,
    _aten.sum.dim_IntList,
)
# Operations that are made of others, each of which rounds.
_COMPOSED: dict[Any, Callable[..., Any]] = get_decompositions(
    [
        _aten.mean,
        _aten._softmax,
        _aten._softmax_backward_data,
        _aten._log_softmax,
        _aten._log_softmax_backward_data,
        _aten.native_layer_norm,
        _aten.native_layer_norm_backward,
        _aten._fused_rms_norm,
        _aten._fused_rms_norm_backward,
    ]
)


def rounding_errors(
    run: Callable[[], Sequence[Tensor]], exact: Sequence[Tensor], draws: int | None = None
) -> list[float]:
    """How far rounding can put each result of a computation.

    It is the largest error that was drawn, and at least three standard deviations of an element's.

    Args:
        run: the computation in its dtype, forward and backward, of inputs that it does not round itself.
        exact: the same results in float64.
        draws: how often the rounding is drawn. Default: 8, or 4 where the results have many elements.

    Example:
        >>> x = torch.ones(3)
        >>> third, half = rounding_errors(lambda: (x / 3, x / 2), (x.double() / 3, x.double() / 2))
        >>> 2e-8 < third < 6e-8, half
        (True, 0.0)
    """
    draws = draws or (8 if sum(each.numel() for each in exact) < _MANY else 4)
    squares = [torch.zeros_like(each, dtype=torch.float64) for each in exact]
    largest = [0.0] * len(exact)
    for draw in range(draws):
        with RandomRounding(draw), sdpa_kernel(SDPBackend.MATH):
            found = run()
        for i, (rounded, right) in enumerate(zip(found, exact, strict=True)):
            square = (rounded.double() - right).square()
            squares[i] += square / draws
            largest[i] = max(largest[i], _root_of_largest(square))
    return [max(most, 3 * _root_of_largest(each)) for most, each in zip(largest, squares, strict=True)]


def _root_of_largest(squares: Tensor) -> float:
    return squares.max().sqrt().item() if squares.numel() else 0.0


_MANY = 10**5
_NOISE = 2**20  # random numbers of a kind


class RandomRounding(TorchDispatchMode):
    """Within the block every operation in float32, bfloat16 or float16 is exact but for a random rounding.

    Args:
        seed: of the rounding.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._noise: dict[torch.device, _Noise] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation in _COMPOSED:
            with self:
                return _COMPOSED[operation](*args, **kwargs)
        if not _is_rounded(operation, args, kwargs):
            return operation(*args, **kwargs)
        exact_args, exact_kwargs = tree_map(_in_float64, (args, kwargs))
        exact = operation(*exact_args, **exact_kwargs)
        if operation in _SUMS:
            exact = exact + self._summation(operation, exact, exact_args, exact_kwargs)
        found = operation(*args, **kwargs)  # for its dtypes, and where it writes into an argument for that
        rounded = tree_map(self._rounded, found, exact)
        return found.copy_(rounded) if operation._schema.is_mutable else rounded

    def _summation(
        self, operation: Any, exact: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """What a loop over the terms t of a sum S loses, in random order and float32.

        A step rounds the sum so far, by u / 2 of it on average, and k steps of it by
        u^2 / 4 (k - 1) (S^2 + sum(t^2)) / 3; k = sum(|t|)^2 / sum(t^2) counts the terms that weigh in.
        """
        magnitude = operation(*tree_map(_each(torch.abs), args), **kwargs)
        squares = operation(*tree_map(_each(torch.square), args), **kwargs)
        steps = magnitude.square_().div_(squares).sub_(1).clamp_min_(0).nan_to_num_(0, 0, 0)
        variance = exact.square().add_(squares).mul_(steps).mul_(_UNIT**2 / 12)
        return variance.sqrt_().mul_(self._noise_of(exact).normal(exact.shape))

    def _rounded(self, found: Any, exact: Any) -> Any:
        """A float64 result in the dtype of the real one: the nearer of two numbers is the likelier."""
        if not isinstance(found, Tensor) or found.dtype not in _FLOATS:
            return found
        # Bits of float64 that the dtype has not. Those of an infinite number are 0, and it stays as it is.
        dropped = 52 + round(math.log2(torch.finfo(found.dtype).eps))
        bits = self._noise_of(exact).bits(dropped, exact.shape) + exact.contiguous().view(torch.int64)
        return bits.bitwise_and_(-1 << dropped).view(torch.float64).to(found.dtype)

    def _noise_of(self, tensor: Tensor) -> _Noise:
        if tensor.device not in self._noise:
            self._noise[tensor.device] = _Noise(self._seed, tensor.device)
        return self._noise[tensor.device]


class _Noise:
    """Random numbers; of tensors that are neither small nor huge read from a pool, at a random place.

    To draw every one of them anew would take most of the time.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._places = torch.Generator().manual_seed(seed)
        self._pools: dict[Callable[[tuple[int, ...]], Tensor], Tensor] = {}

    def bits(self, count: int, shape: torch.Size) -> Tensor:
        """Whole numbers of so many bits."""
        return self._take(self._whole, shape).bitwise_and((1 << count) - 1)

    def normal(self, shape: torch.Size) -> Tensor:
        """Numbers of mean 0 and variance 1."""
        return self._take(self._gaussian, shape)

    def _take(self, draw: Callable[[tuple[int, ...]], Tensor], shape: torch.Size) -> Tensor:
        size = shape.numel()
        if not _NOISE // 64 < size < _NOISE // 4:
            return draw(shape)
        if draw not in self._pools:
            self._pools[draw] = draw((_NOISE,))
        place = int(torch.randint(_NOISE - size, (), generator=self._places))
        return self._pools[draw][place : place + size].view(shape)

    def _whole(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(2**62, shape, generator=self._generator, device=self._device)

    def _gaussian(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device=self._device)


def _is_rounded(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it computes floats from floats, rather than look at them, make them or draw them."""
    drawn = torch.Tag.nondeterministic_seeded in operation.tags
    lists = not operation._schema.returns  # written in place, as by an optimizer
    reads = any(isinstance(each, Tensor) and each.dtype in _FLOATS for each in _flat(args, kwargs))
    return reads and not drawn and not lists and not operation.is_view


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for each in (*args, *kwargs.values()):
        found.extend(each if isinstance(each, (list, tuple)) else [each])
    return found


def _in_float64(argument: Any) -> Any:
    """An argument of the exact operation."""
    if isinstance(argument, Tensor):
        return argument.double() if argument.dtype in _FLOATS else argument
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _FLOATS else argument


def _each(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """A function of the floating tensors among arguments."""
    return lambda each: function(each) if isinstance(each, Tensor) and each.is_floating_point() else each
