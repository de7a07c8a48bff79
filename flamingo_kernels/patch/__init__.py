"""Swap the modules of a model for fast ones, and back.

api       patch and unpatch
recognise decides which modules are swapped
registry  the families, each in a file of its name
known     hashes of the code that is known; source computes them
trial     compares a class of unknown code with a fused one, on samples
swap      changes the class of a module; cache_keyword what it takes
dense     masks of other libraries; dense_attention reads them in compiled models
linears   linear layers of any model
softmax   whether an attention of transformers can be replaced
report    what a patch did
"""

from . import dense_attention as dense_attention  # a graph that was exported needs its operators
from .api import patch, unpatch
from .report import PatchReport

__all__ = ["PatchReport", "patch", "unpatch"]
