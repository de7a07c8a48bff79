"""Which backend runs: the argument's, the context's, the environment's, or the first that can."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from flamingo_kernels import (
    MediaMask,
    UnsupportedError,
    available_backends,
    gated_residual,
    masked_cross_attention,
    use_backend,
)
from flamingo_kernels._backends import cpu, cuda, dispatch, env, triton

OPERATORS = (
    "masked_cross_attention",
    "perceiver_attention",
    "gated_residual",
    "gated_block_decode",
    "linear",
)
LIBRARIES = {"linear": ["mkl", "onednn"]}  # backends of one operator alone


def tensors(**options):
    return torch.ones(2, 4, **options), torch.ones(2, 4, **options), torch.ones(1, **options)


@pytest.fixture
def calls(monkeypatch):
    """The backends that ran, in order."""
    ran = []
    resolve = dispatch.resolve

    def record(*args):
        ran.append(resolve(*args))
        return ran[-1]

    monkeypatch.setattr(dispatch, "resolve", record)
    return ran


def test_all_operators_are_registered():
    assert tuple(sorted(dispatch.operators())) == tuple(sorted(OPERATORS))


@pytest.mark.parametrize("operator", OPERATORS)
def test_available_backends_are_true_or_a_reason(operator):
    found = available_backends(operator)
    assert list(found) == ["cuda", "triton", "cpu", "reference", *LIBRARIES.get(operator, [])]
    assert found["reference"] is True
    for backend, available in found.items():
        assert available is True or len(available) > 20, backend


def test_available_backends_of_an_unknown_operator():
    with pytest.raises(ValueError, match=r"operator='attention' is not one of .*masked_cross_attention"):
        available_backends("attention")


def test_auto_takes_the_first_that_can(calls, compiled):
    gated_residual(*tensors())
    gated_residual(*tensors(dtype=torch.float64))
    assert calls == [compiled, "reference"]


def test_an_explicit_backend_never_falls_back(calls):
    with pytest.raises(UnsupportedError, match=r'^gated_residual: backend="cuda" was requested but '):
        gated_residual(*tensors(device="meta"), backend="cuda")
    with pytest.raises(
        UnsupportedError, match=r'^gated_residual: backend="cpu" was requested but .*'
    ) as caught:
        gated_residual(*tensors(device="meta"), backend="cpu")
    assert "a tensor is on meta, not on cpu" in caught.value.reasons["cpu"] or "not built" in str(
        caught.value
    )
    assert isinstance(caught.value, NotImplementedError)
    assert calls == []


def test_no_backend_at_all_lists_every_reason(monkeypatch):
    reasons = {"cpu": lambda *t: ["too wide", "too long"], "reference": lambda *t: ["out of order"]}
    monkeypatch.setitem(dispatch._OPERATORS, "gated_residual", reasons)
    with pytest.raises(UnsupportedError) as caught:
        gated_residual(*tensors())
    assert str(caught.value) == (
        "gated_residual: no backend supports these inputs:\n"
        "  cpu: too wide; too long\n"
        "  reference: out of order"
    )
    assert caught.value.reasons == {"cpu": ["too wide", "too long"], "reference": ["out of order"]}


def test_use_backend_nests_and_restores(calls, compiled):
    with use_backend("reference"):
        gated_residual(*tensors())
        with use_backend("auto"):
            gated_residual(*tensors())
        gated_residual(*tensors())
        gated_residual(*tensors(), backend=compiled)  # the argument comes first
    gated_residual(*tensors())
    assert calls == ["reference", compiled, "reference", compiled, compiled]


def test_use_backend_restores_after_an_error(calls):
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    with pytest.raises(UnsupportedError), use_backend("cuda"):
        gated_residual(*tensors(device="meta"))
    assert dispatch.default_backend == "auto"


def test_what_runs_a_call_that_leaves_the_choice_open(compiled):
    def chosen(backend, **options):
        return dispatch.choice("gated_residual", *tensors(**options)) == backend

    assert chosen(compiled)
    assert not chosen("reference")
    assert chosen("reference", dtype=torch.float64)
    with use_backend("reference"):
        assert chosen("reference")
        assert not chosen(compiled)
    with use_backend(compiled):
        assert not chosen(compiled, dtype=torch.float64)  # such a call ends with an error


def test_use_backend_knows_the_names():
    with (
        pytest.raises(
            ValueError, match=r"use_backend: 'gpu' is not one of auto, cuda, triton, cpu, reference"
        ),
        use_backend("gpu"),
    ):
        pytest.fail("the block ran")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FLAMINGO_KERNELS_")}
    extension = {key: os.environ[key] for key in ("FLAMINGO_KERNELS_EXTENSION",) if key in os.environ}
    code = "import torch; import flamingo_kernels as fk; x = torch.ones(2, 4); g = torch.ones(1)\n" + code
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | extension | environment, text=True, capture_output=True
    )


def test_the_environment_chooses():
    done = python(
        "from flamingo_kernels._backends import dispatch\n"
        "print(dispatch.resolve('gated_residual', 'auto', x, x, g))\n"
        "with fk.use_backend('auto'):\n"
        "    print(dispatch.resolve('gated_residual', 'reference', x, x, g))",
        FLAMINGO_KERNELS_BACKEND="reference",
    )
    assert done.stdout.split() == ["reference", "reference"], done.stderr


def test_the_environment_never_falls_back():
    done = python("fk.gated_residual(x, x, g)", FLAMINGO_KERNELS_BACKEND="cuda")
    assert 'UnsupportedError: gated_residual: backend="cuda" was requested but' in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_says_why_not_and_how():
    done = python("fk.gated_residual(x, x, g, backend='triton')", TRITON_INTERPRET="0")
    assert 'backend="triton" was requested but there is no GPU' in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_triton_refuses_what_is_on_another_device(monkeypatch):
    """With a GPU and without the interpreter a tensor on the CPU is refused, with both ways out."""
    monkeypatch.setattr(env, "INTERPRET", False)
    monkeypatch.setattr(triton, "why_not", lambda: "")
    with pytest.raises(UnsupportedError, match=r"a tensor is on cpu; .* GPU, .* TRITON_INTERPRET=1"):
        gated_residual(*tensors(), backend="triton")
    with pytest.raises(UnsupportedError, match="a tensor is on meta"):
        gated_residual(*tensors(device="meta"), backend="triton")


def test_triton_names_the_size_that_is_too_large(monkeypatch):
    monkeypatch.setattr(triton, "why_not", lambda: "")
    q, k = torch.ones(1, 2, 1, 300), torch.ones(1, 1, 4, 1, 300)
    mask = MediaMask.from_text_time(torch.ones(1, 2, dtype=torch.int64), 1)
    with pytest.raises(UnsupportedError, match="head_dim=300 is above 256"):
        masked_cross_attention(q, k, k, mask, backend="triton")


def numbers(*shape: int) -> torch.Tensor:
    """One number, seen as many."""
    return torch.ones(()).expand(shape)


def sized(operator: str, **sizes: int) -> tuple[torch.Tensor, ...]:
    """Tensors of an operator, of these sizes and otherwise of 1."""
    head_dim, width = (sizes.get(name, 1) for name in ("head_dim", "D"))
    if operator == "masked_cross_attention":
        return numbers(1, 1, 1, head_dim), *[numbers(1, 1, 1, 1, head_dim)] * 2
    if operator == "perceiver_attention":
        return (numbers(1, 1, 1, head_dim),) * 5
    if operator == "gated_block_decode":
        return numbers(1, 1), *[numbers(1, 1, 1, 1, head_dim)] * 2, numbers(1)
    return numbers(1, width), numbers(1, width), numbers(1), numbers(width)


@pytest.fixture
def everywhere(monkeypatch):
    """Every backend could run here."""
    for backend in (triton, cuda, cpu):
        monkeypatch.setattr(backend, "why_not", lambda: "")
        monkeypatch.setattr(backend, "misplaced", lambda tensor: "")
    monkeypatch.setattr(dispatch, "_is_stand_in", lambda backend: False)


LIMITS = [
    (operator, backend, name, most)
    for operator in OPERATORS
    for backend, largest in dispatch.limits(operator).items()
    for name, most in largest.items()
]


@pytest.mark.parametrize(("operator", "backend", "name", "most"), LIMITS)
def test_the_largest_size_is_taken_and_the_next_is_named(operator, backend, name, most, everywhere):
    assert dispatch.resolve(operator, backend, *sized(operator, **{name: most})) == backend
    with pytest.raises(UnsupportedError) as caught:
        dispatch.resolve(operator, backend, *sized(operator, **{name: most + 1}))
    assert caught.value.reasons == {backend: [f"{name}={most + 1} is above {most}"]}


def test_every_size_that_is_too_large_is_named(everywhere, monkeypatch):
    monkeypatch.setattr(dispatch, "_OPERATORS", dict(dispatch._OPERATORS))
    for table in ("_LIMITS", "_LIBRARIES"):
        monkeypatch.setattr(dispatch, table, dict(getattr(dispatch, table)))
    sizes = {"R": 300, "head_dim": 301}
    dispatch.register("made up", sizes=lambda *_: sizes, cpu={"R": 256, "head_dim": 256})
    with pytest.raises(UnsupportedError, match=r"R=300 is above 256; head_dim=301 is above 256\.$"):
        dispatch.resolve("made up", "cpu", numbers(1))


@pytest.mark.parametrize(
    ("operator", "order"),
    [
        ("masked_cross_attention", ["triton", "cuda", "cpu", "reference"]),
        ("perceiver_attention", ["triton", "cuda", "cpu", "reference"]),
        ("gated_residual", ["cuda", "triton", "cpu", "reference"]),
        ("gated_block_decode", ["triton", "cuda", "cpu", "reference"]),
        ("linear", ["triton", "cuda", "cpu", "reference"]),
    ],
)
def test_auto_asks_the_fastest_first(operator, order, everywhere, monkeypatch):
    for backend in order:
        assert dispatch.resolve(operator, "auto", *sized(operator)) == backend
        monkeypatch.setitem(dispatch._OPERATORS[operator], backend, lambda *tensors: ["taken"])


def test_an_interpreter_runs_only_by_name(calls, monkeypatch):
    monkeypatch.setattr(env, "INTERPRET", True)
    gated_residual(*tensors())
    assert calls[0] in ("cpu", "reference")
    with use_backend("triton"):
        gated_residual(*tensors())
    assert calls[1] == "triton"


def test_why_triton_cannot_run(monkeypatch):
    why_not = triton._why_not.__wrapped__
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert "triton is not installed" in why_not()
    monkeypatch.setattr(triton, "_installed", lambda: True)
    monkeypatch.setattr(triton.metadata, "version", lambda _: "3.5.1")
    assert why_not() == "triton 3.5.1 is older than 3.6"
    monkeypatch.setattr(triton.metadata, "version", lambda _: "3.10.0")
    monkeypatch.setattr(env, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capabilities, reason in ((((9, 0), (7, 5)), "capability 7.5, below 8.0"), (((9, 0), (8, 0)), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        assert why_not().endswith(reason)
        assert bool(why_not()) is bool(reason)


def test_why_cuda_kernels_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda._no_gpu() == "there is no GPU that torch can use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for capabilities, reason in ((((9, 0), (7, 5)), "capability 7.5, below 8.0"), (((9, 0), (8, 0)), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        assert cuda._no_gpu().endswith(reason)
        assert bool(cuda._no_gpu()) is bool(reason)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert cuda._no_gpu() == "this torch is for AMD GPUs"


@pytest.mark.parametrize(
    ("variable", "legal"),
    [
        ("FLAMINGO_KERNELS_BACKEND", "auto, cuda, triton, cpu, reference"),
        ("FLAMINGO_KERNELS_CPU_VARIANT", "auto, portable, avx2, avx2_vnni, avx512, avx512_bf16, avx512_amx"),
    ],
)
def test_a_misspelt_environment_lists_the_legal_values(variable, legal):
    done = python("", **{variable: "trition"})
    assert f"ValueError: {variable}='trition' is not one of {legal}." in done.stderr


def test_the_widest_variant_runs_unless_another_is_chosen(compiled):
    variants = cpu.cpu_variants()
    assert variants[0] == "portable"
    code = "from flamingo_kernels._backends import cpu; print(cpu.cpu_variant())"
    assert python(code).stdout.strip() == variants[-1]
    assert python(code, FLAMINGO_KERNELS_CPU_VARIANT="portable").stdout.strip() == "portable"


def test_a_variant_this_processor_lacks_is_refused_with_the_usable_ones(compiled):
    lacking = [name for name in env.CPU_VARIANTS if name not in cpu.cpu_variants()]
    if not lacking:
        pytest.skip("this processor has every variant")
    done = python(
        "print(fk.available_backends('gated_residual')['cpu'])", FLAMINGO_KERNELS_CPU_VARIANT=lacking[0]
    )
    assert f"FLAMINGO_KERNELS_CPU_VARIANT={lacking[0]} is not built or this processor lacks it" in done.stdout
    assert ",".join(cpu.cpu_variants()) in done.stdout
