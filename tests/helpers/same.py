"""Results that have to be the same, not only close."""

from typing import Any

import torch


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the last bit, NaN included: tensors, or sequences and mappings of them."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
