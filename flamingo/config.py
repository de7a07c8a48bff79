"""Every size and choice of a Flamingo, and the presets of the published models."""

import difflib
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flamingo.language.decoder import PositionKind
from flamingo.modules import ACTIVATIONS, Policy
from flamingo.ranges import POSITIVE, at_least, at_most, expect_ranges
from flamingo.vision import NFNETS

# Sizes that may be 0: a given encoder has none of a ViT's.
_ZERO = (
    "patch_size",
    "vision_layers",
    "vision_heads",
    "resampler_depth",
    "cross_attn_first",
    "media_token_id",
)
_LAYERS = ("vision_layers", "resampler_depth", "language_layers")
_MOST, _MOST_LAYERS = 2**31 - 1, 10_000  # of a size that is no slip of the hand


@dataclass(frozen=True, kw_only=True)
class FlamingoConfig:
    """The sizes of a Flamingo; `FlamingoConfig.preset(name)` gives the published ones.

    Example:
        >>> config = FlamingoConfig.preset("openflamingo-9b")
        >>> config.cross_attn_layers
        (3, 7, 11, 15, 19, 23, 27, 31)
    """

    # Vision encoder
    vision: str = "vit"  # of the sizes below, "nfnet-f0" to "nfnet-f6", or "given": Flamingo(vision=...)
    image_size: int  # pixels of one side
    vision_dim: int  # width of the features; 3072 for every named NFNet
    patch_size: int = 0  # ViT: pixels of one side; (image_size / patch_size)^2 features a frame
    vision_layers: int = 0  # ViT
    vision_heads: int = 0  # ViT

    # Perceiver Resampler
    resampler_dim: int  # width of the latents, which is what cross-attention sees
    resampler_heads: int
    resampler_dim_head: int
    resampler_depth: int = 6
    num_latents: int = 64  # R, latents of one medium
    max_num_frames: int | None = None  # learned frame embeddings, None for none
    max_num_media: int | None = None  # learned medium embeddings, None for none

    # Gated cross-attention blocks, each in front of a language model layer
    cross_attn_heads: int
    cross_attn_dim_head: int
    cross_attn_every: int = 1  # a block before language model layers first, first + every, ...
    cross_attn_first: int = 0
    norm_media: bool = False  # LayerNorm on the media before keys and values
    only_attend_immediate_media: bool = True  # see the last image only, not all before
    policy: Policy = "zero"  # what text without a visible image gets, see dense_masked_attention

    # Resampler and cross-attention blocks
    activation: str = "gelu"
    ff_mult: int = 4

    # Language model; one of your own has the same width, layers and vocabulary
    vocab_size: int
    language_dim: int
    language_layers: int
    language_heads: int
    language_positions: PositionKind = "rotary"  # or "relative", as Chinchilla's
    tie_embeddings: bool = True
    new_tokens: tuple[int, ...] = ()  # ids whose embedding is learnt beside a frozen language model
    media_token_id: int = 256  # `<image>` of ByteTokenizer

    def __post_init__(self):
        _expect_types(self)
        sizes = [each.name for each in fields(self) if type(getattr(self, each.name)) is int]
        expect_ranges(self, {name: at_least(0) if name in _ZERO else POSITIVE for name in sizes})
        expect_ranges(self, {name: at_most(_MOST_LAYERS if name in _LAYERS else _MOST) for name in sizes})
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"FlamingoConfig: expected activation to be one of {', '.join(ACTIVATIONS)}, got "
                f"{self.activation!r}."
            )
        if self.cross_attn_first >= self.language_layers:
            raise ValueError(
                "FlamingoConfig: expected cross_attn_first to be below language_layers="
                f"{self.language_layers}, got {self.cross_attn_first}: there would be no block."
            )
        if any(token >= self.vocab_size for token in self.new_tokens):
            raise ValueError(
                f"FlamingoConfig: expected new_tokens below vocab_size={self.vocab_size}, got "
                f"{self.new_tokens}."
            )
        if self.vision == "vit":
            self._check_vit()
        elif self.vision not in (*NFNETS, "given"):
            raise ValueError(
                f"FlamingoConfig: expected vision to be one of vit, {', '.join(NFNETS)}, given, got "
                f"{self.vision!r}. For another encoder: Flamingo(config, vision=encoder)."
            )
        if self.language_dim % (2 * self.language_heads):
            raise ValueError(
                f"FlamingoConfig: expected language_dim to be an even multiple of language_heads="
                f"{self.language_heads} (positions come in pairs), got {self.language_dim}."
            )

    def _check_vit(self):
        if self.patch_size <= 0 or self.image_size % self.patch_size:
            raise ValueError(
                f"FlamingoConfig: expected image_size to be a multiple of patch_size={self.patch_size}, got "
                f"{self.image_size}."
            )
        if self.vision_heads <= 0 or self.vision_dim % self.vision_heads:
            raise ValueError(
                f"FlamingoConfig: expected vision_dim to be a multiple of vision_heads={self.vision_heads}, "
                f"got {self.vision_dim}."
            )

    @property
    def cross_attn_layers(self) -> tuple[int, ...]:
        """Indices of the language model layers that have a gated cross-attention block in front."""
        return tuple(range(self.cross_attn_first, self.language_layers, self.cross_attn_every))

    @staticmethod
    def preset(name: str, **changes) -> "FlamingoConfig":
        """A published model's sizes by name, with any field changed.

        Args:
            name: "flamingo-3b", "flamingo-9b", "flamingo-80b" (the paper's), "openflamingo-3b",
                "openflamingo-4b", "openflamingo-9b" (the released ones), or "tiny" for tests.
            changes: fields to replace.

        Raises:
            ValueError: for an unknown name, or a change of a field that there is not.

        "flamingo-9b" has the 40 layers and 10 blocks of Table 4: 11.3 G parameters with the vision encoder.
        Table 5 counts 9.3 G, which 32 layers and 8 blocks have: `preset("flamingo-9b", language_layers=32)`.

        Source: arXiv 2204.14198, Tables 4 and 5; arXiv 2308.01390, Table 1.

        >>> FlamingoConfig.preset("tiny", language_layers=2).language_layers
        2
        """
        if name not in PRESETS:
            raise ValueError(f"FlamingoConfig: expected one of {', '.join(PRESETS)}, got {name!r}.")
        known = [field.name for field in fields(FlamingoConfig)]
        for change in changes.keys() - known:
            near = difflib.get_close_matches(change, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Expected one of {', '.join(known)}."
            raise ValueError(f"FlamingoConfig: there is no field {change!r}. {hint}")
        return replace(PRESETS[name], **changes)


def _expect_types(config: FlamingoConfig) -> None:
    """Raises ValueError at the first field that is not of its type: files give any."""
    for name, expected in get_type_hints(FlamingoConfig).items():
        value = getattr(config, name)
        if get_origin(expected) is Literal:
            wanted, right = f"one of {', '.join(get_args(expected))}", value in get_args(expected)
        elif get_origin(expected) is tuple:
            right = isinstance(value, (tuple, list)) and all(type(id) is int and id >= 0 for id in value)
            wanted = "a list of ids"
        else:
            kinds = get_args(expected) if isinstance(expected, UnionType) else (expected,)
            wanted, right = kinds[0].__name__, type(value) in kinds
        if not right:
            raise ValueError(f"FlamingoConfig: expected {name} to be {wanted}, got {value!r}.")


def sizes(part: str, **values: int) -> dict[str, Any]:
    """The sizes of one part, by the names of their fields in `FlamingoConfig`.

    >>> sizes("language", dim=64, layers=4, heads=4)
    {'language_dim': 64, 'language_layers': 4, 'language_heads': 4}
    """
    return {f"{part}_{name}": value for name, value in values.items()}


# The paper's: NFNet-F6 at 320 pixels, a 10 x 10 grid of 3072 features, 8 training frames.
_FLAMINGO_3B = FlamingoConfig(
    vision="nfnet-f6",
    image_size=320,
    vision_dim=3072,
    # 128 is v1's Table 13 and gives the 194M of Table 5; appendix A.1.4 of v2 says dim / heads = 96.
    **sizes("resampler", dim=1536, heads=16, dim_head=128),
    max_num_frames=8,
    **sizes("cross_attn", heads=16, dim_head=128),
    norm_media=True,
    activation="squared_relu",
    **sizes("language", dim=2048, layers=24, heads=16),
    language_positions="relative",
    vocab_size=32000,
)

# The released ones: a ViT of CLIP ViT-L/14's shape at 224, 8 heads of 64 whatever the language model, no time
# embeddings. The vocabulary: 50277 tokens of GPT-NeoX, then `<|endofchunk|>`, `<image>` and `<PAD>`. The
# language models' further rows, up to 50432, are cut off.
_OPEN_FLAMINGO_3B = FlamingoConfig(
    image_size=224,
    patch_size=14,
    **sizes("vision", dim=1024, layers=24, heads=16),
    **sizes("resampler", dim=1024, heads=8, dim_head=64),
    **sizes("cross_attn", heads=8, dim_head=64),
    policy="open_flamingo",
    **sizes("language", dim=2048, layers=24, heads=16),
    vocab_size=50280,
    media_token_id=50278,
)

_TINY = FlamingoConfig(
    image_size=32,
    patch_size=8,
    **sizes("vision", dim=48, layers=2, heads=3),
    **sizes("resampler", dim=40, heads=2, dim_head=16, depth=2),
    num_latents=8,
    max_num_frames=4,
    **sizes("cross_attn", heads=2, dim_head=24, every=2),
    norm_media=True,
    activation="squared_relu",
    **sizes("language", dim=64, layers=4, heads=4),
    vocab_size=261,
)

PRESETS = {
    "flamingo-3b": _FLAMINGO_3B,
    "flamingo-9b": replace(
        _FLAMINGO_3B,
        **sizes("language", dim=4096, layers=40, heads=32),
        **sizes("cross_attn", heads=32, every=4),
    ),
    "flamingo-80b": replace(
        _FLAMINGO_3B,
        **sizes("language", dim=8192, layers=80, heads=64),
        **sizes("cross_attn", heads=64, every=7),
    ),
    "openflamingo-3b": _OPEN_FLAMINGO_3B,
    "openflamingo-4b": replace(
        _OPEN_FLAMINGO_3B,
        **sizes("language", dim=2560, layers=32, heads=32),
        **sizes("cross_attn", every=2, first=1),
    ),
    "openflamingo-9b": replace(
        _OPEN_FLAMINGO_3B,
        **sizes("language", dim=4096, layers=32, heads=32),
        **sizes("cross_attn", every=4, first=3),
    ),
    "tiny": _TINY,
}
