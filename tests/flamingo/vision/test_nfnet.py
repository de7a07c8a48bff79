"""NFNet against its formulas written out, its published sizes, and timm where that is installed."""

import math

import pytest
import torch
import torch.nn.functional as F

from flamingo import NFNet
from flamingo.vision.nfnet import NFNETS, NFBlock, StandardisedConv, scaled_gelu

TINY = {"widths": (32, 64, 96, 64), "depths": (2, 1, 3, 1), "group_width": 16}


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str, **changes) -> NFNet:
    with torch.device("meta"):
        return NFNet.preset(name, **changes)


def varied(module):
    """Gains around 1 and biases: as built, branches are multiplied by 0 and a test proves nothing."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("gain"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return module


class TestPublishedSizes:
    def test_parameters_of_f6(self):
        encoder = on_meta("nfnet-f6")
        assert count(encoder) == 435_286_116
        assert count(encoder.stem) == 97_680
        stages = [count(stage) / 1e6 for stage in encoder.stages]
        assert stages == pytest.approx([3.010, 15.711, 272.921, 138.821], abs=0.0006)

    def test_blocks_and_widths(self):
        assert NFNETS["nfnet-f0"] == (1, 2, 6, 3)
        assert NFNETS["nfnet-f1"] == (2, 4, 12, 6)
        assert NFNETS["nfnet-f6"] == (7, 14, 42, 21)
        encoder = on_meta("nfnet-f6")
        assert [len(stage) for stage in encoder.stages] == [7, 14, 42, 21]
        assert [stage[-1].conv3.out_channels for stage in encoder.stages] == [256, 512, 1536, 1536]
        assert [stage[-1].conv2.groups for stage in encoder.stages] == [1, 2, 6, 6]
        assert [stage[0].conv2.stride[0] for stage in encoder.stages] == [1, 2, 2, 2]
        assert [conv.out_channels for conv in encoder.stem if hasattr(conv, "stride")] == [16, 32, 64, 128]
        assert encoder.dim == 3072

    def test_betas(self):
        stages = on_meta("nfnet-f6").stages
        firsts = [stage[0].beta for stage in stages]
        assert firsts == pytest.approx([1.0, 0.883883, 0.800641, 0.610847], abs=5e-7)
        for stage in stages:
            assert [block.beta for block in stage[1:3]] == pytest.approx([0.980581, 0.962250], abs=5e-7)

    @pytest.mark.parametrize(("side", "grid"), [(320, 10), (288, 9), (480, 15)])
    def test_one_feature_for_32_pixels(self, side, grid):
        pixels = torch.empty(1, 1, 2, 3, side, side, device="meta")
        assert on_meta("nfnet-f0")(pixels).shape == (1, 1, 2, grid**2, 3072)

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"expected one of nfnet-f0, .*nfnet-f6, got 'resnet'"):
            NFNet.preset("resnet")

    def test_widths_that_do_not_fit(self):
        with pytest.raises(
            ValueError, match=r"multiples of 2 \* group_width = 32, .*got \(32, 64, 100, 64\)"
        ):
            NFNet(**TINY | {"widths": (32, 64, 100, 64)})


class TestStandardisedConv:
    def test_weights_by_hand(self):
        conv = StandardisedConv(2, 1).double()
        with torch.no_grad():
            conv.weight.copy_(torch.tensor([1.0, 5.0])[None, :, None, None])  # mean 3, variance 4
            conv.gain.fill_(3)
        found, expected = conv.standardised_weight().flatten().tolist(), 3 * 2 / math.sqrt((4 + 1e-5) * 2)
        assert found == pytest.approx([-expected, expected], rel=1e-12)

    def test_neither_scale_nor_mean_of_the_weights_matters(self):
        conv = varied(StandardisedConv(8, 4, 3)).double()
        before = conv.standardised_weight().detach().clone()
        with torch.no_grad():
            conv.weight.mul_(1e3).add_(7)
        torch.testing.assert_close(conv.standardised_weight(), before, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        ("side", "stride", "before", "after"),
        [(4, 2, 0, 1), (5, 2, 1, 1), (1, 2, 1, 1), (4, 1, 1, 1), (5, 1, 1, 1)],
    )
    def test_same_padding(self, side, stride, before, after):
        conv = varied(StandardisedConv(4, 6, 3, stride, groups=2)).double()
        x = torch.randn(2, 4, side, side + 1, dtype=torch.float64)
        columns = (0, 1) if stride == 2 and (side + 1) % 2 == 0 else (1, 1)
        padded = F.pad(x, (*columns, before, after))
        expected = F.conv2d(padded, conv.standardised_weight(), conv.bias, stride, groups=2)
        torch.testing.assert_close(conv(x), expected)
        assert conv(x).shape[2:] == (math.ceil(side / stride), math.ceil((side + 1) / stride))

    def test_statistics_of_half_precision_are_taken_in_float32(self):
        conv = StandardisedConv(512, 4)
        with torch.no_grad():
            conv.weight.add_(20 * conv.weight.std())  # in bfloat16 the mean would swallow the rest
        half = StandardisedConv(512, 4).bfloat16()
        half.load_state_dict(conv.state_dict())
        rounded = StandardisedConv(512, 4)
        rounded.load_state_dict(half.state_dict())
        torch.testing.assert_close(
            half.standardised_weight().float(), rounded.standardised_weight(), rtol=2**-8, atol=0
        )


def expected_conv(state, name, x, stride=1, groups=1):
    """A convolution as the formula says, channel by channel."""
    weight, gain, bias = (state[f"{name}.{part}"] for part in ("weight", "gain", "bias"))
    rows = []
    for w, g in zip(weight, gain, strict=True):
        centred = w - w.sum() / w.numel()
        variance = (centred**2).sum() / w.numel()
        rows.append(g * centred / math.sqrt(w.numel()) / (variance + 1e-5).sqrt())
    sides = []
    for side in (x.shape[3], x.shape[2]):
        missing = max((-(-side // stride) - 1) * stride + weight.shape[2] - side, 0)
        sides += [missing // 2, missing - missing // 2]
    return F.conv2d(F.pad(x, sides), torch.stack(rows), bias, stride, groups=groups)


def expected_block(state, name, x, beta, stride, groups):
    """The residual block of arXiv 2102.06171, from a state_dict."""

    def act(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) * 1.7015043497085571

    h = act(x) * beta
    shortcut = x
    if f"{name}.downsample.conv.weight" in state:
        shortcut = h
        for dim in (2, 3) if stride == 2 else ():
            shortcut = torch.stack([pair.mean(dim) for pair in shortcut.split(2, dim)], dim)
        shortcut = expected_conv(state, f"{name}.downsample.conv", shortcut)
    y = expected_conv(state, f"{name}.conv1", h)
    y = expected_conv(state, f"{name}.conv2", act(y), stride, groups)
    y = expected_conv(state, f"{name}.conv2b", act(y), 1, groups)
    y = expected_conv(state, f"{name}.conv3", act(y))
    weights = y.mean((2, 3))
    for layer, function in (("fc1", torch.relu), ("fc2", torch.sigmoid)):
        weight, bias = state[f"{name}.attn_last.{layer}.weight"], state[f"{name}.attn_last.{layer}.bias"]
        weights = function(weights @ weight[:, :, 0, 0].T + bias)
    return shortcut + 0.2 * state[f"{name}.skipinit_gain"] * 2 * weights[:, :, None, None] * y


class TestForward:
    def test_against_the_formulas(self):
        encoder = varied(NFNet(**TINY)).double()
        state = encoder.state_dict()
        images = torch.randn(2, 3, 50, 71, dtype=torch.float64)  # odd sides on the way
        x = images
        for i, stride in enumerate((2, 1, 1, 2), start=1):
            x = expected_conv(state, f"stem.conv{i}", x, stride)
            x = scaled_gelu(x) if i < 4 else x
        for stage, (width, depth) in enumerate(zip(TINY["widths"], TINY["depths"], strict=True)):
            for block in range(depth):
                beta = encoder.stages[stage][block].beta
                stride = 2 if stage and not block else 1
                x = expected_block(state, f"stages.{stage}.{block}", x, beta, stride, groups=width // 32)
        expected = scaled_gelu(expected_conv(state, "final_conv", x))
        torch.testing.assert_close(encoder.grid(images), expected)

    def test_frames_do_not_mix_and_the_grid_is_read_in_rows(self):
        encoder = varied(NFNet(**TINY)).double()
        frames = torch.randn(2, 2, 3, 3, 64, 96, dtype=torch.float64)
        features = encoder(frames)
        assert features.shape == (2, 2, 3, 6, encoder.dim)
        grid = encoder.grid(frames[1, 0, 2][None])[0]
        torch.testing.assert_close(features[1, 0, 2, 4], grid[:, 1, 1])

    def test_the_signal_grows_as_predicted(self):
        """With all gains 1, every block adds alpha^2 to the variance, and beta takes it out again."""
        blocks = torch.nn.Sequential(
            *(NFBlock(128, 128, beta=(1 + 0.04 * i) ** -0.5, stride=1, group_width=64) for i in range(12))
        )
        for block in blocks:
            torch.nn.init.ones_(block.skipinit_gain)
        x = torch.randn(4, 128, 24, 24)
        with torch.no_grad():
            for i, block in enumerate(blocks, start=1):
                x = block(x)
                assert x.std().item() == pytest.approx((1 + 0.04 * i) ** 0.5, rel=0.03)

    def test_bfloat16(self):
        encoder = varied(NFNet(**TINY))
        pixels = torch.randn(1, 1, 1, 3, 64, 64)
        expected = encoder(pixels)
        found = encoder.bfloat16()(pixels.bfloat16())
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.05 * expected.norm()

    def test_stochastic_depth(self):
        encoder = varied(NFNet(**TINY, stochastic_depth=0.7))
        drops = [block.drop for stage in encoder.stages for block in stage]
        assert drops == pytest.approx([0.7 * i / 7 for i in range(7)])
        block = encoder.stages[2][1]
        x = torch.randn(512, 96, 2, 2)
        trained, evaluated = block.train()(x), block.eval()(x)
        skipped = (trained == x).flatten(1).all(dim=1)  # each image as a whole
        assert skipped.float().mean().item() == pytest.approx(block.drop, abs=0.1)
        torch.testing.assert_close(trained[~skipped], evaluated[~skipped])  # not scaled up
        assert not (evaluated == x).flatten(1).all(dim=1).any()

    @pytest.mark.parametrize("shape", [(1, 1, 3, 32, 32), (1, 1, 1, 1, 32, 32)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"\(B, M, F, 3, h, w\), got \(1, 1, .*Processor makes them"):
            NFNet(**TINY)(torch.zeros(shape))


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm, which needs torchvision, is not installed")


class TestAgainstTimm:
    @pytest.mark.parametrize("name", ["nfnet-f0", "nfnet-f1", "nfnet-f6"])
    def test_parameters_have_its_names_and_shapes(self, timm, name):
        with torch.device("meta"):
            theirs = timm.create_model(f"dm_{name.replace('-', '_')}", num_classes=0)
        shapes = {key: value.shape for key, value in theirs.state_dict().items()}
        assert {key: value.shape for key, value in on_meta(name).state_dict().items()} == shapes

    @pytest.mark.parametrize(
        ("name", "dtype", "side"),
        [
            ("nfnet-f0", torch.float32, (64, 64)),
            ("nfnet-f0", torch.float64, (75, 33)),
            ("nfnet-f1", torch.float32, (96, 64)),
        ],
    )
    def test_features_are_its_features(self, timm, name, dtype, side):
        theirs = varied(timm.create_model(f"dm_{name.replace('-', '_')}").eval())  # with its classifier
        ours = NFNet.preset(name)
        ours.load_state_dict(theirs.state_dict())
        images = torch.randn(2, 3, *side, dtype=dtype)
        with torch.no_grad():
            expected = theirs.to(dtype).forward_features(images)
            found = ours.to(dtype).grid(images)
        difference = ((found - expected).norm() / expected.norm()).item()
        print(f"{name} {dtype} {side}: relative difference {difference:.1e}")
        assert difference < (1e-12 if dtype == torch.float64 else 1e-5)


def test_a_checkpoint_with_a_classifier_loads():
    encoder, other = NFNet(**TINY), NFNet(**TINY)
    state = {**other.state_dict(), "head.fc.weight": torch.zeros(10, 128), "head.fc.bias": torch.zeros(10)}
    encoder.load_state_dict(state)
    assert "head.fc.weight" in state
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    with pytest.raises(RuntimeError, match=r"head\.other"):
        encoder.load_state_dict({**state, "head.other": torch.zeros(1)})
