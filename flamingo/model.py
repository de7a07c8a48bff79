"""Flamingo: a frozen vision encoder and a frozen language model, joined by what is trained.

::

    pixels --> vision --> resampler --> media [B, M, R, D_v]
                                          |
    input_ids --> embedding --> [ gated cross-attention --> language layer ] x n --> logits
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo.config import FlamingoConfig
from flamingo.language import LanguageModel
from flamingo.modules import GatedCrossAttentionBlock, PerceiverResampler
from flamingo.vision import NFNet, VisionEncoder


class FlamingoOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor  # [B, T, vocab_size]
    loss: Tensor | None  # mean cross-entropy of the next token, where labels were given


class Flamingo(nn.Module):
    """Reads documents of interleaved text and images, and predicts the next token.

    Text in front of a document's first image gets no visual information. Text after it sees the last image
    before it through cross-attention, and the earlier ones through the language model's own attention.

    Args:
        config: the sizes; see `FlamingoConfig.preset`. Build the big ones under `torch.device("meta")`.
        vision: a vision encoder of your own instead of the one that config names: any module from pixels
            `[B, M, F, 3, h, w]` to features `[B, M, F, v, dim]` whose attribute `dim` is `config.vision_dim`.

    Raises:
        ValueError: if the vision encoder's features have another width.

    Source: arXiv 2204.14198, section 2.

    >>> model = Flamingo(FlamingoConfig.preset("tiny"))
    >>> input_ids = torch.tensor([[65, 256, 66, 67]])  # "A<image>BC"
    >>> model(input_ids, torch.zeros(1, 1, 1, 3, 32, 32)).logits.shape
    torch.Size([1, 4, 261])
    """

    def __init__(self, config: FlamingoConfig, *, vision: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.vision = _vision_encoder(config) if vision is None else vision
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
        self.language = LanguageModel(
            vocab_size=config.vocab_size,
            dim=config.language_dim,
            layers=config.language_layers,
            heads=config.language_heads,
            tie_embeddings=config.tie_embeddings,
        )
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
    ) -> FlamingoOutput:
        """
        Args:
            input_ids: int64 `[B, T]`, with `config.media_token_id` where an image stands.
            pixels: `[B, M, F, 3, image_size, image_size]`, the media of each document in order, padded to M;
                an image is one frame.
            attention_mask: `[B, T]`, 0 at padding; None for no padding.
            labels: int64 `[B, T]`, the tokens again, -100 where a token is not to be learned.
            num_frames: integer `[B, M]`, the true length of clips padded to F; None if all have F.
            media_starts: bool `[B, T]`, True where the text that sees the next medium begins; by default
                at its `<image>`. `Processor(...)(documents, p_next=0.5)` makes others.

        Returns:
            `FlamingoOutput(logits, loss)`; loss is None without labels.
        """
        media = self.encode_media(pixels, num_frames)
        logits = self.decode(input_ids, media, attention_mask, media_starts)
        if labels is None:
            return FlamingoOutput(logits, None)
        # Position t predicts token t + 1.
        return FlamingoOutput(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    def encode_media(self, pixels: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """pixels `[B, M, F, 3, h, w]` to media `[B, M, R, D_v]`."""
        return self.resampler(self.vision(pixels), num_frames)

    def decode(
        self,
        input_ids: Tensor,
        media: Tensor,
        attention_mask: Tensor | None = None,
        media_starts: Tensor | None = None,
    ) -> Tensor:
        """input_ids `[B, T]` and media `[B, M, R, D_v]` to logits `[B, T, vocab_size]`; see `forward`."""
        # One tensor for all blocks: what a block derives from it can be kept for the next.
        is_image = input_ids == self.config.media_token_id
        media_locations = is_image if media_starts is None else media_starts
        x = self.language.embedding(input_ids)
        angles, mask = self.language.positions_and_mask(input_ids, attention_mask)
        for i, layer in enumerate(self.language.layers):
            if str(i) in self.cross_attn:
                x = self.cross_attn[str(i)](x, media, media_locations)
            x = layer(x, angles, mask)
        return self.language.logits(x)

    def freeze(self) -> "Flamingo":
        """Freezes the vision encoder and the language model, as in training; returns the model."""
        self.vision.requires_grad_(False)
        self.language.requires_grad_(False)
        return self

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixels: Tensor,
        attention_mask: Tensor | None = None,
        num_frames: Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        stop_token_ids: Collection[int] = (),
    ) -> Tensor:
        """Greedy continuation: the most likely token, again and again. Never emits `<image>`.

        Args:
            input_ids, pixels, attention_mask, num_frames: as in `forward`, padded on the left.
            max_new_tokens: tokens to add at most.
            stop_token_ids: a document that emits one of these repeats it until all have stopped.

        Returns:
            int64 `[B, n]`, the new tokens, n <= max_new_tokens.

        Raises:
            ValueError: if a document ends in padding.

        >>> model = Flamingo(FlamingoConfig.preset("tiny"))
        >>> model.generate(torch.tensor([[256, 65]]), torch.zeros(1, 1, 1, 3, 32, 32), max_new_tokens=3).shape
        torch.Size([1, 3])
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.shape[1] == 0 or not attention_mask[:, -1].all():
            raise ValueError(
                "generate: expected every document to end in a token, got one that is empty or padded on the "
                "right. Processor(...)(documents, prompt=True) pads on the left."
            )
        media = self.encode_media(pixels, num_frames)
        prompt = input_ids.shape[1]
        stops = torch.tensor(list(stop_token_ids), dtype=input_ids.dtype, device=input_ids.device)
        stopped = torch.zeros_like(input_ids[:, -1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits = self.decode(input_ids, media, attention_mask)[:, -1]
            logits[:, self.config.media_token_id] = -torch.inf
            token = torch.where(stopped, input_ids[:, -1], logits.argmax(dim=-1))
            input_ids = torch.cat((input_ids, token[:, None]), dim=1)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
            stopped = stopped | torch.isin(token, stops)
            if stopped.all():
                break
        return input_ids[:, prompt:]


def _vision_encoder(config: FlamingoConfig) -> NFNet | VisionEncoder:
    """The vision encoder that a configuration names."""
    if config.vision != "vit":
        return NFNet.preset(config.vision)
    return VisionEncoder(
        image_size=config.image_size,
        patch_size=config.patch_size,
        dim=config.vision_dim,
        layers=config.vision_layers,
        heads=config.vision_heads,
    )
