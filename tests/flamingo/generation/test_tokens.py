"""What follows a prompt, held against what a model says of the whole text, read anew for every token."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from flamingo import (
    Context,
    Flamingo,
    FlamingoConfig,
    MaskedCrossAttention,
    PretrainedLanguage,
    Processor,
    complete,
    generate,
    stream,
)
from flamingo.generation import Model, beam_search, choose
from flamingo_kernels import patch
from tests.helpers import language_models as families
from tests.helpers.weights import shake

IMAGE, PAD = 99, 0
KINDS = ("rotary", "relative", "all preceding", "llama", "opt", "mpt", "gemma2")


def build(kind, **changes):
    """One with something to say: of most seeds, some kind repeats one token."""
    torch.manual_seed(6)
    options = {"vocab_size": 101, "media_token_id": IMAGE, "vision_layers": 1, "resampler_depth": 1} | changes
    if kind in families.FAMILIES:
        sizes = {"language_dim": families.WIDTH, "language_layers": families.LAYERS}
        language = PretrainedLanguage(families.build(kind, tie_word_embeddings=False))
        model = Flamingo(FlamingoConfig.preset("tiny", **options | sizes), language=language)
    else:
        own = {
            "rotary": {},
            "relative": {"language_positions": "relative"},
            "all preceding": {"only_attend_immediate_media": False},
        }[kind]
        config = FlamingoConfig.preset("tiny", tie_embeddings=False, language_layers=3, **own | options)
        model = Flamingo(config)
        torch.nn.init.normal_(model.language.embedding.weight)
    for block in model.cross_attn.values():
        block.attn_gate.data += 0.5
    model.resampler.latents.data *= 0.1  # or media would all look like them
    shake(model.cross_attn), shake(model.resampler)
    return model.eval()


def close_gates(model):
    for block in model.cross_attn.values():
        torch.nn.init.zeros_(block.attn_gate), torch.nn.init.zeros_(block.ff_gate)
    return model


@pytest.fixture(params=KINDS)
def model(request, seed):
    return build(request.param)


@pytest.fixture
def plain(seed):
    return build("rotary")


def documents():
    """Three, padded on the left, with two images, one and none; and their pixels, padded to two."""
    rows = [[5, IMAGE, 7, 8, IMAGE, 9, 10], [PAD, PAD, IMAGE, 11, 12, 13, 14], [PAD] * 3 + [15, 16, 17, 18]]
    ids = torch.tensor(rows)
    return ids, torch.randn(3, 2, 1, 3, 32, 32), ids != PAD


def naive(model, ids, pixels, mask=None, steps=5):
    """Greedy, the whole text anew for every token."""
    mask = torch.ones_like(ids) if mask is None else mask.long()
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids, pixels, mask).logits[:, -1]
        logits[:, IMAGE] = -torch.inf
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return ids[:, -steps:]


class TestGreedy:
    def test_is_the_likeliest_token_again_and_again(self, model):
        ids, pixels, mask = documents()
        new = model.generate(ids, pixels, mask, max_new_tokens=5)
        assert torch.equal(new, naive(model, ids, pixels, mask))
        assert len(set(new.flatten().tolist())) > 4
        assert not torch.equal(new, naive(model, ids, pixels.flip(0), mask)), "images do not matter"

    def test_a_batch_is_its_documents_one_by_one(self, model):
        ids, pixels, mask = documents()
        new = model.generate(ids, pixels, mask, max_new_tokens=5)
        for row, images in enumerate((2, 1, 0)):
            alone = ids[row, mask[row]][None]
            seen = pixels[row : row + 1, :images] if images else None
            assert torch.equal(model.generate(alone, seen, max_new_tokens=5), new[row : row + 1])

    def test_never_says_image(self, plain):
        ids, pixels, mask = documents()
        plain.language.head.weight.data[IMAGE] *= 1000
        assert (plain(ids, pixels, mask).logits[:, -1].argmax(dim=-1) == IMAGE).any()
        for options in ({}, {"num_beams": 3}, {"temperature": 1.0}):
            assert (plain.generate(ids, pixels, mask, max_new_tokens=8, **options) != IMAGE).all()

    def test_stops(self, plain):
        ids, pixels, mask = documents()
        free = plain.generate(ids, pixels, mask, max_new_tokens=6)
        row, stop = next(
            (row, id) for row in range(3) for id in free[row, :4].tolist() if (free == id).any(1).sum() == 1
        )
        stopped = plain.generate(ids, pixels, mask, max_new_tokens=6, stop_token_ids=[stop])
        said = free[row].tolist()[: free[row].tolist().index(stop)]
        assert stopped[row].tolist() == said + [stop] * (6 - len(said))
        assert [torch.equal(a, b) for a, b in zip(stopped, free, strict=True)].count(False) == 1
        every = free[:, 2].tolist()
        assert plain.generate(ids, pixels, mask, stop_token_ids=every).shape[1] == 3

    def test_transformers_say_the_same_without_images(self, seed):
        for family in families.FAMILIES:
            model, ids = close_gates(build(family)), families.tokens(2, 6).clamp(max=IMAGE - 1)
            options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
            lm = model.language.model
            lm.generation_config.eos_token_id = None
            theirs = lm.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 6:]
            assert torch.equal(model.generate(ids, max_new_tokens=6), theirs), family

    def test_from_one_frame_of_longer_clips(self, plain):
        ids, pixels = torch.tensor([[IMAGE, 5]]), 3 * torch.randn(1, 1, 3, 3, 32, 32)
        short = plain.generate(ids, pixels, num_frames=torch.tensor([[1]]), max_new_tokens=4)
        assert torch.equal(short, plain.generate(ids, pixels[:, :, :1], max_new_tokens=4))
        assert not torch.equal(short, plain.generate(ids, pixels, max_new_tokens=4))


class TestStream:
    @pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
    def test_yields_what_generate_returns(self, plain, options):
        ids, pixels, mask = documents()
        tokens = []
        torch.manual_seed(3)
        for token in stream(plain, ids, pixels, mask, max_new_tokens=5, **options):
            assert not torch.is_inference_mode_enabled()
            tokens.append(token)
        torch.manual_seed(3)
        assert torch.equal(
            torch.stack(tokens, 1), generate(plain, ids, pixels, mask, max_new_tokens=5, **options)
        )

    def test_yields_a_token_before_the_next_is_computed(self, plain):
        ids, pixels, mask = documents()
        calls = count(plain.language)
        tokens = stream(plain, ids, pixels, mask, max_new_tokens=5)
        for n in (1, 2, 3):
            next(tokens)
            assert len(calls) == n
        assert torch.is_grad_enabled()


class TestComplete:
    def test_is_the_text_before_the_end(self, seed):
        model, processor = build("rotary", vocab_size=261, media_token_id=256), Processor(image_size=32)
        documents = [[torch.rand(3, 9, 9), "Output:"], ["Question: "]]
        batch, decode = processor(documents, prompt=True), processor.tokenizer.decode
        ids = model.generate(batch.input_ids, batch.pixels, batch.attention_mask, max_new_tokens=5)
        ids = ids.tolist()
        assert complete(model, processor, documents, max_new_tokens=5) == [decode(row) for row in ids]
        for name in ("eoc_id", "eos_id"):
            processor = Processor(image_size=32)
            setattr(processor.tokenizer, name, ids[0][2])
            first = complete(model, processor, documents, max_new_tokens=5)[0]
            assert first == decode(ids[0][: ids[0].index(ids[0][2])])

    def test_of_clips_of_several_lengths(self, seed):
        model, processor = build("rotary", vocab_size=261, media_token_id=256), Processor(image_size=32)
        short, long = list(torch.rand(2, 3, 9, 9)), list(torch.rand(4, 3, 9, 9))
        options = {"max_new_tokens": 5, "temperature": 0.0}
        together = complete(model, processor, [[short, "a"], [long, "b"]], **options)
        assert together[:1] == complete(model, processor, [[short, "a"]], **options)

    def test_options_are_those_of_generate(self, plain):
        with pytest.raises(ValueError, match="expected beam search or sampling"):
            complete(plain, Processor(image_size=32), [["a"]], num_beams=3, temperature=1.0)


class TestSampling:
    LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0]])

    def shares(self, draws=4000, **options):
        generator = torch.Generator().manual_seed(1)
        drawn = choose(self.LOGITS.expand(draws, -1), generator=generator, **options)
        return drawn.bincount(minlength=4) / draws

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_follows_the_probabilities(self, temperature):
        expected = (self.LOGITS[0] / temperature).softmax(dim=-1)
        torch.testing.assert_close(self.shares(temperature=temperature), expected, rtol=0, atol=0.03)

    def test_top_k(self):
        expected = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf]).softmax(dim=-1)
        torch.testing.assert_close(self.shares(temperature=1.0, top_k=2), expected, rtol=0, atol=0.03)
        assert self.shares(temperature=1.0, top_k=1).tolist() == [0, 1, 0, 0]
        assert (self.shares(temperature=9.0, top_k=10) > 0).all()

    def test_top_p(self):
        # In order: 0.657, 0.242, 0.089, 0.012.
        assert self.shares(temperature=1.0, top_p=0.6).tolist() == [0, 1, 0, 0]
        expected = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf]).softmax(dim=-1)
        torch.testing.assert_close(self.shares(temperature=1.0, top_p=0.7), expected, rtol=0, atol=0.03)
        assert (self.shares(temperature=1.0, top_p=1.0) > 0).all()

    def test_top_p_is_enough_when_it_is_just_reached(self):
        drawn = choose(torch.zeros(200, 4), temperature=1.0, top_p=0.5)
        assert len(drawn.unique()) == 2

    def test_top_p_is_a_share_of_the_top_k(self):
        # 0.657 of all, 0.731 of the two.
        assert self.shares(temperature=1.0, top_k=2, top_p=0.7).tolist() == [0, 1, 0, 0]

    def test_probabilities_of_half_precision_are_added_up_in_float32(self):
        drawn = choose(torch.zeros(4000, 1000, dtype=torch.bfloat16), temperature=1.0, top_p=0.5)
        assert 480 < len(drawn.unique()) <= 501

    def test_a_generator_repeats_it(self, plain):
        ids, pixels, mask = documents()

        def draw(seed, how=generate):
            generator = torch.Generator().manual_seed(seed)
            options = {"temperature": 2.0, "top_p": 1.0, "generator": generator, "max_new_tokens": 6}
            return how(plain, ids, pixels, mask, **options)

        def streamed(*args, **options):
            return torch.stack(list(stream(*args, **options)), dim=1)

        first = draw(1)
        assert torch.equal(draw(1), first)
        assert torch.equal(draw(1, streamed), first)
        assert not torch.equal(draw(2), first)


class TestBeamSearch:
    def brute_force(self, model, ids, pixels, *, longest, stops, penalty):
        """The best of all texts that end in a stop or are as long as can be, and what it is worth."""
        vocabulary = [id for id in range(model.config.vocab_size) if id != model.config.media_token_id]
        best, best_worth = None, -torch.inf
        for length in range(1, longest + 1):
            for text in itertools.product(vocabulary, repeat=length):
                if any(token in stops for token in text[:-1]) or (length < longest and text[-1] not in stops):
                    continue
                with torch.no_grad():
                    logits = model(torch.cat((ids, torch.tensor([text])), dim=1), pixels).logits[0]
                logits[:, model.config.media_token_id] = -torch.inf
                log_p = logits[ids.shape[1] - 1 : -1].log_softmax(dim=-1)
                worth = log_p.gather(1, torch.tensor([text]).T).sum().item() / length**penalty
                if worth > best_worth:
                    best, best_worth = text, worth
        return list(best)

    @pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
    def test_wide_enough_it_finds_the_best_of_all_texts(self, penalty, seed):
        model = build("rotary", vocab_size=5, media_token_id=4)
        for trial in range(3):
            torch.manual_seed(trial)
            torch.nn.init.normal_(model.language.embedding.weight)
            ids, pixels = torch.tensor([[0, 4, 1]]), torch.randn(1, 1, 1, 3, 32, 32)
            options = {"stop_token_ids": [2], "length_penalty": penalty}
            got = model.generate(ids, pixels, num_beams=16, max_new_tokens=3, **options)
            best = self.brute_force(model, ids, pixels, longest=3, stops=[2], penalty=penalty)
            assert got[0].tolist() == best

    @pytest.mark.parametrize("family", ["llama", "opt"])
    @pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
    def test_transformers_find_the_same_without_images(self, family, penalty, seed):
        model, ids = close_gates(build(family)), families.tokens(4, 5).clamp(max=IMAGE - 1)
        lm = model.language.model
        stops = [7, 11, 13, 17, 23, 42]
        theirs = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            num_beams=3,
            do_sample=False,
            early_stopping="never",
            length_penalty=penalty,
            eos_token_id=stops,
            pad_token_id=stops[0],
            suppress_tokens=[IMAGE],
            renormalize_logits=True,
        )[:, 5:]
        ours = model.generate(
            ids, max_new_tokens=6, num_beams=3, length_penalty=penalty, stop_token_ids=stops
        )
        for mine, their in zip(ours.tolist(), theirs.tolist(), strict=True):
            ends = [n for n, token in enumerate(mine) if token in stops]
            length = ends[0] + 1 if ends else len(mine)
            assert mine[:length] == their[:length]
            assert set(their[length:]) <= {stops[0]}

    def test_a_batch_is_its_documents_one_by_one(self, model):
        ids, pixels, mask = documents()
        options = {"num_beams": 3, "max_new_tokens": 4, "stop_token_ids": [3, 30, 60, 61, 62]}
        new = model.generate(ids, pixels, mask, **options)
        for row, images in enumerate((2, 1, 0)):
            alone = ids[row, mask[row]][None]
            seen = pixels[row : row + 1, :images] if images else None
            found = model.generate(alone, seen, **options)
            assert torch.equal(found, new[row : row + 1, : found.shape[1]])
            assert (new[row, found.shape[1] :] == found[0, -1]).all()

    def test_one_beam_is_greedy(self, model):
        ids, pixels, mask = documents()
        context = Context(model)
        logits = context.read(ids, pixels, mask)
        found = beam_search(context, logits, num_beams=1, max_new_tokens=5)
        assert torch.equal(found, model.generate(ids, pixels, mask, max_new_tokens=5))

    def test_beams_share_the_media(self, plain):
        ids, pixels, mask = documents()
        sizes = []
        for module in plain.modules():
            if isinstance(module, MaskedCrossAttention):
                module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[1])))
        plain.generate(ids, pixels, mask, num_beams=4, max_new_tokens=3)
        assert set(sizes) == {3}


class Chain:
    """A `Context` of tokens that depend on the one before alone: a row of probabilities for each."""

    length = 0

    def __init__(self, rows, documents=1):
        self.logits, self.attention_mask = torch.tensor(rows).log(), torch.ones(documents, 0)

    def search(self, *first, **options):
        """The best texts, by the probabilities of each document's first token; token 1 ends a text."""
        logits = torch.tensor(first).log()
        return beam_search(self, logits, stop_token_ids=[1], **options).tolist()

    def add(self, tokens, mask=None):
        self.last = tokens[:, -1]

    def step(self):
        return self.logits[self.last]

    def reorder(self, rows):
        self.attention_mask = self.attention_mask[rows]

    def crop(self, length):
        assert length == 0


class TestBeamSearchByHand:
    def test_a_text_that_pays_only_when_long_is_waited_for(self):
        chain = Chain([[0.0, 0, 1]] * 3)
        for penalty, best in ((0.0, [1]), (2.0, [2, 2, 2, 2])):  # log 0.8 = -0.223, log 0.2 / 16 = -0.101
            options = {"num_beams": 2, "max_new_tokens": 4, "length_penalty": penalty}
            assert chain.search([0.0, 0.8, 0.2], **options) == [best]

    def test_a_text_that_pays_only_when_short_is_waited_for(self):
        # 2 log 0.75 = -0.575, and not 6 log 0.75 = -1.726; log 0.25 = -1.386
        chain = Chain([[0.0, 1, 0]] * 3)
        options = {"num_beams": 2, "max_new_tokens": 6, "length_penalty": -1.0}
        assert chain.search([0.0, 0.25, 0.75], **options) == [[2, 1]]

    def test_a_document_that_is_done_waits_for_the_others(self):
        chain = Chain([[0.0, 1, 0]] * 3, documents=2)
        found = chain.search([0.0, 1, 0], [0.0, 0, 1], num_beams=2, max_new_tokens=5)
        assert found == [[1, 1], [2, 1]]

    def test_all_beams_go_on_where_each_could_end(self):
        chain = Chain([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 0.6, 0.4, 0], [0.4, 0.6, 0, 0]])
        options = {"num_beams": 2, "max_new_tokens": 4, "length_penalty": 2.0}
        # 2 1 and 3 1 are likelier than 2 2 and 3 0, the last of which is the best when it is long.
        assert chain.search([0.0, 0, 0.55, 0.45], **options) == [[3, 0, 0, 0]]

    def test_half_precision_is_compared_in_float32(self):
        for best in range(0, 100, 7):
            logits = torch.zeros(1, 100, dtype=torch.bfloat16)
            logits[0, best] = 1e-3
            found = beam_search(Chain([[1.0]]), logits, num_beams=2, max_new_tokens=1)
            assert found.tolist() == [[best]]


def test_generation_asks_a_model_for_nothing_but_what_the_protocol_names(plain):
    names = [*Model.__annotations__, *(name for name in vars(Model) if not name.startswith("_"))]
    assert names == ["config", "resampler", "language", "encode_media", "decode"]
    other = SimpleNamespace(**{name: getattr(plain, name) for name in names})
    ids, pixels, mask = documents()
    for options in ({}, {"num_beams": 3}):
        found = generate(other, ids, pixels, mask, max_new_tokens=4, **options)
        assert torch.equal(found, plain.generate(ids, pixels, mask, max_new_tokens=4, **options))
    assert Context(other).read(torch.tensor([[20, 21]])).shape == (1, 101)  # without images: of the latents


class TestTurns:
    """More text and images after what was read and said."""

    def later(self):
        """For each document: two images, none, and one, after text that is padded on the left."""
        rows = [[20, IMAGE, 21, IMAGE, 22], [PAD, PAD, PAD, 23, 24], [PAD, 25, 26, IMAGE, 27]]
        ids = torch.tensor(rows)
        return ids, torch.randn(3, 2, 1, 3, 32, 32), ids != PAD

    def whole(self, said, row):
        """The document of a row from beginning to end, and its images."""
        (first, _, mask), (later, _, later_mask) = documents(), self.later()
        ids = torch.cat((first[row, mask[row]], said, later[row, later_mask[row]]))[None]
        counts = [(2, 2), (1, 0), (0, 1)][row]
        return ids, counts

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
    def test_as_if_all_had_been_read_at_once(self, model, options):
        if "MptForCausalLM" in str(type(getattr(model.language, "model", None))):
            pytest.skip("MPT has no positions that could be shifted")
        if getattr(getattr(model.language, "model", None), "config", None) and "Gemma" in str(model):
            pytest.skip("padding takes places in a sliding window")
        (ids, pixels, mask), (later, more, later_mask) = documents(), self.later()
        context = Context(model)
        free = generate(model, ids, pixels, mask, max_new_tokens=4, **options)
        stop = [free[1, 1].item()]  # one document says less than the others
        said = generate(
            model, ids, pixels, mask, max_new_tokens=4, stop_token_ids=stop, context=context, **options
        )
        logits = context.read(later, more, later_mask)
        for row in range(3):
            words = said[row].tolist()
            words = words[: words.index(stop[0]) + 1] if stop[0] in words else words
            whole, (one, two) = self.whole(torch.tensor(words), row)
            seen = torch.cat((pixels[row : row + 1, :one], more[row : row + 1, :two]), dim=1)
            with torch.no_grad():
                expected = model(whole, seen).logits[0, -1]
            expected[IMAGE] = -torch.inf
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, Context(model).read(later, more, later_mask))

    def test_nothing_is_read_or_encoded_twice(self, model):
        ids, pixels = torch.tensor([[5, IMAGE, 6, 7]]), torch.randn(1, 1, 1, 3, 32, 32)
        read = []
        embedding = (
            model.language.model.get_input_embeddings()
            if isinstance(model.language, PretrainedLanguage)
            else model.language.embedding
        )
        embedding.register_forward_hook(lambda module, args, out: read.extend(args[0].flatten().tolist()))
        vision, resampler = count(model.vision), count(model.resampler)
        context = Context(model)
        said = generate(model, ids, pixels, max_new_tokens=3, context=context)[0].tolist()
        more = generate(model, torch.tensor([[8, IMAGE, 9]]), pixels, max_new_tokens=2, context=context)
        generate(model, ids[:, :0], max_new_tokens=1, context=context)
        assert read == [5, IMAGE, 6, 7, *said, 8, IMAGE, 9, *more[0].tolist()]
        assert len(vision) == len(resampler) == 2
        assert context.length == len(read)

    def test_a_peek_is_forgotten(self, model):
        ids, pixels, mask = documents()
        context, texts = Context(model), [torch.randint(20, 90, (3, n)) for n in (2, 4)]
        context.read(ids, pixels, mask)
        for text in (*texts, texts[0]):
            with torch.no_grad():
                expected = model(
                    torch.cat((ids, text), dim=1), pixels, F.pad(mask, (0, text.shape[1]), value=True)
                ).logits[:, -text.shape[1] :]
            expected[..., IMAGE] = -torch.inf
            torch.testing.assert_close(context.peek(text), expected, rtol=1e-4, atol=1e-4)
        assert context.length == ids.shape[1]

    def test_without_images_at_first(self, model):
        ids = torch.tensor([[5, 6, 7]])
        context, pixels = Context(model), torch.randn(1, 1, 1, 3, 32, 32)
        context.read(ids)
        later = torch.tensor([[8, IMAGE, 9]])
        whole = naive(model, torch.cat((ids, later), dim=1), pixels, steps=3)
        assert torch.equal(generate(model, later, pixels, max_new_tokens=3, context=context), whole)

    def test_a_mistake_costs_nothing_that_was_said(self, plain):
        """What was added waits on, and the same turn can be read once it is right."""
        ids, pixels, mask = documents()
        found = []
        for mistake in (False, True):
            context = Context(plain)
            context.read(ids, pixels, mask)
            context.add(torch.tensor([[20], [21], [22]]))
            if mistake:
                for wrong in (
                    torch.tensor([[23, IMAGE]] * 3),
                    torch.tensor([[23]]),
                ):  # no image; one document
                    with pytest.raises(ValueError, match="expected"):
                        context.read(wrong)
            found.append(context.read(torch.tensor([[23], [24], [25]])))
        assert torch.equal(*found)


class TestCost:
    """What a token costs, counted."""

    def prompt(self, images):
        ids = torch.full((1, 24), 5)
        ids[:, torch.arange(images) * 2] = IMAGE
        return ids, torch.randn(1, images, 1, 3, 32, 32)

    def flops(self, model, images):
        """The FLOPs of one more token after a prompt of one length, whatever the number of its images."""
        context = Context(model)
        context.read(*self.prompt(images))
        context.add(torch.tensor([[7]]))
        with FlopCounterMode(display=False) as counter:
            context.step()
        return counter.get_total_flops()

    @pytest.mark.parametrize("kind", ["rotary", "relative", "llama"])
    def test_of_a_token_does_not_grow_with_images(self, kind, seed):
        model = build(kind)
        assert self.flops(model, 1) == self.flops(model, 3) == self.flops(model, 10) > 0

    def test_of_a_token_does_not_grow_with_text_but_for_attention(self, seed):
        """Nothing is projected again, with relative positions no distance either."""
        model, flops = build("relative"), []
        for length in (20, 40, 80):
            context = Context(model)
            context.read(torch.full((1, length), 5))
            context.add(torch.tensor([[7]]))
            with FlopCounterMode(display=False) as counter:
                context.step()
            flops.append(counter.get_total_flops())
        # Linear in the text: scores, values and distances of one row, twice two FLOPs a number each.
        slope = (flops[1] - flops[0]) // 20
        assert flops[2] - flops[1] == 40 * slope
        assert slope <= 3 * 2 * model.config.language_dim * model.config.language_layers

    @pytest.mark.parametrize("kind", ["rotary", "llama", "mpt"])
    def test_of_a_prompt_has_the_vocabulary_once(self, kind, seed):
        """Logits of the last token alone, the same as among those of all."""
        model, (ids, pixels) = build(kind), self.prompt(3)
        lm = model.language
        head = lm.model.get_output_embeddings() if isinstance(lm, PretrainedLanguage) else lm.head
        flops, logits = [], []
        model.requires_grad_(False)
        for read in (lambda: model(ids, pixels).logits[:, -1], lambda: Context(model).read(ids, pixels)):
            with FlopCounterMode(display=False) as counter:
                logits.append(read())
            flops.append(counter.get_total_flops())
        logits[0][:, IMAGE] = -torch.inf
        torch.testing.assert_close(logits[1], logits[0])
        assert flops[0] - flops[1] == 2 * head.weight.numel() * (ids.shape[1] - 1)

    @pytest.mark.parametrize("kind", ["rotary", "llama"])
    def test_media_are_encoded_once(self, kind, seed):
        model = build(kind)
        vision, resampler = count(model.vision), count(model.resampler)
        projected = [count(block.attn.to_kv) for block in model.cross_attn.values()]
        model.generate(*self.prompt(4), max_new_tokens=5)
        assert (len(vision), len(resampler)) == (1, 1)
        # The prompt's once; then each token the last image's alone, which a patched model keeps.
        assert [[len(args[0][0]) for args in calls] for calls in projected] == [[4, 1, 1, 1, 1]] * len(
            projected
        )

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
    def test_a_patched_model_says_the_same_and_projects_media_once(self, options, monkeypatch, model):
        from flamingo_kernels.media_cache import Source

        ids, pixels, mask = documents()
        expected = model.generate(ids, pixels, mask, max_new_tokens=5, **options)
        calls, project = [], Source.project
        monkeypatch.setattr(
            Source, "project", lambda self, media: calls.append(media.shape[:2]) or project(self, media)
        )
        with patch(model):
            assert torch.equal(model.generate(ids, pixels, mask, max_new_tokens=5, **options), expected)
        last = 1 if model.config.only_attend_immediate_media else 2
        blocks = len(model.cross_attn)
        in_resampler = [shape for shape in calls if shape not in ((3, 2), (3, last))]
        assert not in_resampler or model.resampler
        assert calls.count((3, 1)) == (blocks if last == 1 else 0)


class TestWrongUse:
    def test_documents_that_do_not_end_in_a_token(self, plain):
        ids, pixels, mask = documents()
        with pytest.raises(ValueError, match=r"padded on the right.*prompt=True"):
            plain.generate(ids, pixels, mask.flip(1))
        with pytest.raises(ValueError, match="empty"):
            plain.generate(ids[:, :0], pixels)

    def test_more_image_tokens_than_media(self, plain):
        ids, pixels, mask = documents()
        with pytest.raises(ValueError, match="got 2 tokens in a document and 1 media"):
            plain.generate(ids, pixels[:, :1], mask)
        with pytest.raises(ValueError, match="got 2 tokens in a document and 0 media"):
            plain.generate(ids, attention_mask=mask)

    def test_other_documents(self, plain):
        ids, pixels, mask = documents()
        context = Context(plain)
        context.read(ids, pixels, mask)
        with pytest.raises(ValueError, match="3 documents as before, got 2"):
            context.read(ids[:2, -1:])
        context = Context(plain)
        generate(plain, ids, pixels, mask, max_new_tokens=1, context=context)
        with pytest.raises(ValueError, match="3 documents as before, got 2"):
            context.read(ids[:2, -1:])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens to be 1 or more, got 0"),
            ({"num_beams": 0}, "num_beams to be 1 or more, got 0"),
            ({"temperature": -1.0}, "temperature to be 0 or more, got -1"),
            ({"temperature": 1.0, "top_k": 0}, "top_k to be 1 or more, or None, got 0"),
            ({"temperature": 1.0, "top_p": 1.5}, r"top_p to be more than 0 .*got 1\.5"),
            ({"temperature": 1.0, "top_p": 0.0}, r"top_p to be more than 0 .*got 0\.0"),
            ({"top_k": 3}, "temperature above 0 with top_k or top_p"),
            ({"temperature": 1.0, "num_beams": 2}, "beam search or sampling"),
        ],
    )
    def test_options(self, plain, options, message):
        with pytest.raises(ValueError, match=message):
            plain.generate(torch.tensor([[5]]), **options)

    def test_options_at_their_limits(self, plain):
        ids, options = torch.tensor([[5, 7]]), {"top_k": 1, "top_p": 1.0, "num_beams": 1}
        found = plain.generate(ids, max_new_tokens=1, temperature=1.0, **options)
        assert torch.equal(found, plain.generate(ids, max_new_tokens=1))

    def test_no_documents(self, plain):
        ids, pixels, mask = documents()
        assert plain.generate(ids[:0], pixels[:0], mask[:0]).shape == (0, 1)


def count(module):
    """The arguments of every call of a module."""
    calls = []
    module.register_forward_pre_hook(lambda module, args: calls.append(args))
    return calls
