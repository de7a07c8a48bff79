"""Swap the modules of a model for fast ones, and back.

swap      changes the class of a module
registry  recognises modules; one file for each family it knows
report    what a patch did
"""

from .api import patch, unpatch
from .report import PatchReport

__all__ = ["PatchReport", "patch", "unpatch"]
