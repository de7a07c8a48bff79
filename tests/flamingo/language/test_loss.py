"""Losses in pieces: the numbers of the whole, without its logits; and whom they leave as it was."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from flamingo import LanguageModel, PretrainedLanguage
from flamingo.language import loss as losses
from flamingo.language.loss import sum_of_losses, sum_of_losses_in_pieces
from flamingo_kernels import patch
from tests.helpers.language_models import FAMILIES, VOCABULARY, build, tokens
from tests.helpers.logits import Logits
from tests.helpers.products import Products
from tests.helpers.weights import randomise

ROWS, WIDTH, VOCAB = 7, 16, 53
TOKENS = 2 * 39  # that have a next one


@pytest.fixture(autouse=True)
def few_rows(monkeypatch, seed):
    """Pieces of seven rows, the last of one or a few, in every vocabulary here."""
    monkeypatch.setattr(losses, "PIECE", ROWS * VOCAB)


def case(dtype=torch.float64, *, bias=True, frozen=True):
    """A head, hidden states and labels, a third of which are not learned."""
    head = randomise(nn.Linear(WIDTH, VOCAB, bias=bias)).to(dtype).requires_grad_(not frozen)
    x = (2 * torch.randn(2, 40, WIDTH)).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, 40))
    labels[:, ::3] = -100
    return head, x, labels


def in_pieces(head, x, labels):
    parameters = list(head.parameters())
    return sum_of_losses_in_pieces(head, x, labels, vocab_size=VOCAB, parameters=parameters)


def results(head, x, labels, compute=None, scale=0.125):
    """The loss and every gradient, as in a step: the loss is scaled after it was summed."""
    loss = in_pieces(head, x, labels) if compute is None else compute(head(x), labels)
    wanted = [t for t in (x, *head.parameters()) if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss * scale, wanted)]


def exact(head, x, labels):
    """In float64, written with nothing that the code under test has."""
    head, x = copy.deepcopy(head).double(), x.detach().double().requires_grad_()

    def compute(logits, labels):
        learned = [(b, t) for b in range(2) for t in range(39) if labels[b, t + 1] != -100]
        return -sum(logits[b, t].log_softmax(0)[labels[b, t + 1]] for b, t in learned)

    return results(head, x, labels, compute)


class TestNumbers:
    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_of_float64_are_exact(self, bias, frozen):
        given = case(bias=bias, frozen=frozen)
        found, expected = results(*given), exact(*given)
        assert len(found) == (2 if frozen else 3 + bias)
        for one, other in zip(found, expected, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        for one, other in zip(found, results(*given, sum_of_losses), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_of_other_dtypes_are_as_good_as_those_of_all_logits(self, dtype, frozen):
        given = case(dtype, frozen=frozen)
        expected = exact(*given)
        found, whole = results(*given), results(*given, sum_of_losses)
        assert [each.dtype for each in found] == [torch.float32] + [dtype] * (len(found) - 1)
        for one, plain, right in zip(found, whole, expected, strict=True):
            error, allowed = ((each.double() - right).norm() for each in (one, plain))
            assert error <= 1.2 * allowed + 4 * torch.finfo(torch.float32).eps * right.norm()

    def test_a_sum_of_bfloat16_has_all_bits_of_float32(self):
        """In torch's own `linear_cross_entropy` it has 8."""
        given = case(torch.bfloat16)
        rounded = sum_of_losses(given[0](given[1]).float(), given[2])
        torch.testing.assert_close(in_pieces(*given), rounded, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
    def test_under_autocast(self, frozen):
        given = case(torch.float32, frozen=frozen)
        expected = exact(*given)
        with torch.autocast("cpu", torch.bfloat16):
            found, whole = results(*given), results(*given, sum_of_losses)
        assert {each.dtype for each in found} == {torch.float32}
        for one, plain, right in zip(found, whole, expected, strict=True):
            error, allowed = ((each.double() - right).norm() for each in (one, plain))
            assert 0 < error <= 1.2 * allowed

    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
    def test_where_nothing_is_learned(self, frozen):
        """As in a process whose share of a batch has no target: zeros, not NaN."""
        head, x, labels = case(frozen=frozen)
        found = results(head, x, torch.full_like(labels, -100))
        assert all(each.eq(0).all() for each in found)
        assert [each.shape for each in found[1:2]] == [x.shape]

    def test_a_text_of_one_token_has_no_next_one(self):
        head, x, labels = case()
        assert in_pieces(head, x[:, :1], labels[:, :1]) == 0

    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
    @pytest.mark.parametrize("rows", [0.1, 1, 2, 51, 52, 53, 1000])
    def test_pieces_of_any_size(self, monkeypatch, rows, frozen):
        """A tenth of a row too: a vocabulary larger than a piece."""
        given = case(frozen=frozen)
        expected = results(*given, sum_of_losses)
        monkeypatch.setattr(losses, "PIECE", int(rows * VOCAB))
        for one, other in zip(results(*given), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def test_without_gradients(self):
        given = case()
        expected = in_pieces(*given)
        with torch.no_grad():
            loss = in_pieces(*given)
        assert torch.equal(loss, expected)
        assert not loss.requires_grad

    def test_gradients_add_up(self):
        """Over losses, and over passes through one."""
        head, x, labels = case(frozen=False)
        once = results(head, x, labels, scale=1)[1:]
        loss = in_pieces(head, x, labels)
        loss.backward(retain_graph=True)
        (2 * loss + in_pieces(head, x, labels)).backward()
        for each, gradient in zip((x, *head.parameters()), once, strict=True):
            torch.testing.assert_close(each.grad, 4 * gradient)

    def test_a_second_derivative_is_refused(self):
        head, x, labels = case()
        with pytest.raises(
            RuntimeError, match=r"without create_graph=True, got one with it.*loss_only=False"
        ):
            torch.autograd.grad(in_pieces(head, x, labels), x, create_graph=True)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_within_a_checkpoint(self, reentrant):
        given = case(frozen=False)
        expected = results(*given)
        loss = checkpoint(in_pieces, *given, use_reentrant=reentrant)
        assert torch.equal(loss, expected[0])
        (loss / 8).backward()
        for each, gradient in zip((given[1], *given[0].parameters()), expected[1:], strict=True):
            assert torch.equal(each.grad, gradient)


class TestMemory:
    @pytest.mark.parametrize("grad", [True, False])
    def test_no_more_logits_than_of_a_piece(self, grad):
        given = case()
        with Logits(VOCAB) as seen, torch.set_grad_enabled(grad):
            loss = in_pieces(*given)
            if grad:
                loss.backward()
        assert seen.rows == ROWS
        with Logits(VOCAB) as seen:
            sum_of_losses(given[0](given[1]), given[2])
        assert seen.rows == 2 * 40

    def test_a_frozen_head_has_no_gradient(self):
        for frozen in (True, False):
            given = case(frozen=frozen)
            with Products() as seen:
                in_pieces(*given).backward()
            pieces = -(-52 // ROWS) if frozen else -(-52 // WIDTH)
            assert len(seen.shapes) == (2 if frozen else 3) * pieces
            assert ((VOCAB, WIDTH) in seen.shapes) is not frozen
            assert (given[0].weight.grad is None) is frozen

    def test_what_is_kept_for_the_backward_pass(self):
        """The gradient of what was learned, in its own dtype, and nothing of the vocabulary's size."""
        head, x, labels = case(torch.bfloat16)
        loss = in_pieces(head, x, labels)
        (kept,) = loss.grad_fn.saved_tensors
        assert (kept.shape, kept.dtype) == (((labels[:, 1:] != -100).sum(), WIDTH), torch.bfloat16)

    def test_a_trained_head_has_as_few_gradients_as_its_size_says(self):
        """Each is as large as the head: pieces are so too."""
        head, x, labels = case(frozen=False, bias=False)
        with Logits(VOCAB) as seen:
            in_pieces(head, x, labels)
        assert seen.rows == WIDTH > ROWS

    def test_while_compile_traces_all_logits_are_made(self):
        given = case()
        compiled = torch.compile(in_pieces, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*given), in_pieces(*given))

    def test_a_hook_on_a_parameter_sees_one_gradient(self):
        head, x, labels = case(frozen=False)
        expected, seen = results(head, x, labels)[2], []
        head.weight.register_hook(seen.append)
        (in_pieces(head, x, labels) / 8).backward()
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], expected)


OWN = ("tied", "untied")
CAPPED = "gemma2"


def language(kind, *, new_tokens=(), frozen=True):
    """A language model of any kind, and its tokens and labels."""
    if kind in OWN:
        sizes = {"vocab_size": VOCABULARY, "dim": 32, "layers": 1, "heads": 2}
        model = randomise(LanguageModel(**sizes, tie_embeddings=kind == "tied", new_tokens=new_tokens), 0.2)
        model = model.freeze() if frozen else model
    else:
        model = PretrainedLanguage(build(kind), new_tokens=new_tokens, frozen=frozen).eval()
    model, ids = model.double(), tokens(2, 40)
    labels = ids.clone()
    labels[:, ::3] = -100
    for place, id in zip((4, 7, 10), new_tokens, strict=False):  # tokens that are learned
        ids[:, place] = labels[:, place] = id
    return model, ids, labels


def step(model, ids, labels, whole=False):
    """The loss, every gradient by name, and the most rows of logits at once."""
    shift = nn.Parameter(torch.zeros(model.dim, dtype=next(model.parameters()).dtype))
    model.zero_grad()
    with Logits(model.vocab_size) as seen:
        blocks = {"before_layer": lambda index, x: x + shift}
        loss = sum_of_losses(model(ids, **blocks), labels) if whole else model.loss(ids, labels, **blocks)
        (loss / 50).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {**gradients, "shift": shift.grad}, seen.rows


def assert_same(model, ids, labels, rounding=1e-9):
    """Loss and gradients are those of all logits, by one pass; returns the most rows of logits at once."""
    passes = []
    layer = model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    model.loss(ids, labels)
    layer.remove()
    assert len(passes) == 1
    (loss, found, rows), (whole, expected, all_rows) = (
        step(model, ids, labels, whole=each) for each in (False, True)
    )
    assert all_rows == ids.numel()
    assert found.keys() == expected.keys()
    torch.testing.assert_close(loss, whole, rtol=rounding, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=rounding, atol=rounding, msg=name)
    assert found["shift"].abs().max() > 0
    return rows


class TestLanguageModels:
    """PIECE is for 53 tokens: of some 101 a piece has three rows."""

    @pytest.mark.parametrize("new_tokens", [(), (VOCABULARY, 7, VOCABULARY + 1)], ids=["", "new tokens"])
    @pytest.mark.parametrize("kind", [*OWN, *FAMILIES])
    def test_losses_and_gradients_are_those_of_all_logits(self, kind, new_tokens):
        model, *given = language(kind, new_tokens=new_tokens)
        if kind == "mpt":  # whose mask, in transformers 4, does not exist in float64
            rows = assert_same(model.float(), *given, rounding=1e-4)
        else:
            rows = assert_same(model, *given)
        assert rows == (80 if kind == CAPPED else 3)

    @pytest.mark.parametrize("kind", [*OWN, "llama", "opt"])
    def test_of_a_trained_head_too(self, kind):
        assert assert_same(*language(kind, new_tokens=(7,), frozen=False)) == {"opt": 16}.get(
            kind, 32
        )  # the width

    @pytest.mark.parametrize("kind", ["untied", "llama"])
    def test_a_head_by_our_linear(self, kind):
        model, *given = language(kind)
        assert any("head" in path for path in patch(model.float(), linears=True).linears)
        assert assert_same(model, *given, rounding=1e-4) == 3

    def test_padding(self):
        for kind in ("tied", "opt"):
            model, ids, labels = language(kind)
            mask = torch.ones_like(ids)
            mask[1, :10], labels[1, :11] = 0, -100
            whole = sum_of_losses(model(ids, mask), labels)
            torch.testing.assert_close(model.loss(ids, labels, mask), whole)
            assert not torch.allclose(model.loss(ids, labels), whole)

    def test_an_ordinary_call_afterwards(self):
        """The head has all its tokens again, and nothing is kept."""
        for kind in ("tied", "llama"):
            model, ids, labels = language(kind, new_tokens=(7,))
            before = model(ids)
            model.loss(ids, labels)
            assert torch.equal(model(ids), before)
        assert model._calls == {}
        assert model.model(input_ids=ids).logits.shape == (2, 40, VOCABULARY)

    def test_an_uncapped_gemma_is_as_others(self):
        lm = build(CAPPED, final_logit_softcapping=None).double()
        _, *given = language("llama")
        assert assert_same(PretrainedLanguage(lm), *given) == 3


def _hook(module):
    module.register_forward_hook(lambda module, args, out: 0.5 * out)


def _forward_on_the_instance(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: 0.5 * forward(*args, **kwargs)


class Halved(nn.Linear):
    """As an adapter is: a linear layer of another kind."""

    def forward(self, x):
        return 0.5 * super().forward(x)


class Half(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


class HalfLanguage(LanguageModel):
    def forward(self, *args, **kwargs):
        return 0.5 * super().forward(*args, **kwargs)


def head_of(model):
    return model.head if isinstance(model, LanguageModel) else model.model.get_output_embeddings()


# What is done to a model, by which its logits are halved.
HALVED = {
    "a hook on the head": lambda model: _hook(head_of(model)),
    "a hook on the model": _hook,
    "a head of another kind": lambda model: setattr(head_of(model), "__class__", Halved),
    "a parametrised head": lambda model: parametrize.register_parametrization(
        head_of(model), "weight", Half()
    ),
    "a forward of the head's own": lambda model: _forward_on_the_instance(head_of(model)),
}


class TestSeenByOthers:
    """Where anything else makes or sees logits, there are all of them, and the loss is of these."""

    @pytest.mark.parametrize("kind", ["untied", "llama"])
    @pytest.mark.parametrize("change", HALVED.values(), ids=list(HALVED))
    def test_a_changed_head(self, kind, change):
        model, ids, labels = language(kind)
        before = model(ids)
        change(model)
        torch.testing.assert_close(model(ids), 0.5 * before)
        assert assert_same(model, ids, labels) == 80

    def test_a_parametrised_embedding_that_is_the_head(self):
        model, *given = language("tied", frozen=False)
        parametrize.register_parametrization(model.embedding, "weight", Half())
        assert assert_same(model, *given) == 80

    def test_a_hook_on_the_embedding_that_is_the_head(self):
        model, ids, labels = language("tied")
        before = model(ids)
        model.embedding.register_forward_hook(
            lambda module, args, out: 0.5 * out if args[0].is_floating_point() else out
        )
        torch.testing.assert_close(model(ids), 0.5 * before)
        assert assert_same(model, ids, labels) == 80

    def test_a_hook_on_all_modules(self):
        seen = []
        for kind in (*OWN, "llama"):
            model, ids, labels = language(kind)
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, args, out: seen.append(type(module).__name__)
            )
            rows = assert_same(model, ids, labels)
            handle.remove()
            assert rows == 80
        assert "Linear" in seen

    def test_a_subclass(self):
        model, ids, labels = language("tied")
        model.__class__ = HalfLanguage
        assert assert_same(model, ids, labels) == 80

    def test_a_hook_on_the_model_of_transformers(self):
        model, ids, labels = language("llama")
        before = model(ids)

        def halve(module, args, out):
            out.logits = 0.5 * out.logits

        model.model.register_forward_hook(halve)
        torch.testing.assert_close(model(ids), 0.5 * before)
        assert assert_same(model, ids, labels) == 80

    def test_a_class_of_somebody_else(self):
        """Which may do more after the head."""
        lm = build("llama").double()

        class Scaled(type(lm)):
            @functools.wraps(type(lm).forward)
            def forward(self, *args, **kwargs):
                out = super().forward(*args, **kwargs)
                out.logits = 0.5 * out.logits
                return out

        lm.__class__ = Scaled
        _, *given = language("llama")
        assert assert_same(PretrainedLanguage(lm), *given) == 80

    def test_a_release_that_goes_on_after_the_head(self, monkeypatch):
        model, ids, labels = language("llama")
        cls = type(model.model)
        forward = cls.forward

        def longer(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = 0.5 * out.logits
            return out

        expected = 0.5 * model(ids)
        monkeypatch.setattr(cls, "forward", longer)
        torch.testing.assert_close(model.loss(ids, labels), sum_of_losses(expected, labels))

    def test_another_family(self):
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4}
        lm = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval().double()
        _, *given = language("llama")
        assert assert_same(PretrainedLanguage(lm, layers="transformer.h"), *given) == 80

    def test_an_adapter_on_the_head(self):
        peft, lm = pytest.importorskip("peft"), build("llama").double()
        lora = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        _, *given = language("llama")
        model = PretrainedLanguage(peft.inject_adapter_in_model(lora, lm), frozen=False).eval()
        assert assert_same(model, *given) == 80

    def test_an_adapter_elsewhere(self):
        peft, lm = pytest.importorskip("peft"), build("llama").double()
        lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        _, *given = language("llama")
        model = PretrainedLanguage(peft.inject_adapter_in_model(lora, lm), frozen=False).eval()
        lm.lm_head.requires_grad_(False)
        assert assert_same(model, *given) == 3
