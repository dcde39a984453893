"""The ops under torch's own machinery: opcheck, compile, autocast, checkpointing and FLOP counting."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from powertrain.ops import (
    library,
    linear_attention,
    linear_cross_entropy,
    power_retention,
    power_retention_inference,
    softmax_attention,
    window_attention,
)
from powertrain.ops.blocked_attention import blocked_attention_bwd_op, blocked_attention_op
from powertrain.ops.flops import OpPassFlops, power_retention_flops, softmax_attention_flops
from powertrain.ops.library import power_retention_bwd_op, power_retention_op
from powertrain.ops.linear_cross_entropy import (
    linear_cross_entropy_per_token_bwd_op,
    linear_cross_entropy_per_token_op,
    linear_cross_entropy_sum_op,
)
from powertrain.ops.normalized import normalized_bwd, normalized_fwd
from tests.ops.accuracy import Inputs, assert_as_accurate, evaluate, make_inputs, relative_error

CU_SEQLENS = torch.tensor([0, 5, 20], dtype=torch.int32)


def op_arguments(
    *, gated: bool, state: bool, documents: bool, dtype: torch.dtype = torch.float32
) -> tuple[object, ...]:
    inputs = make_inputs(1, 20, 4, 2, 4, 3, dtype=dtype, gated=gated).tensors
    tensors = [inputs[name].requires_grad_() for name in "QKV"]
    log_g = inputs["log_G"].requires_grad_() if gated else None
    S = torch.rand(1, 2, 10, 3, requires_grad=True) if state else None
    s = torch.rand(1, 2, 10, requires_grad=True) if state else None
    return *tensors, log_g, S, s, CU_SEQLENS if documents else None, 0.5, 2, 8, state


@pytest.mark.parametrize("case", ["plain", "gated", "state", "documents"])
def test_opcheck_power_retention(case: str) -> None:
    arguments = op_arguments(gated=case != "plain", state=case == "state", documents=case == "documents")
    torch.library.opcheck(power_retention_op, arguments)
    with torch.no_grad():
        out, normalizer, state, total, saved = power_retention_op(*arguments)
    q, k, v, log_g, S, s, cu_seqlens, scale, deg, chunk_size, final = arguments
    grads = (
        torch.randn_like(out),
        torch.randn_like(state) if final else None,
        torch.randn_like(total) if final else None,
    )
    detached = [x.detach() if isinstance(x, Tensor) else x for x in (q, k, v, log_g, S, s, cu_seqlens)]
    torch.library.opcheck(power_retention_bwd_op, (*grads, *detached, out, normalizer, saved, scale, deg, chunk_size))


@pytest.mark.parametrize("gated", [True, False])
def test_opcheck_blocked_attention(gated: bool) -> None:
    q, k, v, log_g, *_ = op_arguments(gated=gated, state=False, documents=True)
    torch.library.opcheck(blocked_attention_op, (q, k, v, log_g, CU_SEQLENS, 0.5, 6))
    with torch.no_grad():
        out, lse = blocked_attention_op(q, k, v, log_g, CU_SEQLENS, 0.5, 6)
    detached = [None if x is None else x.detach() for x in (q, k, v, log_g)]
    torch.library.opcheck(blocked_attention_bwd_op, (torch.randn_like(out), *detached, CU_SEQLENS, out, lse, 0.5, 6))


def test_opcheck_linear_cross_entropy() -> None:
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.tensor([0, 6, -100, 3, 2, 1, -100, 5, 4])
    # Not the derivatives of its gradients, which it refuses; the test of a graph with dynamic lengths has the others.
    torch.library.opcheck(
        linear_cross_entropy_sum_op,
        (hidden, weight, labels, -100, 4, True, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    torch.library.opcheck(linear_cross_entropy_per_token_op, (hidden, weight, labels, -100, 4))
    with torch.no_grad():
        losses, lse = linear_cross_entropy_per_token_op(hidden, weight, labels, -100, 4)
    torch.library.opcheck(
        linear_cross_entropy_per_token_bwd_op,
        (torch.randn_like(losses), hidden.detach(), weight.detach(), labels, lse, -100, 4),
    )


@pytest.mark.slow
def test_compile_gives_the_same_values() -> None:
    inputs = make_inputs(1, 40, 4, 2, 6, 5, dtype=torch.float32)

    def layer(Q: Tensor, K: Tensor, V: Tensor, log_G: Tensor) -> Tensor:
        out = power_retention(Q * 2, K, V, log_G, chunk_size=16) + window_attention(Q, K, V, 7)
        hidden = out.flatten(2).flatten(0, 1)
        return linear_cross_entropy(hidden, hidden[:11], torch.arange(40) % 11)

    eager, _ = evaluate(layer, inputs)
    # A cache of compiled graphs does not notice changes of the ops' fake kernels.
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled, _ = evaluate(torch.compile(layer, fullgraph=True), inputs)
    for name, value in eager.items():
        assert relative_error(compiled[name], value) < 1e-5, name


def test_traces_to_one_graph_with_dynamic_lengths() -> None:
    """fullgraph compilation without code generation: no graph break, and another length gives its own values."""
    compiled = torch.compile(power_retention, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (17, 33):
        inputs = make_inputs(1, length, 2, 2, 4, 4, dtype=torch.float32)
        expected, _ = evaluate(power_retention, inputs)
        actual, _ = evaluate(compiled, inputs)
        for name, value in expected.items():
            assert relative_error(actual[name], value) < 1e-6, name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_heads_loss_traces_to_one_graph_with_dynamic_lengths(reduction: str) -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (17, 33):
        leaves = torch.randn(length, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        labels = torch.arange(length) % 7
        labels[::5] = -100
        expected, actual = (f(*leaves, labels, reduction=reduction) for f in (linear_cross_entropy, compiled))
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_casts_mixed_inputs() -> None:
    inputs = make_inputs(1, 30, 2, 2, 4, 4, dtype=torch.float32).tensors
    mixed = {**inputs, "V": inputs["V"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [power_retention(**mixed), softmax_attention(**mixed)]
        labels = torch.arange(30)
        loss = linear_cross_entropy(inputs["Q"][0, :, 0], torch.randn(30, 4, requires_grad=True), labels)
    assert [out.dtype for out in outputs] == [torch.bfloat16] * 2
    assert loss.dtype == torch.float32
    low = {name: x if name == "log_G" else x.bfloat16() for name, x in mixed.items()}
    assert torch.equal(outputs[0], power_retention(**low))


def forward_mode_calls() -> dict[str, Callable[[Tensor], Tensor]]:
    Q, K, V, log_G = make_inputs(1, 20, 2, 2, 4, 4, dtype=torch.float32).tensors.values()
    weight, labels = torch.randn(7, 4), torch.zeros(40, dtype=torch.int64)
    return {
        "power": lambda x: power_retention(x, K, V),
        "linear": lambda x: linear_attention(x, K, V),
        "gates": lambda x: power_retention(Q, K, V, log_G * x[..., 0]),
        "window": lambda x: window_attention(x, K, V, 3),
        "softmax": lambda x: softmax_attention(x, K, V, log_G),
        "mean": lambda x: linear_cross_entropy(x.flatten(0, 2), weight, labels),
        "none": lambda x: linear_cross_entropy(x.flatten(0, 2), weight, labels, reduction="none"),
    }


@pytest.mark.parametrize("case", forward_mode_calls())
def test_forward_mode_is_refused(case: str) -> None:
    """Rather than tangents of zero."""
    call, x = forward_mode_calls()[case], torch.rand(1, 20, 2, 4)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        assert call(x).isfinite().all()


def test_meta_tensors_have_shapes() -> None:
    inputs = {
        name: x.to("meta").requires_grad_()
        for name, x in make_inputs(2, 30, 4, 2, 4, 3, dtype=torch.float32).tensors.items()
    }
    outputs = power_retention(**inputs, return_final_state=True)
    assert [tuple(x.shape) for x in outputs] == [(2, 30, 4, 3), (2, 2, 10, 3), (2, 2, 10)]
    attention = [softmax_attention(**inputs), window_attention(**inputs, window=7)]
    ungated = [inputs[name] for name in "QKV"]
    attention += [softmax_attention(*ungated), linear_attention(*ungated)]
    assert all(x.shape == (2, 30, 4, 3) for x in attention)
    query = inputs["Q"][:, -1:]
    decoded = power_retention_inference(query, **{name: x for name, x in inputs.items() if name != "Q"})
    assert decoded[0].shape == (2, 1, 4, 3)
    loss = linear_cross_entropy(
        inputs["Q"].flatten(0, 2), inputs["K"][0, :, 0], torch.zeros(240, dtype=torch.int64, device="meta")
    )
    sum(x.sum() for x in (*outputs, *attention, loss)).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs.values())


def shown_ops(graphs: list[torch.fx.GraphModule]) -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(("deg", "shown"), [(1, True), (2, False)])
def test_a_compiler_sees_the_products_of_degree_1(deg: int, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SHOWN_ON", ["cpu"])
    inputs = make_inputs(2, 150, 4, 2, 8, 6, dtype=torch.float32)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph)

    def call(**tensors: torch.Tensor) -> torch.Tensor:
        return power_retention(**tensors, deg=deg, chunk_size=32)

    torch.compiler.reset()
    compiled = torch.compile(call, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    expected, _ = evaluate(call, inputs)
    actual, _ = evaluate(compiled, inputs)
    names = shown_ops(graphs)
    assert len(graphs) == 2
    assert any("power_retention" in name for name in names) is not shown
    assert any("bmm" in name for name in names) is shown
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-6, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("T", [700, 5000])
def test_compiled_linear_attention_on_a_gpu(T: int) -> None:
    """As accurate as the uncompiled op, in TF32 as in training; the heads of gates lie last, as a model's do."""
    inputs = make_inputs(2, T, 4, 2, 32, 32, dtype=torch.bfloat16)
    on_gpu = Inputs({name: x.cuda() for name, x in inputs.tensors.items()}, {"chunk_size": 128})
    torch.compiler.reset()
    torch.set_float32_matmul_precision("high")
    try:
        assert_as_accurate(torch.compile(linear_attention, dynamic=False), linear_attention, on_gpu)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_activation_checkpointing() -> None:
    inputs = make_inputs(1, 40, 2, 2, 4, 4, dtype=torch.float32)
    direct, _ = evaluate(lambda **kw: power_retention(**kw, chunk_size=16), inputs)
    recomputed, _ = evaluate(
        lambda **kw: checkpoint(lambda *xs: power_retention(*xs, chunk_size=16), *kw.values(), use_reentrant=False),
        inputs,
    )
    for name, value in direct.items():
        assert torch.equal(recomputed[name], value), name


# FlopCounterMode counts the out-of-place products only.
IN_PLACE = {
    torch.ops.aten.baddbmm_: lambda _, a, b, *args, **kwargs: 2 * math.prod(a) * b[-1],
    torch.ops.aten.addmm_: lambda _, a, b, *args, **kwargs: 2 * math.prod(a) * b[-1],
}


def count(function: object) -> int:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        function()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("T", "chunk_size", "Hq", "Hk", "deg", "state"),
    [
        (300, 300, 2, 2, 2, False),
        (300, 64, 2, 2, 2, False),
        (301, 64, 4, 2, 2, False),
        (301, 64, 2, 2, 2, True),
        (90, 300, 2, 1, 2, True),
        (130, 32, 2, 2, 4, False),
        (130, 32, 2, 2, 1, False),
        (9000, 64, 1, 1, 2, False),
    ],
)
def test_flop_formula_counts_the_products_that_run(
    T: int, chunk_size: int, Hq: int, Hk: int, deg: int, state: bool
) -> None:
    """The composite implementation, seen product by product, costs what the registered formula says."""
    B, K, V = 2, 6, 5
    inputs = make_inputs(B, T, Hq, Hk, K, V, dtype=torch.float32).tensors
    chunk_size = min(chunk_size, T)
    F = {1: 6, 2: 21, 4: 126}[deg]
    S, s = (torch.rand(B, Hk, F, V), torch.rand(B, Hk, F)) if state else (None, None)
    tensors = (inputs["Q"], inputs["K"], inputs["V"], inputs["log_G"], S, s, None)
    expected: OpPassFlops = power_retention_flops(
        batch=B, tokens=T, query_heads=Hq, key_heads=Hk, key_dim=K, value_dim=V, deg=deg, chunk_size=chunk_size,
        executed=True, initial_state=state, final_state=state,
    )  # fmt: skip
    results = {}

    def forward() -> None:
        results["forward"] = normalized_fwd(*tensors, 0.4, deg, chunk_size, state)

    assert count(forward) == expected.forward.total
    out, normalizer, _, _, saved = results["forward"]
    grads = (torch.ones_like(out), S, s)
    backward = (*grads, *tensors, out, normalizer, saved, 0.4, deg, chunk_size)
    assert count(lambda: normalized_bwd(*backward)) == expected.backward.total
    assert count(lambda: power_retention_op(*tensors, 0.4, deg, chunk_size, state)) == expected.forward.total
    assert count(lambda: power_retention_bwd_op(*backward)) == expected.backward.total


@pytest.mark.parametrize("window", [5, 200, 300])
def test_flop_formula_of_blocked_attention(window: int) -> None:
    inputs = make_inputs(2, 300, 4, 2, 6, 5, dtype=torch.float32).tensors
    arguments = (*inputs.values(), None, 0.4, window)
    expected = softmax_attention_flops(
        batch=2, tokens=300, query_heads=4, key_dim=6, value_dim=5, window=window, executed=True
    )
    assert count(lambda: blocked_attention_op(*arguments)) == expected.forward.total
    assert count(lambda: blocked_attention_op._init_fn(*arguments)) == expected.forward.total
    out, lse = blocked_attention_op(*arguments)
    backward = (out, *inputs.values(), None, out, lse, 0.4, window)
    assert count(lambda: blocked_attention_bwd_op(*backward)) == expected.backward.total
    assert count(lambda: blocked_attention_bwd_op._init_fn(*backward)) == expected.backward.total


def test_flop_formulas_count_the_blocks_of_the_device() -> None:
    """Those of a GPU are larger; a meta tensor is planned for one."""
    inputs = [x.to("meta") for x in make_inputs(1, 700, 4, 2, 6, 5, dtype=torch.float32).tensors.values()]
    sizes = {"batch": 1, "tokens": 700, "query_heads": 4, "key_dim": 6, "value_dim": 5, "executed": True}
    power = power_retention_flops(**sizes, key_heads=2, deg=2, chunk_size=700, device_type="cuda")
    window = softmax_attention_flops(**sizes, window=50, device_type="cuda")

    def power_op() -> tuple[Tensor, ...]:
        return power_retention_op(*inputs, None, None, None, 0.4, 2, 700, False)

    def window_op() -> tuple[Tensor, ...]:
        return blocked_attention_op(*inputs, None, 0.4, 50)

    assert count(power_op) == power.forward.total
    assert count(window_op) == window.forward.total
    out, normalizer, _, _, saved = power_op()
    backward = (out, None, None, *inputs, None, None, None, out, normalizer, saved, 0.4, 2, 700)
    assert count(lambda: power_retention_bwd_op(*backward)) == power.backward.total
    out, lse = window_op()
    assert count(lambda: blocked_attention_bwd_op(out, *inputs, None, out, lse, 0.4, 50)) == window.backward.total


def test_flop_formula_of_linear_cross_entropy() -> None:
    hidden, weight = torch.randn(20, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    labels = torch.arange(20) % 9
    products = 2 * 20 * 6 * 9
    for op, arguments, expected in (
        (linear_cross_entropy_sum_op, (hidden, weight, labels, -100, 8, True, True), 3 * products),
        (linear_cross_entropy_sum_op, (hidden, weight, labels, -100, 8, False, False), products),
        (linear_cross_entropy_per_token_op, (hidden, weight, labels, -100, 8), products),
        (
            linear_cross_entropy_per_token_bwd_op,
            (torch.ones(20), hidden, weight, labels, torch.ones(20), -100, 8),
            3 * products,
        ),
    ):
        with torch.no_grad():
            assert count(lambda op=op, arguments=arguments: op(*arguments)) == expected
            assert count(lambda op=op, arguments=arguments: op._init_fn(*arguments)) == expected


def test_sdpa_on_cpu_is_counted() -> None:
    Q, K, V = (torch.randn(1, 64, 2, 16, requires_grad=True) for _ in range(3))
    expected = softmax_attention_flops(
        batch=1, tokens=64, query_heads=2, key_dim=16, value_dim=16, executed=True, blocked=False
    )
    assert count(lambda: softmax_attention(Q, K, V)) == expected.forward.total
    assert (
        count(lambda: softmax_attention(Q, K, V).sum().backward()) == expected.forward.total + expected.backward.total
    )


def test_algorithmic_counts_match_the_published_floor() -> None:
    """Headline problem of docs/op.md: about 3.5e11 forward and 1.1e12 forward and backward."""
    flops = power_retention_flops(
        batch=1,
        tokens=65536,
        query_heads=8,
        key_heads=8,
        key_dim=64,
        value_dim=64,
        deg=2,
        chunk_size=1024,
        executed=False,
    )
    per_token = flops.forward.total / (65536 * 8)
    assert per_token == pytest.approx(4 * 2080 * 65 + 1025 * 129, rel=0.02)
    assert flops.backward.intra_chunk == pytest.approx(2.5 * flops.forward.intra_chunk, rel=0.01)
    assert flops.backward.state_update == 2 * flops.forward.state_update
