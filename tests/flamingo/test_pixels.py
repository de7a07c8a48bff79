"""Images as people have them: one picture, whatever holds it and whichever way it comes in."""

import io

import numpy as np
import pytest
import torch

from flamingo import Processor
from flamingo.media import read_frames
from flamingo.pixels import to_image

pillow = pytest.importorskip("PIL.Image")

RAMP = np.linspace(0, 1, 256)[None].repeat(4, axis=0)  # of greys, [4, 256]
BYTES = np.round(RAMP * 255).astype(np.uint8)
COLOURS = np.stack([BYTES, BYTES[:, ::-1], 255 - BYTES // 2], axis=-1)
ALPHA = np.full((4, 256), 51, dtype=np.uint8)  # a fifth
ON_WHITE = 0.2 * COLOURS / 255 + 0.8


def grey(values):
    return np.stack([values] * 3, axis=-1)


def picture(array, mode=None):
    image = pillow.fromarray(array)
    return image.convert(mode) if mode else image


def palette_with_a_hole():
    """Two colours, the first of which is transparent."""
    image = pillow.fromarray(np.array([[0, 1]] * 2, dtype=np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = 0
    return image


HOLED = np.array([[[1, 1, 1], [1, 0, 0]]] * 2, dtype=np.float64)


def keyed():
    """Black is transparent, by its colour."""
    image = pillow.fromarray(np.array([[[0, 0, 0], [255, 0, 0]]] * 2, dtype=np.uint8))
    image.info["transparency"] = (0, 0, 0)
    return image


# image, kind of file that holds it, what is seen [h, w, 3]
TABLE = {
    "8 bits": (picture(COLOURS), "PNG", COLOURS / 255),
    "grey": (picture(BYTES), "PNG", grey(BYTES / 255)),
    "grey of 16 bits": (picture((RAMP * 65535).astype(np.uint16)), "PNG", grey(RAMP)),
    "grey of 16 bits, TIFF": (picture((RAMP * 65535).astype(np.uint16)), "TIFF", grey(RAMP)),
    "grey of 16 bits, PPM": (picture((RAMP * 65535).astype(np.uint16)), "PPM", grey(RAMP)),
    "grey of 16 bits in 32": (picture((RAMP * 65535).astype(np.int32)), "TIFF", grey(RAMP)),
    "floats": (picture(RAMP.astype(np.float32)), "TIFF", grey(RAMP)),
    "floats to 255": (picture(BYTES).convert("F"), "TIFF", grey(BYTES / 255)),
    "floats to 65535": (picture((RAMP * 65535).astype(np.float32)), "TIFF", grey(RAMP)),
    "transparent": (picture(np.dstack([COLOURS, ALPHA])), "PNG", ON_WHITE),
    "transparent, WebP": (picture(np.dstack([COLOURS, 0 * ALPHA])), "WEBP", np.ones((4, 256, 3))),
    "transparent grey": (picture(np.dstack([BYTES, ALPHA])), "PNG", grey(0.2 * BYTES / 255 + 0.8)),
    "transparent palette": (palette_with_a_hole(), "PNG", HOLED),
    "transparent palette, GIF": (palette_with_a_hole(), "GIF", HOLED),
    "a transparent colour": (keyed(), "PNG", HOLED),
    "CMYK": (picture(COLOURS, "CMYK"), "TIFF", COLOURS / 255),
    "palette": (picture(BYTES, "P"), "PNG", grey(BYTES / 255)),
    "1 bit": (picture(BYTES).point(lambda level: 255 * (level > 99), "1"), "PNG", grey(BYTES > 99)),
}


@pytest.fixture(params=TABLE)
def case(request):
    return TABLE[request.param]


@pytest.fixture
def content(case):
    image, kind, _ = case
    file = io.BytesIO()
    image.save(file, kind, lossless=True) if kind == "WEBP" else image.save(file, kind)
    return file.getvalue()


def test_it_is_what_one_sees(case, content):
    image, _, expected = case
    seen = torch.from_numpy(expected).float().movedim(-1, 0)
    for medium in (image, content):
        (found,) = read_frames(medium)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, seen, atol=1.1 / 65535, rtol=0)


def test_it_is_the_same_whichever_way_it_comes_in(case, content, tmp_path):
    image, _, _ = case
    (tmp_path / "file").write_bytes(content)
    ways = [image, content, tmp_path / "file", [image], to_image(image)]
    array = np.asarray(image)
    if image.mode in ("L", "LA", "RGB", "RGBA", "I;16", "1") and "transparency" not in image.info:
        ways += [array, torch.from_numpy(np.atleast_3d(array).copy()).movedim(-1, 0)]
    processor = Processor(32)
    first, *others = [processor([[way]]).pixels for way in ways]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_stands_upright(orientation):
    image = picture(COLOURS[:, :6])
    image.getexif()[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=image.getexif())
    upright = COLOURS[:, :6] / 255
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, -1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright),
    }[orientation]
    for medium in (file.getvalue(), pillow.open(file), image):
        (found,) = read_frames(medium)
        torch.testing.assert_close(found, torch.from_numpy(turned.copy()).float().movedim(-1, 0))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_seen(kind):
    first, second = (pillow.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    file = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    first.save(file, kind, save_all=True, append_images=[second], **lossless)
    assert pillow.open(file).n_frames == 2
    for medium in (file.getvalue(), pillow.open(file)):
        (found,) = read_frames(medium)
        assert found[:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("order", [">u2", "<u2"])
def test_arrays_of_16_bits_in_either_order_of_bytes(order):
    found = to_image((RAMP * 65535).astype(order))
    torch.testing.assert_close(found[0], torch.from_numpy(RAMP).float(), atol=1.1 / 65535, rtol=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (picture(np.array([[-1, 5]], dtype=np.int32)), r"integers of 16 bits at most, got -1\.\.5"),
        (picture(np.array([[0, 65536]], dtype=np.int32)), r"16 bits at most, got 0\.\.65536"),
        (picture(np.array([[-0.1, 1]], dtype=np.float32)), r"0\.\.65535, got -0\.1\.\.1"),
        (picture(np.array([[0, 7e4]], dtype=np.float32)), r"0\.\.65535, got 0\.\.7e\+04"),
        (picture(np.array([[0, np.nan]], dtype=np.float32)), r"0\.\.65535, got nan\.\.nan"),
    ],
)
def test_a_range_that_means_nothing_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        to_image(image)


@pytest.mark.parametrize(("height", "width"), [(1, 4000), (4000, 1), (3, 100), (100, 3)])
def test_of_a_thin_image_only_the_middle_is_resized(height, width, monkeypatch):
    """The same pixels as when all of it is, which for a line of 16,000 pixels takes 10 GiB."""
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    processor = Processor(8, fit="crop")
    found = processor([[image]]).pixels
    sizes = []
    monkeypatch.setattr("flamingo.processor._middle", lambda image: sizes.append(image.shape) or image)
    torch.testing.assert_close(found, processor([[image]]).pixels, atol=0.02, rtol=0)
    assert sizes == [image.shape]


def test_of_a_thin_image_little_is_held(monkeypatch):
    sizes = []
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(
        "flamingo.processor.F.interpolate",
        lambda image, size, **how: sizes.append(size) or interpolate(image, size, **how),
    )
    Processor(224, fit="crop")([[torch.zeros(3, 1, 16_000)]])
    assert max(sizes[0]) <= 8 * 224
