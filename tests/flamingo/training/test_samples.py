"""Files to documents: windows, captions, clips."""

import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from flamingo.pixels import to_image
from flamingo.tokenizer import ByteTokenizer
from flamingo.training.config import Clips, Documents, Pairs
from flamingo.training.samples import to_document, window
from flamingo.training.shards import clip_sample, document_sample, pair_sample
from tests.helpers.tiny_run import images, processor

ENCODE = ByteTokenizer().encode
PAGES = Documents(name="pages", shards=("x",), length=40)
PAIRS = Pairs(name="pairs", shards=("x",), length=20)
CLIPS = Clips(name="clips", shards=("x",), frames=3, flip=0.0, colour=0.0)


def windows(parts, length, max_images=5, times=200):
    return [window(parts, length, max_images, ENCODE, random.Random(i)) for i in range(times)]


class TestWindow:
    WORDS = " ".join(f"word{i:02d}" for i in range(30))

    def test_it_is_a_run_of_the_document(self):
        found = windows([self.WORDS], 40)
        assert all(len(part) == 1 and part[0] in self.WORDS for part in found)
        assert len({part[0] for part in found}) > 20

    def test_it_is_full_even_at_the_end(self):
        """No further word fits: 3 tokens frame it, a word has 7, and the first one, without a space, 6."""
        assert {len(ENCODE(part)) for (part,) in windows([self.WORDS], 40)} == {34, 35}

    def test_a_document_that_fits_is_taken_whole(self):
        assert windows(["short ", 1, " text"], 30, times=20) == [["short ", 1, " text"]] * 20

    def test_images_take_two_tokens(self):
        found = windows([1, 2, 3, 4, 5, 6, 7, 8], 3 + 2 * 3)
        assert {len(part) for part in found} == {3}
        assert {part[0] for part in found} == {1, 2, 3, 4, 5, 6}

    def test_the_first_images_are_kept(self):
        (found, *_) = windows(["a", 1, "b", 2, "c", 3, "d"], 40, max_images=2)
        assert found == ["a", 1, "b", 2, "cd"]

    def test_the_tokens_are_as_many_as_asked(self):
        """Counted where they count: in the batch."""
        image = images(1, seed=0)[0]
        parts = ["日本 語 " * 9, image, " x" * 40, image, "y" * 50]
        for part in windows(parts, 32):
            assert processor()([part]).input_ids.shape[1] <= 32

    def test_an_empty_document_is_an_empty_window(self):
        assert windows([], 10, times=1) == [[]]


class TestDocuments:
    def test_only_images_in_the_window_are_decoded(self):
        sample = document_sample(["word " * 40, *images(1, seed=0)])
        sample["0.png"] = b"damaged"
        parts = json.loads(sample["json"])
        places = {len(window(parts, 40, 5, ENCODE, random.Random(i))): i for i in range(30)}
        assert sorted(places) == [1, 2]
        (text,) = to_document(PAGES, sample, ENCODE, random.Random(places[1]))
        assert set(text.split()) == {"word"}
        with pytest.raises(ValueError, match=r"expected an image that Pillow can read, got 0\.png"):
            to_document(PAGES, sample, ENCODE, random.Random(places[2]))

    def test_without_json_it_is_none(self):
        with pytest.raises(ValueError, match="expected a document's json, got txt"):
            to_document(PAGES, {"txt": b""}, ENCODE, random.Random(0))


class TestWrittenTokens:
    """`<image>` and `<EOC>` in the words of a page."""

    WORDS = "an <image> and an <EOC> and <EOC><image> here"

    @pytest.mark.parametrize("config", [PAGES, PAIRS])
    def test_they_are_text(self, config):
        config, own, image = replace(config, length=80), processor(), images(1, seed=0)[0]
        is_page = isinstance(config, Documents)
        sample = document_sample([image, self.WORDS]) if is_page else pair_sample(image, self.WORDS)
        document = to_document(config, sample, own.encode, random.Random(3))
        ids = own([document]).input_ids[0].tolist()
        assert ids.count(own.tokenizer.image_id) == 1
        assert ids.count(own.tokenizer.eoc_id) == 1  # at the end
        assert self.WORDS in own.tokenizer.decode(ids)

    def test_they_are_measured_as_text(self):
        own = processor()
        for length in range(10, 60, 3):
            sample = pair_sample(images(1, seed=0)[0], self.WORDS)
            document = to_document(replace(PAIRS, length=length), sample, own.encode, random.Random(0))
            assert own([document]).input_ids.shape[1] <= length


class TestPairs:
    def test_half_of_the_captions_get_a_space(self):
        sample = pair_sample(images(1, seed=0)[0], "a cat")
        captions = [to_document(PAIRS, sample, ENCODE, random.Random(i))[1] for i in range(400)]
        assert set(captions) == {"a cat", " a cat"}
        assert 160 < captions.count(" a cat") < 240

    @pytest.mark.parametrize(("space", "caption"), [(0.0, "a cat"), (1.0, " a cat")])
    def test_all_of_them_or_none_where_it_is_asked(self, space, caption):
        config, sample = replace(PAIRS, space=space), pair_sample(images(1, seed=0)[0], "a cat")
        assert {to_document(config, sample, ENCODE, random.Random(i))[1] for i in range(20)} == {caption}

    def test_documents_get_none(self):
        sample = document_sample(["a cat"])
        assert {tuple(to_document(PAGES, sample, ENCODE, random.Random(i))) for i in range(50)} == {
            ("a cat",)
        }

    def test_a_long_caption_loses_its_end(self):
        image = images(1, seed=0)[0]
        for i in range(10):
            document = to_document(
                PAIRS, pair_sample(image, "one two three four five"), ENCODE, random.Random(i)
            )
            assert document[1].strip() == "one two three"
            assert processor()([document]).input_ids.shape[1] <= 20

    @pytest.mark.parametrize("space", [0.0, 1.0])
    def test_a_caption_is_as_long_as_fits(self, space):
        """A word of one letter and its space more would be two tokens too many."""
        sample = pair_sample(images(1, seed=0)[0], "a b c d e f g h i j k l m n")
        for length in range(10, 24):
            config = replace(PAIRS, length=length, space=space)
            document = to_document(config, sample, ENCODE, random.Random(0))
            assert length - 2 < processor()([document]).input_ids.shape[1] <= length

    def test_jpegs_too_and_upright(self):
        buffer, exif = io.BytesIO(), Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # the camera lay on its side
        images(1, seed=0)[0].save(buffer, format="jpeg", exif=exif)
        image, _ = to_document(PAIRS, {"jpg": buffer.getvalue(), "txt": b"x"}, ENCODE, random.Random(0))
        assert image.shape == (3, 12, 9)

    @pytest.mark.parametrize(
        ("missing", "message"),
        [("png", r"an image \(png, .*, got txt"), ("txt", r"a caption \(txt, .*, got png")],
    )
    def test_a_missing_file_is_named(self, missing, message):
        sample = pair_sample(images(1, seed=0)[0], "text")
        del sample[missing]
        with pytest.raises(ValueError, match=message):
            to_document(PAIRS, sample, ENCODE, random.Random(0))


class TestClips:
    def test_frames_in_their_order(self):
        """Even where there are more than nine."""
        frames = images(12, seed=0)
        config = replace(CLIPS, frames=11)
        clip, caption = to_document(config, clip_sample(frames, "moves"), ENCODE, random.Random(0))
        for found, frame in zip(clip, frames[:11], strict=True):
            assert torch.equal(found, to_image(frame))
        assert caption.strip() == "moves"

    def test_a_video_is_read_at_its_rate(self):
        """Four seconds of four frames each, a second brighter than the one before."""
        av = pytest.importorskip("av")
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width = stream.height = 32
            for i in range(16):
                pixels = np.full((32, 32, 3), 60 * (i // 4), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode())
        sample = {"mp4": buffer.getvalue(), "txt": b"brighter"}
        clip, _ = to_document(CLIPS, sample, ENCODE, random.Random(0))
        assert [round(frame.mean().item() * 255 / 60) for frame in clip] == [0, 1, 2]
        twice = replace(CLIPS, frames=5, fps=2.0)
        clip, _ = to_document(twice, sample, ENCODE, random.Random(0))
        assert [round(frame.mean().item() * 255 / 60) for frame in clip] == [0, 0, 1, 1, 2]
        with pytest.raises(ValueError, match=r"at most 1 pixels .*got mp4"):
            to_document(replace(CLIPS, max_pixels=1), sample, ENCODE, random.Random(0))
        with pytest.raises(ValueError, match=r"expected a video that PyAV can read, got mp4"):
            to_document(CLIPS, {"mp4": b"damaged", "txt": b"x"}, ENCODE, random.Random(0))
