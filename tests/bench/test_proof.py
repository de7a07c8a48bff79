import pytest
import torch

from flamingo_kernels.bench.proof import prove


def proof_after(change):
    """The proof of eager's result after `change` was made to a copy of it."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(50, generator=generator).double() for _ in range(2)]
    exact += [torch.tensor([value]).double() for value in (3.0, 1.0)]
    eager = [tensor.float() * (1 + 1e-6) for tensor in exact]
    result = [tensor.clone() for tensor in eager]
    change(result)
    return prove(result, eager, exact)


def test_eager_itself_is_right():
    proof = proof_after(lambda result: None)
    assert proof.passed
    assert proof.err == pytest.approx(1e-6, rel=0.2)
    assert proof.budget == pytest.approx(2.24e-6, rel=0.2)


@pytest.mark.parametrize("tensor", range(4))
@pytest.mark.parametrize("wrong", [1.00001, 0.0, float("nan"), float("inf")])
def test_one_wrong_number_is_found(tensor, wrong):
    def spoil(result):
        result[tensor][result[tensor].abs().argmax()] *= wrong

    assert not proof_after(spoil).passed


def test_a_scalar_that_nearly_cancels_is_judged_beside_the_others():
    exact = [torch.tensor([1.0]).double(), torch.tensor([1e-6]).double()]
    eager = [tensor.float() for tensor in exact]
    assert prove([eager[0], eager[1] * 1.1], eager, exact).passed
    assert not prove([eager[0], eager[1] * 2], eager, exact).passed


def test_an_exact_zero_has_no_excuse():
    zero, off = torch.zeros(3), torch.tensor([0.0, 1e-30, 0.0])
    assert prove([zero], [zero], [zero.double()]).passed
    assert not prove([off], [zero], [zero.double()]).passed


def test_other_tensors_than_eagers_are_refused():
    one, exact = torch.ones(3), torch.ones(3).double()
    with pytest.raises(
        AssertionError, match=r"expected tensors like eager's, \[\(\(3,\), torch.float32\)\], got"
    ):
        prove([one, one], [one], [exact])
    with pytest.raises(AssertionError, match=r"got \[\(\(1, 3\)"):
        prove([torch.ones(1, 3)], [one], [exact])
    with pytest.raises(AssertionError, match="bfloat16"):
        prove([one.bfloat16()], [one], [exact])
