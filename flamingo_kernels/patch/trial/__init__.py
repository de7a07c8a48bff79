"""Tries on a small instance whether a class computes what the fused class does.

The source of a class is a proof, a trial is none: it is for source that is not known, and compares what is
likely to differ. It takes a new instance of the class, never the user's module, and gives it random weights,
also for gates and output projections. Results, gradients of inputs and weights, random numbers drawn and
attributes written must agree, in training and in evaluation, in every dtype and under autocast. Attributes of
the module that its forward reads must be those that the fused class reads, or flags that were turned.

trial    compares a class with the fused one in every way
rounds   those ways
small    the small instance that is tried
call     one call of both, and what differs
apart    keeps the trial from the rest of the program
"""

from .rounds import Disagreement
from .small import values_of
from .trial import compare, why_other_arguments

__all__ = ["Disagreement", "compare", "values_of", "why_other_arguments"]
