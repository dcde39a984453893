"""The monomials of phi, without its weights, in a layout that is fast to form, and states that multiply them.

Tokens lie along the last axis, so that every product is one long vector operation. Monomials are formed a tile of rows
at a time in one buffer: written and multiplied while it is in the cache. Their order is this module's own, and differs
with the degree (`_CyclicPairs`, `_Suffixes`); `internal_state` and `public_state` translate.

Shape legend: M a batch of chunks, K dim of x, C tokens, F dim phi.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from powertrain.ops.sympow import Block, lexicographic_blocks, phi_dimension, phi_weights


class Monomials(ABC):
    """The degree-`deg` monomials `(M, F, C)` of `x (M, K, C)`, in tiles."""

    @staticmethod
    def of(x: Tensor, deg: int, tile_elements: int) -> "Monomials":
        """Return the monomials of x, in a buffer of about `tile_elements`."""
        return _CyclicPairs(x, tile_elements) if deg == 2 else _Suffixes(x, deg, tile_elements)

    @abstractmethod
    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, the monomials `(M, rows, C)`); the next tile overwrites them."""

    @abstractmethod
    def backward(self, write_grad: Callable[[slice, Tensor], object]) -> Tensor:
        """Return the gradient `(M, K, C)` of x, where `write_grad(rows, out)` writes the gradient of the monomials
        `rows` to `out (M, rows, C)`.
        """


def internal_state(state: Tensor, dim: int, deg: int) -> Tensor:
    """Return what multiplies monomials as `state (..., F)` multiplies phi: in their order, times the weights of phi.

    Of degree 1, whose weights are 1, that is the state itself.
    """
    if deg == 1:
        return state
    weighted = state * phi_weights(dim, deg, state)
    return weighted if deg != 2 else weighted[..., torch.tensor(_cyclic_order(dim), device=state.device)]


def public_state(internal: Tensor, dim: int, deg: int) -> Tensor:
    """Return the state `(..., F)` that multiplies phi, with one of the two weights that `internal` has: the inverse of
    `internal_state`.
    """
    if deg == 1:
        return internal
    if deg == 2:
        internal = internal[..., torch.tensor(np.argsort(_cyclic_order(dim)), device=internal.device)]
    return internal / phi_weights(dim, deg, internal)


def multinomials(dim: int, deg: int, like: Tensor) -> Tensor:
    """Return the `(F,)` squares of phi's weights in the order of the monomials, in the dtype and on the device of
    `like`.
    """
    return internal_state(phi_weights(dim, deg, like), dim, deg)


@functools.cache
def _cyclic_order(dim: int) -> np.ndarray:
    """Return the place in phi's order of each monomial of `_CyclicPairs`, `(F,)`."""
    distance, index = np.divmod(np.arange(phi_dimension(dim, 2)), dim)
    ends = np.stack([index, (index + distance) % dim])
    first, second = ends.min(0), ends.max(0)
    return first * dim - first * (first - 1) // 2 + second - first


class _CyclicPairs(Monomials):
    """Degree 2: the products x[i] x[i + d mod K] for d = 0 ... K // 2, each d with all i (the last d of an even K with
    half of them, the others being the same pairs).

    Several distances are one product: x times a view of x, repeated, that starts a row later at each distance.
    """

    def __init__(self, x: Tensor, tile_elements: int) -> None:
        M, K, C = x.shape
        self._x = x
        self._repeated = torch.cat([x, x[:, : K // 2]], dim=1)
        self._shifted = self._repeated.unfold(1, K, 1).mT  # (M, K // 2 + 1, K, C)
        whole = (K + 1) // 2
        at_once = max(1, tile_elements // (M * K * C))
        self._tiles = [(first, min(first + at_once, whole)) for first in range(0, whole, at_once)]
        self._half = K // 2 if K % 2 == 0 else 0
        self._buffer = x.new_empty(M, min(at_once, whole) * K + self._half, C)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for rows, tile in self._rows():
            for distances, part in self._parts(rows, tile):
                count = part.shape[2]
                torch.mul(self._shifted[:, distances, :count], self._x[:, None, :count], out=part)
            yield rows, tile

    def backward(self, write_grad: Callable[[slice, Tensor], object]) -> Tensor:
        K = self._x.shape[1]
        grad_x, grad_repeated = torch.zeros_like(self._x), torch.zeros_like(self._repeated)
        for rows, tile in self._rows():
            write_grad(rows, tile)
            for distances, part in self._parts(rows, tile):
                count = part.shape[2]
                for distance, grad in zip(range(distances.start, distances.stop), part.unbind(1), strict=True):
                    grad_repeated[:, distance : distance + count].addcmul_(grad, self._x[:, :count])
                grad_x[:, :count] += part.mul_(self._shifted[:, distances, :count]).sum(1)
        grad_x += grad_repeated[:, :K]
        grad_x[:, : K // 2] += grad_repeated[:, K:]
        return grad_x

    def _rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of each tile and the buffer for them; the last one has the half distance, too."""
        K = self._x.shape[1]
        for first, stop in self._tiles:
            rows = slice(first * K, stop * K + (self._half if stop == self._tiles[-1][1] else 0))
            yield rows, self._buffer[:, : rows.stop - rows.start]

    def _parts(self, rows: slice, tile: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the distances and `(M, distances, i, C)` of a tile: whole ones, and the half one."""
        K = self._x.shape[1]
        first, whole = rows.start // K, (rows.stop - rows.start) // K
        yield slice(first, first + whole), tile[:, : whole * K].unflatten(1, (whole, K))
        if whole * K < tile.shape[1]:
            yield slice(first + whole, first + whole + 1), tile[:, None, whole * K :]


class _Suffixes(Monomials):
    """Any degree, in phi's order: K products of x[i] with a suffix of the monomials of the degree below, which are held
    whole; the gradient is the same walk backwards.
    """

    def __init__(self, x: Tensor, deg: int, tile_elements: int) -> None:
        M, K, C = x.shape
        self._by_degree = [x]
        for degree in range(2, deg):
            monomials = x.new_empty(M, phi_dimension(K, degree), C)
            _multiply(x, self._by_degree[-1], monomials, lexicographic_blocks(K, degree))
            self._by_degree.append(monomials)
        self._deg, rows = deg, K
        if deg > 1:
            self._tiles = _tiles(K, deg, max(1, tile_elements // (M * C)))
            rows = max(tile.stop - tile.start for tile, _ in self._tiles)
        self._buffer = x.new_empty(M, rows, C)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        x, lower = self._by_degree[0], self._by_degree[-1]
        if self._deg == 1:
            yield slice(0, x.shape[1]), x
            return
        for rows, blocks in self._tiles:
            tile = self._buffer[:, : rows.stop - rows.start]
            _multiply(x, lower, tile, blocks)
            yield rows, tile

    def backward(self, write_grad: Callable[[slice, Tensor], object]) -> Tensor:
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
            _multiply_backward(x, lower, grad, lexicographic_blocks(x.shape[1], degree), grad_x, grad_lower)
        return grad_x.add_(grad_lower)


@functools.cache
def _tiles(dim: int, deg: int, rows: int) -> list[tuple[slice, list[Block]]]:
    """Group consecutive blocks into tiles of at most `rows` rows, but of at least one block."""
    tiles: list[tuple[slice, list[Block]]] = []
    for block in lexicographic_blocks(dim, deg):
        if tiles and block[1].stop - tiles[-1][0].start <= rows:
            tiles[-1] = (slice(tiles[-1][0].start, block[1].stop), [*tiles[-1][1], block])
        else:
            tiles.append((block[1], [block]))
    return tiles


def _multiply(x: Tensor, lower: Tensor, out: Tensor, blocks: list[Block]) -> None:
    """Write x[i] times its suffix of `lower` to the rows of each block, which `out` holds one after another."""
    for x_i, suffix, rows in zip(_factors(x, blocks), _suffixes(lower, blocks), _rows(out, blocks), strict=True):
        torch.mul(suffix, x_i, out=rows)


def _multiply_backward(
    x: Tensor, lower: Tensor, grad: Tensor, blocks: list[Block], grad_x: Tensor, grad_lower: Tensor
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
def _factors(x: Tensor, blocks: list[Block]) -> tuple[Tensor, ...]:
    return x.narrow(1, blocks[0][0], len(blocks)).split(1, dim=1)


def _suffixes(lower: Tensor, blocks: list[Block]) -> list[Tensor]:
    return [lower.narrow(1, suffix.start, suffix.stop - suffix.start) for _, _, suffix in blocks]


def _rows(x: Tensor, blocks: list[Block]) -> tuple[Tensor, ...]:
    return x.split([rows.stop - rows.start for _, rows, _ in blocks], dim=1)
