"""The page "The demos": what it shows of the digits is what the demo does."""

import re

import pytest
import torch

from flamingo.__main__ import main
from flamingo.demo import load_digits
from flamingo.demo.digits import episode
from flamingo.demo.run import EPISODES, SHOTS
from flamingo.demo.words import NAMES
from tests.helpers import ROOT

PAGE = (ROOT / "docs/demo.md").read_text()


def test_its_table_has_the_shots_that_are_asked():
    head, *rows = re.findall(r"^\| (.+) \|$", PAGE, flags=re.MULTILINE)
    assert head == " | ".join(["shots", *map(str, SHOTS)])
    assert [row.count("|") for row in rows] == [len(SHOTS)] * 4
    assert f"Each number is of {EPISODES} questions." in PAGE


def test_its_last_row_is_what_can_be_known():
    """In the documents that are asked about: the right name if the shots show it, else one of the others."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    _, held_out = load_digits()
    shares = []
    for shots in SHOTS:
        generator = torch.Generator().manual_seed(1)
        known = 0.0
        for _ in range(EPISODES):
            query, before = episode("codes", held_out, shots, generator)
            shown = {sample.answer for sample in before}
            known += 1 if query.answer in shown else 1 / (len(NAMES) - len(shown))
        shares.append(f"{known / EPISODES:.1%}")
    (row,) = re.findall(
        r"^\| such a name: known if a shot shows it, else guessed \| (.+) \|$", PAGE, re.MULTILINE
    )
    assert row.split(" | ") == shares


@pytest.mark.slow
def test_its_captions_and_answers_are_those_of_the_demo(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    pytest.importorskip("matplotlib", reason="it draws")
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    ((python, printed),) = re.findall(
        r"^```python\n(.*?)^```\n\n```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
    )
    capsys.readouterr()
    exec(python, {})
    assert capsys.readouterr().out == printed
