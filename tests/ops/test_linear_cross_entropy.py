"""The chunked head loss against plain logits and `cross_entropy`."""

import pytest
import torch
from torch import Tensor

from powertrain.ops import linear_cross_entropy
from tests.ops.accuracy import relative_error


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return torch.nn.functional.cross_entropy(
        (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)), labels, reduction=reduction
    )


def problem(dtype: torch.dtype, N: int = 53, D: int = 16, V: int = 31) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 53, 100])
def test_matches_plain(chunk: int | None, reduction: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk=chunk)
    expected = plain(hidden.double(), weight.double(), labels, reduction)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(loss, (hidden, weight), cotangent.to(loss.dtype))
    exact = torch.autograd.grad(expected, (hidden, weight), cotangent)
    low = plain(hidden, weight, labels, reduction)
    low_grads = torch.autograd.grad(low, (hidden, weight), cotangent.to(low.dtype))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for value, reference, plain_value in zip((loss, *grads), (expected, *exact), (low, *low_grads), strict=True):
        allowed = max(2 * relative_error(plain_value, reference), 16 * torch.finfo(value.dtype).eps)
        assert relative_error(value, reference) <= allowed


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_one_side_is_trained(trained: str) -> None:
    hidden, weight, labels = problem(torch.float64)
    (weight if trained == "hidden" else hidden).requires_grad_(False)
    leaf = hidden if trained == "hidden" else weight
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, chunk=7), leaf)
    (exact,) = torch.autograd.grad(plain(hidden, weight, labels, "mean"), leaf)
    assert relative_error(grad, exact) < 1e-12


def test_ignored_tokens() -> None:
    hidden, weight, labels = problem(torch.float64)
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert not losses[labels == -100].any()
    grad = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)[0]
    assert not grad[labels == -100].any()
    other = torch.where(labels == -100, -1, labels)
    assert linear_cross_entropy(hidden, weight, other, ignore_index=-1) == linear_cross_entropy(hidden, weight, labels)


def test_nothing_but_ignored_tokens() -> None:
    """As `torch.nn.functional.cross_entropy`: the mean is NaN, and gradients are 0."""
    hidden, weight, labels = problem(torch.float32)
    nothing = torch.full_like(labels, -100)
    loss = linear_cross_entropy(hidden, weight, nothing)
    assert loss.isnan()
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))
    assert linear_cross_entropy(hidden, weight, nothing, reduction="sum") == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leaf", ["hidden", "weight"])
def test_no_double_backward(leaf: str, reduction: str) -> None:
    """A penalty on a gradient is refused beside the loss itself, too, whose own derivative is there."""
    hidden, weight, labels = problem(torch.float64)
    x = hidden if leaf == "hidden" else weight
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no double backward|no autograd formula"):
        torch.autograd.grad(loss + grad.square().sum(), x)


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels = problem(torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert all(x.isfinite().all() for x in (loss, *grads))


def test_whole_logits_never_exist() -> None:
    """The largest tensor that any product or exponential makes has `chunk` rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(
                [largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor))]
            )
            return result

    from powertrain.ops.linear_cross_entropy import linear_cross_entropy_sum_op

    hidden, weight, labels = problem(torch.float32, N=400, D=8, V=300)
    with Watch(), torch.no_grad():
        linear_cross_entropy_sum_op._init_fn(hidden, weight, labels, -100, 10, True, True)
    assert largest < 10 * 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "do not fit"),
        ({"labels": torch.full((53,), 31)}, "allowed are 0 to 30"),
        ({"labels": torch.zeros(53, dtype=torch.int32)}, "expected int64"),
        ({"hidden": torch.zeros(2, 53, 16)}, "expected hidden"),
        ({"hidden": torch.zeros(53, 16, dtype=torch.float64)}, "share a floating-point dtype"),
        ({"reduction": "median"}, "'mean', 'sum' and 'none'"),
        ({"chunk": 0}, "chunk=0 must be None or an integer of at least 1"),
        ({"chunk": 2.5}, "chunk=2.5 must be None or an integer"),
        ({"chunk": "a"}, "chunk='a' must be None or an integer"),
        ({"hidden": [1.0]}, "hidden is a builtins.list; expected a torch.Tensor"),
        ({"weight": None}, "weight is a builtins.NoneType"),
        ({"labels": [1]}, "labels is a builtins.list"),
        ({"weight": torch.zeros(0, 16)}, r"weight has shape \(0, 16\); it needs at least one row"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    hidden, weight, labels = problem(torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "labels": labels} | change))  # type: ignore[arg-type]
