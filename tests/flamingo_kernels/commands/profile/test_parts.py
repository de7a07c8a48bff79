"""A slow part is found to be slow: real runs under the profiler, and a clock that sees one operator."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from flamingo_kernels import layers, patch, use_backend
from flamingo_kernels.commands.profile import models, parts, run
from flamingo_kernels.commands.profile.subject import QUICK
from flamingo_kernels.layers import cross_attention


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.setattr(run, "PROFILED", 1)
    return models.plan("tiny", QUICK).subject(torch.float32, "cpu")


def both(subject):
    after = run.twin(subject.model)
    patch(after)
    return {run.BEFORE: subject.model, run.PATCHED: after}


def slow_down(module: nn.Module) -> None:
    """Let a module call erf, which nothing else here does, forward and backward."""

    def forward(self, x, *args):
        return original.forward(self, x + 0 * x.erf(), *args)

    original = type(module)
    module.__class__ = type(f"Slow{original.__name__}", (original,), {"forward": forward})


def slow_down_attention(attn: nn.Module, monkeypatch) -> None:
    """What is in the attention and in none of its modules."""
    attend, fused = type(attn).attend, cross_attention.attend
    if isinstance(attn, layers.Fused):
        leave_unfused(attn)

        def slow(module, q, *args):
            return fused(module, q + 0 * q.erf() if module is attn else q, *args)

        monkeypatch.setattr(cross_attention, "attend", slow)
    else:
        attn.attend = lambda q, *args: attend(attn, q + 0 * q.erf(), *args)


def leave_unfused(attn: nn.Module) -> None:
    """Let a patched block call its attention as a module: one of its parts is no plain one."""
    attn.to_out.__class__ = type(
        "Other", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x)}
    )


@pytest.mark.parametrize(
    ("path", "part", "backward"),
    [
        ("vision.layers.0", parts.VISION, False),  # frozen, and before all that is trained
        ("resampler.layers.1.1.1", parts.RESAMPLER, True),
        pytest.param("resampler.layers.1.0.to_q", parts.RESAMPLER, True, marks=pytest.mark.slow),
        ("cross_attn.2.attn.norm", parts.NORM, True),
        pytest.param("cross_attn.2.attn.to_q", parts.PROJECTIONS, True, marks=pytest.mark.slow),
        pytest.param("cross_attn.2.attn.to_kv", parts.PROJECTIONS, True, marks=pytest.mark.slow),
        ("cross_attn.2.attn.to_out", parts.PROJECTIONS, True),
        ("cross_attn.2.attn", parts.ATTENTION, True),
        ("cross_attn.2.ff.1", parts.FEED_FORWARD, True),
        pytest.param("cross_attn.2.ff.2", parts.FEED_FORWARD, True, marks=pytest.mark.slow),
        ("language.layers.1", parts.LANGUAGE, True),
    ],
)
def test_a_slow_module_is_found(subject, monkeypatch, path, part, backward):
    pair = both(subject)
    for model in pair.values():
        module = model.get_submodule(path)
        if path == "cross_attn.2.attn":
            slow_down_attention(module, monkeypatch)
        else:
            slow_down(module)
    cost = {"aten::erf": 7000, "ErfBackward0": 5000}  # microseconds
    monkeypatch.setattr(run, "host_time", lambda event: cost.get(event.name, 0))
    found = run.by_part(subject, pair, "cpu", calls=1)
    in_decode = {} if part in (parts.VISION, parts.RESAMPLER) else {part: 7}
    for side in pair:
        assert found[models.PREFILL][side] == {part: 7}
        assert found[models.DECODE][side] == in_decode
        assert found[models.STEP][side] == {part: 12 if backward else 7}


class Recorded:
    """One run of all works under the profiler, of which the time of any operator can be asked."""

    def __init__(self, subject: models.Subject):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(run, "PROFILED", 1)
            patched.setattr(run, "time_by_part", self._keep)
            run.by_part(subject, both(subject), "cpu")

    def _keep(self, events, spans, clock):
        self.events, self.spans = list(events), list(spans)
        return parts.time_by_part(self.events, self.spans, clock)

    def parts_with(self, operator: str, work: str) -> set[str]:
        """The parts of the patched model to which calls of an operator count."""
        taken = parts.time_by_part(self.events, self.spans, lambda event: 1000 * (event.name == operator))
        (found,) = taken[f"{work}, {run.PATCHED}"]
        return {part for part, time in found.items() if time}


@pytest.fixture(scope="module")
def recorded():
    return Recorded(models.plan("tiny", QUICK).subject(torch.float32, "cpu"))


BEYOND = {parts.RESAMPLER, parts.LANGUAGE}


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("aten::native_layer_norm", {parts.NORM, parts.VISION, parts.RESAMPLER}),
        ("aten::native_layer_norm_backward", {parts.NORM, parts.RESAMPLER}),
        ("aten::mm", {parts.PROJECTIONS, parts.FEED_FORWARD, parts.VISION, *BEYOND}),
        ("aten::unflatten", {parts.PROJECTIONS, parts.VISION, parts.RESAMPLER}),  # of keys and values
        ("aten::clamp_min", {parts.FEED_FORWARD, parts.RESAMPLER}),
        ("aten::tanh", {parts.PROJECTIONS, parts.FEED_FORWARD, parts.GATE}),  # forward with the products
        ("aten::cummax", {parts.ATTENTION}),  # of the mask
        ("flamingo_kernels::masked_cross_attention_fwd", {parts.ATTENTION}),
        ("flamingo_kernels::masked_cross_attention_bwd", {parts.ATTENTION}),
        ("flamingo_kernels::gated_residual_bwd", {parts.GATE}),
        ("flamingo_kernels::perceiver_attention_bwd", {parts.RESAMPLER}),
        ("NllLossBackward0", {parts.LANGUAGE}),
        ("_GatedCrossAttention", {parts.BETWEEN}),  # Python around operators
        ("_GatedFeedForwardBackward", {parts.BETWEEN}),
    ],
)
def test_an_operator_counts_for_the_parts_that_call_it(recorded, operator, expected):
    """Within a fused sublayer, too, which calls no module."""
    assert recorded.parts_with(operator, models.STEP) == expected
    alone = {parts.GATE, parts.BETWEEN} if operator == "aten::tanh" else {parts.BETWEEN}
    called = {parts.ATTENTION}  # a step of decoding on a CPU calls the module
    for work, more in ((models.PREFILL, set()), (models.DECODE, called)):
        assert recorded.parts_with(operator, work) <= expected - alone | more


@pytest.mark.parametrize(
    ("operator", "part"),
    [
        ("flamingo_kernels::gated_residual_bwd", parts.GATE),
        ("flamingo_kernels::masked_cross_attention_bwd", parts.ATTENTION),
    ],
)
def test_an_operator_of_an_unfused_block_counts_for_its_part(subject, monkeypatch, operator, part):
    pair = both(subject)
    for block in pair[run.PATCHED].cross_attn.values():
        leave_unfused(block.attn)
    monkeypatch.setattr(run, "host_time", lambda event: 1000 * (event.name == operator))
    assert list(run.by_part(subject, pair, "cpu")[models.STEP][run.PATCHED]) == [part]


def test_a_gate_of_the_reference_is_found(subject, monkeypatch):
    monkeypatch.setattr(run, "host_time", lambda event: 1000 * (event.name == "TanhBackward0"))
    assert list(run.by_part(subject, both(subject), "cpu")[models.STEP][run.BEFORE]) == [parts.GATE]


def test_the_parts_of_sublayers_without_kernels_are_found(subject):
    """As where nothing is compiled: sublayers, operation by operation."""
    work_of = {
        "aten::native_layer_norm_backward": parts.NORM,
        "aten::softmax": parts.ATTENTION,
        "SoftmaxBackward0": parts.ATTENTION,
        "aten::tanh": parts.GATE,
        "TanhBackward0": parts.GATE,
        "aten::relu": parts.FEED_FORWARD,
    }
    with use_backend("reference"):
        recorded = Recorded(subject)
    for operator, part in work_of.items():
        assert recorded.parts_with(operator, models.STEP) & {*parts.INSIDE} == {part}, operator


def test_all_time_is_some_part_s(subject):
    """Whatever an operator takes, and what lies between operators: nothing is lost or counted twice."""
    pair = both(subject)
    labelled = parts.labels(pair[run.PATCHED], subject.parts)
    step = run.call(models.STEP, subject.works[models.STEP], pair[run.PATCHED])
    with (
        profile(activities=[ProfilerActivity.CPU]) as recorded,
        parts.each_part(labelled, record_function),
        record_function("all"),
    ):
        step()
    (taken,) = parts.time_by_part(recorded.events(), ["all"])["all"]
    (span,) = [event for event in recorded.events() if event.name == "all"]
    assert sum(taken.values()) == pytest.approx(span.cpu_time_total / 1e3, rel=1e-3)
    assert all(taken.values()), taken
    glue = sum(event.self_cpu_time_total for event in recorded.events() if event.is_user_annotation)
    assert taken[parts.BETWEEN] >= glue / 1e3


def test_a_backward_pass_on_a_thread_of_its_own():
    """As on a GPU, whose operators share their numbers with others of that thread."""

    def event(name, start, *, thread, number=-1, forward_thread=0, parent=None):
        return SimpleNamespace(
            name=name,
            time_range=SimpleNamespace(start=start, end=10),
            thread=thread,
            sequence_nr=number,
            fwd_thread=forward_thread,
            cpu_parent=parent,
            device_type=DeviceType.CPU,
            is_user_annotation=name in ("all", *parts.PARTS),
        )

    norm, attention = (event(part, 1, thread=1) for part in (parts.NORM, parts.ATTENTION))
    events = [
        event("all", 0, thread=1),
        *(norm, event("aten::native_layer_norm", 2, thread=1, number=5, parent=norm)),
        *(attention, event("aten::softmax", 3, thread=2, number=5, parent=attention)),
        event(f"{parts._BACKWARD}X", 4, thread=2, number=5, forward_thread=1),
    ]
    (taken,) = parts.time_by_part(events, ["all"], lambda each: 1000 * (each.sequence_nr == 5))["all"]
    assert {part: time for part, time in taken.items() if time} == {parts.NORM: 2, parts.ATTENTION: 1}


def test_spans_are_kept_apart():
    """Each with its own operators, and what comes between two of them with neither."""
    x = torch.ones(3)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for name in ("one", "two", "one"):
            x.erf()
            with record_function(name):
                x.erf()
    taken = parts.time_by_part(
        recorded.events(), ["one", "two"], lambda event: 1000 * (event.name == "aten::erf")
    )
    assert [[each[parts.LANGUAGE] for each in taken[name]] for name in ("one", "two")] == [[1, 1], [1]]


def test_scopes_are_closed_and_calls_restored_when_a_module_fails():
    open_scopes = []

    @contextmanager
    def scope(part):
        open_scopes.append(part)
        try:
            yield
        finally:
            open_scopes.pop()

    class Broken(nn.Module):
        def forward(self):
            assert open_scopes == ["part"]
            raise RuntimeError("broken")

    module = Broken()
    with pytest.raises(RuntimeError, match="broken"), parts.each_part({module: "part"}, scope):
        module()
    assert not open_scopes
    with pytest.raises(AssertionError):
        module()
