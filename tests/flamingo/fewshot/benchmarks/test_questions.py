"""Questions about images as they are published, and every way in which a file can be wrong."""

import json

import pytest

from flamingo.fewshot import read_vqa
from flamingo.fewshot.benchmarks import BENCHMARKS, read_textvqa, read_vizwiz
from flamingo.fewshot.benchmarks.questions import open_flamingo_score, upload_vizwiz, upload_vqa, vqa_score
from tests.helpers import published
from tests.helpers.scripted import write_vqa

pytest.importorskip("PIL")


@pytest.fixture
def vqa(tmp_path):
    return write_vqa(tmp_path, ["white", "black"], {1: ["black"] * 4 + ["dark"] * 6})


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

    def test_it_is_counted_where_the_file_does_not_say(self, vqa):
        change(vqa["annotations"], "annotations", 1, multiple_choice_answer=None)
        assert read_vqa(**vqa)[1].answer == "dark"

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
        with pytest.raises(ValueError, match=r"expected JSON in .*questions\.json, got JSONDecodeError"):
            read_vqa(**vqa)

    @pytest.mark.parametrize("question", ["\ud800", "?\udc00"])
    def test_half_a_character_is_no_text(self, vqa, question):
        change(vqa["questions"], "questions", 0, question=question)
        with pytest.raises(ValueError, match=r"'question' in .* to be a text, got \"\??\\ud[8c]00\""):
            read_vqa(**vqa)

    def test_no_key_is_lost_to_another_of_its_name(self, vqa):
        text = vqa["questions"].read_text()
        vqa["questions"].write_text(text.replace('"questions"', '"questions": [], "questions"', 1))
        with pytest.raises(ValueError, match=r"an object with the key 'questions' twice"):
            read_vqa(**vqa)

    def test_as_published(self, tmp_path):
        first, second = read_vqa(**published.vqav2(tmp_path))
        assert (first.id, first.fields) == (262148000, {"question": "Where is he looking?"})
        assert (first.answer, first.references) == ("down", ("down",) * 8 + ("up",) * 2)
        assert second.image == tmp_path / "val2014" / "COCO_val2014_000000393225.jpg"

    def test_a_test_split_has_no_answers(self, tmp_path):
        files = published.vqav2(tmp_path)
        assert [sample.references for sample in read_vqa(**files | {"annotations": None})] == [(), ()]
        published.write_json(files["annotations"], {"annotations": []})
        assert [sample.references for sample in read_vqa(**files)] == [(), ()]

    def test_images_lie_in_folders_below(self, tmp_path):
        files = published.vqav2(tmp_path / "data")
        above = read_vqa(**files | {"images": tmp_path})
        assert [sample.image for sample in above] == [sample.image for sample in read_vqa(**files)]

    def test_links_and_hidden_files(self, vqa):
        """A folder that holds itself, and what a Mac leaves beside every file."""
        (vqa["images"] / "again").symlink_to(vqa["images"])
        (vqa["images"] / "._COCO_val2014_000000000001.png").touch()
        assert len(read_vqa(**vqa)) == 2

    def test_two_files_of_one_number(self, vqa):
        vqa["images"].joinpath("000001.jpg").touch()
        with pytest.raises(ValueError, match=r"one file for 1 in .*, got .*000001\.jpg and .*\.png\. Name"):
            read_vqa(**vqa)
        vqa["images"].joinpath("000001.jpg").rename(vqa["images"] / "1.txt")  # no image
        read_vqa(**vqa)

    @pytest.mark.parametrize("value", [None, 7, ["red"], True])
    @pytest.mark.parametrize(
        ("file", "field"), [("questions", "question"), ("annotations", "multiple_choice_answer")]
    )
    def test_other_kinds_are_never_texts(self, vqa, file, field, value):
        data = json.loads(vqa[file].read_text())
        data[file][0][field] = value
        vqa[file].write_text(json.dumps(data))
        with pytest.raises(ValueError, match=rf"'{field}' in .*{file}\.json to be a text, got ") as error:
            read_vqa(**vqa)
        assert str(error.value).endswith(f"{json.dumps(value)}.")

    @pytest.mark.parametrize("value", ["red", None, [None], ["red"], [{"answer": None}], [{"text": "red"}]])
    def test_answers_of_other_kinds(self, vqa, value):
        data = json.loads(vqa["annotations"].read_text())
        data["annotations"][0]["answers"] = value
        vqa["annotations"].write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"answers?'? in .*annotations\.json to (be|have)"):
            read_vqa(**vqa)

    @pytest.mark.parametrize("value", [None, True, [2], 2.5])
    @pytest.mark.parametrize("field", ["question_id", "image_id"])
    def test_ids_are_numbers_or_texts(self, vqa, field, value):
        data = json.loads(vqa["questions"].read_text())
        data["questions"][1][field] = value
        vqa["questions"].write_text(json.dumps(data))
        with pytest.raises(ValueError, match=rf"'{field}' in .*questions\.json to be a number or a text"):
            read_vqa(**vqa)

    def test_ids(self, vqa):
        change(vqa["questions"], "questions", 1, question_id=100)
        with pytest.raises(ValueError, match=r"ids that differ in .*questions\.json, got two of 100"):
            read_vqa(**vqa)
        change(vqa["questions"], "questions", 1, question_id="101")
        with pytest.raises(ValueError, match=r"'101' in .*annotations\.json, found none\. It has 101, and"):
            read_vqa(**vqa)
        change(vqa["annotations"], "annotations", 0, question_id=101)
        with pytest.raises(ValueError, match=r"ids that differ in .*annotations\.json, got two of 101"):
            read_vqa(**vqa)


class TestOKVQA:
    def test_as_published(self, tmp_path):
        (sample,) = BENCHMARKS["okvqa"].read(**published.okvqa(tmp_path))
        assert sample.answer == "surfing"  # what people said, and not its stem
        assert sample.references == ("surfing",) * 6 + ("surf",) * 4
        assert sample.details["stems"] == ["surf"] * 10

    @pytest.mark.parametrize(("said", "value"), [("surfing", 100), ("a surf", 100), ("skiing", 0)])
    def test_score(self, tmp_path, said, value):
        pytest.importorskip("nltk")
        assert score("okvqa", BENCHMARKS["okvqa"].read(**published.okvqa(tmp_path)), [said]) == value


class TestTextVQA:
    def test_as_published(self, tmp_path):
        files = published.textvqa(tmp_path)
        (sample,) = read_textvqa(**files)
        assert (sample.id, sample.fields["question"]) == (34602, "what is the brand of this camera?")
        assert (sample.answer, len(sample.references)) == ("dakota", 10)
        assert sample.image == files["images"] / f"{published.HEX}.jpg"
        assert score("textvqa", [sample], ["Dakota"]) == 100

    def test_as_open_flamingo_has_it(self, tmp_path):
        files = published.textvqa(tmp_path)
        question = {"question": "what brand?", "image_id": published.HEX, "question_id": 34602}
        annotation = {
            **question,
            "question_type": "none of the above",
            "answers": published.answers(["dakota"] * 10),
            "multiple_choice_answer": "dakota",
        }
        published.write_json(files["questions"], {"questions": [question]})
        more = published.write_json(tmp_path / "annotations.json", {"annotations": [annotation]})
        (sample,) = read_textvqa(**files, annotations=more)
        assert (sample.image.stem, sample.references) == (published.HEX, ("dakota",) * 10)

    def test_a_test_split_has_no_answers(self, tmp_path):
        files = published.textvqa(tmp_path)
        data = json.loads(files["questions"].read_text())
        del data["data"][0]["answers"]
        files["questions"].write_text(json.dumps(data))
        assert score("textvqa", read_textvqa(**files), ["dakota"]) is None

    def test_errors(self, tmp_path):
        files = published.textvqa(tmp_path)
        (files["images"] / f"{published.HEX}.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=rf"the image's name {published.HEX} in .*train_images"):
            read_textvqa(**files)
        change(files["questions"], "data", 0, answers=[1, 2])
        published.touch(files["images"], f"{published.HEX}.jpg")
        with pytest.raises(ValueError, match=r"'answers' in .*val\.json to be a list of texts, got \[1, 2\]"):
            read_textvqa(**files)


class TestVizWiz:
    def test_as_published(self, tmp_path):
        files = published.vizwiz(tmp_path)
        first, second = read_vizwiz(**files)
        assert (first.id, second.id) == ("VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg")
        assert (first.answer, first.references) == ("can", ("can",) * 9 + ("tin",))
        assert second.image == files["images"] / "VizWiz_val_00000001.jpg"
        assert read_vizwiz(**files | {"images": tmp_path})[0].image == first.image

    def test_open_flamingo_drops_annotators(self, tmp_path):
        samples = read_vizwiz(**published.vizwiz(tmp_path))[:1]
        assert score("vizwiz", samples, ["can"]) == 100
        # Nine said "can" as surely, and are left out with each of themselves: only the tenth has others.
        assert open_flamingo_score(records(samples, ["can"])) == pytest.approx(10)

    def test_open_flamingo_keeps_them_where_they_have_numbers(self, tmp_path):
        samples = read_vqa(**published.vqav2(tmp_path))[:1]
        assert open_flamingo_score(records(samples, ["down"])) == pytest.approx(100)

    def test_the_test_split(self, tmp_path):
        files = published.vizwiz(tmp_path)
        entries = json.loads(files["questions"].read_text())
        for entry in entries:
            del entry["answers"]
        published.write_json(files["questions"], entries)
        samples = read_vizwiz(**files)
        assert score("vizwiz", samples, ["a can", ""]) is None
        assert upload_vizwiz(records(samples, ["a can", ""])) == [
            {"image": "VizWiz_val_00000000.jpg", "answer": "a can"},
            {"image": "VizWiz_val_00000001.jpg", "answer": ""},
        ]

    def test_as_open_flamingo_has_it(self, tmp_path):
        files = published.vizwiz(tmp_path)
        question = {"question": "What?", "image_id": "VizWiz_val_00000001.jpg", "question_id": 1}
        published.write_json(files["questions"], {"questions": [question]})
        (sample,) = read_vizwiz(**files)
        assert (sample.id, sample.references) == (1, ())
        assert upload_vizwiz(records([sample], ["can"])) == [{"image": question["image_id"], "answer": "can"}]

    def test_some_without_answers(self, tmp_path):
        files = published.vizwiz(tmp_path)
        entries = json.loads(files["questions"].read_text())
        del entries[1]["answers"]
        published.write_json(files["questions"], entries)
        with pytest.raises(ValueError, match=r"everything asked in .*val\.json or to none, .*00000001"):
            read_vizwiz(**files)


def records(samples, predictions):
    """What a run writes of them."""
    return [
        {
            "id": sample.id,
            "prediction": said,
            "references": list(sample.references),
            "details": dict(sample.details),
            "shots": [],
        }
        for sample, said in zip(samples, predictions, strict=True)
    ]


def score(name, samples, predictions):
    return BENCHMARKS[name].task.score(records(samples, predictions))


def test_vqa_score_is_a_mean_in_per_cent(tmp_path):
    samples = read_vqa(**published.vqav2(tmp_path))
    assert vqa_score(records(samples, ["down", "up"])) == pytest.approx(50 + 50 * (2 / 3 * 0.8 + 1 / 3 * 0.2))
    assert vqa_score([]) is None


def test_upload_of_vqav2(tmp_path):
    samples = read_vqa(**published.vqav2(tmp_path) | {"annotations": None})
    assert upload_vqa(records(samples, ["down", "soup"])) == [
        {"question_id": 262148000, "answer": "down"},
        {"question_id": 393225001, "answer": "soup"},
    ]
