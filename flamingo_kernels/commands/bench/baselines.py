"""Who competes: for every case the call of each contender on the same numbers.

- flamingo_kernels: ours, the backend that `backend="auto"` takes.
- eager: the reference modules of `flamingo`, dense scores and all.
- sdpa: `scaled_dot_product_attention`, with the dense boolean mask where there is one.
- folded: ours after `fold`, for inference.
- int8: ours with weights of 8 bits.
- compile: `torch.compile` of eager.
- flex: `torch.compile(flex_attention)` with a block mask of the same spans.
- bfloat16, int8pack, dynamic, torchao: for weights of 8 bits the product in bfloat16, torch's two with
  integers, `_weight_int8pack_mm` and the layer of `torch.ao.nn.quantized.dynamic`, and torchao's, where it is
  installed.
- flash-attn: its `varlen` attention, where it is installed; the rows of a medium are one sequence.

Floors, not rivals:
- torch.add: `x + y`, which moves the bytes of a gated residual and leaves the gate out.
- products: the linear layers of eager alone, each on the input that it gets there.
- read: the fastest loop that reads the weight and nothing else.

On a GPU ours is timed by each backend too: "cuda" and "triton", where `flamingo_kernels` takes one of them.

What is built once per batch stays outside the timing: our MediaMask, the dense mask of sdpa, the block mask
of flex, the sequences of flash-attn, `text_time` for eager. Joining the keys of media and latents is inside
for eager and sdpa: they do it in every layer, and not needing it is part of what perceiver_attention is for.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import cycle
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flamingo_kernels as fk
from flamingo import modules
from flamingo_kernels import layers
from flamingo_kernels._backends import cpu
from flamingo_kernels.layers.cross_attention import Media, add_attended
from flamingo_kernels.layers.protocols import GatedBlock
from flamingo_kernels.ops.linear import multiply
from flamingo_kernels.ops.linear.int8 import quantize_weight

from ..measure.memory import copies_beyond_caches
from ..measure.swapped import swapped
from ..measure.timing import host_clock
from .shapes import ALL_MODES, Case, Mode

OURS = "flamingo_kernels"
BACKENDS = ("cuda", "triton")
FLOORS = ("torch.add", "products", "read")
OF_INTEGERS = 0.03  # what rounding weights and x to 8 bits may cost

Call = Callable[[], Tensor | tuple[Tensor, ...]]
Randn = Callable[..., Tensor]


class Contender(NamedTuple):
    """A forward pass in some modes.

    Attributes:
        call: the forward pass.
        wrt: what its backward pass differentiates.
        same: whether it computes what ours does.
        modes: those in which it takes part.
        budget: the relative error that it may have, where that is not what rounding in the dtype costs.
        given: of eager, what a rival of the user's is called with: the arguments of the operator, or the
            layer and those of its forward.
    """

    call: Call
    wrt: tuple[Tensor, ...]
    same: bool = True
    modes: tuple[Mode, ...] = ALL_MODES
    budget: float | None = None
    given: Callable[[], tuple[Any, ...]] | None = None


Contenders = dict[str, Callable[[], Contender]]


def contenders(case: Case, dtype: torch.dtype | None = None, device: str = "cpu") -> Contenders:
    """Makers of a case's contenders, all on the same inputs.

    Args:
        case: operator, sizes, dtype.
        dtype: what holds the numbers, which are rounded to the case's dtype either way. Default: that.
        device: where the tensors are.
    """
    generator = torch.Generator(device).manual_seed(0)
    rounded = getattr(torch, case.dtype)
    held = dtype or rounded

    def randn(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        numbers = mean + std * torch.randn(*shape, generator=generator, device=device)
        return numbers.to(rounded).to(held).requires_grad_()

    made = _BUILDERS[case.op](randn, **case.sizes)
    if torch.device(device).type == "cuda":
        made |= {backend: partial(_by, backend, made[OURS]) for backend in BACKENDS}
    return made


def _by(backend: str, make: Callable[[], Contender]) -> Contender:
    """Ours by one backend."""
    ours = make()

    def call() -> Tensor | tuple[Tensor, ...]:
        with fk.use_backend(backend):
            return ours.call()

    return ours._replace(call=call)


def _masked_cross_attention(randn: Randn, *, B: int, T: int, M: int, R: int, H: int, d: int) -> Contenders:
    q, k, v = randn(B, T, H, d), randn(B, M, R, H, d), randn(B, M, R, H, d)
    locations = _media_locations(B, T, M, q.device)
    mask, times = fk.MediaMask.last_preceding(locations, M), modules.text_time(locations)
    dense = mask.dense(R)  # [B, 1, T, M * R]
    eager = _by_sequence if q.dtype == torch.float64 else modules.dense_masked_attention
    makers = _over(
        (q, k, v),
        (q, k, v, mask),
        ours=lambda: fk.masked_cross_attention(q, k, v, mask),
        eager=lambda: eager(q, k, v, times),
        sdpa=lambda: _sdpa(q, k.flatten(1, 2), v.flatten(1, 2), dense),
    )
    return {
        **makers,
        "flex": lambda: Contender(_flex(q, k, v, mask), (q, k, v)),
        "flash-attn": lambda: Contender(_flash_attn(q, k, v, times), (q, k, v)),
    }


def _perceiver_attention(randn: Randn, *, N: int, S: int, R: int, H: int, d: int) -> Contenders:
    q, k_media, v_media = randn(N, R, H, d), randn(N, S, H, d), randn(N, S, H, d)
    k_latents, v_latents = randn(N, R, H, d), randn(N, R, H, d)
    tensors = (q, k_media, v_media, k_latents, v_latents)
    module = modules.PerceiverAttention(dim=1, dim_head=d, heads=H)
    return _over(
        tensors,
        tensors,
        ours=lambda: fk.perceiver_attention(*tensors),
        eager=lambda: module.attend(*tensors),
        sdpa=lambda: _sdpa(q, torch.cat((k_media, k_latents), dim=1), torch.cat((v_media, v_latents), dim=1)),
    )


def _gated_residual(randn: Randn, *, rows: int, D: int) -> Contenders:
    x, y, gate = randn(rows, D), randn(rows, D, mean=1.0), randn(1)
    return {
        **_over(
            (x, y, gate),
            (x, y, gate),
            ours=lambda: fk.gated_residual(x, y, gate),
            eager=lambda: x + torch.tanh(gate) * y,
        ),
        # an addition computes nothing backward
        "torch.add": lambda: Contender(lambda: torch.add(x, y), (x, y), same=False, modes=("forward",)),
    }


def _gated_block_decode(
    randn: Randn, *, B: int, M: int, D: int, R: int, H: int, d: int, Hkv: int | None = None
) -> Contenders:
    """Every contender walks over copies of the matrices, and of the keys and values that the token sees, as
    the blocks of a model bring theirs.
    """
    media = B, M, R, Hkv or H, d
    x, k, v = (randn(*shape).detach() for shape in ((B, D), media, media))
    on_cpu = x.is_cpu and x.dtype != torch.float64
    time = torch.full((B, 1), M, device=x.device)
    mask = fk.MediaMask.from_text_time(time, M)
    norms = [fk.Norm(randn(D, mean=1.0, std=0.1).detach(), randn(D).detach()) for _ in range(2)]
    gates = [randn(1).detach() for _ in range(2)]
    shapes = ((H * d, D), (D, H * d), (4 * D, D), (D, 4 * D))
    matrices = [randn(*shape, std=shape[1] ** -0.5).detach() for shape in shapes]

    def copies(*tensors: Tensor) -> Iterator[Tensor]:
        """Of all of them in one tensor each."""
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        return cycle(copies_beyond_caches(whole) if on_cpu else [whole])

    # One walk for all contenders: none meets what the one before it has read.
    numbers, seen = cache(lambda: copies(*matrices)), cache(lambda: copies(k, v))

    def split(whole: Tensor) -> list[Tensor]:
        sizes = [rows * columns for rows, columns in shapes]
        return [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]

    def eager(kv: Tensor, to_q: Tensor, to_out: Tensor, up: Tensor, down: Tensor) -> Tensor:
        q = (norms[0].normed(x) @ to_q.T).view(B, 1, H, d)
        groups = H // media[-2]
        k, v = (each.repeat_interleave(groups, dim=-2) if groups > 1 else each for each in kv.view(2, *media))
        attended = modules.dense_masked_attention(q, k, v, time).flatten(1)
        z = x + torch.tanh(gates[0]) * (attended @ to_out.T)
        return z + torch.tanh(gates[1]) * (F.gelu(norms[1].normed(z) @ up.T) @ down.T)

    def arguments(wholes: Iterator[Tensor], scales: Sequence[Tensor | None] = (None,) * 4) -> tuple[Any, ...]:
        to_q, to_out, up, down = map(fk.Linear, split(next(wholes)), (None,) * 4, scales)
        weights = fk.GatedBlockWeights(norms[0], to_q, to_out, norms[1], up, down, gates[0], gates[1])
        k, v = next(seen()).view(2, *media)
        return x, k, v, mask, weights

    def of_eager(call: Callable[..., Tensor]) -> Contender:
        return Contender(
            lambda: call(next(seen()), *split(next(numbers()))), (), given=lambda: arguments(numbers())
        )

    def of_integers(wholes: Iterator[Tensor]) -> Contender:
        return Contender(lambda: fk.gated_block_decode(*arguments(wholes, scales)), (), budget=OF_INTEGERS)

    integers, scales = zip(*map(quantize_weight, matrices), strict=True)
    return {
        OURS: lambda: Contender(lambda: fk.gated_block_decode(*arguments(numbers())), ()),
        "eager": lambda: of_eager(eager),
        "compile": lambda: of_eager(torch.compile(eager, dynamic=False)),
        "int8": lambda: of_integers(copies(*integers)),
        **({"read": lambda: _read(copies(*matrices, k[:, -1], v[:, -1]))} if on_cpu else {}),
    }


def _gated_cross_attention_block(
    randn: Randn, *, B: int, T: int, M: int, D: int, R: int, H: int, d: int
) -> Contenders:
    x, media, locations, sdpa = _text_and_media(randn, B, T, M, D, R)
    block = _block(x, D, H, d)
    return _layer(
        block,
        randn,
        (x, media),
        call=lambda layer: layer(x, media, locations),
        attend=sdpa,
        more=(locations,),
    )


def _cross_attention_sublayer(
    randn: Randn, *, B: int, T: int, M: int, D: int, R: int, H: int, d: int
) -> Contenders:
    x, media, locations, sdpa = _text_and_media(randn, B, T, M, D, R)
    block = _block(x, D, H, d)
    del block.ff, block.ff_gate

    def call(block: Any) -> Tensor:
        if isinstance(block, layers.Fused):
            return add_attended(cast(GatedBlock, block), x, Media(media, locations, cached=False))
        return x + torch.tanh(block.attn_gate) * block.attn(x, media, locations)

    made = _layer(block, randn, (x, media), call=call, attend=sdpa, more=(locations,))
    del made["compile"]  # it compiles a whole block
    return made


def _decode_step(randn: Randn, *, B: int, M: int, D: int, R: int, H: int, d: int) -> Contenders:
    x, media = randn(B, 1, D), randn(B, M, R, D // 2)
    locations = _media_locations(B, 8 * M, M, x.device)
    block = _block(x, D, H, d).eval()

    def call(layer: nn.Module) -> Tensor:
        return layer(x, media, locations, use_cached_media=True)

    def folded() -> Contender:
        changed = copy.deepcopy(block)
        swapped(changed)
        fk.fold(changed)
        return Contender(lambda: call(changed), (), modes=("forward",))

    made = _layer(
        block,
        randn,
        (x, media),
        call=call,
        attend=lambda q, k, v, *_: _sdpa(q, k[:, -1], v[:, -1]),
        more=(locations,),
    )
    return {**made, "folded": folded}


def _linear(randn: Randn, *, rows: int, D: int, out: int) -> Contenders:
    x, weight = randn(rows, D), randn(out, D, std=D**-0.5)
    on_cpu = x.is_cpu and x.dtype != torch.float64
    copies = cycle(copies_beyond_caches(weight) if on_cpu else [weight])

    def arguments() -> tuple[Tensor, Tensor]:
        """A forward pass takes the next copy every time; a gradient is of the first."""
        return x, weight if torch.is_grad_enabled() else next(copies)

    def over(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Contender]:
        return lambda: Contender(lambda: multiply(*arguments()), (x, weight), given=arguments)

    def compiled() -> Contender:
        return over(torch.compile(lambda x, weight: F.linear(x, weight), dynamic=False))()

    made = {OURS: over(fk.linear), "eager": over(F.linear), "compile": compiled}
    if on_cpu:
        made["onednn"] = over(partial(fk.linear, backend="onednn"))
        made["few rows"] = over(partial(fk.linear, backend="cpu"))
        made["read"] = lambda: _read(copies)
    return made


def _linear_int8(randn: Randn, *, rows: int, D: int, out: int) -> Contenders:
    """Eager multiplies by the numbers before they became integers; "bfloat16" does in that dtype."""
    x, weight = randn(rows, D).detach(), randn(out, D, std=D**-0.5).detach()
    on_cpu = x.is_cpu and x.dtype != torch.float64
    integers, scale = quantize_weight(weight)
    copies = cycle(copies_beyond_caches(integers) if on_cpu else [integers])

    def of_integers(multiply: Callable[[Tensor], Tensor]) -> Callable[[], Contender]:
        return lambda: Contender(lambda: multiply(next(copies)), (), budget=OF_INTEGERS)

    def of_numbers(weight: Tensor, budget: float | None) -> Callable[[], Contender]:
        def make() -> Contender:
            numbers = cycle(copies_beyond_caches(weight) if on_cpu else [weight])
            rounded = x.to(weight.dtype)
            return Contender(lambda: F.linear(rounded, next(numbers)).to(x.dtype), (), budget=budget)

        return make

    made = {
        OURS: of_integers(lambda each: fk.linear(x, each, weight_scale=scale)),
        "eager": lambda: of_numbers(weight, None)()._replace(given=lambda: (x, next(copies), scale)),
    }
    if not on_cpu:
        return made
    scale_of_x = scale.to(x.dtype)
    made["int8pack"] = of_integers(lambda each: torch._weight_int8pack_mm(x, each, scale_of_x))
    made["dynamic"] = lambda: _dynamic(x, integers, scale)
    made["torchao"] = lambda: _torchao(x, weight)
    made["read"] = lambda: _read(copies)
    if x.dtype != torch.bfloat16:
        made["bfloat16"] = of_numbers(weight.bfloat16(), OF_INTEGERS)
    return made


def _dynamic(x: Tensor, integers: Tensor, scale: Tensor) -> Contender:
    """torch's layer whose weight is packed integers, and which rounds x by one scale for all rows."""
    zeros = torch.zeros(len(scale), dtype=torch.long)
    weight = torch._make_per_channel_quantized_tensor(integers, scale.double(), zeros, 0)
    layers = []
    for _ in copies_beyond_caches(integers):
        with warnings.catch_warnings():  # torch says that this has another name now
            warnings.simplefilter("ignore")
            layers.append(torch.ao.nn.quantized.dynamic.Linear(*reversed(integers.shape)))
        layers[-1].set_weight_bias(weight, None)
    walk = cycle(layers)
    return Contender(lambda: next(walk)(x.float()).to(x.dtype), (), budget=OF_INTEGERS)


def _torchao(x: Tensor, weight: Tensor) -> Contender:
    """A layer whose weight is integers by torchao, where it is installed; x stays as it is."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layers, (out, width) = [], weight.shape
    for each in copies_beyond_caches(weight):
        layers.append(nn.Linear(width, out, bias=False, dtype=weight.dtype).requires_grad_(False))
        layers[-1].weight.copy_(each)
        quantize_(layers[-1], Int8WeightOnlyConfig())
    walk = cycle(layers)
    return Contender(lambda: next(walk)(x), (), budget=OF_INTEGERS)


def _read(copies: Iterator[Tensor]) -> Contender:
    """Reading the weight and nothing else, by the loop that is the fastest here."""

    def median_ms(way: str) -> float:
        return statistics.median(host_clock(lambda: cpu.read(next(copies), way), None) for _ in range(11))

    best = min(cpu.READ_LOOPS, key=median_ms)
    return Contender(lambda: torch.tensor(cpu.read(next(copies), best)), (), same=False, modes=("forward",))


def _block(x: Tensor, D: int, H: int, d: int) -> modules.GatedCrossAttentionBlock:
    return modules.GatedCrossAttentionBlock(dim=D, dim_visual=D // 2, dim_head=d, heads=H).to(x.device)


def _text_and_media(
    randn: Randn, B: int, T: int, M: int, D: int, R: int
) -> tuple[Tensor, Tensor, Tensor, Callable[..., Tensor]]:
    """Text, media, where they are in it, and `attend` by SDPA with the dense mask."""
    x, media = randn(B, T, D), randn(B, M, R, D // 2)
    locations = _media_locations(B, T, M, x.device)
    dense = fk.MediaMask.last_preceding(locations, M).dense(R)

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return _sdpa(q, k.flatten(1, 2), v.flatten(1, 2), dense)

    return x, media, locations, attend


def _perceiver_resampler(
    randn: Randn, *, N: int, S: int, D: int, layers: int, R: int, H: int, d: int
) -> Contenders:
    x = randn(1, N, 1, S, D)
    resampler = modules.PerceiverResampler(dim=D, depth=layers, dim_head=d, heads=H, num_latents=R)
    resampler = resampler.to(x.device)
    return _layer(
        resampler,
        randn,
        (x,),
        call=lambda layer: layer(x),
        attend=lambda q, k_media, v_media, k_latents, v_latents, _: _sdpa(
            q, torch.cat((k_media, k_latents), dim=1), torch.cat((v_media, v_latents), dim=1)
        ),
    )


_BUILDERS: dict[str, Callable[..., Contenders]] = {
    "masked_cross_attention": _masked_cross_attention,
    "perceiver_attention": _perceiver_attention,
    "gated_residual": _gated_residual,
    "gated_block_decode": _gated_block_decode,
    "linear": _linear,
    "linear, int8": _linear_int8,
    "GatedCrossAttentionBlock": _gated_cross_attention_block,
    "its cross-attention sublayer": _cross_attention_sublayer,
    "its decode step": _decode_step,
    "PerceiverResampler": _perceiver_resampler,
}


def _over(
    wrt: tuple[Tensor, ...], arguments: tuple[Any, ...], *, ours: Call, eager: Call, **others: Call
) -> Contenders:
    makers: Contenders = {
        name: partial(Contender, call, wrt, given=lambda: arguments)
        for name, call in {OURS: ours, "eager": eager, **others}.items()
    }
    return {**makers, "compile": lambda: Contender(torch.compile(eager, dynamic=False), wrt)}


def _layer(
    layer: nn.Module,
    randn: Randn,
    inputs: tuple[Tensor, ...],
    *,
    call: Callable[[nn.Module], Tensor],
    attend: Callable[..., Tensor],
    more: tuple[Tensor, ...] = (),
) -> Contenders:
    """Every contender gets its own copy of the layer, with the same weights; sdpa also gets its `attend`.

    Args:
        layer, inputs, call: what is called, with what, and how.
        more: what the layer is called with behind the inputs.
    """
    _fill(layer, randn)

    def maker(change: Callable[[nn.Module], object]) -> Callable[[], Contender]:
        def make() -> Contender:
            changed = copy.deepcopy(layer)
            change(changed)
            return Contender(
                lambda: call(changed),
                (*inputs, *changed.parameters()),
                given=lambda: (changed, *inputs, *more),
            )

        return make

    return {
        OURS: maker(swapped),
        "eager": maker(lambda layer: None),
        "sdpa": maker(lambda layer: _replace_attend(layer, attend)),
        "compile": maker(lambda layer: layer.compile(dynamic=False)),
        "products": lambda: _products(layer, call),
    }


def _products(layer: nn.Module, call: Callable[[nn.Module], Tensor]) -> Contender:
    met: list[tuple[nn.Linear, Tensor]] = []

    def meet(module: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        met.append((module, inputs[0].detach().requires_grad_(inputs[0].requires_grad)))

    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_hook(meet) for linear in linears]
    call(layer)
    for hook in hooks:
        hook.remove()
    wrt = [x for _, x in met if x.requires_grad] + [linear.weight for linear in linears]
    # By whatever product is the fastest here, so that a layer is not judged by a slow one.
    return Contender(
        lambda: tuple(multiply(x, linear.weight, linear.bias) for linear, x in met), tuple(wrt), same=False
    )


def _fill(layer: nn.Module, randn: Randn) -> None:
    """Random weights of the usual size, and gates well off 0, where a wrong branch would not show."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 2:
            values = randn(*parameter.shape, std=parameter.shape[1] ** -0.5)
        elif "gate" in name:
            values = randn(*parameter.shape)
        else:
            values = randn(*parameter.shape, mean=1.0, std=0.1)  # of a norm
        parameter.data = values.detach()


def _replace_attend(layer: nn.Module, attend: Callable[..., Tensor]) -> None:
    for module in layer.modules():
        if hasattr(module, "attend"):
            module.attend = attend  # type: ignore[assignment]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q `[B, T, H, d]`, k and v `[B, S, H, d]`, as views: nothing is copied on the way in."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, times: Tensor) -> Tensor:
    """Eager by sequence, made again for the backward pass: all scores in float64 would fill a GPU."""
    alone = [tensor.split(1) for tensor in (q, k, v, times)]
    parts = [
        checkpoint(modules.dense_masked_attention, *each, use_reentrant=False)
        for each in zip(*alone, strict=True)
    ]
    return torch.cat(parts)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: fk.MediaMask) -> Call:
    """Blocks of 128 keys hold two media: the tiles of its backward pass on sm_90 take no smaller ones."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (batch, length, _, _), (media, latents) = q.shape, k.shape[1:3]

    def visible(b: Tensor, _: Tensor, row: Tensor, key: Tensor) -> Tensor:
        medium = key // latents
        return (mask.lo[b, row] <= medium) & (medium < mask.hi[b, row])

    blocks = create_block_mask(visible, batch, None, length, media * latents, device=str(q.device))
    attend = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        queries, keys, values = (each.transpose(1, 2) for each in (q, k.flatten(1, 2), v.flatten(1, 2)))
        return attend(queries, keys, values, block_mask=blocks).transpose(1, 2)

    return call


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, times: Tensor) -> Call:
    """Every sequence is cut where its medium changes; rows before the first one get a piece without keys."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    media, latents = k.shape[1:3]
    rows = (times[..., None] == torch.arange(media + 1, device=times.device)).sum(1)  # [B, 1 + M]
    keys = torch.full_like(rows, latents)
    keys[:, 0] = 0
    ends_q, ends_k = (F.pad(sizes.flatten().cumsum(0), (1, 0)).int() for sizes in (rows, keys))
    longest = int(rows.max())

    def call() -> Tensor:
        packed = (q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2))
        return flash_attn_varlen_func(*packed, ends_q, ends_k, longest, latents).view(q.shape)

    return call


def _media_locations(batch: int, length: int, num_media: int, device: torch.device) -> Tensor:
    """Images at even distances after a first token that sees none, bool `[B, T]`."""
    locations = torch.zeros(batch, length, dtype=torch.bool, device=device)
    locations[:, 1 + torch.arange(num_media) * (length // num_media)] = True
    return locations
