"""Retrieval, by hand and by a model that sees brightness."""

import pytest
import torch

from flamingo import Processor, VisionEncoder
from flamingo.fewshot import image_embeddings, nearest
from tests.helpers.scripted import PROCESSOR, Brightness, picture
from tests.helpers.weights import randomise


def directions(*degrees):
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


class TestNearest:
    @pytest.mark.parametrize(
        ("query", "n", "expected"),
        [(10.0, 3, [2, 1, 0]), (95.0, 2, [2, 3]), (200.0, 5, [0, 2, 3, 5, 4]), (10.0, 1, [0]), (10.0, 0, [])],
    )
    def test_ascending_similarity(self, query, n, expected):
        keys = directions(0.0, 30.0, 60.0, 90.0, 180.0, 300.0)
        assert nearest(directions(query)[0], keys, n).tolist() == expected

    def test_many_queries(self):
        keys = directions(0.0, 90.0, 180.0)
        assert nearest(directions(10.0, 170.0), keys, 2).tolist() == [[1, 0], [1, 2]]

    def test_of_equals_the_earlier_is_nearer(self):
        assert nearest(directions(5.0)[0], directions(0.0, 0.0, 0.0), 2).tolist() == [1, 0]

    def test_equals_keep_their_order_however_many(self):
        keys = directions(90.0, 0.0).repeat(500, 1)
        assert nearest(directions(0.0)[0], keys, 500).tolist() == list(range(999, 0, -2))

    def test_too_few(self):
        with pytest.raises(ValueError, match="at most 2 neighbours, one for each key, got n=3"):
            nearest(directions(0.0)[0], directions(1.0, 2.0), 3)


class TestImageEmbeddings:
    def test_by_hand(self):
        found = image_embeddings(Brightness(), PROCESSOR, [picture("white"), picture("black")])
        torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))

    @pytest.mark.parametrize("batch_size", [1, 2, 10])
    def test_are_means_of_length_one_whatever_the_batch(self, seed, batch_size):
        vision = randomise(VisionEncoder(image_size=16, patch_size=8, dim=12, layers=1, heads=2))
        clip, long = list(torch.rand(2, 3, 16, 16)), list(torch.rand(5, 3, 16, 16))
        processor = Processor(image_size=16)
        media = [torch.rand(3, 16, 16), clip, long]
        found = image_embeddings(vision, processor, media, batch_size=batch_size)
        for embedding, medium in zip(found, media, strict=True):
            features = vision(processor([[medium]]).pixels)[0, 0].flatten(0, 1)  # [F * v, dim]
            mean = features.mean(dim=0)
            torch.testing.assert_close(embedding, mean / mean.norm())

    def test_none(self):
        assert image_embeddings(Brightness(), PROCESSOR, []).shape == (0, 2)
