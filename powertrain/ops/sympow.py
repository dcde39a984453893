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
from collections.abc import Callable, Iterator

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
_Block = tuple[int, slice, slice]


@functools.cache
def _blocks(dim: int, deg: int) -> list[_Block]:
    total, lower_total = phi_dimension(dim, deg), phi_dimension(dim, deg - 1)
    blocks = []
    for i in range(dim):
        rows = slice(total - phi_dimension(dim - i, deg), total - phi_dimension(dim - i - 1, deg))
        blocks.append((i, rows, slice(lower_total - phi_dimension(dim - i, deg - 1), lower_total)))
    return blocks


@functools.cache
def _tiles(dim: int, deg: int, rows: int) -> list[tuple[slice, list[_Block]]]:
    """Group consecutive blocks into tiles of at most `rows` rows, but of at least one block."""
    tiles: list[tuple[slice, list[_Block]]] = []
    for block in _blocks(dim, deg):
        if tiles and block[1].stop - tiles[-1][0].start <= rows:
            tiles[-1] = (slice(tiles[-1][0].start, block[1].stop), [*tiles[-1][1], block])
        else:
            tiles.append((block[1], [block]))
    return tiles


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


class Monomials:
    """The degree-`deg` monomials `(M, F, C)` of `x (M, K, C)` in phi's order, without multinomial weights, formed a
    tile of rows at a time in one buffer of about `tile_elements`: written and multiplied while it is in the cache.
    """

    def __init__(self, x: Tensor, deg: int, tile_elements: int) -> None:
        M, K, C = x.shape
        self._by_degree = [x]
        for degree in range(2, deg):
            monomials = x.new_empty(M, phi_dimension(K, degree), C)
            _multiply(x, self._by_degree[-1], monomials, _blocks(K, degree))
            self._by_degree.append(monomials)
        self._deg, self._tiles = deg, _tiles(K, deg, max(1, tile_elements // (M * C)))
        rows = K if deg == 1 else max(tile.stop - tile.start for tile, _ in self._tiles)
        self._buffer = x.new_empty(M, rows, C)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, the monomials `(M, rows, C)`); the next tile overwrites them."""
        x, lower = self._by_degree[0], self._by_degree[-1]
        if self._deg == 1:
            yield slice(0, x.shape[1]), x
            return
        for rows, blocks in self._tiles:
            tile = self._buffer[:, : rows.stop - rows.start]
            _multiply(x, lower, tile, blocks)
            yield rows, tile

    def backward(self, write_grad: Callable[[slice, Tensor], object]) -> Tensor:
        """Return the gradient `(M, K, C)` of x, where `write_grad(rows, out)` writes the gradient of the monomials
        `rows` to `out (M, rows, C)`.
        """
        x, lower = self._by_degree[0], self._by_degree[-1]
        if self._deg == 1:
            write_grad(slice(0, x.shape[1]), self._buffer)
            return self._buffer
        grad_x, grad_lower = torch.zeros_like(x), torch.zeros_like(lower)
        for rows, blocks in self._tiles:
            tile = self._buffer[:, : rows.stop - rows.start]
            write_grad(rows, tile)
            _multiply_backward(x, lower, tile, blocks, grad_x, grad_lower)
        for degree in range(self._deg - 1, 1, -1):
            grad, lower = grad_lower, self._by_degree[degree - 2]
            grad_lower = torch.zeros_like(lower)
            _multiply_backward(x, lower, grad, _blocks(x.shape[1], degree), grad_x, grad_lower)
        return grad_x.add_(grad_lower)


def _multiply(x: Tensor, lower: Tensor, out: Tensor, blocks: list[_Block]) -> None:
    """Write x[i] times its suffix of `lower` to the rows of each block, which `out` holds one after another."""
    for x_i, suffix, rows in zip(_factors(x, blocks), _suffixes(lower, blocks), _rows(out, blocks), strict=True):
        torch.mul(suffix, x_i, out=rows)


def _multiply_backward(
    x: Tensor, lower: Tensor, grad: Tensor, blocks: list[_Block], grad_x: Tensor, grad_lower: Tensor
) -> None:
    """Add to `grad_x` and `grad_lower` the gradients through `_multiply` for `grad`, which is overwritten."""
    grad_factors = []
    for x_i, suffix, grad_suffix, grad_rows in zip(
        _factors(x, blocks), _suffixes(lower, blocks), _suffixes(grad_lower, blocks), _rows(grad, blocks), strict=True
    ):
        grad_suffix.addcmul_(grad_rows, x_i)
        grad_factors.append(grad_rows.mul_(suffix).sum(1, keepdim=True))
    grad_x[:, blocks[0][0] : blocks[-1][0] + 1] += torch.cat(grad_factors, dim=1)


# The views of all blocks at once, and by the cheapest calls: with short chunks, making them would cost as much as the
# products.
def _factors(x: Tensor, blocks: list[_Block]) -> tuple[Tensor, ...]:
    return x.narrow(1, blocks[0][0], len(blocks)).split(1, dim=1)


def _suffixes(lower: Tensor, blocks: list[_Block]) -> list[Tensor]:
    return [lower.narrow(1, suffix.start, suffix.stop - suffix.start) for _, _, suffix in blocks]


def _rows(x: Tensor, blocks: list[_Block]) -> tuple[Tensor, ...]:
    return x.split([rows.stop - rows.start for _, rows, _ in blocks], dim=1)
