"""Which row sees which medium, and what the gated block makes of it."""

import copy
import pickle

import pytest
import torch

from flamingo import GatedCrossAttentionBlock, MaskedCrossAttention, dense_masked_attention, text_time
from tests.helpers.weights import gradcheck, randomise

F64 = torch.float64

# Eight tokens and three media, though there are four <image> tokens.
LOCATIONS = [0, 1, 0, 1, 1, 0, 1, 0]
TIMES = [0, 1, 1, 2, 3, 3, 4, 4]
# Columns are tokens, lines are media: x seen, . not seen, and * for v averaged over every key.
SEEN = {
    (True, "zero"): [
        ".xx.....",
        "...x....",
        "....xx..",
    ],
    (True, "open_flamingo"): [
        ".xx...**",
        "...x..**",
        "....xx**",
    ],
    (False, "zero"): [
        ".xxxxxxx",
        "...xxxxx",
        "....xxxx",
    ],
    (False, "open_flamingo"): [
        "*xxxxxxx",
        "*..xxxxx",
        "*...xxxx",
    ],
}
MODES = pytest.mark.parametrize(("only_immediate", "policy"), SEEN)


def heads(batch=1, tokens=8, media=3, latents=4, heads=2, dim_head=5, dtype=F64):
    """Random q `[B, T, H, d]`, k and v `[B, M, R, H, d]`."""
    q = torch.randn(batch, tokens, heads, dim_head, dtype=dtype, requires_grad=True)
    k = torch.randn(batch, media, latents, heads, dim_head, dtype=dtype, requires_grad=True)
    v = torch.randn(batch, media, latents, heads, dim_head, dtype=dtype, requires_grad=True)
    return q, k, v


def attend_row(q, k, v, drawing):
    """One row by hand: q `[H, d]`, k and v `[M, R, H, d]`, drawing `[M]` of x . *."""
    if "*" in drawing:
        return v.mean(dim=(0, 1))
    seen = [m for m, mark in enumerate(drawing) if mark == "x"]
    if not seen:
        return torch.zeros_like(q)
    k, v = k[seen].flatten(0, 1), v[seen].flatten(0, 1)  # [S, H, d]
    weights = ((k * q).sum(-1) / q.shape[-1] ** 0.5).softmax(dim=0)  # [S, H]
    return (weights[..., None] * v).sum(dim=0)


class TestTextTime:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
    def test_counts_media_up_to_and_including_each_token(self, dtype):
        assert text_time(torch.tensor([LOCATIONS], dtype=dtype)).tolist() == [TIMES]

    def test_any_non_zero_marks_one_medium(self):
        assert text_time(torch.tensor([LOCATIONS]) * -7).tolist() == [TIMES]

    def test_cached_counts_all_for_every_query(self):
        locations = torch.tensor([LOCATIONS, [0] * 8])
        assert text_time(locations, use_cached_media=True, length=3).tolist() == [[4, 4, 4], [0, 0, 0]]

    def test_other_length_needs_the_cache(self):
        with pytest.raises(ValueError, match=r"expected media_locations with shape \(B, 5\).*got \(1, 8\)"):
            text_time(torch.tensor([LOCATIONS]), length=5)


class TestDenseMaskedAttention:
    @MODES
    def test_rows_as_drawn(self, only_immediate, policy):
        q, k, v = heads()
        out = dense_masked_attention(
            q, k, v, torch.tensor([TIMES]), only_immediate=only_immediate, policy=policy
        )
        drawn = zip(*SEEN[only_immediate, policy], strict=True)
        for row, drawing in enumerate(drawn):
            torch.testing.assert_close(out[0, row], attend_row(q[0, row], k[0], v[0], drawing))
            if set(drawing) == {"."}:
                assert (out[0, row] == 0).all()

    @MODES
    def test_gradients_as_drawn(self, only_immediate, policy):
        q, k, v = heads()
        upstream = torch.randn_like(q)
        out = dense_masked_attention(
            q, k, v, torch.tensor([TIMES]), only_immediate=only_immediate, policy=policy
        )
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        drawn = zip(*SEEN[only_immediate, policy], strict=True)
        rows = [attend_row(q[0, t], k[0], v[0], drawing) for t, drawing in enumerate(drawn)]
        expected = torch.autograd.grad(torch.stack(rows)[None], (q, k, v), upstream)
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, wanted)

    @MODES
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_empty_rows_are_finite_in_every_dtype(self, only_immediate, policy, dtype):
        q, k, v = heads(dtype=dtype)
        out = dense_masked_attention(
            q * 50, k, v, torch.tensor([TIMES]), only_immediate=only_immediate, policy=policy
        )
        out.sum().backward()
        assert out.dtype == dtype
        assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad))
        empty = [set(column) == {"."} for column in zip(*SEEN[only_immediate, policy], strict=True)]
        assert (out[0, empty] == 0).all()
        assert (q.grad[0, empty] == 0).all()

    def test_an_unseen_medium_gets_no_gradient(self):
        q, k, v = heads()
        dense_masked_attention(q, k, v, torch.tensor([[0, 1, 1, 1, 3, 3, 3, 3]])).square().sum().backward()
        assert (k.grad[0, 1] == 0).all()
        assert (v.grad[0, 1] == 0).all()
        assert (k.grad[0, [0, 2]] != 0).any(dim=-1).all()

    def test_without_text_time_every_row_sees_every_medium(self):
        q, k, v = heads()
        out = dense_masked_attention(q, k, v, None)
        for row in range(8):
            torch.testing.assert_close(out[0, row], attend_row(q[0, row], k[0], v[0], "xxx"))

    def test_scale(self):
        q, k, v = heads()
        times = torch.tensor([TIMES])
        default = dense_masked_attention(q, k, v, times)
        torch.testing.assert_close(dense_masked_attention(q, k, v, times, scale=5**-0.5), default)
        assert not torch.allclose(dense_masked_attention(q, k, v, times, scale=1.0), default)
        same = dense_masked_attention(torch.zeros_like(q), k, v, times)
        torch.testing.assert_close(dense_masked_attention(q, k, v, times, scale=0.0), same)

    @MODES
    @pytest.mark.parametrize(
        ("batch", "tokens", "media", "latents"), [(0, 8, 3, 4), (1, 0, 3, 4), (1, 8, 0, 4), (1, 8, 3, 0)]
    )
    def test_nothing_gives_nothing(self, only_immediate, policy, batch, tokens, media, latents):
        q, k, v = heads(batch, tokens, media, latents)
        times = torch.tensor([TIMES])[:batch, :tokens]
        out = dense_masked_attention(q, k, v, times, only_immediate=only_immediate, policy=policy)
        out.sum().backward()
        assert out.shape == q.shape
        assert (out == 0).all()
        assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in (q, k, v))

    def test_unknown_policy(self):
        with pytest.raises(ValueError, match="expected policy 'zero' or 'open_flamingo', got 'uniform'"):
            dense_masked_attention(*heads(), torch.tensor([TIMES]), policy="uniform")


def attention(**kwargs):
    sizes = {"dim": 6, "dim_visual": 3, "dim_head": 4, "heads": 2, **kwargs}
    return randomise(MaskedCrossAttention(**sizes)).double()


class Document:
    """The text and media of the drawings."""

    @pytest.fixture(autouse=True)
    def document(self, seed):
        self.x = torch.randn(1, 8, 6, dtype=F64)
        self.media = torch.randn(1, 3, 4, 3, dtype=F64)
        self.locations = torch.tensor([LOCATIONS], dtype=torch.bool)


class TestMaskedCrossAttention(Document):
    def test_parameter_names(self):
        names = ["norm.weight", "norm.bias", "to_q.weight", "to_kv.weight", "to_out.weight"]
        assert list(attention().state_dict()) == names
        with_norm = attention(norm_media=True).state_dict()
        assert set(with_norm) == {*names, "norm_media.weight", "norm_media.bias"}
        assert with_norm["norm_media.weight"].shape == (3,)

    @pytest.mark.parametrize("norm_media", [False, True])
    def test_formula(self, norm_media):
        attn = attention(norm_media=norm_media)
        seen = attn.norm_media(self.media) if norm_media else self.media
        q = attn.to_q(attn.norm(self.x)).view(1, 8, 2, 4)
        k = (seen @ attn.to_kv.weight[:8].T).view(1, 3, 4, 2, 4)
        v = (seen @ attn.to_kv.weight[8:].T).view(1, 3, 4, 2, 4)
        drawn = zip(*SEEN[True, "zero"], strict=True)
        rows = [attend_row(q[0, t], k[0], v[0], drawing).flatten() for t, drawing in enumerate(drawn)]
        expected = attn.to_out(torch.stack(rows))[None]
        torch.testing.assert_close(attn(self.x, self.media, self.locations), expected)

    @MODES
    @pytest.mark.parametrize("norm_media", [False, True])
    def test_gradcheck(self, only_immediate, policy, norm_media):
        attn = attention(only_attend_immediate_media=only_immediate, policy=policy, norm_media=norm_media)
        x, media = self.x.clone().requires_grad_(), self.media.clone().requires_grad_()
        assert gradcheck(attn, x, media, media_locations=self.locations)

    @pytest.mark.parametrize("dim_head", [1, 5, 40, 80])
    def test_any_head_dim(self, dim_head):
        attn = attention(dim_head=dim_head)
        assert attn(self.x, self.media, self.locations).shape == self.x.shape
        assert attn.scale == dim_head**-0.5

    @MODES
    def test_cached_queries_come_after_all_locations(self, only_immediate, policy):
        attn = attention(only_attend_immediate_media=only_immediate, policy=policy)
        two_images = self.locations[:, :4]
        out = attn(self.x[:, :5], self.media, two_images, use_cached_media=True)
        # The same as a prompt of two images in front of these queries.
        prompt = torch.cat((two_images, torch.zeros(1, 5, dtype=torch.bool)), dim=1)
        text = torch.cat((torch.randn(1, 4, 6, dtype=F64), self.x[:, :5]), dim=1)
        torch.testing.assert_close(out, attn(text, self.media, prompt)[:, 4:])

    def test_cached_without_an_image_is_zero(self):
        out = attention()(self.x, self.media, torch.zeros(1, 3, dtype=torch.bool), use_cached_media=True)
        assert (out == 0).all()

    @pytest.mark.parametrize("use_cached_media", [False, True])
    def test_without_locations_all_is_seen(self, use_cached_media):
        attn = attention()
        everything = attention(only_attend_immediate_media=False)
        everything.load_state_dict(attn.state_dict())
        after_all = torch.ones(1, 3, dtype=torch.bool)
        torch.testing.assert_close(
            attn(self.x, self.media, None, use_cached_media),
            everything(self.x, self.media, after_all, use_cached_media=True),
        )

    def test_no_media_gives_zero_and_zero_gradients(self):
        attn = attention()
        x, media = self.x.clone().requires_grad_(), torch.zeros(1, 0, 4, 3, dtype=F64, requires_grad=True)
        out = attn(x, media, self.locations)
        out.sum().backward()
        assert (out == 0).all()
        assert (x.grad == 0).all()
        assert media.grad.shape == media.shape

    def test_a_subclass_may_replace_the_core(self):
        class Recorder(MaskedCrossAttention):
            def attend(self, q, k, v, media_locations, use_cached_media):
                self.seen = (q.shape, k.shape, v.shape, media_locations, use_cached_media)
                return super().attend(q, k, v, media_locations, use_cached_media)

        attn = attention()
        recorder = Recorder(dim=6, dim_visual=3, dim_head=4, heads=2).double()
        recorder.load_state_dict(attn.state_dict())
        assert torch.equal(
            recorder(self.x, self.media, self.locations), attn(self.x, self.media, self.locations)
        )
        assert recorder.seen[:3] == ((1, 8, 2, 4), (1, 3, 4, 2, 4), (1, 3, 4, 2, 4))
        assert recorder.seen[3] is self.locations
        assert recorder.seen[4] is False

    @pytest.mark.parametrize(
        ("x", "media", "locations", "message"),
        [
            ((1, 8, 6), (1, 12, 3), (1, 8), r"expected x \(B, T, D\) and media \(B, M, R, dim_visual\)"),
            ((2, 8, 6), (1, 3, 4, 3), (2, 8), r"got \(2, 8, 6\) and \(1, 3, 4, 3\)"),
            ((1, 8, 6), (1, 3, 4, 3), (2, 8), r"expected media_locations with shape \(1, T\), got \(2, 8\)"),
            ((1, 8, 6), (1, 3, 4, 3), (8,), r"expected media_locations with shape \(1, T\), got \(8,\)"),
            ((1, 8, 6), (1, 3, 4, 3), (1, 7), r"shape \(B, 8\).*got \(1, 7\).*use_cached_media=True"),
        ],
    )
    def test_shapes_that_do_not_fit(self, x, media, locations, message):
        with pytest.raises(ValueError, match=message):
            attention()(
                torch.zeros(x, dtype=F64), torch.zeros(media, dtype=F64), torch.zeros(locations).bool()
            )

    def test_unknown_policy(self):
        with pytest.raises(ValueError, match="expected policy"):
            attention(policy="mean")


def block(**kwargs):
    sizes = {"dim": 6, "dim_visual": 3, "dim_head": 4, "heads": 2, "ff_mult": 2, **kwargs}
    return GatedCrossAttentionBlock(**sizes).double()


class TestGatedCrossAttentionBlock(Document):
    def test_parameter_names_and_gate_shapes(self):
        state = block().state_dict()
        assert set(state) == {
            "attn_gate",
            "ff_gate",
            *("attn.norm.weight", "attn.norm.bias"),
            *("attn.to_q.weight", "attn.to_kv.weight", "attn.to_out.weight"),
            *("ff.0.weight", "ff.0.bias", "ff.1.weight", "ff.3.weight"),
        }
        assert state["attn_gate"].shape == state["ff_gate"].shape == (1,)
        assert state["attn.to_kv.weight"].shape == (16, 3)

    def test_starts_as_the_identity(self):
        assert torch.equal(block()(self.x, self.media, self.locations), self.x)

    def test_at_zero_only_the_gates_learn(self):
        fresh = block()
        fresh(self.x, self.media, self.locations).square().sum().backward()
        assert {name for name, p in fresh.named_parameters() if (p.grad != 0).any()} == {
            "attn_gate",
            "ff_gate",
        }

    def test_formula(self):
        layer = randomise(block())
        x = self.x + layer.attn_gate.tanh() * layer.attn(self.x, self.media, self.locations)
        x = x + layer.ff_gate.tanh() * layer.ff(x)
        torch.testing.assert_close(layer(self.x, self.media, self.locations), x)
        assert not torch.allclose(x, self.x)

    def test_cached_media_reach_the_attention(self):
        layer = randomise(block())
        cached = layer(self.x, self.media, self.locations[:, :3], use_cached_media=True)
        every_row_sees_the_first = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]])
        torch.testing.assert_close(cached, layer(self.x, self.media, every_row_sees_the_first))

    def test_options_reach_the_parts(self):
        layer = block(
            only_attend_immediate_media=False,
            activation="squared_relu",
            norm_media=True,
            policy="open_flamingo",
        )
        assert (layer.attn.only_attend_immediate_media, layer.attn.policy) == (False, "open_flamingo")
        assert layer.attn.norm_media.normalized_shape == (3,)
        assert type(layer.ff[2]).__name__ == "SquaredReLU"

    @pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
    def test_gradcheck(self, activation):
        layer = randomise(block(activation=activation))
        x, media = self.x.clone().requires_grad_(), self.media.clone().requires_grad_()
        assert gradcheck(layer, x, media, media_locations=self.locations)

    def test_float32_gates_promote_bfloat16(self):
        layer = randomise(block()).bfloat16()
        layer.attn_gate.data = layer.attn_gate.data.float()
        args = (self.x.bfloat16(), self.media.bfloat16(), self.locations)
        assert layer.attn(*args).dtype == torch.bfloat16
        layer.ff = layer.ff.float()
        assert layer(*args).dtype == torch.float32

    def test_copies_and_pickles(self):
        layer = randomise(block())
        out = layer(self.x, self.media, self.locations)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(self.x, self.media, self.locations), out)
