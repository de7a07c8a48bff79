"""A whole model in one file."""

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flamingo import Flamingo, FlamingoConfig, PretrainedLanguage, Processor, load_model, save_model
from flamingo.demo.stages import CONFIG, make_processor
from tests.helpers import language_models as families
from tests.helpers.weights import randomise

TINY = FlamingoConfig.preset("tiny", max_num_media=3, new_tokens=(257,), cross_attn_every=2)
OTHER = {
    "fit": "crop",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.5, 0.6, 0.7),
    "max_media": 2,
    "fps": 3.0,
    "max_frames": 30,
}


@pytest.mark.parametrize(
    ("config", "make"),
    [(TINY, lambda: Processor(image_size=32, **OTHER)), (CONFIG, make_processor)],
    ids=["tiny", "demo"],
)
def test_what_is_loaded_is_what_was_saved(seed, tmp_path, config, make):
    model, processor = randomise(Flamingo(config)), make()
    save_model(model, processor, tmp_path / "model.safetensors")
    loaded, its_processor = load_model(tmp_path / "model.safetensors")
    assert not loaded.training
    assert loaded.config == model.config
    document = [torch.rand(3, 20, 30), "Output:", torch.rand(3, 9, 9), "is it", torch.rand(3, 9, 9)]
    batch, again = processor([document]), its_processor([document])
    for found, expected in zip(again, batch, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(
        loaded(again.input_ids, again.pixels).logits, model(batch.input_ids, batch.pixels).logits
    )
    assert vars(its_processor).keys() == vars(processor).keys()
    for name in ("max_media", "fps", "max_frames", "max_pixels"):
        assert getattr(its_processor, name) == getattr(processor, name)


def test_towers_of_others_are_not_saved(tmp_path):
    sizes = {"language_dim": families.WIDTH, "language_layers": families.LAYERS, "vocab_size": 101}
    language = PretrainedLanguage(families.build("opt"))
    model = Flamingo(FlamingoConfig.preset("tiny", media_token_id=99, **sizes), language=language)
    with pytest.raises(ValueError, match="towers of this package, got VisionEncoder and PretrainedLanguage"):
        save_model(model, Processor(image_size=32), tmp_path / "model.safetensors")


def test_a_tokenizer_of_ones_own_is_not_saved(tmp_path):
    class Mine:
        pass

    with pytest.raises(ValueError, match="a tokenizer of this package, got Mine"):
        save_model(Flamingo(TINY), Processor(image_size=32, tokenizer=Mine()), tmp_path / "model.safetensors")


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(
        ValueError, match=r"torn\.safetensors: expected a saved model, got a file that cannot"
    ):
        load_model(tmp_path / "torn.safetensors")
    save_model(Flamingo(TINY), Processor(image_size=32), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        about = file.metadata()
    for name, key, value in (("config", "no_such_size", 1), ("processor", "tokenizer", "none such")):
        changed = about | {name: json.dumps(json.loads(about[name]) | {key: value})}
        save_file({"x": torch.zeros(1)}, tmp_path / "later.safetensors", metadata=changed)
        with pytest.raises(ValueError, match=r"later\.safetensors: expected a model of this release"):
            load_model(tmp_path / "later.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "later.safetensors", metadata=about)
    with pytest.raises(ValueError, match=r"later\.safetensors: expected a model of this release.* Missing"):
        load_model(tmp_path / "later.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"config": json.dumps({})})
    with pytest.raises(ValueError, match=r"other\.safetensors: expected a model of .*save_model"):
        load_model(tmp_path / "other.safetensors")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_model(Flamingo(TINY), Processor(image_size=32), path)
    before = path.read_bytes()

    def full(*args, **options):
        (tmp_path / "model.safetensors.unfinished").write_bytes(b"half")
        raise SafetensorError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: expected to write tensors, got: no space left"):
        save_model(Flamingo(TINY), Processor(image_size=32), path)
    assert path.read_bytes() == before
