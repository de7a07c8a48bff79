"""The trial itself: what it is made of, and that nothing outside notices it."""

from __future__ import annotations

import copy
import random
import warnings

import numpy
import pytest
import torch
from torch import nn

from flamingo_kernels import UnsupportedError, patch
from flamingo_kernels.patch import trial
from flamingo_kernels.patch.registry import match, targets
from flamingo_kernels.patch.samples import samples
from flamingo_kernels.patch.swap import swap
from tests.helpers import third_party
from tests.helpers.lookalikes import LooksAtMedia, Reads, Sums, inputs, make, target
from tests.helpers.weights import randomise

TARGETS = [
    f"{library}.{name}"
    for library in ("open_flamingo", "flamingo_pytorch")
    for name in (
        "MaskedCrossAttention",
        "GatedCrossAttentionBlock",
        "PerceiverAttention",
        "PerceiverResampler",
    )
]


def installed(name, **options):
    library, _, cls = name.partition(".")
    home = (
        third_party.open_flamingo("helpers") if library == "open_flamingo" else third_party.flamingo_pytorch()
    )
    sizes = {"dim": 16, "dim_head": 8, "heads": 2}
    if library == "open_flamingo" and cls in ("MaskedCrossAttention", "GatedCrossAttentionBlock"):
        sizes["dim_visual"] = 12
    if cls == "PerceiverResampler":
        sizes["depth"] = 2
    return randomise(getattr(home, cls)(**sizes, **options))


def tried(module):
    """The outcome of a trial of a module with the class that replaces it."""
    known = match(type(module))
    return trial.compare(module, known, lambda small, known: swap(small, known.fused))


class TestOriginals:
    """The libraries themselves pass, so that whoever computes the same does."""

    @pytest.mark.parametrize("name", TARGETS)
    def test_pass(self, name):
        assert tried(installed(name)).endswith(" calls agrees, with gradients")

    @pytest.mark.parametrize("name", [name for name in TARGETS if "Masked" in name or "Gated" in name])
    def test_all_preceding(self, name):
        assert tried(installed(name, only_attend_immediate_media=False))

    def test_places(self):
        assert tried(installed("open_flamingo.PerceiverResampler", max_num_media=3, max_num_frames=2))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_of_any_dtype(self, dtype):
        assert tried(installed("open_flamingo.PerceiverAttention").to(dtype))

    def test_of_an_adapted_layer(self):
        """A wrapped projection is no size and no other architecture."""

        class Adapter(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base, self.rank = base, 4
                self.in_features, self.out_features = base.in_features, base.out_features

            def forward(self, x):
                return self.base(x)

        attn = installed("open_flamingo.PerceiverAttention")
        attn.to_q = Adapter(attn.to_q)
        assert tried(attn)


def test_no_two_sizes_are_equal():
    """A class that takes one for another has a result of another shape."""
    small = samples()[match(type(installed(TARGETS[0]))).fused].build(LooksAtMedia, make(LooksAtMedia))
    sizes = [*small.to_q.weight.shape, *small.to_kv.weight.shape, small.heads]
    assert len(set(sizes)) == len(sizes)


def test_every_class_of_the_libraries_has_a_sample():
    for name in TARGETS:
        assert targets()[name][0] in samples()


class TestApart:
    """Nothing that a trial does is seen outside, and nothing outside matters to it."""

    def test_random_numbers(self):
        torch.manual_seed(5)
        random.seed(5)
        numpy.random.seed(5)
        expected = torch.rand(3), random.random(), numpy.random.rand()
        for reseed in (torch.manual_seed, random.seed, numpy.random.seed):
            reseed(5)
        patch(make_seeded(Reads), like={Reads: target(Reads)})
        assert torch.equal(torch.rand(3), expected[0])
        assert random.random() == expected[1]
        assert numpy.random.rand() == expected[2]

    def test_the_module(self):
        attn = make(LooksAtMedia)
        weights, grads = copy.deepcopy(attn.state_dict()), [each.grad for each in attn.parameters()]
        attn.train()
        patch(attn, like={LooksAtMedia: target(LooksAtMedia)})
        assert all(torch.equal(value, weights[name]) for name, value in attn.state_dict().items())
        assert [each.grad for each in attn.parameters()] == grads
        assert attn.training

    def test_threads_and_modes(self, set_threads):
        set_threads(2)
        with torch.no_grad(), torch.inference_mode():
            patch(make(Reads), like={Reads: target(Reads)})
            assert torch.is_inference_mode_enabled()
        with torch.autocast("cpu", torch.bfloat16):
            patch(make(Reads), like={Reads: target(Reads)})
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_num_threads() == 2
        assert torch.is_grad_enabled()

    def test_default_device_and_dtype(self):
        attn = make(Reads)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                assert patch(attn, like={Reads: target(Reads)}).replaced
        finally:
            torch.set_default_dtype(torch.float32)

    def test_it_is_quiet(self, capfd):
        class Warns(Reads):
            def weights(self, scores):
                warnings.warn("every time", UserWarning, stacklevel=1)
                return super().weights(scores)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            patch(make(Warns), like={Warns: target(Warns)})
        assert capfd.readouterr() == ("", "")

    def test_a_trial_that_fails(self):
        class Fails(Reads):
            def weights(self, scores):
                raise SystemError("no")

        state, threads = torch.get_rng_state(), torch.get_num_threads()
        module = make_seeded(Fails)
        with pytest.raises(UnsupportedError, match="it computes none of the calls of a trial"):
            patch(module, like={Fails: target(Fails)})
        assert torch.get_num_threads() == threads
        assert len(state) == len(torch.get_rng_state())


def make_seeded(cls):
    """A module whose making draws no random numbers that a test counts."""
    with torch.random.fork_rng(devices=[]):
        return make(cls)


class TestSettings:
    """The small instance is one of the user's kind."""

    def test_numbers_that_are_no_sizes(self):
        """The window of this module is not that of the default."""

        class Windowed(Reads):
            def __init__(self, window=1000, **sizes):
                super().__init__(**sizes)
                self.window = window

            def seen(self, x, latents):
                return super().seen(x[..., -self.window :, :], latents)

        with pytest.raises(UnsupportedError, match="the result differs"):
            patch(make(Windowed, window=2), like={Windowed: target(Windowed)})

    def test_what_was_set_after_it_was_made(self):
        class Doubles(Reads):
            factor = 1.0

            def weights(self, scores):
                return self.factor * super().weights(scores)

        attn = make(Doubles)
        attn.factor = 2.0
        with pytest.raises(UnsupportedError, match="the result differs"):
            patch(attn, like={Doubles: target(Doubles)})

    def test_the_eps_of_a_norm(self):
        attn = make(Reads)
        attn.norm_media.eps = 0.1
        original = copy.deepcopy(attn)
        patch(attn, like={Reads: target(Reads)})
        torch.testing.assert_close(attn(*inputs(attn)), original(*inputs(attn)), rtol=1e-4, atol=1e-5)

    def test_layers(self):
        """As many as the user's module has, as the last may differ from the others."""

        class OtherLast(Sums):
            def step(self, number, attn, ff, x, latents):
                after = super().step(number, attn, ff, x, latents)
                return after + latents if number == 4 else after

        assert patch(make(OtherLast, depth=4), like={OtherLast: target(OtherLast)}).replaced
        with pytest.raises(UnsupportedError, match="the result differs"):
            patch(make(OtherLast, depth=5), like={OtherLast: target(OtherLast)})

    @pytest.mark.parametrize(("heads", "dim_head"), [(7, 24), (16, 8)])
    def test_sizes_of_parts(self, heads, dim_head):
        """Those of the user's attentions are not those of a small resampler."""
        like = {Sums: target(Sums), Reads: target(Reads)}
        assert len(patch(make(Sums, heads=heads, dim_head=dim_head), like=like).replaced) == 4

    def test_other_parts(self):
        """The user's module has a bias that a new one would not have."""
        attn = make(Reads)
        attn.to_out = nn.Linear(32, 16)
        with pytest.raises(UnsupportedError, match="a new one has other parts: to_out"):
            patch(attn, like={Reads: target(Reads)})

    def test_constructors_that_pass_on_names(self):
        class Passes(Reads):
            def __init__(self, *args, label="", **sizes):
                super().__init__(*args, **sizes)

        assert patch(make(Passes), like={Passes: target(Passes)}).replaced
