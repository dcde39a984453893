"""The CUDA path under torch's own machinery: opcheck, compile, autocast, checkpointing, FLOP counting, streams, graphs,
several devices, dispatch and its errors.
"""

import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from powertrain import native
from powertrain.ops import api, cuda, cuda_plan, power_retention
from powertrain.ops.cuda_ops import (
    power_retention_cuda_bwd_op,
    power_retention_cuda_op,
)
from powertrain.ops.flops import power_retention_flops
from tests.ops.test_cuda import BF16, DEVICE, FP16, SMALL, Case, _arch, _library, evaluate, needs_gpu  # noqa: F401

CASE = Case(T=130, chunk_size=64, D=SMALL, Hq=2, Hk=1)


def op_arguments(case: Case, *, final_state: bool = False) -> tuple[Any, ...]:
    tensors = case.tensors()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    names = ("Q", "K", "V", "log_G", "initial_state", "sum_of_keys")
    cu_seqlens = case.keywords().get("cu_seqlens")
    return *(leaves.get(name) for name in names), cu_seqlens, case.chunk_size, final_state, 80


@pytest.mark.parametrize("kind", ["gated", "ungated", "state", "documents", "fp16"])
def test_opcheck(kind: str) -> None:
    case = Case(
        T=70,
        chunk_size=64,
        D=SMALL,
        Hq=2,
        Hk=1,
        gate=None if kind == "ungated" else 0.02,
        state=kind == "state",
        documents=kind == "documents",
        dtype=FP16 if kind == "fp16" else BF16,
    )
    arguments = op_arguments(case, final_state=kind == "state")
    torch.library.opcheck(power_retention_cuda_op, arguments)
    with torch.no_grad():
        out, state, total, saved = power_retention_cuda_op(*arguments)
    final = (torch.randn_like(state), torch.randn_like(total)) if kind == "state" else (None, None)
    flags = 1, kind != "ungated", kind == "state", 64, 80
    backward = torch.randn_like(out), *final, out, saved, arguments[6], *flags
    torch.library.opcheck(power_retention_cuda_bwd_op, backward)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_the_same_values(dynamic: bool) -> None:
    def function(**arguments: Tensor) -> Tensor:
        return power_retention(**arguments, chunk_size=64, impl="cuda") * 2

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (130, 200):
        tensors = Case(T=length, D=SMALL).tensors()
        expected, cotangents = evaluate(function, tensors, None)
        values, _ = evaluate(compiled, tensors, cotangents)
        for name, value in values.items():
            assert torch.equal(value, expected[name]), name


def test_autocast_runs_the_kernels_on_fp32_parameters() -> None:
    tensors = {name: x.float() for name, x in CASE.tensors().items()}
    with torch.autocast(DEVICE, dtype=BF16):
        out = power_retention(**tensors, chunk_size=64, impl="cuda")
    assert out.dtype == BF16
    low = {name: x if name == "log_G" else x.to(BF16) for name, x in tensors.items()}
    assert torch.equal(out, power_retention(**low, chunk_size=64, impl="cuda"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    names = tuple(CASE.tensors())

    def function(*arguments: Tensor) -> Tensor:
        return power_retention(**dict(zip(names, arguments, strict=True)), chunk_size=64, impl="cuda")

    def checkpointed(**arguments: Tensor) -> Any:
        return checkpoint(function, *arguments.values(), use_reentrant=use_reentrant)

    expected, cotangents = evaluate(lambda **a: function(*a.values()), CASE.tensors(), None)
    leaves = {name: x.requires_grad_() for name, x in CASE.tensors().items()}
    out = checkpointed(**leaves)
    out.backward(cotangents[0])
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[f"grad_{name}"]), name


def test_vmap_takes_the_op() -> None:
    """Its tensors have no data to point at. (On a CPU the public function looks at log_G's values, and is refused.)"""
    stacked = [torch.stack([x, x.flip(1)]) for x in CASE.tensors().values()]

    def function(*arguments: Tensor) -> Tensor:
        return cuda.power_retention_cuda(*arguments, None, None, None, 64, False)[0]

    out = torch.vmap(function)(*stacked)
    for i in range(2):
        assert torch.equal(out[i], function(*(x[i] for x in stacked)))


def test_flop_counter_sees_the_registered_formula() -> None:
    case = Case(B=2, T=200, Hq=4, Hk=2, D=SMALL, chunk_size=64)
    leaves = {name: x.requires_grad_() for name, x in case.tensors().items()}
    with FlopCounterMode(display=False) as counter:
        power_retention(**leaves, chunk_size=64, impl="cuda").sum().backward()
    expected = power_retention_flops(
        batch=2, tokens=200, query_heads=4, key_heads=2, key_dim=SMALL, value_dim=SMALL, deg=2, chunk_size=64,
        executed=False, device_type="cuda",
    )  # fmt: skip
    assert counter.get_total_flops() == expected.forward.total + expected.backward.total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deg": 4}, "deg is 4"),
        ({"dtype": torch.float32}, "float32"),
        ({"D": 48}, "K = 48, V = 48"),
    ],
)
def test_forcing_cuda_on_what_it_cannot_do_says_why(change: dict[str, Any], message: str) -> None:
    deg = change.get("deg", 2)
    tensors = Case(T=20, **{name: value for name, value in change.items() if name != "deg"}).tensors()
    with pytest.raises(ValueError, match=message):
        power_retention(**tensors, deg=deg, impl="cuda")


def test_unsupported_head_dim_warns_once_and_takes_the_torch_path() -> None:
    tensors = Case(T=20, D=48, Hq=1, Hk=1).tensors()
    cuda._warned.clear()
    api.forget_decisions()
    if DEVICE == "cuda":
        with pytest.warns(UserWarning, match=r"PyTorch path.*48"):
            power_retention(**tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            power_retention(**tensors)
    assert torch.equal(power_retention(**tensors), power_retention(**tensors, impl="torch"))


@pytest.fixture
def _without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing() -> None:
        raise native.KernelsUnavailable("nvcc was not found: install it.")

    monkeypatch.setattr(native, "load_kernels", missing)
    cuda._load_library.cache_clear()
    cuda._warned.clear()
    api.forget_decisions()
    yield
    cuda._load_library.cache_clear()
    api.forget_decisions()


@pytest.mark.usefixtures("_without_library")
def test_without_a_library_one_warning_and_the_torch_path() -> None:
    tensors = Case(T=20, D=32).tensors()
    with pytest.warns(UserWarning, match="nvcc was not found"):
        out = power_retention(**tensors)
    assert torch.equal(out, power_retention(**tensors, impl="torch"))
    with pytest.raises(native.KernelsUnavailable, match="nvcc was not found"):
        power_retention(**tensors, impl="cuda")


def test_a_refused_call_raises_with_the_librarys_words() -> None:
    q = torch.randn(1, 10, 1, 32, device=DEVICE).to(BF16)
    with pytest.raises(RuntimeError, match="pt_pass_sizes_of: chunk_size 63: a positive multiple of 64"):
        power_retention_cuda_op(q, q, q, None, None, None, None, 63, False, 80)


def test_capability_and_devices_are_checked() -> None:
    q = torch.empty(1, 1, 1, 64, dtype=BF16, device="meta")
    reason = cuda_plan.unsupported(q, q, 2)
    assert reason is not None
    assert "meta" in reason


@needs_gpu
def test_other_streams() -> None:
    tensors = Case(T=600).tensors()
    expected = power_retention(**tensors, chunk_size=128, impl="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(10):
            busy = busy @ busy / 64
        late = {name: x + 0 * busy[0, 0].to(x.dtype) for name, x in tensors.items()}
        out = power_retention(**late, chunk_size=128, impl="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@needs_gpu
def test_cuda_graph_replays_with_new_inputs() -> None:
    static = {name: x.requires_grad_() for name, x in Case(T=600).tensors().items()}
    grad = torch.randn(1, 600, 2, 64, device="cuda").to(BF16)

    def step() -> tuple[Tensor, ...]:
        out = power_retention(**static, chunk_size=128, impl="cuda")
        return out, *torch.autograd.grad(out, list(static.values()), grad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    fresh = Case(T=600).tensors(seed=7)
    with torch.no_grad():
        for name, x in static.items():
            x.copy_(fresh[name])
    graph.replay()
    expected = step()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device() -> None:
    tensors = Case(T=300).tensors()
    there = {name: x.to("cuda:1") for name, x in tensors.items()}
    here, cotangents = evaluate(power_retention, tensors, None, impl="cuda")
    assert torch.cuda.current_device() == 0
    results, _ = evaluate(power_retention, there, [c.to("cuda:1") for c in cotangents], impl="cuda")
    for name, value in results.items():
        assert torch.equal(value.cpu(), here[name].cpu()), name


@needs_gpu
@pytest.mark.xfail(strict=True, reason="docs/kernels.md, section 4: the goal is 30 us, and Python alone costs more")
def test_host_overhead() -> None:
    tensors = Case(T=512, Hq=8, Hk=8).tensors()
    for _ in range(20):
        power_retention(**tensors, chunk_size=128)
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20):  # few enough to stay ahead of the launch queue
            power_retention(**tensors, chunk_size=128)
        best = min(best, (time.perf_counter() - start) / 20)
        torch.cuda.synchronize()
    assert best <= 30e-6, f"{best * 1e6:.1f} us"
