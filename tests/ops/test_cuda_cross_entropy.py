"""The head's loss on the kernel that CUDA tensors take, against fp64 on the same inputs; emulated without a GPU."""

import pytest
import torch
from torch import Tensor

from powertrain.ops import cuda_cross_entropy, linear_cross_entropy
from tests.ops.accuracy import relative_error
from tests.ops.test_cuda import BF16, DEVICE, FP16, _library, _poisoned_memory, nan_filled, needs_gpu  # noqa: F401
from tests.ops.test_linear_cross_entropy import plain, problem


def on_device(dtype: torch.dtype, **shape: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels = problem(dtype, **shape)
    hidden, weight = (x.detach().to(DEVICE).requires_grad_() for x in (hidden, weight))
    return hidden, weight, labels.to(DEVICE)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each launch, so that a test knows that the kernel was what it tested."""
    seen: list[int] = []
    original = cuda_cross_entropy.cross_entropy_

    def counted(logits: Tensor, *arguments: object, **keywords: object) -> None:
        seen.append(logits.shape[0])
        original(logits, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_cross_entropy, "cross_entropy_", counted)
    return seen


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("V", "chunk"), [(31, None), (64, 7), (130, 53)])
def test_matches_fp64(V: int, chunk: int | None, reduction: str, dtype: torch.dtype, launches: list[int]) -> None:
    hidden, weight, labels = on_device(dtype, V=V)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk=chunk)
    expected = plain(hidden.double(), weight.double(), labels, reduction)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    grads = torch.autograd.grad(loss, (hidden, weight), cotangent.to(loss.dtype))
    exact = torch.autograd.grad(expected, (hidden, weight), cotangent)
    low = plain(hidden, weight, labels, reduction)
    low_grads = torch.autograd.grad(low, (hidden, weight), cotangent.to(low.dtype))
    assert loss.dtype == torch.float32
    assert sum(launches) == hidden.shape[0] * (2 if reduction == "none" else 1)
    for value, reference, plain_value in zip((loss, *grads), (expected, *exact), (low, *low_grads), strict=True):
        # A loss alone may round to the right side in the plain evaluation; the logits' own rounding is the scale.
        allowed = max(2 * relative_error(plain_value, reference), torch.finfo(dtype).eps)
        assert relative_error(value, reference) <= allowed


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("columns", "stride", "offset"), [(5, 5, 0), (67, 67, 3), (72, 80, 0), (20000, 20001, 1)])
def test_rows_at_any_address(columns: int, stride: int, offset: int, dtype: torch.dtype) -> None:
    """Prefixes, words and tails of rows: every element is read once and written once, and none beside them."""
    rows = 3
    generator = torch.Generator().manual_seed(0)
    buffer = nan_filled(offset + rows * stride + 8, dtype=dtype, device=torch.device(DEVICE))
    logits = buffer[offset:].as_strided((rows, columns), (stride, 1), offset)
    logits.copy_(5 * torch.randn(rows, columns, generator=generator))
    labels = torch.tensor([0, -1, columns - 1], device=DEVICE)
    exact = logits.double()
    log_sum_exp = exact.logsumexp(-1)
    losses, lse = (nan_filled(rows, dtype=torch.float32, device=torch.device(DEVICE)) for _ in range(2))
    factors = torch.tensor([1.0, 2.0, -3.0], device=DEVICE)
    cuda_cross_entropy.cross_entropy_(
        logits, labels, -1, losses=losses, log_sum_exp=lse, write_gradients=True, factors=factors
    )
    counts = labels != -1
    expected = torch.where(counts, log_sum_exp - exact.gather(1, labels.clamp(min=0)[:, None])[:, 0], 0.0)
    eps = torch.finfo(torch.float32).eps
    assert torch.allclose(losses.double(), expected, rtol=0, atol=8 * eps * exact.abs().max().item())
    assert torch.allclose(lse.double()[counts], log_sum_exp[counts], rtol=4 * eps, atol=0)
    gradients = (exact - log_sum_exp[:, None]).exp()
    gradients[counts, labels[counts]] -= 1.0
    gradients *= (factors * counts)[:, None]
    # Rounded once to the dtype (fp16: with subnormals); the exponent's argument carries fp32's rounding of up to 2^5.
    rounding = torch.finfo(dtype).eps / 2 + 32 * eps
    assert torch.allclose(logits.double(), gradients, rtol=rounding, atol=2.0**-24 if dtype == FP16 else 0)
    beside = torch.ones_like(buffer, dtype=torch.bool)
    beside.as_strided((rows, columns), (stride, 1), offset).fill_(False)
    assert buffer[beside].isnan().all()


def test_hostile_logits() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [float("-inf"), 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=BF16, device=DEVICE)
    losses = nan_filled(3, dtype=torch.float32, device=torch.device(DEVICE))
    cuda_cross_entropy.cross_entropy_(
        logits, torch.tensor([0, 2, 3], device=DEVICE), -100, losses=losses, write_gradients=True
    )
    assert losses[0] == 0.0
    assert losses[1].isfinite()
    assert losses[2].isnan(), "a label beyond the columns must not pass for a loss"
    assert logits[:2].isfinite().all()
    assert logits[2].isnan().all()


def test_no_rows() -> None:
    hidden, weight, labels = on_device(BF16, N=0)
    assert linear_cross_entropy(hidden, weight, labels, reduction="sum") == 0


@needs_gpu
@pytest.mark.gpu
def test_same_bits_every_time_and_under_compile() -> None:
    hidden, weight, labels = on_device(BF16, N=3000, D=64, V=50257)

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(hidden, weight, labels)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    first, second, compiled = step(), step(), torch.compile(step)()
    for a, b, c in zip(first, second, compiled, strict=True):
        assert torch.equal(a, b)
        # The compiler rounds the product with the mean's factor once, eager mode twice.
        assert relative_error(c, a.double()) <= torch.finfo(a.dtype).eps
