"""The sum that chunks hand on to each other: S_c = f_c S_(c-1) + x_c.

Shape legend: N sequences, G chunks.
"""

import torch
from torch import Tensor

# On a GPU a step from chunk to chunk is two launches, whose time a small state does not fill: below this many elements
# of one chunk's states, log2(G) passes over all chunks at once are faster, and above it G passes over one chunk.
_LAUNCH_ELEMENTS = {"cuda": 1 << 20}


def carried_sums(x: Tensor, initial: Tensor | None, factors: Tensor | None, *, from_end: bool = False) -> Tensor:
    """Return S_0 ... S_(G-1), `(N, G, ...)`, for x `(N, G, ...)`, which may be overwritten.

    Args:
        initial: S_(-1), `(N, ...)`; None: zeros.
        factors: f `(N, G, 1, ...)` in [0, 1]; None: ones.
        from_end: the last chunk is the first to hand on: S_c = f_c S_(c+1) + x_c, and `initial` is S_G.
    """
    if x.shape[1] > 2 and x[:, 0].numel() < _LAUNCH_ELEMENTS.get(x.device.type, 0):
        if from_end:
            return _by_doubling(x.flip(1), initial, None if factors is None else factors.flip(1)).flip(1)
        return _by_doubling(x, initial, factors)
    before = initial
    for chunk in reversed(range(x.shape[1])) if from_end else range(x.shape[1]):
        here = x[:, chunk]
        if before is not None:
            if factors is None:
                here.add_(before)
            else:
                here.addcmul_(before, factors[:, chunk])
        before = here
    return x


def _step(x: Tensor, before: Tensor, factor: Tensor | None) -> Tensor:
    return x + before if factor is None else torch.addcmul(x, before, factor)


def _by_doubling(x: Tensor, initial: Tensor | None, factors: Tensor | None) -> Tensor:
    """As `carried_sums` from the start; each pass doubles how far back a sum reaches (Hillis and Steele, 1986)."""
    sums = x
    if initial is not None:
        first = _step(x[:, 0], initial, None if factors is None else factors[:, 0])
        sums = torch.cat([first[:, None], x[:, 1:]], dim=1)
    reach = 1
    while reach < x.shape[1]:
        further = _step(sums[:, reach:], sums[:, :-reach], None if factors is None else factors[:, reach:])
        sums = torch.cat([sums[:, :reach], further], dim=1)
        if factors is not None:
            factors = torch.cat([factors[:, :reach], factors[:, reach:] * factors[:, :-reach]], dim=1)
        reach *= 2
    return sums
