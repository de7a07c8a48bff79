"""Features made once: the same run without the encoder, and never those of another."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from flamingo.training import DataError, Documents, Pairs, encode, pair_sample, read_log, train, write_shards
from flamingo.training.lock import locked
from flamingo.training.shards import document_sample
from tests.helpers.tiny_run import config, datasets, images, model, processor


def still(data, folder=None):
    """The datasets without augmentation, with a folder of features for each."""
    return tuple(
        replace(each, flip=0.0, colour=0.0, features=folder and f"{folder}/{each.name}")
        for each in datasets(data)
    )


def losses(folder):
    return [{name: value for name, value in each.items() if name != "seconds"} for each in read_log(folder)]


def run_of(folder, **changes):
    """A run on three pairs with features."""
    shards = write_shards(folder / "data", [pair_sample(image, "a") for image in images(3, seed=0)])
    pairs = Pairs(
        name="pairs",
        shards=(str(shards[0]),),
        batch_size=1,
        **{"flip": 0.0, "colour": 0.0, "features": f"{folder}/features", **changes},
    )
    return config(folder, folder / "run", datasets=(pairs,), steps=3)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_run_is_the_same_and_never_calls_the_encoder(data, tmp_path, bfloat16):
    with_features = still(data, tmp_path / "features")
    encoded = model()
    run = config(data, tmp_path / "read", datasets=with_features, bfloat16=bfloat16)
    assert encode(encoded, processor(), run) == 2 + 2 + 9 + 5  # as many differ in a shard
    reading = model()
    before = reading.resampler.latents.detach().clone()
    reading.vision.register_forward_hook(lambda *_: pytest.fail("the encoder was called"))
    train(reading, processor(), run)
    assert not torch.equal(reading.resampler.latents.float(), before)
    train(model(), processor(), replace(run, folder=str(tmp_path / "live"), datasets=still(data)))
    for read, live in zip(losses(tmp_path / "read"), losses(tmp_path / "live"), strict=True):
        assert read == pytest.approx(live, rel=1e-5)


def test_workers_read_them_too(data, tmp_path):
    run = config(data, tmp_path / "alone", datasets=still(data, tmp_path / "features"), workers=1)
    encode(model(), processor(), run)
    train(model(), processor(), run)
    train(model(), processor(), replace(run, folder=str(tmp_path / "helped"), workers=0))
    assert losses(tmp_path / "alone") == losses(tmp_path / "helped")


def test_shards_that_are_done_are_passed_over_and_others_made(tmp_path):
    run = run_of(tmp_path)
    assert encode(model(), processor(), run) == 3
    assert encode(model(), processor(), run) == 0
    write_shards(tmp_path / "data", [pair_sample(image, "a") for image in images(4, seed=0)])
    assert encode(model(), processor(), run) == 1
    train(model(), processor(), run)


def test_a_second_encode_is_refused_as_long_as_the_first_lives(data, tmp_path):
    reader, writer = os.pipe()
    first = os.fork()
    if not first:
        with locked(tmp_path / "features" / "pairs"):
            os.write(writer, b"locked")
            time.sleep(60)
        os._exit(0)
    assert os.read(reader, 6) == b"locked"
    run = config(data, tmp_path, datasets=(still(data, tmp_path / "features")[1],))
    with pytest.raises(ValueError, match=f"features/pairs to be this run's alone, .* process {first} on"):
        encode(model(), processor(), run)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert encode(model(), processor(), run) > 0


def test_several_processes_share_the_shards(data, tmp_path, monkeypatch):
    from flamingo.training import encoding

    monkeypatch.setattr(encoding, "world_size", lambda: 2)
    pairs = still(data, tmp_path / "features")[1]
    run = config(data, tmp_path, datasets=(pairs,))
    for rank, written in ((0, 2), (1, 3)):
        monkeypatch.setattr(encoding, "rank", lambda rank=rank: rank)
        encode(model(), processor(), run)
        assert len(list((tmp_path / "features" / "pairs").glob("*.safetensors"))) == written


class TestStale:
    @pytest.fixture
    def run(self, tmp_path):
        run = run_of(tmp_path)
        encode(model(), processor(), run)
        return run

    def refused(self, run, message, flamingo=None, processor=processor):
        with pytest.raises(DataError, match=message):
            train(flamingo or model(), processor(), run)
        assert read_log(run.folder) == []

    def test_another_encoder(self, run):
        message = r"data-000000\.safetensors: expected features of this run's encoder, .* Remove them and run"
        self.refused(run, message, model(seed=1))
        with pytest.raises(DataError, match="this run's encoder"):
            encode(model(seed=1), processor(), run)

    @pytest.mark.parametrize(
        ("changed", "value"),
        [("fit", "crop"), ("mean", torch.zeros(3, 1, 1)), ("std", torch.ones(3, 1, 1)), ("image_size", 16)],
    )
    def test_another_preprocessing(self, run, changed, value):
        other = processor()
        setattr(other, changed, value)
        self.refused(run, r"this run's preprocessing, got those of another, \{.*pad.*\}", None, lambda: other)

    def test_another_precision(self, run):
        self.refused(replace(run, bfloat16=True), "expected features of this run's encoder")

    def test_another_shard(self, run, tmp_path):
        write_shards(tmp_path / "data", [pair_sample(image, "b") for image in images(3, seed=0)])
        train(model(), processor(), run)  # texts are read from the shard
        write_shards(tmp_path / "data", [pair_sample(image, "a") for image in images(3, seed=1)])
        other = replace(run, folder=f"{tmp_path}/other")
        self.refused(
            other, r"features of png, got none: the shard has changed.* Run `python -m flamingo encode`"
        )
        encode(model(), processor(), run)
        train(model(), processor(), other)

    def test_none(self, run, tmp_path):
        next((tmp_path / "features").glob("*.safetensors")).unlink()
        self.refused(run, r"got none\. Run `python -m flamingo encode` with the same file first")

    def test_a_damaged_file(self, run, tmp_path):
        next((tmp_path / "features").glob("*.safetensors")).write_bytes(b"features")
        self.refused(run, r"data-000000\.safetensors: expected features, got a file that cannot be read")


def test_a_bad_image_is_bad_without_being_looked_at(tmp_path):
    samples = [pair_sample(image, "a") for image in images(3, seed=0)]
    samples[1]["png"] = b"no image"
    run = run_of(tmp_path)
    write_shards(tmp_path / "data", samples)
    assert encode(model(), processor(), run) == 3
    train(model(), processor(), replace(run, max_bad=1.0, steps=6))
    log = read_log(tmp_path / "run")
    assert log[-1]["bad/pairs"] == 2
    (skipped,) = next(each["skipped"] for each in log if "skipped" in each)
    assert skipped["reason"].startswith(
        "expected png to be an image or a clip, got one that encode could not"
    )


def test_of_a_page_every_image_is_encoded_once(tmp_path):
    one, two, three = images(3, seed=0)
    write_shards(
        tmp_path / "data", [document_sample(["a", one, two, one]), document_sample([three, "b", one])]
    )
    pages = Documents(
        name="pages",
        shards=(f"{tmp_path}/data",),
        flip=0.0,
        colour=0.0,
        features=f"{tmp_path}/f",
        max_images=1,
    )
    assert encode(model(), processor(), config(tmp_path, tmp_path, datasets=(pages,))) == 3


def test_two_shards_of_one_name_are_refused(tmp_path):
    for folder in "ab":
        write_shards(tmp_path / folder / "data", [pair_sample(image, "a") for image in images(1, seed=0)])
    pairs = run_of(tmp_path).datasets[0]
    run = config(tmp_path, tmp_path, datasets=(replace(pairs, shards=(f"{tmp_path}/?/data",)),))
    with pytest.raises(DataError, match=r"a/data/000000\.tar and .*b/data/000000\.tar, whose features"):
        encode(model(), processor(), run)


def test_an_encoder_that_is_trained_is_refused(tmp_path):
    trained = model()
    trained.vision.requires_grad_(True)
    for work in (encode, train):
        with pytest.raises(ValueError, match="expected a frozen vision encoder, as dataset 'pairs' reads"):
            work(trained, processor(), run_of(tmp_path))


def test_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"flip = 0 and colour = 0 of dataset 'pairs', .* got 0\.5 and 0\.0"):
        run_of(tmp_path, flip=0.5)
    run = run_of(tmp_path, features=None)
    with pytest.raises(
        DataError, match=r'expected a dataset with a folder, as features = "features", got none'
    ):
        encode(model(), processor(), run)
    with pytest.raises(ValueError, match=r"a model with a vision encoder.* got Linear"):
        encode(torch.nn.Linear(1, 1), processor(), run_of(tmp_path))


def test_the_documentation_of_a_file_is_its_settings(tmp_path):
    from safetensors import safe_open

    encode(model(), processor(), run_of(tmp_path))
    with safe_open(next((tmp_path / "features").glob("*.safetensors")), framework="pt") as file:
        assert json.loads(file.metadata()["preprocessing"])["image_size"] == 32
        assert {file.get_tensor(name).shape for name in file.keys()} == {(1, 16, 48)}  # noqa: SIM118
