"""What every test gets: memory that starts as NaN, a seed, and each backend in turn."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Callable

from tests.helpers import ROOT

# Inductor keeps graphs on disk and knows an operator by its name alone, not by what it returns.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    # The Triton kernels run on the processor, in their interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    emulated = ROOT / "build" / "emulated-cuda" / "flamingo_kernels" / "_C_cuda.abi3.so"
    if emulated.exists():  # so do the CUDA kernels, as `make emulated` has compiled them for it
        os.environ.setdefault("FLAMINGO_KERNELS_CUDA_EXTENSION", str(emulated))

from torch._dynamo import trace_rules

from flamingo_kernels import available_backends
from flamingo_kernels._backends import cpu, cuda

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Torch learns on first use which functions obey `torch.device("meta")`, and which of them compile knows.
# Let that be here, before the fixture below replaces torch.empty: the largest presets would be allocated for
# real, and a compiled function could not call what the fixture wraps.
with torch.device("meta"):
    torch.empty(0)
trace_rules.get_torch_obj_rule_map()

# The shapes are small: threads would only wait for each other. test_threads_change_nothing sets its own.
torch.set_num_threads(1)

# Triton's interpreter prepares its language anew for every call of a device function, half of all its work.
# Once for each module is enough: the kernel that calls has done so for its own.
with contextlib.suppress(ImportError):
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call_device_function(self, *args, **kwargs):
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_device_function


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A seed that is known beforehand, where none is given, for what Hypothesis draws afresh."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(secrets.randbits(32))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the slow tests what goes the way of another case, where that is slow or often repeated.

    That is float16, which goes where bfloat16 goes, and infinity, which goes where NaN goes, in Triton's
    interpreter and with instruction sets other than the one that the library chooses. The interpreter also
    leaves them every second case in bfloat16, by its name.
    """
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        backend = str(given.get("backend", given.get("kernels")))
        repeats = given.get("dtype") == torch.float16 or given.get("value") == math.inf
        second = given.get("dtype") == torch.bfloat16 and zlib.crc32(item.name.encode()) % 2
        if (backend.startswith(("triton", "cpu, ")) and repeats) or (backend == "triton" and second):
            item.add_marker(pytest.mark.slow)


def pytest_report_header(config: pytest.Config) -> str:
    return f"fresh draws of slow tests: --hypothesis-seed={config.option.hypothesis_seed}"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that runs here."""
    return _running(request.param)


@pytest.fixture(params=BACKENDS[1:])
def kernels(request: pytest.FixtureRequest) -> str:
    """The name of a backend with kernels of its own."""
    return _running(request.param)


@pytest.fixture
def compiled() -> str:
    """The name of the backend in C++."""
    return _running("cpu")


@pytest.fixture
def select_variant():
    """Chooses among the instruction sets of this processor, until the test ends."""
    before = cpu.cpu_variant()
    yield cpu.select
    cpu.select(before)


@pytest.fixture(name="cuda")
def cuda_kernels() -> str:
    """The name of the backend in CUDA."""
    return _running("cuda")


@pytest.fixture
def running() -> Callable[[str], str]:
    """Gives the name of a backend back if it runs here; for other lists of backends than above."""
    return _running


def _running(backend: str) -> str:
    available = available_backends("masked_cross_attention")[backend]
    if available is not True:
        if os.environ.get("CI") == "true" and _expected(backend):
            pytest.fail(f"{backend} should run here, but {available}")
        pytest.skip(f"{backend}: {available}")
    return backend


def _expected(backend: str) -> bool:
    """Whether nothing but a fault of ours could keep a backend from running."""
    return backend == "triton" or any(map(shutil.which, ("c++", "g++", "clang++")))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch):
    """Fill fresh memory with NaN, so that a kernel which leaves a part unwritten is found out."""
    # The compiler lists torch's functions anew after a process group has begun: if it did so while they
    # were patched, the list lacks the real ones.
    if torch.empty not in trace_rules.get_torch_obj_rule_map():
        trace_rules.clear_lru_cache()
        trace_rules.get_torch_obj_rule_map()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    for library in (cpu, cuda):
        library.poison(True)
    yield
    for library in (cpu, cuda):
        library.poison(False)


def _poisoned(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point:
            tensor.detach().fill_(torch.nan)
        return tensor

    return wrapper


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
