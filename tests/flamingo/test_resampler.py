"""Feed-forward networks, the resampler's attention, its time embeddings, and the resampler whole."""

import math

import pytest
import torch
from torch import nn

from flamingo import FeedForward, PerceiverAttention, PerceiverResampler, interpolate_time
from tests.helpers.weights import gradcheck, randomise

F64 = torch.float64


class TestFeedForward:
    def test_parameter_names(self):
        state = FeedForward(6, mult=3).state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == {
            "0.weight": (6,),
            "0.bias": (6,),
            "1.weight": (18, 6),
            "3.weight": (6, 18),
        }

    @pytest.mark.parametrize(
        ("activation", "formula"),
        [
            ("gelu", lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))),
            ("squared_relu", lambda h: h.clamp(min=0) ** 2),
            ("relu", lambda h: h.clamp(min=0)),
        ],
    )
    def test_formula(self, activation, formula):
        ff = randomise(FeedForward(6, activation=activation)).double()
        x = torch.randn(2, 3, 6, dtype=F64)
        torch.testing.assert_close(ff(x), formula(ff[0](x) @ ff[1].weight.T) @ ff[3].weight.T)

    @pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
    def test_gradcheck(self, activation):
        ff = randomise(FeedForward(5, mult=2, activation=activation)).double()
        assert gradcheck(ff, torch.randn(2, 3, 5, dtype=F64, requires_grad=True))

    def test_unknown_activation(self):
        with pytest.raises(ValueError, match="one of gelu, squared_relu, relu, got 'swish'"):
            FeedForward(6, activation="swish")


class TestPerceiverAttention:
    @pytest.fixture(autouse=True)
    def inputs(self, seed):
        self.attn = randomise(PerceiverAttention(dim=6, dim_head=4, heads=2)).double()
        self.x = torch.randn(2, 3, 7, 6, dtype=F64, requires_grad=True)
        self.latents = torch.randn(2, 3, 5, 6, dtype=F64, requires_grad=True)

    def test_parameter_names(self):
        assert set(self.attn.state_dict()) == {
            *("norm_media.weight", "norm_media.bias", "norm_latents.weight", "norm_latents.bias"),
            *("to_q.weight", "to_kv.weight", "to_out.weight"),
        }

    def test_formula(self):
        attn = self.attn
        x, latents = attn.norm_media(self.x)[1, 2], attn.norm_latents(self.latents)[1, 2]  # [7, 6], [5, 6]
        keys = torch.cat((x, latents))  # [12, 6]
        outs = []
        for head in (slice(0, 4), slice(4, 8)):
            q = latents @ attn.to_q.weight[head].T
            k, v = keys @ attn.to_kv.weight[:8][head].T, keys @ attn.to_kv.weight[8:][head].T
            outs.append((q @ k.T / 2).softmax(dim=-1) @ v)
        expected = attn.to_out(torch.cat(outs, dim=-1))
        torch.testing.assert_close(attn(self.x, self.latents)[1, 2], expected)

    def test_lengths_cut_the_media_short(self):
        lengths = torch.tensor([[7, 3, 0], [1, 6, 2]])
        out = self.attn(self.x, self.latents, lengths)
        for b, m in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            alone = self.attn(self.x[b, m, : lengths[b, m]][None, None], self.latents[b, m][None, None])
            torch.testing.assert_close(out[b, m], alone[0, 0])

    @pytest.mark.parametrize("lengths", [None, [[7, 3, 0], [1, 6, 2]]])
    def test_gradcheck(self, lengths):
        lengths = None if lengths is None else torch.tensor(lengths)
        assert gradcheck(self.attn, self.x, self.latents, media_lengths=lengths)

    def test_a_subclass_may_replace_the_core(self):
        class Recorder(PerceiverAttention):
            def attend(self, q, k_media, v_media, k_latents, v_latents, media_lengths=None):
                tensors = (q, k_media, v_media, k_latents, v_latents)
                self.seen = [*(tuple(t.shape) for t in tensors), media_lengths.tolist()]
                return super().attend(*tensors, media_lengths)

        recorder = Recorder(dim=6, dim_head=4, heads=2).double()
        recorder.load_state_dict(self.attn.state_dict())
        lengths = torch.tensor([[7, 3, 0], [1, 6, 2]])
        out = recorder(self.x, self.latents, lengths)
        assert torch.equal(out, self.attn(self.x, self.latents, lengths))
        latents, media = (6, 5, 2, 4), (6, 7, 2, 4)
        assert recorder.seen == [latents, media, media, latents, latents, [7, 3, 0, 1, 6, 2]]

    @pytest.mark.parametrize(("batch", "num_media", "features"), [(0, 3, 7), (2, 0, 7), (2, 3, 0)])
    def test_empty(self, batch, num_media, features):
        x = self.x[:batch, :num_media, :features]
        out = self.attn(x, self.latents[:batch, :num_media])
        out.sum().backward()
        assert out.shape == (batch, num_media, 5, 6)
        assert out.isfinite().all()
        assert (self.x.grad == 0).all()


class TestInterpolateTime:
    embs = torch.tensor([[0.0, 1.0], [3.0, -1.0], [4.0, 0.5], [9.0, 2.0]])

    def test_up_to_the_learned_number_takes_the_first(self):
        for frames in range(5):
            assert torch.equal(interpolate_time(self.embs, frames), self.embs[:frames])

    @pytest.mark.parametrize("frames", [5, 6, 7, 30, 1000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_end_points_are_exact(self, frames, dtype):
        embs = torch.randn(8, 3).to(dtype)
        out = interpolate_time(embs, frames) if frames > 8 else interpolate_time(embs[:4], frames)
        assert out.dtype == dtype
        assert out.shape == (frames, 3)
        assert torch.equal(out[0], embs[0])
        assert torch.equal(out[-1], embs[7] if frames > 8 else embs[3])

    def test_twice_the_steps_keep_every_embedding_and_their_means(self):
        out = interpolate_time(self.embs, 7)
        assert torch.equal(out[::2], self.embs)
        torch.testing.assert_close(out[1::2], (self.embs[:-1] + self.embs[1:]) / 2)

    def test_the_papers_eight_to_thirty(self):
        position = interpolate_time(torch.arange(8, dtype=F64)[:, None], 30).flatten()
        torch.testing.assert_close(position, torch.arange(30, dtype=F64) * 7 / 29)
        assert position[15].item() == pytest.approx(3.6207, abs=5e-5)

    def test_one_embedding_serves_every_frame(self):
        assert torch.equal(interpolate_time(self.embs[:1], 3), self.embs[:1].expand(3, 2))

    def test_ragged_clips_equal_each_alone(self):
        frames = torch.tensor([[1, 3, 4], [5, 9, 7]])
        out = interpolate_time(self.embs, frames, 9)
        assert out.shape == (2, 3, 9, 2)
        for clip, length in zip(out.flatten(0, 1), frames.flatten().tolist(), strict=True):
            assert torch.equal(clip[:length], interpolate_time(self.embs, length))

    def test_ragged_clips_need_a_length(self):
        with pytest.raises(ValueError, match="expected a length beside a tensor of frames"):
            interpolate_time(self.embs, torch.tensor([3]))

    def test_gradcheck(self):
        embs = torch.randn(4, 2, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda e: interpolate_time(e, 9), (embs,))


def resampler(**kwargs):
    sizes = {"dim": 6, "depth": 2, "dim_head": 4, "heads": 2, "num_latents": 5, "ff_mult": 2, **kwargs}
    return randomise(PerceiverResampler(**sizes)).double()


class TestPerceiverResampler:
    @pytest.fixture(autouse=True)
    def features(self, seed):
        self.x = torch.randn(2, 3, 4, 7, 6, dtype=F64)

    def test_parameter_names(self):
        layer = [
            *("0.norm_media.weight", "0.norm_media.bias", "0.norm_latents.weight", "0.norm_latents.bias"),
            *("0.to_q.weight", "0.to_kv.weight", "0.to_out.weight"),
            *("1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"),
        ]
        layers = [f"layers.{i}.{name}" for i in range(2) for name in layer]
        assert set(resampler().state_dict()) == {"latents", "norm.weight", "norm.bias", *layers}
        full = resampler(max_num_frames=4, max_num_media=3, dim_input=9).state_dict()
        optional = {"frame_embs": (4, 6), "media_time_embs": (3, 1, 6), "project_input.weight": (6, 9)}
        assert {name: tuple(full[name].shape) for name in optional} == optional
        assert set(full) - set(resampler().state_dict()) == set(optional)

    def test_formula(self):
        model = resampler(max_num_frames=4, max_num_media=5)  # of which three media take the first
        clip = self.x[1, 2] + model.frame_embs[:, None]  # [F, v, D]
        clip = clip.flatten(0, 1) + model.media_time_embs[2]
        latents = model.latents
        for attn, ff in model.layers:
            latents = latents + attn(clip[None, None], latents[None, None])[0, 0]
            latents = latents + ff(latents)
        torch.testing.assert_close(model(self.x)[1, 2], model.norm(latents))

    def test_media_do_not_mix(self):
        model, other = resampler(), self.x.clone()
        other[:, 1] += 1
        changed = (model(self.x) != model(other)).flatten(2).any(dim=-1)
        assert changed.tolist() == [[False, True, False]] * 2

    def test_more_frames_than_embeddings_interpolate(self):
        model = resampler(max_num_frames=3)
        twin = resampler(max_num_frames=4)
        state = {**model.state_dict(), "frame_embs": interpolate_time(model.frame_embs.detach(), 4)}
        twin.load_state_dict(state)
        torch.testing.assert_close(model(self.x), twin(self.x))

    @pytest.mark.parametrize("max_num_frames", [None, 3, 8])
    def test_ragged_clips_equal_each_alone(self, max_num_frames):
        model = resampler(max_num_frames=max_num_frames)
        num_frames = torch.tensor([[4, 1, 2], [3, 4, 1]])
        out = model(self.x, num_frames)
        for b, m in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            alone = model(self.x[b, m, : num_frames[b, m]][None, None])
            torch.testing.assert_close(out[b, m], alone[0, 0])

    def test_projects_wider_features(self):
        model = resampler(dim_input=9)
        x = torch.randn(2, 3, 4, 7, 9, dtype=F64)
        plain = resampler()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "project_input.weight"})
        torch.testing.assert_close(model(x), plain(nn.functional.linear(x, model.project_input.weight)))

    @pytest.mark.parametrize("activation", ["gelu", "squared_relu"])
    def test_gradcheck(self, activation):
        model = resampler(
            dim=3,
            depth=1,
            dim_head=2,
            num_latents=2,
            max_num_frames=2,
            max_num_media=1,
            dim_input=4,
            activation=activation,
        )
        assert gradcheck(model, torch.randn(1, 1, 3, 2, 4, dtype=F64, requires_grad=True))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"expected x with shape \(B, M, F, v, D\), got \(3, 4, 7, 6\)"):
            resampler()(self.x[0])
        with pytest.raises(ValueError, match="expected at most max_num_media=2 media, got 3"):
            resampler(max_num_media=2)(self.x)
        with pytest.raises(
            ValueError, match=r"expected num_frames with shape \(2, 3\) to match x, got \(3,\)"
        ):
            resampler()(self.x, torch.tensor([1, 1, 1]))
