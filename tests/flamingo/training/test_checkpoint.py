"""What is saved, and that no moment is wrong for a kill."""

import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flamingo.training import checkpoint, load_weights, train
from tests.helpers.tiny_run import config, is_frozen, model, processor


@pytest.fixture
def part():
    """A layer, its weights by name, and an optimizer that has made an update."""
    layer = nn.Linear(3, 2)
    weights = dict(layer.named_parameters())
    optimizer = torch.optim.AdamW(weights.values())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return layer, weights, optimizer


def save(folder, part, step, keep=2):
    _, weights, optimizer = part
    return checkpoint.save(folder, step, weights, optimizer, {"pages": {"position": (0, 1, step)}}, keep=keep)


def test_only_new_parameters_are_saved(data, tmp_path):
    flamingo = model()
    saved = train(flamingo, processor(), config(data, tmp_path, steps=1))
    tensors = load_file(saved / "weights.safetensors")
    trained = {name: p for name, p in flamingo.named_parameters() if p.requires_grad}
    assert tensors.keys() == trained.keys()
    assert not any(map(is_frozen, tensors))
    assert "language.new_tokens.embedding" in tensors
    assert all(torch.equal(tensors[name], trained[name]) for name in trained)
    other = model(seed=1)
    load_weights(dict(other.named_parameters()), saved / "weights.safetensors")
    assert all(torch.equal(p, trained[name]) for name, p in other.named_parameters() if p.requires_grad)


def test_all_of_it_comes_back(part, tmp_path):
    layer, weights, optimizer = part
    path = save(tmp_path, part, 7)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    expected = {name: value.clone() for name, value in layer.state_dict().items()}
    moments = {name: optimizer.state[weight]["exp_avg_sq"].clone() for name, weight in weights.items()}
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
    fresh = torch.optim.AdamW(weights.values())
    assert checkpoint.load(path, weights, fresh) == (7, {"pages": {"position": (0, 1, 7)}})
    assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())
    for name, weight in weights.items():
        assert torch.equal(fresh.state[weight]["exp_avg_sq"], moments[name])
        assert fresh.state[weight]["step"] == 1
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn


def test_the_last_are_kept(part, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, part, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert checkpoint.latest(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("keep", [1, 3, 4, 6])
def test_as_many_are_kept_as_asked(part, tmp_path, keep):
    for step in range(1, 9):
        save(tmp_path, part, step, keep=keep)
        kept = [f"step-{each:08d}" for each in range(max(1, step - keep + 1), step + 1)]
        assert sorted(path.name for path in tmp_path.glob("step-*")) == kept


def test_a_folder_with_anything_else_in_it_is_kept(part, tmp_path):
    """Somebody's own, or a checkpoint with notes beside it."""
    (tmp_path / "step-0").mkdir()
    (tmp_path / "step-0" / "mine.txt").touch()
    (save(tmp_path, part, 1) / "notes.txt").touch()
    (tmp_path / "step-00000002").touch()
    for step in (3, 4, 5, 6):
        save(tmp_path, part, step)
    kept = ["step-0", *(f"step-{step:08d}" for step in (1, 2, 5, 6))]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == kept
    assert (tmp_path / "step-0" / "mine.txt").exists()
    assert (tmp_path / "step-00000001" / "state.pt").exists()


def test_those_of_a_future_that_was_abandoned_do_not_count(part, tmp_path):
    (tmp_path / "step-00000009").mkdir()
    for step in (1, 2):
        save(tmp_path, part, step, keep=1)
        assert checkpoint.latest(tmp_path).name == f"step-0000000{step}"
        assert (checkpoint.latest(tmp_path) / "state.pt").exists()


class Killed(BaseException):
    """No `except Exception` survives it."""


OPERATIONS = [
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "rmdir"),
    (os, "unlink"),
    (shutil, "rmtree"),
    (torch, "save"),
    (Path, "mkdir"),
    (Path, "symlink_to"),
    (Path, "unlink"),
]


def killing(monkeypatch, moment):
    """From now on the operation of this number is the last; returns a list of those that began."""
    begun = []

    def wrap(owner, name):
        original = getattr(owner, name)

        def operation(*args, **kwargs):
            begun.append(name)
            if len(begun) == moment:
                raise Killed(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, operation)

    for owner, name in OPERATIONS:
        wrap(owner, name)
    return begun


def test_everything_is_on_the_disk_before_it_gets_its_name(part, tmp_path, monkeypatch):
    """Else a power cut leaves a checkpoint by name whose files are empty, or no link to it."""
    old = save(tmp_path, part, 1, keep=1)
    done = []
    fsync, rename, put = os.fsync, os.rename, os.replace

    def flush(descriptor):
        fsync(descriptor)
        done.append(os.fstat(descriptor).st_ino)

    def move(original):
        def operation(source, target):
            original(source, target)
            done.append(Path(target).name)

        return operation

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", move(rename))
    monkeypatch.setattr(os, "replace", move(put))
    path = save(tmp_path, part, 2, keep=1)
    named, linked, removed = (done.index(name) for name in (path.name, "latest", "unfinished-removed"))
    assert {path.stat().st_ino, *(file.stat().st_ino for file in path.iterdir())} <= set(done[:named])
    assert named < linked < removed
    assert tmp_path.stat().st_ino in done[linked:removed]
    assert not old.exists()


def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(part, tmp_path, monkeypatch):
    """Each in turn; whatever is called a checkpoint can be loaded, and the next save succeeds."""
    _, weights, optimizer = part
    with monkeypatch.context() as patched:
        begun = killing(patched, moment=-1)
        save(tmp_path / "count", part, 1, keep=1)
        first = len(begun)
        save(tmp_path / "count", part, 2, keep=1)
        total = len(begun) - first
    assert total > 10
    outcomes = set()
    for moment in range(1, total + 1):
        folder = tmp_path / str(moment)
        save(folder, part, 1, keep=1)
        with monkeypatch.context() as patched, pytest.raises(Killed):  # noqa: PT012
            killing(patched, moment)
            save(folder, part, 2, keep=1)
        for path in (*folder.glob("step-*"), checkpoint.latest(folder)):
            step, _ = checkpoint.load(path, weights, optimizer)
        outcomes.add(step)
        save(folder, part, 2, keep=1)
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000002"]
    assert outcomes == {1, 2}


def test_all_is_on_the_disk_before_it_has_its_name(part, tmp_path, monkeypatch):
    """A power cut keeps what was flushed alone, and renames in no order but that of flushes."""
    done, opened = [], {}
    for owner, name in ((os, "open"), (os, "fsync"), (os, "rename"), (os, "replace")):
        monkeypatch.setattr(owner, name, recorded(done, opened, tmp_path, getattr(owner, name)))
    save(tmp_path, part, 1)
    save(tmp_path, part, 2, keep=1)
    second = done[done.index(("replace", "unfinished-latest", "latest")) + 2 :]
    names = ("weights.safetensors", "optimizer.safetensors", "state.pt")
    files = {("fsync", f"unfinished-step-00000002/{name}") for name in names}
    assert set(second[:3]) == files
    assert second[3:] == [
        ("fsync", "unfinished-step-00000002"),
        ("rename", "unfinished-step-00000002", "step-00000002"),
        ("replace", "unfinished-latest", "latest"),
        ("fsync", "."),
        ("rename", "step-00000001", "unfinished-removed"),
    ]


def recorded(done, opened, folder, original):
    """The operation, which also notes its name and the paths that it is about."""

    def operation(*args, **kwargs):
        result = original(*args, **kwargs)
        if original.__name__ == "open":
            opened[result] = args[0]
        else:
            paths = [opened[args[0]]] if original.__name__ == "fsync" else args
            done.append((original.__name__, *(os.path.relpath(path, folder) for path in paths)))
        return result

    return operation


def test_a_state_that_would_run_code_is_refused(part, tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it has run",)

    path = save(tmp_path, part, 1)
    torch.save({"step": 1, "streams": {}, "random": Code()}, path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        checkpoint.load(path, part[1], part[2])
    assert not (tmp_path / "it has run").exists()


def test_another_models_checkpoint_is_refused(part, tmp_path):
    path = save(tmp_path, part, 1) / "weights.safetensors"
    with pytest.raises(ValueError, match=r"got 1 others \(bias\) and not 0 of them"):
        load_weights({"weight": nn.Parameter(torch.zeros(2, 3))}, path)
    more = {**dict(nn.Linear(3, 2).named_parameters()), "gate": nn.Parameter(torch.zeros(1))}
    with pytest.raises(ValueError, match=r"got 0 others  and not 1 of them \(gate\)"):
        load_weights(more, path)
    load_weights({**more, "gate": more["gate"].requires_grad_(False)}, path)  # what is frozen may lack
    other = dict(nn.Linear(3, 2).named_parameters(prefix="new"))
    with pytest.raises(
        ValueError, match=r"2 others \(bias, weight\) and not 2 of them \(new\.bias, new\.weight\)"
    ):
        load_weights(other, path)
    with pytest.raises(ValueError, match=r"expected weight with shape \(2, 4\), got \(2, 3\)"):
        load_weights(dict(nn.Linear(4, 2).named_parameters()), path)
