"""Files of images and videos, and every way in which one can be unreadable."""

import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from flamingo import Processor, media
from flamingo.media import MAX_PIXELS, Segment, read_frames, read_image, read_video

RATE = 10  # frames a second of the video
LEVELS = [10 * n for n in range(25)]  # of grey, one a frame


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "greys.MKV")


def write_video(path, start=0):
    """Two and a half seconds from a start on, every frame of one grey, without losses."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "bgr0"
        for place, level in enumerate(LEVELS):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = RATE * start + place, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def photo(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    pillow.fromarray(pixels).save(path)
    return path, pixels


def levels(frames):
    """The grey of each frame, which must be one grey."""
    found = [round(frame.mean().item() * 255) for frame in frames]
    assert all((frame == frame[0, 0, 0]).all() for frame in frames)
    return found


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    """A PNG of one bit a pixel that ends where its pixels begin."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + png_chunk(b"IDAT", b"")


class TestVideo:
    @pytest.mark.parametrize(
        ("fps", "max_frames", "expected"),
        [
            (1, 8, [0, 10, 20]),
            (1, 2, [0, 10]),
            (2, 8, [0, 5, 10, 15, 20]),
            (10, 30, list(range(25))),
            (4, 30, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]),  # 2.5 frames apart: the one that is on show
            (20, 7, [0, 0, 1, 1, 2, 2, 3]),
            (0.1, 8, [0]),
        ],
    )
    def test_frames_at_a_rate(self, video, fps, max_frames, expected):
        frames = list(read_video(video, fps=fps, max_frames=max_frames))
        assert all(frame.shape == (3, 16, 32) for frame in frames)
        assert levels(frames) == [LEVELS[place] for place in expected]

    def test_a_video_that_begins_late(self, tmp_path):
        late = write_video(tmp_path / "late.mkv", start=3)
        assert levels(list(read_video(late, fps=2))) == [LEVELS[place] for place in (0, 5, 10, 15, 20)]

    @pytest.mark.parametrize(
        ("start", "end", "fps", "expected"),
        [
            (0.0, 1.0, 2, [0, 5]),
            (0.5, 1.5, 2, [5, 10]),
            (0.55, 1.0, 10, [5, 6, 7, 8, 9]),  # what is on show at 0.55, 0.65 ...
            (1.0, 1.01, 1, [10]),  # one frame at least
            (2.0, 9.0, 1, [20]),  # the video ends before
            (2.4, 9.0, 1, [24]),
        ],
    )
    @pytest.mark.parametrize("late", [0, 3])
    def test_a_segment(self, tmp_path, start, end, fps, expected, late):
        path = write_video(tmp_path / "greys.mkv", start=late)
        frames = read_frames(Segment(path, start, end), fps=fps, max_frames=30)
        assert levels(frames) == [LEVELS[place] for place in expected]

    def test_a_segment_between_frames_that_stand_alone(self, tmp_path):
        """Most frames of a real video say what has changed since the last."""
        av = pytest.importorskip("av")
        path = tmp_path / "greys.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=RATE, options={"g": "10", "qscale": "1"})
            stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
            for level in LEVELS:
                frame = np.full((16, 32, 3), level, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        whole = [frame.mean().item() for frame in read_video(path, fps=RATE, max_frames=30)]
        part = [
            frame.mean().item() for frame in read_frames(Segment(path, 1.7, 2.1), fps=RATE, max_frames=30)
        ]
        assert part == whole[17:21]
        assert max(abs(value - level / 255) for value, level in zip(whole, LEVELS, strict=True)) < 0.03

    @pytest.mark.parametrize(("start", "end"), [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)])
    def test_a_segment_without_length(self, video, start, end):
        with pytest.raises(ValueError, match="0 <= start < end in seconds, got"):
            list(read_frames(Segment(video, start, end)))

    def test_a_segment_behind_the_end(self, video):
        with pytest.raises(ValueError, match="a video with frames"):
            list(read_frames(Segment(video, 9.0, 10.0)))

    def test_a_segment_in_a_document(self, video):
        batch = Processor(16, fps=10)([[Segment(video, 1.0, 1.3), "a film"]])
        assert batch.pixels.shape == (1, 1, 3, 3, 16, 16)

    def test_a_document_with_an_image_and_a_video(self, video, photo):
        batch = Processor(16, fps=3, max_frames=30)([[photo[0], "a photo", video, "a film"]])
        assert batch.pixels.shape == (1, 2, 8, 3, 16, 16)
        assert batch.num_frames.tolist() == [[1, 8]]
        frames = list(read_video(video, fps=3, max_frames=30))
        assert torch.equal(batch.pixels[0, 1], Processor(16)([[frames]]).pixels[0, 0])

    def test_unreadable(self, tmp_path):
        pytest.importorskip("av")
        path = tmp_path / "broken.mp4"
        path.write_bytes(b"no video" * 100)
        with pytest.raises(ValueError, match=r"video that PyAV can read, got .*broken\.mp4"):
            Processor(16)([[path]])

    def test_sound_alone(self, tmp_path):
        av = pytest.importorskip("av")
        path = tmp_path / "sound.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 80), dtype=np.int16), format="s16", layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        with pytest.raises(ValueError, match=r"expected a video with frames, got .*sound\.mkv"):
            list(read_video(path))

    def test_a_frame_of_too_many_pixels(self, video):
        assert len(list(read_video(video, max_pixels=32 * 16))) == 3
        for read in (
            lambda: list(read_video(video, max_pixels=32 * 16 - 1)),
            lambda: Processor(16, max_pixels=32 * 16 - 1)([[video]]),
        ):
            with pytest.raises(
                ValueError, match=r"at most 511 pixels .*greys\.MKV: 32 x 16.* Raise max_pixels"
            ):
                read()

    def test_a_first_frame_of_too_many_pixels_is_not_decoded(self, video, monkeypatch):
        monkeypatch.setattr(media, "_at_rate", lambda *_: pytest.fail("decoded"))
        with pytest.raises(ValueError, match="at most 511 pixels"):
            list(read_video(video, max_pixels=32 * 16 - 1))

    def test_a_later_frame_of_too_many_pixels(self, tmp_path):
        """The stream begins with small frames, and only these are in its header."""
        path = tmp_path / "grows.m4v"
        path.write_bytes(b"".join(self.mpeg4(tmp_path / "part.m4v", side) for side in (32, 64)))
        sides = [frame.shape[-1] for frame in read_video(path, fps=RATE, max_pixels=64 * 64)]
        assert sides[0] == 32
        assert sides[-1] == 64
        with pytest.raises(ValueError, match=r"at most 4095 pixels .*grows\.m4v: 64 x 64"):
            list(read_video(path, fps=RATE, max_pixels=64 * 64 - 1))

    def mpeg4(self, path, side):
        av = pytest.importorskip("av")
        with av.open(str(path), "w", format="m4v") as container:
            stream = container.add_stream("mpeg4", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
            black = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), dtype=np.uint8), format="rgb24")
            for _ in range(4):
                container.mux(stream.encode(black))
            container.mux(stream.encode())
        return path.read_bytes()

    def test_a_list_of_other_files_is_no_video(self, video):
        """FFmpeg would open what it names."""
        path = video.parent / "list.mp4"
        path.write_text(f"ffconcat version 1.0\nfile {video.name}\n")
        with pytest.raises(ValueError, match=r"video that PyAV can read, got .*list\.mp4"):
            list(read_video(path))

    def test_without_pyav(self, video, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match=r"videos from files needs av: pip install av\."):
            Processor(16)([[video]])


class TestImage:
    def test_a_path_is_its_pixels(self, photo):
        path, pixels = photo
        batch, expected = Processor(16)([["a", path]]), Processor(16)([["a", pixels]])
        assert torch.equal(batch.pixels, expected.pixels)
        assert torch.equal(batch.input_ids, expected.input_ids)
        clip = Processor(16)([[[path, path]]])
        assert torch.equal(clip.pixels[0, 0, 1], expected.pixels[0, 0, 0])
        assert torch.equal(Processor(16)([("a<image>", [path])]).pixels, expected.pixels)

    @pytest.mark.parametrize(("height", "width"), [(90, 120), (41, 13), (16, 9)])
    def test_resizes_as_pillow_does(self, height, width):
        pillow = pytest.importorskip("PIL.Image")
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        processor = Processor(32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        ours = processor([[pixels]]).pixels[0, 0, 0]
        scale = 32 / max(height, width)
        size = (round(width * scale), round(height * scale))
        theirs = np.asarray(pillow.fromarray(pixels).resize(size, pillow.Resampling.BILINEAR)) / 255
        top, left = (32 - size[1]) // 2, (32 - size[0]) // 2
        inside = ours[:, top : top + size[1], left : left + size[0]].movedim(0, -1).numpy()
        # Pillow rounds to a byte after each of two passes.
        assert np.abs(inside - theirs).max() <= 1.5 / 255
        assert ours.sum() == pytest.approx(inside.sum(), rel=1e-5)

    def test_stands_upright(self, tmp_path):
        pillow = pytest.importorskip("PIL.Image")
        image = pillow.fromarray(np.zeros((10, 20, 3), dtype=np.uint8))
        exif = image.getexif()
        exif[0x0112] = 6  # the camera was turned by 90 degrees
        image.save(tmp_path / "turned.png", exif=exif)
        assert read_image(tmp_path / "turned.png").shape == (3, 20, 10)

    def test_palettes_and_greys_become_colours(self, tmp_path):
        pillow = pytest.importorskip("PIL.Image")
        image = pillow.fromarray(np.full((4, 4, 3), (255, 0, 0), dtype=np.uint8))
        image.convert("P").save(tmp_path / "palette.png")
        assert read_image(tmp_path / "palette.png")[:, 0, 0].tolist() == [1, 0, 0]
        image.convert("L").save(tmp_path / "grey.png")
        assert len(set(read_image(tmp_path / "grey.png")[:, 0, 0].tolist())) == 1

    @pytest.mark.parametrize("content", [b"", b"no image", None])
    def test_unreadable(self, photo, tmp_path, content):
        path = tmp_path / "broken.png"
        path.write_bytes(photo[0].read_bytes()[:-400] if content is None else content)
        with pytest.raises(ValueError, match=r"image that Pillow can read, got .*broken\.png"):
            Processor(16)([["fine"], ["text", path]])

    @pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"])
    def test_kinds_by_their_content(self, photo, tmp_path, kind):
        pillow = pytest.importorskip("PIL.Image")
        pillow.fromarray(photo[1]).save(tmp_path / "photo", format=kind)
        assert read_image(tmp_path / "photo").shape == (3, 20, 30)

    def test_postscript_is_run_by_nobody(self, tmp_path, monkeypatch):
        """Pillow gives it to `gs`, here a program that leaves a trace."""
        pytest.importorskip("PIL")
        trace, path = tmp_path / "trace", tmp_path / "drawing.png"
        (tmp_path / "gs").write_text(f"#!/bin/sh\necho 10.0\ntouch {trace}\n")
        (tmp_path / "gs").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
        with pytest.raises(ValueError, match=r"image that Pillow can read, got .*drawing\.png"):
            read_image(path)
        assert not trace.exists()

    @pytest.mark.parametrize(
        ("side", "said"),
        [
            (10_000, "10000 x 10000"),
            (14_000, "196000000 pixels"),  # Pillow itself refuses from twice its limit on
            (2**31 - 1, "4611686014132420609 pixels"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_too_many_pixels_are_refused_from_the_header(self, tmp_path, side, said):
        """There are no pixels, so to decode them would be another error."""
        pytest.importorskip("PIL")
        path = tmp_path / "large.png"
        path.write_bytes(png(side, side))
        with pytest.raises(
            ValueError, match=rf"at most {MAX_PIXELS} pixels .*large\.png: .*{said}.* Raise max_pixels"
        ):
            Processor(16)([[path]])

    def test_the_limit_is_the_users(self, photo, tmp_path, monkeypatch):
        pillow = pytest.importorskip("PIL.Image")
        assert read_image(photo[0], max_pixels=600).shape == (3, 20, 30)
        with pytest.raises(ValueError, match=r"at most 599 pixels .*photo\.png: 30 x 20"):
            Processor(16, max_pixels=599)([[photo[0]]])
        monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", pillow.MAX_IMAGE_PIXELS)
        path = tmp_path / "large.png"
        path.write_bytes(png(20_000, 20_000))
        with pytest.raises(
            ValueError, match=r"image that Pillow can read, got .*large\.png"
        ):  # it has no end
            read_image(path, max_pixels=20_000**2)

    def test_a_small_file_with_a_large_text(self, tmp_path):
        pytest.importorskip("PIL")
        path = tmp_path / "wordy.png"
        text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10_000_000)))
        path.write_bytes(png(8, 8, text))
        with pytest.raises(ValueError, match=r"image that Pillow can read, got .*wordy\.png"):
            read_image(path)

    @pytest.mark.parametrize("name", ["gone.png", "gone.mp4"])
    def test_missing(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match=rf"expected a file, found none at .*{name}"):
            Processor(16)([[tmp_path / name]])

    def test_without_pillow(self, photo, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(ImportError, match=r"images from files needs pillow: pip install pillow"):
            list(read_frames(Path(photo[0])))


def test_a_tile_that_is_larger_than_its_image(tmp_path):
    """A decoder of TIFF files holds a whole one."""
    pytest.importorskip("PIL")
    content = zlib.compress(bytes(10))
    side, at = 300, 8 + 2 + 10 * 12 + 4  # where the content begins, behind the header and ten tags
    tags = {
        256: 10,
        257: 10,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        322: side,
        323: side,
        324: at,
        325: len(content),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    (tmp_path / "tile.tif").write_bytes(header + entries + bytes(4) + content)
    with pytest.raises(ValueError, match=r"at most 89999 pixels .*tile\.tif: 300 x 300\. Raise max_pixels"):
        read_image(tmp_path / "tile.tif", max_pixels=side**2 - 1)
