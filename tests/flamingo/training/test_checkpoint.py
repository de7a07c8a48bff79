"""What is saved, and that no moment is wrong for a kill."""

import errno
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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


def test_a_file_names_the_latest_where_there_are_no_links(part, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for step in (1, 2, 3):
        save(tmp_path, part, step)
        assert (tmp_path / "latest").read_text() == f"step-{step:08d}\n"
        assert checkpoint.latest(tmp_path, pytest.fail).name == f"step-{step:08d}"
    (tmp_path / "latest").write_text("step-00000002\n")
    assert checkpoint.latest(tmp_path, pytest.fail).name == "step-00000002"


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
    with pytest.raises(ValueError, match=r"got 1 others \(bias\)\.$"):
        load_weights({"weight": nn.Parameter(torch.zeros(2, 3))}, path)
    more = {**dict(nn.Linear(3, 2).named_parameters()), "gate": nn.Parameter(torch.zeros(1))}
    with pytest.raises(ValueError, match=r"of this model, got none for 1 of them \(gate\)\.$"):
        load_weights(more, path)
    load_weights({**more, "gate": more["gate"].requires_grad_(False)}, path)  # what is frozen may lack
    other = dict(nn.Linear(3, 2).named_parameters(prefix="new"))
    with pytest.raises(
        ValueError, match=r"2 others \(bias, weight\) and none for 2 of them \(new\.bias, new\.weight\)\.$"
    ):
        load_weights(other, path)
    with pytest.raises(ValueError, match=r"expected weight with shape \(2, 4\), got \(2, 3\)"):
        load_weights(dict(nn.Linear(4, 2).named_parameters()), path)
    save_file({name: value.to(torch.int32) for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"expected bias in floating point, got I32\."):
        load_weights(dict(nn.Linear(3, 2).named_parameters()), path)


def truncate(name, by):
    def damage(checkpoints):
        path = checkpoints / "step-00000003" / name
        os.truncate(path, path.stat().st_size - by)

    return damage


def replace_link(write):
    """`latest` as something else."""

    def damage(checkpoints):
        (checkpoints / "latest").unlink()
        write(checkpoints / "latest")

    return damage


def state_with(key, value):
    def damage(checkpoints):
        path = checkpoints / "step-00000003" / "state.pt"
        torch.save(torch.load(path, weights_only=True) | {key.strip(): value}, path)

    return damage


def moments(change):
    def damage(checkpoints):
        path = checkpoints / "step-00000003" / "optimizer.safetensors"
        save_file(change(load_file(path)), path)

    return damage


# What is done to checkpoints of the steps 1 to 3, the step from which a run goes on, and what it says.
DAMAGE = {
    "no link": (lambda each: (each / "latest").unlink(), 3, "latest is not there: step-00000003 is taken"),
    "an empty file": (replace_link(Path.touch), 3, "latest is no folder: step-00000003"),
    "a text": (replace_link(lambda link: link.write_text("../step-00000003\n")), 3, "latest is no folder: "),
    "a name": (replace_link(lambda link: link.write_text("step-00000003\n")), 3, None),
    "a link to itself": (replace_link(lambda link: link.symlink_to("latest")), 3, "is not there: step-00"),
    "a link to a file": (
        replace_link(lambda link: link.symlink_to("step-00000003/state.pt")),
        3,
        "no folder",
    ),
    "an empty folder": (replace_link(Path.mkdir), 3, "latest lacks weights.safetensors: step-00000003 is"),
    "a copied folder": (
        replace_link(lambda link: shutil.copytree(link.parent / "step-00000003", link)),
        3,
        None,
    ),
    "no target": (
        lambda each: shutil.rmtree(each / "step-00000003"),
        2,
        "points to step-00000003, which is not there: step-00000002 is taken, the newest checkpoint that is",
    ),
    "no optimizer": (
        lambda each: (each / "step-00000003" / "optimizer.safetensors").unlink(),
        2,
        "lacks optimizer.safetensors: step-00000002",
    ),
    **{
        f"a {name} that lacks {by} bytes": (truncate(name, by), 2, f"has a damaged {name}: step-00000002")
        for name in checkpoint.FILES
        for by in (1, 100)
    },
    "a state of something else": (
        lambda each: torch.save({"step": 3}, each / "step-00000003" / "state.pt"),
        2,
        "which has a damaged state.pt",
    ),
    **{
        f"a state whose {key} is {value}": (state_with(key, value), 2, "which has a damaged state.pt")
        for key, value in {
            "step": "3",
            "streams": 3,
            "streams ": {"pages": 3},
            "streams  ": {"pages": {"position": "abc"}},
            "streams   ": {"pages": {"position": (0, -1, 0)}},
            "streams    ": {"pages": {"position": (0, 0, 0), "drawn": "4"}},
            "streams     ": {"pages": {"position": (0, 0, 0), "latest": [1]}},
            "random": [3],
            "random ": [{"python": 1}],
        }.items()
    },
    **{
        f"moments {what}": (moments(change), 2, "which has an optimizer.safetensors of other weights")
        for what, change in {
            "of nothing": lambda found: {},
            "of another weight": lambda found: found | {"exp_avg.gate": torch.zeros(1)},
            "without a kind": lambda found: {key: found[key] for key in found if key != "exp_avg.bias"},
            "of another shape": lambda found: found | {"exp_avg.bias": torch.zeros(1)},
            "of whole numbers": lambda found: found | {"exp_avg.bias": torch.zeros(2, dtype=torch.int32)},
        }.items()
    },
    "another optimizer": (
        lambda each: shutil.copy(
            each / "step-00000003" / "weights.safetensors", each / "step-00000003" / "optimizer.safetensors"
        ),
        2,
        "of other weights",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_the_newest_whole_checkpoint_stands_for_one_that_is_lost(part, tmp_path, case):
    """It is said, loaded, and followed by the next as ever."""
    damage, expected, said = DAMAGE[case]
    for step in (1, 2, 3):
        save(tmp_path, part, step, keep=3)
    damage(tmp_path)
    lines = []
    found = checkpoint.latest(tmp_path, lines.append)
    assert checkpoint.load(found, part[1], part[2])[0] == expected
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]
    for step in range(expected + 1, 5):
        save(tmp_path, part, step, keep=3)
    assert checkpoint.latest(tmp_path, pytest.fail).name == "step-00000004"
    names = ["latest", *(f"step-{step:08d}" for step in (2, 3, 4))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_what_points_to_an_older_one_that_is_whole_is_meant_so(part, tmp_path):
    for step in (1, 2):
        save(tmp_path, part, step)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step-00000001")
    assert checkpoint.latest(tmp_path, pytest.fail).name == "step-00000001"


def test_without_a_whole_one_nothing_is_begun_anew(part, tmp_path):
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, part, 1)
    os.truncate(tmp_path / "step-00000001" / "weights.safetensors", 10)
    with pytest.raises(ValueError, match=r"expected a whole checkpoint in .*, got none: step-00000001 has a"):
        checkpoint.latest(tmp_path)
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(ValueError, match=r"got none: step-00000001 is not there\. Put one back, or remove"):
        checkpoint.latest(tmp_path)
    (tmp_path / "latest").unlink()
    assert checkpoint.latest(tmp_path) is None


def test_a_folder_in_the_place_of_latest_is_kept_with_what_else_is_in_it(part, tmp_path):
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "notes.txt").touch()
    save(tmp_path, part, 1)
    assert checkpoint.latest(tmp_path, pytest.fail).name == "step-00000001"
    assert (tmp_path / "latest-kept" / "notes.txt").exists()


def lines_of_a_save(folder, part, step, stop=None):
    """How many lines of code a save runs; at the one to `stop` at the process dies."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            count += 1
            if count == stop:
                os._exit(9)
        return trace

    sys.settrace(trace)
    try:
        save(folder, part, step, keep=2)
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("before", [[], [1, 2]])
def test_the_death_of_a_process_at_any_line_of_a_save_loses_that_step_at_most(part, tmp_path, before):
    """As after SIGKILL nothing is cleaned up. With a checkpoint before it, `latest` is always right."""
    first, counted = tmp_path / "first", tmp_path / "count"
    first.mkdir()
    for step in before:
        save(first, part, step)
    shutil.copytree(first, counted, symlinks=True)
    total, found = lines_of_a_save(counted, part, 3), []
    assert total > 30
    for stop in range(1, total + 1):
        folder = tmp_path / str(stop)
        shutil.copytree(first, folder, symlinks=True)
        process = os.fork()
        if not process:
            lines_of_a_save(folder, part, 3, stop)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        said = []
        path = checkpoint.latest(folder, said.append)
        assert not (said and before)
        found.append(checkpoint.load(path, part[1], part[2])[0] if path else 0)
        shutil.rmtree(folder)
    assert found == sorted(found)
    assert set(found) == {2 if before else 0, 3}


def test_what_is_not_ours_is_kept(part, tmp_path):
    """Copies under names of one's own, and whatever has the name of a checkpoint that is written."""
    for copy in ("step-00000001-best", "step-0.old"):
        shutil.copytree(save(tmp_path, part, 1), tmp_path / copy)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "notes.txt").touch()
    (tmp_path / "step-00000003").write_text("notes")
    for step in range(2, 6):
        save(tmp_path, part, step, keep=1)
    kept = ["step-0.old", "step-00000001-best", "step-00000002-kept", "step-00000003-kept", "step-00000005"]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == kept


@pytest.mark.parametrize("name", ["unfinished-step-00000001", "unfinished-latest", "unfinished-removed"])
@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_names_of_what_is_unfinished_are_free(part, tmp_path, name, make):
    make(tmp_path / name)
    for step in (1, 2):
        save(tmp_path, part, step, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_a_copy_of_an_old_one_is_not_the_newest(part, tmp_path):
    for step in (1, 2):
        save(tmp_path, part, step)
    for copy in ("step-best", "step-00000003.old"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / copy)
    (tmp_path / "latest").unlink()
    assert checkpoint.latest(tmp_path).name == "step-00000002"


def test_the_hundred_millionth_step_comes_after_those_before(part, tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):
        save(tmp_path, part, step)
    (tmp_path / "latest").unlink()
    assert checkpoint.latest(tmp_path).name == "step-100000001"
    assert not (tmp_path / "step-99999999").exists()


def test_a_link_to_nothing_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "checkpoints").symlink_to("gone")
    with pytest.raises(ValueError, match=r"expected .*checkpoints to be a folder, got a link to nothing\."):
        checkpoint.latest(tmp_path / "checkpoints")


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ValueError, match=r"expected .*checkpoints to be a folder, got a file\."):
        checkpoint.latest(tmp_path / "checkpoints")


@pytest.mark.parametrize("writer", ["safetensors.torch.save_file", "torch.save"])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(part, tmp_path, monkeypatch, writer):
    def full(*_):
        kind = SafetensorError if "safetensors" in writer else RuntimeError
        raise kind("No space left on device")

    save(tmp_path, part, 1)
    with monkeypatch.context() as patched:
        patched.setattr(writer, full)
        with pytest.raises(
            OSError, match=r"step-00000002: expected to write a checkpoint, got: No space left"
        ):
            save(tmp_path, part, 2)
    assert checkpoint.latest(tmp_path, pytest.fail).name == "step-00000001"
    save(tmp_path, part, 2)
    assert checkpoint.latest(tmp_path, pytest.fail).name == "step-00000002"


def test_weights_that_are_damaged_are_a_value_error(part, tmp_path):
    path = save(tmp_path, part, 1) / "weights.safetensors"
    os.truncate(path, 50)
    with pytest.raises(ValueError, match=r"weights\.safetensors: expected safetensors, got a damaged file: "):
        load_weights(part[1], path)
