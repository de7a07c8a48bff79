"""Flamingo: a frozen vision encoder and a frozen language model, joined by what is trained.

::

    pixels --> vision --> resampler --> media [B, M, R, D_v]
                                          |
    input_ids --> embedding --> [ gated cross-attention --> language layer ] x n --> logits
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo import generation
from flamingo.config import FlamingoConfig
from flamingo.language import LanguageModel, PretrainedLanguage
from flamingo.language.loss import IGNORED
from flamingo.modules import GatedCrossAttentionBlock, PerceiverResampler
from flamingo.vision import NFNet, VisionEncoder


class FlamingoOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor | None  # [B, T, vocab_size]; None where the loss alone was asked for
    loss: Tensor | None  # cross-entropy of the next token, where labels were given


class Flamingo(nn.Module):
    """Reads documents of interleaved text and images, and predicts the next token.

    Text in front of a document's first image gets no visual information. Text after it sees the last image
    before it through cross-attention, and the earlier ones through the language model's own attention.

    Args:
        config: the sizes; see `FlamingoConfig.preset`. Build the big ones under `torch.device("meta")`.
        vision: a vision encoder of your own instead of the one that config names: any module from pixels
            `[B, M, F, 3, h, w]` to features `[B, M, F, v, dim]` whose attribute `dim` is `config.vision_dim`.
        language: a language model instead of the one that config describes, as `PretrainedLanguage(model)`;
            its sizes are `config.language_dim`, `language_layers` and `vocab_size`.

    Raises:
        ValueError: if the vision encoder or the language model has other sizes than config says.

    Source: arXiv 2204.14198, section 2.

    >>> model = Flamingo(FlamingoConfig.preset("tiny"))
    >>> input_ids = torch.tensor([[65, 256, 66, 67]])  # "A<image>BC"
    >>> model(input_ids, torch.zeros(1, 1, 1, 3, 32, 32)).logits.shape
    torch.Size([1, 4, 261])
    """

    def __init__(
        self,
        config: FlamingoConfig,
        *,
        vision: nn.Module | None = None,
        language: LanguageModel | PretrainedLanguage | None = None,
    ):
        super().__init__()
        self.config = config
        self.vision = vision_encoder(config) if vision is None else vision
        if getattr(self.vision, "dim", None) != config.vision_dim:
            raise ValueError(
                f"Flamingo: expected a vision encoder whose attribute dim is vision_dim={config.vision_dim}, "
                f"got {type(self.vision).__name__} with dim {getattr(self.vision, 'dim', 'missing')}. Change "
                "the configuration: FlamingoConfig.preset(name, vision_dim=...)."
            )
        self.resampler = PerceiverResampler(
            dim=config.resampler_dim,
            depth=config.resampler_depth,
            dim_head=config.resampler_dim_head,
            heads=config.resampler_heads,
            num_latents=config.num_latents,
            max_num_media=config.max_num_media,
            max_num_frames=config.max_num_frames,
            ff_mult=config.ff_mult,
            activation=config.activation,
            dim_input=None if config.vision_dim == config.resampler_dim else config.vision_dim,
        )
        self.language: LanguageModel | PretrainedLanguage
        self.language = language_model(config) if language is None else _fitting(language, config)
        # Keyed by the language model layer each block stands in front of.
        self.cross_attn = nn.ModuleDict(
            {
                str(layer): GatedCrossAttentionBlock(
                    dim=config.language_dim,
                    dim_visual=config.resampler_dim,
                    dim_head=config.cross_attn_dim_head,
                    heads=config.cross_attn_heads,
                    ff_mult=config.ff_mult,
                    only_attend_immediate_media=config.only_attend_immediate_media,
                    activation=config.activation,
                    norm_media=config.norm_media,
                    policy=config.policy,
                )
                for layer in config.cross_attn_layers
            }
        )

    def forward(
        self,
        input_ids: Tensor,
        pixels: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_frames: Tensor | None = None,
        media_starts: Tensor | None = None,
        *,
        loss_only: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> FlamingoOutput:
        """
        Args:
            input_ids: int64 `[B, T]`, with `config.media_token_id` where an image stands: none at padding.
            pixels: `[B, M, F, 3, image_size, image_size]`, the media of each document in order, padded to M;
                an image is one frame. Or what `vision` made of them: `[B, M, F, v, vision_dim]`.
            attention_mask: `[B, T]`, 0 at padding; None for no padding.
            labels: int64 `[B, T]`, the tokens again, -100 where a token is not to be learned.
            num_frames: integer `[B, M]`, the true length of clips padded to F; None if all have F.
            media_starts: bool `[B, T]`, True where the text that sees the next medium begins; by default
                at its `<image>`. `Processor(...)(documents, p_next=0.5)` makes others.
            loss_only: no logits, which then never exist all at once: most of a step's memory where the
                vocabulary is large. The loss is added in float32 or wider, and differentiable once.
            reduction: "mean" over the tokens that are learned, or "sum".

        Returns:
            `FlamingoOutput(logits, loss)`; loss is None without labels.

        Raises:
            ValueError: for `loss_only` without labels, or another reduction.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Flamingo: expected reduction 'mean' or 'sum', got {reduction!r}.")
        media = self.encode_media(pixels, num_frames)
        if loss_only:
            if labels is None:
                raise ValueError("Flamingo: expected labels with loss_only=True, got None. Pass labels too.")
            loss = self.decode(input_ids, media, attention_mask, media_starts=media_starts, labels=labels)
            learned = (labels[:, 1:] != IGNORED).sum()
            return FlamingoOutput(None, loss / learned if reduction == "mean" else loss)
        logits = self.decode(input_ids, media, attention_mask, media_starts=media_starts)
        if labels is None:
            return FlamingoOutput(logits, None)
        # Position t predicts token t + 1.
        targets = labels[:, 1:].flatten()
        return FlamingoOutput(
            logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction=reduction)
        )

    def encode_media(self, pixels: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """pixels `[B, M, F, 3, h, w]`, or features `[B, M, F, v, vision_dim]`, to media `[B, M, R, D_v]`."""
        is_encoded = pixels.ndim == 5 and pixels.shape[-1] == self.config.vision_dim
        features = pixels if is_encoded else self.vision(pixels)
        return self.resampler(self._in_our_dtype(features), num_frames)

    def _in_our_dtype(self, x: Tensor) -> Tensor:
        """What a tower makes, in the dtype of the layers between the towers; theirs may be another."""
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # which does not know "meta"
            return x  # autocast casts it where it must be
        latents = self.resampler.latents
        if hasattr(latents, "full_tensor"):
            return x  # FSDP2 has sharded the layers: stored wider, they compute in the dtype of its policy
        return x.to(latents.dtype)

    def decode(
        self,
        input_ids: Tensor,
        media: Tensor,
        attention_mask: Tensor | None = None,
        *,
        media_starts: Tensor | None = None,
        cache: Any = None,
        media_locations: Tensor | None = None,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Tokens and media to logits, or to the loss of labels.

        Args:
            input_ids: int64 `[B, T]`.
            media: `[B, M, R, D_v]`. With media_locations B may be a divisor of that of input_ids: a sequence
                of media then serves as many texts in a row, as those of beams, without a copy.
            attention_mask: `[B, K]`, 0 at padding, of the tokens in the cache and of input_ids.
            media_starts: `[B, T]`, see `forward`.
            cache: of `language.new_cache()`, with the K - T tokens before; the new ones are added.
            media_locations: `[B, P]`, non-zero at as many places as media were before input_ids: all of
                input_ids sees what they show. None for the media of input_ids itself.
            logits_to_keep: n, to compute the logits of the last n tokens alone; 0 for all T.
            labels: int64 `[B, T]`, see `forward`, of tokens that have none before them in a cache.

        Returns:
            logits `[B, T or n, vocab_size]`; with labels the sum of the losses, float32 or wider.
        """
        follows = media_locations is not None
        # One tensor for all blocks: what a block derives from it can be kept for the next.
        locations = media_locations if follows else media_starts
        if locations is None:
            locations = input_ids == self.config.media_token_id
            if attention_mask is not None:  # padding holds no image
                locations &= attention_mask[:, -input_ids.shape[1] :] != 0

        def before_layer(index: int, x: Tensor) -> Tensor:
            if str(index) not in self.cross_attn:
                return x
            # Texts that share media see the same ones: to a block they are one longer text.
            texts = rearrange(x, "(b n) t d -> b (n t) d", b=len(media)) if len(x) != len(media) else x
            seen = self.cross_attn[str(index)](self._in_our_dtype(texts), media, locations, follows)
            return seen.view(x.shape).to(x.dtype)  # gates in float32 promote

        if labels is not None:
            return self.language.loss(input_ids, labels, attention_mask, before_layer=before_layer)
        return self.language(
            input_ids,
            attention_mask,
            cache=cache,
            before_layer=before_layer,
            logits_to_keep=logits_to_keep,
        )

    def generate(
        self,
        input_ids: Tensor,
        pixels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_frames: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """What follows the documents, int64 `[B, n]`; the options are those of `flamingo.generate`.

        >>> model = Flamingo(FlamingoConfig.preset("tiny"))
        >>> model.generate(torch.tensor([[256, 65]]), torch.zeros(1, 1, 1, 3, 32, 32), max_new_tokens=3).shape
        torch.Size([1, 3])
        """
        return generation.generate(self, input_ids, pixels, attention_mask, num_frames, **options)

    def freeze(self) -> "Flamingo":
        """Freezes the vision encoder and the language model but for new tokens, as in training."""
        self.vision.requires_grad_(False)
        self.language.freeze()
        return self


def vision_encoder(config: FlamingoConfig) -> NFNet | VisionEncoder:
    """The vision encoder that a configuration names.

    Raises:
        ValueError: if it is "given", as it then has to be.
    """
    if config.vision == "given":
        raise ValueError(
            'Flamingo: expected a vision encoder, as the configuration says vision="given", got none. Pass '
            "it: Flamingo(config, vision=...)."
        )
    if config.vision != "vit":
        return NFNet.preset(config.vision)
    return VisionEncoder(
        image_size=config.image_size,
        patch_size=config.patch_size,
        dim=config.vision_dim,
        layers=config.vision_layers,
        heads=config.vision_heads,
    )


def language_model(config: FlamingoConfig) -> LanguageModel:
    """The language model that a configuration describes."""
    return LanguageModel(
        vocab_size=config.vocab_size,
        dim=config.language_dim,
        layers=config.language_layers,
        heads=config.language_heads,
        positions=config.language_positions,
        tie_embeddings=config.tie_embeddings,
        new_tokens=config.new_tokens,
    )


def _fitting(
    language: LanguageModel | PretrainedLanguage, config: FlamingoConfig
) -> LanguageModel | PretrainedLanguage:
    """The language model, if it has the sizes that a configuration says."""
    sizes = {
        "language_dim": getattr(language, "dim", None),
        "language_layers": getattr(language, "num_layers", None),
        "vocab_size": getattr(language, "vocab_size", None),
    }
    expected = {name: getattr(config, name) for name in sizes}
    if sizes != expected:
        raise ValueError(
            f"Flamingo: expected a language model of the sizes {expected}, got {type(language).__name__} of "
            f"{sizes}. Change the configuration: FlamingoConfig.preset(name, language_dim=..., "
            "language_layers=..., vocab_size=...). Pass a model of transformers as PretrainedLanguage(model)."
        )
    return language
