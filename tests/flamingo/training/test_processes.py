"""Two processes and FSDP2: the updates of one process, and checkpoints for any number."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from flamingo.language import loss
from flamingo.training import read_log, train
from flamingo.training.blocks import blocks, shard
from flamingo.training.data import Stream
from flamingo.training.loop import accumulate_gradients
from flamingo.training.optimizer import store_as
from flamingo.training.processes import device_of, gather, leave, rank, sum_over_processes, whole, world_size
from flamingo_kernels import patch
from flamingo_kernels.ops.linear import config as products
from tests.flamingo.training.test_resume import ROOT, toml
from tests.helpers.logits import Logits
from tests.helpers.tiny_run import config, datasets, model, pretrained, processor

slow = pytest.mark.slow  # what two processes do


def patched():
    flamingo = model()
    assert len(patch(flamingo, linears=True).replaced) == 7
    return flamingo


# Of runs of these names; of others, `model`.
MODELS = {"pretrained": pretrained, "patched": patched, "patched in bfloat16": patched}


def configs(data: Path, folder: Path):
    """Runs by their names; those of "one" begin or go on in one process."""
    run = config(data, folder / "two", steps=4, checkpoint_every=2)
    return {
        "two": run,
        "recomputed": replace(run, folder=f"{folder}/recomputed", gradient_checkpointing=True),
        "bfloat16": replace(run, folder=f"{folder}/bfloat16", bfloat16=True),
        "pretrained": replace(run, folder=f"{folder}/pretrained", gradient_checkpointing=True),
        "patched": replace(run, folder=f"{folder}/patched"),
        "patched in bfloat16": replace(run, folder=f"{folder}/patched in bfloat16", bfloat16=True),
        "one": replace(run, folder=f"{folder}/one"),
    }


def work(me: int, data: Path, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    products.LEAST_WEIGHTS, products.choose = 0, lambda *_: "onednn"  # linear layers here are small
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=me, world_size=2)
    for name, run in configs(data, folder).items():
        steps = 6 if name == "one" else run.steps  # one process has made the first four
        train(MODELS.get(name, model)(), processor(), replace(run, steps=steps))
    torch.save(logits_at_once(data), folder / f"logits-{me}.pt")
    layer = torch.nn.Linear(1, 1, bias=False)
    shard(layer, [], bfloat16=True)
    layer(torch.tensor([[256.0, 1.0][me]], dtype=torch.bfloat16)).sum().backward()
    gradient = layer.weight.grad.full_tensor()
    if me == 0:
        torch.save(gradient, folder / "gradient.pt")
    distributed.barrier()  # who leaves first takes the connection along
    distributed.destroy_process_group()
    leave()


def logits_at_once(data: Path) -> dict[str, int]:
    """The most rows of logits in an update; a language model that is a unit of its own has all of them."""
    loss.PIECE = 5 * 261
    rows = {}
    for name, units in (("blocks", lambda flamingo: []), ("language", lambda flamingo: [flamingo.language])):
        flamingo = model()
        shard(flamingo, [*blocks(flamingo), *units(flamingo)], bfloat16=False)
        taken = {each: next(Stream(each, processor(), seed=0, at_once=2)) for each in datasets(data)[:1]}
        with Logits(261) as seen:
            accumulate_gradients(flamingo, taken)
        rows[name] = seen.rows
    return rows


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The folder of runs that two processes have made or continued."""
    folder = tmp_path_factory.mktemp("runs")
    train(model(), processor(), configs(data, folder)["one"])
    torch.multiprocessing.spawn(work, (data, folder), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The folder of the runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(model(), processor(), config(data, folder / "exact", steps=6, checkpoint_every=2))
    train(model(), processor(), config(data, folder / "bfloat16", steps=4, bfloat16=True))
    for name in ("pretrained", "patched"):
        train(MODELS[name](), processor(), config(data, folder / name, steps=4))
    return folder


def assert_close(run: Path, expected: Path, steps: int, rtol: float = 1e-4) -> None:
    found, alone = read_log(run)[:steps], read_log(expected)[:steps]
    assert len(found) == len(alone) == steps
    for name in ("loss", "loss/pages", "loss/pairs", "loss/clips", "gradient norm"):
        one, other = (torch.tensor([update[name] for update in each]) for each in (found, alone))
        torch.testing.assert_close(one, other, rtol=rtol, atol=0, msg=name)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


@slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("two", "exact"), ("recomputed", "exact"), ("pretrained", "pretrained"), ("patched", "patched")],
)
def test_two_processes_make_the_updates_of_one(runs, alone, name, expected):
    assert_close(runs / name, alone / expected, steps=4)
    found, expected = weights(runs / name, 4), weights(alone / expected, 4)
    assert found.keys() == expected.keys()
    for key in expected:  # AdamW turns the sign of a gradient near 0 into a step of the learning rate
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-3, msg=key)


@slow
def test_two_processes_run_the_kernels(runs):
    plain, fused = (read_log(runs / name)[-1]["loss"] for name in ("two", "patched"))
    assert plain == pytest.approx(fused, rel=1e-4)
    assert plain != fused


@slow
def test_in_bfloat16_too(runs, alone):
    """The first loss to the bit: the same roundings; later ones differ by how gradients were added."""
    assert_close(runs / "bfloat16", alone / "bfloat16", steps=4, rtol=0.02)
    first, expected = (read_log(folder / "bfloat16")[0]["loss/pages"] for folder in (runs, alone))
    assert first == pytest.approx(expected, rel=1e-6)
    assert {tensor.dtype for tensor in weights(runs / "bfloat16", 4).values()} == {torch.float32}


@slow
def test_the_kernels_run_in_bfloat16_too(runs, alone):
    """What two processes do by default."""
    assert_close(runs / "patched in bfloat16", alone / "bfloat16", steps=4, rtol=0.02)
    plain, fused = (read_log(runs / name)[-1]["loss"] for name in ("bfloat16", "patched in bfloat16"))
    assert plain != fused


@slow
def test_gradients_of_two_processes_meet_in_float32(runs):
    """(256 + 1) / 2: in bfloat16 that is 128."""
    assert torch.load(runs / "gradient.pt").item() == 128.5


@slow
def test_two_processes_make_few_logits_at_once(runs):
    """Around a unit stand FSDP's hooks: its own forward is called, and gives logits."""
    for me in range(2):
        rows = torch.load(runs / f"logits-{me}.pt")
        assert rows["blocks"] == 5 < rows["language"]


@slow
def test_one_process_continues_two(data, runs, alone):
    untrained = model()
    trained = {name: p for name, p in model(seed=5).named_parameters() if p.requires_grad}
    untrained.load_state_dict(trained, strict=False)
    train(untrained, processor(), replace(configs(data, runs)["two"], steps=6))
    assert_close(runs / "two", alone / "exact", steps=6)


@slow
def test_two_processes_continue_one(runs, alone):
    assert_close(runs / "one", alone / "exact", steps=6)


def test_an_odd_batch_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr("flamingo.training.loop.world_size", lambda: 2)
    monkeypatch.setattr("flamingo.training.loop.shard", lambda *_, **__: None)
    run = config(data, tmp_path)
    odd = replace(run, datasets=(replace(run.datasets[0], batch_size=3),))
    with pytest.raises(ValueError, match="batch_size that 2 processes can share evenly, got 3"):
        train(model(), processor(), odd)


@pytest.mark.parametrize("bfloat16", [True, False])
def test_every_block_and_the_rest_are_sharded(monkeypatch, bfloat16):
    """Gradients meet in float32, and what goes into a block is not rounded."""
    sharded = []
    monkeypatch.setattr(
        "flamingo.training.blocks.fully_shard", lambda module, mp_policy: sharded.append((module, mp_policy))
    )
    layers = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    shard(layers, list(layers), bfloat16=bfloat16)
    assert [module for module, _ in sharded] == [*layers, layers]
    for _, policy in sharded:
        dtypes = (torch.bfloat16, torch.float32) if bfloat16 else (None, None)
        assert (policy.param_dtype, policy.reduce_dtype) == dtypes
        assert not policy.cast_forward_inputs


@pytest.mark.parametrize("encoded", [False, True])
def test_a_sharded_model_takes_what_its_frozen_encoder_makes(data, tmp_path, encoded):
    """In bfloat16, though what it is projected by is stored in float32. One process shards with itself."""
    flamingo, (pairs, *_) = model(), datasets(data)[1:]
    store_as(torch.bfloat16, (p for p in flamingo.parameters() if not p.requires_grad))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        batch = next(Stream(pairs, processor(), seed=0, at_once=2))
        if encoded:
            batch = batch._replace(pixels=flamingo.vision(batch.pixels.bfloat16()))
        shard(flamingo, blocks(flamingo), bfloat16=True)
        (loss,) = accumulate_gradients(flamingo, {pairs: batch}, bfloat16=True).values()
    finally:
        distributed.destroy_process_group()
    assert loss.isfinite()


def test_a_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    for available, found in ((True, torch.device("cuda", 3)), (False, torch.device("cpu"))):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert device_of("auto") == found
        assert device_of("cpu") == torch.device("cpu")


def test_a_whole_copy_has_no_history():
    weight = torch.nn.Parameter(torch.ones(2))
    assert not whole(weight).requires_grad
    assert torch.equal(whole(weight), torch.ones(2))


def test_a_process_alone_needs_no_group():
    assert (rank(), world_size(), gather("x")) == (0, 1, ["x"])
    assert sum_over_processes(torch.ones(2)).tolist() == [1, 1]


@slow
def test_who_leaves_says_all_and_waits_for_no_thread():
    """In particular for none that the interpreter would end."""
    script = """
import atexit, threading
from flamingo.training.processes import leave

atexit.register(print, "the interpreter has ended")
threading.Thread(target=threading.Event().wait).start()
print("the work is done", end="")
leave()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "the work is done", "")


@slow
def test_torchrun(data, runs, alone, tmp_path):
    """The command line, as it is started on a machine with several GPUs."""
    (tmp_path / "run.toml").write_text(toml(data, tmp_path / "run", steps=4, checkpoint_every=2, workers=1))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flamingo", "train"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path / "run.toml")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 steps done, the last checkpoint is") == 1
    assert done.stderr.count("train: with kernels: ") == 1
    assert len(read_log(tmp_path / "run")) == 4
