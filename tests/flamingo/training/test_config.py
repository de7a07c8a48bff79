"""Runs from files, and what is wrong with them in a sentence."""

import pytest

from flamingo.training import Clips, Documents, ModelConfig, Pairs, TrainingConfig

RUN = """
folder = "run"
steps = 10
learning_rate = 1
betas = [0.9, 0.95]
no_decay = ["resampler", "cross_attn.0"]

[[datasets]]
kind = "documents"
name = "pages"
shards = ["a/*.tar", "b/*.tar"]

[[datasets]]
kind = "clips"
name = "clips"
shards = "c/*.tar"
weight = 0.5
micro_batch_size = 8

[model]
preset = "tiny"
changes = { language_layers = 2 }
"""


@pytest.fixture
def read(tmp_path):
    def from_text(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return TrainingConfig.from_toml(path)

    return from_text


def test_a_file_says_what_the_fields_are(read):
    assert read(RUN) == TrainingConfig(
        folder="run",
        steps=10,
        learning_rate=1.0,
        betas=(0.9, 0.95),
        no_decay=("resampler", "cross_attn.0"),
        datasets=(
            Documents(name="pages", shards=("a/*.tar", "b/*.tar")),
            Clips(name="clips", shards=("c/*.tar",), weight=0.5, micro_batch_size=8),
        ),
        model=ModelConfig(preset="tiny", changes={"language_layers": 2}),
    )


def test_defaults_are_the_papers():
    kinds = (Documents, Pairs, Clips)
    config = TrainingConfig(
        folder="run", datasets=tuple(kind(name=kind.kind, shards=("x",)) for kind in kinds)
    )
    assert [(d.weight, d.batch_size, d.length) for d in config.datasets] == [
        (1.0, 256, 256),
        (0.2, 512, 64),
        (0.03, 64, 64),
    ]
    assert (config.datasets[0].max_images, config.datasets[1].space) == (5, 0.5)
    assert {(d.flip, d.colour) for d in config.datasets} == {(0.5, 0.8)}  # BYOL's
    assert (config.datasets[2].frames, config.datasets[2].fps) == (8, 1.0)
    assert (config.steps, config.learning_rate, config.warmup_steps) == (500_000, 1e-4, 5000)
    assert (config.weight_decay, config.no_decay, config.max_grad_norm) == (0.1, ("resampler",), 1.0)
    assert (config.betas, config.eps) == ((0.9, 0.999), 1e-8)  # PyTorch's
    assert (config.datasets[0].p_next, config.datasets[2].space) == (0.5, 0.5)
    assert config.bfloat16
    assert config.kernels
    assert not config.gradient_checkpointing
    assert (config.checkpoint_every, config.keep, config.shards_at_once) == (1000, 3, 8)


@pytest.mark.parametrize(
    "name", ["learning_rate", "max_grad_norm", "shards_at_once", "checkpoint_every", "keep"]
)
def test_numbers_of_a_run_are_positive(name):
    pairs = Pairs(name="pairs", shards=("x",))
    with pytest.raises(ValueError, match=f"expected {name} of the run to be positive, got 0"):
        TrainingConfig(folder="run", datasets=(pairs,), **{name: 0})


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("steps", (-1, INF), "0 or more"),
        ("learning_rate", (-1.0, NAN, INF), "positive"),
        ("warmup_steps", (-5,), "0 or more"),
        ("weight_decay", (-0.1, NAN, INF), "0 or more"),
        ("eps", (-1.0, 0.0, NAN), "positive"),
        ("max_grad_norm", (-1.0, NAN), "positive"),
        ("seed", (-1, 2**63), "in 0..2**63 - 1"),
        ("workers", (-1,), "0 or more"),
        ("checkpoint_every", (-1,), "positive"),
        ("max_bad", (-0.1, 1.1, NAN), "a share in 0..1"),
    ],
)
def test_a_number_of_a_run_is_in_its_range(name, values, expected):
    pairs = Pairs(name="pairs", shards=("x",))
    for value in values:
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            TrainingConfig(folder="run", datasets=(pairs,), **{name: value})
        assert str(refused.value) == f"expected {name} of the run to be {expected}, got {value}."


@pytest.mark.parametrize(
    ("kind", "name", "values", "expected"),
    [
        (Pairs, "weight", (0, NAN, INF), "positive"),
        (Pairs, "batch_size", (0, -1), "positive"),
        (Pairs, "micro_batch_size", (0, -1), "positive"),
        (Pairs, "max_pixels", (0,), "positive"),
        (Pairs, "length", (4, 1, 0), "5 or more"),
        (Documents, "length", (4,), "5 or more"),
        (Pairs, "flip", (7.0, -0.5, NAN), "a share in 0..1"),
        (Pairs, "colour", (1.5, NAN), "a share in 0..1"),
        (Pairs, "space", (-1.0,), "a share in 0..1"),
        (Documents, "p_next", (2.0,), "a share in 0..1"),
        (Documents, "max_images", (-1,), "0 or more"),
        (Documents, "min_similarity", (NAN, 1.5), "a cosine in -1..1"),
        (Clips, "frames", (0,), "positive"),
        (Clips, "fps", (0.0, INF, NAN), "positive"),
    ],
)
def test_a_number_of_a_dataset_is_in_its_range(kind, name, values, expected):
    for value in values:
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            kind(name="{x}", shards=("x",), **{name: value})
        assert str(refused.value) == f"expected {name} of dataset '{{x}}' to be {expected}, got {value}."


@pytest.mark.parametrize("betas", [(0.9,), (2.0, 0.9), (0.9, 1.0), (NAN, 0.9), (-0.1, 0.9)])
def test_betas_are_two_below_1(betas):
    with pytest.raises(ValueError, match="expected two betas from 0 to below 1, got"):
        TrainingConfig(folder="run", datasets=(Pairs(name="pairs", shards=("x",)),), betas=betas)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 10", "step = 10", r"run\.toml: there is no key 'step'\. Did you mean steps\?"),
        ("steps = 10", "x = 10", r"there is no key 'x'\. Expected one of folder, datasets, steps, "),
        ("steps = 10", "steps = 10.5", r"run\.toml: steps: expected int, got 10\.5"),
        ("steps = 10", "steps = true", r"run\.toml: steps: expected int, got True"),
        ("steps = 10", "bfloat16 = 1", "bfloat16: expected bool, got 1"),
        ("steps = 10", "kernels = 'on'", "kernels: expected bool, got 'on'"),
        ("[0.9, 0.95]", "0.9", r"betas: expected a list, got 0\.9"),
        ("[0.9, 0.95]", "[0.9]", r"run\.toml: expected two betas from 0 to below 1, got \(0\.9,\)"),
        ("learning_rate = 1", "learning_rate = 0", "learning_rate of the run to be positive, got 0"),
        ('folder = "run"', "", r"run\.toml: expected a key 'folder', got none"),
        (
            "weight = 0.5",
            "wieght = 0.5",
            r"\[\[datasets\]\] 'clips': there is no key 'wieght'\. Did you mean weight",
        ),
        ("weight = 0.5", "space = 'x'", r"'clips': space: expected float, got 'x'"),
        ("weight = 0.5", "weight = -1", "weight of dataset 'clips' to be positive, got -1"),
        (
            "micro_batch_size = 8",
            "micro_batch_size = 0",
            "micro_batch_size of dataset 'clips' to be positive",
        ),
        ("micro_batch_size = 8", "micro_batch_size = '8'", "micro_batch_size: expected int, got '8'"),
        ('["a/*.tar", "b/*.tar"]', "[]", "dataset 'pages' to have shards, got none"),
        (
            '"documents"',
            '"pages"',
            "'pages': expected kind to be one of documents, pairs, clips, got 'pages'",
        ),
        ('name = "clips"', 'name = "pages"', "expected datasets of different names"),
        ("preset", "size", r"\[model\]: there is no key 'size'"),
        ("{ language_layers = 2 }", "3", r"\[model\]: changes: expected a table, got 3"),
        ("learning_rate = 1", "learning_rate = 1" + "0" * 400, "learning_rate: expected float, got 1000"),
    ],
)
def test_mistakes_are_named(read, old, new, message):
    assert RUN.count(old) == 1
    with pytest.raises(ValueError, match=message):
        read(RUN.replace(old, new))
