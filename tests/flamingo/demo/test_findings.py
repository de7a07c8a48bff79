"""What counts as learnt, and what is written of a run."""

import pytest
import torch

from flamingo.demo.findings import Findings
from flamingo.demo.lessons import Course
from flamingo.demo.picture import draw
from flamingo.machine import processor_name
from tests.helpers.figures import texts_of


def found(known=0.98, none=0.1, eight=0.92):
    return Findings(
        seed=3,
        threads=2,
        course=Course(ends={"lists": 500, "all": 600}),
        recall=0.99,
        knowledge=1.0,
        accuracy={"captions": {0: known}, "questions": {0: 0.97}, "codes": {0: none, 8: eight}},
        seconds={"language model on text": 70.0, "questions about digits never seen": 3.0},
    )


@pytest.mark.parametrize(
    ("of", "missed"),
    [
        ({}, []),
        ({"known": 0.945}, ["known names after no shot: expected 95% right or more, got 94.5%."]),
        ({"eight": 0.75}, ["drawn names after 8 shots: expected 80% right or more, got 75.0%."]),
        (
            {"none": 0.4},
            ["drawn names after 8 shots more than after none: expected 60% right or more, got 52.0%."],
        ),
    ],
)
def test_what_counts_as_learnt(of, missed):
    """Names that are known, names that are looked up, and that by the shots."""
    assert found(**of).missed() == missed


def test_as_json():
    told = found().as_json()
    assert told["drawn"] == {"0": 0.1, "8": 0.92}
    assert told["known"] == {"0": 0.98}
    assert (told["recall"], told["facts"], told["questions"]) == (0.99, 1.0, {"0": 0.97})
    assert (told["seed"], told["threads"], told["lessons"]) == (3, 2, {"lists": 500, "all": 600})
    assert told["seconds"] == found().seconds


def test_the_picture_says_what_it_is_and_what_it_ran_on(tmp_path):
    pytest.importorskip("matplotlib")
    told = found()
    told.parameters, told.kernels = 640_000, "with kernels: 7 modules and 26 linear layers are swapped"
    texts = texts_of(lambda: draw(told, tmp_path / "x.png"))
    assert "A Flamingo of 0.64 M parameters in float32, trained from nothing in this run, seed 3\n" in texts
    assert f"CPU: {processor_name()}, 2 threads, torch {torch.__version__}, 20" in texts
    assert texts.count(told.kernels) == 1
