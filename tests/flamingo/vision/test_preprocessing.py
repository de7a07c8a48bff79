"""Pixels by what a tower's folder says, and by transformers' own code for it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo import Processor
from flamingo.vision import read_preprocessing

transformers = pytest.importorskip("transformers")

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
NORM = {"image_mean": MEAN, "image_std": STD}
CLIP = {
    "size": {"shortest_edge": 24},
    "crop_size": {"height": 24, "width": 24},
    "do_center_crop": True,
} | NORM
SIGLIP = {"size": {"height": 24, "width": 24}} | NORM


def smooth(height, width):
    """Waves, of which rounding to bytes after each step changes little."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(rows / 7 + shift) * np.cos(columns / 9 - shift) for shift in (0, 1, 2)]
    return Image.fromarray(((np.stack(waves, axis=-1) + 1) * 127).astype(np.uint8))


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (31, 50), (24, 24), (10, 14)])
@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(("kind", "options"), [("CLIP", CLIP), ("Siglip", SIGLIP)])
def test_pixels_are_those_of_transformers(tmp_path, kind, options, resample, size):
    theirs = getattr(transformers, f"{kind}ImageProcessor")(**options, resample=resample)
    theirs.save_pretrained(tmp_path)
    ours = Processor(**read_preprocessing(tmp_path))
    image = smooth(*size)
    expected = torch.as_tensor(np.array(theirs(image)["pixel_values"][0]))
    got = ours([[image]]).pixels[0, 0, 0]
    assert got.shape == expected.shape
    error = ((got - expected) * torch.tensor(STD)[:, None, None]).abs()
    assert error.max() < 3 / 255  # they round to bytes after resizing
    assert error.mean() < 0.6 / 255


def test_bilinear_and_bicubic_differ():
    image = smooth(61, 47)
    pixels = [
        Processor(24, fit="stretch", resample=name)([[image]]).pixels for name in ("bilinear", "bicubic")
    ]
    assert (pixels[0] - pixels[1]).abs().max() > 0.02


def test_a_file_of_earlier_years(tmp_path):
    """With integers for sides, as of openai/clip-vit-large-patch14."""
    old = {
        "crop_size": 24,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "size": 24,
    } | NORM
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old | {"resample": 3}))
    expected = {"image_size": 24, "mean": MEAN, "std": STD, "fit": "crop", "resample": "bicubic"}
    assert read_preprocessing(tmp_path) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"expected a preprocessor_config\.json, .* got none\. Save the image processor"),
        ("{", r"preprocessor_config\.json: expected JSON, got: "),
        ([], r"expected an object of JSON, got list"),
        (CLIP | {"do_resize": False}, "expected do_resize to be true, got False"),
        (CLIP | {"do_normalize": False}, "expected do_normalize to be true, got False"),
        (CLIP | {"rescale_factor": 1.0}, r"expected rescale_factor to be 1 / 255, got 1\.0"),
        (CLIP | {"resample": 0}, r"expected resample to be 2 \(bilinear\) or 3 \(bicubic\), got 0"),
        (NORM, "expected size, got none"),
        ({"size": 24, "image_mean": MEAN}, "expected image_std, got none"),
        (CLIP | {"crop_size": {"height": 24, "width": 20}}, "to be resized to what is cropped, got size"),
        (CLIP | {"size": {"shortest_edge": 32}}, "to be resized to what is cropped, got size"),
        (CLIP | {"size": {"height": 24, "width": 24}}, "to be resized to what is cropped, got size"),
        (SIGLIP | {"size": {"height": 24, "width": 20}}, "expected size to be a square where nothing is"),
        (SIGLIP | {"size": {"shortest_edge": 24}}, "expected size to be a square where nothing is cropped"),
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path, given, message):
    if given is not None:
        text = given if isinstance(given, str) else json.dumps(given)
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_preprocessing(tmp_path)
