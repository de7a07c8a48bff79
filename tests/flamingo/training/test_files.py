"""Where the files of a sample are found, and where they are not looked for."""

import base64
import json

import pytest

from flamingo.training.files import File, find_caption, find_clip, find_image, find_pictures
from flamingo.training.layouts import Picture


class TestPairs:
    @pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif"])
    def test_an_image_among_other_files(self, kind):
        sample = {"cls": b"3", "npz": b"", "json": b"{}", kind: b"pixels", "txt": b"a", "seg.png": b""}
        assert find_image(sample) == File(kind, b"pixels")

    @pytest.mark.parametrize(
        ("sample", "caption"),
        [
            ({"txt": b" a cat\n", "json": b'{"caption": "a dog"}'}, "a cat"),
            ({"caption": b"a cat"}, "a cat"),
            ({"text": b"a cat"}, "a cat"),
            ({"json": json.dumps({"caption": "a café", "url": "x"}).encode()}, "a café"),
            ({"txt": b"\xef\xbb\xbfa cat"}, "a cat"),
        ],
    )
    def test_a_caption(self, sample, caption):
        assert find_caption(sample) == caption

    @pytest.mark.parametrize("content", [b"{}", b'{"caption": null}', b'["caption"]', b'"caption"'])
    def test_json_without_a_caption(self, content):
        with pytest.raises(ValueError, match=r"expected a caption .* got json"):
            find_caption({"json": content})

    @pytest.mark.parametrize("sample", [{"txt": b""}, {"txt": b" \n"}, {"json": b'{"caption": " "}'}])
    def test_an_empty_caption(self, sample):
        with pytest.raises(ValueError, match="expected a caption, got an empty one"):
            find_caption(sample)

    def test_files_that_are_apart_are_said_to_be(self):
        with pytest.raises(ValueError, match=r"got txt \(the files of a sample must follow each other\)"):
            find_image({"txt": b"a"})


class TestClips:
    def test_frames_by_their_numbers_and_a_thumbnail_is_none(self):
        sample = {f"{i}.jpg": b"%d" % i for i in (10, 2, 0)} | {"jpg": b"", "thumb.png": b"", "txt": b"a"}
        assert find_clip(sample, frames=2) == [File("0.jpg", b"0"), File("2.jpg", b"2")]
        assert [file.name for file in find_clip(sample, frames=9)] == ["0.jpg", "2.jpg", "10.jpg"]

    def test_a_video(self):
        (file,) = find_clip({"json": b"{}", "mp4": b"video", "txt": b"a"}, frames=2)
        assert file == File("mp4", b"video")
        assert file.is_video
        assert not File("0.png", b"").is_video

    def test_neither(self):
        with pytest.raises(ValueError, match=r"expected a video .* or frames .*, got txt, jpg"):
            find_clip({"txt": b"a", "jpg": b""}, frames=2)


def pictures(parts, sample, folder=None):
    found = find_pictures(parts, sample, folder)
    return [part if isinstance(part, str) else part[0].content for part in found]


class TestPictures:
    def test_by_name_whatever_its_case(self):
        assert pictures(["a", Picture("A.JPG")], {"a.jpg": b"one"}) == ["a", b"one"]

    def test_in_base64(self):
        content = base64.b64encode(b"one").decode()
        for text in (content, f"data:image/jpeg;base64,{content}"):
            assert pictures([Picture("a.jpg", text)], {"a.jpg": b"two"}) == [b"one"]
        with pytest.raises(ValueError, match="expected an image in base64, got 'x'"):
            pictures([Picture("a.jpg", "x")], {})

    def test_by_number_where_there_are_as_many(self):
        """Numbered by their place among the images or in the page, which comes to the same."""
        parts = [Picture("https://a.example/0.jpg", None, 1, 2), "a"]
        for numbers in ((0, 1), (1, 3), (9, 10)):
            sample = dict(zip((f"{number}.jpg" for number in numbers), (b"one", b"two"), strict=True))
            assert pictures(parts, dict(reversed(sample.items()))) == [b"two", "a"]
        assert pictures([Picture("https://a.example/a", None, 0, 1)], {"json": b"", "png": b"one"}) == [
            b"one"
        ]

    def test_of_fewer_nobody_knows_which_is_which(self):
        parts = [Picture("https://a.example/a", None, 0, 2), Picture("https://a.example/b", None, 1, 2)]
        with pytest.raises(
            ValueError, match=r"expected an image https://a\.example/a in the sample, got 1\.jpg"
        ):
            pictures(parts, {"1.jpg": b"one"})

    def test_in_a_folder(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.jpg").write_bytes(b"one")
        assert pictures([Picture("in/a.jpg")], {"json": b""}, str(tmp_path)) == [b"one"]

    @pytest.mark.parametrize(
        "name", ["../secret.jpg", "in/../../secret.jpg", "{folder}/secret.jpg", "\0", "a" * 300]
    )
    def test_no_name_leaves_the_folder(self, tmp_path, name):
        (tmp_path / "secret.jpg").write_bytes(b"secret")
        (tmp_path / "in").mkdir()
        name = name.replace("{folder}", str(tmp_path))
        with pytest.raises(ValueError, match="expected an image "):
            pictures([Picture(name)], {"json": b""}, str(tmp_path / "in"))

    def test_a_page_goes_without_an_image_that_was_not_downloaded(self):
        parts = ["a", Picture("a.jpg", None, 0, 2), "b", Picture("b.jpg", None, 1, 2)]
        assert pictures(parts, {"b.jpg": b"two"}) == ["a", "b", b"two"]

    def test_but_not_without_any(self, tmp_path):
        parts = ["a", Picture("a.jpg", None, 0, 2), Picture("b.jpg", None, 1, 2)]
        with pytest.raises(ValueError, match=rf"an image a\.jpg in the sample or in {tmp_path}, got json"):
            pictures(parts, {"json": b""}, str(tmp_path))

    def test_and_ours_without_none(self):
        parts = [Picture("0.png"), Picture("1.png")]
        with pytest.raises(ValueError, match=r"expected an image 1\.png in the sample, got 0\.png"):
            pictures(parts, {"0.png": b""})
