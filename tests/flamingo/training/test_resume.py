"""A run that was stopped, by its end or by a kill, continues to the bit."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flamingo.training import Pairs, checkpoint, loop, pair_sample, read_log, train, write_shards
from flamingo_kernels import patch
from tests.helpers import ROOT
from tests.helpers.tiny_run import config, datasets, images, model, processor


def losses(folder):
    """All that was logged but the time it took."""
    return [{name: value for name, value in each.items() if name != "seconds"} for each in read_log(folder)]


def assert_same_run(one: Path, other: Path):
    assert losses(one) == losses(other)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        first, second = ((run / "checkpoints" / "latest" / name).read_bytes() for run in (one, other))
        assert first == second, name


class Forgetful(nn.Module):
    """A Flamingo whose pixels are dropped at random: it needs the random generators too."""

    def __init__(self):
        super().__init__()
        self.inner = model()
        self.dropout = nn.Dropout(0.3)

    def forward(self, input_ids, pixels, *args, **kwargs):
        return self.inner(input_ids, self.dropout(pixels), *args, **kwargs)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_twice_n_steps_are_n_and_n(data, tmp_path, bfloat16, kernels):
    def build():
        built = Forgetful()
        if kernels:
            patch(built, linears=True)
        return built

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    changes = {"no_decay": ("inner.resampler",), "bfloat16": bfloat16}
    train(build(), processor(), config(data, whole, steps=6, **changes))
    train(build(), processor(), config(data, halves, steps=3, **changes))
    torch.manual_seed(99)
    train(build(), processor(), config(data, halves, steps=6, **changes))
    assert len(losses(halves)) == 6
    assert_same_run(whole, halves)


def test_a_run_continues_exactly_where_samples_are_bad(tmp_path):
    """Their count too, in the middle of an epoch."""
    samples = [pair_sample(image, f"picture {i}") for i, image in enumerate(images(9, seed=0))]
    for bad in (2, 5):
        samples[bad]["png"] = b""
    write_shards(tmp_path / "data", samples)
    pairs = (Pairs(name="pairs", shards=(f"{tmp_path}/data",), batch_size=2),)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(model(), processor(), config(tmp_path, whole, datasets=pairs, steps=9, max_bad=0.5))
    for steps in (2, 6, 9):
        run = config(tmp_path, halves, datasets=pairs, steps=steps, max_bad=0.5)
        train(model(), processor(), run)
    assert losses(whole)[-1]["bad/pairs"] == 4
    assert_same_run(whole, halves)


def test_a_finished_run_is_left_alone(data, tmp_path):
    run = config(data, tmp_path, steps=2)
    saved = train(model(), processor(), run)
    before = {path: path.stat().st_mtime_ns for path in saved.iterdir()}
    assert train(model(), processor(), run) == saved
    assert {path: path.stat().st_mtime_ns for path in saved.iterdir()} == before


def test_updates_after_the_checkpoint_are_done_again(data, tmp_path, monkeypatch):
    """Stopped between two checkpoints, with half a line in the log."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(model(), processor(), config(data, whole, steps=5, checkpoint_every=2))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(checkpoint, "save", stop)
        train(model(), processor(), config(data, stopped, steps=5, checkpoint_every=3))
    assert [update["step"] for update in read_log(stopped)] == [1, 2, 3]
    with open(stopped / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')
    train(model(), processor(), config(data, stopped, steps=5, checkpoint_every=2))
    assert_same_run(whole, stopped)


@pytest.fixture
def ctrl_c(monkeypatch):
    """Presses Ctrl-C so many times while an update of this step is made."""

    def press(step, times=1):
        update = loop._Run.update

        def interrupted(run):
            for _ in range(times if run.step + 1 == step else 0):
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.05)  # two that wait for the interpreter would count as one
            return update(run)

        monkeypatch.setattr(loop._Run, "update", interrupted)

    return press


def test_ctrl_c_saves_the_update_that_is_being_made(data, tmp_path, monkeypatch, ctrl_c):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(model(), processor(), config(data, whole, steps=5))
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context():
        ctrl_c(3)
        with pytest.raises(
            KeyboardInterrupt, match=r"stopped after update 3 of 5, which is saved in .*step-0+3\."
        ):
            train(model(), processor(), config(data, stopped, steps=5))
    assert signal.getsignal(signal.SIGINT) == before
    monkeypatch.undo()
    assert checkpoint.latest(stopped / "checkpoints").name == "step-00000003"
    train(model(), processor(), config(data, stopped, steps=5))
    assert_same_run(whole, stopped)


def test_ctrl_c_in_the_middle_of_a_print(data, tmp_path, monkeypatch, ctrl_c, capfd):
    """What is being printed cannot be interrupted by another print."""

    class Busy(io.StringIO):
        def write(self, text):
            if "stops after" in text:
                raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")
            return super().write(text)

    ctrl_c(2)
    monkeypatch.setattr(sys, "stderr", Busy())
    with pytest.raises(KeyboardInterrupt, match="stopped after update 2 of 5"):
        train(model(), processor(), config(data, tmp_path, steps=5))
    assert "train: stops after this update; Ctrl-C again ends at once\n" in capfd.readouterr().err


def test_ctrl_c_in_the_last_update_changes_nothing(data, tmp_path, ctrl_c):
    ctrl_c(2)
    assert train(model(), processor(), config(data, tmp_path, steps=2)).name == "step-00000002"


def test_the_second_ctrl_c_ends_at_once(data, tmp_path, ctrl_c):
    ctrl_c(3, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(model(), processor(), config(data, tmp_path, steps=5))
    assert [update["step"] for update in read_log(tmp_path)] == [1, 2]
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_workers_leave_ctrl_c_to_the_run(data, tmp_path, monkeypatch):
    """A terminal sends it to all of them."""
    update = loop._Run.update

    def press(run):
        if run.step == 2:
            os.killpg(os.getpgrp(), signal.SIGINT)
        return update(run)

    process = os.fork()
    if not process:
        os.setpgrp()
        monkeypatch.setattr(loop._Run, "update", press)
        try:
            train(model(), processor(), config(data, tmp_path, steps=9, workers=1))
        except KeyboardInterrupt as stopped:
            os._exit(7 if "stopped after update 3 of 9" in str(stopped) else 8)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7


def test_another_run_in_the_folder_is_refused(data, tmp_path):
    process = start(data, tmp_path, steps=10_000)
    wait_until_logged(process, tmp_path, 3)
    with pytest.raises(
        ValueError, match=f"this run's alone, got one that process {process.pid} on .* writes to"
    ):
        train(model(), processor(), config(data, tmp_path, steps=5))
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    said = process.stderr.read().decode().splitlines()[-1]
    steps = len(read_log(tmp_path))
    assert said == (
        f"train: stopped after update {steps} of 10000, which is saved in {tmp_path}/checkpoints/"
        f"step-{steps:08d}. Start it again to go on."
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("pages", "images", "clips"),
            "of the checkpoint, clips, pages, pairs, got clips, images, pages. Name",
        ),
        (("pages", "pairs"), "clips, pages, pairs, got pages, pairs"),
        (("pages", "clips", "pairs"), "shards_at_once of the checkpoint for dataset 'clips', got others"),
    ],
)
def test_datasets_that_are_called_otherwise_do_not_begin_anew(data, tmp_path, names, message):
    train(model(), processor(), config(data, tmp_path, steps=1))
    before = read_log(tmp_path)
    renamed = tuple(replace(each, name=name) for each, name in zip(datasets(data), names, strict=False))
    with pytest.raises(ValueError, match=message):
        train(model(), processor(), config(data, tmp_path, steps=2, datasets=renamed))
    assert read_log(tmp_path) == before


def test_a_run_that_is_killed_twice_is_the_run_that_is_not(data, tmp_path):
    """SIGKILL at a random moment, between any two instructions."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps, every = 60, 4
    shared = {"steps": steps, "checkpoint_every": every}
    moments = random.Random()
    seed = moments.randrange(2**32)
    print(f"killed at moments of seed {seed}")  # shown where the test fails
    moments.seed(seed)
    for kill in (0.25, 0.6, None):
        process = start(data, killed, **shared)
        if kill is None:
            assert process.wait() == 0, process.stderr.read().decode()
            break
        wait_until_logged(process, killed, round(steps * (kill + 0.1 * moments.random())))
        time.sleep(0.1 * moments.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was too fast to be killed"
        logged, saved = len(read_log(killed)), checkpoint.latest(killed / "checkpoints")
        step = torch.load(saved / "state.pt", weights_only=True)["step"]
        assert logged - step <= every
    process = start(data, whole, **shared)
    assert process.wait() == 0, process.stderr.read().decode()
    assert len(losses(whole)) == steps
    assert_same_run(whole, killed)


def start(data: Path, run: Path, **changes) -> subprocess.Popen:
    """`python -m flamingo train` in another process."""
    run.mkdir(exist_ok=True)
    (run / "run.toml").write_text(toml(data, run, **changes))
    command = [sys.executable, "-m", "flamingo", "train", str(run / "run.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def toml(data: Path, run: Path, **changes) -> str:
    """The file of a tiny run."""
    fields = {
        "folder": str(run),
        "warmup_steps": 2,
        "learning_rate": 0.01,
        "bfloat16": False,
        "workers": 0,
        "device": "cpu",
        **changes,
    }
    lines = [
        f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for name, value in fields.items()
    ]
    for dataset in datasets(data):
        lines += ["[[datasets]]", f"kind = {dataset.kind!r}", f"name = {dataset.name!r}"]
        lines += [f"shards = {list(dataset.shards)!r}", f"batch_size = {dataset.batch_size}"]
        lines += [f"length = {dataset.length}"]
    return "\n".join([*lines, "[model]", "preset = 'tiny'", "changes = { new_tokens = [257] }"]) + "\n"


def wait_until_logged(process: subprocess.Popen, run: Path, step: int) -> None:
    while process.poll() is None and len(read_log(run)) < step:
        time.sleep(0.01)
