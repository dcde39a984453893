"""The symmetric power embedding phi, with phi(q) . phi(k) = (q . k)^deg, and its monomials in a layout that is fast to
form.

For x of size K the embedding holds one entry for each multiset of `deg` indices, in lexicographic order of the sorted
indices:

    phi(x)[i1 <= ... <= ip] = sqrt(p! / prod(multiplicities!)) * x[i1] * ... * x[ip]    F = binom(K + p - 1, p)

In that order the degree-p monomials whose first index is i are x[i] times a contiguous *suffix* of the degree-(p-1)
monomials: those whose first index is at least i. Forming them is therefore K products of contiguous arrays, and the
gradient is the same walk backwards. Tokens lie along the last axis, so that every product is one long vector operation.
"""

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def phi_dimension(dim: int, deg: int) -> int:
    """Return F = binom(dim + deg - 1, deg), the size of the symmetric power `deg` of a `dim`-dimensional vector."""
    # Plain integer arithmetic: with dynamic shapes torch.compile traces this with symbolic sizes.
    product = 1
    for i in range(deg):
        product = product * (dim + i) // (i + 1)
    return product


@functools.cache
def _blocks(dim: int, deg: int) -> list[tuple[int, slice, slice]]:
    """List (i, rows of degree `deg` that start with i, rows of degree `deg - 1` that start with i or more)."""
    total, lower_total = phi_dimension(dim, deg), phi_dimension(dim, deg - 1)
    blocks = []
    for i in range(dim):
        rows = slice(total - phi_dimension(dim - i, deg), total - phi_dimension(dim - i - 1, deg))
        blocks.append((i, rows, slice(lower_total - phi_dimension(dim - i, deg - 1), lower_total)))
    return blocks


# The caches hold NumPy arrays: a tensor would remember the mode (inference, fake, device) under which it happened to be
# made first.
@functools.cache
def _sorted_indices(dim: int, deg: int) -> np.ndarray:
    """Return the `(deg, F)` index multisets i1 <= ... <= ip in phi's order."""
    indices = np.arange(dim)[None]
    for degree in range(2, deg + 1):
        parts = []
        for i, _, suffix in _blocks(dim, degree):
            lower = indices[:, suffix]
            parts.append(np.concatenate([np.full_like(lower[:1], i), lower]))
        indices = np.concatenate(parts, axis=1)
    return indices


@functools.cache
def _root_multinomials(dim: int, deg: int) -> np.ndarray:
    """Return the `(F,)` square roots of p! / prod(multiplicities!), the number of orderings of each multiset."""
    indices = _sorted_indices(dim, deg)
    run = np.ones(indices.shape[1])
    coefficients = np.full(indices.shape[1], float(math.factorial(deg)))
    for previous, current in itertools.pairwise(indices):
        run = np.where(previous == current, run + 1, 1.0)
        coefficients /= run
    return np.sqrt(coefficients)


def phi_weights(dim: int, deg: int, like: Tensor) -> Tensor:
    """Return the `(F,)` weights of phi = weights * monomials, in the dtype and on the device of `like`."""
    return torch.tensor(_root_multinomials(dim, deg), dtype=like.dtype, device=like.device)


def phi(x: Tensor, deg: int) -> Tensor:
    """Map `x (..., K)` to its symmetric power embedding `(..., F)`, so that phi(q) . phi(k) = (q . k)^deg;
    differentiable, in x's dtype.
    """
    indices = torch.tensor(_sorted_indices(x.shape[-1], deg), device=x.device)
    return functools.reduce(torch.mul, [x[..., row] for row in indices]) * phi_weights(x.shape[-1], deg, x)


def monomials(x: Tensor, deg: int) -> Tensor:
    """Return the degree-`deg` monomials `(M, F, C)` of `x (M, K, C)` in phi's order, without multinomial weights."""
    return _monomials_by_degree(x, deg)[-1]


def _monomials_by_degree(x: Tensor, deg: int) -> list[Tensor]:
    M, K, C = x.shape
    by_degree = [x]
    for degree in range(2, deg + 1):
        out = x.new_empty(M, phi_dimension(K, degree), C)
        for rows, x_i, lower in _row_views(x, out, by_degree[-1], degree):
            torch.mul(lower, x_i, out=rows)
        by_degree.append(out)
    return by_degree


def _row_views(x: Tensor, monomials: Tensor, lower: Tensor, deg: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield, for each first index i, the rows of `monomials`, x[i] and the suffix of `lower`: `(M, rows or 1, C)`."""
    blocks = _blocks(x.shape[1], deg)
    # `split` makes all views in one call: with short chunks, slicing would cost as much as the products.
    all_rows = monomials.split([rows.stop - rows.start for _, rows, _ in blocks], dim=1)
    for (_, _, suffix), rows, x_i in zip(blocks, all_rows, x.split(1, dim=1), strict=True):
        yield rows, x_i, lower.narrow(1, suffix.start, suffix.stop - suffix.start)


def monomials_backward(x: Tensor, grad: Tensor, deg: int) -> Tensor:
    """Return the gradient `(M, K, C)` of `monomials(x, deg)` for `grad (M, F, C)`, which it overwrites."""
    by_degree = _monomials_by_degree(x, deg - 1)
    grad_x = torch.zeros_like(x)
    for degree in range(deg, 1, -1):
        lower = by_degree[degree - 2]
        grad_lower = torch.zeros_like(lower)
        views = zip(_row_views(x, grad, lower, degree), _row_views(grad_x, grad, grad_lower, degree), strict=True)
        for (grad_rows, x_i, lower_rows), (_, grad_x_i, grad_lower_rows) in views:
            grad_lower_rows.addcmul_(grad_rows, x_i)
            grad_x_i += grad_rows.mul_(lower_rows).sum(1, keepdim=True)
        grad = grad_lower
    return grad_x.add_(grad)
