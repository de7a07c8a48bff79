"""Updates: by which gradient, of which parameters, with which precision."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flamingo import Flamingo
from flamingo.language import loss as language_loss
from flamingo.training import DataError, Pairs, loop, pair_sample, read_log, train, write_shards
from flamingo.training.blocks import blocks, recomputed
from flamingo.training.data import Stream
from flamingo.training.loop import accumulate_gradients
from flamingo_kernels import patch
from tests.helpers.logits import Logits
from tests.helpers.tiny_run import config, datasets, images, is_frozen, model, pretrained, processor


def batches(data):
    return {dataset: next(Stream(dataset, processor(), seed=0, at_once=2)) for dataset in datasets(data)}


def gradients(flamingo):
    return {name: p.grad for name, p in flamingo.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_weighted_sum(data):
    """The sum written anew, document by document, in one graph."""
    taken, flamingo = batches(data), model().double()
    summed = torch.zeros((), dtype=torch.float64)
    for dataset, batch in taken.items():
        losses = []
        for row in range(len(batch.labels)):
            length = int(batch.attention_mask[row].sum())
            frames = None if batch.num_frames is None else batch.num_frames[row : row + 1]
            ids, pixels = batch.input_ids[row : row + 1, :length], batch.pixels[row : row + 1].double()
            starts = batch.media_starts[row : row + 1, :length]
            logits = flamingo(ids, pixels, num_frames=frames, media_starts=starts).logits[0, :-1]
            targets = batch.labels[row, 1:length]
            losses.append(F.cross_entropy(logits, targets, reduction="none")[targets != -100])
        summed = summed + {"pages": 1.0, "pairs": 0.2, "clips": 0.03}[dataset.name] * torch.cat(losses).mean()
    summed.backward()
    expected = copy.deepcopy(gradients(flamingo))
    flamingo.zero_grad()
    found = accumulate_gradients(flamingo, taken)
    assert gradients(flamingo).keys() == expected.keys()
    for name, gradient in gradients(flamingo).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    total = sum(dataset.weight * loss.item() for dataset, loss in found.items())
    assert total == pytest.approx(summed.item())


def test_micro_batches_change_nothing_but_memory(data):
    taken = batches(data)
    results = []
    for size in (None, 1):
        flamingo = model().double()
        split = {replace(dataset, micro_batch_size=size): batch for dataset, batch in taken.items()}
        losses = [loss.item() for loss in accumulate_gradients(flamingo, split).values()]
        results.append((losses, gradients(flamingo)))
    assert results[0][0] == pytest.approx(results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], msg=name)


def test_processes_that_see_the_same_have_the_gradients_of_one(data, monkeypatch):
    """Two of them: FSDP takes the mean of their gradients, and sums of theirs are twice one's."""
    taken, results = batches(data), []
    for processes in (1, 2):
        monkeypatch.setattr(loop, "world_size", lambda count=processes: count)
        monkeypatch.setattr(loop, "sum_over_processes", lambda tensor, count=processes: tensor.mul_(count))
        flamingo = model().double()
        losses = accumulate_gradients(flamingo, taken)
        results.append(([loss.item() for loss in losses.values()], gradients(flamingo)))
    (one, expected), (both, found) = results
    assert both == pytest.approx(one)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_losses_of_bfloat16_are_added_in_float32(data):
    """The logits have 8 bits, the loss has not."""
    flamingo = model().bfloat16()
    (dataset,) = datasets(data)[:1]
    batch = next(Stream(dataset, processor(), seed=0, at_once=2))
    (loss,) = accumulate_gradients(flamingo, {dataset: batch}, bfloat16=True).values()
    pixels, options = batch.pixels.bfloat16(), {"media_starts": batch.media_starts}
    logits = flamingo(batch.input_ids, pixels, batch.attention_mask, **options).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def patched():
    flamingo = model()
    patch(flamingo, linears=True)
    return flamingo


@pytest.mark.parametrize("build", [model, pretrained, patched])
def test_logits_never_exist_at_once(data, monkeypatch, build):
    """Numbers and gradients are those of a model that gives logits, which has them all."""
    monkeypatch.setattr(language_loss, "PIECE", 5 * 261)
    taken, flamingo = batches(data), build()
    results, rows = [], []
    for each in (flamingo, GivesLogits(flamingo)):
        flamingo.zero_grad()
        with Logits(261) as seen:
            losses = accumulate_gradients(each, taken)
        rows.append(seen.rows)
        results.append((torch.stack([*losses.values()]), copy.deepcopy(gradients(flamingo))))
    assert rows == [5, max(batch.labels.numel() for batch in taken.values())]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


class GivesLogits(torch.nn.Module):
    """Any model that is called as a Flamingo."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_flamingo_with_a_forward_of_its_own_is_asked_for_logits(data):
    class Own(Flamingo):
        def forward(self, input_ids, pixels, attention_mask, num_frames, media_starts):
            return super().forward(input_ids, pixels, attention_mask, None, num_frames, media_starts)

    flamingo, taken = model(), batches(data)
    expected = accumulate_gradients(flamingo, taken)
    flamingo.__class__ = Own
    for dataset, found in accumulate_gradients(flamingo, taken).items():
        torch.testing.assert_close(found, expected[dataset])


def test_it_learns_and_leaves_the_frozen_parts_alone(data, tmp_path):
    flamingo = model()
    before = copy.deepcopy(flamingo.state_dict())
    train(flamingo, processor(), config(data, tmp_path, steps=30))
    for name, value in flamingo.state_dict().items():
        assert torch.equal(value, before[name]) is is_frozen(name), name
    log = read_log(tmp_path)
    assert [update["step"] for update in log] == list(range(1, 31))
    assert log[0].keys() >= {
        "loss",
        "loss/pages",
        "loss/pairs",
        "loss/clips",
        "gradient norm",
        "learning rate",
    }
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    for update in log:
        weighted = update["loss/pages"] + 0.2 * update["loss/pairs"] + 0.03 * update["loss/clips"]
        assert update["loss"] == pytest.approx(weighted)


def test_in_bfloat16_it_learns_the_same(data, tmp_path):
    """Within bfloat16's rounding; the frozen parts are rounded once, before the first update."""
    flamingo = model()
    rounded = {name: value.bfloat16() for name, value in flamingo.state_dict().items()}
    train(flamingo, processor(), config(data, tmp_path / "low", steps=8, bfloat16=True))
    changed = {name for name, value in flamingo.state_dict().items() if not torch.equal(value, rounded[name])}
    assert not any(map(is_frozen, changed))
    assert {name.partition(".")[0] for name in changed} == {"resampler", "cross_attn", "language"}
    train(model(), processor(), config(data, tmp_path / "exact", steps=8))
    low, exact = ([update["loss"] for update in read_log(tmp_path / run)] for run in ("low", "exact"))
    assert low != exact
    torch.testing.assert_close(torch.tensor(low), torch.tensor(exact), rtol=0.02, atol=0)


def test_a_model_of_bfloat16_is_left_as_any_other(data, tmp_path):
    """Its gradients go nowhere else once the run is over."""
    flamingo = model()
    train(flamingo, processor(), config(data, tmp_path, steps=1, bfloat16=True))
    flamingo.cross_attn["0"].ff(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    assert flamingo.cross_attn["0"].ff[1].weight.grad.dtype == torch.bfloat16


def test_gradients_are_clipped_and_the_rate_warms_up(data, tmp_path, monkeypatch):
    """AdamW hides the length of a gradient, a plain step does not."""
    monkeypatch.setattr(
        loop,
        "make_optimizer",
        lambda weights, config: torch.optim.SGD(weights.values(), lr=config.learning_rate),
    )
    flamingo = model()
    before = [p.detach().clone() for p in flamingo.parameters()]
    train(flamingo, processor(), config(data, tmp_path, steps=1, warmup_steps=4, max_grad_norm=0.01))
    moved = [(p - b).norm() for p, b in zip(flamingo.parameters(), before, strict=True)]
    assert read_log(tmp_path)[0]["gradient norm"] > 0.1
    assert torch.stack(moved).norm().item() == pytest.approx(0.01 * 1e-2 / 4, rel=1e-2)


def test_recomputed_blocks_give_the_same_to_the_bit(data, tmp_path, monkeypatch):
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    states, counts = [], []
    for recompute in (False, True):
        flamingo = model()
        calls.clear()
        train(
            flamingo,
            processor(),
            config(data, tmp_path / str(recompute), gradient_checkpointing=recompute),
        )
        counts.append(len(calls))
        states.append(flamingo.state_dict())
        assert all("forward" not in vars(module) for module in flamingo.modules())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert counts[1] > 1.3 * counts[0]


@pytest.mark.parametrize("build", [model, pretrained])
def test_recomputed_blocks_keep_less(data, build):
    """The resampler, the gated blocks and the layers of either language model: each saves its share."""
    flamingo, taken = build(), batches(data)
    units = blocks(flamingo)
    kinds = [units[:1], units[1:3], units[3:]]
    assert [len(kind) for kind in kinds] == [1, len(flamingo.cross_attn), flamingo.language.num_layers]
    expected, everything = kept(flamingo, taken, [])
    share = [everything - kept(flamingo, taken, kind)[1] for kind in kinds]
    found, rest = kept(flamingo, taken, units)
    assert min(share) > 0.1 * everything
    assert rest == everything - sum(share) < 0.35 * everything
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def kept(flamingo, taken, recompute):
    """The gradients, and how many bytes are kept for them."""
    sizes = []
    flamingo.zero_grad()
    with (
        recomputed(recompute),
        torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x),
    ):
        accumulate_gradients(flamingo, taken)
    return gradients(flamingo), sum(sizes)


def test_a_gradient_that_is_not_finite_stops_the_run(data, tmp_path):
    flamingo = model()
    with torch.no_grad():
        flamingo.cross_attn["0"].attn.to_q.weight[0, 0] = torch.inf
    before = copy.deepcopy(flamingo.state_dict())
    with pytest.raises(FloatingPointError, match="got a norm of nan in update 1"):
        train(flamingo, processor(), config(data, tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in flamingo.state_dict().items())


def test_frozen_parts_are_in_eval_mode(data, tmp_path):
    flamingo = model()
    train(flamingo, processor(), config(data, tmp_path, steps=1))
    language = flamingo.language
    assert [part.training for part in (flamingo.vision, *language.layers)] == [False] * 5
    assert [part.training for part in (flamingo.resampler, *flamingo.cross_attn.values())] == [True] * 3
    assert language.new_tokens.training


def test_a_model_of_other_parts_names_its_blocks(data, tmp_path):
    other, run = GivesLogits(model()), config(data, tmp_path, gradient_checkpointing=True)
    with pytest.raises(
        ValueError, match=r"got GivesLogits\. Name its blocks: train\(\.\.\., blocks=\[\.\.\.\]\)"
    ):
        train(other, processor(), run)
    train(other, processor(), run, blocks=list(other.inner.language.layers))
    assert len(read_log(tmp_path)) == 4


def test_tensorboard_has_what_the_log_has(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(model(), processor(), config(data, tmp_path, tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "loss/pairs", "learning rate"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        logged = [(update["step"], pytest.approx(update[name])) for update in read_log(tmp_path)]
        assert shown == logged


@pytest.fixture
def pairs_with_bad(tmp_path):
    """A number of good pairs and of bad ones to a dataset."""

    def write(good, bad):
        samples = [pair_sample(image, "a") for image in images(good, seed=0)]
        samples += [{"png": b"<html>", "txt": b"a"}] * bad
        write_shards(tmp_path / "pairs", samples)
        return Pairs(name="pairs", shards=(f"{tmp_path}/pairs",), batch_size=2)

    return write


def test_bad_samples_are_counted_wherever_one_looks(pairs_with_bad, tmp_path, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pairs = pairs_with_bad(38, 2)
    run = config(tmp_path, tmp_path / "run", datasets=(pairs,), steps=40, tensorboard=True)
    train(model(), processor(), run)
    log = read_log(tmp_path / "run")
    counts = [update["bad/pairs"] for update in log]
    assert counts == sorted(counts)
    assert (counts[19], counts[39]) == (2, 4)  # two in each epoch
    assert "bad=4" in capsys.readouterr().err
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("bad/pairs")] == counts
    skipped = [each for update in log for each in update.get("skipped", [])]
    assert {each["sample"] for each in skipped} == {"000038", "000039"}
    assert {each["shard"] for each in skipped} == {f"{tmp_path}/pairs/000000.tar"}
    assert all("that Pillow can read, got png" in each["reason"] for each in skipped)


def test_too_many_bad_samples_stop_the_run(pairs_with_bad, tmp_path):
    pairs = pairs_with_bad(6, 6)
    run = config(tmp_path, tmp_path / "run", datasets=(pairs,), steps=40)
    with pytest.raises(
        DataError,
        match=r"'pairs': expected at most max_bad = 0\.1 .*, got \d of \d+, as \S*000000\.tar, sample 00",
    ):
        train(model(), processor(), run)
    assert len(read_log(run.folder)) < 6
    train(model(), processor(), replace(run, folder=f"{tmp_path}/other", max_bad=0.5, steps=6))


def test_bad_samples_of_all_processes_are_counted(pairs_with_bad, tmp_path, monkeypatch):
    """Two that see the same."""
    monkeypatch.setattr(loop, "sum_over_processes", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(loop, "gather", lambda value: [value, value])
    run = config(tmp_path, tmp_path, datasets=(pairs_with_bad(19, 1),), steps=10, max_bad=1.0)
    train(model(), processor(), run)
    assert read_log(tmp_path)[-1]["bad/pairs"] == 2
