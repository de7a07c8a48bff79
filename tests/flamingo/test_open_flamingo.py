"""open_flamingo's own model and ours with the checkpoint that it saves: the same logits, the same texts.

Both run in float64. Theirs is built by its classes, around a language model and a CLIP tower of transformers,
and its training code decides which weights are saved.
"""

import copy
import importlib.util
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from flamingo import (
    Flamingo,
    FlamingoConfig,
    LanguageModel,
    PretrainedLanguage,
    PretrainedTokenizer,
    PretrainedVision,
    Processor,
    load_open_flamingo,
)
from tests.helpers import language_models as families
from tests.helpers import third_party
from tests.helpers.weights import shake

transformers = pytest.importorskip("transformers")

FAMILIES = {  # where the decoder layers are, and how their number is called
    "gpt_neox": ("gpt_neox.layers", "num_hidden_layers"),
    "mpt": ("transformer.blocks", "n_layers"),
    "llama": ("model.layers", "num_hidden_layers"),
    "opt": ("model.decoder.layers", "num_hidden_layers"),
}
LAYERS, VISUAL = 4, 24
F64 = torch.float64
KNOWN = families.VOCABULARY
EOC, IMAGE, PAD = KNOWN, KNOWN + 1, KNOWN + 2
CLIP = {
    "hidden_size": VISUAL,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


class OpenClip(nn.Module):
    """The image tower as open_clip 2.16 returns it: pooled, and the patches before the last LayerNorm."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, pixels):
        tower = getattr(self.tower, "vision_model", self.tower)  # of transformers 4
        x = tower.encoder(inputs_embeds=tower.pre_layrnorm(tower.embeddings(pixels))).last_hidden_state
        return tower.post_layernorm(x[:, 0]), x[:, 1:]


class Pair:
    """Their model with trained weights, and one of ours without."""

    def __init__(self, family="gpt_neox", every=2, *, vocabulary=KNOWN, freeze_embeddings=False, dtype=F64):
        self.family, self.every, self.dtype = family, every, dtype
        self.path, layers = FAMILIES[family]
        self.language_model = families.build(family, vocab_size=vocabulary, **{layers: LAYERS}).to(dtype)
        self.tower = (
            shake(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))).to(dtype).eval()
        )
        self.theirs = self._theirs(freeze_embeddings)

    def _theirs(self, freeze_embeddings):
        flamingo, lm, utils = map(third_party.open_flamingo, ("flamingo", "flamingo_lm", "utils"))
        # newer transformers ask a decoder layer for this
        lm.FlamingoLayer.attention_type = property(lambda layer: layer.decoder_layer.attention_type)
        language, clip = copy.deepcopy(self.language_model), nn.Module()
        clip.visual = OpenClip(self.tower)
        utils.extend_instance(language, lm.FlamingoLMMixin)
        language.set_decoder_layers_attr_name(self.path)
        language.resize_token_embeddings(KNOWN + 3, mean_resizing=False)
        model = flamingo.Flamingo(
            clip, language, EOC, IMAGE, vis_dim=VISUAL, cross_attn_every_n_layers=self.every
        )
        # as its factory
        model.requires_grad_(False)
        for part in (model.perceiver, language.gated_cross_attn_layers):
            shake(part).requires_grad_(True)
        embedding = language.get_input_embeddings()
        shake(embedding).requires_grad_(not freeze_embeddings)
        return model.to(self.dtype).eval()

    def state(self):
        """What its training would save of the model, by its own filter."""
        root = Path(third_party.open_flamingo("helpers").__file__).parents[1]
        spec = importlib.util.spec_from_file_location("train_utils", root / "train" / "train_utils.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault("wandb", ModuleType("wandb"))  # it imports its logger at the top
        spec.loader.exec_module(module)
        state = self.theirs.state_dict()
        if (
            self.family == "gpt_neox"
        ):  # when it was trained its head was called so, and "embed" is never left out
            state["lang_encoder.embed_out.weight"] = self.theirs.lang_encoder.get_output_embeddings().weight
        return module.filter_state_dict_to_trainable(self.theirs, state)

    def save(self, folder, wrapped=False):
        """The checkpoint as it is released, or as training writes it."""
        state = self.state()
        if wrapped:
            state = {"epoch": 3, "model_state_dict": {f"module.{name}": x for name, x in state.items()}}
        torch.save(state, folder / "checkpoint.pt")
        return folder / "checkpoint.pt"

    def ours(self, new_tokens=(EOC, IMAGE, PAD), resized=None, **changes):
        language_model = copy.deepcopy(self.language_model)
        if resized is not None:
            language_model.resize_token_embeddings(resized, mean_resizing=False)
        language = PretrainedLanguage(language_model, new_tokens=new_tokens)
        sizes = {"vision_dim": VISUAL, "vision_heads": 2, "resampler_dim": VISUAL, "media_token_id": IMAGE}
        sizes |= {"language_dim": language.dim, "language_layers": LAYERS, "language_heads": 2}
        sizes |= {"vocab_size": language.vocab_size, "cross_attn_every": self.every}
        sizes |= {"cross_attn_first": self.every - 1}
        config = FlamingoConfig.preset("openflamingo-3b", **sizes | changes)
        return Flamingo(config, vision=PretrainedVision(self.tower), language=language).to(self.dtype).eval()


def documents(padding=True):
    """Text first, several images, adjacent ones, none at all, padding on the left; and five images each."""
    ids = families.tokens(4, 16)
    ids[0, [3, 8, 12]] = IMAGE
    ids[1, [0, 5, 6, 7, 14]] = IMAGE
    ids[2, [4, 6, 7]] = IMAGE
    ids[0, [7, 11]] = ids[2, 12] = EOC
    mask = torch.ones_like(ids)
    if padding:
        mask[2, :3] = mask[3, :5] = 0
    ids[mask == 0] = PAD
    return ids, torch.randn(4, 5, 1, 3, 32, 32), mask


@torch.no_grad()
def their_logits(pair, ids, pixels, mask):
    theirs = pair.theirs
    options = {}
    if pair.family in ("gpt_neox", "llama"):  # as in its generate(), so that both turn by the same angles
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    theirs._encode_vision_x(pixels.to(pair.dtype))
    return theirs.lang_encoder(input_ids=ids, attention_mask=mask, **options).logits


@torch.no_grad()
def our_logits(pair, model, ids, pixels, mask):
    return model(ids, pixels.to(pair.dtype), mask).logits


def assert_twins(pair, ours):
    # In float64 transformers' MPT turns into NaN where it is padded on the left.
    ids, pixels, mask = documents(padding=(pair.family, pair.dtype) != ("mpt", F64))
    theirs, got = their_logits(pair, ids, pixels, mask), our_logits(pair, ours, ids, pixels, mask)
    assert got.shape == theirs.shape
    if pair.family == "llama":  # whose head is not saved
        assert (got[..., KNOWN:] == 0).all()
        theirs, got = theirs[..., :KNOWN], got[..., :KNOWN]
    seen, expected = got[mask != 0], theirs[mask != 0]
    precision = 1e-12 if pair.dtype == F64 else 1e-5
    assert (seen - expected).abs().max() <= precision * expected.abs().max()
    # Nor is it that nothing counts: other images, other logits.
    other = our_logits(pair, ours, ids, pixels.flip(1), mask)[..., : got.shape[-1]]
    assert (other - got)[0, 3:].abs().amax(dim=-1).min() > 1e-3
    assert torch.equal(other[0, :3], got[0, :3])


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
class TestTwins:
    def test_logits(self, family, every, tmp_path):
        pair = Pair(family, every)
        ours = pair.ours()
        assert load_open_flamingo(ours, pair.save(tmp_path)) is ours
        assert_twins(pair, ours)

    def test_greedy_texts(self, family, every, tmp_path):
        pair = Pair(family, every, dtype=torch.float32 if family == "mpt" else F64)
        ours = load_open_flamingo(pair.ours(), pair.save(tmp_path))
        ids, pixels, mask = documents()
        pixels = pixels.to(pair.dtype)
        got = ours.generate(ids, pixels, mask, max_new_tokens=8)
        with torch.no_grad():
            expected = pair.theirs.generate(
                pixels,
                ids,
                mask,
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=PAD,
                suppress_tokens=[IMAGE],  # ours never says it
            )[:, ids.shape[1] :]
        assert torch.equal(got, expected)
        assert not torch.equal(got, ours.generate(ids, pixels.flip(1), mask, max_new_tokens=8))


class TestCheckpoints:
    @pytest.mark.parametrize("new_tokens", [(), (IMAGE,), (EOC, IMAGE)], ids=str)
    @pytest.mark.parametrize("family", ["gpt_neox", "mpt"])
    def test_a_vocabulary_that_was_cut(self, family, new_tokens, tmp_path):
        """As of all that are released but LLaMA's: the language model had rows that no token needs."""
        pair = Pair(family, vocabulary=KNOWN + 9)
        ours = load_open_flamingo(pair.ours(new_tokens, resized=KNOWN + 3), pair.save(tmp_path))
        assert_twins(pair, ours)

    @pytest.mark.parametrize("family", ["gpt_neox", "mpt"])
    def test_a_vocabulary_that_was_enlarged(self, family, tmp_path):
        pair = Pair(family)
        ours = load_open_flamingo(pair.ours((), resized=KNOWN + 3), pair.save(tmp_path))
        assert_twins(pair, ours)

    def test_padding_of_mpt(self, tmp_path):
        pair = Pair("mpt", dtype=torch.float32)
        assert_twins(pair, load_open_flamingo(pair.ours(), pair.save(tmp_path)))

    def test_embeddings_that_were_not_trained(self, tmp_path):
        pair = Pair(freeze_embeddings=True)
        assert_twins(pair, load_open_flamingo(pair.ours(), pair.save(tmp_path)))

    def test_as_training_writes_it(self, tmp_path):
        pair = Pair()
        assert_twins(pair, load_open_flamingo(pair.ours(), pair.save(tmp_path, wrapped=True)))

    def test_safetensors(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        pair = Pair()
        state = {name: weight.clone().contiguous() for name, weight in pair.state().items()}
        safetensors.save_file(state, tmp_path / "checkpoint.safetensors")
        assert_twins(pair, load_open_flamingo(pair.ours(), tmp_path / "checkpoint.safetensors"))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_frozen_copies_and_second_names(self, family, tmp_path):
        """As old checkpoints have them, and buffers of old versions of transformers."""
        pair = Pair(family)
        state = with_names_of_open_clip(pair.theirs.state_dict())
        state[f"lang_encoder.{pair.path}.0.decoder_layer.attention.masked_bias"] = torch.tensor(-1e9)
        assert any("old_decoder_blocks" in name for name in state)
        assert any("vision_encoder" in name for name in state)
        torch.save(state, tmp_path / "checkpoint.pt")
        ours = pair.ours()
        before = copy.deepcopy(ours.state_dict())
        load_open_flamingo(ours, tmp_path / "checkpoint.pt")
        if family != "llama":  # whose head is here, for once
            assert_twins(pair, ours)
        copies = {name for name, weight in ours.state_dict().items() if torch.equal(weight, before[name])}
        assert copies >= {f"vision.{name}" for name in pair.ours().vision.state_dict()}
        trained = {name for name, weight in ours.named_parameters() if weight.requires_grad}
        assert copies
        assert not copies & trained

    @pytest.mark.parametrize("family", ["gpt_neox", "mpt", "opt"])
    def test_towers_that_were_trained_too(self, family, tmp_path):
        pair = Pair(family)
        ours = pair.ours()
        ours.vision = copy.deepcopy(ours.vision)
        layer = pair.theirs.lang_encoder.get_submodule(pair.path)[1].decoder_layer
        for part in (layer, pair.theirs.lang_encoder.get_input_embeddings(), pair.tower):
            shake(part)
        torch.save(with_names_of_open_clip(pair.theirs.state_dict()), tmp_path / "checkpoint.pt")
        assert_twins(pair, load_open_flamingo(ours, tmp_path / "checkpoint.pt"))

    def test_numbers_of_another_precision(self, tmp_path):
        pair = Pair()
        path = pair.save(tmp_path)
        ours = load_open_flamingo(pair.ours().bfloat16(), path)
        assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
        assert torch.equal(ours.resampler.latents, pair.theirs.perceiver.latents.bfloat16())


def with_names_of_open_clip(state):
    """Their model's weights, with the tower of transformers in it as open_clip has it."""
    names = {
        "embeddings.patch_embedding": "conv1",
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "self_attn": "attn",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    renamed = {}
    for name, value in state.items():
        if name.startswith("vision_encoder.tower."):
            name = name.replace(".tower.", ".", 1).replace(".vision_model.", ".", 1)
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
        renamed[name] = value
    for name in [name for name in renamed if ".attn.q_proj." in name and name.startswith("vision_encoder.")]:
        parts = [renamed.pop(name.replace("q_proj", f"{each}_proj")) for each in "qkv"]
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    renamed["vision_encoder.proj"] = torch.zeros(VISUAL, 16)
    return renamed


def without(*endings):
    return lambda state: {name: x for name, x in state.items() if not name.endswith(endings)}


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (without("latents"), r"got 0 others \[\] and not 1 of them \['resampler.latents'\]"),
            (without("embed_in.weight"), r"not 1 of them \['embedding'\]"),
            (without("3.gated_cross_attn_layer.ff_gate"), r"not 1 of them \['cross_attn.3.ff_gate'\]"),
            (
                lambda s: s | {"lora.weight": s["perceiver.latents"]},
                r"got 1 others \['lora.weight'\] and not 0",
            ),
            (lambda s: s | {"vision_encoder.pool": torch.ones(2)}, r"1 others \['vision_encoder.pool'\]"),
            (
                lambda s: s | {"lang_encoder.gpt_neox.layers.0.decoder_layer.lora": torch.ones(2)},
                r"1 others \['lang_encoder.gpt_neox.layers.0.decoder_layer.lora'\]",
            ),
            (lambda s: s | {"perceiver.frame_embs": torch.ones(2)}, r"1 others \['resampler.frame_embs'\]"),
            (lambda s: s | {"perceiver.latents": torch.ones(64, 9)}, r"latents with shape .*got \(64, 9\)"),
            (
                lambda s: s | {"lang_encoder.embed_out.weight": torch.ones(KNOWN, families.WIDTH)},
                rf"head with shape \({KNOWN + 3}, 32\), got \({KNOWN}, 32\)\. Call model\.resize_token",
            ),
        ],
    )
    def test_a_checkpoint_that_does_not_fit(self, change, message, tmp_path):
        pair = Pair()
        torch.save(change(pair.state()), tmp_path / "checkpoint.pt")
        ours = pair.ours()
        before = copy.deepcopy(ours.state_dict())
        with pytest.raises(ValueError, match=message):
            load_open_flamingo(ours, tmp_path / "checkpoint.pt")
        assert all(torch.equal(weight, before[name]) for name, weight in ours.state_dict().items())

    @pytest.mark.parametrize("rows", [KNOWN, KNOWN + 9])
    def test_another_vocabulary(self, rows, tmp_path):
        pair = Pair()
        message = (
            rf"embedding with shape \({rows}, 32\), got \({KNOWN + 3}, 32\)\. Call .*\({KNOWN + 3}\) before"
        )
        with pytest.raises(ValueError, match=message):
            load_open_flamingo(pair.ours((), resized=rows), pair.save(tmp_path))

    def test_code_in_a_checkpoint_is_not_run(self, tmp_path):
        torch.save({"perceiver.latents": Path("any other object")}, tmp_path / "checkpoint.pt")
        with pytest.raises(pickle.UnpicklingError):
            load_open_flamingo(Pair().ours(), tmp_path / "checkpoint.pt")

    def test_embeddings_that_were_not_saved(self, tmp_path):
        """MPT's, if frozen, as "embed" is not in their name; open_flamingo then draws new ones."""
        pair = Pair("mpt", freeze_embeddings=True)
        with pytest.raises(ValueError, match=r"not 1 of them \['embedding'\]"):
            load_open_flamingo(pair.ours(), pair.save(tmp_path))

    def test_blocks_at_other_layers(self, tmp_path):
        path = Pair(every=2).save(tmp_path)
        message = r"layers \[0, 1, 2, 3\] .* got \[1, 3\]\. .*cross_attn_first=1, cross_attn_every=2"
        with pytest.raises(ValueError, match=message):
            load_open_flamingo(Pair(every=1).ours(), path)
        with pytest.raises(ValueError, match=r"got \[3\]\. .*cross_attn_first=3, cross_attn_every=4"):
            load_open_flamingo(Pair(every=1).ours(), Pair(every=4).save(tmp_path))

    @pytest.mark.parametrize(
        ("choices", "message"),
        [
            (
                {"policy": "zero"},
                "expected a model with {'policy': 'open_flamingo'}, as .*, got {'policy': 'zero'}",
            ),
            (
                {"activation": "relu"},
                "expected a model with {'activation': 'gelu'}, .* got {'activation': 'relu'}",
            ),
            (
                {"cross_attn_heads": 4, "cross_attn_dim_head": 128},
                "got {'cross_attn_heads': 4, 'cross_attn_dim_head': 128}",
            ),
            ({"only_attend_immediate_media": False}, "got {'only_attend_immediate_media': False}"),
            ({"norm_media": True}, r"not 4 of them \['cross_attn.1.attn.norm_media"),
        ],
        ids=str,
    )
    def test_a_model_built_otherwise(self, choices, message, tmp_path):
        pair = Pair()
        with pytest.raises(ValueError, match=message):
            load_open_flamingo(pair.ours(**choices), pair.save(tmp_path))

    def test_another_kind_of_language_model(self, tmp_path):
        pair = Pair()
        ours = pair.ours()
        ours.language = LanguageModel(vocab_size=9, dim=8, layers=1, heads=2)
        with pytest.raises(ValueError, match="is a PretrainedLanguage, got LanguageModel"):
            load_open_flamingo(ours, pair.save(tmp_path))

    def test_a_model_that_is_not_there(self, tmp_path):
        pair = Pair()
        ours = pair.ours()
        ours.resampler.to("meta")
        with pytest.raises(ValueError, match=r'got some on the device "meta"\. Call .*to_empty'):
            load_open_flamingo(ours, pair.save(tmp_path))


def tokenizer(begins):
    """A small one by bytes, as GPT-NeoX's, or one that begins a text with `<s>`, as LLaMA's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator(["An image of two cats and an image of a sink"], trainer)
    if begins:
        words.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("begins", [False, True], ids=["gpt_neox", "llama"])
class TestPrompts:
    image = torch.rand(3, 32, 32)

    def theirs(self, begins):
        """As its factory prepares one."""
        theirs = tokenizer(begins)
        theirs.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
        theirs.add_special_tokens({"pad_token": "<PAD>"})
        return theirs

    def test_the_same_tokens(self, begins):
        theirs, ours = self.theirs(begins), PretrainedTokenizer.open_flamingo(tokenizer(begins))
        names = ["<|endofchunk|>", "<image>", "<PAD>", "</s>"]
        ids = theirs.convert_tokens_to_ids(names)
        assert [ours.eoc_id, ours.image_id, ours.pad_id, ours.eos_id] == ids
        assert ours.vocab_size == len(theirs)
        assert ours.bos_id == (0 if begins else None)

    def test_the_same_prompts(self, begins):
        theirs, ours = self.theirs(begins), PretrainedTokenizer.open_flamingo(tokenizer(begins))
        theirs.padding_side = "left"
        texts = ["<image>An image of two cats.<|endofchunk|><image>An image of", "Two<|endofchunk|><image>An"]
        expected = theirs(texts, padding=True, return_tensors="pt")
        documents = [
            [self.image, "An image of two cats.", self.image, "An image of"],
            ["Two", self.image, "An"],
        ]
        batch = Processor(32, tokenizer=ours)(documents, prompt=True)
        assert torch.equal(batch.input_ids, expected["input_ids"])
        assert torch.equal(batch.attention_mask.long(), expected["attention_mask"])

    def test_the_same_documents(self, begins):
        """As its training on pairs and on web pages lays them out; two images may share a sentence."""
        theirs, ours = self.theirs(begins), PretrainedTokenizer.open_flamingo(tokenizer(begins))
        texts = [
            "<image>a cat<|endofchunk|></s>",
            "a<|endofchunk|><image><|endofchunk|><image>b<|endofchunk|></s>",
        ]
        documents = [[self.image, "a cat"], ["a", self.image, self.image, "b"]]
        batch = Processor(32, tokenizer=ours)(documents)
        assert torch.equal(batch.input_ids, theirs(texts, padding=True, return_tensors="pt")["input_ids"])

    def test_chunks_end_as_everywhere_in_texts(self, begins):
        ours = PretrainedTokenizer.open_flamingo(tokenizer(begins))
        assert ours.encode("a<EOC>") == ours.encode("a<|endofchunk|>") == [*ours.encode("a"), ours.eoc_id]
        assert ours.decode([*ours.encode("a<EOC><image>"), ours.pad_id, ours.eos_id]) == "a<EOC><image>"
