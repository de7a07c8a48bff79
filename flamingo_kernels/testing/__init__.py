"""Inputs for every operator, the eager baseline, and the error budget that a kernel is held to.

cases      calls of every operator
rounding   what rounding does to a computation
budget     the rule, and measurements by it
gates      gates that are open
tiny       small models of other libraries
"""

from .budget import (
    Expected,
    Measurement,
    Proof,
    assert_all_passed,
    assert_within_budget,
    compare,
    evaluate,
    expect,
    measure,
    measure_call,
    prove,
    severity,
    ulp,
)
from .cases import (
    CASES,
    DTYPES,
    Case,
    GatedBlockDecodeCase,
    GatedResidualCase,
    Int8LinearCase,
    Layout,
    LinearCase,
    MaskedCrossAttentionCase,
    Outputs,
    PerceiverAttentionCase,
    Spec,
    Tensors,
    lay_out,
)
from .gates import open_gates
from .rounding import RandomRounding, rounding_errors

__all__ = [
    "CASES",
    "DTYPES",
    "Case",
    "Expected",
    "GatedBlockDecodeCase",
    "GatedResidualCase",
    "Int8LinearCase",
    "Layout",
    "LinearCase",
    "MaskedCrossAttentionCase",
    "Measurement",
    "Outputs",
    "PerceiverAttentionCase",
    "Proof",
    "RandomRounding",
    "Spec",
    "Tensors",
    "assert_all_passed",
    "assert_within_budget",
    "compare",
    "evaluate",
    "expect",
    "lay_out",
    "measure",
    "measure_call",
    "open_gates",
    "prove",
    "rounding_errors",
    "severity",
    "ulp",
]
