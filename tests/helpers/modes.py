"""Modes that a model runs in, and what has to stay the same in each of them when it is patched.

A mode is small, and modes combine: `hold(name, modes)` runs the original of a model and its patched copy in
all of them at once. What a mode does to the numbers of the original is computed once for all that share it.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from flamingo import Flamingo, FlamingoConfig
from flamingo_kernels import MediaCache, layers, patch
from flamingo_kernels._backends import dispatch
from flamingo_kernels.testing import Measurement, assert_all_passed, compare, expect, tiny
from tests.helpers.graphs import recording
from tests.helpers.weights import randomise

SIZES = tiny.Sizes(batch=2, text=7, images=2, width=16, heads=2, layers=4, visual=8, latents=3)
Inputs = dict[str, Tensor]


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def without_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False)


def other(tokens: Tensor) -> Tensor:
    """Another text for the same media: that of the other sequence."""
    return tokens.flip(0)


def hold_flamingo(model: Any, inputs: Inputs) -> list[Tensor]:
    tokens = inputs["input_ids"]
    with without_autocast():
        media = model.encode_media(inputs["pixels"])
    texts = [model.decode(text, media) for text in (tokens, other(tokens))]
    places = other(tokens) == model.config.media_token_id
    with without_autocast():
        token = model.decode(tokens[:, -1:], media, media_locations=places)
    return [*texts, token]


def hold_open_flamingo(model: Any, inputs: Inputs) -> list[Tensor]:
    """The last token reads a `MediaCache` where the model is patched and wants no gradient."""
    first = logits(model, inputs)
    text = {"lang_x": other(inputs["lang_x"]), "attention_mask": inputs["attention_mask"]}
    token = {name: x[:, -1:] for name, x in text.items()}
    texts = [first, logits(model, {"vision_x": None, **text})]
    if not torch.is_grad_enabled() and any(isinstance(module, layers.Fused) for module in model.modules()):
        decoder = model.lang_encoder._get_decoder_layers()
        cache = MediaCache(model, decoder[0].vis_x)
        for layer in decoder:
            layer.condition_vis_x(cache)
    return [*texts, logits(model, {"vision_x": None, **token})]


def hold_flamingo_pytorch(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    texts = (inputs["text"], other(inputs["text"]))
    return [model(text, embeds=inputs["images"]) for text in texts]


def hold_idefics(model: Any, inputs: Inputs) -> list[Tensor]:
    with without_autocast():
        pixels = inputs["pixel_values"].flatten(0, 1)
        seen = model.model.vision_model(pixel_values=pixels).last_hidden_state
        features = model.model.perceiver_resampler(seen)
    tokens, mask = inputs["input_ids"], inputs["image_attention_mask"]
    given = {"image_attention_mask": mask, "perceiver_embeddings": features, "use_cache": False}
    texts = [logits(model, {"input_ids": text, **given}) for text in (tokens, other(tokens))]
    token = {"input_ids": tokens[:, -1:], "image_attention_mask": mask[:, -1:]}
    with without_autocast():
        return [*texts, logits(model, {**given, **token})]


def hold_idefics2(model: Any, inputs: Inputs) -> list[Tensor]:
    features = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])
    features = getattr(features, "pooler_output", features)
    texts = (inputs["input_ids"], inputs["input_ids"].clone())
    texts[1][:, -SIZES.text :] = other(texts[0][:, -SIZES.text :])
    return [logits(model, {"input_ids": text, "image_hidden_states": features}) for text in texts]


def hold_mllama(model: Any, inputs: Inputs) -> list[Tensor]:
    """As the states of the vision encoder, and then as keys and values in the cache of the model."""
    media = {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    states = model.model.vision_model(**media).last_hidden_state
    states = model.model.multi_modal_projector(states)
    states = states.reshape(-1, states.shape[-2], states.shape[-1])
    tokens, mask = inputs["input_ids"], inputs["cross_attention_mask"]
    given = {"cross_attention_states": states, "cross_attention_mask": mask, "use_cache": True}
    outs = [model(input_ids=text, **given) for text in (tokens, other(tokens))]
    keyword = "cache" if "cache" in outs[-1] else "past_key_values"
    token = {"input_ids": tokens[:, -1:], "cross_attention_mask": mask[:, -1:], keyword: outs[-1][keyword]}
    return [*(out.logits for out in outs), logits(model, token)]


def hold_evolla(model: Any, inputs: Inputs) -> list[Tensor]:
    protein = {name: x for name, x in inputs.items() if name.startswith("protein")}
    text = {name: x for name, x in inputs.items() if name not in protein}
    encoded = model.model.protein_encoder(
        input_ids=protein["protein_input_ids"], attention_mask=protein["protein_attention_mask"]
    )
    return [logits(model, {**text, "protein_kv_states": encoded.sequence_compressor_output})]


@dataclass(frozen=True)
class Model:
    """What the modes have to know of a model.

    Attributes:
        layer: the class of its layers that attend to media.
        attention: how often kernels compute attention when media are encoded, and for every text.
        hold: the logits of several texts about media that are encoded once.
        texts: how many of them kernels attend for.
        tokens: how many more, of one token, a kernel computes where it may decode: without gradients.
        resampler: within the names of its resampler's parameters.
        needs: the package that its library imports.
        watched: whether kernels also compute the attention of layers that hooks watch.
    """

    layer: str
    attention: tuple[int, int]
    hold: Callable[[Any, Inputs], list[Tensor]]
    texts: int = 3
    resampler: str = "perceiver"
    needs: str = "transformers"
    watched: bool = False
    tokens: int = 0


MODELS = {
    "flamingo": Model(
        "GatedCrossAttentionBlock", (2, 2), hold_flamingo, 3, "resampler", needs="torch", watched=True
    ),
    "open_flamingo": Model("GatedCrossAttentionBlock", (2, 2), hold_open_flamingo, needs="einops_exts"),
    "flamingo_pytorch": Model("GatedCrossAttentionBlock", (2, 2), hold_flamingo_pytorch, needs="einops_exts"),
    "idefics": Model("IdeficsGatedCrossAttentionLayer", (2, 2), hold_idefics),
    "idefics2": Model("Idefics2PerceiverAttention", (2, 0), hold_idefics2, 2),
    "mllama": Model("MllamaCrossAttentionDecoderLayer", (0, 2), hold_mllama, 2, "no resampler", tokens=1),
    "evolla": Model("EvollaSequenceAlignerCrossAttention", (2, 2), hold_evolla, 1, "resampler"),
}


def build(name: str) -> tiny.TinyModel:
    pytest.importorskip(MODELS[name].needs)
    if name != "flamingo":
        return tiny.build(f"{name}-tiny", SIZES)
    torch.manual_seed(0)
    model = randomise(Flamingo(FlamingoConfig.preset("tiny")), std=0.2)
    tokens = torch.tensor([[65, 256, 66, 67, 256, 68], [256, 65, 66, 67, 68, 69]])
    return tiny.TinyModel(name, model, {"input_ids": tokens, "pixels": torch.randn(2, 2, 1, 3, 32, 32)})


def layers_of(model: nn.Module, kind: Model) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module).__name__ == kind.layer)


def nothing(model: nn.Module, kind: Model) -> None:
    """Leaves a model as it is."""


@dataclass(frozen=True)
class Mode:
    """One way to run a model.

    Attributes:
        weights: changes dtypes and what trains, before the model is copied and patched.
        parts: changes the parts of each copy: hooks, checkpoints.
        context: in which the model is called.
        setting: what it sets: modes with one setting exclude each other.
        dtype: of the inputs.
        inputs_train: whether the inputs need gradients too.
        own_numbers: whether the original computes other numbers in it, or other gradients, than in none.
        held: whether the media are encoded once for several texts.
        compiled: whether the patched copy is compiled.
        watched: the layers whose original forward runs, as hooks watch their parts: "no", "first" or "all".
    """

    weights: Callable[[nn.Module, Model], Any] = nothing
    parts: Callable[[nn.Module, Model], Any] = nothing
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    setting: str = ""
    dtype: torch.dtype | None = None
    inputs_train: bool = True
    own_numbers: bool = False
    held: bool = False
    compiled: bool = False
    watched: str = "no"


@contextmanager
def louder_everywhere() -> Iterator[None]:
    """A hook on all modules."""
    handle = register_module_forward_hook(lambda m, _, y: 1.25 * y if isinstance(m, nn.Linear) else None)
    try:
        yield
    finally:
        handle.remove()


def hook_parts(model: nn.Module, kind: Model) -> None:
    """Three hooks within the first layer, each of which changes something."""
    linear = [part for part in next(layers_of(model, kind)).modules() if isinstance(part, nn.Linear)]
    linear[0].register_forward_pre_hook(lambda _, given: (1.5 * given[0],))
    linear[1].register_forward_hook(lambda _, given, y: 0.75 * y)
    linear[-1].register_full_backward_hook(
        lambda _, dx, dy: tuple(None if each is None else 2 * each for each in dx)
    )


def checkpoint_layers(model: Any, kind: Model, *, reentrant: bool) -> None:
    """As the library does it, or else around every layer."""
    if hasattr(model, "gradient_checkpointing_enable"):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        return
    for layer in layers_of(model, kind):
        forward = layer.forward

        def call(*tensors: Any, forward: Any = forward, **options: Any) -> Any:
            return checkpoint(partial(forward, **options), *tensors, use_reentrant=reentrant)

        layer.forward = call


def cast(model: nn.Module, kind: Model, *, dtype: torch.dtype) -> None:
    model.to(dtype)


def cast_projections(model: nn.Module, kind: Model) -> None:
    """Of the layers alone, in a model that stays in float32."""
    for layer in layers_of(model, kind):
        for part in layer.modules():
            if isinstance(part, nn.Linear):
                part.bfloat16()


def cast_all_but(model: nn.Module, kind: Model, *, kept: tuple[str, ...]) -> None:
    """But what has such a name within a layer, which stays in float32."""
    model.bfloat16()
    for layer in layers_of(model, kind):
        for name, parameter in layer.named_parameters():
            if any(part in name for part in kept):
                parameter.data = parameter.float()


def train_attention(model: nn.Module, kind: Model) -> None:
    model.requires_grad_(False)
    for layer in layers_of(model, kind):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not name.startswith(("ff.", "mlp.")))


def train_resampler(model: nn.Module, kind: Model) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind.resampler in name)


def freeze(model: nn.Module, kind: Model) -> None:
    model.requires_grad_(False)


def train(model: nn.Module, kind: Model) -> None:
    model.train()


NORMS, GATES = ("norm", "ff.0"), ("_gate", "gate_", "alpha", "ff.", "mlp.")
BF16, FP16 = torch.bfloat16, torch.float16
in_dtype = partial(Mode, setting="dtype", own_numbers=True)
MODES = {
    "plain": Mode(),
    "autocast bf16": Mode(context=lambda: torch.autocast("cpu", BF16), setting="autocast", own_numbers=True),
    "autocast fp16": Mode(context=lambda: torch.autocast("cpu", FP16), setting="autocast", own_numbers=True),
    "weights in bf16": in_dtype(partial(cast, dtype=BF16), dtype=BF16),
    "weights in fp16": in_dtype(partial(cast, dtype=FP16), dtype=FP16),
    "norms in float32": in_dtype(partial(cast_all_but, kept=NORMS), dtype=BF16),
    "gates in float32": in_dtype(partial(cast_all_but, kept=GATES), dtype=BF16),
    "projections in bf16": in_dtype(cast_projections),
    "held features": Mode(held=True, own_numbers=True),
    "hook on all": Mode(context=louder_everywhere, own_numbers=True, watched="all"),
    "own hooks": Mode(parts=hook_parts, own_numbers=True, watched="first"),
    "checkpoints": Mode(parts=partial(checkpoint_layers, reentrant=False), setting="checkpoints"),
    "reentrant": Mode(
        parts=partial(checkpoint_layers, reentrant=True), setting="checkpoints", own_numbers=True
    ),
    "compiled": Mode(compiled=True),
    "no_grad": Mode(context=torch.no_grad, setting="gradients"),
    "inference_mode": Mode(context=torch.inference_mode, setting="gradients"),
    "attention trains": Mode(train_attention, setting="trains", inputs_train=False),
    "resampler trains": Mode(train_resampler, setting="trains", inputs_train=False),
    "inputs train": Mode(freeze, setting="trains"),
    "training": Mode(train),
}


class Step(NamedTuple):
    """Outputs, and the gradient of every input and parameter that has one."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        return {f"out{n}": out.detach() for n, out in enumerate(self.outputs)} | self.gradients


def prepared(name: str, modes: Sequence[Mode]) -> tiny.TinyModel:
    """A model with the weights and inputs of these modes, not yet with their parts."""
    built = build(name)
    inputs = dict(built.inputs)
    for mode in modes:
        mode.weights(built.model, MODELS[name])
        if mode.dtype:
            inputs = {key: x.to(mode.dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    return tiny.TinyModel(name, built.model, inputs)


def with_parts(model: nn.Module, name: str, modes: Sequence[Mode]) -> nn.Module:
    for mode in modes:
        mode.parts(model, MODELS[name])
    return model


def step(
    model: nn.Module,
    name: str,
    inputs: Inputs,
    modes: Sequence[Mode],
    innermost: Callable[[], AbstractContextManager[Any]] = nullcontext,
    called: Callable[[], None] = lambda: None,
) -> Step:
    """One call, and the way back from it with random gradients of its outputs."""
    trains = all(mode.inputs_train for mode in modes)
    leaves = {
        key: x.detach().clone().requires_grad_(trains and x.is_floating_point()) for key, x in inputs.items()
    }
    model.zero_grad()
    with ExitStack() as stack:
        for context in (*(mode.context for mode in modes), innermost):
            stack.enter_context(context())
        held = any(mode.held for mode in modes)
        outputs = MODELS[name].hold(model, leaves) if held else [logits(model, leaves)]
        called()
        generator = torch.Generator().manual_seed(1)
        douts = [torch.randn(out.shape, generator=generator).bfloat16() for out in outputs]
        if outputs[0].requires_grad:
            with without_autocast():
                torch.autograd.backward(
                    outputs, [dout.to(out.dtype) for out, dout in zip(outputs, douts, strict=True)]
                )
    every = {**leaves, **dict(model.named_parameters())}
    return Step(outputs, {f"d{key}": x.grad for key, x in every.items() if x.grad is not None})


class Expected(NamedTuple):
    exact: dict[str, Tensor]
    rounding: dict[str, float]


@functools.cache
def expected(name: str, modes: tuple[str, ...]) -> Expected:
    return draw(name, modes, 2)


def draw(name: str, modes: tuple[str, ...], draws: int) -> Expected:
    """What the original computes in float64, and how far rounding may put it in these modes."""
    chosen = [MODES[mode] for mode in modes]
    base = prepared(name, chosen)
    double = with_parts(copy.deepcopy(base.model).double(), name, chosen)
    if hasattr(double, "set_attn_implementation"):
        double.set_attn_implementation("sdpa")  # "eager" casts the lowest float64 to -inf
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in base.inputs.items()}
    exact = step(double, name, inputs, chosen, without_autocast).named()
    original = with_parts(base.model, name, chosen)

    def run() -> list[Tensor]:
        found = step(original, name, base.inputs, chosen).named()
        return [found[key] for key in exact]

    _, _, rounding = expect(run, list(exact.values()), draws=draws)
    return Expected(exact, dict(zip(exact, rounding, strict=True)))


@contextmanager
def counting(calls: Counter[str]) -> Iterator[None]:
    """Counts the calls of attention that kernels compute, by itself or within a decoding step."""
    resolve = dispatch.resolve

    def counted(operator: str, *args: Any) -> str:
        backend = resolve(operator, *args)
        if operator.endswith("attention") or operator == "gated_block_decode":
            calls[backend] += 1
        return backend

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(dispatch, "resolve", counted)
        yield


# No softmax sees the bias of a norm of keys: the gradient is 0, errors are all there is.
UNSEEN = ("k_layer_norm.bias",)


def hold(name: str, modes: tuple[str, ...]) -> None:
    """The patched copy does in these modes what the original does.

    Outputs and gradients keep within the error budget; dtypes, what has a gradient, whether outputs want one,
    and whether they are tensors of inference mode are the same; and kernels compute the attention, but for
    layers that the modes hand over to the original.
    """
    chosen = [MODES[mode] for mode in modes]
    base = prepared(name, chosen)
    fused = copy.deepcopy(base.model)
    assert patch(fused).replaced
    original, fused = (with_parts(model, name, chosen) for model in (base.model, fused))
    theirs = step(original, name, base.inputs, chosen)
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        if any(mode.compiled for mode in chosen):
            torch._dynamo.reset()
            for layer in layers_of(fused, MODELS[name]):
                layer.compile(backend=recording("aot_eager", calls))
        else:
            stack.enter_context(counting(calls))
        ours = step(fused, name, base.inputs, chosen, called=stack.close)

    assert [kind_of(out) for out in ours.outputs] == [kind_of(out) for out in theirs.outputs]
    own = tuple(mode for mode in modes if MODES[mode].own_numbers)
    found, right = ours.named(), expected(name, own)
    assert {key: x.dtype for key, x in found.items()} == {key: x.dtype for key, x in theirs.named().items()}
    measured = against(right, found)
    if not all(each.passed for each in measured):  # two draws may say too little of what rounding does
        measured = against(draw(name, own, 16), found)
    assert_all_passed(measured, f"{name}: {', '.join(modes)}")
    kernels = attention_by_kernels(MODELS[name], chosen)
    if any(mode.compiled for mode in chosen):  # of which there is a graph for each kind of call
        assert any("attention" in operation for operation in calls) == (kernels > 0)
    else:
        assert calls == Counter(cpu=kernels), (calls, kernels)


def against(right: Expected, found: dict[str, Tensor]) -> list[Measurement]:
    return [
        compare(key, x, right.exact[key], right.rounding[key])
        for key, x in found.items()
        if not key.endswith(UNSEEN)
    ]


def kind_of(out: Tensor) -> tuple[Any, ...]:
    return out.shape, out.dtype, out.requires_grad, out.is_inference()


def is_autocast(mode: Mode) -> bool:
    return "autocast" in mode.setting


def attention_by_kernels(model: Model, modes: Sequence[Mode]) -> int:
    """How often kernels compute attention, as they do but where hooks watch the parts of a layer."""
    media, text = model.attention
    watched = {"no"} if model.watched else {mode.watched for mode in modes}
    texts = model.texts if any(mode.held for mode in modes) else 1
    decodes = any(mode.setting == "gradients" for mode in modes) and not any(map(is_autocast, modes))
    texts += model.tokens if texts > 1 and decodes else 0
    if "all" in watched:
        return 0
    if "first" in watched:
        media, text = (media, text - 1) if text else (media - 1, text)
    return media + text * texts
