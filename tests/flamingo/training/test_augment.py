"""Images mirrored and recoloured: how often, how strongly, and a clip as one."""

import cmath
import colorsys
import random
from dataclasses import replace

import pytest
import torch

from flamingo.pixels import to_image
from flamingo.tokenizer import ByteTokenizer
from flamingo.training import augment as module
from flamingo.training.augment import augment, recolour
from flamingo.training.config import Clips, Documents, Pairs
from flamingo.training.samples import to_document
from flamingo.training.shards import clip_sample, document_sample, pair_sample
from tests.helpers.tiny_run import images

AS_IT_IS = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


def image(height=6, width=7):
    """Away from black and white, so that nothing is cut."""
    return 0.4 + 0.2 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


def pixels(image):
    return image.flatten(1).T.tolist()


class TestFlip:
    def test_half_of_the_images_are_mirrored(self):
        original, draw = image(), random.Random(0)
        found = [augment([original], flip=0.5, colour=0.0, draw=draw)[0] for _ in range(400)]
        mirrored = [torch.equal(each, original.flip(-1)) for each in found]
        assert 160 < sum(mirrored) < 240  # four standard deviations
        assert sum(torch.equal(each, original) for each in found) == 400 - sum(mirrored)

    def test_all_frames_of_a_clip_or_none(self):
        frames, draw = [image(), 1 - image()], random.Random(0)
        for _ in range(20):
            first, second = augment(frames, flip=0.5, colour=0.0, draw=draw)
            assert torch.equal(first, frames[0]) == torch.equal(second, frames[1])


class TestRecolour:
    def test_as_it_is(self):
        torch.testing.assert_close(recolour(image(), **AS_IT_IS), image())

    @pytest.mark.parametrize(("saturation", "hue"), [(0.8, 0.1), (1.2, -0.05), (0.0, 0.0), (1.0, 0.1)])
    def test_hue_and_saturation_in_yiq(self, saturation, hue):
        """By the standard library, pixel by pixel."""
        found = recolour(image(), **AS_IT_IS | {"saturation": saturation, "hue": hue})
        for before, after in zip(pixels(image()), pixels(found), strict=True):
            y, i, q = colorsys.rgb_to_yiq(*before)
            turned = saturation * cmath.exp(2j * cmath.pi * hue) * complex(i, q)
            assert colorsys.rgb_to_yiq(*after) == pytest.approx((y, turned.real, turned.imag), abs=1e-5)

    def test_grey_stays_grey(self):
        grey = image()[:1].expand(3, -1, -1)
        torch.testing.assert_close(recolour(grey, 1.0, 1.0, 1.2, 0.1), grey)

    def test_brightness_then_contrast(self):
        found = recolour(image(), **AS_IT_IS | {"brightness": 1.2, "contrast": 0.7})
        grey = [colorsys.rgb_to_yiq(*pixel)[0] for pixel in pixels(image())]
        mean = 1.2 * sum(grey) / len(grey)
        torch.testing.assert_close(found, mean + 0.7 * (1.2 * image() - mean))

    def test_what_is_too_bright_or_too_dark_is_cut(self):
        black_and_white = torch.tensor([0.0, 1.0]).expand(3, 1, 2)
        assert recolour(black_and_white, **AS_IT_IS | {"contrast": 1.4}).tolist() == [[[0.0, 1.0]]] * 3

    def test_threads_change_nothing(self):
        """A mean in float32 would be another with some of these numbers of threads."""
        large = torch.rand(4, 3, 500, 700, generator=torch.Generator().manual_seed(1))
        results = []
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            results.append(torch.stack([recolour(each, 1.1, 1.3, 0.9, 0.05) for each in large]))
        torch.set_num_threads(1)
        assert all(torch.equal(each, results[0]) for each in results)


class TestStrengths:
    def test_are_byols(self, monkeypatch):
        """In four of five images each drawn evenly, up to its strength."""
        drawn, draw = [], random.Random(0)
        monkeypatch.setattr(module, "recolour", lambda image, *amounts: drawn.append(amounts) or image)
        for _ in range(1000):
            augment([image()], flip=0.5, colour=0.8, draw=draw)
        assert 750 < len(drawn) < 850  # four standard deviations
        amounts = (torch.tensor(drawn) - torch.tensor([1, 1, 1, 0])) / torch.tensor([0.4, 0.4, 0.2, 0.1])
        assert amounts.mean(dim=0).abs().max() < 0.1
        assert 0.98 < amounts.abs().amax(dim=0).min() <= amounts.abs().max() < 1.001

    def test_one_for_all_frames_of_a_clip(self):
        one, same = augment([image(), image()], flip=0.0, colour=1.0, draw=random.Random(0))
        assert torch.equal(one, same)
        assert not torch.allclose(one, image())


KINDS = {
    "documents": (Documents, document_sample(["a page", *images(3, seed=0)])),
    "pairs": (Pairs, pair_sample(images(1, seed=0)[0], "a picture")),
    "clips": (Clips, clip_sample(images(3, seed=0), "a clip")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_it(kind):
    """Each turn of a sample another, the same for the same turn."""
    config, sample = KINDS[kind]
    config = config(name=kind, shards=("x",))

    def media(config, seed):
        found = []
        for part in to_document(config, sample, ByteTokenizer().encode, random.Random(seed)):
            found += [] if isinstance(part, str) else part if isinstance(part, list) else [part]
        return torch.stack(found)

    originals = torch.stack([to_image(each) for each in images(len(media(config, 0)), seed=0)])
    seen = [media(config, seed) for seed in range(20)]
    assert len({each.numpy().tobytes() for each in seen}) > 15
    assert torch.equal(media(config, 3), seen[3])
    assert any(
        torch.equal(media(replace(config, colour=0.0), seed), originals.flip(-1)) for seed in range(40)
    )
    assert torch.equal(media(replace(config, flip=0.0, colour=0.0), 0), originals)
    if kind == "documents":  # its images are drawn for one by one
        mirrored = [media(replace(config, colour=0.0), seed) for seed in range(40)]
        kinds = {tuple(torch.equal(a, b) for a, b in zip(each, originals, strict=True)) for each in mirrored}
        assert len(kinds) > 2
