"""The examples in the documentation of both packages run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import flamingo
import flamingo_kernels

# Everything one imports at the top of a file of one's own.
NAMES = {
    "torch": torch,
    **{name: getattr(package, name) for package in (flamingo, flamingo_kernels) for name in package.__all__},
}


def examples() -> list[doctest.DocTest]:
    modules = [
        importlib.import_module(found.name)
        for package in (flamingo, flamingo_kernels)
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not found.name.endswith(("._C", "._C_cuda", ".__main__"))
    ]
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [
        test
        for module in (flamingo, flamingo_kernels, *modules)
        for test in finder.find(module, extraglobs={**NAMES, **vars(module)})
    ]
    return [test for test in found if test.examples]


EXAMPLES = examples()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example, capsys):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failed, attempted = runner.run(example)
    assert attempted
    assert not failed, capsys.readouterr().out


def test_every_operator_has_one():
    named = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert named >= {
        "masked_cross_attention",
        "perceiver_attention",
        "gated_residual",
        "gated_block_decode",
        "MediaMask",
        "available_backends",
        "use_backend",
    }
