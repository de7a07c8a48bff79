import pytest
import torch

from flamingo_kernels.commands.measure import text
from flamingo_kernels.testing import Proof


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.rounded(0.012345), "0.0123"),
        (text.rounded(99.94), "99.9"),
        (text.rounded(1234.5), "1,234"),
        (text.duration(0.5), "0.5 ms"),
        (text.duration(652.4), "652 ms"),
        (text.duration(2000.0), "2 s"),
        (text.mebibytes(2**19), "0.5 MiB"),
        (text.mebibytes(3 * 2**30), "3,072 MiB"),
        (text.gibibytes(5 * 2**29), "2.5 GiB"),
        (text.factor(1.0), "1.00x"),
        (text.factor(9.876), "9.88x"),
        (text.factor(41.04), "41.0x"),
        (text.dtype_name(torch.bfloat16), "bfloat16"),
        (text.verdict(Proof(2e-7, 3e-7)), ("2.0e-07", "3.0e-07", "same")),
        (text.verdict(Proof(4e-7, 3e-7)), ("4.0e-07", "3.0e-07", "DIFFERS")),
        (text.first_line(ValueError("\nexpected 2,\ngot 3")), "ValueError: expected 2,"),
        (text.first_line(RuntimeError()), "RuntimeError"),
    ],
)
def test_short_and_plain(shown, expected):
    assert shown == expected
