"""The symmetric power embedding phi, with phi(q) . phi(k) = (q . k)^deg.

For x of size K the embedding holds one entry for each multiset of `deg` indices, in lexicographic order of the sorted
indices:

    phi(x)[i1 <= ... <= ip] = sqrt(p! / prod(multiplicities!)) * x[i1] * ... * x[ip]    F = binom(K + p - 1, p)

In that order the degree-p monomials whose first index is i are x[i] times a contiguous *suffix* of the degree-(p-1)
monomials: those whose first index is at least i.
"""

import functools
import itertools
import math

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


# (i, rows of degree `deg` that start with i, rows of degree `deg - 1` that start with i or more)
Block = tuple[int, slice, slice]


@functools.cache
def lexicographic_blocks(dim: int, deg: int) -> list[Block]:
    """Return the blocks of phi's order, one for each first index."""
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
        for i, _, suffix in lexicographic_blocks(dim, degree):
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
