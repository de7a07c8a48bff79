"""`python -m flamingo_kernels profile`, and what it says; times decide nothing here."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from flamingo import modules
from flamingo_kernels import __main__ as cli
from flamingo_kernels import patch
from flamingo_kernels.commands.measure.timing import Spread
from flamingo_kernels.commands.profile import count, models, parts, report, run
from flamingo_kernels.commands.profile.subject import QUICK
from flamingo_kernels.layers import cross_attention, fused, resampler
from flamingo_kernels.patch import linears
from tests.helpers.figures import texts_of

WORKS = [models.PREFILL, models.DECODE, models.STEP]
ASKED = ["--quick", "--threads", "1"]


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """One call where there would be many."""
    whole = run.run
    monkeypatch.setattr(run, "PROFILED", 1)
    monkeypatch.setattr(run, "run", lambda *args, **kwargs: whole(*args, **{**kwargs, "seconds": 0}))


def test_it_prints_and_writes_what_it_found(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {option: tmp_path / f"profile.{suffix}" for option, suffix in FILES.items()}
    written = [text for option, file in files.items() for text in (f"--{option}", str(file))]
    assert cli.main(["profile", "tiny", *ASKED, *written]) == 0
    shown = capsys.readouterr()
    for expected in (
        "tiny, float32, 0.405 M random parameters; input_ids [1, 48], pixels [1, 3, 1, 3, 32, 32]",
        "flamingo.modules.MaskedCrossAttention",
        "tokens/s, median (20% to 80%)",
        "a token after the whole text, keys and values in the cache",
        "saved for the backward pass",
        *(f"time by part, {name}" for name in WORKS),
    ):
        assert expected in shown.out
    assert shown.out.count("same") == 2 * len(WORKS)
    assert "3/6  prefill: timing" in shown.err

    found = json.loads(files["json"].read_text())
    assert list(found["works"]) == list(found["proofs"]) == WORKS
    assert found["conditions"]["threads"] == 1
    for work in found["works"].values():
        before, patched, linears = (work["times"][side]["median"] for side in SIDES)
        assert work["gain"] == {"patch": before / patched, "linears": before / linears}
        assert work["tokens_per_s"]["patch"]["median"] == pytest.approx(1e3 * work["tokens"] / patched)
    assert found["works"][models.STEP]["saved"]["linears"] > 0
    assert set(found["works"][models.STEP]["parts"]["before"]) == set(parts.PARTS)

    events = json.loads(files["trace"].read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert names >= {f"{name}, {side}" for name in WORKS for side in SIDES}
    assert names >= {*parts.PARTS} - {parts.LANGUAGE, parts.BETWEEN}, "what is in no other part has no range"
    assert files["picture"].read_bytes().startswith(b"\x89PNG")


SIDES = ("before", "patch", "linears")
FILES = {"json": "json", "trace": "trace.json", "picture": "png"}


@pytest.mark.slow
def test_all_sides_are_compiled_when_asked_for(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(run, "compiled_twin", lambda model: made.append(run.twin(model)) or made[-1])
    assert cli.main(["profile", "tiny", *ASKED, "--compile"]) == 0
    assert "all under torch.compile; their parts without it" in capsys.readouterr().out
    patched = [any(isinstance(module, fused.Fused) for module in model.modules()) for model in made]
    assert patched == [False, True, True]
    swapped = [any(isinstance(module, linears.Linear) for module in model.modules()) for model in made]
    assert swapped == [False, False, True]


def test_integers_are_told_and_timed_when_asked_for(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert cli.main(["profile", "tiny", "--quick", "--quantize", "--json", str(file)]) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "quantize: " in shown
    assert "patch and int8" in shown
    for work in (models.PREFILL, models.DECODE):
        assert 1e-4 < found["told"][work][run.INT8] < 0.1
        assert run.INT8 in found["works"][work]["times"]
        assert run.INT8 not in found["proofs"][work]
    assert models.STEP not in found["told"]
    assert run.INT8 not in found["works"][models.STEP]["times"]


def test_a_twin_of_integers_leaves_the_model_as_it_is():
    model = models.plan("tiny", QUICK).subject(torch.float32, "cpu").model
    before = {name: (each.data_ptr(), each.requires_grad) for name, each in model.named_parameters()}
    integers, report = run.integer_twin(model)
    assert report.bytes_after < 0.3 * report.bytes_before
    assert any(each.dtype == torch.int8 for each in integers.buffers())
    assert all(each.is_floating_point() for each in integers.parameters())
    assert {name: (each.data_ptr(), each.requires_grad) for name, each in model.named_parameters()} == before


def test_a_compiled_twin_runs_the_graphs():
    model, graphs = models.plan("tiny", QUICK).subject(torch.float32, "cpu").model.resampler, []
    twin = run.compiled_twin(model, lambda graph, _: graphs.append(graph) or graph.forward)
    x = torch.randn(1, 1, 1, 4, model.project_input.in_features)
    torch.testing.assert_close(twin(x), model(x))
    assert graphs
    assert twin.latents is model.latents


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    subject = models.plan("tiny", QUICK).subject(dtype, "cpu")
    after = run.twin(subject.model)
    patch(after)
    proofs, _ = run.compare(subject, {run.BEFORE: subject.model, run.PATCHED: after})
    assert all(list(each) == [run.PATCHED] and each[run.PATCHED].passed for each in proofs.values())
    tensors = zip(subject.model.parameters(), after.parameters(), strict=True)
    assert all(one is other and one.dtype == dtype for one, other in tensors)


def test_a_model_whose_library_is_missing(monkeypatch, capsys):
    def missing(*_):
        raise ImportError("open_flamingo is not installed: pip install it")

    monkeypatch.setitem(models.MODELS, "open_flamingo-tiny", missing)
    assert cli.main(["profile", "open_flamingo-tiny", *ASKED]) == 2
    assert capsys.readouterr().err == "profile: open_flamingo is not installed: pip install it\n"


@pytest.mark.parametrize("lacking", ["", "needs more than there is"])
def test_a_model_of_which_nothing_is_swapped(lacking, monkeypatch, capsys):
    """It was compared with itself once, and said to be 1.28 times as fast."""
    for name in (
        "MaskedCrossAttention",
        "GatedCrossAttentionBlock",
        "PerceiverAttention",
        "PerceiverResampler",
    ):
        cls = getattr(modules, name)
        other = cls.forward
        monkeypatch.setattr(
            cls, "forward", lambda self, *args, other=other, **kwargs: other(self, *args, **kwargs)
        )
    monkeypatch.setattr(count, "lacking_memory", lambda *_, **__: lacking)
    assert cli.main(["profile", "tiny", *ASKED]) == 2
    shown = capsys.readouterr()
    assert "expected modules that patch swaps in Flamingo, got none" in shown.err
    assert "was given another forward by" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["nonsense"], f"expected a MODEL among {', '.join(models.MODELS)}, got nonsense."),
        (["tiny", "--device", "mps"], "expected the device cpu or cuda:0, got mps"),
        (["tiny", "--trace", "nowhere/trace.json"], "nowhere/trace.json: No such file or directory"),
        (["tiny", "--json", "nowhere/x.json"], "nowhere/x.json: No such file or directory"),
        (["tiny", "--picture", "x.text"], "expected a picture named ."),
    ],
)
def test_it_says_before_the_work_what_it_cannot_do(asked, message, monkeypatch, capsys):
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("it went to work"))
    assert cli.main(["profile", *asked]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("profile: ")
    assert message in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("home", "operator"),
    [
        (cross_attention, "gated_cross_attention"),
        (resampler, "perceiver_attention"),
        (fused, "gated_feed_forward"),
    ],
    ids=["attention", "resampler", "feed-forward"],
)
def test_a_wrong_result_fails_and_is_not_timed(home, operator, monkeypatch, tmp_path, capsys):
    right = getattr(home, operator)
    monkeypatch.setattr(home, operator, lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    monkeypatch.setattr(run, "interleave", lambda *_, **__: pytest.fail("it timed a wrong result"))
    file = tmp_path / "found.json"
    assert cli.main(["profile", "tiny", *ASKED, "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out
    assert out.endswith("The patched model computes something else: nothing was timed.\n")
    assert json.loads(file.read_text())["works"] == {}


def test_a_wrong_gradient_alone_fails(monkeypatch):
    """The forward pass of the training step is right, and so are the works that are nothing else."""

    class HalfGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return 0.5 * dx

    right = fused.gated_feed_forward
    monkeypatch.setattr(
        fused, "gated_feed_forward", lambda *args, **kwargs: HalfGradient.apply(right(*args, **kwargs))
    )
    found = run.run(models.plan("tiny", QUICK), dtype=torch.float32)
    assert [[proof.passed for proof in each.values()] for each in found.proofs.values()] == [
        [True, True],
        [True, True],
        [False, False],
    ]
    assert not found.same


def test_what_does_not_fit_is_counted_and_never_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(count, "available", lambda device: 2**20)
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("it ran the model"))
    file = tmp_path / "found.json"
    trace = tmp_path / "trace.json"
    assert cli.main(["profile", "tiny", *ASKED, "--json", str(file), "--trace", str(trace)]) == 0
    shown = capsys.readouterr()
    assert "All below is counted, nothing is measured." in shown.out
    assert " ms" not in shown.out
    assert "tokens/s" not in shown.out
    assert "there is no trace" in shown.err
    assert not trace.exists()
    assert list(json.loads(file.read_text())["flops"]) == WORKS


def test_speed_is_tokens_over_time():
    times = {run.BEFORE: Spread(10.0, 5.0, 20.0), run.LINEARS: Spread(4.0, 2.0, 5.0)}
    work = run.Measured(100, "", times, {}, {}, {})
    assert work.speed(run.BEFORE) == Spread(10_000, 5_000, 20_000)
    assert work.gain(run.LINEARS) == 2.5


def test_a_slower_side_is_shown_to_be_slower(monkeypatch):
    """By a clock that takes a call that runs a fused layer for ten times as slow."""
    ran = []
    forward = cross_attention.gated_block
    monkeypatch.setattr(cross_attention, "gated_block", lambda *args: ran.append(1) or forward(*args))

    def clock(call, last):
        ran.clear()
        call()
        return 20.0 if ran else 2.0

    found = run.run(models.plan("tiny", QUICK), dtype=torch.float32, clock=clock)
    assert [work.gain(side) for work in found.works.values() for side in SIDES[1:]] == [0.1] * 6
    page = report.measured(found)
    assert "24,000 (24,000 to 24,000)" in page
    assert "2,400 (2,400 to 2,400)   0.10x" in page


def profile_of(times, parts):
    work = run.Measured(100, "", times, dict.fromkeys(times, 1), {}, parts)
    conditions = {
        "device": "a processor",
        "threads": 2,
        "torch": "2.13.0",
        "device_type": "cpu",
        "time": "2026-01-02T03:04:05Z",
    }
    return run.Profile(
        "a model", "float32", {}, 10, "patch: 1", conditions, False, False, {}, {}, {models.PREFILL: work}
    )


TIMES = {
    run.BEFORE: Spread(10.0, 9.0, 12.0),
    run.PATCHED: Spread(8.0, 7.0, 9.0),
    run.LINEARS: Spread(4.0, 3.0, 5.0),
}
TAKEN = {
    run.BEFORE: {parts.VISION: 30.0, parts.LANGUAGE: 10.0},
    run.PATCHED: {parts.VISION: 30.0, parts.LANGUAGE: 30.0},
    run.LINEARS: {parts.LANGUAGE: 50.0},
}


def test_a_gain_whose_spreads_overlap_is_marked():
    page = report.measured(profile_of(TIMES, TAKEN))
    assert "12,500 (11,111 to 14,286)  ~1.25x" in page
    assert "25,000 (20,000 to 33,333)   2.50x" in page
    assert 'Gains of speed: "~": the spreads of both, 20% to 80%, overlap.' in page
    assert "30 ms  " in page
    assert "~1.00x" not in page, "parts have no spread"


def test_the_picture_says_of_what_it_is():
    texts = texts_of(lambda: report.picture(profile_of(TIMES, TAKEN), "x.png"))
    assert "CPU: a processor, 2 threads, torch 2.13.0, 2026-01-02" in texts
    assert "a model, float32, 1e-05 M random parameters\n" in texts
    assert "compile" not in texts
    compiled = dataclasses.replace(profile_of(TIMES, TAKEN), compiled=True)
    assert ", under torch.compile\n" in texts_of(lambda: report.picture(compiled, "x.png"))


def test_the_bars_are_the_numbers_beside_them(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    report.picture(profile_of(TIMES, TAKEN), tmp_path / "x.png")
    (axes,) = drawn[0].axes
    ends = {}
    for bar in axes.patches:
        y = round(bar.get_y() + bar.get_height() / 2)
        ends[y] = max(ends.get(y, 0.0), bar.get_x() + bar.get_width())
    assert ends == pytest.approx({2: 1.0, 1: 0.8, 0: 0.4})
    assert [text.get_text().strip() for text in axes.texts] == [
        "0.40: 4 ms, 25,000 tokens/s, 2.50x",
        "0.80: 8 ms, 12,500 tokens/s, ~1.25x",
        "1.00: 10 ms, 10,000 tokens/s",
    ]
    assert report.bar(profile_of(TIMES, TAKEN).works[models.PREFILL], run.PATCHED) == pytest.approx(
        {parts.VISION: 0.4, parts.LANGUAGE: 0.4}
    )
