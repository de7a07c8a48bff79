"""The page "Train on your own data": its code and its commands, with small towers in its folders."""

import re
import shlex
from pathlib import Path

import pytest

from flamingo.__main__ import main
from flamingo.config import FlamingoConfig
from flamingo.training import Clips, Documents, ModelConfig, Pairs, TrainingConfig, read_log
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


def commands(title: str, language: str = "") -> list[list[str]]:
    """The arguments of the commands of a section."""
    lines = "".join(blocks(title, language)).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith("python -m flamingo ")]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The names of the page's first code, and its file, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(*blocks("Write your images and texts as shards", "python"), names)
    (toml,) = blocks("Train", "toml")
    Path("run.toml").write_text(toml)
    return names


def test_it_runs_as_it_stands(run, capsys):
    (train,) = commands("Train", "sh")
    assert main(train) == 0
    assert capsys.readouterr().out == "6 steps done, the last checkpoint is run/checkpoints/step-00000006\n"
    assert len(read_log("run")) == 6
    exec(*blocks("Ask it", "python"), run)
    assert len(run["texts"]) == 1
    (complete,) = commands("Ask it", "sh")
    assert main(complete) == 0
    for name, folder in (("val", "val"), ("train", "train")):
        files = write_captions(Path(folder), [("white", ["a white wall"]), ("black", ["a black wall"])] * 2)
        files["captions"].rename(f"captions_{name}.json")
    (evaluate,) = commands("Ask it")
    assert main(evaluate) == 0
    assert "(4 samples, 4 shots)" in capsys.readouterr().out


def test_it_runs_with_towers_and_their_features(run, capsys):
    """As it says, but for the sizes of what is new, which are a test's."""
    tower_folders.write_vision(Path("towers/vision"), "clip")
    tower_folders.write_language(Path("towers/language"), "opt")
    _, model = blocks("Put towers in", "")
    assert 'preset = "openflamingo-3b"' in model
    model = model.replace("openflamingo-3b", "tiny")
    before = Path("run.toml").read_text().partition("[model]")[0]
    Path("run.toml").write_text(before.replace("colour = 0.0", 'colour = 0.0\nfeatures = "features"') + model)
    encode, train = commands("Encode the images once")
    assert main(encode) == 0
    assert capsys.readouterr().out == "12 images and clips encoded, in features\n"
    assert main(train) == 0
    assert capsys.readouterr().out == "6 steps done, the last checkpoint is run/checkpoints/step-00000006\n"
    assert Path("run/towers.json").exists()


def test_the_keys_that_it_names_are_those_of_the_code():
    (toml,) = blocks("Begin with OpenFlamingo's weights", "")
    assert ModelConfig(**tomllib.loads(toml)["model"]).checkpoint == "checkpoint.pt"
    (changes,) = re.findall(r"`(changes = .+?)`", PAGE)
    assert (
        tomllib.loads(changes)["changes"]["cross_attn_every"]
        == FlamingoConfig.preset("openflamingo-9b").cross_attn_every
    )
    values = dict(re.findall(r"`(\w+) = ([\w.]+)`", PAGE))
    config = TrainingConfig(folder="run", datasets=(Pairs(name="pairs", shards=("a.tar",)),))
    assert float(values["max_bad"]) == config.max_bad
    for name in values.keys() - {"flip", "colour"}:
        assert hasattr(config, name), name


@pytest.mark.parametrize("kind", [Documents, Pairs, Clips])
def test_it_says_of_every_kind_what_a_sample_is(kind):
    assert f"\n| `{kind.kind}` | " in section("Write your images and texts as shards")
