"""The sum that chunks hand on to each other: S_c = f_c S_(c-1) + x_c.

Shape legend: N sequences, G chunks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from powertrain.ops.decay import kept

# On a GPU a step from chunk to chunk is two launches, whose time a small state does not fill: below this many elements
# of one chunk's states, products over blocks of chunks are faster, and above it G passes over one chunk.
_LAUNCH_ELEMENTS = {"cuda": 1 << 20}
# Chunks of a block: their sums are one matrix product, of 2 * _BLOCK FLOPs for each element.
_BLOCK = 32


def carried_sums(
    x: Tensor,
    initial: Tensor | None,
    factors: Tensor | None,
    unbroken: Tensor | None = None,
    *,
    from_end: bool = False,
) -> Tensor:
    """Return S_0 ... S_(G-1), `(N, G, ...)`, for x `(N, G, ...)`, which may be overwritten.

    Args:
        initial: S_(-1), `(N, ...)`; None: zeros.
        factors: f `(N, G, 1, ...)` in [0, 1]; None: ones.
        unbroken: where it is False `(N, G, 1, ...)`, f is 0 and nothing is handed on, even infinity; None: nowhere.
        from_end: the last chunk is the first to hand on: S_c = f_c S_(c+1) + x_c, and `initial` is S_G.
    """
    if x.shape[1] > 2 and x[:, 0].numel() < _LAUNCH_ELEMENTS.get(x.device.type, 0):
        if from_end:
            return _by_blocks(x.flip(1), initial, None if factors is None else factors.flip(1)).flip(1)
        return _by_blocks(x, initial, factors)
    before = initial
    for chunk in reversed(range(x.shape[1])) if from_end else range(x.shape[1]):
        here = x[:, chunk]
        if before is not None:
            if factors is None:
                here.add_(before)
            else:
                before = kept(before, None if unbroken is None else unbroken[:, chunk])
                here.addcmul_(before, factors[:, chunk])
        before = here
    return x


def _by_blocks(x: Tensor, initial: Tensor | None, factors: Tensor | None) -> Tensor:
    """As `carried_sums` from the start, by products over blocks of chunks.

    Products of matrices: they follow `torch.set_float32_matmul_precision`, as those that formed the states do, and what
    is not finite in one chunk spoils all of them, earlier ones included (0 times infinity).
    """
    factors = x.new_ones(x.shape[:2]) if factors is None else factors.flatten(1)
    sums = x.flatten(2)
    if initial is not None:
        sums[:, 0].addcmul_(initial.flatten(1), factors[:, :1])
    return _block_sums(sums, factors).view(x.shape)


def _block_sums(x: Tensor, factors: Tensor) -> Tensor:
    """Return S `(N, G, E)` of x `(N, G, E)` and factors `(N, G)`: inside blocks by the triangle of the products of the
    factors between chunks, and what enters a block in the same way, from the ends of the blocks.
    """
    N, G, E = x.shape
    size = min(G, _BLOCK)
    if G % size:
        padding = size - G % size
        x, factors = pad(x, (0, 0, 0, padding)), pad(factors, (0, padding))
    x, factors = x.reshape(-1, size, E), factors.reshape(-1, size, 1)
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)
    sums = torch.bmm(torch.where(later, factors, 1.0).cumprod(1).tril(), x)
    if size < G:
        from_start = factors.cumprod(1)
        blocks, from_start = sums.unflatten(0, (N, -1)), from_start.unflatten(0, (N, -1))
        entering = _block_sums(blocks[:, :-1, -1], from_start[:, :-1, -1, 0])
        blocks[:, 1:].addcmul_(entering[:, :, None], from_start[:, 1:])
    return sums.view(N, -1, E)[:, :G]
