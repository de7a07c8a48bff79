"""Closed-ended scoring against one plain forward pass a candidate, and on a model whose answer is known."""

import pytest
import torch

from flamingo import Flamingo, FlamingoConfig, Processor
from flamingo.fewshot import Sample, ensemble_log_likelihoods, log_likelihoods, top_one
from flamingo.fewshot.prompts import CAPTION, CLASSIFICATION
from tests.helpers.scripted import PROCESSOR, SHADES, Namer, picture
from tests.helpers.weights import randomise

CANDIDATES = ["a", "a long candidate", "ab", "naïve"]


@pytest.fixture
def model(seed):
    return randomise(Flamingo(FlamingoConfig.preset("tiny")), std=0.2).eval()


@pytest.fixture
def processor():
    return Processor(image_size=32)


@pytest.fixture
def images(seed):
    return list(torch.rand(5, 3, 16, 20))


@torch.no_grad()
def plainly(model, processor, document, candidate, closed=True):
    """One document, one forward pass."""
    batch = processor([[*document, f" {candidate}"]], prompt=True)
    prompt = processor([document], prompt=True).input_ids.shape[1]
    ids = torch.cat((batch.input_ids, torch.tensor([[257]] if closed else [[]], dtype=torch.int64)), dim=1)
    logits = model(ids, batch.pixels, num_frames=batch.num_frames).logits
    logits[..., 256] = -torch.inf  # `<image>` is not said
    log_p = logits.log_softmax(dim=-1)
    return sum(log_p[0, place - 1, ids[0, place]] for place in range(prompt, ids.shape[1]))


class TestLogLikelihoods:
    @pytest.mark.parametrize("closed", [True, False])
    @pytest.mark.parametrize("batch_size", [1, 3, 100])
    def test_are_those_of_a_plain_forward_pass(self, model, processor, images, closed, batch_size):
        documents = [
            [images[0], "Output: one.<EOC>", images[1], "Output:"],
            ["no image at all:"],
            [images[1], "is", [images[2], images[3], images[4]], "a film:"],  # shares one, has a clip
        ]
        options = {"closed": closed, "batch_size": batch_size}
        scores = log_likelihoods(model, processor, documents, CANDIDATES, **options)
        expected = [[plainly(model, processor, d, c, closed) for c in CANDIDATES] for d in documents]
        torch.testing.assert_close(scores, torch.tensor(expected))
        assert scores.std(dim=1).min() > 0.1

    def test_a_prompt_is_read_once_for_all_candidates(self, model, processor, images):
        read, multiplied = [], []
        layer, norm = model.language.layers[0], model.language.norm
        layer.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape[:2])))
        norm.register_forward_pre_hook(lambda module, args: multiplied.append(args[0].shape[1]))
        documents = [[images[0], "a long prompt:"], ["short:"], ["another:"]]
        candidates = ["ab", "c", "d"]
        log_likelihoods(model, processor, documents, candidates, batch_size=2)
        longest = len(processor.lay_out(documents[0], prompt=True).ids)
        # Nine of "<BOS>another:"; of " ab<EOC>" and " c<EOC>" all but the last, from which nothing follows.
        assert read == [(2, longest), (2, 3), (2, 2), (2, 2), (1, 9), (2, 3), (2, 2)]
        assert multiplied == [1, 3, 2, 2, 1, 3, 2]

    def test_every_medium_is_encoded_once(self, model, processor, images):
        seen = []
        model.vision.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].shape[0] * args[0].shape[1])
        )
        documents = [[images[0], "a", images[1], "b"], [images[1], "c", images[2], "d"], [images[0], "e"]]
        log_likelihoods(model, processor, documents, CANDIDATES, batch_size=2)
        assert sum(seen) == 3

    def test_files_are_told_apart_by_their_path(self, tmp_path):
        pillow = pytest.importorskip("PIL.Image")
        for shade in SHADES:
            (tmp_path / shade).mkdir()
            pillow.fromarray(picture(shade)).save(tmp_path / shade / "image.png")
        documents = [[tmp_path / shade / "image.png", "Output:"] for shade in [*SHADES, *SHADES]]
        namer = Namer()
        scores = log_likelihoods(namer, PROCESSOR, documents, list(SHADES))
        assert top_one(scores, [0, 1, 2, 0, 1, 2]) == 1
        assert namer.encoded == 3

    def test_the_end_tells_a_word_from_its_beginning(self):
        # The model says " white<EOC>": "whit" is its beginning, and likelier with its end left open.
        document, candidates = [picture("white"), "Output:"], ["whit", "white"]
        opened = log_likelihoods(Namer(), PROCESSOR, [document], candidates, closed=False)
        closed = log_likelihoods(Namer(), PROCESSOR, [document], candidates)
        assert opened.argmax() == 0
        assert closed.argmax() == 1

    def test_nothing_to_score(self, model, processor, images):
        with pytest.raises(ValueError, match="one candidate or more, got none"):
            log_likelihoods(model, processor, [[images[0]]], [])
        assert log_likelihoods(model, processor, [], CANDIDATES).shape == (0, 4)

    def test_a_medium_has_an_embedding_of_its_place(self, processor, images):
        model = randomise(Flamingo(FlamingoConfig.preset("tiny", max_num_media=3)), std=0.2).eval()
        documents = [
            [images[0], "one", images[1], "two", images[0], ":"],
            [images[1], "is", [images[2], images[3], images[4]], "a film:"],  # in other places, and a clip
        ]
        scores = log_likelihoods(model, processor, documents, CANDIDATES)
        expected = [[plainly(model, processor, d, c) for c in CANDIDATES] for d in documents]
        torch.testing.assert_close(scores, torch.tensor(expected))
        with pytest.raises(ValueError, match="at most max_num_media=3 media, got 4"):
            log_likelihoods(model, processor, [[*images[:4], ":"]], CANDIDATES)


class TestEnsemble:
    def test_is_the_mean_over_orders_of_the_shots(self, model, processor, images):
        shots = [Sample(image=images[i], answer=answer) for i, answer in enumerate(("one", "two", "three"))]
        query = Sample(image=images[3])
        encoded = []
        hook = model.vision.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
        found = ensemble_log_likelihoods(
            model, processor, CAPTION, query, shots, CANDIDATES, generator=torch.Generator().manual_seed(3)
        )
        hook.remove()
        assert sum(encoded) == 4
        generator = torch.Generator().manual_seed(3)
        orders = [torch.randperm(3, generator=generator).tolist() for _ in range(6)]
        assert len({tuple(order) for order in orders}) > 2
        each = [
            [
                plainly(model, processor, CAPTION.prompt(query, [shots[i] for i in order]), c)
                for c in CANDIDATES
            ]
            for order in orders
        ]
        torch.testing.assert_close(found, torch.tensor(each).mean(dim=0))
        assert torch.tensor(each).std(dim=0).min() > 1e-3

    def test_classifies(self):
        shots = [Sample(image=picture(shade), answer=shade) for shade in SHADES]
        names = list(SHADES)
        for place, shade in enumerate(names):
            query = Sample(image=picture(shade))
            scores = ensemble_log_likelihoods(Namer(), PROCESSOR, CLASSIFICATION, query, shots, names)
            assert scores.argmax() == place
