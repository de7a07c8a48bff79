"""A prompt that is read once, against reading all of every document anew."""

import itertools

import pytest
import torch

from flamingo import (
    Context,
    Flamingo,
    FlamingoConfig,
    Latents,
    PretrainedLanguage,
    Processor,
    complete,
    read_prompt,
    stream_text,
)
from flamingo.fewshot import log_likelihoods
from tests.helpers import language_models as families
from tests.helpers.weights import shake

PROCESSOR = Processor(image_size=32)
CANDIDATES = ["a", "a long one", "ab"]
OWN = {
    "rotary": {},
    "relative": {"language_positions": "relative"},
    "all preceding": {"only_attend_immediate_media": False},
    "media embeddings": {"max_num_media": 9},
}
KINDS = (*OWN, "opt", "mpt", "mistral", "gemma2")


def build(kind):
    torch.manual_seed(6)
    options = {"vocab_size": 261, "vision_layers": 1, "resampler_depth": 1, **OWN.get(kind, {})}
    language = None
    if kind not in OWN:
        longest = {"max_position_embeddings": 256} if kind == "opt" else {}
        made = families.build(kind, tie_word_embeddings=False, vocab_size=261, **longest)
        language = PretrainedLanguage(made)
        options |= {"language_dim": families.WIDTH, "language_layers": families.LAYERS}
    model = Flamingo(FlamingoConfig.preset("tiny", tie_embeddings=False, **options), language=language)
    if language is None:
        torch.nn.init.normal_(model.language.embedding.weight)
    for block in model.cross_attn.values():
        block.attn_gate.data += 0.5
    model.resampler.latents.data *= 0.1
    shake(model.cross_attn), shake(model.resampler)
    return model.eval()


@pytest.fixture(params=KINDS)
def model(request, seed):
    return build(request.param)


@pytest.fixture
def plain(seed):
    return build("rotary")


@pytest.fixture
def images(seed):
    return list(torch.rand(6, 3, 16, 20))


def shots(images):
    return [images[0], "Output: one.<EOC>", images[1], "Output: two.<EOC>"]


def queries(images):
    """Of several lengths, two alike; one without an image, one with two."""
    return [
        [images[2], "Output:"],
        [images[3], "Question: why? Output:"],
        ["Nothing to see:"],
        [images[4], "Output:"],
        [images[2], "and", images[5], "Output:"],
    ]


class TestAfter:
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    def test_texts_are_those_of_whole_documents(self, model, images, options):
        options = options | {"max_new_tokens": 5}
        prompt = read_prompt(model, PROCESSOR, shots(images))
        for _ in range(2):  # the second time in memory that was used
            found = complete(model, PROCESSOR, queries(images), after=prompt, **options)
            whole = [complete(model, PROCESSOR, [shots(images) + q], **options)[0] for q in queries(images)]
            assert found == whole

    def test_likelihoods_are_those_of_whole_documents(self, model, images):
        prompt = read_prompt(model, PROCESSOR, shots(images))
        for batch_size in (1, 2, 8):
            found = log_likelihoods(
                model, PROCESSOR, queries(images), CANDIDATES, after=prompt, batch_size=batch_size
            )
            whole = [
                log_likelihoods(model, PROCESSOR, [shots(images) + query], CANDIDATES)[0]
                for query in queries(images)
            ]
            torch.testing.assert_close(found, torch.stack(whole), rtol=1e-4, atol=1e-4)
        assert found.std(dim=0).min() > 1e-3

    def test_a_prompt_of_text(self, model, images):
        text = ["Output: one.<EOC>Output: two.<EOC>"]
        found = complete(
            model, PROCESSOR, queries(images), after=read_prompt(model, PROCESSOR, text), max_new_tokens=4
        )
        assert found == [
            complete(model, PROCESSOR, [text + query], max_new_tokens=4)[0] for query in queries(images)
        ]

    def test_an_empty_prompt(self, plain, images):
        prompt = read_prompt(plain, PROCESSOR, [])
        found = complete(plain, PROCESSOR, queries(images), after=prompt, max_new_tokens=4)
        assert found == complete(plain, PROCESSOR, queries(images), max_new_tokens=4)

    def test_no_more_media_than_the_processor_takes(self, plain, images):
        processor = Processor(image_size=32, max_media=3)
        prompt = read_prompt(plain, processor, shots(images))
        document = [images[2], "a", images[3], "b:"]
        (found,) = complete(plain, processor, [document], after=prompt, max_new_tokens=6)
        assert [found] == complete(plain, processor, [shots(images) + document], max_new_tokens=6)
        assert [found] == complete(plain, PROCESSOR, [[*shots(images), images[2], "ab:"]], max_new_tokens=6)

    def test_beginnings_do_not_mix(self, plain, images):
        """Two prompts in turn, one of which was left in the middle of an answer."""
        first = read_prompt(plain, PROCESSOR, shots(images))
        second = read_prompt(plain, PROCESSOR, [images[5], "Output: three.<EOC>"])
        answer = {"max_new_tokens": 4}
        expected = [complete(plain, PROCESSOR, queries(images), after=p, **answer) for p in (first, second)]
        next(stream_text(plain, PROCESSOR, queries(images)[0], after=first, **answer))
        found = [complete(plain, PROCESSOR, queries(images), after=p, **answer) for p in (first, second)]
        assert found == expected
        assert found[0] != found[1]

    def test_a_second_document_is_refused(self, plain, images):
        context = Context(plain)
        context.read(torch.tensor([[65], [66]]))
        with pytest.raises(ValueError, match="expected one document that was read, got 2"):
            context.copies(3)
        context = Context(plain)
        context.read(torch.tensor([[65]]))
        context.add(torch.tensor([[66]]))
        with pytest.raises(ValueError, match="got 1 and 1 additions to read"):
            context.copies(3)


class TestCost:
    def test_the_prompt_is_read_once_and_padding_never(self, plain, images):
        read = []
        plain.language.layers[0].register_forward_pre_hook(
            lambda module, args: read.append(tuple(args[0].shape[:2]))
        )
        prompt = read_prompt(plain, PROCESSOR, shots(images))
        length = len(PROCESSOR.lay_out(shots(images), prompt=True).ids)
        complete(plain, PROCESSOR, queries(images), after=prompt, max_new_tokens=1)
        # "<image>Output:" of two, "<image>Question: why? Output:", text alone, and two images.
        assert read == [(1, length), (2, 8), (1, 23), (1, 15), (1, 5), (1, 8)]

    def test_its_keys_and_values_are_copied_once(self, plain, images):
        prompt = read_prompt(plain, PROCESSOR, shots(images))
        places = []
        for _ in range(3):
            with prompt.followed(4) as context:
                context.add(torch.full((4, 1), 66))
                context.step()
                places.append(context.cache.layers[0][0].seen.data_ptr())
        assert len(set(places)) == 1

    def test_media_are_encoded_once(self, plain, images):
        latents = Latents(plain, PROCESSOR)
        prompt = read_prompt(plain, PROCESSOR, shots(images), latents=latents)
        for _ in range(2):
            complete(plain, PROCESSOR, queries(images), after=prompt, latents=latents, max_new_tokens=1)
        log_likelihoods(plain, PROCESSOR, queries(images), CANDIDATES, after=prompt, latents=latents)
        assert latents.encoded == 6


class TestStream:
    @pytest.mark.parametrize("after", [False, True])
    def test_the_pieces_are_the_text(self, plain, images, after):
        prompt = read_prompt(plain, PROCESSOR, shots(images)) if after else None
        for document in queries(images):
            options = {"max_new_tokens": 12, "after": prompt}
            pieces = list(stream_text(plain, PROCESSOR, document, **options))
            assert ["".join(pieces)] == complete(plain, PROCESSOR, [document], **options)
            assert all(pieces)
            assert len(pieces) > 1

    def test_a_character_of_several_tokens_comes_whole(self, plain, monkeypatch):
        said = iter([*"aé€".encode(), PROCESSOR.tokenizer.eoc_id])
        monkeypatch.setattr(
            "flamingo.generation.texts.stream",
            lambda *args, **options: (torch.tensor([token]) for token in said),
        )
        assert list(stream_text(plain, PROCESSOR, ["a:"])) == ["a", "é", "€"]

    def test_it_comes_as_it_is_made(self, plain, images):
        pieces = stream_text(plain, PROCESSOR, ["a:"], max_new_tokens=200)
        assert len("".join(itertools.islice(pieces, 2))) >= 2
