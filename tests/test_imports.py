"""`import flamingo_kernels` needs torch alone, in a fresh process without anything else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from flamingo_kernels._constant import constant
from tests.helpers import ROOT

OPTIONAL = (
    "triton",
    "einops",
    "flamingo",
    "matplotlib",
    "skimage",
    "PIL",
    "open_flamingo",
    "flamingo_pytorch",
    "transformers",
)

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""

USE = """
import torch
import flamingo_kernels as fk
mask = fk.MediaMask.last_preceding(torch.tensor([[0, 1, 0]]), 1)
q, k = torch.randn(1, 3, 2, 4, requires_grad=True), torch.randn(1, 1, 5, 2, 4)
fk.masked_cross_attention(q, k, k, mask).sum().backward()
fk.perceiver_attention(q, k[0], k[0], k[0], k[0]).sum()
fk.gated_residual(torch.ones(2, 4), torch.ones(2, 4), torch.ones(1))
print(fk.available_backends("gated_residual")["cpu"])
print(sorted({module.split(".")[0] for module in sys.modules}))
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, text=True, capture_output=True
    )


def test_torch_is_enough():
    done = python(BLOCK.format(blocked=OPTIONAL) + USE)
    assert done.returncode == 0, done.stderr


def test_flamingo_needs_no_library_of_models():
    models = ("transformers", "timm", "torchvision", "PIL", "flamingo_kernels")
    blocked = (*models, "av", "sklearn", "scipy", "safetensors", "tensorboard", "tqdm")
    modules = "flamingo, flamingo.contrastive, flamingo.vision, flamingo.fewshot, flamingo.__main__"
    modules += ", flamingo.training.command"
    done = python(BLOCK.format(blocked=blocked) + f"import {modules}")
    assert done.returncode == 0, done.stderr


def test_torchs_compiler_is_not_imported():
    """It takes as long as torch, and sympy comes with it."""
    done = python(
        "import flamingo_kernels, flamingo, sys\nprint({'torch._dynamo', 'sympy'} & {*sys.modules})"
    )
    assert done.stdout == "set()\n", done.stderr


def test_a_constant_function_is_one_to_torchs_compiler():
    def ours():
        return 1

    def theirs():
        return 1

    assert vars(constant(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_the_block_blocks():
    done = python(BLOCK.format(blocked=OPTIONAL) + "import flamingo_kernels.testing")
    assert "ImportError: flamingo is blocked" in done.stderr


def test_nothing_more_than_torch_is_imported():
    done = python("import sys\n" + USE)
    modules = done.stdout.splitlines()[-1]
    assert "'torch'" in modules
    assert not [name for name in ("einops", "flamingo", "matplotlib", "PIL") if f"'{name}'" in modules], (
        done.stderr
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "the C++ extension is not built; install a C++ compiler"), ("not a library", "does not load: ")],
    ids=["absent", "broken"],
)
def test_without_the_extension_the_reference_runs(content, reason, tmp_path):
    path = tmp_path / "_C.abi3.so"
    if content:
        path.write_text(content)
    done = python("import sys\n" + USE, FLAMINGO_KERNELS_EXTENSION=str(path))
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout.splitlines()[0]
    ask = "\nfk.gated_residual(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), backend='cpu')"
    done = python("import sys\n" + USE + ask, FLAMINGO_KERNELS_EXTENSION=str(path))
    assert 'UnsupportedError: gated_residual: backend="cpu" was requested but' in done.stderr
    assert reason in done.stderr


def test_a_build_that_failed_is_the_reason(tmp_path):
    path = tmp_path / "_C.abi3.so"
    (tmp_path / "_C.abi3.so.failed").write_text(
        "flamingo_kernels: a.cpp does not compile: error: no such type\n"
    )
    done = python("import sys\n" + USE, FLAMINGO_KERNELS_EXTENSION=str(path))
    assert "flamingo_kernels: a.cpp does not compile: error: no such type" in done.stdout.splitlines()[0]


def test_an_import_prints_nothing():
    done = python("import flamingo_kernels")
    assert (done.stdout, done.stderr) == ("", "")
