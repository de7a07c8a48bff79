"""`python -m flamingo train`."""

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo.__main__ import main
from flamingo.training import (
    ModelConfig,
    TrainingConfig,
    command,
    load_run,
    load_weights,
    processes,
    read_log,
    write_shards,
)
from flamingo.training.towers import build
from flamingo_kernels.ops.linear import config
from tests.flamingo.training.test_resume import toml
from tests.helpers.kernels import has_kernels
from tests.helpers.tiny_run import is_frozen, model


def test_it_trains_and_says_where_the_result_is(data, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(toml(data, tmp_path / "run", steps=2))
    assert main(["train", str(tmp_path / "run.toml")]) == 0
    shown = capsys.readouterr()
    assert shown.out == (f"2 steps done, the last checkpoint is {tmp_path}/run/checkpoints/step-00000002\n")
    assert "train: vision has random weights, as [model] names neither vision nor vision_weights" in shown.err
    assert "2/2" in shown.err
    assert len(read_log(tmp_path / "run")) == 2


def test_one_of_several_processes_leaves_at_once(data, tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(
        "flamingo.training.command.leave", lambda: left.append(len(read_log(tmp_path / "run")))
    )
    (tmp_path / "run.toml").write_text(toml(data, tmp_path / "run", steps=1))
    assert main(["train", str(tmp_path / "run.toml")]) == 0
    assert left == []
    torchrun = SimpleNamespace(is_torchelastic_launched=lambda: True)
    monkeypatch.setattr("flamingo.training.command.distributed", torchrun)
    main(["train", str(tmp_path / "run.toml")])
    assert left == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 1", "there is no key 'stepz'. Did you mean steps?"),
        ("steps = ", "run.toml: expected TOML, got: Invalid value"),
        ("folder = 'run'\nkernels = 1", "run.toml: kernels: expected bool, got 1"),
        ("folder = 'run'\nkernels = 'no'", "run.toml: kernels: expected bool, got 'no'"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_a_line(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    assert main(["train", str(tmp_path / "run.toml")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("train: ")
    assert message in shown
    assert shown.count("\n") == 1


def test_a_file_without_a_model_is_refused(data, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(toml(data, tmp_path, steps=2).partition("[model]")[0])
    assert main(["train", str(tmp_path / "run.toml")]) == 2
    assert "expected a table [model], got none" in capsys.readouterr().err


def test_a_log_of_something_else_is_said_in_a_line_and_stays(data, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n')
    (tmp_path / "run.toml").write_text(toml(data, tmp_path, steps=2))
    assert main(["train", str(tmp_path / "run.toml")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"train: expected {tmp_path}/log.jsonl to be the log of a run")
    assert shown.count("\n") == 1
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "accuracy": 0.5}\n'


@pytest.fixture
def trained(monkeypatch):
    """Whether each model had the kernels when its training began."""
    models, train = [], command.train
    monkeypatch.setattr(
        command, "train", lambda model, *rest: models.append(has_kernels(model)) or train(model, *rest)
    )
    return models


def run(path, text):
    path.mkdir(exist_ok=True)
    (path / "run.toml").write_text(text)
    return main(["train", str(path / "run.toml")])


@pytest.mark.parametrize(
    ("changes", "kernels", "line"),
    [
        ({}, True, "with kernels: 7 modules and 45 linear layers are swapped"),  # a file of before the switch
        ({"kernels": True}, True, "with kernels: 7 modules and 45 linear layers are swapped"),
        ({"kernels": False}, False, "without kernels: they are switched off"),
    ],
)
def test_the_kernels_are_on_unless_the_file_says_otherwise(
    data, tmp_path, trained, capsys, changes, kernels, line
):
    assert run(tmp_path, toml(data, tmp_path, steps=1, **changes)) == 0
    assert trained == [kernels]
    assert capsys.readouterr().err.count(f"train: {line}\n") == 1


def test_without_the_package_a_run_says_so_and_goes_on(data, tmp_path, trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flamingo_kernels", None)
    assert run(tmp_path, toml(data, tmp_path, steps=1)) == 0
    assert trained == [False]
    assert "train: without kernels: import of flamingo_kernels halted" in capsys.readouterr().err


def test_one_process_of_several_speaks(data, tmp_path, capsys, monkeypatch):
    for each in (command, processes):
        monkeypatch.setattr(each, "rank", lambda: 1)
    assert run(tmp_path, toml(data, tmp_path, steps=0)) == 0
    assert "kernels" not in capsys.readouterr().err


def test_a_table_of_products_that_is_none_is_refused_before_the_run(
    data, tmp_path, trained, capsys, monkeypatch
):
    (tmp_path / "linear.json").write_text("{")
    monkeypatch.setattr(config, "OWN", tmp_path / "linear.json")
    monkeypatch.setattr(config, "LEAST_WEIGHTS", 0)
    config.forget()
    assert run(tmp_path, toml(data, tmp_path, steps=1)) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("train: linear: expected JSON in ")
    assert trained == []


@pytest.mark.parametrize("bfloat16", [False, True])
def test_losses_are_the_same_with_and_without_but_for_rounding(data, tmp_path, trained, bfloat16):
    losses = []
    for kernels in (True, False):
        text = toml(data, tmp_path / str(kernels), steps=6, bfloat16=bfloat16, kernels=kernels)
        assert run(tmp_path / str(kernels), text) == 0
        losses.append(torch.tensor([update["loss"] for update in read_log(tmp_path / str(kernels))]))
    assert trained == [True, False]
    assert not torch.equal(*losses), "the kernels did not run"
    torch.testing.assert_close(*losses, rtol=0.002 if bfloat16 else 1e-5, atol=0)


def test_a_run_goes_on_with_the_switch_turned(data, tmp_path, trained):
    """To where one ends that never turned it."""
    for steps, kernels in ((2, False), (4, True), (6, False)):
        assert run(tmp_path / "turned", toml(data, tmp_path / "turned", steps=steps, kernels=kernels)) == 0
    assert run(tmp_path / "whole", toml(data, tmp_path / "whole", steps=6)) == 0
    assert trained == [False, True, False, True]
    turned, whole = (read_log(tmp_path / name) for name in ("turned", "whole"))
    assert [update["step"] for update in turned] == list(range(1, 7))
    assert [update["loss"] for update in turned] == pytest.approx([each["loss"] for each in whole], rel=1e-5)
    paths = (tmp_path / name / "checkpoints/latest/weights.safetensors" for name in ("turned", "whole"))
    found, expected = map(load_file, paths)
    assert found.keys() == expected.keys()


def test_frozen_parts_come_from_files(tmp_path, capsys):
    given = model(seed=1)
    for name in ("vision", "language"):
        save_file(getattr(given, name).state_dict(), tmp_path / f"{name}.safetensors")
    paths = {f"{name}_weights": str(tmp_path / f"{name}.safetensors") for name in ("vision", "language")}
    built, _ = build(ModelConfig(preset="tiny", changes={"new_tokens": [257]}, **paths), print)
    for name, parameter in built.named_parameters():
        assert parameter.requires_grad is not is_frozen(name)
        if is_frozen(name):
            assert torch.equal(parameter, given.get_parameter(name))
    assert capsys.readouterr().err == ""


def test_a_run_is_loaded_as_it_was_trained(data, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(toml(data, tmp_path / "run", steps=2))
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint in .*run/checkpoints, got none yet"):
        load_run(path)
    assert main(["train", str(path)]) == 0
    loaded, processor = load_run(path)
    torch.manual_seed(TrainingConfig.from_toml(path).seed)
    trained, _ = build(TrainingConfig.from_toml(path).model, print)
    assert not torch.equal(loaded.resampler.latents, trained.resampler.latents)
    weights = tmp_path / "run/checkpoints/step-00000002/weights.safetensors"
    load_weights(dict(trained.named_parameters()), weights)
    assert all(map(torch.equal, loaded.state_dict().values(), trained.state_dict().values()))
    assert not loaded.training
    assert processor.image_size == 32


def test_shards_that_are_not_there_are_said_before_there_is_a_model(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "build", lambda *_: pytest.fail("a model was built"))
    text = toml(data, tmp_path, steps=1).replace("pairs/*.tar", "pairs/{00..19}.tar")
    text = text.replace("length = ", "flip = 0\ncolour = 0\nfeatures = 'none'\nlength = ")
    for name in ("train", "encode"):
        (tmp_path / "run.toml").write_text(text)
        assert main([name, str(tmp_path / "run.toml")]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(
            f"{name}: find_shards: expected shards at {data}/pairs/{{00..19}}.tar, whose braces"
        )
        assert shown.count("\n") == 1


def test_data_that_cannot_be_read_ends_in_a_line(data, tmp_path, capsys):
    write_shards(tmp_path / "data", [{"json": b'{"html": "x"}'}] * 3)
    text = toml(data, tmp_path / "run", steps=1).replace(f"{data}/documents/*.tar", f"{tmp_path}/data")
    (tmp_path / "run.toml").write_text(text)
    assert main(["train", str(tmp_path / "run.toml")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train: dataset 'pages': expected documents, got 100 bad samples in a row, as ")
    assert "000000.tar, sample 00000" in last
    assert "got the keys html" in last


def test_features_are_made_once_and_read(data, tmp_path, capsys):
    text = toml(data, tmp_path / "run", steps=2)
    text = text.replace("length = ", f"flip = 0\ncolour = 0\nfeatures = '{tmp_path}/features'\nlength = ")
    (tmp_path / "run.toml").write_text(text)
    assert main(["train", str(tmp_path / "run.toml")]) == 2
    assert "Run `python -m flamingo encode` with the same file first" in capsys.readouterr().err
    for count in (18, 0):
        assert main(["encode", str(tmp_path / "run.toml")]) == 0
        assert capsys.readouterr().out == f"{count} images and clips encoded, in {tmp_path}/features\n"
    assert main(["train", str(tmp_path / "run.toml")]) == 0
    assert len(read_log(tmp_path / "run")) == 2
    changed = text.replace("'tiny'", "'tiny'\nvision_weights = 'other.safetensors'")
    other = {
        name: value + 1
        for name, value in build(ModelConfig(preset="tiny"), print)[0].vision.state_dict().items()
    }
    save_file(other, tmp_path / "other.safetensors")
    (tmp_path / "run.toml").write_text(changed.replace("other.saf", f"{tmp_path}/other.saf"))
    assert main(["train", str(tmp_path / "run.toml")]) == 2
    assert "expected features of this run's encoder, got those of another." in capsys.readouterr().err
