"""Attention with a dense mask that is read when it runs: every kind of mask, compiled and not."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from flamingo_kernels import use_backend
from flamingo_kernels.ops.masked_cross_attention import schema as masked
from flamingo_kernels.ops.perceiver_attention import schema as perceiver
from flamingo_kernels.patch import dense, dense_attention
from flamingo_kernels.patch.dense_attention import dense_cross_attention, dense_perceiver_attention
from tests.flamingo_kernels.patch.test_dense import LOWEST, added, keys
from tests.helpers.parity import assert_parity

ATTENTIONS = [True, False]  # "sdpa" and "eager"
CUT = ("######......", "......######", "############")  # media of 6 keys
APART = ("####....####", "............", "########....", "....####....")
BLIND = "a row that sees nothing though it may"
# By name: a mask of two sequences, whether every row may see something, and whether a kernel takes it.
MASKS = {
    "one image each": (torch.cat([keys(*CUT[:2]), keys(*CUT[:2])]), True, True),
    "several images": (torch.cat([keys(*CUT), keys(*CUT[::-1])]), True, True),
    "rows that must see nothing": (torch.cat([keys(*APART[1:]), keys(*APART[1:])]), False, True),
    "an unused image between two": (torch.cat([keys(APART[0]), keys(APART[0])]), True, True),
    "a gap": (torch.cat([keys(*APART), keys(*APART)]), False, False),
    BLIND: (torch.cat([keys(CUT[0], APART[1])] * 2), True, False),
}
kinds = pytest.mark.parametrize("kind", MASKS)
sdpa = pytest.mark.parametrize("sdpa", ATTENTIONS, ids=["sdpa", "eager"])


class Plain(nn.Module):
    """The original: every score, a mask that is added, a softmax."""

    def __init__(self, mask: torch.Tensor, rows: torch.Tensor | None = None):
        super().__init__()
        self.register_buffer("mask", mask)
        self.rows = rows

    def forward(self, q, k, v):
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        s = torch.einsum("bthd,bshd->bhts", q, k) * 0.3 + self.mask
        out = torch.einsum("bhts,bshd->bthd", s.softmax(-1), v)
        return out if self.rows is None else out.where((self.rows != 0)[..., None, None], 0)


class Dense(Plain):
    """The same by the operator."""

    def __init__(self, *args, sdpa: bool = True):
        super().__init__(*args)
        self.sdpa = sdpa

    def forward(self, q, k, v):
        return dense_cross_attention(q, k, v, self.mask, self.rows, scale=0.3, sdpa=self.sdpa)


class PlainPerceiver(Plain):
    def forward(self, q, k_media, v_media, k_latents, v_latents):
        kv = torch.cat([k_media, k_latents], dim=1), torch.cat([v_media, v_latents], dim=1)
        return super().forward(q, *kv)


class DensePerceiver(Dense):
    def forward(self, *tensors):
        return dense_perceiver_attention(*tensors, self.mask, scale=0.3, sdpa=self.sdpa)


@pytest.fixture(autouse=True)
def forget():
    """What was compiled, and what was read."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def launched(monkeypatch):
    """The names of the operations of kernels that run."""
    calls = []
    for home in (masked, perceiver):
        for operations in (home.FWD, home.BWD):
            for backend, operation in list(operations.items()):

                def call(*args, operation=operation):
                    calls.append(operation.name())
                    return operation(*args)

                monkeypatch.setitem(operations, backend, call)
    return calls


def of(kind: str):
    """A mask as it is added, its rows, and whether a kernel takes it."""
    visible, all_see, spans = MASKS[kind]
    return added(visible), None if all_see else visible.any(-1).float(), spans


def shapes(mask: torch.Tensor, kv_heads: int = 2):
    batch, _, length, count = mask.shape
    return (batch, length, 4, 16), (batch, count, kv_heads, 16), (batch, count, kv_heads, 16)


def assert_as_torch(mask: torch.Tensor):
    """The gradients of torch's own attention, which are not those of a softmax where a row sees nothing."""
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes(mask, kv_heads=4))
    out = dense_cross_attention(q, k, v, mask, scale=0.3, sdpa=True)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(each.square().sum(), (q, k, v)) for each in (out, expected))
    torch.testing.assert_close(*grads)


class TestCrossAttention:
    @kinds
    @sdpa
    def test_forward_and_gradients(self, kind, sdpa, kernels, launched):
        mask, rows, spans = of(kind)
        if sdpa and kind == BLIND:
            return assert_as_torch(mask)
        with use_backend(kernels):
            assert_parity(Plain(mask, rows), Dense(mask, rows, sdpa=sdpa), *shapes(mask))
        assert bool(launched) == spans

    @kinds
    def test_as_one_graph(self, kind, compiled):
        mask, rows, _ = of(kind)
        module = Dense(mask, rows, sdpa=kind != BLIND)
        module.compile(backend="aot_eager", fullgraph=True)
        assert_parity(Plain(mask, rows), module, *shapes(mask))

    @sdpa
    def test_a_bias(self, sdpa, compiled, launched):
        bias = torch.randn(2, 1, 3, 12)
        assert_parity(Plain(bias), Dense(bias, sdpa=sdpa), *shapes(bias))
        assert not launched

    def test_a_bool_mask(self, compiled):
        visible = MASKS["several images"][0][:, None]
        assert_parity(Plain(added(visible[:, 0])), Dense(visible), *shapes(visible))

    def test_more_keys_than_a_medium_may_have(self, compiled, launched):
        mask = added(torch.arange(1024) < torch.tensor([[[512], [1024]]]))
        assert_parity(Plain(mask), Dense(mask), *shapes(mask))
        assert launched

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_halves(self, dtype, compiled, launched):
        mask = of("several images")[0]
        mask = mask.clamp(min=torch.finfo(dtype).min).to(dtype)
        assert_parity(Plain(mask), Dense(mask), *shapes(mask), dtype=dtype)
        assert launched

    def test_float64_has_no_kernel(self, launched):
        mask = of("several images")[0]
        assert_parity(Plain(mask), Dense(mask), *shapes(mask), dtype=torch.float64)
        assert not launched

    def test_rows_of_minus_infinity(self, compiled):
        """torch's own attention gives such a row 0, a softmax NaN: each as the original."""
        mask = torch.zeros(1, 1, 2, 4)
        mask[0, 0, 1] = -torch.inf
        q, k, v = (torch.randn(shape) for shape in shapes(mask))
        assert dense_cross_attention(q, k, v, mask, scale=1.0, sdpa=False)[0, 1].isnan().all()
        assert not dense_cross_attention(q, k, v, mask, scale=1.0, sdpa=True)[0, 1].any()

    def test_a_mask_that_changes_in_ways_that_are_not_counted(self, compiled):
        """As the memory of a compiled model does: which tensor it is says nothing."""
        mask, _, _ = of("several images")
        q, k, v = (torch.randn(shape) for shape in shapes(mask))
        call = lambda: dense_cross_attention(q, k, v, mask, scale=0.3, sdpa=True)  # noqa: E731
        first = call()
        mask.data.copy_(mask.flip(0))
        torch.testing.assert_close(call(), Plain(mask)(q, k, v))
        assert not torch.allclose(call(), first)

    def test_a_mask_is_read_once_for_all_layers(self, compiled, monkeypatch):
        reads, read = [], dense_attention.read_spans
        monkeypatch.setattr(dense_attention, "read_spans", lambda *given: reads.append(1) or read(*given))
        mask, _, _ = of("several images")
        q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes(mask))
        for _ in range(2):
            out = dense_cross_attention(q, k, v, mask.clone(), scale=0.3, sdpa=True)
            out.sum().backward()
        assert len(reads) == 1
        monkeypatch.setattr(dense_attention, "_LARGEST_COPY", 0)
        dense_cross_attention(q, k, v, mask, scale=0.3, sdpa=True).sum().backward()
        assert len(reads) == 3

    def test_nothing_is_read_while_a_graph_is_captured(self, compiled, monkeypatch, launched):
        monkeypatch.setattr(dense_attention, "is_recording", lambda _: True)
        mask, _, _ = of("several images")
        assert_parity(Plain(mask), Dense(mask), *shapes(mask))
        assert not launched

    def test_other_lengths(self, compiled, launched):
        """One graph for all of them, with the numbers of each."""
        counter = CompileCounterWithBackend("aot_eager")

        @functools.partial(torch.compile, backend=counter, fullgraph=True, dynamic=True)
        def forward(q, k, v, mask):
            return dense_cross_attention(q, k, v, mask, scale=0.3, sdpa=True)

        for length, count in ((3, 12), (5, 8), (7, 300)):
            seen = torch.arange(count) < torch.randint(1, 5, (2, length, 1)) * (count // 4)
            mask = added(seen)
            q, k, v = (torch.randn(shape) for shape in shapes(mask))
            torch.testing.assert_close(forward(q, k, v, mask), Plain(mask)(q, k, v))
        assert counter.frame_count == 1
        assert len(launched) == 3

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"mask": torch.zeros(2, 1, 3, 11)}, r"expected mask with shape \(2, 1, 3, 12\)"),
            ({"mask": torch.zeros(2, 4, 3, 12)}, r"expected mask with shape \(2, 1, 3, 12\)"),
            ({"rows": torch.ones(2, 4)}, r"expected rows with shape \(2, 3\)"),
            ({"k": torch.zeros(2, 12, 3, 16)}, "multiple of the heads of k, got 3"),
            ({"v": torch.zeros(2, 11, 2, 16)}, r"expected v with shape \(2, 12, 2, 16\)"),
        ],
    )
    @pytest.mark.parametrize("raw", [True, False])
    def test_tensors_that_do_not_fit(self, change, message, raw, compiled):
        mask, _, _ = of("several images")
        given = dict(zip("qkv", map(torch.zeros, shapes(mask)), strict=True))
        given |= {"mask": mask, "rows": torch.ones(2, 3), **change}
        if "v" not in change and "k" in change:
            given["v"] = given["k"]
        if raw:
            call = lambda: dense_attention._CROSS.fwd(*given.values(), "cpu", True, 0.3)  # noqa: E731
        else:
            call = lambda: dense_cross_attention(**given, scale=0.3, sdpa=True)  # noqa: E731
        with pytest.raises(ValueError, match=message):
            call()

    def test_another_dtype(self, compiled):
        mask, _, _ = of("several images")
        q, k, v = map(torch.zeros, shapes(mask))
        with pytest.raises(TypeError, match=r"expected k in torch\.float32 like q"):
            dense_cross_attention(q, k.half(), v, mask, scale=0.3, sdpa=True)


SEEN = torch.tensor([[1, 0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])  # 4 media, 3 latents
HIDDEN = torch.tensor([[1, 1, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1, 1]])  # a latent too
PADDING = {
    "among the media": (SEEN, True),
    "behind the media": (SEEN[:, [0, 2, 1, 3, 4, 5, 6]], True),
    "a hidden latent": (HIDDEN, False),
}


def perceiver_shapes(length: int = 3):
    return (2, length, 4, 16), (2, 4, 2, 16), (2, 4, 2, 16), (2, 3, 2, 16), (2, 3, 2, 16)


class TestPerceiverAttention:
    @pytest.mark.parametrize("kind", PADDING)
    @pytest.mark.parametrize("rows", [1, 3])
    @sdpa
    def test_forward_and_gradients(self, kind, rows, sdpa, kernels, launched):
        seen, padding = PADDING[kind]
        mask = added(seen.bool()[:, None].expand(-1, rows, -1))
        with use_backend(kernels):
            assert_parity(PlainPerceiver(mask), DensePerceiver(mask, sdpa=sdpa), *perceiver_shapes())
        assert bool(launched) == padding

    @pytest.mark.parametrize("kind", PADDING)
    def test_a_mask_of_ones(self, kind, compiled, launched):
        """As the original of Evolla has it; half a one hides a key."""
        seen, padding = PADDING[kind]
        ones = seen.float().where(seen == 1, 0.5)
        mask = added(seen.bool()[:, None])
        assert_parity(PlainPerceiver(mask), DensePerceiver(ones, sdpa=False), *perceiver_shapes())
        assert bool(launched) == padding

    def test_rows_that_differ(self, compiled, launched):
        visible = torch.stack([SEEN, HIDDEN, SEEN], dim=1).bool()
        mask = added(visible)
        assert_parity(PlainPerceiver(mask), DensePerceiver(mask), *perceiver_shapes())
        assert not launched

    @pytest.mark.parametrize("kind", PADDING)
    def test_as_one_graph(self, kind, compiled):
        mask = added(PADDING[kind][0].bool()[:, None])
        module = DensePerceiver(mask)
        module.compile(backend="aot_eager", fullgraph=True)
        assert_parity(PlainPerceiver(mask), module, *perceiver_shapes())

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.zeros(2, 1, 2, 7), r"expected mask with shape \(2, 1, 3, 7\)"),
            (torch.zeros(2, 6), r"expected mask with shape \(2, 7\)"),
        ],
    )
    def test_a_mask_that_does_not_fit(self, mask, message, compiled):
        with pytest.raises(ValueError, match=message):
            dense_perceiver_attention(*map(torch.zeros, perceiver_shapes()), mask, scale=0.3, sdpa=True)


class TestRegistered:
    """Inputs without requires_grad: autograd is not registered on the operations but wraps them."""

    @pytest.mark.parametrize("kind", ["one image each", "several images", "a gap"])
    def test_cross_attention(self, kind, compiled):
        mask, rows, _ = of(kind)
        q, k, v = (torch.randn(shape) for shape in shapes(mask))
        operator, options = dense_attention._CROSS, (compiled, True, 0.3)
        torch.library.opcheck(operator.fwd, (q, k, v, mask, rows, *options))
        out, softmax = operator.fwd(q, k, v, mask, rows, *options)
        torch.library.opcheck(operator.bwd, (q, q, k, v, mask, rows, out, softmax, *options))

    @pytest.mark.parametrize("kind", PADDING)
    def test_perceiver_attention(self, kind, compiled):
        mask = added(PADDING[kind][0].bool()[:, None])
        tensors = [torch.randn(shape) for shape in perceiver_shapes()]
        operator, options = dense_attention._PERCEIVER, (compiled, True, 0.3)
        torch.library.opcheck(operator.fwd, (*tensors, mask, *options))
        out, softmax = operator.fwd(*tensors, mask, *options)
        torch.library.opcheck(operator.bwd, (out, *tensors, mask, out, softmax, *options))

    def test_a_captured_graph_has_none(self):
        """It would repeat what one mask said."""
        for operator in (dense_attention._CROSS, dense_attention._PERCEIVER):
            assert torch.Tag.cudagraph_unsafe in operator.fwd.tags
            assert torch.Tag.cudagraph_unsafe in operator.bwd.tags


class TestWhenAMaskIsRead:
    """By a compiled model alone, and only where a kernel may gain by it."""

    def asked(self, mask, length=None, rows=None, sdpa=True, **options) -> bool:
        found = []

        def ask(mask, rows):
            text = torch.empty(mask.shape[0], length or mask.shape[-2], 0)
            found.append(dense.reads_when_run(mask, text, rows, sdpa=sdpa))
            return mask + 1

        torch.compile(ask, backend="eager", fullgraph=True, **options)(mask, rows)
        return found[0]

    def test_a_prompt(self):
        assert self.asked(added(keys(*CUT)))
        assert not dense.reads_when_run(added(keys(*CUT)), torch.empty(1, 3, 0), sdpa=True)

    def test_a_step(self):
        assert not self.asked(added(keys(CUT[0])))

    def test_tiles_of_a_prime_number_of_tokens(self):
        assert self.asked(torch.zeros(1, 1, 2, 4 * 1601))

    def test_kinds_of_masks(self):
        visible = keys(*CUT)[:, None]
        assert self.asked(visible)
        assert not self.asked(visible, sdpa=False)  # "eager" adds ones
        assert not self.asked(visible.long())
        assert not self.asked(added(keys(*CUT)).requires_grad_())
        assert not self.asked(added(keys(*CUT)).expand(1, 2, 3, 12))
        assert not self.asked(added(keys(*CUT)), length=4)
        assert not self.asked(added(keys(*CUT)), rows=torch.ones(1, 4))
        assert not self.asked(torch.zeros(1, 1, 3, 0))

    def test_of_a_resampler(self):
        found = []

        def ask(*masks):
            media, latents = torch.empty(2, 4, 0), torch.empty(2, 3, 0)
            for mask in masks:
                found.append(dense.reads_padding_when_run(mask, media, latents, sdpa=True))
            return masks[0] + 1

        masks = SEEN, torch.full((2, 1, 3, 7), LOWEST), SEEN[:, None, None], SEEN[:, :6], SEEN[:1]
        torch.compile(ask, backend="eager", fullgraph=True)(*masks)
        assert found == [True, True, False, False, False]
        ask(*masks)
        assert not any(found[5:])
