"""What is computed from losses: perplexity, bits per byte, and the validation loss by position in the context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORE_INDEX = -100
# Losses at shorter contexts than this are one bucket: below it the buckets hold few tokens and say little.
FIRST_BUCKET = 64


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats per token, infinite where it does not fit a float."""
    return math.exp(loss) if loss < 709.0 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Bits per UTF-8 byte of text, for a loss in nats per token."""
    return loss / math.log(2) / bytes_per_token


def positions_in_context(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return how many earlier tokens each of `num_tokens` flattened tokens sees.

    Args:
        cu_seqlens: (M,) document offsets over the flattened tokens; empty documents are allowed.
    Returns:
        (num_tokens,) int64: the distance to the start of the token's document (or row).
    """
    index = torch.arange(num_tokens, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    return index - starts[torch.searchsorted(starts, index, right=True) - 1]


class ValidationMetrics:
    """Sums of a validation: loss and bytes of all labels, and loss by power-of-two bucket of the position.

    Sums are in fp64 on the device, and independent of how the split is cut into batches but for rounding.
    """

    def __init__(self, context_length: int, device: torch.device) -> None:
        top = max(0, math.ceil(math.log2(max(1, context_length) / FIRST_BUCKET)))
        self.upper_bounds = [FIRST_BUCKET << i for i in range(top + 1)]
        # Rows: sum of losses, number of labels, sum of bytes; one column per bucket.
        self.sums = torch.zeros(3, len(self.upper_bounds), dtype=torch.float64, device=device)

    def update(self, losses: Tensor, labels: Tensor, positions: Tensor, label_bytes: Tensor | None) -> None:
        """Add one batch: losses (B, T) fp32 in nats, labels (B, T), label_bytes (B, T) or None, and positions (B, T),
        how many earlier tokens each token sees (`positions_in_context`).
        """
        counted = (labels != IGNORE_INDEX).flatten()
        bounds = torch.tensor(self.upper_bounds, device=losses.device)
        # Positions from bounds[i - 1] to bounds[i] - 1 belong to bucket i.
        bucket = torch.searchsorted(bounds, positions.flatten(), right=True).clamp_(max=len(self.upper_bounds) - 1)
        one_hot = torch.nn.functional.one_hot(bucket, len(self.upper_bounds)).to(torch.float64)
        values = torch.where(counted, losses.flatten().double(), 0.0)
        rows = [values, counted.double()]
        if label_bytes is not None:
            rows.append(torch.where(counted, label_bytes.flatten().double(), 0.0))
        self.sums[: len(rows)] += torch.stack(rows) @ one_hot

    def compute(self, bytes_per_token: float | None) -> dict[str, float]:
        """Return the metrics under their names; buckets without a label are left out.

        Args:
            bytes_per_token: of the corpus, used where batches had no label_bytes; None leaves bits per byte out.
        Errors:
            ValueError: no label was counted.
        """
        loss_sums, counts, byte_sums = self.sums.tolist()
        total = sum(counts)
        if total == 0:
            raise ValueError("the validation split has no label to predict; enlarge data.val_fraction")
        loss = sum(loss_sums) / total
        if sum(byte_sums) > 0:
            bytes_per_token = sum(byte_sums) / total
        result = {"val/loss": loss, "val/perplexity": perplexity(loss)}
        if bytes_per_token:
            result["val/bits_per_byte"] = bits_per_byte(loss, bytes_per_token)
        for bound, loss_sum, count in zip(self.upper_bounds, loss_sums, counts, strict=True):
            if count:
                result[f"val/loss_by_position/{bound}"] = loss_sum / count
        return result
