"""Media that are encoded once: in memory, in files, in their places, and broken ones."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from flamingo import Flamingo, FlamingoConfig, Latents, Processor
from flamingo.media import Features
from tests.helpers.weights import randomise

PROCESSOR = Processor(image_size=32)


def build(**changes):
    return randomise(Flamingo(FlamingoConfig.preset("tiny", **changes)), std=0.2).eval()


@pytest.fixture
def model(seed):
    return build()


@pytest.fixture
def images(seed):
    return list(torch.rand(6, 3, 16, 20))


@torch.no_grad()
def plainly(model, media):
    """The latents of one document, by the model itself."""
    batch = PROCESSOR([media])
    return model.encode_media(batch.pixels, batch.num_frames)[0]


class TestEncoding:
    def test_is_the_models_own(self, model, images):
        clip = images[3:]
        documents = [[images[0], clip], [], [images[1], images[0], images[2]]]
        latents = Latents(model, PROCESSOR, batch_size=2)
        found = latents.of_documents(documents)
        assert found.shape == (3, 3, 8, 40)
        for row, media in zip(found, documents, strict=True):
            torch.testing.assert_close(row[: len(media)], plainly(model, media) if media else row[:0])
            assert not row[len(media) :].any()
        assert latents.encoded == 4

    def test_what_has_the_same_content_is_the_same(self, model, tmp_path):
        pillow = pytest.importorskip("PIL.Image")
        pixels = np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        for name in ("a.png", "b.png"):
            pillow.fromarray(pixels).save(tmp_path / name)
        latents = Latents(model, PROCESSOR)
        latents.of_documents([[pixels, pixels.copy(), pillow.fromarray(pixels)]])
        assert latents.encoded == 1
        latents.of_documents([[tmp_path / "a.png"], [tmp_path / "b.png"]])
        assert latents.encoded == 2
        pillow.fromarray(255 - pixels).save(tmp_path / "a.png")  # under the same name
        changed = latents.of_documents([[tmp_path / "a.png"], [tmp_path / "b.png"]])
        assert latents.encoded == 3
        assert not torch.equal(*changed)

    def test_an_array_that_is_written_over_is_another(self, model, images):
        latents = Latents(model, PROCESSOR)
        before = latents.of_documents([[images[0]]])
        images[0].zero_()
        assert not torch.equal(latents.of_documents([[images[0]]]), before)

    def test_features_stand_beside_pixels(self, model, images):
        with torch.no_grad():
            features = model.vision(PROCESSOR([[images[0]]]).pixels)[0, 0]
        found = Latents(model, PROCESSOR).of_documents([[images[0], Features(features), images[1]]])
        torch.testing.assert_close(found[0, 0], found[0, 1])
        assert not torch.allclose(found[0, 0], found[0, 2])

    def test_features_are_no_pixels_of_the_same_numbers(self, model):
        numbers = torch.rand(3, 16, model.vision.dim)
        latents = Latents(model, PROCESSOR)
        pixels, features = latents.of_documents([[numbers], [Features(numbers)]])
        assert latents.encoded == 2
        assert not torch.allclose(pixels, features)

    def test_a_relative_path_is_of_its_folder(self, model, tmp_path, monkeypatch):
        pillow = pytest.importorskip("PIL.Image")
        latents, found = Latents(model, PROCESSOR), []
        for name in ("black", "white"):
            (tmp_path / name).mkdir()
            pillow.new("RGB", (9, 9), name).save(tmp_path / name / "x.bmp")  # of the same size
            os.utime(tmp_path / name / "x.bmp", (0, 0))
            monkeypatch.chdir(tmp_path / name)
            found.append(latents.of_documents([[Path("x.bmp")]]))
        assert not torch.allclose(*found)

    def test_with_media_embeddings_every_place_has_its_own(self, images):
        model = build(max_num_media=4)
        latents = Latents(model, PROCESSOR)
        document = [images[0], images[1], images[0], images[3:]]
        found = latents.of_documents([document])
        torch.testing.assert_close(found[0], plainly(model, document))
        assert not torch.allclose(found[0, 0], found[0, 2])
        behind = latents.of_documents([document[2:]], first=2)
        torch.testing.assert_close(behind, found[:, 2:])
        assert latents.encoded == 4

    def test_embeddings_are_the_mean_of_features(self, model, images):
        clip = images[2:]
        found = Latents(model, PROCESSOR).embeddings([images[0], clip])
        for embedding, medium in zip(found, [images[0], clip], strict=True):
            with torch.no_grad():
                mean = model.vision(PROCESSOR([[medium]]).pixels).flatten(0, 3).mean(dim=0)
            torch.testing.assert_close(embedding, mean / mean.norm())


class TestMemory:
    @pytest.mark.parametrize("memory", [0, 4000, 2**30])
    def test_what_memory_does_not_hold_is_read_from_files(self, model, images, memory):
        latents = Latents(model, PROCESSOR, memory=memory, batch_size=2)
        first = latents.of_documents([images])
        again = latents.of_documents([images[::-1], images[:3]])
        assert latents.encoded == 6
        assert torch.equal(again[0], first[0].flip(0))
        assert torch.equal(again[1, :3], first[0, :3])
        assert latents._held <= max(memory, 1800)


class TestFolder:
    def test_a_later_run_reads_them(self, model, images, tmp_path):
        first = Latents(model, PROCESSOR, tmp_path / "kept")
        expected = first.of_documents([images])
        first.save()
        later = Latents(model, PROCESSOR, tmp_path / "kept", memory=0)
        assert torch.equal(later.of_documents([images]), expected)
        assert torch.equal(later.embeddings(images), first.embeddings(images))
        assert later.encoded == 0

    def test_what_is_saved_is_not_saved_again(self, model, images, tmp_path):
        latents = Latents(model, PROCESSOR, tmp_path)
        for _ in range(2):
            latents.of_documents([images])
            latents.save()
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("other", ["vision", "resampler", "preprocessing", "video"])
    def test_those_of_something_else_are_refused(self, model, images, tmp_path, other):
        latents = Latents(model, PROCESSOR, tmp_path)
        latents.of_documents([images])
        latents.save()
        processor = PROCESSOR
        if other == "preprocessing":
            processor = Processor(image_size=32, fit="crop")
        elif other == "video":
            processor, other = Processor(image_size=32, max_frames=4), "preprocessing"
        else:
            next(getattr(model, other).parameters()).data[0] += 1
        with pytest.raises(ValueError, match=f"expected latents of this model's {other}, got .* another"):
            Latents(model, processor, tmp_path)

    def test_the_weights_of_the_language_model_do_not_matter(self, model, images, tmp_path):
        latents = Latents(model, PROCESSOR, tmp_path)
        latents.of_documents([images])
        latents.save()
        next(model.language.parameters()).data += 1
        assert Latents(model, PROCESSOR, tmp_path).broken(images) == [None] * 6

    def test_a_damaged_file_is_named(self, model, tmp_path):
        (tmp_path / "torn.safetensors").write_bytes(b"torn")
        with pytest.raises(ValueError, match=r"torn\.safetensors: expected latents, got a file that cannot"):
            Latents(model, PROCESSOR, tmp_path)


class TestBroken:
    def test_they_are_told_and_not_encoded(self, model, images, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"no image")
        pytest.importorskip("PIL")
        latents = Latents(model, PROCESSOR)
        media = [images[0], tmp_path / "broken.png", images[1]]
        first, second, third = latents.broken(media)
        assert (first, third) == (None, None)
        assert "broken.png" in second
        assert latents.encoded == 2
        with pytest.raises(ValueError, match=r"broken\.png"):
            latents.of_documents([media])

    def test_a_clip_with_a_broken_frame_is_broken(self, model, images, tmp_path):
        pytest.importorskip("PIL")
        (tmp_path / "broken.png").write_bytes(b"no image")
        found = Latents(model, PROCESSOR).broken(
            [[images[0], tmp_path / "broken.png"], [b"no"], [], images[:2]]
        )
        assert "broken.png" in found[0]
        assert all(found[:3])
        assert found[3] is None

    def test_a_file_that_is_not_there_is_an_error(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"gone\.png"):
            Latents(model, PROCESSOR).broken([tmp_path / "gone.png"])
