"""Compiles the Triton kernels for an absent GPU: `python -m tests.helpers.triton.compile TARGET [GROUP ...]`.

The operators' own host code runs on tensors without data, with every launch turned into a compilation, once
for each configuration it may choose: what is compiled is what a GPU would run. Prints one JSON object a
binary. Runs in a process of its own, as Triton either compiles kernels or interprets them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from flamingo_kernels._backends import dispatch, env, library
from flamingo_kernels._backends.triton import launch, tuning
from flamingo_kernels.testing import Case, cases
from tests.helpers.triton.binary import read
from tests.helpers.triton.cases import CASES, TARGETS, Target, modules_that_ask


class NoDriver:
    """Stands where Triton looks for a GPU, and says what to compile for."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget(target.backend, target.architecture, target.warp_size)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def prepare(target: Target) -> list[tuple[str, dict[str, Any], Any]]:
    """Turn launches into compilations for a target; they go to the list that is returned."""
    driver.set_active(NoDriver(target))
    binaries: list[tuple[str, dict[str, Any], Any]] = []

    def start(kernel, count, arguments, keywords):
        binary = kernel.warmup(*arguments, **keywords, grid=(count,))
        binaries.append((kernel.__name__, keywords, binary))

    def choose(kernel, choice, run, device):
        for candidate in choice.candidates[1:]:
            run(candidate)
        return choice.default

    launch.start, tuning.choose, env.AUTOTUNE = start, choose, True
    dispatch.resolve = lambda *_: "triton"
    cases.quantize_weight = lambda weight: (weight.to(torch.int8), weight.new_empty(len(weight)).float())
    for operator in filter(has_triton, dispatch.operators()):
        folder = f"flamingo_kernels.ops.{operator}"
        schema = import_module(f"{folder}.schema")
        for way in ways(operator):
            calls = getattr(schema, way.upper())
            calls["triton"] = getattr(import_module(f"{folder}.triton_{way}"), f"{operator}_{way}")
    for module in modules_that_ask():
        module.device_of = lambda device: target.device
    return binaries


def has_triton(operator: str) -> bool:
    return "triton" in dispatch.limits(operator)


def ways(operator: str) -> list[str]:
    """Forward, and backward unless the kernels are for inference alone."""
    return [way for way in ("fwd", "bwd") if f"{operator}_{way}" in library.operations()]


def run(case: Case) -> None:
    """Every way on tensors without data."""
    backward = "bwd" in ways(case.operator)
    leaves = {name: tensor.to("meta").requires_grad_(backward) for name, tensor in case.tensors().items()}
    options = {
        name: value.to("meta") if hasattr(value, "to") else value for name, value in case.options().items()
    }
    outputs = case.call(leaves, options, "triton")
    if backward:
        torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(out) for out in outputs])


def main(target: str, *groups: str) -> Iterator[dict[str, Any]]:
    """The facts of every binary of the cases in these groups, or in all."""
    binaries = prepare(TARGETS[target])
    for group in groups or CASES:
        for case in CASES[group]:
            run(case)
            for kernel, keywords, binary in binaries:
                constants = {name: value for name, value in keywords.items() if name != "enable_fp_fusion"}
                name = f"{case.operator}: {case}"
                yield {
                    "case": name,
                    "kernel": kernel,
                    "constants": constants,
                    **read(binary, TARGETS[target]),
                }
            binaries.clear()


if __name__ == "__main__":
    for facts in main(*sys.argv[1:]):
        print(json.dumps(facts), flush=True)
