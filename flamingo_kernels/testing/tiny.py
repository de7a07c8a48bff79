"""Small models of the libraries that `patch` knows, from configurations, with random weights and inputs.

For tests and profiles: nothing is downloaded. The libraries are imported when a model is built.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

VOCABULARY, IMAGE, PAD, END = 64, 62, 0, 63


@dataclass(frozen=True)
class Sizes:
    """How large a model and its inputs are.

    Attributes:
        batch, text, images: sequences, tokens of each, and images of each.
        width, heads, layers: of the language model; every second layer attends to images.
        visual: width of the vision encoder.
        latents: that a resampler makes of an image.
    """

    batch: int = 1
    text: int = 256
    images: int = 4
    width: int = 256
    heads: int = 4
    layers: int = 4
    visual: int = 128
    latents: int = 64

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class TinyModel:
    """A model and what it is called with.

    Attributes:
        name: as `build` knows it.
        model: in evaluation mode.
        inputs: keyword arguments of its forward.
    """

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]

    def logits(self) -> Tensor:
        """`[B, T, V]` of one forward pass."""
        out = self.model(**self.inputs)
        return cast(Tensor, out if isinstance(out, Tensor) else out.logits)

    def loss(self) -> Tensor:
        """The loss of predicting every next token, to call `backward()` on."""
        logits, targets = self.logits()[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten()
        return nn.functional.cross_entropy(logits.float(), targets)

    def generate(self, new_tokens: int, **options: Any) -> Tensor:
        """The prompt and exactly `new_tokens` more, greedy unless the options of transformers say otherwise.

        Raises:
            NotImplementedError: the library has no generation.
        """
        generate: Any = getattr(self.model, "generate", None)
        if generate is None:
            raise NotImplementedError(f"{self.name}: its library generates no text.")
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        return cast(Tensor, generate(**self.inputs, **length, **options))

    @property
    def tokens(self) -> Tensor:
        return next(tensor for tensor in self.inputs.values() if tensor.dtype == torch.int64)


def names() -> list[str]:
    """What `build` takes."""
    return list(_BUILDERS)


def build(name: str, sizes: Sizes | None = None, *, seed: int = 0, **config: Any) -> TinyModel:
    """A small model with random weights: gates, norms and biases too, so that every part of it counts.

    Args:
        name: one of `names()`.
        sizes: of the model and its inputs. Default: `Sizes()`.
        seed: of weights and inputs. Default: 0.
        config: for transformers, more of the model's configuration.

    Raises:
        ValueError: an unknown name.
        ImportError: the library is not installed.

    Example:
        >>> from flamingo_kernels.testing import tiny
        >>> "mllama-tiny" in tiny.names()
        True
    """
    if name not in _BUILDERS:
        raise ValueError(f"tiny.build: {name!r} is not one of {', '.join(_BUILDERS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = _BUILDERS[name](sizes or Sizes(), **config)
        with torch.no_grad():
            for parameter in model.parameters():
                # matrices keep the size of what goes through them, all else is around one half
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
                parameter.normal_(std=fan_in**-0.5)
    return TinyModel(name, model.eval(), inputs)


def _text(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Tokens and the places of images in them, both `[B, T]`: after two of text, adjacent in odd rows."""
    tokens = torch.randint(3, IMAGE - 1, (sizes.batch, sizes.text))
    locations = torch.zeros_like(tokens)
    for b, row in enumerate(locations):
        step = 1 if b % 2 else max(sizes.text // (sizes.images + 1), 1)
        row[2 : 2 + sizes.images * step : step] = 1
    return tokens, locations


def _idefics(sizes: Sizes, **config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    image, patch = 32, 8
    vision = {"embed_dim": sizes.visual, "image_size": image, "patch_size": patch, "num_attention_heads": 2}
    resampler = {"resampler_n_latents": sizes.latents, "resampler_depth": 2, "resampler_n_heads": 2}
    resampler |= {"resampler_head_dim": sizes.visual // 2, "qk_layer_norms_perceiver": True}
    options: dict[str, Any] = {
        **_language(sizes),
        "additional_vocab_size": 0,
        "num_hidden_layers": sizes.layers,
        "cross_layer_interval": 2,
        "use_resampler": True,
        "qk_layer_norms": True,
        "vision_config": {**vision, "num_hidden_layers": 1, "intermediate_size": 2 * sizes.visual},
        "perceiver_config": {"use_resampler": True, **resampler},
    }
    model = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**{**options, **config}))
    tokens, locations = _text(sizes)
    seen = nn.functional.one_hot(locations.cumsum(1), sizes.images + 1)[..., 1:]
    return model, {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(sizes.batch, sizes.images, 3, image, image),
        "image_attention_mask": seen,
    }


def _language(sizes: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": END,
    }


def _mllama(
    sizes: Sizes, *, image: int = 32, patch: int = 8, most_tiles: bool = False, **config: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Images are of one, two and four tiles in turn, or all of four."""
    import transformers

    tiles = 4
    rope = {"rope_type": "default", "rope_theta": 10000.0}  # under its name in transformers 5, and in 4
    vision = {
        "hidden_size": sizes.visual,
        "intermediate_size": 2 * sizes.visual,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": image,
        "patch_size": patch,
        "max_num_tiles": tiles,
        "vision_output_dim": 2 * sizes.visual,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 2]],
    }
    text = {
        **_language(sizes),
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.heads // 2,
        "cross_attention_layers": list(range(1, sizes.layers, 2)),
        "rope_parameters": rope,
        "rope_scaling": {"rope_type": "default"},
    }
    options = transformers.MllamaConfig(
        vision_config=vision, text_config={**text, **config}, image_token_index=IMAGE
    )
    model = transformers.MllamaForConditionalGeneration(options)
    tokens, locations = _text(sizes)
    ratios = torch.arange(sizes.images).expand(sizes.batch, -1) % 3 + 1  # of one, two or four tiles
    ratios = torch.full_like(ratios, 3) if most_tiles else ratios
    valid = torch.arange(tiles) < torch.tensor([0, 1, 2, 4])[ratios][..., None]  # [B, M, tiles]
    return model, {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(sizes.batch, sizes.images, tiles, 3, image, image),
        "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": valid.long(),
        "cross_attention_mask": (_consecutive(locations, sizes.images)[..., None] & valid[:, None]).long(),
    }


def _consecutive(locations: Tensor, images: int) -> Tensor:
    """Bool `[B, T, M]`: text sees the last image before it, and those adjacent to that one."""
    index = locations.cumsum(1)
    follows = locations.bool() & nn.functional.pad(locations[:, :-1], (1, 0)).bool()
    group = (locations.bool() & ~follows).cumsum(1)  # [B, T]
    of_image = torch.zeros(len(locations), images, dtype=torch.int64)
    for b, t in locations.nonzero().tolist():
        of_image[b, index[b, t] - 1] = group[b, t]
    shown = torch.arange(images) < index[..., None]
    return shown & (of_image[:, None] == group[..., None])


def _idefics2(sizes: Sizes, **config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    image, patch = 32, 4
    vision = {"hidden_size": sizes.visual, "intermediate_size": 2 * sizes.visual, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": image, "patch_size": patch}
    resampler = {"hidden_size": sizes.width, "resampler_n_latents": sizes.latents, "resampler_depth": 2}
    resampler |= {"resampler_n_heads": sizes.heads, "resampler_head_dim": sizes.head_dim}
    text = {"model_type": "mistral", "num_hidden_layers": sizes.layers, "num_key_value_heads": sizes.heads}
    options = transformers.Idefics2Config(
        vision_config=vision,
        perceiver_config={**resampler, "num_key_value_heads": sizes.heads // 2, **config},
        text_config={**_language(sizes), **text},
        image_token_id=IMAGE,
    )
    tokens, _ = _text(sizes)
    prompt = torch.full((sizes.batch, sizes.images * sizes.latents), IMAGE)  # a token a latent
    tokens = torch.cat([prompt, tokens], dim=1)
    visible = torch.ones(sizes.batch, sizes.images, image, image, dtype=torch.int64)
    visible[:, 0, :, image * 2 // 3 :] = 0  # a narrow image, padded on its right
    return transformers.Idefics2ForConditionalGeneration(options), {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(sizes.batch, sizes.images, 3, image, image),
        "pixel_attention_mask": visible,
    }


def _evolla(sizes: Sizes, **config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    protein: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": sizes.visual,
        "intermediate_size": 2 * sizes.visual,
    }
    protein |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1, "mask_token_id": 4}
    protein |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options: dict[str, Any] = {
        **_language(sizes),
        "protein_encoder_config": {**protein, "max_position_embeddings": 512},
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.heads,
        "aligner_num_add_layers": sizes.layers // 2,
        "resampler_depth": 2,
        "resampler_heads": 2,
        "resampler_dim_head": sizes.visual // 2,
        "resampler_num_latents": sizes.latents,
    }
    tokens, residues = _text(sizes)[0], torch.randint(5, 30, (sizes.batch, 2 * sizes.latents))
    padding, protein_padding = torch.ones_like(tokens), torch.ones_like(residues)
    padding[0, :2] = 0
    protein_padding[-1, sizes.latents :] = 0
    config = {**options, **config}
    return transformers.EvollaForProteinText2Text(transformers.EvollaConfig(**config)), {
        "input_ids": tokens,
        "attention_mask": padding,
        "protein_input_ids": residues,
        "protein_attention_mask": protein_padding,
    }


def open_flamingo_module(name: str) -> ModuleType:
    """The module `open_flamingo.src.<name>`.

    Its package imports open_clip at its top and pins an old torch, so it is never imported: empty packages of
    its name stand in, through which the modules load as usual.

    Raises:
        ImportError: open_flamingo is not installed.
    """
    if "open_flamingo" not in sys.modules:
        spec = importlib.util.find_spec("open_flamingo")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("open_flamingo is not installed: pip install --no-deps open-flamingo==2.0.1")
        root = spec.submodule_search_locations[0]
        for package, folder in (("open_flamingo", root), ("open_flamingo.src", f"{root}/src")):
            module = ModuleType(package)
            module.__path__ = [folder]
            sys.modules[package] = module
    return importlib.import_module(f"open_flamingo.src.{name}")


class _OpenFlamingo(nn.Module):
    """What its Flamingo class does around the parts; the input is what its vision encoder would give."""

    def __init__(self, sizes: Sizes, language: Any, layers: str) -> None:
        super().__init__()
        helpers, lm, utils = map(open_flamingo_module, ("helpers", "flamingo_lm", "utils"))
        self.perceiver = helpers.PerceiverResampler(
            dim=sizes.visual, depth=2, dim_head=sizes.visual // 2, heads=2, num_latents=sizes.latents
        )
        # newer transformers ask a decoder layer for this
        lm.FlamingoLayer.attention_type = property(lambda layer: layer.decoder_layer.attention_type)
        utils.extend_instance(language, lm.FlamingoLMMixin)
        language.set_decoder_layers_attr_name(layers)
        language.init_flamingo(IMAGE, sizes.width, sizes.visual, 2, gradient_checkpointing=False)
        self.lang_encoder = language

    def forward(self, vision_x: Tensor | None, lang_x: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Without images the text follows that of the call before, and sees its last image."""
        language: Any = self.lang_encoder
        language._use_cached_vision_x = vision_x is None
        if vision_x is not None:
            self._condition(vision_x)
        return language(input_ids=lang_x, attention_mask=attention_mask, **options)

    def generate(self, vision_x: Tensor, lang_x: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        language: Any = self.lang_encoder
        language._use_cached_vision_x = True
        self._condition(vision_x.repeat_interleave(options.get("num_beams", 1), dim=0))
        out = language.generate(input_ids=lang_x, attention_mask=attention_mask, **options)
        language.clear_conditioned_layers()
        language._use_cached_vision_x = False
        return cast(Tensor, out)

    def _condition(self, vision_x: Tensor) -> None:
        language: Any = self.lang_encoder
        media = self.perceiver(vision_x)
        for layer in language._get_decoder_layers():
            layer.condition_vis_x(media)


def _open_flamingo(
    sizes: Sizes, *, language: str = "GPTNeoX", **config: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    options = {**_language(sizes), "num_hidden_layers": sizes.layers, **config}
    if language == "OPT":
        options["ffn_dim"] = options.pop("intermediate_size")
    configured = getattr(transformers, f"{language}Config")(**options)
    layers = {"GPTNeoX": "gpt_neox.layers", "OPT": "model.decoder.layers"}[language]
    model = _OpenFlamingo(sizes, getattr(transformers, f"{language}ForCausalLM")(configured), layers)
    tokens, locations = _text(sizes)
    tokens[locations.bool()] = IMAGE
    padding = torch.ones_like(tokens)
    padding[:, 0] = 0  # its mixin demands a mask, which generate() drops where nothing is masked
    features = torch.randn(sizes.batch, sizes.images, 1, 16, sizes.visual)
    return model, {"vision_x": features, "lang_x": tokens, "attention_mask": padding}


def _flamingo_pytorch(sizes: Sizes, **config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    palm = importlib.import_module("flamingo_pytorch").FlamingoPaLM
    options: dict[str, Any] = {"dim": sizes.width, "num_tokens": VOCABULARY, "depth": sizes.layers}
    options |= {
        "heads": sizes.heads,
        "dim_head": sizes.head_dim,
        "media_token_id": IMAGE,
        "cross_attn_every": 2,
    }
    options |= {"img_encoder": nn.Identity(), "perceiver_num_latents": sizes.latents, **config}
    tokens, locations = _text(sizes)
    tokens[locations.bool()] = IMAGE
    images = torch.randn(sizes.batch, sizes.images, 16, sizes.width)
    model = palm(**options)
    resampler = model.perceiver_resampler
    if sizes.images > len(resampler.media_pos_emb):  # it has them for 4 images, and no argument for more
        resampler.media_pos_emb = nn.Parameter(torch.empty(sizes.images, 1, sizes.width))
    return model, {"text": tokens, "images": images}


_BUILDERS: dict[str, Callable[..., tuple[nn.Module, dict[str, Tensor]]]] = {
    "open_flamingo-tiny": _open_flamingo,
    "flamingo_pytorch-tiny": _flamingo_pytorch,
    "idefics-tiny": _idefics,
    "idefics2-tiny": _idefics2,
    "mllama-tiny": _mllama,
    "evolla-tiny": _evolla,
}
