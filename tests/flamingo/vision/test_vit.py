"""The small vision transformer: a frame to one feature a patch."""

import pytest
import torch
import torch.nn.functional as F

from flamingo import VisionEncoder
from tests.helpers.weights import randomise

SIZES = {"image_size": 16, "patch_size": 8, "dim": 12, "layers": 1, "heads": 2}


def test_frames_do_not_mix_and_keep_their_place():
    encoder = randomise(VisionEncoder(**SIZES)).double()
    frames = torch.randn(2, 3, 2, 3, 16, 16, dtype=torch.float64)
    features = encoder(frames)
    assert features.shape == (2, 3, 2, 4, encoder.dim)
    torch.testing.assert_close(features[1, 2, 1], encoder(frames[1:, 2:, 1:])[0, 0, 0])


def test_it_is_what_its_formula_says(seed):
    encoder = randomise(VisionEncoder(**SIZES)).double()
    frame = torch.randn(3, 16, 16, dtype=torch.float64)
    corners = [(0, 0), (0, 8), (8, 0), (8, 8)]
    patches = torch.stack([frame[:, top : top + 8, left : left + 8] for top, left in corners])
    matrix, bias = encoder.to_patches.weight.flatten(1), encoder.to_patches.bias
    x = patches.flatten(1) @ matrix.T + bias + encoder.positions
    (layer,) = encoder.layers
    q, k, v = (layer.norm(x) @ layer.attn.to_qkv.weight.T).view(4, 3, 2, 6).permute(1, 2, 0, 3)
    seen = (q @ k.mT / 6**0.5).softmax(dim=-1) @ v  # [H, 4, d]
    x = x + F.linear(seen.transpose(0, 1).reshape(4, 12), layer.attn.to_out.weight)
    x = x + layer.ff(x)
    torch.testing.assert_close(encoder(frame[None, None, None])[0, 0, 0], encoder.norm(x))


def test_the_order_of_patches_matters():
    encoder = randomise(VisionEncoder(**SIZES)).double()
    frame = torch.randn(1, 1, 1, 3, 16, 16, dtype=torch.float64)
    swapped = frame.roll(8, dims=-1)  # exchanges the left and the right patches
    assert not torch.allclose(encoder(frame)[..., [1, 0, 3, 2], :], encoder(swapped))


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(B, M, F, 3, 16, 16\), got \(1, 1, 1, 3, 16, 20\)"):
        VisionEncoder(**SIZES)(torch.zeros(1, 1, 1, 3, 16, 20))
