"""What the Triton kernels of all operators share.

This file says whether Triton can run here and needs torch alone; the others import Triton.

language    device functions: dots, tanh
tiles       device functions: rows of a head, loaded and stored
softmax     device functions: scores, their weights, and what is kept of them
checks      what the host functions ask of tensors
config      how a kernel is cut into programs, and what a device offers
launch      starts a kernel on the device of its tensors
tuning      measures configurations, when asked to
reduction   adds partial results in order
"""

from __future__ import annotations

from functools import cache
from importlib import metadata, util

import torch
from torch import Tensor

from ..._constant import constant
from .. import env

OLDEST = (3, 6)  # the Triton of torch 2.10
OLDEST_CAPABILITY = (8, 0)


def misplaced(tensor: Tensor) -> str:
    """Why a tensor is not where Triton computes, or an empty string."""
    if tensor.is_cuda or (tensor.is_cpu and env.INTERPRET):
        return ""
    return (
        f"a tensor is on {tensor.device}; Triton computes on a GPU, "
        "and on a cpu only in its interpreter: TRITON_INTERPRET=1"
    )


@constant
def why_not() -> str:
    """Why no Triton kernel can run in this process, or an empty string."""
    return _why_not()


@cache  # torch.compile would look into it, and warn that it does
def _why_not() -> str:
    if not _installed():
        return "triton is not installed; a torch for GPUs brings it, or: pip install triton"
    version = metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST))}"
    if env.INTERPRET:
        return ""
    if not torch.cuda.is_available():
        return (
            "there is no GPU that torch can use; without one the kernels run in Triton's interpreter: "
            "TRITON_INTERPRET=1"
        )
    found = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if torch.version.cuda and found < OLDEST_CAPABILITY:
        return "a GPU has compute capability {}.{}, below {}.{}".format(*found, *OLDEST_CAPABILITY)
    return ""


def _installed() -> bool:
    try:
        return util.find_spec("triton") is not None
    except ImportError:  # something that stands before it on the way in
        return False
