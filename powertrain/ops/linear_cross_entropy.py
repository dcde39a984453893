"""Cross entropy of a linear head, in chunks of tokens: the logits of all tokens never exist at once.

For a sum or mean the gradients of hidden and weight are known up to one factor as soon as the logits of a chunk are, so
the forward pass forms them and nothing is computed twice. Losses per token get their gradient by computing the logits
again.

On a GPU, 16-bit logits take the kernel of `cuda_cross_entropy`, which reads and writes a chunk once where PyTorch's
operations pass over it, in fp32, some ten times.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powertrain.ops import cuda_cross_entropy
from powertrain.ops.layout import compute_dtype, without_autocast
from powertrain.ops.validation import (
    autocast,
    check_positive,
    check_tensor,
    checks_values,
    refuse_forward_mode,
    shape_text,
)

# Logits of one chunk: on CPU they stay in the last-level cache; on a GPU they fill the chip, at 256 MiB of fp32 or of
# 16 bits.
_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
_CHUNK_ELEMENTS_16_BITS = 1 << 27


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Compute the cross entropy in nats of logits `hidden weight^T` against labels, without ever holding the logits of
    more than `chunk` tokens.

    Args:
        hidden: `(N, D)` floating point; cast to the autocast dtype under autocast, like weight.
        weight: `(V, D)`, dtype of hidden.
        labels: `(N,)` int64 in [0, V), or ignore_index for tokens that do not count.
        ignore_index: the label of ignored tokens.
        reduction: "mean" over the tokens that count (if none does NaN with gradients of 0, as in
            `torch.nn.functional.cross_entropy`), "sum", or "none": `(N,)` with 0 for ignored tokens.
        chunk: tokens whose logits exist at once; None: from V and the device.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs): a scalar, or `(N,)` for reduction "none". Softmax and sums are in that
        dtype whatever the dtype of the inputs.

    Raises:
        ValueError: for shapes, dtypes or labels that do not fit (labels are checked where values are: see
            `power_retention`).
    """
    hidden, weight = autocast(hidden=hidden, weight=weight)
    _check(hidden, weight, labels, ignore_index, reduction, chunk)
    refuse_forward_mode("linear_cross_entropy", hidden, weight)
    if chunk is None:
        chunk = max(1, _chunk_elements(hidden) // weight.shape[0])
    if reduction == "none":
        return linear_cross_entropy_per_token_op(hidden, weight, labels, ignore_index, chunk)[0]
    with_gradients = torch.is_grad_enabled()
    loss, _, _ = linear_cross_entropy_sum_op(
        hidden,
        weight,
        labels,
        ignore_index,
        chunk,
        with_gradients and hidden.requires_grad,
        with_gradients and weight.requires_grad,
    )
    if reduction == "sum":
        return loss
    count = (labels != ignore_index).sum()
    # Where nothing counts only the loss is NaN, and gradients are 0.
    return torch.where(count > 0, loss / count.clamp(min=1), torch.nan)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, reduction: str, chunk: int | None
) -> None:
    check_tensor("labels", labels)
    if hidden.ndim != 2 or weight.ndim != 2 or labels.ndim != 1:
        raise ValueError(
            "expected hidden (N, D), weight (V, D) and labels (N,); "
            f"got {shape_text(hidden)}, {shape_text(weight)} and {shape_text(labels)}"
        )
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != labels.shape[0]:
        raise ValueError(
            f"hidden {shape_text(hidden)}, weight {shape_text(weight)} and labels {shape_text(labels)} do not fit; "
            "expected (N, D), (V, D) and (N,)"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {shape_text(weight)}; it needs at least one row")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share a floating-point dtype; got {hidden.dtype} and {weight.dtype}")
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"hidden, weight and labels must be on one device; got {hidden.device}, {weight.device} and {labels.device}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels have dtype {labels.dtype}; expected int64")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; allowed are 'mean', 'sum' and 'none'")
    check_positive("chunk", chunk)
    if checks_values(labels) and labels.numel():
        counted = labels[labels != ignore_index]
        if counted.numel() and (counted.min().item() < 0 or counted.max().item() >= weight.shape[0]):
            raise ValueError(
                f"labels lie in [{counted.min().item()}, {counted.max().item()}]; "
                f"allowed are 0 to {weight.shape[0] - 1} and ignore_index={ignore_index}"
            )


def _chunk_elements(hidden: Tensor) -> int:
    if hidden.device.type == "cuda" and cuda_cross_entropy.takes(hidden):
        return _CHUNK_ELEMENTS_16_BITS
    return _CHUNK_ELEMENTS.get(hidden.device.type, _CHUNK_ELEMENTS["cuda"])


def _chunks(count: int, chunk: int) -> Iterator[slice]:
    for start in range(0, count, chunk):
        yield slice(start, min(start + chunk, count))


def _cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    *,
    write_gradients: bool = False,
    lse: Tensor | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return losses and log-sum-exp of the rows of `_logits`, both `(n,)`; with `write_gradients`, overwrite the logits
    with the gradients of factors (1) * loss, 0 for ignored rows. `lse` is not computed where it is given.
    """
    if logits.dtype != compute_dtype(logits.dtype):
        losses = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits.dtype))
        known, lse = lse is not None, torch.empty_like(losses) if lse is None else lse
        cuda_cross_entropy.cross_entropy_(
            logits, labels, ignore_index,
            losses=losses, log_sum_exp=lse, has_log_sum_exp=known, write_gradients=write_gradients, factors=factors,
        )  # fmt: skip
        return losses, lse
    lse = logits.logsumexp(-1) if lse is None else lse
    counts = labels != ignore_index
    targets = torch.where(counts, labels, 0)[:, None]
    losses = torch.where(counts, lse - logits.gather(-1, targets)[:, 0], 0.0)
    if write_gradients:
        grads = logits.sub_(lse[:, None]).exp_()
        grads.scatter_add_(-1, targets, torch.full_like(lse, -1.0)[:, None])
        grads.mul_((counts.to(lse.dtype) if factors is None else torch.where(counts, factors, 0.0))[:, None])
    return losses, lse


def _add_grads_(
    grad_hidden: Tensor | None, grad_weight: Tensor | None, rows: slice, grads: Tensor, hidden: Tensor, weight: Tensor
) -> None:
    """Write the rows' gradient of hidden and add to that of weight, which is summed in the dtype of the loss."""
    narrow = grads.to(hidden.dtype)
    if grad_hidden is not None:
        grad_hidden[rows] = narrow @ weight
    if grad_weight is not None:
        if grad_weight.dtype == hidden.dtype:
            grad_weight.addmm_(narrow.T, hidden[rows])
        else:
            grad_weight += narrow.T @ hidden[rows]


def _logits(hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
    """Return logits in the dtype of hidden where the kernel takes them, else in that of the loss."""
    if not cuda_cross_entropy.takes(hidden):
        return (hidden[rows] @ weight.T).to(compute_dtype(hidden.dtype))
    logits = cuda_cross_entropy.empty_logits(rows.stop - rows.start, weight.shape[0], hidden)
    return torch.mm(hidden[rows], weight.T, out=logits)


@torch.library.custom_op("powertrain::linear_cross_entropy_sum", mutates_args=())
@without_autocast
def linear_cross_entropy_sum_op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    chunk: int,
    grad_for_hidden: bool,
    grad_for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss and its gradients (of size 0 where not asked for)."""
    dtype = compute_dtype(hidden.dtype)
    loss = hidden.new_zeros((), dtype=dtype)
    grad_hidden = torch.empty_like(hidden) if grad_for_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if grad_for_weight else None
    with_gradients = grad_for_hidden or grad_for_weight
    for rows in _chunks(hidden.shape[0], chunk):
        logits = _logits(hidden, weight, rows)
        losses, _ = _cross_entropy_(logits, labels[rows], ignore_index, write_gradients=with_gradients)
        loss += losses.sum()
        if with_gradients:
            _add_grads_(grad_hidden, grad_weight, rows, logits, hidden, weight)
    return (
        loss,
        hidden.new_empty(0) if grad_hidden is None else grad_hidden,
        weight.new_empty(0, dtype=dtype) if grad_weight is None else grad_weight,
    )


@linear_cross_entropy_sum_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    chunk: int,
    grad_for_hidden: bool,
    grad_for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        torch.empty_like(hidden) if grad_for_hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=dtype) if grad_for_weight else weight.new_empty(0, dtype=dtype),
    )


def _sum_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    # The gradients are differentiable outputs: differentiating them again comes back here, to be refused.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2])


def _sum_backward(
    ctx: Any, grad_loss: Tensor, of_grad_hidden: Tensor | None, of_grad_weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    if of_grad_hidden is not None or of_grad_weight is not None:
        raise RuntimeError("linear_cross_entropy has no double backward")
    grad_hidden, grad_weight = ctx.saved_tensors
    hidden_dtype, weight_dtype = ctx.dtypes
    return (
        (grad_hidden * grad_loss).to(hidden_dtype) if ctx.needs_input_grad[0] else None,
        (grad_weight * grad_loss).to(weight_dtype) if ctx.needs_input_grad[1] else None,
        None, None, None, None, None,
    )  # fmt: skip


linear_cross_entropy_sum_op.register_autograd(_sum_backward, setup_context=_sum_setup_context)


@torch.library.custom_op("powertrain::linear_cross_entropy_per_token", mutates_args=())
@without_autocast
def linear_cross_entropy_per_token_op(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp of each token."""
    losses, lse = (hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype)) for _ in range(2))
    for rows in _chunks(hidden.shape[0], chunk):
        losses[rows], lse[rows] = _cross_entropy_(_logits(hidden, weight, rows), labels[rows], ignore_index)
    return losses, lse


@linear_cross_entropy_per_token_op.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, chunk: int) -> tuple[Tensor, Tensor]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype)) for _ in range(2))  # type: ignore[return-value]


@torch.library.custom_op("powertrain::linear_cross_entropy_per_token_bwd", mutates_args=())
@without_autocast
def linear_cross_entropy_per_token_bwd_op(
    grad_losses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and weight."""
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=lse.dtype)
    for rows in _chunks(hidden.shape[0], chunk):
        logits = _logits(hidden, weight, rows)
        _cross_entropy_(
            logits, labels[rows], ignore_index, write_gradients=True, lse=lse[rows], factors=grad_losses[rows]
        )
        _add_grads_(grad_hidden, grad_weight, rows, logits, hidden, weight)
    return grad_hidden, grad_weight.to(weight.dtype) if grad_weight.dtype != weight.dtype else grad_weight


@linear_cross_entropy_per_token_bwd_op.register_fake
def _(
    grad_losses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


def _per_token_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, ctx.ignore_index, ctx.chunk = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, labels, output[1])


def _per_token_backward(ctx: Any, grad_losses: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (
        *linear_cross_entropy_per_token_bwd_op(grad_losses, *ctx.saved_tensors, ctx.ignore_index, ctx.chunk),
        None,
        None,
        None,
    )


linear_cross_entropy_per_token_op.register_autograd(_per_token_backward, setup_context=_per_token_setup_context)


@register_flop_formula(torch.ops.powertrain.linear_cross_entropy_sum)
def _sum_formula(
    hidden: Any,
    weight: Any,
    labels: Any,
    ignore_index: int,
    chunk: int,
    grad_for_hidden: bool,
    grad_for_weight: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + grad_for_hidden + grad_for_weight)


@register_flop_formula(torch.ops.powertrain.linear_cross_entropy_per_token)
def _per_token_formula(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.powertrain.linear_cross_entropy_per_token_bwd)
def _per_token_bwd_formula(grad_losses: Any, hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 6 * hidden[0] * hidden[1] * weight[0]
