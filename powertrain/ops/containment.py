"""What is not finite stays in its document, also through sums over tokens.

A matrix product leaves no token out: of those that a mask hides it adds 0 times what they hold, and 0 times infinity or
NaN is NaN. So a token of which something is not finite has two forms. `marked` is NaN in all of it, for results of one
token or one pair, from which masks select; `summed` is 0, for the factors that are summed over tokens. The sums of
other documents are then what they would be if the token were 0, and those of its own have NaN from the other factor.

Without documents there is one form, the tensor as it is. On CPU a look at the sums of tensors says whether anything is
not finite at all; elsewhere that would wait for the device, and there are two forms wherever there are documents.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from powertrain.ops.decay import kept
from powertrain.ops.layout import cut
from powertrain.ops.plan import Segment


def spoiled_tokens(*tensors: Tensor) -> Tensor | None:
    """Return which tokens hold anything that is not finite `(N, ..., T)`, for tensors `(N, D, ..., T)` of any D; None
    where it is known that none does.
    """
    spoiled = None
    for x in tensors:
        if _may_look_at(x) and math.isfinite(x.sum().item()):
            continue
        of_x = ~x.isfinite().all(dim=1)
        spoiled = of_x if spoiled is None else spoiled | of_x
    return spoiled


def finite_gates(log_g: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return log gates `(N, T)` with 0 in the place of NaN, and where NaN is; None where it is known that none is."""
    if _may_look_at(log_g) and not math.isnan(log_g.sum().item()):
        return log_g, None
    spoiled = log_g.isnan()
    return log_g.masked_fill(spoiled, 0.0), spoiled


def either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the tokens that are spoiled in a or b."""
    return b if a is None else a if b is None else a | b


@dataclass(frozen=True)
class Tokens:
    """A tensor in its two forms, or twice the same one."""

    marked: Tensor  # NaN in spoiled tokens
    summed: Tensor  # 0 in spoiled tokens

    @classmethod
    def of(cls, x: Tensor, spoiled: Tensor | None) -> "Tokens":
        """Return x `(N, D, ..., T)` in its two forms, for the result of `spoiled_tokens`."""
        return cls(x, x) if spoiled is None else cls(marked(x, spoiled), summed(x, spoiled))

    @classmethod
    def only_summed(cls, x: Tensor, spoiled: Tensor | None) -> "Tokens":
        """Return the second form as both, where another factor marks what both would."""
        x = summed(x, spoiled)
        return cls(x, x)

    def chunks(self, segment: Segment) -> "Tokens":
        """`(N, D, ..., T)` to the segment's chunks as a batch, `(N * chunks, D, ..., chunk_size)`."""
        first = cut(self.marked, segment).flatten(0, 1)
        return Tokens(first, first if self.summed is self.marked else cut(self.summed, segment).flatten(0, 1))


def marked(x: Tensor, spoiled: Tensor | None) -> Tensor:
    """Return x `(N, D, ..., T)`, NaN in the tokens that are spoiled."""
    return x if spoiled is None else x.masked_fill(spoiled.unsqueeze(1), torch.nan)


def summed(x: Tensor, spoiled: Tensor | None) -> Tensor:
    """Return x `(N, D, ..., T)`, 0 in the tokens that are spoiled."""
    return x if spoiled is None else kept(x, ~spoiled.unsqueeze(1))


def _may_look_at(x: Tensor) -> bool:
    """Whether values may be looked at: on CPU, and where there are values rather than a compiler's stand-ins."""
    return x.device.type == "cpu" and type(x) is Tensor
