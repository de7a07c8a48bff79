"""The page "Train on your own data": its code and its commands, with small towers in its folders."""

import re
import shlex
from pathlib import Path

import pytest

from flamingo.__main__ import main
from flamingo.training import ModelConfig, read_log
from flamingo.training.config import tomllib
from tests.helpers import ROOT
from tests.helpers.scripted import write_captions

pytest.importorskip("transformers")
from tests.helpers import tower_folders

PAGE = (ROOT / "docs/train_on_your_own_data.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def blocks(title: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", section(title), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands(title: str) -> list[list[str]]:
    """The arguments of the commands of a section."""
    (text,) = blocks(title, "")
    lines = text.replace("\\\n", " ").splitlines()
    assert all(line.startswith("python -m flamingo ") for line in lines)
    return [shlex.split(line)[3:] for line in lines]


def test_it_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tower_folders.write_vision(Path("towers/vision"), "clip")
    tower_folders.write_language(Path("towers/language"), "opt")
    names = {}
    exec(*blocks("Data", "python"), names)
    (toml,) = blocks("The run", "toml")
    Path("run.toml").write_text(toml)
    encode, train = commands("The run")
    assert main(encode) == 0
    assert capsys.readouterr().out == "12 images and clips encoded, in features\n"
    assert main(train) == 0
    assert capsys.readouterr().out == "6 steps done, the last checkpoint is run/checkpoints/step-00000006\n"
    assert len(read_log("run")) == 6
    assert Path("run/towers.json").exists()
    (ask,) = blocks("Ask it", "python")
    exec(ask, names)
    assert len(names["texts"]) == 1
    for name, folder in (("val", "val"), ("train", "train")):
        files = write_captions(Path(folder), [("white", ["a white wall"]), ("black", ["a black wall"])] * 2)
        files["captions"].rename(f"captions_{name}.json")
    (evaluate,) = commands("Ask it")
    assert main(evaluate) == 0
    assert "(4 samples, 4 shots)" in capsys.readouterr().out


def test_the_keys_of_openflamingos_weights_are_those_of_the_code():
    (toml,) = blocks("From OpenFlamingo's weights", "")
    assert ModelConfig(**tomllib.loads(toml)["model"]).checkpoint == "checkpoint.pt"
