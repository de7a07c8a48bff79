import pytest
import torch

from flamingo_kernels.testing import Expected, expect, prove


def proof_after(change):
    """The proof of right results after `change` was made to them."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.rand(50, generator=generator) + 1 for _ in range(2)] + [
        torch.tensor([3.0]),
        torch.tensor([1.1]),
    ]
    run = lambda: [each / 3 for each in numbers]  # noqa: E731
    expected = expect(run, [each.double() / 3 for each in numbers])
    result = run()
    change(result)
    return prove(result, expected)


def test_what_is_only_rounded_is_right():
    proof = proof_after(lambda result: None)
    assert proof.passed
    assert 1e-8 < proof.err < 6e-8
    assert 1e-7 < proof.budget < 6e-7


@pytest.mark.parametrize("tensor", range(4))
@pytest.mark.parametrize("wrong", [1.000001, 0.0, float("nan"), float("inf")])
def test_one_wrong_number_is_found(tensor, wrong):
    def spoil(result):
        result[tensor][result[tensor].abs().argmax()] *= wrong

    assert not proof_after(spoil).passed


def test_a_scalar_that_nearly_cancels_is_judged_by_what_cancels():
    terms = torch.randn(1000, generator=torch.Generator().manual_seed(0)).sub(7e-3)
    exact = [terms.double().sum().reshape(1)]
    expected = expect(lambda: [terms.sum().reshape(1)], exact)
    assert prove([(exact[0] + 2e-6).float()], expected).passed
    assert not prove([(exact[0] + 1e-3).float()], expected).passed


def test_an_exact_zero_has_no_excuse():
    zero, off = torch.zeros(3), torch.tensor([0.0, 1e-30, 0.0])
    expected = expect(lambda: [zero * 3], [zero.double()])
    assert prove([zero], expected).passed
    assert not prove([off], expected).passed


@torch.library.custom_op("tests::in_half", mutates_args=())
def in_half(x: torch.Tensor) -> torch.Tensor:
    """A kernel of a library that keeps less than its dtype holds."""
    return x.clone() if x.dtype == torch.float64 else x.half().to(x.dtype)


def test_what_a_library_loses_counts_as_rounding():
    numbers = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 1
    expected = expect(lambda: [in_half(numbers)], [numbers.double()])
    assert prove([in_half(numbers)], expected).passed
    assert not prove([numbers.bfloat16().float()], expected).passed


def test_other_tensors_than_eagers_are_refused():
    one = torch.ones(3)
    expected = Expected([one.double()], [torch.float32], [0.0])
    with pytest.raises(
        AssertionError, match=r"expected tensors like eager's, \[\(\(3,\), torch.float32\)\], got"
    ):
        prove([one, one], expected)
    with pytest.raises(AssertionError, match=r"got \[\(\(1, 3\)"):
        prove([torch.ones(1, 3)], expected)
    with pytest.raises(AssertionError, match="bfloat16"):
        prove([one.bfloat16()], expected)
