"""Softmax and window attention by PyTorch's FlashAttention kernels: on a GPU the kernels themselves, elsewhere a
stand-in for them under the same ops, which checks what they are asked for.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from powertrain.models.flops import model_flops
from powertrain.ops import softmax_attention, varlen_attention, window_attention
from powertrain.ops.blocked_attention import blocked_attention_op
from tests.ops.accuracy import Inputs, assert_as_accurate, evaluate, make_inputs, relative_error
from tests.ops.test_attention import dense

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Empty documents, one of a single token, and padding at the end, as batches have them.
CU_SEQLENS = torch.tensor([0, 5, 5, 41, 170, 171, 200, 340, 340, 340], dtype=torch.int32)


def _weights(q: Tensor, k: Tensor, scale: float, causal: bool, left: int | None, right: int | None) -> Tensor:
    """Weights (heads, tokens, tokens) of one document; `left`, `right`: neighbours that a token sees, None all."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))[None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden |= distance > left
    if causal or right is not None:
        hidden |= -distance > (0 if causal else right)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def _documents(cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Iterator[list[Tensor]]:
    """q, then k and v with a head for each query head, then `more` as q; fp32, document by document."""
    for queries, keys in zip(*(itertools.pairwise(x.tolist()) for x in (cu_q, cu_k)), strict=True):
        of_queries, of_keys = slice(*queries), slice(*keys)
        spread = (x[of_keys].float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        yield [q[of_queries].float(), *spread, *(x[of_queries].float() for x in more)]


def _forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, window_size_left=None,
             window_size_right=None, **rest):  # fmt: skip
    assert (cu_q.dtype, cu_k.dtype, dropout, debug) == (torch.int32, torch.int32, 0.0, False)
    for offsets, longest, tokens in ((cu_q, max_q, len(q)), (cu_k, max_k, len(k))):
        assert 0 <= min(offsets.diff()) <= max(offsets.diff()) <= longest
        assert (offsets[0], offsets[-1]) == (0, tokens)
    parts = [
        torch.einsum("hij,jhd->ihd", _weights(q_, k_, scale, causal, window_size_left, window_size_right), v_)
        for q_, k_, v_ in _documents(cu_q, cu_k, q, k, v)
    ]
    out = torch.cat(parts).to(q.dtype)
    return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64), q.new_empty(0), q.new_empty(0)


def _backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale=None,
              window_size_left=None, window_size_right=None):  # fmt: skip
    parts = []
    for q_, k_, v_, grad, out_ in _documents(cu_q, cu_k, q, k, v, grad_out, out):
        weights = _weights(q_, k_, scale, causal, window_size_left, window_size_right)
        delta = (grad * out_).sum(-1).T[..., None]
        slope = weights * (torch.einsum("ihd,jhd->hij", grad, v_) - delta) * scale
        by_query = (torch.einsum("hij,jhd->ihd", slope, k_), torch.einsum("hij,ihd->jhd", slope, q_))
        parts.append((*by_query, torch.einsum("hij,ihd->jhd", weights, grad)))
    grads = [torch.cat(part) for part in zip(*parts, strict=True)]
    return tuple(g.unflatten(1, (x.shape[1], -1)).sum(2).to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels of the GPU, or the stand-in under the same ops of `torch.ops.aten`."""
    if ON_GPU:
        yield
        return
    monkeypatch.setattr(varlen_attention, "DEVICE_TYPES", ["cpu"])
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        yield


def on_device(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function on the GPU's copies of CPU tensors, its result back; gradients pass through both."""

    def wrapped(**arguments: object) -> Tensor:
        moved = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in arguments.items()}
        return function(**moved).cpu()

    return wrapped


def problem(
    dtype: torch.dtype = torch.bfloat16, documents: bool = True, heads: tuple[int, int] = (4, 2), dim: int = 32
) -> Inputs:
    inputs = make_inputs(2, 170, *heads, dim, dim, dtype=dtype, gated=False)
    if documents:
        inputs.keywords["cu_seqlens"] = CU_SEQLENS
    return inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize(
    ("window", "documents"), [(None, True), (1, True), (37, True), (1000, True), (1, False), (37, False)]
)
def test_matches_dense(
    kernels: None, window: int | None, documents: bool, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = problem(dtype, documents, heads)
    function = softmax_attention
    if window is not None:
        inputs.keywords["window"] = window
        function = window_attention
    assert_as_accurate(on_device(function), dense, inputs)


@pytest.mark.parametrize("queries", [1, 60, 169])
@pytest.mark.parametrize(("window", "documents"), [(None, True), (37, True), (37, False)])
def test_queries_of_the_last_tokens(kernels: None, window: int | None, documents: bool, queries: int) -> None:
    """Documents that end before them have keys and no query: their gradients are zero."""
    inputs = problem(documents=documents)
    inputs.tensors["Q"] = inputs.tensors["Q"][:, -queries:]
    function = softmax_attention
    if window is not None:
        inputs.keywords["window"] = window
        function = window_attention
    assert varlen_attention.takes(inputs.tensors["Q"].to(DEVICE), inputs.tensors["V"].to(DEVICE), None)
    assert_as_accurate(on_device(function), dense, inputs)


@pytest.mark.parametrize("dim", [8, 64, 96, 128, 256])
def test_head_dims(kernels: None, dim: int) -> None:
    assert_as_accurate(on_device(softmax_attention), dense, problem(dim=dim))


def test_agrees_with_the_blocked_implementation(kernels: None) -> None:
    """What runs elsewhere gives the same values to the rounding of bf16."""
    inputs = problem()
    ours, cotangents = evaluate(on_device(softmax_attention), inputs)

    def blocked(Q: Tensor, K: Tensor, V: Tensor, cu_seqlens: Tensor) -> Tensor:
        return blocked_attention_op(Q, K, V, None, cu_seqlens, 1 / math.sqrt(Q.shape[3]), Q.shape[1])[0]

    theirs, _ = evaluate(on_device(blocked), inputs, cotangents)
    for name, value in ours.items():
        # Both round scores' weights and outputs to bf16 a few times.
        assert relative_error(value, theirs[name]) < 4 * torch.finfo(torch.bfloat16).eps, name


def test_strided_views_and_int64_offsets(kernels: None) -> None:
    """Queries, keys and values are slices of one projection in the model."""
    inputs = problem(heads=(2, 2))
    packed = torch.cat([inputs.tensors[n] for n in "QKV"], dim=2).to(DEVICE)
    q, k, v = packed.split([2, 2, 2], dim=2)
    offsets = CU_SEQLENS.to(DEVICE)
    out = softmax_attention(q, k, v, cu_seqlens=offsets.long())
    assert torch.equal(out, softmax_attention(*(x.contiguous() for x in (q, k, v)), cu_seqlens=offsets))


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"dim": 6}, False),
        ({"dim": 264}, False),
        ({"values": 16}, False),
        ({"values_tokens": 20}, True),
        ({"values_tokens": 9}, False),
        ({"gated": True}, False),
    ],
)
def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch, change: dict, taken: bool) -> None:
    monkeypatch.setattr(varlen_attention, "DEVICE_TYPES", ["cpu"])
    options = {"dtype": torch.bfloat16, "dim": 32, "values": None, "values_tokens": 10, "gated": False} | change
    query = torch.zeros(1, 10, 2, options["dim"], dtype=options["dtype"])
    value = torch.zeros(1, options["values_tokens"], 2, options["values"] or options["dim"], dtype=options["dtype"])
    log_g = torch.zeros(1, 10, 2) if options["gated"] else None
    assert varlen_attention.takes(query, value, log_g) is taken
    monkeypatch.undo()
    assert not varlen_attention.takes(query, value, log_g)  # on the CPU


def test_flops_are_those_of_the_model(kernels: None) -> None:
    from powertrain.models.gpt import GPT
    from tests.models.small import small_config

    for kind in ("softmax", "window"):
        config = small_config(kind, head_dim=32)
        T = 600
        ids = torch.zeros(1, T, dtype=torch.int64, device=DEVICE)
        offsets = torch.tensor([0, T], dtype=torch.int32, device=DEVICE)
        model = GPT(config).to(DEVICE)
        with FlopCounterMode(display=False) as counter, torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = model(ids, labels=ids, cu_seqlens=offsets).loss
            loss.backward()
        expected = model_flops(config, T, device_type="cuda").executed.total * T
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_under_torch_compile(kernels: None) -> None:
    inputs = problem()
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    ours, cotangents = evaluate(on_device(compiled), inputs)
    eager, _ = evaluate(on_device(softmax_attention), inputs, cotangents)
    for name, value in eager.items():
        # On a GPU the backward pass adds up in any order.
        assert relative_error(ours[name], value) < (4 * torch.finfo(torch.bfloat16).eps if ON_GPU else 1e-30), name
