"""The modules equal those of open-flamingo 2.0.1 and flamingo-pytorch 0.1.2, forward and every gradient.

Both run in float64 with one set of random weights, gates included, over documents with every kind of row.
"""

import pytest
import torch

from flamingo import (
    FeedForward,
    GatedCrossAttentionBlock,
    MaskedCrossAttention,
    PerceiverAttention,
    PerceiverResampler,
)
from tests.helpers import third_party
from tests.helpers.weights import randomise

F64 = torch.float64
LOCATIONS = torch.tensor(
    [
        [0, 0, 1, 0, 1, 1, 0, 0, 1, 0],  # text first, adjacent images, all three seen
        [1, 0, 0, 1, 0, 0, 0, 0, 0, 0],  # an image first, the third image never reached
        [0, 1, 1, 0, 1, 0, 1, 0, 1, 1],  # more <image> tokens than images
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # no image at all
    ],
    dtype=torch.bool,
)
IMMEDIATE = pytest.mark.parametrize("only_immediate", [True, False], ids=["immediate", "preceding"])


def assert_twins(ours, theirs, tensors, *args, renamed=None, **kwargs):
    """Same weights, inputs and upstream gradient give the same outputs and gradients."""
    theirs = randomise(theirs).double()
    ours = ours.double()
    rename = renamed or {}
    ours.load_state_dict({rename.get(name, name): value for name, value in theirs.state_dict().items()})
    results = []
    for module in (ours, theirs):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        out = module(*inputs, *args, **kwargs)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out).sin())
        grads = {name: p.grad for name, p in module.named_parameters()}
        if module is theirs:
            grads = {rename.get(name, name): grad for name, grad in grads.items()}
        results.append({"out": out, **grads, **{f"input {i}": x.grad for i, x in enumerate(inputs)}})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert value is not None, name
        torch.testing.assert_close(
            value, results[1][name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


class TestOpenFlamingo:
    @pytest.fixture(autouse=True)
    def helpers(self, seed):
        self.theirs = third_party.open_flamingo("helpers")
        self.x = torch.randn(4, 10, 6, dtype=F64)
        self.media = torch.randn(4, 3, 5, 7, dtype=F64)

    @IMMEDIATE
    @pytest.mark.parametrize("kind", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
    @pytest.mark.parametrize("cached", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
    def test_cross_attention(self, only_immediate, kind, cached, dtype):
        ours = {
            "MaskedCrossAttention": MaskedCrossAttention,
            "GatedCrossAttentionBlock": GatedCrossAttentionBlock,
        }
        sizes = {"dim": 6, "dim_visual": 7, "dim_head": 4, "heads": 3}
        sizes["only_attend_immediate_media"] = only_immediate
        x = self.x[:, :7] if cached else self.x
        assert_twins(
            ours[kind](**sizes, policy="open_flamingo"),
            getattr(self.theirs, kind)(**sizes),
            [x, self.media],
            media_locations=LOCATIONS.to(dtype),
            use_cached_media=cached,
        )

    def test_without_locations(self):
        sizes = {"dim": 6, "dim_visual": 7, "dim_head": 4, "heads": 3}
        assert_twins(
            MaskedCrossAttention(**sizes),
            self.theirs.MaskedCrossAttention(**sizes),
            [self.x, self.media],
            use_cached_media=True,
        )

    @IMMEDIATE
    def test_the_zero_policy_differs_where_documented_and_nowhere_else(self, only_immediate):
        sizes = {"dim": 6, "dim_visual": 7, "only_attend_immediate_media": only_immediate}
        theirs = randomise(self.theirs.MaskedCrossAttention(**sizes)).double()
        ours = MaskedCrossAttention(**sizes).double()
        ours.load_state_dict(theirs.state_dict())
        a, b = (m(self.x, self.media, LOCATIONS) for m in (ours, theirs))
        times = LOCATIONS.cumsum(dim=1)
        differs = times > 3 if only_immediate else times == 0
        assert differs.any()
        torch.testing.assert_close(a[~differs], b[~differs])
        assert (a[differs] == 0).all()
        assert (b[differs] != 0).all()

    def test_feed_forward(self):
        assert_twins(FeedForward(6), self.theirs.FeedForward(6), [self.x])

    def test_perceiver_attention(self):
        sizes = {"dim": 7, "dim_head": 4, "heads": 3}
        latents = torch.randn(4, 3, 2, 7, dtype=F64)
        assert_twins(
            PerceiverAttention(**sizes), self.theirs.PerceiverAttention(**sizes), [self.media, latents]
        )

    @pytest.mark.parametrize("frames", [None, 2, 5])
    @pytest.mark.parametrize("media", [None, 3, 4])
    def test_resampler(self, frames, media):
        sizes = {"dim": 7, "depth": 2, "dim_head": 4, "heads": 3, "num_latents": 5}
        sizes |= {"max_num_frames": frames, "max_num_media": media}
        x = torch.randn(2, 3, 2, 6, 7, dtype=F64)
        assert_twins(PerceiverResampler(**sizes), self.theirs.PerceiverResampler(**sizes), [x])

    def test_released_sizes_have_the_released_names(self):
        with torch.device("meta"):
            pairs = [
                (GatedCrossAttentionBlock, {"dim": 2048, "dim_visual": 1024}),
                (PerceiverResampler, {"dim": 1024}),
            ]
            for ours, sizes in pairs:
                theirs = getattr(self.theirs, ours.__name__)(**sizes)
                shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours(**sizes), theirs)]
                assert shapes[0] == shapes[1]

    def test_its_language_model_takes_our_block(self):
        flamingo_lm = third_party.open_flamingo("flamingo_lm")
        assert flamingo_lm.GatedCrossAttentionBlock is self.theirs.GatedCrossAttentionBlock
        block = randomise(GatedCrossAttentionBlock(dim=6, dim_visual=7)).double()

        class Decoder(torch.nn.Identity):
            def forward(self, x, attention_mask=None):
                return x

        layer = flamingo_lm.FlamingoLayer(block, Decoder())
        layer.condition_vis_x(self.media)
        layer.condition_media_locations(LOCATIONS)
        layer.condition_use_cached_media(False)
        assert torch.equal(layer(self.x), block(self.x, self.media, LOCATIONS))


class TestFlamingoPytorch:
    @pytest.fixture(autouse=True)
    def package(self, seed):
        self.theirs = third_party.flamingo_pytorch()
        self.x = torch.randn(4, 10, 6, dtype=F64)
        self.media = torch.randn(4, 3, 5, 6, dtype=F64)

    @IMMEDIATE
    @pytest.mark.parametrize("kind", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
    @pytest.mark.parametrize("locations", [LOCATIONS, None], ids=["located", "unmasked"])
    def test_cross_attention(self, only_immediate, kind, locations):
        ours = {
            "MaskedCrossAttention": MaskedCrossAttention,
            "GatedCrossAttentionBlock": GatedCrossAttentionBlock,
        }
        sizes = {"dim": 6, "dim_head": 4, "heads": 3, "only_attend_immediate_media": only_immediate}
        assert_twins(
            ours[kind](**sizes, dim_visual=6, policy="open_flamingo"),
            getattr(self.theirs, kind)(**sizes),
            [self.x, self.media],
            media_locations=locations,
        )

    def test_perceiver_attention(self):
        sizes = {"dim": 6, "dim_head": 4, "heads": 3}
        latents = torch.randn(4, 3, 2, 6, dtype=F64)
        assert_twins(
            PerceiverAttention(**sizes), self.theirs.PerceiverAttention(**sizes), [self.media, latents]
        )

    def test_resampler(self):
        sizes = {"dim": 6, "depth": 2, "dim_head": 4, "heads": 3, "num_latents": 5}

        class OneFrame(PerceiverResampler):
            """Its resampler has no frames, and takes `[B, M, v, D]`."""

            def forward(self, x):
                return super().forward(x[:, :, None])

        assert_twins(
            OneFrame(**sizes, max_num_media=4),
            self.theirs.PerceiverResampler(**sizes, num_media_embeds=4),
            [self.media],
            renamed={"media_pos_emb": "media_time_embs"},
        )
