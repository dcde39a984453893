"""The CUDA path against fp64 on the same inputs: no result may err more than twice what the plain formula errs in the
same 16-bit type.

Every output and workspace starts as NaN here (torch fills what it allocates), so an element that a kernel forgets to
write, or reads before it is written, shows. On a GPU each case runs on the kernels that the device would choose and on
the sm80 ones; without one, the sm80 kernels run emulated, on fewer and smaller cases.
"""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.stage_calls import Problem
from powertrain import native
from powertrain.native import loader
from powertrain.ops import api, cuda, cuda_plan, power_retention, power_retention_with_normalizer
from powertrain.ops.cuda_ops import (
    final_state_cuda_op,
    initial_state_grad_cuda_op,
)
from powertrain.ops.cuda_plan import BLOCK, begun_bytes, choose_chunk_size, saved_bytes
from powertrain.ops.reference import power_retention_quadratic
from powertrain.ops.sympow import phi_dimension
from tests.ops.emulation import emulated_library

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")

BF16, FP16 = torch.bfloat16, torch.float16
FACTOR = 2.0
SMALL = 64 if ON_GPU else 32  # head dim of tests that are not about it


def nan_filled(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a test itself allocates for a kernel to write."""
    return torch.full(size, torch.nan, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    # In this mode torch fills new memory with NaN, and bytes with 255: a NaN again in bf16, fp16 and fp32 alike.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def loaded_kernels(*, without: tuple[str, ...]) -> Iterator[None]:
    """On a GPU the real library, else the emulated one without some architectures' kernels."""
    if ON_GPU:
        native.load_kernels()
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POWERTRAIN_KERNELS_LIBRARY", str(emulated_library(without=without)))
        patch.setattr(cuda_plan, "DEVICE_TYPES", ["cpu"])
        _forget_library()
        native.load_kernels()
        yield
    _forget_library()


@pytest.fixture(scope="module", autouse=True)
def _library() -> Iterator[None]:
    with loaded_kernels(without=("sm90",)):
        yield


def _forget_library() -> None:
    for cached in (loader._load_once, cuda._load_library):
        cached.cache_clear()
    api.forget_decisions()


@pytest.fixture(params=[0, 80] if ON_GPU else [80], ids=["chosen", "sm80"] if ON_GPU else ["emulated"], autouse=True)
def _arch(request: pytest.FixtureRequest) -> Iterator[None]:
    with cuda.force_arch(request.param):
        yield


@dataclass(frozen=True)
class Case:
    B: int = 1
    T: int = 300
    Hq: int = 2
    Hk: int = 2
    D: int = 64
    chunk_size: int | None = 128
    dtype: torch.dtype = BF16
    gate: float | None = 0.02  # mean of -log_G
    documents: bool | tuple[int, ...] = False  # some of every kind, or starts within each row
    state: bool = False

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator(device=DEVICE).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=DEVICE)

        B, T, D = self.B, self.T, self.D
        result = {
            "Q": randn(B, T, self.Hq, D).to(self.dtype),
            "K": randn(B, T, self.Hk, D).to(self.dtype),
            "V": randn(B, T, self.Hk, D).to(self.dtype),
        }
        if self.gate is not None:
            result["log_G"] = -2 * self.gate * torch.rand(B, T, self.Hk, generator=generator, device=DEVICE)
        if self.state:
            before = replace(self, T=50, state=False, documents=False).tensors(seed + 1)
            with torch.no_grad():
                _, state, total = power_retention_quadratic(**{name: x.double() for name, x in before.items()})
            result |= {"initial_state": state.float(), "sum_of_keys": total.float()}
        return result

    def keywords(self) -> dict[str, Any]:
        if not self.documents:
            return {}
        B, T = self.B, self.T
        inner = {1, 2, T // 3, T // 2, T - 1, 64, 65, 128} if self.documents is True else set(self.documents)
        offsets = sorted(
            {0, B * T} | {row * T + at for row in range(B) for at in {0} | {i for i in inner if 0 < i < T}}
        )
        return {"cu_seqlens": torch.tensor([*offsets, B * T, B * T], dtype=torch.int32, device=DEVICE)}


def evaluate(
    function: Any, tensors: dict[str, Tensor], cotangents: list[Tensor] | None, **keywords: Any
) -> tuple[dict[str, Tensor], list[Tensor]]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    result = function(**leaves, **keywords)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if cotangents is None:
        generator = torch.Generator(device=DEVICE).manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator, device=DEVICE).to(x.dtype) for x in outputs]
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=True)]
    )
    named = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    return named | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}, cotangents


def oracle(states: bool) -> Any:
    def function(**arguments: Any) -> Any:
        out, state, total = power_retention_quadratic(**arguments)
        return (out, state, total) if states else out

    return function


def relative_error(x: Tensor, exact: Tensor) -> float:
    norm = exact.double().norm()
    difference = (x.double() - exact.double()).norm()
    return float(difference / norm) if norm > 0 else float(difference)


def measure(case: Case, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Errors (ours, plain) of every output and gradient."""
    tensors = case.tensors(seed)
    return errors_of(case, tensors, *in_one_call(case, tensors))


def in_one_call(case: Case, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Results by name, and cotangents."""
    keywords = {"chunk_size": case.chunk_size, "return_final_state": case.state, "impl": "cuda", **case.keywords()}
    return evaluate(power_retention, tensors, None, **keywords)


def errors_of(
    case: Case, tensors: dict[str, Tensor], ours: dict[str, Tensor], cotangents: list[Tensor]
) -> dict[str, tuple[float, float]]:
    """Errors (ours, plain) of the results by name."""
    function, keywords = oracle(case.state), case.keywords()
    exact, _ = evaluate(function, {name: x.double() for name, x in tensors.items()}, cotangents, **keywords)
    low = {name: x if name == "log_G" else x.to(case.dtype) for name, x in tensors.items()}
    plain, _ = evaluate(function, low, cotangents, **keywords)
    errors = {}
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert torch.isfinite(value).all(), f"{name} is not finite"
        errors[name] = relative_error(value, exact[name]), relative_error(plain[name], exact[name])
    return errors


def assert_accurate(case: Case, seed: int = 0) -> None:
    assert_small(case, measure(case, seed))


def assert_small(case: Case, errors: dict[str, tuple[float, float]]) -> None:
    failures = []
    # Where the plain formula overflows in fp16, some row's weights nearly all vanish: here subnormal, not exact.
    overflows = not all(math.isfinite(plain) for _, plain in errors.values())
    for name, (error, plain) in errors.items():
        allowed = 0.1 if overflows else max(FACTOR * plain, 2 * torch.finfo(case.dtype).eps)
        if not error <= allowed:
            failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    assert not failures, "; ".join(failures)


CASES = {
    "one_token": Case(T=1),
    "two_tokens": Case(T=2, B=3),
    "one_block": Case(T=64),
    "below_block": Case(T=63),
    "above_block": Case(T=65, chunk_size=64),
    "chunks": Case(T=640),
    "ragged": Case(T=517, chunk_size=192),
    "ungated": Case(T=512, gate=None),
    "one_chunk": Case(T=900, chunk_size=1024),
    "long_chunk": Case(T=700, chunk_size=512),
    "default_chunk": Case(T=3000, chunk_size=None, Hq=1, Hk=1),
    "batch": Case(B=3, T=200),
    "gqa": Case(Hq=6, Hk=2, T=400),
    "gqa_one_key_head": Case(Hq=4, Hk=1, T=330, B=2),
    "gqa_above_block": Case(Hq=2, Hk=1, T=65, chunk_size=64),
    "strong_gates": Case(T=400, gate=3.0),
    "documents": Case(T=400, documents=True),
    "documents_in_batch": Case(B=3, T=250, documents=True, Hq=4),
    "documents_ungated": Case(T=400, documents=True, gate=None),
    "state": Case(T=300, state=True),
    "state_gqa": Case(T=200, state=True, Hq=4, B=2),
    "state_ungated": Case(T=257, state=True, gate=None),
    "state_one_chunk": Case(T=100, state=True),
    "state_documents": Case(T=330, state=True, documents=True),
    # Four chunks make a span, at whose end alone the gates' gradient starts from states, unless decays are strong.
    "spans": Case(T=700, chunk_size=64, gate=2e-3),
    "spans_forgotten": Case(T=700, chunk_size=64, gate=0.015),
    "spans_gqa_documents": Case(T=600, chunk_size=64, gate=2e-3, Hq=4, documents=(64, 130, 400, 448)),
    "spans_state": Case(B=2, T=450, chunk_size=64, gate=2e-3, Hk=1, state=True),
    "spans_state_documents": Case(T=400, chunk_size=64, gate=2e-3, state=True, documents=(150, 320)),
}


# The emulation takes seconds a case: every kind of case at K = 32, the kinds of index arithmetic at the others.
EMULATED_DIMS = {
    "one_token": (32, 64, 128),
    "above_block": (32, 64, 128),
    "gqa_above_block": (128,),  # its gradient has code of its own there
    "ragged": (32, 64),
    "state_one_chunk": (32, 64),
}
EMULATED_FP16 = {"one_token", "above_block", "ragged", "gqa_one_key_head", "strong_gates", "state", "spans_state"}
NOT_EMULATED = {"default_chunk", "one_chunk", "long_chunk", "documents_in_batch", "state_gqa", "batch"}


def of_head_dim(case: Case, head_dim: int) -> Case:
    """The case at a head dim; the emulation takes one key head at the widest, as they are counted at the others."""
    return replace(case, D=head_dim, **({} if ON_GPU or head_dim < 128 else {"Hq": case.Hq // case.Hk, "Hk": 1}))


def _grid() -> Iterator[Any]:
    for name in CASES:
        for head_dim in (32, 64, 128):
            for dtype in (BF16, FP16):
                dims = EMULATED_DIMS.get(name, (32,))
                is_slow = name in NOT_EMULATED or head_dim not in dims or (dtype == FP16 and name not in EMULATED_FP16)
                if not ON_GPU and is_slow:
                    continue
                yield pytest.param(name, head_dim, dtype, id=f"{name}-{head_dim}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("name", "head_dim", "dtype"), list(_grid()))
def test_output_and_gradients_are_as_accurate_as_the_formula(name: str, head_dim: int, dtype: torch.dtype) -> None:
    assert_accurate(replace(of_head_dim(CASES[name], head_dim), dtype=dtype))


@pytest.mark.skipif(ON_GPU, reason="the seeds are of the CPU's generator")
@pytest.mark.parametrize("seed", [0, 4])
def test_gate_gradients_do_not_drift_along_a_chunk(seed: int) -> None:
    # A pair of tokens adds one number to its query's sum and subtracts it from its key's. Where both sides round it
    # differently, the gradients of a chunk's first gates collect the errors of all its pairs: 3 and 9 eps here.
    case = Case(T=1000, chunk_size=1024, Hq=1, Hk=1, D=SMALL, dtype=FP16)
    tensors = case.tensors(seed)
    ours, cotangents = evaluate(power_retention, tensors, None, chunk_size=case.chunk_size, impl="cuda")
    exact, _ = evaluate(oracle(False), {name: x.double() for name, x in tensors.items()}, cotangents)
    wrong = (ours["grad_log_G"].double() - exact["grad_log_G"])[0, 1:129].mean()
    assert wrong.abs() <= torch.finfo(FP16).eps * exact["grad_log_G"].square().mean().sqrt()


@pytest.mark.parametrize("seed", range(2))
def test_gate_gradients_do_not_collect_the_rounding_of_forgotten_states(seed: int) -> None:
    # Added up over the four chunks of a span through gates that let nothing pass, the error would be four times this.
    case = Case(T=1024, chunk_size=64, Hq=1, Hk=1, D=SMALL, gate=0.5)
    error, plain = measure(case, seed)["grad_log_G"]
    assert error <= plain


@needs_gpu
@pytest.mark.parametrize("seed", range(3))
def test_fresh_inputs(seed: int) -> None:
    assert_accurate(Case(T=777, Hq=4, Hk=2, B=2), seed)


def random_inputs(T: int = 300, **changes: Any) -> dict[str, Tensor]:
    return Case(T=T, **{"D": SMALL, **changes}).tensors()


@pytest.mark.parametrize("documents", [False, True])
def test_two_runs_give_the_same_bits(documents: bool) -> None:
    case = Case(
        B=2, T=1500 if ON_GPU else 150, Hq=4, Hk=2, chunk_size=64, D=SMALL, state=not documents, documents=documents
    )
    runs = [
        evaluate(power_retention, case.tensors(), None, chunk_size=case.chunk_size, impl="cuda", **case.keywords())[0]
        for _ in range(2)
    ]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@needs_gpu
def test_strided_inputs_need_no_copy() -> None:
    B, T, H, D = 2, 300, 2, 64
    packed = torch.randn(B, T, 3 * H, D, device=DEVICE).to(BF16)
    heads_first = torch.randn(B, H, T, D, device=DEVICE).to(BF16)
    odd = torch.randn(B, T, H, D + 3, device=DEVICE).to(BF16)  # rows that are not aligned to 16 bytes
    q, k, v = packed[:, :, :H], heads_first.transpose(1, 2), odd[..., 1 : D + 1]
    expected = power_retention(q.contiguous(), k.contiguous(), v.contiguous(), chunk_size=128, impl="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    out = power_retention(q, k, v, chunk_size=128, impl="cuda")
    strided = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    power_retention(q.contiguous(), k, v.contiguous(), chunk_size=128, impl="cuda")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == strided + 2
    assert torch.equal(out, expected)


def test_strided_gradient_of_the_output() -> None:
    tensors = random_inputs()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    out = power_retention(**leaves, chunk_size=128, impl="cuda")
    grad = torch.randn(*out.shape[:3], 2 * out.shape[3], device=DEVICE).to(BF16)
    strided = torch.autograd.grad(out, list(leaves.values()), grad[..., ::2], retain_graph=True)
    dense = torch.autograd.grad(out, list(leaves.values()), grad[..., ::2].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_a_sequence_in_two_calls_is_the_sequence_in_one() -> None:
    tensors = random_inputs(T=500)
    whole, state, total = power_retention(**tensors, chunk_size=128, return_final_state=True, impl="cuda")
    first = power_retention(
        **{n: x[:, :200] for n, x in tensors.items()}, chunk_size=128, return_final_state=True, impl="cuda"
    )
    second = power_retention(
        **{n: x[:, 200:] for n, x in tensors.items()}, chunk_size=128, return_final_state=True, impl="cuda",
        initial_state=first[1], sum_of_keys=first[2],
    )  # fmt: skip
    assert relative_error(torch.cat([first[0], second[0]], 1), whole) < 2e-2
    assert relative_error(second[1], state) < 1e-2
    assert relative_error(second[2], total) < 1e-2
    assert state.shape == (1, 2, phi_dimension(SMALL, 2), SMALL)


@pytest.mark.parametrize("sizes", [(1e-6, 1.0), (1.0, 1e-6)], ids=["state", "output"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_cotangents_of_different_sizes(dtype: torch.dtype, sizes: tuple[float, float]) -> None:
    """fp16 has one scale for what comes from the output and from the final state: the larger keeps its accuracy."""
    tensors = Case(T=130, D=SMALL, dtype=dtype).tensors()
    _, cotangents = evaluate(oracle(True), {name: x.double() for name, x in tensors.items()}, None)
    cotangents = [
        (c * (sizes[0] if i == 0 else sizes[1])).to(dtype if i == 0 else torch.float32)
        for i, c in enumerate(cotangents)
    ]
    exact, _ = evaluate(oracle(True), {name: x.double() for name, x in tensors.items()}, cotangents)
    ours, _ = evaluate(power_retention, tensors, cotangents, chunk_size=64, return_final_state=True, impl="cuda")
    for name in ("grad_K", "grad_V"):
        assert relative_error(ours[name], exact[name]) < 4 * torch.finfo(dtype).eps, name
    assert all(torch.isfinite(x).all() for x in ours.values())


@pytest.mark.parametrize(("dtype", "keep"), [(BF16, False), (BF16, True), (FP16, False)], ids=["bf16", "kept", "fp16"])
@pytest.mark.parametrize("chunk_size", [64, 128, 256])
def test_states_at_the_ends_without_outputs(chunk_size: int, dtype: torch.dtype, keep: bool) -> None:
    """They are those of the whole op: the final state from an empty one, and the gradient that the outputs give."""
    case = Case(B=2, T=200, Hq=4, Hk=2, D=SMALL, dtype=dtype, documents=True, state=True)
    tensors, cu_seqlens = case.tensors(), case.keywords()["cu_seqlens"]
    leaves = [tensors.pop(name).requires_grad_() for name in ("initial_state", "sum_of_keys")]
    q, k, v, log_g = (tensors[name] for name in ("Q", "K", "V", "log_G"))
    expected = list(
        power_retention(**tensors, cu_seqlens=cu_seqlens, chunk_size=chunk_size, return_final_state=True, impl="cuda")[
            1:
        ]
    )
    *found, begun = final_state_cuda_op(q, k, v, log_g, cu_seqlens, chunk_size, keep, cuda.forced_arch())
    assert (begun.numel() > 0) == keep

    out, _, _, saved = cuda.power_retention_cuda(q, k, v, log_g, *leaves, cu_seqlens, chunk_size, False)
    grad_out = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).to(dtype)
    expected += torch.autograd.grad(out, leaves, grad_out)
    *grads, begun = initial_state_grad_cuda_op(grad_out, out.detach(), saved, 2, chunk_size, keep, cuda.forced_arch())
    assert (begun.numel() > 0) == keep
    for ours, theirs in zip(found + grads, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_leaks_across_documents() -> None:
    tensors = random_inputs(T=400)
    cu_seqlens = torch.tensor([0, 150, 400], dtype=torch.int32, device=DEVICE)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out = power_retention(**leaves, chunk_size=64, cu_seqlens=cu_seqlens, impl="cuda")
    grads = torch.autograd.grad(out[:, 150:].float().square().sum(), list(leaves.values()))
    assert all(not grad[:, :150].any() for grad in grads)
    poisoned = {name: x.clone() for name, x in tensors.items()}
    for name in "QKV":
        poisoned[name][:, :150] *= 100
    again = power_retention(**poisoned, chunk_size=64, cu_seqlens=cu_seqlens, impl="cuda")
    assert torch.equal(again[:, 150:], out[:, 150:])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "kind",
    [
        "zeros",
        "zero_queries",
        "closed_gates",
        "huge_key",
        "large_scores",
        "tiny",
        "nearly_orthogonal",
        "documents_of_one",
    ],
)
def test_hostile_inputs_give_finite_results(kind: str, dtype: torch.dtype) -> None:
    tensors = random_inputs(T=300, dtype=dtype)
    keywords: dict[str, Any] = {}
    cotangents: list[Tensor] | None = None
    if kind == "zeros":
        tensors = {name: torch.zeros_like(x) for name, x in tensors.items()}
    elif kind == "zero_queries":
        tensors["Q"][:, ::3] = 0
    elif kind == "closed_gates":
        tensors["log_G"][:, ::2] = -50
        tensors["log_G"][:, 100] = -math.inf
    elif kind == "huge_key":
        tensors["K"][:, 77] = 3e4
    elif kind == "large_scores":  # |scale q.k| up to 1e3
        tensors["Q"], tensors["K"] = (
            torch.sign(tensors[n].float()).mul(math.sqrt(1e3 / math.sqrt(SMALL))).to(dtype) for n in "QK"
        )
    elif kind == "tiny":
        small = 1e-6 if dtype == BF16 else 1e-3  # gradients grow as much, and have to fit the type
        tensors["Q"] *= small
        tensors["K"] *= small
    elif kind == "nearly_orthogonal":  # lengthened to make up for it, all queries together would make states overflow
        cotangents = [torch.ones_like(tensors["V"])]
        tensors["Q"].zero_()[:, 64:, :, 0] = 1
        tensors["Q"][:, :64, :, 1] = 1
        tensors["K"].mul_(2**6)[..., 0] = 2**-2
        tensors["V"].fill_(1)
        tensors["log_G"].fill_(-1e-3)
    else:
        keywords["cu_seqlens"] = torch.arange(301, dtype=torch.int32, device=DEVICE)
    results, _ = evaluate(power_retention, tensors, cotangents, chunk_size=64, impl="cuda", **keywords)
    for name, value in results.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_large_scores_stay_accurate(dtype: torch.dtype) -> None:
    tensors = random_inputs(T=512, dtype=dtype)
    factor = math.sqrt(
        1e3 / (tensors["Q"].float().norm(dim=-1).max() * tensors["K"].float().norm(dim=-1).max() / math.sqrt(SMALL))
    )
    small = evaluate(power_retention, tensors, None, chunk_size=128, impl="cuda")[0]["out0"]
    tensors["Q"], tensors["K"] = ((tensors[n].double() * factor).to(dtype) for n in "QK")
    exact = power_retention_quadratic(**{n: x.double() for n, x in tensors.items()})[0]
    out = power_retention(**tensors, chunk_size=128, impl="cuda")
    assert relative_error(out, exact) < 4 * torch.finfo(dtype).eps
    assert relative_error(small, exact) < 0.1  # the scale cancels up to the rounding of the inputs


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("d", [0.01, 0.04, 1.0])
def test_gradients_of_states_stay_within_fp16(d: float, group: int) -> None:
    # All queries are alike and meet one key: what they give to a state's gradient adds up, and all ask to be
    # lengthened. Features of different blocks are doubled in states.
    T = 4096 // group
    q = torch.zeros(1, T, group, SMALL, dtype=FP16, device=DEVICE)
    k = torch.zeros(1, T, 1, SMALL, dtype=FP16, device=DEVICE)
    q[..., 0] = q[..., 8] = 1
    k[:, 0, :, 0], k[:, 0, :, 2] = math.sqrt(d), 1
    tensors = {"Q": q, "K": k, "V": torch.ones_like(k)}
    results, _ = evaluate(power_retention, tensors, [torch.ones_like(q)], chunk_size=256, impl="cuda")
    for name, value in results.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_a_lengthened_query_meets_keys_of_any_weight(head_dim: int) -> None:
    # Token 200 remembers the keys before it faintly, and is lengthened; its score with them is the largest there is.
    q, k = (torch.zeros(1, 300, 1, head_dim, dtype=FP16, device=DEVICE) for _ in range(2))
    q[:, :64], k[:, :64], q[:, 200] = 1, 1, 1
    tensors = {"Q": q, "K": k, "V": torch.ones_like(k), "log_G": torch.full((1, 300, 1), -0.2, device=DEVICE)}
    results, _ = evaluate(power_retention, tensors, [torch.ones_like(q)], chunk_size=512, impl="cuda")
    for name, value in results.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("chunk_size", [128, 1024])
def test_a_small_normalizer_does_not_take_the_range_of_fp16(chunk_size: int) -> None:
    case = Case(T=1000, Hq=1, Hk=1, D=SMALL, dtype=FP16, chunk_size=chunk_size, gate=1e-3)
    tensors = case.tensors()
    q, k = tensors["Q"][0, 0, 0].double(), tensors["K"][0, 0, 0].double()
    tensors["K"][0, 0, 0] += (0.25 - q @ k) / q.square().sum() * q  # d is 0.06 there, and up to 3e5 elsewhere
    assert_small(case, errors_of(case, tensors, *in_one_call(case, tensors)))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_normalizer(dtype: torch.dtype) -> None:
    case = Case(B=2, T=200, Hq=4, Hk=2, D=SMALL, dtype=dtype, chunk_size=64)
    tensors = case.tensors()
    _, normalizer, _, _ = power_retention_with_normalizer(**tensors, chunk_size=64, impl="cuda")
    exact = power_retention_with_normalizer(**{n: x.double() for n, x in tensors.items()}, impl="torch")[1]
    assert normalizer.shape == (2, 200, 4)
    assert relative_error(normalizer, exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("T", "chunk_size", "state"), [(1, 64, False), (200, 64, False), (256, 256, True), (1000, 192, False)]
)
def test_size_in_python_agrees_with_the_library(head_dim: int, T: int, chunk_size: int, state: bool) -> None:
    for dtype in (BF16, FP16):
        sizes = (ctypes.c_int64 * 5)()  # pt_pass_sizes: saved, two workspaces, the offset of the scales, begun
        problem = Problem(int(dtype == FP16), 0, 3, 4, 2, head_dim, chunk_size, 1.0, T)
        native.call("pt_pass_sizes_of", ctypes.byref(problem), 0, int(state), 0, ctypes.byref(sizes))
        size = saved_bytes(
            batch=3, tokens=T, query_heads=4, key_heads=2, head_dim=head_dim, chunk_size=chunk_size, has_state=state,
            scaled=dtype == FP16,
        )  # fmt: skip
        assert sizes[0] == size
        assert sizes[3] == size - (4 * 3 * (4 + 2 * 2) if dtype == FP16 else 0)
        assert sizes[4] == 0
    problem.dtype = 0
    for phase in (1, 2):
        native.call("pt_pass_sizes_of", ctypes.byref(problem), phase, 1, 1, ctypes.byref(sizes))
        shape = {
            "batch": 3,
            "tokens": T,
            "query_heads": 4,
            "key_heads": 2,
            "head_dim": head_dim,
            "chunk_size": chunk_size,
        }
        assert sizes[0] == saved_bytes(**shape, has_state=True, scaled=False)
        assert sizes[4] == begun_bytes(**shape)


@needs_gpu
def test_million_tokens_use_64_bit_offsets() -> None:
    T, H, D = 1 << 20, 4, 128  # 2^29 elements each: byte offsets beyond 2^30, states beyond 2^32 bytes
    q, k, v = (torch.randn(1, T, H, D, device=DEVICE, dtype=BF16) for _ in range(3))
    log_g = torch.full((1, T, H), -0.01, device=DEVICE)
    out = power_retention(q, k, v, log_g, chunk_size=1024, impl="cuda")
    tail = [x[:, -4096:, -1:] for x in (q, k, v, log_g)]  # beyond some thousand tokens nothing is left of older ones
    exact = power_retention_quadratic(*(x.double() for x in tail))[0]
    assert relative_error(out[:, -256:, -1:], exact[:, -256:]) < 1e-2


def test_chosen_chunk_is_a_usable_one() -> None:
    for T in (1, 63, 64, 65, 1000, 4096, 65536, 1 << 20):
        for D in (32, 64, 128):
            chunk = choose_chunk_size(tokens=T, head_dim=D, query_heads_per_key_head=4, has_state=False)
            assert chunk % BLOCK == 0
            assert chunk <= max(BLOCK, -(-T // BLOCK) * BLOCK)
