"""Softmax and window attention against a dense evaluation, with documents and gates."""

import math

import pytest
import torch
from torch import Tensor

from powertrain.ops import softmax_attention, window_attention
from tests.ops.accuracy import Inputs, assert_as_accurate, evaluate, make_inputs, relative_error


def dense(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """All scores at once, in the dtype of Q, whose tokens are the last ones of K."""
    B, queries, Hq, dim = Q.shape
    T = K.shape[1]
    ratio = Hq // K.shape[2]
    scores = torch.einsum("bihd,bjhd->bhij", Q, K.repeat_interleave(ratio, dim=2)) * (scale or 1 / math.sqrt(dim))
    if log_G is not None:
        G = log_G.double().cumsum(1).transpose(1, 2).repeat_interleave(ratio, dim=1)
        scores = scores + (G[..., -queries:, None] - G[..., None, :]).to(scores.dtype)
    row, column = torch.arange(T)[-queries:, None], torch.arange(T)[None]
    seen = (column <= row) & (column > row - (window or T))
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        document = torch.tensor([sum(end <= t for end in ends) for t in range(B * T)]).view(B, T)
        seen = seen & (document[:, None, -queries:, None] == document[:, None, None, :])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhv->bihv", weights, V.repeat_interleave(ratio, dim=2))


CU_SEQLENS = torch.tensor([0, 5, 5, 41, 170, 171, 200, 340, 340], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("documents", [True, False], ids=["documents", "whole"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("window", [None, 2, 37, 1000])
def test_matches_dense(window: int | None, gated: bool, documents: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 170, 4, 2, 6, 5, dtype=dtype, gated=gated)
    if documents:
        inputs.keywords["cu_seqlens"] = CU_SEQLENS
    if window is None:
        assert_as_accurate(softmax_attention, dense, inputs)
    else:
        inputs.keywords["window"] = window
        assert_as_accurate(window_attention, dense, inputs)


@pytest.mark.parametrize("queries", [1, 60, 169])
@pytest.mark.parametrize("documents", [True, False], ids=["documents", "whole"])
@pytest.mark.parametrize("window", [None, 37])
def test_queries_of_the_last_tokens(window: int | None, documents: bool, queries: int) -> None:
    inputs = make_inputs(2, 170, 4, 2, 6, 5, dtype=torch.float32)
    inputs.tensors["Q"] = inputs.tensors["Q"][:, -queries:]
    if documents:
        inputs.keywords["cu_seqlens"] = CU_SEQLENS
    if window is not None:
        inputs.keywords["window"] = window
    assert_as_accurate(softmax_attention if window is None else window_attention, dense, inputs)


def test_more_queries_than_keys_are_refused() -> None:
    tensors = make_inputs(1, 4, 1, 1, 4, 4, dtype=torch.float32).tensors
    short = {name: x if name == "Q" else x[:, 1:] for name, x in tensors.items()}
    with pytest.raises(ValueError, match="Q has 4 tokens and K 3"):
        softmax_attention(**short)


def test_window_of_one_returns_the_values() -> None:
    inputs = make_inputs(1, 140, 4, 2, 6, 5, dtype=torch.float32)
    out = window_attention(**inputs.tensors, window=1)
    torch.testing.assert_close(out, inputs.tensors["V"].repeat_interleave(2, dim=2))


def test_strong_then_weak_gates() -> None:
    inputs = make_inputs(1, 600, 1, 1, 4, 4, dtype=torch.float32)
    inputs.tensors["log_G"] = torch.full((1, 600, 1), -0.001)
    inputs.tensors["log_G"][:, :300] = -50.0
    assert_as_accurate(softmax_attention, dense, inputs)


@pytest.mark.parametrize("window", [None, 20])
def test_nothing_leaks_across_documents(window: int | None) -> None:
    inputs = make_inputs(1, 170, 2, 2, 6, 5, dtype=torch.float32)
    middle, cu_seqlens = slice(41, 140), torch.tensor([0, 41, 140, 170])
    mask = torch.ones(170, dtype=torch.bool)
    mask[middle] = False

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        if window is None:
            out = softmax_attention(**leaves, cu_seqlens=cu_seqlens)
        else:
            out = window_attention(**leaves, window=window, cu_seqlens=cu_seqlens)
        return out, *torch.autograd.grad(out[:, middle].square().sum(), list(leaves.values()))

    perturbed = {name: x.clone() for name, x in inputs.tensors.items()}
    for name, x in perturbed.items():
        x[:, mask] = x[:, mask] * 3 - (1 if name == "log_G" else 0)
    for index, (a, b) in enumerate(zip(run(inputs.tensors), run(perturbed), strict=True)):
        assert torch.equal(a[:, middle], b[:, middle])
        if index > 0:
            assert not a[:, mask].any()


def test_sdpa_is_used_where_it_can_be() -> None:
    inputs = make_inputs(1, 50, 4, 2, 8, 8, dtype=torch.float32, gated=False)
    q, k, v = (x.transpose(1, 2) for x in inputs.tensors.values())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(softmax_attention(**inputs.tensors), expected.transpose(1, 2))


def test_scale() -> None:
    inputs = make_inputs(1, 50, 2, 2, 4, 4, dtype=torch.float64)
    doubled = Inputs({**inputs.tensors, "Q": inputs.tensors["Q"] * 2})
    a, _ = evaluate(softmax_attention, doubled)
    inputs.keywords["scale"] = 1.0
    b, _ = evaluate(softmax_attention, inputs)
    assert relative_error(a["out0"], b["out0"]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("window", [None, 20])
def test_negative_scale(window: int | None, gated: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 170, 4, 2, 16, 16, dtype=dtype, gated=gated)
    inputs.keywords["scale"] = -1.0
    if window is not None:
        inputs.keywords["window"] = window
    assert_as_accurate(softmax_attention if window is None else window_attention, dense, inputs)


@pytest.mark.parametrize("window", [0, -1, 2.5, True, None])
def test_bad_window(window: object) -> None:
    tensors = make_inputs(1, 4, 1, 1, 4, 4, dtype=torch.float32).tensors
    with pytest.raises(ValueError, match="window="):
        window_attention(**tensors, window=window)  # type: ignore[arg-type]


def test_compiled_for_dynamic_shapes_with_and_without_shared_keys() -> None:
    compiled = torch.compile(softmax_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    for tokens, heads in ((8, 2), (16, 4)):
        q, k, v = (torch.randn(1, tokens, n, 16) for n in (heads, 2, 2))
        torch.testing.assert_close(compiled(q, k, v), softmax_attention(q, k, v))
