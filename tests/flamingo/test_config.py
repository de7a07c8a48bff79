"""The presets have the sizes that were published."""

import pytest
import torch

from flamingo import Flamingo, FlamingoConfig
from flamingo.config import PRESETS


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str, **changes) -> Flamingo:
    with torch.device("meta"):
        return Flamingo(FlamingoConfig.preset(name, **changes))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("flamingo-3b", range(24)),
        ("flamingo-9b", range(0, 40, 4)),
        ("flamingo-80b", range(0, 80, 7)),
        ("openflamingo-3b", range(24)),
        ("openflamingo-4b", range(1, 32, 2)),
        ("openflamingo-9b", [3, 7, 11, 15, 19, 23, 27, 31]),
        ("tiny", [0, 2]),
    ],
)
def test_blocks_stand_in_front_of(name, layers):
    assert FlamingoConfig.preset(name).cross_attn_layers == tuple(layers)
    assert list(on_meta(name).cross_attn) == [str(i) for i in layers]


@pytest.mark.parametrize(
    ("name", "millions", "blocks"),
    [("openflamingo-3b", 36.7, 24), ("openflamingo-4b", 56.1, 16), ("openflamingo-9b", 139.5, 8)],
)
def test_open_flamingo_parameters(name, millions, blocks):
    model = on_meta(name)
    assert count(model.resampler) / 1e6 == pytest.approx(63.0, abs=0.05)
    assert [count(block) / 1e6 for block in model.cross_attn.values()] == pytest.approx(
        [millions] * blocks, abs=0.05
    )


def test_the_papers_parameters():
    model = on_meta("flamingo-3b")
    assert count(model.resampler) / 1e6 == pytest.approx(194, abs=0.5)
    assert count(model.cross_attn) / 1e9 == pytest.approx(1.2, abs=0.05)
    assert count(model.vision) / 1e6 == pytest.approx(435, abs=0.5)
    block = model.cross_attn["0"]
    assert type(block.ff[2]).__name__ == "SquaredReLU"
    assert block.attn.norm_media.normalized_shape == (1536,)
    assert block.attn.scale == 128**-0.5
    assert model.resampler.latents.shape == (64, 1536)
    assert model.resampler.frame_embs.shape == (8, 1536)


NINE = {"language_layers": 32}  # of Table 5; Table 4, which the preset follows, has 40


@pytest.mark.parametrize(
    ("name", "changes", "billions"),
    [("flamingo-3b", {}, 3.2), ("flamingo-9b", NINE, 9.3), ("flamingo-80b", {}, 80)],
)
def test_the_papers_totals(name, changes, billions):
    # Less than Table 5's by what keys and values of D features would have more than those of 1536.
    model = on_meta(name, **changes)
    dim, blocks = model.config.language_dim, len(model.cross_attn)
    assert (count(model) + blocks * 2 * (dim - 1536) * dim) / 1e9 == pytest.approx(billions, rel=0.02)


def test_the_9b_of_table_4_is_not_that_of_table_5():
    model = on_meta("flamingo-9b")
    assert count(model) / 1e9 == pytest.approx(11.29, abs=0.01)
    assert len(model.cross_attn) == 10
    assert len(on_meta("flamingo-9b", **NINE).cross_attn) == 8


@pytest.mark.parametrize(
    ("name", "changes", "billions"),
    [("flamingo-3b", {}, 1.4), ("flamingo-9b", NINE, 7.1), ("flamingo-80b", {}, 70)],
)
def test_the_papers_language_models(name, changes, billions):
    language = on_meta(name, **changes).language
    dim, layers = language.dim, language.num_layers
    assert count(language) / 1e9 == pytest.approx(billions, rel=0.02)
    matrices = 13 * dim**2 * layers + 32000 * dim  # one of them for relative positions
    vectors = (2 * layers + 1) * dim + 2 * layers * dim  # of the norms, and two biases of relative positions
    assert count(language) == matrices + vectors


def test_open_flamingo_presets_keep_its_rows():
    models = [on_meta(f"openflamingo-{size}") for size in ("3b", "4b", "9b")]
    attns = [block.attn for model in models for block in model.cross_attn.values()]
    assert {(a.policy, a.heads, a.scale) for a in attns} == {("open_flamingo", 8, 0.125)}
    # <|endofchunk|>, <image> and <PAD> come last.
    assert {model.config.vocab_size - model.config.media_token_id for model in models} == {2}


def test_every_preset_is_named_in_the_documentation():
    assert all(f'"{name}"' in FlamingoConfig.preset.__doc__ for name in PRESETS)


def test_choices_reach_every_block():
    choices = {"only_attend_immediate_media": False, "policy": "open_flamingo", "norm_media": False}
    model = Flamingo(FlamingoConfig.preset("tiny", **choices, activation="relu", ff_mult=3))
    for block in model.cross_attn.values():
        assert (block.attn.only_attend_immediate_media, block.attn.policy) == (False, "open_flamingo")
        assert not list(block.attn.norm_media.parameters())
    for ff in [block.ff for block in model.cross_attn.values()] + [ff for _, ff in model.resampler.layers]:
        assert isinstance(ff[2], torch.nn.ReLU)
        assert ff[1].out_features == 3 * ff[1].in_features


def test_choices_reach_the_resampler_and_the_language_model():
    sizes = {"max_num_media": 3, "max_num_frames": 5, "num_latents": 6, "resampler_depth": 1}
    model = Flamingo(FlamingoConfig.preset("tiny", **sizes, tie_embeddings=False, new_tokens=(256, 257)))
    resampler, language = model.resampler, model.language
    counts = (len(resampler.media_time_embs), len(resampler.frame_embs), len(resampler.latents))
    assert (*counts, len(resampler.layers)) == (3, 5, 6, 1)
    assert language.head.weight is not language.embedding.weight
    assert language.new_tokens.ids.tolist() == [256, 257]


def test_changes():
    config = FlamingoConfig.preset("tiny", language_layers=7, cross_attn_first=1, cross_attn_every=3)
    assert config.cross_attn_layers == (1, 4)
    assert FlamingoConfig.preset("tiny").language_layers == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 7}, "expected image_size to be a multiple of patch_size=7, got 32"),
        ({"patch_size": 0}, "expected image_size to be a multiple of patch_size=0, got 32"),
        (
            {"vision": "nfnet"},
            "vision to be one of vit, nfnet-f0, .*, got 'nfnet'. For another encoder: Flamingo",
        ),
        ({"vision_heads": 0}, "expected vision_dim to be a multiple of vision_heads=0, got 48"),
        ({"vision_heads": 5}, "expected vision_dim to be a multiple of vision_heads=5, got 48"),
        ({"language_heads": 64}, "an even multiple of language_heads=64 .*got 64"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        FlamingoConfig.preset("tiny", **changes)


def test_a_change_of_a_field_that_there_is_not():
    message = r"there is no field 'cross_attn_evry'\. Did you mean cross_attn_every\?"
    with pytest.raises(ValueError, match=message):
        FlamingoConfig.preset("tiny", cross_attn_evry=2)
    with pytest.raises(ValueError, match=r"there is no field 'xyz'\. Expected one of vision, image_size"):
        FlamingoConfig.preset("tiny", xyz=2)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"expected one of flamingo-3b, .*tiny, got 'gato'"):
        FlamingoConfig.preset("gato")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language_layers": -1}, "expected language_layers to be positive, got -1"),
        ({"language_layers": "4"}, "expected language_layers to be int, got '4'"),
        ({"language_layers": True}, "expected language_layers to be int, got True"),
        ({"num_latents": 0}, "expected num_latents to be positive, got 0"),
        ({"max_num_frames": 1.5}, "expected max_num_frames to be int, got 1.5"),
        ({"norm_media": 1}, "expected norm_media to be bool, got 1"),
        ({"policy": "none"}, "expected policy to be one of zero, open_flamingo, got 'none'"),
        ({"activation": "tanhh"}, "expected activation to be one of gelu, squared_relu, relu, got 'tanhh'"),
        ({"new_tokens": 257}, "expected new_tokens to be a list of ids, got 257"),
        ({"new_tokens": (261,)}, "expected new_tokens below vocab_size=261, got"),
        ({"cross_attn_first": 4}, "expected cross_attn_first to be below language_layers=4, got 4"),
    ],
)
def test_a_field_that_means_nothing_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        FlamingoConfig.preset("tiny", **change)


def test_some_sizes_may_be_none_or_zero():
    FlamingoConfig.preset("tiny", max_num_frames=None, max_num_media=None, cross_attn_first=0)
    FlamingoConfig.preset("tiny", vision="given", patch_size=0, vision_layers=0, vision_heads=0)
