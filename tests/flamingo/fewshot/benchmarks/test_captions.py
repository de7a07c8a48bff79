"""Captions as they are published."""

import json

import pytest

from flamingo.fewshot import cider, read_captions
from flamingo.fewshot.benchmarks import BENCHMARKS, read_vatex, read_youcook2
from flamingo.fewshot.benchmarks.captions import TRAIN, caption_score, upload_captions, upload_vatex
from flamingo.media import Segment
from tests.flamingo.fewshot.benchmarks.test_questions import change, records
from tests.helpers import published
from tests.helpers.scripted import write_captions


@pytest.fixture
def captions(tmp_path):
    pytest.importorskip("PIL")
    return write_captions(tmp_path, [("white", ["snow", "a white wall "]), ("black", ["night"])])


class TestCaptions:
    def test_samples(self, captions):
        first, second = read_captions(**captions)
        assert first.references == ("snow", "a white wall")
        assert (first.answer, second.answer) == ("snow", "night")
        assert second.image == captions["images"] / "001.png"
        assert second.fields == {}

    def test_errors(self, captions):
        change(captions["captions"], "images", 1, file_name="002.png")
        with pytest.raises(FileNotFoundError, match=r"image 1 at .*002\.png, found none"):
            read_captions(**captions)
        change(captions["captions"], "annotations", 2, image_id=0)
        with pytest.raises(ValueError, match="a caption of image 1 in"):
            read_captions(**captions)
        change(captions["captions"], "images", 1, id=0)
        with pytest.raises(ValueError, match=r"ids that differ in .*captions\.json, got two of 0"):
            read_captions(**captions | {"images": written(captions, "002.png")})

    @pytest.mark.parametrize("value", [None, ["red"], 7])
    def test_other_kinds_are_never_texts(self, captions, value):
        data = json.loads(captions["captions"].read_text())
        data["annotations"][0]["caption"] = value
        captions["captions"].write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"'caption' in .*captions\.json to be a text, got "):
            read_captions(**captions)

    @pytest.mark.parametrize("content", ["[]", "{}", '{"images": 3}', '{"images": [3]}', "{", "[" * 100_000])
    def test_files_of_something_else(self, captions, content):
        captions["captions"].write_text(content)
        with pytest.raises(ValueError, match=r"in .*captions\.json"):
            read_captions(**captions)


def written(captions, name):
    published.touch(captions["images"], name)
    return captions["images"]


class TestKarpathy:
    def test_coco(self, tmp_path):
        files = published.coco(tmp_path)
        (sample,) = BENCHMARKS["coco"].read(**files)
        assert sample.id == 391895
        assert sample.references == ("A man in test.", "A horse.")
        assert sample.answer == "A man in test."
        assert sample.image == files["images"] / "val2014" / "COCO_val2014_000000391895.jpg"
        support = BENCHMARKS["coco"].read_support(**files)
        assert [one.id for one in support] == [60623, 57870]  # restval and train
        assert support[1].image.parent.name == "train2014"

    def test_images_in_one_folder(self, tmp_path):
        files = published.coco(tmp_path)
        flat = published.touch(tmp_path / "flat", "COCO_val2014_000000391895.jpg")
        assert read_captions(files["annotations"], flat)[0].image.parent == flat

    def test_flickr30k(self, tmp_path):
        files = published.flickr30k(tmp_path)
        (sample,) = BENCHMARKS["flickr30k"].read(**files)
        assert (sample.id, sample.image.name, sample.references) == (1, "100001.jpg", ("Two men.",))
        assert [one.id for one in BENCHMARKS["flickr30k"].read_support(**files)] == [0]

    def test_errors(self, tmp_path):
        files = published.flickr30k(tmp_path)
        with pytest.raises(ValueError, match=r"the split restval in .*flickr30k\.json, got test, train, val"):
            read_captions(*files.values(), ["restval"])
        (files["images"] / "100001.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"an image at .*100001\.jpg"):
            read_captions(*files.values())
        change(files["annotations"], "images", 1, sentences=[])
        published.touch(files["images"], "100001.jpg")
        with pytest.raises(ValueError, match=r"a sentence about 100001\.jpg in .*, found none"):
            read_captions(*files.values())
        change(files["annotations"], "images", 1, sentences=[{"raw": 3}])
        with pytest.raises(ValueError, match=r"'raw' in .*flickr30k\.json to be a text, got 3"):
            read_captions(*files.values())


class TestVideos:
    def test_vatex(self, tmp_path):
        files = published.vatex(tmp_path)
        first, second = read_vatex(**files)
        assert first.id == "G9zN5TTuGO4_000179_000189"
        assert (first.answer, first.references) == ("A man runs.", ("A man runs.", "Someone runs."))
        assert first.image == files["videos"] / "G9zN5TTuGO4_000179_000189.mp4"
        assert not second.image.exists()  # gone, and no error

    def test_a_test_split_of_vatex_has_no_captions(self, tmp_path):
        files = published.vatex(tmp_path)
        published.write_json(files["annotations"], [{"videoID": "G9zN5TTuGO4_000179_000189"}])
        samples = read_vatex(**files)
        found = records(samples, ["a dog"])
        assert caption_score(found) is None
        assert upload_vatex(found) == {"G9zN5TTuGO4_000179_000189": "a dog"}

    def test_youcook2(self, tmp_path):
        files = published.youcook2(tmp_path)
        first, second = read_youcook2(**files)
        assert (first.id, second.id) == ("GLd3aX16zBg_0", "GLd3aX16zBg_1")
        assert second.answer == "place cheese on the bread"
        path = files["videos"] / "validation/113/GLd3aX16zBg.mp4"
        assert second.image == Segment(path, 114, 127)
        support = BENCHMARKS["youcook2"].read_support(**files)
        assert [one.id for one in support] == ["xHr8X2Wpmno_0", "xHr8X2Wpmno_1"]

    def test_a_segment_that_was_cut_out(self, tmp_path):
        files = published.youcook2(tmp_path)
        published.touch(files["videos"], "cut/GLd3aX16zBg_1.mp4")
        assert read_youcook2(**files)[1].image == files["videos"] / "cut/GLd3aX16zBg_1.mp4"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"segment": [102, 90]}, "0 <= start < end of GLd3aX16zBg_0 in .*, got 102 and 90"),
            ({"segment": [90]}, r"'segment' of GLd3aX16zBg_0 in .* to be \[start, end\], got \[90\]"),
            ({"segment": "90"}, "'segment' in .* to be a list of numbers"),
            ({"sentence": None}, "'sentence' in .* to be a text, got null"),
            ({"id": 1}, "ids that differ in .*, got two of 'GLd3aX16zBg_1'"),
        ],
    )
    def test_errors(self, tmp_path, change, message):
        files = published.youcook2(tmp_path)
        data = json.loads(files["annotations"].read_text())
        data["database"]["GLd3aX16zBg"]["annotations"][0].update(change)
        files["annotations"].write_text(json.dumps(data))
        with pytest.raises(ValueError, match=message):
            read_youcook2(**files)

    def test_files_of_something_else(self, tmp_path):
        files = published.youcook2(tmp_path)
        for content in ("[]", '{"database": []}', '{"database": {"x": {}}}', '{"database": {}}'):
            files["annotations"].write_text(content)
            with pytest.raises(ValueError, match=r"youcookii_annotations_trainval\.json"):
                read_youcook2(**files)


def test_score_is_a_hundred_times_cider(captions):
    samples = read_captions(**captions)
    said = ["a white wall", "night"]
    expected = 100 * cider(said, [sample.references for sample in samples])[0]
    assert caption_score(records(samples, said)) == pytest.approx(expected)
    assert expected > 0


def test_upload_of_captions(tmp_path):
    samples = BENCHMARKS["coco"].read(**published.coco(tmp_path))
    assert upload_captions(records(samples, ["a man"])) == [{"image_id": 391895, "caption": "a man"}]


def test_shots_of_karpathys_are_train_and_restval():
    assert set(TRAIN) == {"train", "restval"}
