"""The symmetric power embedding, its layout and its gradient."""

import itertools
import math

import pytest
import torch

from powertrain.ops.monomials import Monomials, internal_state, public_state
from powertrain.ops.sympow import phi, phi_dimension, phi_weights

SIZES = [(1, 1), (1, 4), (5, 1), (5, 2), (8, 2), (4, 4), (3, 3)]


@pytest.mark.parametrize(("dim", "deg"), SIZES)
def test_phi_is_the_power_of_the_dot_product(dim: int, deg: int) -> None:
    q, k = torch.randn(2, 7, dim, dtype=torch.float64).unbind()
    assert phi(q, deg).shape == (7, phi_dimension(dim, deg)) == (7, math.comb(dim + deg - 1, deg))
    torch.testing.assert_close((phi(q, deg) * phi(k, deg)).sum(-1), (q * k).sum(-1) ** deg, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dim", "deg"), SIZES)
def test_order_and_weights(dim: int, deg: int) -> None:
    x = torch.randn(dim, dtype=torch.float64)
    expected = []
    for indices in itertools.combinations_with_replacement(range(dim), deg):
        orderings = math.factorial(deg) / math.prod(math.factorial(indices.count(i)) for i in set(indices))
        expected.append(math.sqrt(orderings) * math.prod(x[i].item() for i in indices))
    torch.testing.assert_close(phi(x, deg), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("tile_rows", [1, 7, 1000])
@pytest.mark.parametrize(("dim", "deg"), SIZES)
def test_monomials_and_their_gradient(dim: int, deg: int, tile_rows: int) -> None:
    x = torch.randn(2, dim, 3, dtype=torch.float64, requires_grad=True)
    # A state that multiplies phi(x), and the one that multiplies monomials, give one result, and gradients of x.
    state = torch.randn(2, phi_dimension(dim, deg), dtype=torch.float64)
    expected = (phi(x.mT, deg).mT * state[..., None]).sum(1)
    internal = internal_state(state, dim, deg)
    monomials = Monomials.of(x.detach(), deg, tile_elements=tile_rows * 2 * 3)
    actual = torch.zeros_like(expected)
    covered = torch.zeros(phi_dimension(dim, deg), dtype=torch.int64)
    for rows, tile in monomials.tiles():
        actual += (tile * internal[:, rows, None]).sum(1)
        covered[rows] += 1
    assert covered.eq(1).all()
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-11)
    cotangent = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, cotangent)
    actual_grad = monomials.backward(lambda rows, out: torch.mul(internal[:, rows, None], cotangent[:, None], out=out))
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dim", "deg"), SIZES)
def test_public_state_inverts_internal_state(dim: int, deg: int) -> None:
    """The internal state of phi(k) itself is its monomials times the squares of the weights."""
    state = torch.randn(3, phi_dimension(dim, deg), dtype=torch.float64)
    weights = phi_weights(dim, deg, state)
    torch.testing.assert_close(public_state(internal_state(state, dim, deg), dim, deg), state, rtol=1e-15, atol=0)
    assert internal_state(state, dim, deg).sort().values.equal((state * weights).sort().values)


def test_first_use_under_inference_mode_does_not_poison_training() -> None:
    with torch.inference_mode():
        phi(torch.randn(2, 9), 2)
    x = torch.randn(2, 9, requires_grad=True)
    phi(x, 2).sum().backward()
    assert x.grad is not None
