"""Swap the modules of a model for fast ones, and back.

api       patch and unpatch
swap      changes the class of a module
registry  recognises modules; each family has a file of its name
known     hashes of the code that is known; source computes them
dense     masks of other libraries
softmax   whether an attention of transformers can be replaced
report    what a patch did
"""

from .api import patch, unpatch
from .report import PatchReport

__all__ = ["PatchReport", "patch", "unpatch"]
