"""What is timed, and what must be reached: shapes and targets as data.

Letters: B batch, T text tokens, M media per sequence, R latents per medium, H heads, d head dim, N clips,
S media keys per clip, Hkv heads of keys, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Mode = Literal["forward", "backward", "forward+backward"]
ALL_MODES: tuple[Mode, ...] = ("forward", "backward", "forward+backward")
MODES: tuple[Mode, ...] = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16")
HEADS = {"H": 8, "d": 64, "R": 64}  # most attentions below are of this size, as in all OpenFlamingo models
_LLAMA_VISION = {"H": 32, "Hkv": 8, "d": 128, "R": 6404}  # Llama 3.2 Vision: four tiles at 560 pixels


# What each operator and layer has, with the size where a shape does not say: None where it has to, 0 for
# Hkv, of which there are then as many as H.
_OF_BLOCK: dict[str, int | None] = {"B": None, "T": None, "M": None, "D": None, **HEADS}
_OF_TOKEN: dict[str, int | None] = {"B": None, "M": None, "D": None, **HEADS}
DIMENSIONS: dict[str, dict[str, int | None]] = {
    "masked_cross_attention": {"B": None, "T": None, "M": None, **HEADS},
    "perceiver_attention": {"N": None, "S": None, **HEADS},
    "gated_residual": {"rows": None, "D": None},
    "gated_block_decode": {"B": None, "M": None, "D": None, "H": 8, "Hkv": 0, "d": 64, "R": 64},
    "linear": {"rows": None, "D": None, "out": None},
    "linear, int8": {"rows": None, "D": None, "out": None},
    "GatedCrossAttentionBlock": _OF_BLOCK,
    "its cross-attention sublayer": _OF_BLOCK,
    "its decode step": _OF_TOKEN,
    "PerceiverResampler": {"N": None, "S": None, "D": None, "layers": 6, **HEADS},
}


class Target:
    """The fastest contender of `against` must take at least `ratio` times as long as ours."""

    def __init__(self, ratio: float, *against: str) -> None:
        self.ratio, self.against = ratio, against

    def __str__(self) -> str:
        bound = (
            f"at least {self.ratio:.3g}x" if self.ratio > 1 else f"at most {1 / self.ratio:.3g}x as long as"
        )
        better_of = "the better of " if len(self.against) > 1 else ""
        return f"{bound} {better_of}{' and '.join(self.against)}"


class Floor:
    """Ours must move its bytes at this share of the device's copy bandwidth, see `floors`."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __str__(self) -> str:
        return f"at least {self.share:.0%} of the byte floor"


@dataclass(frozen=True)
class Case:
    """One operator or layer at one shape, in one dtype, forward or forward and backward."""

    op: str
    sizes: dict[str, int] = field(hash=False)
    dtype: str
    mode: Mode
    targets: tuple[Target | Floor, ...] = field(default=(), compare=False)

    @property
    def shape(self) -> str:
        return " ".join(f"{letter}{size}" for letter, size in self.sizes.items())

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.mode}"


def _cases(
    op: str,
    sizes: dict[str, int],
    targets: dict[tuple[str, Mode], tuple[Target | Floor, ...]] | None = None,
    dtypes: tuple[str, ...] = DTYPES,
    modes: tuple[Mode, ...] = MODES,
) -> list[Case]:
    return [
        Case(op, sizes, dtype, mode, (targets or {}).get((dtype, mode), ()))
        for dtype in dtypes
        for mode in modes
    ]


_IN_BFLOAT16 = {"float32": "bfloat16", "bfloat16": "eager"}  # who multiplies in that dtype

CASES = (
    *_cases("masked_cross_attention", {"B": 1, "T": 256, "M": 5, **HEADS}),
    *_cases(
        "masked_cross_attention",
        {"B": 1, "T": 1024, "M": 8, **HEADS},
        {
            ("float32", "forward"): (Target(8, "sdpa"), Target(15, "eager")),
            ("float32", "forward+backward"): (Target(6, "sdpa"),),
            ("bfloat16", "forward"): (Target(8, "sdpa", "eager"),),
        },
    ),
    *_cases("masked_cross_attention", {"B": 4, "T": 1024, "M": 8, **HEADS}),
    *_cases(
        "masked_cross_attention",
        {"B": 1, "T": 2048, "M": 32, **HEADS},
        {
            ("float32", "forward"): (Target(25, "sdpa"),),
            ("bfloat16", "forward"): (Target(25, "sdpa", "eager"),),
        },
    ),
    # tiles of Llama 3.2 Vision at 560 pixels
    *_cases(
        "masked_cross_attention",
        {"B": 1, "T": 256, "M": 2, "H": 8, "d": 128, "R": 1601},
        {(dtype, mode): (Target(1, "sdpa", "eager"),) for dtype in DTYPES for mode in MODES},
    ),
    *(
        case
        for sizes in ({"N": 8, "S": 256}, {"N": 1, "S": 7680})
        for case in _cases(
            "perceiver_attention",
            {**sizes, **HEADS},
            {
                ("float32", "forward"): (Target(1.5, "eager", "sdpa"),),
                ("bfloat16", "forward"): (Target(3, "eager", "sdpa"),),
            },
        )
    ),
    *_cases(
        "gated_residual",
        {"rows": 4096, "D": 2048},
        {
            ("float32", "forward"): (Target(1 / 1.1, "torch.add"), Target(1.8, "eager")),
            ("float32", "forward+backward"): (Target(1.8, "eager"),),
        },
    ),
    *(
        case
        for rows, share in ((1, 0.88), (8, 0.7))
        for case in _cases(
            "linear",
            {"rows": rows, "D": 2048, "out": 8192},
            {(dtype, "forward"): (Target(share, "read"), Target(1, "eager")) for dtype in DTYPES},
            modes=("forward",),
        )
    ),
    *(
        case
        for rows in (64, 1024)
        for case in _cases(
            "linear",
            {"rows": rows, "D": 2048, "out": 8192},
            {(dtype, mode): (Target(1, "eager"),) for dtype in DTYPES for mode in MODES},
        )
    ),
    *(
        case
        for rows, floor in ((1, [Target(0.8, "read")]), (8, [Target(0.8, "read")]), (64, []), (1024, []))
        for case in _cases(
            "linear, int8",
            {"rows": rows, "D": 2048, "out": 8192},
            {(dtype, "forward"): (*floor, Target(1, _IN_BFLOAT16[dtype])) for dtype in DTYPES},
            modes=("forward",),
        )
    ),
    *(
        case
        for batch, above, ratios in ((1, 1.2, (2.4, 1.9)), (8, 1.6, (4, 3.5)))
        for case in _cases(
            "gated_block_decode",
            {"B": batch, "M": 5, "D": 2048, **HEADS},
            {
                (dtype, "forward"): (Target(1 / above, "read"), Target(ratio, "eager"))
                for dtype, ratio in zip(DTYPES, ratios, strict=True)
            },
            modes=("forward",),
        )
    ),
    *(
        case
        for batch in (1, 8)
        for case in _cases(
            "gated_block_decode",
            {"B": batch, "M": 1, "D": 4096, **_LLAMA_VISION},
            {(dtype, "forward"): (Target(1 / 1.3, "read"),) for dtype in DTYPES},
            modes=("forward",),
        )
    ),
    *_cases(
        "GatedCrossAttentionBlock",
        {"B": 1, "T": 1024, "M": 8, "D": 2048, **HEADS},
        {(dtype, "forward+backward"): (Target(1 / 1.04, "products"),) for dtype in DTYPES},
    ),
    *(
        case
        for length, media, ratio in ((1024, 8, 1.6), (2048, 32, 3))
        for case in _cases(
            "its cross-attention sublayer",
            {"B": 1, "T": length, "M": media, "D": 2048, **HEADS},
            {
                (dtype, "forward"): (Target(1 / above, "products"), Target(ratio, "eager"))
                for dtype, above in (("float32", 1.1), ("bfloat16", 1.25))
            },
            modes=("forward",),
        )
    ),
    *(
        case
        for batch, ratio in ((1, 1.6), (8, 2.5))
        for case in _cases(
            "its decode step",
            {"B": batch, "M": 5, "D": 2048, **HEADS},
            {(dtype, "forward"): (Target(ratio, "eager"),) for dtype in DTYPES},
            modes=("forward",),
        )
    ),
    *_cases(  # so small that it takes as long as the host's checks
        "its decode step",
        {"B": 1, "M": 2, "D": 256, "H": 4, "d": 64, "R": 64},
        {("float32", "forward"): (Target(1, "eager"),)},
        dtypes=("float32",),
        modes=("forward",),
    ),
    *_cases(
        "PerceiverResampler",
        {"N": 8, "S": 256, "D": 1024, "layers": 6, **HEADS},
        {("float32", "forward+backward"): (Target(1, "compile"),)},
        dtypes=("float32",),
    ),
)

# What a GPU is asked, the most important first: where time is short the last ones are left out.
_HALF = ("bfloat16",)
_STEP: tuple[str, Mode] = ("bfloat16", "forward+backward")
_WIDE = {"H": 32, "d": 128, "R": 64}
GPU_CASES = (
    *_cases(
        "masked_cross_attention",
        {"B": 8, "T": 1024, "M": 8, **HEADS},
        {_STEP: (Target(12, "eager"), Target(3, "sdpa"), Target(1.5, "flex"))},
        _HALF,
    ),
    *_cases(
        "masked_cross_attention",
        {"B": 8, "T": 1024, "M": 32, **HEADS},
        {_STEP: (Target(25, "eager"), Target(8, "sdpa"), Target(1.5, "flex"))},
        _HALF,
    ),
    *_cases(
        "masked_cross_attention",
        {"B": 32, "T": 2048, "M": 32, **HEADS},
        {_STEP: (Target(40, "eager"), Target(15, "sdpa"), Target(1.5, "flex"), Floor(0.7))},
        _HALF,
    ),
    *(
        case
        for sizes in ({"N": 160, "S": 256}, {"N": 8, "S": 7680})
        for case in _cases(
            "perceiver_attention",
            {**sizes, **HEADS},
            {("bfloat16", mode): (Floor(0.7), Target(3, "eager")) for mode in MODES},
            _HALF,
        )
    ),
    *_cases(
        "gated_residual",
        {"rows": 32768, "D": 2048},
        {("bfloat16", "forward"): (Floor(0.88),), ("bfloat16", "backward"): (Floor(0.8),)},
        _HALF,
        ALL_MODES,
    ),
    *(
        case
        for batch, targets in ((1, (Target(4, "eager"), Floor(1 / 1.6))), (8, ()))
        for case in _cases(
            "gated_block_decode",
            {"B": batch, "M": 5, "D": 2048, **HEADS},
            {("bfloat16", "forward"): targets},
            _HALF,
            ("forward",),
        )
    ),
    *(
        case
        for op, ratio in (("linear", 1), ("linear, int8", 1.5))
        for rows in (1, 8)
        for case in _cases(
            op,
            {"rows": rows, "D": 2048, "out": 8192},
            {("bfloat16", "forward"): (Target(ratio, "eager"),)},
            _HALF,
            ("forward",),
        )
    ),
    *_cases("masked_cross_attention", {"B": 8, "T": 2048, "M": 8, **_WIDE}, {_STEP: (Floor(0.7),)}, _HALF),
    *_cases("GatedCrossAttentionBlock", {"B": 8, "T": 1024, "M": 8, "D": 2048, **HEADS}, dtypes=_HALF),
    *_cases("masked_cross_attention", {"B": 1, "T": 1024, "M": 8, **HEADS}, dtypes=_HALF),
    *_cases("perceiver_attention", {"N": 8, "S": 256, **HEADS}, dtypes=_HALF),
    *_cases("masked_cross_attention", {"B": 8, "T": 1024, "M": 8, **HEADS}, dtypes=("float32",)),
)

CASES_OF = {"cpu": CASES, "cuda": GPU_CASES}  # by the type of the device

# Every operator and layer once, small enough for a smoke test: these say nothing about speed.
_SMALL = {"H": 2, "d": 16, "R": 4}
QUICK = (
    *_cases("masked_cross_attention", {"B": 1, "T": 48, "M": 3, **_SMALL}, dtypes=("float32",)),
    *_cases("perceiver_attention", {"N": 2, "S": 12, **_SMALL}, dtypes=("float32",)),
    *_cases("gated_residual", {"rows": 32, "D": 64}, dtypes=("float32",)),
    *_cases(
        "gated_block_decode", {"B": 2, "M": 3, "D": 32, **_SMALL}, dtypes=("float32",), modes=("forward",)
    ),
    *_cases("linear", {"rows": 4, "D": 32, "out": 64}, dtypes=("float32",)),
    *_cases("linear, int8", {"rows": 4, "D": 32, "out": 64}, dtypes=("float32",), modes=("forward",)),
    *_cases("GatedCrossAttentionBlock", {"B": 1, "T": 48, "M": 3, "D": 32, **_SMALL}, dtypes=("float32",)),
    *_cases(
        "its cross-attention sublayer",
        {"B": 1, "T": 48, "M": 3, "D": 32, **_SMALL},
        dtypes=("float32",),
        modes=("forward",),
    ),
    *_cases("its decode step", {"B": 2, "M": 3, "D": 32, **_SMALL}, dtypes=("float32",), modes=("forward",)),
    *_cases("PerceiverResampler", {"N": 2, "S": 12, "D": 32, "layers": 2, **_SMALL}, dtypes=("float32",)),
)


class FlatMemory(NamedTuple):
    """The extra memory of ours at all shapes of one (op, dtype, mode) must lie this close together."""

    case: tuple[str, str, str]
    tolerance_mib: float


# From T1024 M8 to T2048 M32 one score matrix grows by 112 MiB.
FLAT_MEMORY = FlatMemory(("masked_cross_attention", "float32", "forward+backward"), tolerance_mib=1.0)
