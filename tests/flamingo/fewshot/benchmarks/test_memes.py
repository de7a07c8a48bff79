"""Hateful Memes as they are published."""

import pytest

from flamingo.fewshot.benchmarks import read_hateful_memes
from flamingo.fewshot.benchmarks.memes import HATEFUL, auc_score
from tests.flamingo.fewshot.benchmarks.test_questions import records
from tests.helpers import published


@pytest.fixture
def files(tmp_path):
    return published.hatefulmemes(tmp_path)


def test_as_published(files):
    hateful, other = read_hateful_memes(**files)
    assert (hateful.id, hateful.answer, other.answer) == (8291, "yes", "no")
    assert hateful.image == files["images"] / "img" / "08291.png"
    assert other.candidates == ("yes", "no")
    assert HATEFUL.task.template.prompt(other)[1] == (
        'is an image with written: "bravery at its "finest" {x}" on it. Is it hateful? Answer:'
    )


def test_the_folder_may_be_img_itself(files):
    samples = read_hateful_memes(files["annotations"], files["images"] / "img")
    assert samples[0].image == files["images"] / "img" / "08291.png"


def test_score_is_how_much_likelier_yes_is(files):
    pytest.importorskip("sklearn")
    # The first is hateful. It has the smaller likelihood of yes, and a much smaller one of no.
    found = scored(read_hateful_memes(**files), [[-3.0, -9.0], [-1.0, -2.0]])
    assert auc_score(found) == 100
    assert auc_score([found[0] | {"scores": [-9.0, -3.0]}, found[1]]) == 0


def test_without_labels(files):
    text = files["annotations"].read_text()
    files["annotations"].write_text(text.replace('"label": 1, ', "").replace('"label": 0, ', "") + "\n")
    samples = read_hateful_memes(**files)
    assert [sample.references for sample in samples] == [(), ()]
    assert auc_score(scored(samples, [[0.0, 0.0]] * 2)) is None


def scored(samples, scores):
    return [
        record | {"scores": each}
        for record, each in zip(records(samples, ["yes"] * len(samples)), scores, strict=True)
    ]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"label": 1', '"label": 2', r"'label' in .*test_seen\.jsonl to be 0 or 1, got 2"),
        ('"label": 1', '"label": "1"', r"'label' in .*test_seen\.jsonl to be 0 or 1, got \"1\""),
        ('"id": 46971', '"id": 8291', r"ids that differ in .*test_seen\.jsonl, got two of 8291"),
        ('"text": "white people is this a shooting range"', '"text": null', "'text' in .* to be a text"),
        ('{"id": 46971', '"id": 46971', r"JSON in line 2 of .*test_seen\.jsonl, got"),
        ('"img": "img/46971.png"', '"image": 3', "to have 'img', which one lacks: number 2"),
    ],
)
def test_errors(files, before, after, message):
    files["annotations"].write_text(files["annotations"].read_text().replace(before, after))
    with pytest.raises(ValueError, match=message):
        read_hateful_memes(**files)


def test_an_image_that_is_not_there(files):
    (files["images"] / "img" / "46971.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"an image at .*img/46971\.png or .*46971\.png, found none"):
        read_hateful_memes(**files)
