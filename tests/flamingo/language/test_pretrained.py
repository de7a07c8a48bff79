"""Language models of transformers in a Flamingo: they notice nothing, and gradients pass."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flamingo import Flamingo, FlamingoConfig, PretrainedLanguage
from flamingo_kernels import patch
from tests.helpers.language_models import FAMILIES, LAYERS, VOCABULARY, WIDTH, build, tokens
from tests.helpers.weights import randomise

transformers = pytest.importorskip("transformers")

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # of logits in float32, which are about 1
IMAGE, EOC = VOCABULARY, VOCABULARY + 1
SIZES = {
    "language_dim": WIDTH,
    "language_layers": LAYERS,
    "language_heads": 4,
    "vocab_size": VOCABULARY + 2,
    "media_token_id": IMAGE,
    "resampler_depth": 1,
    "vision_layers": 1,
}


def flamingo(model, **changes):
    language = PretrainedLanguage(model, new_tokens=[IMAGE, EOC])
    return Flamingo(FlamingoConfig.preset("tiny", **SIZES | changes), language=language)


def open_gates(model):
    randomise(model.cross_attn, std=0.2)
    return model


@pytest.fixture(params=FAMILIES)
def lm(request, seed):
    return build(request.param)


def batch():
    ids = tokens(2, 9)
    ids[:, [2, 5]] = torch.tensor([IMAGE, EOC])
    return ids, torch.randn(2, 1, 1, 3, 32, 32)


class TestAlone:
    """Called like one's own decoder."""

    def test_logits_are_those_of_the_model(self, lm):
        ids = tokens(2, 9)
        bare = lm(input_ids=ids).logits
        assert torch.equal(PretrainedLanguage(lm)(ids), bare)
        mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
        bare = lm(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(PretrainedLanguage(lm)(ids, mask != 0)[mask != 0], bare[mask != 0])

    @pytest.mark.parametrize("pieces", [[6, 3], [4, 1, 1, 3]], ids=str)
    def test_a_cache_changes_nothing(self, lm, pieces):
        language, ids = PretrainedLanguage(lm), tokens(3, 9)
        mask = torch.ones(3, 9, dtype=torch.bool)
        mask[0, :3] = mask[1, 7:] = False
        for seen in (None, mask):
            cache, logits, read = language.new_cache(), [], 0
            for piece in pieces:
                until = None if seen is None else seen[:, : read + piece]
                logits.append(language(ids[:, read : read + piece], until, cache=cache))
                read += piece
            real = mask if seen is not None else torch.ones_like(mask)
            torch.testing.assert_close(torch.cat(logits, dim=1)[real], language(ids, seen)[real], **ROUNDING)

    @pytest.mark.parametrize("padding", [slice(0, 3), slice(3, 5)], ids=["left", "between"])
    def test_padding_changes_nothing(self, lm, padding):
        if padding.start and lm.config.model_type == "mpt":
            pytest.skip("MPT has no positions that could be shifted")
        if padding.start and getattr(lm.config, "sliding_window", None):
            pytest.skip("padding takes places in a sliding window")
        language, ids = PretrainedLanguage(lm), tokens(1, 8)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, padding] = False
        alone = language(ids[mask][None])[0]
        torch.testing.assert_close(language(ids, mask)[mask], alone, **ROUNDING)

    def test_logits_of_the_last_tokens(self, lm):
        """The model's own call has all of them again."""
        language, ids, rows = PretrainedLanguage(lm, new_tokens=[IMAGE]), tokens(2, 9), []
        whole = language(ids)
        lm.get_output_embeddings().register_forward_hook(
            lambda module, args, out: rows.append(args[0].shape[1])
        )
        for keep in (1, 4):
            torch.testing.assert_close(language(ids, logits_to_keep=keep), whole[:, -keep:], **ROUNDING)
        assert lm(input_ids=ids).logits.shape == (2, 9, VOCABULARY)
        assert rows == [1, 4, 9]

    def test_sizes(self, lm):
        language = PretrainedLanguage(lm)
        assert (language.dim, language.vocab_size, language.num_layers) == (WIDTH, VOCABULARY, LAYERS)
        assert len(language.layers) == LAYERS
        assert PretrainedLanguage(lm, new_tokens=[VOCABULARY]).vocab_size == VOCABULARY + 1

    def test_before_a_layer(self, lm):
        language, ids, seen = PretrainedLanguage(lm), tokens(2, 5), []

        def before_layer(index, x):
            seen.append((index, tuple(x.shape)))
            return x + 1 if index == 1 else x

        changed = language(ids, before_layer=before_layer)
        assert seen == [(i, (2, 5, WIDTH)) for i in range(LAYERS)]
        assert not torch.allclose(language(ids), changed)
        handle = language.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
        assert torch.equal(language(ids), changed)
        handle.remove()

    def test_the_model_goes_on_as_before(self, lm):
        ids = tokens(2, 5)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
        names, text = list(lm.state_dict()), lm.generate(ids, **options)
        modules = [type(module) for module in lm.modules()]
        model = open_gates(flamingo(lm))
        model(*batch())
        assert list(lm.state_dict()) == names
        assert [type(module) for module in lm.modules()] == modules
        assert torch.equal(lm.generate(ids, **options), text)
        assert lm(input_ids=ids).logits.shape[-1] == VOCABULARY


class TestInside:
    """With gated blocks before its layers."""

    def test_at_zero_the_language_model_speaks_alone(self, lm):
        model, ids = flamingo(lm), tokens(2, 9)
        bare = lm(input_ids=ids).logits
        logits = model(ids, batch()[1]).logits
        assert torch.equal(logits[..., :VOCABULARY], bare)
        assert not torch.allclose(open_gates(model)(*batch()).logits[..., :VOCABULARY], bare)

    def test_training_leaves_it_as_it_is(self, lm):
        before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
        model = open_gates(flamingo(lm)).freeze().train()
        ids, pixels = batch()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5
        )
        losses = []
        for _ in range(3):
            loss = model(ids, pixels, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert not any(module.training for module in lm.modules())
        assert all(parameter.grad is None for parameter in lm.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
        trained = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
        assert trained == {"cross_attn", "resampler", "language"}
        assert all(p.grad.abs().max() > 0 for p in model.language.new_tokens.parameters())

    def test_gradients_are_those_of_the_model_with_blocks_written_in(self, lm):
        model = open_gates(flamingo(lm, media_token_id=50)).freeze()
        ids, pixels = tokens(2, 9), batch()[1]
        ids[:, 2] = 50
        trained = [*model.cross_attn.parameters(), *model.resampler.parameters()]

        def gradients(logits):
            return torch.autograd.grad(logits[..., :VOCABULARY].square().mean(), trained)

        grads = gradients(model(ids, pixels).logits)
        media, locations = model.encode_media(pixels), ids == 50
        for index, block in model.cross_attn.items():
            model.language.layers[int(index)].register_forward_pre_hook(
                lambda module, args, block=block: (block(args[0], media, locations), *args[1:])
            )
        for grad, expected in zip(grads, gradients(lm(input_ids=ids).logits), strict=True):
            assert expected.abs().max() > 0
            torch.testing.assert_close(grad, expected)

    def test_new_tokens_have_the_rows_that_transformers_would_add(self, lm):
        """As after `resize_token_embeddings`, with the learnt rows in the new places."""
        language, ids = PretrainedLanguage(lm, new_tokens=[VOCABULARY, 7]), tokens(2, 6)
        ids[0, 2:4] = torch.tensor([VOCABULARY, 7])
        ours = language(ids)
        grown = copy.deepcopy(lm)
        grown.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
        with torch.no_grad():
            new = language.new_tokens
            grown.get_input_embeddings().weight[[VOCABULARY, 7]] = new.embedding
            if new.head is not None:
                grown.get_output_embeddings().weight[[VOCABULARY, 7]] = new.head
        tied = grown.get_output_embeddings().weight is grown.get_input_embeddings().weight
        assert tied == (new.head is None)
        torch.testing.assert_close(ours, grown(input_ids=ids).logits)

    def test_copies_and_pickles_stand_alone(self, lm):
        model, (ids, pixels) = open_gates(flamingo(lm)), batch()
        logits = model(ids, pixels).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids, pixels).logits, logits)
            randomise(twin)
            assert not torch.equal(twin(ids, pixels).logits, logits)
            assert torch.equal(model(ids, pixels).logits, logits)

    def test_patch_finds_its_modules(self, lm):
        model, (ids, pixels) = open_gates(flamingo(lm)), batch()
        logits = model(ids, pixels).logits
        with patch(model) as report:
            assert len(report.replaced) >= 2 * len(model.cross_attn)
            torch.testing.assert_close(model(ids, pixels).logits, logits, rtol=1e-3, atol=1e-4)


class TestCheckpointing:
    """Gradient checkpointing of the frozen model, which transformers does in training mode only."""

    def step(self, model, *batches):
        losses = [model(ids, pixels, labels=ids).loss for ids, pixels in batches]
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(sum(losses), trained, materialize_grads=True)

    def saved(self, model, ids, pixels):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, pixels, labels=ids)
        return kept

    @pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
    def test_gradients_are_the_same_and_less_is_kept(self, lm, options):
        model = open_gates(flamingo(lm)).freeze().train()
        inputs = batch()
        # Two forward passes before one backward: each runs again with its own images.
        other = (inputs[0].flip(0), inputs[1] + 1)
        expected, kept = self.step(model, inputs, other), self.saved(model, *inputs)
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        for got, grad in zip(self.step(model, inputs, other), expected, strict=True):
            torch.testing.assert_close(got, grad)
        assert self.saved(model, *inputs) < 0.8 * kept
        assert not any(module.training for module in lm.modules())
        assert torch.equal(model(*inputs).logits, model.eval()(*inputs).logits)

    def test_dropout_stays_off(self):
        """OPT's layers drop out by their own training flag."""
        model = open_gates(flamingo(build("opt", dropout=0.9))).freeze().train()
        model.language.model.gradient_checkpointing_enable()
        inputs = batch()
        for first, second in zip(self.step(model, inputs), self.step(model, inputs), strict=True):
            assert torch.equal(first, second)

    def test_it_trains_on_demand(self):
        lm = build("llama").train()
        lm.gradient_checkpointing_enable()
        language = PretrainedLanguage(lm, frozen=False).train()
        assert lm.training
        language(tokens(2, 5)).sum().backward()
        assert all(parameter.grad is not None for parameter in lm.parameters())
        assert all(module.training for module in lm.modules())
        assert not any(p.requires_grad for p in language.freeze().parameters())


class TestThreads:
    """Several requests at once, as to a server: each sees its own images."""

    @pytest.mark.parametrize("kernels", [False, True])
    def test_every_thread_gets_its_own_answer(self, kernels):
        model = open_gates(flamingo(build("opt"))).eval()
        if kernels:
            patch(model)
        batches = [batch() for _ in range(8)]

        @torch.no_grad()
        def answer(place):
            return model(*batches[place % 8]).logits

        alone = [answer(place) for place in range(8)]
        with ThreadPoolExecutor(8) as pool:
            for place, found in enumerate(pool.map(answer, range(80))):
                assert torch.equal(found, alone[place % 8])
        assert model.language._calls == {}

    def test_the_model_alone_is_called_in_another_thread(self):
        """While a call of ours is on, somebody else's sees no image."""
        model = open_gates(flamingo(build("llama"))).eval()
        ids = tokens(2, 9)
        with torch.no_grad():
            alone, found = model.language.model(input_ids=ids).logits, []

            def elsewhere(module, args):
                if not found:
                    with ThreadPoolExecutor(1) as pool, torch.no_grad():
                        found.append(pool.submit(lambda: model.language.model(input_ids=ids).logits).result())

            next(iter(model.cross_attn.values())).register_forward_pre_hook(elsewhere)
            model(*batch())
        assert torch.equal(found[0], alone)


class TestEnds:
    """A text longer than the model has positions for."""

    @pytest.mark.parametrize(("kind", "name"), [("opt", "max_position_embeddings"), ("mpt", "max_seq_len")])
    def test_both_lengths_are_named(self, kind, name):
        language = PretrainedLanguage(build(kind, **{name: 20}))
        assert language(tokens(2, 20)).shape == (2, 20, VOCABULARY)
        with pytest.raises(ValueError, match=f"a text of at most {name}=20 tokens, got one of 21"):
            language(tokens(2, 21))
        cache = language.new_cache()
        language(tokens(1, 18), cache=cache)
        language(tokens(1, 2), cache=cache)
        with pytest.raises(ValueError, match="=20 tokens, got one of 21"):
            language(tokens(1, 1), cache=cache)

    def test_padding_takes_no_position(self):
        language = PretrainedLanguage(build("opt", max_position_embeddings=20))
        mask = torch.ones(2, 25)
        mask[:, :5] = 0
        assert language(tokens(2, 25), mask).shape == (2, 25, VOCABULARY)
        mask[1, 4] = 1
        with pytest.raises(ValueError, match="=20 tokens, got one of 21"):
            language(tokens(2, 25), mask)

    def test_rotary_positions_have_no_end(self):
        assert PretrainedLanguage(build("llama", max_position_embeddings=8))(tokens(1, 9)).shape[1] == 9


def test_it_is_compiled_whole():
    model, (ids, pixels) = open_gates(flamingo(build("llama"))).freeze(), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, pixels).logits, model(ids, pixels).logits)


def test_another_family_by_the_path_of_its_layers():
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    lm = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel of type gpt2\. .*layers=\"transformer.h\""):
        PretrainedLanguage(lm)
    language = PretrainedLanguage(lm, layers="transformer.h", new_tokens=[IMAGE, EOC])
    model = Flamingo(FlamingoConfig.preset("tiny", **SIZES), language=language)
    assert not torch.allclose(model(*batch()).logits, open_gates(model)(*batch()).logits)
    with pytest.raises(ValueError, match="got Linear of type None"):
        PretrainedLanguage(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"language_dim": 48}, f"'language_dim': {WIDTH}"),
        ({"language_layers": 9}, f"'language_layers': {LAYERS}"),
        ({"vocab_size": VOCABULARY}, f"'vocab_size': {VOCABULARY + 2}"),
    ],
)
def test_a_configuration_of_other_sizes(changes, found):
    with pytest.raises(ValueError, match=rf"got PretrainedLanguage of .*{found}.*Change the configuration"):
        flamingo(build("llama"), **changes)
    with pytest.raises(ValueError, match=r"got LlamaForCausalLM of .*PretrainedLanguage"):
        Flamingo(FlamingoConfig.preset("tiny"), language=build("llama"))


def test_from_a_folder(tmp_path):
    lm = build("qwen2")
    lm.save_pretrained(tmp_path)
    language = PretrainedLanguage.from_pretrained(str(tmp_path), new_tokens=[IMAGE])
    ids = tokens(1, 5)
    torch.testing.assert_close(language(ids)[..., :VOCABULARY], lm(input_ids=ids).logits)
    assert language.vocab_size == IMAGE + 1


def test_a_frozen_model_in_half_precision():
    """Blocks in float32 promote their result; the frozen layers get their own dtype all the same."""
    model, seen = open_gates(flamingo(build("llama").bfloat16())), []
    for layer in model.language.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    ids, pixels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, pixels).logits
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
    assert set(seen) == {torch.bfloat16}
    assert all(block.attn_gate.grad.abs() > 0 for block in model.cross_attn.values())
    assert {p.dtype for p in model.cross_attn.parameters()} == {torch.float32}
