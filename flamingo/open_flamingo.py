"""OpenFlamingo's published weights in a Flamingo of this package.

A checkpoint of open_flamingo holds what was trained, and the embeddings of the language model::

    perceiver.*                                           model.resampler
    lang_encoder.<layers>.<i>.gated_cross_attn_layer.*    model.cross_attn[i]
    lang_encoder.gated_cross_attn_layers.<i>.*            the same again, in old ones
    lang_encoder.<embedding>, lang_encoder.<head>         model.language, every row, those of new tokens too

and may hold the towers too, frozen copies or trained as well::

    lang_encoder.<layers>.<i>.decoder_layer.*, ...        model.language
    lang_encoder.old_decoder_blocks.<i>.*                 the same again
    vision_encoder.*                                      model.vision, a CLIP by open_clip's names
"""

import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from flamingo.language import PretrainedLanguage
from flamingo.model import Flamingo
from flamingo.vision import PretrainedVision

# What open_flamingo's code fixes for every model.
_CHOICES = {
    "resampler_heads": 8,
    "resampler_dim_head": 64,
    "cross_attn_heads": 8,
    "cross_attn_dim_head": 64,
    "only_attend_immediate_media": True,
    "policy": "open_flamingo",
    "activation": "gelu",
}
_BLOCK = re.compile(
    r"lang_encoder\.(?:gated_cross_attn_layers\.(\d+)|[\w.]+\.(\d+)\.gated_cross_attn_layer)\.(.+)"
)
_UNTRAINED = re.compile(
    r".+\.(inv_freq|masked_bias|attention\.bias)|vision_encoder\.proj"
)  # buffers, CLIP's head
# By open_clip's names of a CLIP tower, transformers'.
_CLIP = {
    r"^conv1\.": "embeddings.patch_embedding.",
    r"^class_embedding": "embeddings.class_embedding",
    r"^positional_embedding": "embeddings.position_embedding.weight",
    r"^ln_pre\.": "pre_layrnorm.",
    r"^ln_post\.": "post_layernorm.",
    r"^transformer\.resblocks\.": "encoder.layers.",
    r"\.attn\.": ".self_attn.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
_HEADS = ("lang_encoder.lm_head.weight", "lang_encoder.embed_out.weight")  # the latter was GPT-NeoX's


@torch.no_grad()
def load_open_flamingo(model: Flamingo, checkpoint: Path | str) -> Flamingo:
    """Sets the weights of a model to those of a checkpoint of open_flamingo: all that the checkpoint has.

    Every row of the embedding is set, as every row is saved. Training changes the rows of `<|endofchunk|>`
    and `<image>`, or none; under FSDP without original parameters it changes all. A head that is not the
    embedding is never trained. GPT-NeoX's is saved and set. LLaMA's is not saved and stays as it is, with
    rows of zeros for `new_tokens`, which open_flamingo draws at random each time. Where the language model
    or CLIP was trained as well, the checkpoint has its weights, and they are set.

    Args:
        model: built with the vision encoder and the language model that the checkpoint was trained with;
            only their sizes can be checked. The language model has as many rows as the checkpoint: call
            its `resize_token_embeddings`, or give `PretrainedLanguage` the `new_tokens` that are missing.
        checkpoint: a `checkpoint.pt` as released, one that open_flamingo's training wrote, or the same
            tensors in a `.safetensors`.

    Returns:
        The model.

    Raises:
        ValueError: if the model is built otherwise, or the checkpoint lacks a weight, or has one that the
            model lacks or has in another shape. The model is then as before.
        ImportError: for a `.safetensors` without safetensors installed.

    Limits: call it before weights are folded or sharded (FSDP). Compared with open_flamingo 2.0.1 on tiny
    models; the released files themselves were not at hand.

    Source: open_flamingo 2.0.1 (train_utils.py, what is saved; factory.py, tokens), arXiv 2308.01390.

    The 3B model, which downloads some 11 GB::

        from huggingface_hub import hf_hub_download
        from transformers import AutoTokenizer

        name = "anas-awadalla/mpt-1b-redpajama-200b"
        tokenizer = PretrainedTokenizer.open_flamingo(AutoTokenizer.from_pretrained(name))
        language_model = load_mpt_1b(name)
        language_model.resize_token_embeddings(tokenizer.vocab_size)
        new_tokens = [tokenizer.eoc_id, tokenizer.image_id]
        vision = PretrainedVision.from_pretrained("openai/clip-vit-large-patch14")
        model = Flamingo(
            FlamingoConfig.preset("openflamingo-3b"),
            vision=vision,
            language=PretrainedLanguage(language_model, new_tokens=new_tokens),
        )
        checkpoint = hf_hub_download("openflamingo/OpenFlamingo-3B-vitl-mpt1b", "checkpoint.pt")
        load_open_flamingo(model.eval(), checkpoint)

        processor = Processor(224, mean=vision.mean, std=vision.std, fit="crop", tokenizer=tokenizer)
        document = [Path("cats.jpg"), "An image of two cats.", Path("sink.jpg"), "An image of"]
        print(complete(model, processor, [document]))

    The others have a language model that transformers loads, `AutoModelForCausalLM.from_pretrained(name)`:
    "togethercomputer/RedPajama-INCITE-Base-3B-v1" of the 4B, "anas-awadalla/mpt-7b" of the 9B, and LLaMA-7B
    of the first 9B, in `FlamingoConfig.preset("openflamingo-9b", vocab_size=32003, media_token_id=32001)`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        >>> language_model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=53, num_hidden_layers=2, **sizes))
        >>> config = FlamingoConfig.preset(
        ...     "openflamingo-4b", vision_dim=48, vision_layers=1, vision_heads=3, resampler_dim=48,
        ...     language_dim=32, language_layers=2, language_heads=2, vocab_size=53, media_token_id=52,
        ... )
        >>> model = Flamingo(config, language=PretrainedLanguage(language_model, new_tokens=[51, 52]))
        >>> block = "lang_encoder.gpt_neox.layers.1.gated_cross_attn_layer."
        >>> state = {f"perceiver.{name}": value for name, value in model.resampler.state_dict().items()}
        >>> state |= {block + name: value + 1 for name, value in model.cross_attn["1"].state_dict().items()}
        >>> state["lang_encoder.gpt_neox.embed_in.weight"] = torch.ones(53, 32)
        >>> state["lang_encoder.embed_out.weight"] = torch.ones(53, 32)
        >>> with TemporaryDirectory() as folder:
        ...     torch.save(state, f"{folder}/checkpoint.pt")
        ...     _ = load_open_flamingo(model, f"{folder}/checkpoint.pt")
        >>> model.cross_attn["1"].attn_gate.item()
        1.0
    """
    language = _expect_open_flamingo(model)
    weights = _weights(model, language)
    found = _by_our_names(_read(Path(checkpoint)), weights, language)
    _expect_blocks(_layers(found), _layers(weights), checkpoint)
    _expect_shapes(found, weights, language, checkpoint)
    embedding, head = found.pop("embedding"), found.pop("head", None)
    for name, value in found.items():
        weights[name].copy_(value)
    _set_rows(language, embedding, head)
    return model


def _expect_open_flamingo(model: Flamingo) -> PretrainedLanguage:
    """The language model of a Flamingo that is built as open_flamingo's are."""
    if not isinstance(model.language, PretrainedLanguage):
        raise ValueError(
            "load_open_flamingo: expected a model whose language model is a PretrainedLanguage, got "
            f"{type(model.language).__name__}. Pass the one that the checkpoint was trained with: "
            "Flamingo(config, vision=..., language=PretrainedLanguage(model))."
        )
    wrong = {name: value for name, value in _CHOICES.items() if getattr(model.config, name) != value}
    if wrong:
        got = {name: getattr(model.config, name) for name in wrong}
        raise ValueError(
            f"load_open_flamingo: expected a model with {wrong}, as all of open_flamingo have it, got {got}. "
            'Start from FlamingoConfig.preset("openflamingo-3b").'
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            'load_open_flamingo: expected weights in memory, got some on the device "meta". Call '
            'model.resampler.to_empty(device="cpu") and model.cross_attn.to_empty(device="cpu") first.'
        )
    return model.language


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return import_module("safetensors.torch").load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("model_state_dict", state)


def _weights(model: Flamingo, language: PretrainedLanguage) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint may have, but for the embedding and the head, by their names."""
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if name.startswith(("resampler.", "cross_attn."))
    }
    ends = [language.model.get_input_embeddings().weight, language.model.get_output_embeddings().weight]
    weights |= {
        f"language.{name}": weight
        for name, weight in language.model.named_parameters()
        if not any(weight is end for end in ends)
    }
    if isinstance(model.vision, PretrainedVision):
        weights |= {
            f"vision.{name.removeprefix('vision_model.')}": weight  # so in transformers 4
            for name, weight in model.vision.tower.named_parameters()
        }
    return weights


def _by_our_names(
    state: dict[str, Tensor], weights: dict[str, nn.Parameter], language: PretrainedLanguage
) -> dict[str, Tensor]:
    """What a checkpoint has, by the names of `_weights`, "embedding" and "head"; the unknown by its own."""
    model, found = language.model, {}
    matrix = model.get_input_embeddings().weight
    embedding = next(f"lang_encoder.{name}" for name, weight in model.named_parameters() if weight is matrix)
    for key, value in state.items():
        name = key.removeprefix("module.")  # of DistributedDataParallel
        block = _BLOCK.fullmatch(name)
        if block:
            found[f"cross_attn.{block[1] or block[2]}.{block[3]}"] = value
        elif name.startswith("perceiver."):
            found[name.replace("perceiver", "resampler", 1)] = value
        elif name == embedding:
            found["embedding"] = value
        elif name in _HEADS:
            found["head"] = value
        elif not _UNTRAINED.fullmatch(name):
            of_tower = _of_vision(name, value) or _of_language(name, value, language)
            found |= of_tower if of_tower.keys() <= weights.keys() else {key: value}
    return found


def _of_language(name: str, value: Tensor, language: PretrainedLanguage) -> dict[str, Tensor]:
    name = name.replace("lang_encoder.old_decoder_blocks.", f"lang_encoder.{language.path_of_layers}.")
    return {name.replace("lang_encoder.", "language.").replace(".decoder_layer.", "."): value}


def _of_vision(name: str, value: Tensor) -> dict[str, Tensor]:
    """A weight of open_clip's by transformers' names: queries, keys and values have a matrix each."""
    if not name.startswith("vision_encoder."):
        return {}
    name = name.removeprefix("vision_encoder.")
    for theirs, ours in _CLIP.items():
        name = re.sub(theirs, ours, name)
    fused = re.fullmatch(r"(.+\.)in_proj_(weight|bias)", name)
    if fused is None:
        return {f"vision.{name}": value}
    return {
        f"vision.{fused[1]}{each}_proj.{fused[2]}": part
        for each, part in zip("qkv", value.chunk(3), strict=True)
    }


def _layers(names: Iterable[str]) -> list[int]:
    """The layers of the language model that have a gated block in front."""
    return sorted({int(name.split(".")[1]) for name in names if name.startswith("cross_attn.")})


def _expect_blocks(found: list[int], expected: list[int], path: Path | str) -> None:
    if found and found != expected:
        every = found[1] - found[0] if len(found) > 1 else found[0] + 1
        raise ValueError(
            f"{path}: expected gated blocks in front of the layers {expected} of the language model, got "
            f"{found}. Build the model with cross_attn_first={found[0]}, cross_attn_every={every}."
        )


def _expect_shapes(
    found: dict[str, Tensor], weights: dict[str, nn.Parameter], language: PretrainedLanguage, path: Path | str
) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    width = language.model.get_input_embeddings().weight.shape[1]
    shapes["embedding"] = shapes["head"] = (language.vocab_size, width)
    needed = {"embedding", *(name for name in weights if name.startswith(("resampler.", "cross_attn.")))}
    missing, others = needed - found.keys(), found.keys() - shapes.keys()
    if missing or others:
        raise ValueError(
            f"{path}: expected the weights of an OpenFlamingo of this size, got {len(others)} others "
            f"{sorted(others)[:3]} and not {len(missing)} of them {sorted(missing)[:3]}. Start from the "
            'preset of its size, as FlamingoConfig.preset("openflamingo-3b"), and its language model.'
        )
    for name, weight in found.items():
        if weight.shape != shapes[name]:
            remedy = "Take the vision encoder and the language model that it was trained with."
            if name in ("embedding", "head") and weight.shape[1:] == (width,):
                remedy = (
                    f"Call model.resize_token_embeddings({len(weight)}) before PretrainedLanguage(model), "
                    f"and set vocab_size={len(weight)} in the configuration."
                )
            raise ValueError(
                f"{path}: expected {name} with shape {shapes[name]}, got {tuple(weight.shape)}. {remedy}"
            )


def _set_rows(language: PretrainedLanguage, embedding: Tensor, head: Tensor | None) -> None:
    """Sets the matrices of a language model, and the rows that its new tokens have of their own."""
    matrix = language.model.get_input_embeddings().weight
    matrix.copy_(embedding[: len(matrix)])
    if head is not None:
        matrix = language.model.get_output_embeddings().weight
        matrix.copy_(head[: len(matrix)])
    new = language.new_tokens
    if new is None:
        return
    ids = new.ids.cpu()
    new.embedding.copy_(embedding[ids])
    if new.head is not None:
        new.head.copy_(torch.zeros_like(new.head) if head is None else head[ids])
