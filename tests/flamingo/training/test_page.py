"""The page "Train on your own data" with towers, which it shows and does not run; the rest: test_pages.py."""

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
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def block(language: str, beginning: str) -> str:
    """The one block of a language that begins so."""
    (text,) = (text for name, text in BLOCKS if name == language and text.startswith(beginning))
    return text


def commands(beginning: str) -> list[list[str]]:
    """The arguments of a block's commands."""
    lines = block("", beginning).replace("\\\n", " ").splitlines()
    assert all(line.startswith("python -m flamingo ") for line in lines)
    return [shlex.split(line)[3:] for line in lines]


def test_it_runs_with_towers_and_their_features(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tower_folders.write_vision(Path("towers/vision"), "clip")
    tower_folders.write_language(Path("towers/language"), "opt")
    exec(block("python", "from PIL"), {})
    towers = block("", '[model]\npreset = "openflamingo-3b"\nvision = "towers/vision"')
    datasets = block("toml", "# run.toml").partition("[model]\n")[0]
    run = datasets.replace("[[datasets]]\n", '[[datasets]]\nfeatures = "features"\n')
    Path("run.toml").write_text(run + towers.replace("openflamingo-3b", "tiny"))
    encode, train = commands("python -m flamingo encode")
    assert main(encode) == 0
    assert capsys.readouterr().out == "12 images and clips encoded, in features\n"
    assert main(train) == 0
    assert capsys.readouterr().out == "6 steps done, the last checkpoint is run/checkpoints/step-00000006\n"
    assert len(read_log("run")) == 6
    assert Path("run/towers.json").exists()
    for folder in ("val", "train"):
        files = write_captions(Path(folder), [("white", ["a white wall"]), ("black", ["a black wall"])] * 2)
        files["captions"].rename(f"captions_{folder}.json")
    (evaluate,) = commands("python -m flamingo evaluate")
    assert main(evaluate) == 0
    assert "(4 samples, 4 shots)" in capsys.readouterr().out


def test_the_keys_of_openflamingos_weights_are_those_of_the_code():
    toml = block("", '[model]\npreset = "openflamingo-3b"\nvision = "towers/clip')
    assert ModelConfig(**tomllib.loads(toml)["model"]).checkpoint == "checkpoint.pt"
