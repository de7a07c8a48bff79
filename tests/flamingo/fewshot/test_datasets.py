"""Files in the formats of VQAv2 and COCO, and every way in which one can be wrong."""

import json

import pytest

from flamingo.fewshot import read_captions, read_vqa
from tests.helpers.scripted import write_captions, write_vqa

pytest.importorskip("PIL")


@pytest.fixture
def vqa(tmp_path):
    return write_vqa(tmp_path, ["white", "black"], {1: ["black"] * 4 + ["dark"] * 6})


@pytest.fixture
def captions(tmp_path):
    return write_captions(tmp_path, [("white", ["snow", "a white wall "]), ("black", ["night"])])


def change(path, key, place, **fields):
    """Sets fields of an entry; None removes one."""
    data = json.loads(path.read_text())
    data[key][place] = {k: v for k, v in (data[key][place] | fields).items() if v is not None}
    path.write_text(json.dumps(data))


class TestVQA:
    def test_samples(self, vqa):
        first, second = read_vqa(**vqa)
        assert (first.id, second.id) == (100, 101)
        assert first.fields == {"question": "What colour is it?"}
        assert second.answer == "black"
        assert second.references == ("black",) * 4 + ("dark",) * 6
        assert second.image == vqa["images"] / "COCO_val2014_000000000001.png"

    def test_images_go_by_their_number(self, vqa):
        vqa["images"].joinpath("COCO_val2014_000000000001.png").rename(vqa["images"] / "1.png")
        assert read_vqa(**vqa)[1].image == vqa["images"] / "1.png"

    def test_files_are_utf_8(self, vqa):
        change(vqa["questions"], "questions", 0, question="où?")
        data = json.loads(vqa["questions"].read_text())
        vqa["questions"].write_bytes(json.dumps(data, ensure_ascii=False).encode())
        assert read_vqa(**vqa)[0].fields == {"question": "où?"}

    def test_the_most_common_answer_is_the_shots(self, vqa):
        """Not the first annotator's."""
        change(vqa["annotations"], "annotations", 1, multiple_choice_answer="dark")
        assert read_vqa(**vqa)[1].answer == "dark"

    def test_without_a_most_common_answer(self, vqa):
        change(vqa["annotations"], "annotations", 1, multiple_choice_answer=None)
        assert read_vqa(**vqa)[1].answer == "black"

    def test_errors(self, vqa, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"JSON file, found none at .*gone\.json"):
            read_vqa(**vqa | {"questions": tmp_path / "gone.json"})
        with pytest.raises(FileNotFoundError, match="folder of images, found none at"):
            read_vqa(**vqa | {"images": tmp_path / "gone"})
        with pytest.raises(ValueError, match=r"a list 'questions' in .*annotations\.json"):
            read_vqa(**vqa | {"questions": vqa["annotations"]})
        change(vqa["annotations"], "annotations", 0, answers=[])
        with pytest.raises(ValueError, match=r"answers to question 100 in .*annotations\.json, found none"):
            read_vqa(**vqa)
        change(vqa["annotations"], "annotations", 0, answers=[{"answer": "white"}])
        change(vqa["questions"], "questions", 1, image_id=7)
        with pytest.raises(FileNotFoundError, match="ends in the image's number 7 in"):
            read_vqa(**vqa)
        change(vqa["questions"], "questions", 1, question_id=55)
        with pytest.raises(ValueError, match="answers to question 55 in"):
            read_vqa(**vqa)
        change(vqa["questions"], "questions", 1, question=None)
        with pytest.raises(ValueError, match=r"questions in .* to have 'question', which one lacks"):
            read_vqa(**vqa)
        vqa["questions"].write_text("{")
        with pytest.raises(ValueError, match=r"JSON with a list 'questions' in .*JSONDecodeError"):
            read_vqa(**vqa)


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
