"""Every configuration has its time and what it was compiled to, or the reason why it does not run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from flamingo_kernels._backends import env
from flamingo_kernels._backends.triton import tuning
from flamingo_kernels._backends.triton.config import Config
from flamingo_kernels.commands.bench.shapes import QUICK
from flamingo_kernels.commands.gpu import configs

FEW, MANY = Config(num_warps=1), Config(num_warps=32)


def compiled(registers):
    return SimpleNamespace(n_regs=registers, n_spills=4, metadata=SimpleNamespace(shared=1024))


def test_what_a_configuration_was_compiled_to_and_its_time():
    found = configs._facts((FEW, MANY), lambda config: compiled(10 * config.num_warps), lambda call, _: 2.0)
    facts = {"spills": 4, "shared_bytes": 1024, "median_ms": 2.0, "p20_ms": 2.0, "p80_ms": 2.0}
    assert found == {FEW: facts | {"registers": 10}, MANY: facts | {"registers": 320}}


def test_one_that_does_not_run_says_why_and_stops_no_other():
    def run(config):
        if config is MANY:
            raise RuntimeError("out of resource: shared memory")
        return compiled(40)

    found = configs._facts((MANY, FEW), run, lambda call, _: 2.0)
    assert found[MANY] == {"error": "RuntimeError: out of resource: shared memory"}
    assert found[FEW]["median_ms"] == 2.0


@pytest.mark.skipif(not env.INTERPRET, reason="Triton's interpreter is off")
def test_all_are_compiled_ahead_and_the_choice_is_as_before(monkeypatch):
    (case,) = [case for case in QUICK if case.op == "gated_residual" and case.mode == "forward"]
    before, launched = tuning.choose, []
    launch = configs._launch
    monkeypatch.setattr(
        configs, "_launch", lambda run, config: launched.append(config) or launch(run, config)
    )
    configs.compile_all(case, "cpu")
    rows = configs.time_all(case, "cpu", lambda call, _: 2.0)
    assert len(launched) == 2 * len(rows) > 8
    assert tuning.choose is before
    assert not env.AUTOTUNE
