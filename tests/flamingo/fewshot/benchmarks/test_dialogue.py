"""VisDial as it is published."""

import json
import math

import pytest

from flamingo.fewshot.benchmarks import read_visdial
from flamingo.fewshot.benchmarks.dialogue import VISDIAL, ndcg_score, upload_visdial
from tests.flamingo.fewshot.benchmarks.test_questions import records
from tests.helpers import published


@pytest.fixture
def files(tmp_path):
    return published.visdial(tmp_path)


def test_the_annotated_round_is_asked(files):
    (sample,) = read_visdial(**files)
    assert sample.id == "185565_2"
    history = "an image of 2 people Question: is it day Answer: yes"
    assert sample.fields == {"history": history, "question": "is anyone there"}
    assert sample.candidates == ("no", "2", "maybe")
    assert (sample.answer, sample.references) == ("no", ("no",))
    assert sample.image == files["images"] / "VisualDialog_val2018_000000185565.jpg"
    assert sample.details == {"image_id": 185565, "round_id": 2, "relevance": [0.4, 0.0, 1.0]}
    assert VISDIAL.task.template.prompt(sample)[1] == f"{history} Question: is anyone there Answer:"


def test_without_annotations_rounds_take_turns(files):
    del files["annotations"]
    samples = read_visdial(**files)
    assert [sample.id for sample in samples] == ["185565_1", "284024_2"]
    assert samples[0].fields["history"] == "an image of 2 people"


def test_a_test_split_asks_the_last_round(files):
    del files["annotations"]
    data = json.loads(files["dialogues"].read_text())
    for dialogue in data["data"]["dialogs"]:
        turns = dialogue["dialog"]
        for turn in turns[:-1]:
            del turn["answer_options"]
        del turns[-1]["answer"]
    published.write_json(files["dialogues"], data)
    first, second = read_visdial(**files)
    assert (first.id, second.id) == ("185565_3", "284024_3")
    assert (first.answer, first.references, first.candidates) == ("", (), ("yes", "2", "maybe"))
    assert "is anyone there Answer: no" in first.fields["history"]


def answered(samples, scores):
    return [
        record | {"scores": each}
        for record, each in zip(records(samples, [""] * len(samples)), scores, strict=True)
    ]


def test_score(files):
    samples = read_visdial(**files)
    # Two options are relevant: the one of 0.4 comes first, that of 1 last, where no place counts.
    found = ndcg_score(answered(samples, [[-1.0, -2.0, -3.0]]))
    assert found == pytest.approx(100 * 0.4 / (1 + 0.4 / math.log2(3)))
    assert ndcg_score(answered(samples, [[-2.0, -3.0, -1.0]])) == 100


def test_options_of_which_none_is_relevant_are_left_out(files):
    one, other = answered(read_visdial(**files) * 2, [[-2.0, -3.0, -1.0]] * 2)
    other["details"] = other["details"] | {"relevance": [0.0, 0.0, 0.0]}
    assert ndcg_score([one, other]) == 100
    assert ndcg_score([other]) is None


def test_ranks_for_the_server(files):
    del files["annotations"]
    found = answered(read_visdial(**files), [[-3.0, -1.0, -2.0], [-1.0, -1.0, 0.0]])
    assert ndcg_score(found) is None
    assert upload_visdial(found) == [
        {"image_id": 185565, "round_id": 1, "ranks": [3, 1, 2]},
        {"image_id": 284024, "round_id": 2, "ranks": [2, 3, 1]},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round_id": 4}, r"'round_id' of image 185565 in .*dense.* in 1\.\.3, got 4"),
        ({"round_id": 0}, r"in 1\.\.3, got 0"),
        ({"round_id": "2"}, r"'round_id' in .*dense.* to be a whole number, got \"2\""),
        ({"gt_relevance": [1.0]}, "a relevance for each of 3 options of image 185565 in .*dense.*, got 1"),
        ({"gt_relevance": None}, "'gt_relevance' in .*dense.* to be a list of numbers"),
        (
            {"gt_relevance": [1.0, math.nan, 0.0]},
            "'gt_relevance' in .*dense.* numbers of 0 or more, got .*NaN",
        ),
        (
            {"gt_relevance": [1.0, -1.0, 0.0]},
            "'gt_relevance' in .*dense.* to be a list of numbers of 0 or more",
        ),
        (
            {"gt_relevance": [1, 10**400, 0]},
            "'gt_relevance' in .*dense.* to be a list of numbers of 0 or more",
        ),
        ({"image_id": 7}, r"a dialogue about image 7 of .*dense.* in .*visdial_1\.0_val\.json, found none"),
        ({"image_id": "185565"}, "a dialogue about image '185565' of"),
    ],
)
def test_errors_of_annotations(files, change, message):
    (entry,) = json.loads(files["annotations"].read_text())
    published.write_json(files["annotations"], [entry | change])
    with pytest.raises(ValueError, match=message):
        read_visdial(**files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["data"]["answers"].__setitem__(1, None),
            "the place of a text in 'data' 'answers'",
        ),
        (lambda data: data["data"]["dialogs"][0]["dialog"][0].update(question=3), "'questions' .*, got 3"),
        (lambda data: data["data"]["dialogs"][0]["dialog"][0].update(question=-1), "'questions' .*, got -1"),
        (
            lambda data: data["data"]["dialogs"][0].update(dialog=[]),
            "a round in the dialogue about",
        ),
        (lambda data: data["data"]["dialogs"][0].update(caption=None), "'caption' in .* to be a text"),
        (lambda data: data["data"]["dialogs"][1].update(image_id=185565), "ids that differ"),
        (lambda data: data["data"].pop("answers"), "'answers' in .* to be a list"),
        (lambda data: data.pop("data"), "an object 'data'"),
    ],
)
def test_errors_of_dialogues(files, change, message):
    data = json.loads(files["dialogues"].read_text())
    change(data)
    published.write_json(files["dialogues"], data)
    with pytest.raises(ValueError, match=message) as error:
        read_visdial(**files)
    assert "visdial_1.0_val.json" in str(error.value)


def test_an_image_that_is_not_there(files):
    (files["images"] / "VisualDialog_val2018_000000185565.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="ends in the image's number 185565 in"):
        read_visdial(**files)
