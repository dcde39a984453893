"""Tolerances from measurement: an implementation may err a small multiple of what the plain formula errs in the same
precision.

`assert_as_accurate` compares the tested function with plain evaluations of the same mathematics by autograd: the
quadratic oracle in the dtype of the inputs and, where a state is involved, the recurrent oracle in fp32 (a state of few
keys is ill-conditioned: (q.k)^2 comes out of a sum of phi(q) phi(k) that cancels). The quadratic oracle in fp64, on the
same, already rounded inputs, counts as exact. The error of a result is the norm of its difference from the exact one
over the norm of the exact one. The tested error must stay below FACTOR times the largest plain error, or below
FLOOR_EPS roundings of the result's dtype where the plain ones happen to be exact. No tolerance is chosen by hand per
case, so a case that is hard in a precision gets as much room as the precision needs and no more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The plain evaluation keeps its output in fp32 for the backward pass; fused ones keep the rounded one, as every
# attention kernel does, and the gradient of gates, which sums terms that cancel, notices.
FACTOR = 2.5
# A sum of many terms in another order than the plain one may be this many roundings away even if the plain one is
# lucky.
FLOOR_EPS = 16.0
# In fp64 the exact result is no more precise than the tested one.
FP64_FLOOR = 1e-12


@dataclass
class Inputs:
    """Tensors of one call by name, those that need gradients, and the other keyword arguments."""

    tensors: dict[str, Tensor]
    keywords: dict[str, object] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Cast everything but log gates of a low-precision problem, which stay fp32 as the public functions demand."""
        return Inputs({name: x.detach().to(dtype) for name, x in self.tensors.items()}, self.keywords)


def make_inputs(
    B: int,
    T: int,
    Hq: int,
    Hk: int,
    K: int,
    V: int,
    *,
    dtype: torch.dtype,
    gated: bool = True,
    gate_shift: float = 3.0,
    seed: int = 0,
) -> Inputs:
    """Return Gaussian queries, keys and values and log-sigmoid gates with mean logit `gate_shift`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"Q": randn(B, T, Hq, K).to(dtype), "K": randn(B, T, Hk, K).to(dtype), "V": randn(B, T, Hk, V).to(dtype)}
    if gated:
        log_G = torch.nn.functional.logsigmoid(randn(B, T, Hk) * 2 + gate_shift)
        tensors["log_G"] = log_G.double() if dtype == torch.float64 else log_G
    return Inputs(tensors)


def evaluate(
    function: Callable[..., object], inputs: Inputs, cotangents: Sequence[Tensor] | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return outputs (`out0`, ...) and gradients (`grad_<name>`) of `function(**tensors, **keywords)`, and the
    cotangents used.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.tensors.items()}
    result = function(**leaves, **inputs.keywords)
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]
    if cotangents is None:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), [c.to(x) for x, c in zip(outputs, cotangents, strict=True)]
    )
    results = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results, list(cotangents)


def relative_error(x: Tensor, exact: Tensor, *, least_scale: float = 0.0) -> float:
    """Return |x - exact| / max(|exact|, least_scale) in the Euclidean norm (|x| where that is 0)."""
    difference = float((x.double() - exact.double()).norm())
    scale = max(float(exact.double().norm()), least_scale)
    return difference / scale if scale > 0 else difference


def assert_as_accurate(
    tested: Callable[..., object],
    plain: Callable[..., object],
    inputs: Inputs,
    *,
    plain_fp32: Callable[..., object] | None = None,
) -> None:
    """Assert that `tested` errs at most FACTOR times as much as plain evaluations; see above."""
    actual, cotangents = evaluate(tested, inputs)
    assert_results_as_accurate(actual, cotangents, plain, inputs, plain_fp32=plain_fp32)


def assert_results_as_accurate(
    actual: dict[str, Tensor],
    cotangents: Sequence[Tensor],
    plain: Callable[..., object],
    inputs: Inputs,
    *,
    plain_fp32: Callable[..., object] | None = None,
) -> None:
    """`assert_as_accurate` for results under the names of `evaluate`, computed elsewhere from `inputs`."""
    exact, _ = evaluate(plain, inputs.to(torch.float64), cotangents)
    references = [evaluate(plain, inputs, cotangents)[0]]
    dtype = inputs.tensors["Q"].dtype
    if plain_fp32 is not None:
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        references.append(evaluate(plain_fp32, inputs.to(arithmetic), cotangents)[0])
    assert actual.keys() == exact.keys()
    length = inputs.tensors["Q"].shape[1]
    row_terms = float((cotangents[0].double() * exact["out0"]).sum(-1).norm())
    failures = []
    for name, value in actual.items():
        assert torch.isfinite(value).all(), f"{name} is not finite"
        assert value.shape == exact[name].shape, f"{name}: {tuple(value.shape)} instead of {tuple(exact[name].shape)}"
        # The gradient of a log gate is a sum over the sequence of terms that cancel, each about grad_out . out.
        of_gates = name == "grad_log_G"
        least_scale = row_terms if of_gates else 1e-3 * row_terms if dtype == torch.float64 else 0.0
        floor = max(FLOOR_EPS, 4 * length**0.5 if of_gates else 0.0) * torch.finfo(value.dtype).eps
        error = relative_error(value, exact[name], least_scale=least_scale)
        plain_error = max(relative_error(x[name], exact[name], least_scale=least_scale) for x in references)
        allowed = max(FACTOR * plain_error, FP64_FLOOR if dtype == torch.float64 else floor)
        if not error <= allowed:
            failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    assert not failures, "; ".join(failures)
