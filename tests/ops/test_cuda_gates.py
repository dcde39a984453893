"""`pt_state_flow` and `pt_gate_grad` alone, on random states and sums, against float64: which ends of chunks are known,
what crosses them, and how the gates' gradient is added up between them.
"""

import ctypes
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.stage_calls import BLOCK, DEVICE, Case, Run, tile_pairs, unpack_states

SPAN, SPAN_CHUNKS, FORGOTTEN = 2048, 4, 0.125
# A span of four chunks, of fewer, one chunk, chunks longer than a span; whole and not.
SHAPES = {
    "spans": Case(batch=2, tokens=1500, query_heads=4, chunk=64),
    "whole": Case(tokens=1536, chunk=128),
    "two_to_a_span": Case(tokens=4001, query_heads=1, key_heads=1, chunk=1024),
    "long_chunks": Case(tokens=6000, query_heads=1, key_heads=1, chunk=2560),
    "one_chunk": Case(batch=2, tokens=300, chunk=512),
}
DOCUMENTS = (1, 64, 200, 255)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def dots_of(case: Case, heads: tuple[int, ...], seed: int) -> Tensor:
    dots = random(*heads, -(-case.tokens // BLOCK) * BLOCK, seed=seed)
    dots[..., case.tokens :] = 0
    return dots


def chunks_of_span(case: Case) -> int:
    return min(SPAN // case.chunk, SPAN_CHUNKS) if case.chunk < SPAN else 1


def known_ends(case: Case, decays: list[float]) -> list[bool]:
    """Of one head, by chunk: the last of a span, and from there to the left wherever less than an eighth is left."""
    span, count = chunks_of_span(case), len(decays)
    known = [False] * count
    for first in range(0, count, span):
        last = min(first + span, count) - 1
        known[last] = True
        kept = 1.0 if (last + 1) * case.chunk <= case.tokens else 0.0
        for n in range(last - 1, first - 1, -1):
            kept *= decays[n]
            known[n] = kept < FORGOTTEN
            kept = 1.0 if known[n] else kept
    return known


def random_sums(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Dots of queries (B, Hq, Tp) and keys (2, B, Hk, Tp), what crosses ends of chunks (B, Hk, N), some unknown."""
    case, span, count = run.case, chunks_of_span(run.case), run.state_shape[1]
    query_dots = dots_of(case, (case.batch, case.query_heads), seed=1)
    key_dots = dots_of(case, (2, case.batch, case.key_heads), seed=2)
    flow = 30 * random(case.batch, case.key_heads, count, seed=3)
    last_of_span = torch.tensor([n % span == span - 1 or n == count - 1 for n in range(count)], device=DEVICE)
    flow[(random(*flow.shape, seed=4) > 0) & ~last_of_span] = math.inf
    return query_dots, key_dots, flow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("gate", [1e-4, 0.01, 3.0])
@pytest.mark.parametrize("documents", [(), DOCUMENTS], ids=["", "documents"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_crosses_the_ends_of_chunks(
    library: ctypes.CDLL,
    shape: str,
    documents: tuple[int, ...],
    gate: float,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    case = replace(SHAPES[shape], head_dim=head_dim, gate=gate, documents=documents, dtype=dtype)
    run = Run(library, case, 80)
    states, grad_states = (random(*run.state_shape, seed=seed).to(dtype) for seed in (1, 2))
    for x in (states, grad_states):
        x[:, :, :, -1, :, 2:] = math.nan  # beside the normaliser's hi and lo
    key_dots = dots_of(case, (2, case.batch, case.key_heads), seed=3)
    decays = run.chunk_decay
    weights = torch.tensor([2.0 if d else 1.0 for *_, d in tile_pairs(head_dim)], device=DEVICE, dtype=torch.float64)
    terms = weights[:, None, None] * unpack_states(states, head_dim) * unpack_states(grad_states, head_dim)
    factor = decays / run.problem.state_scale**2
    through, size = (factor * x.sum((2, 3, 4)).view_as(decays) for x in (terms, terms.abs()))
    keys = torch.nn.functional.pad(key_dots[1].double(), (0, -key_dots.shape[-1] % case.chunk))
    exact = through + keys.unflatten(-1, (-1, case.chunk)).sum(-1)
    for every_chunk in (False, True):
        flow = run.state_flow(states, grad_states, key_dots, every_chunk)
        for b in range(case.batch):
            for h in range(case.key_heads):
                known = torch.tensor(known_ends(case, decays[b, h].tolist()), device=DEVICE) | every_chunk
                assert torch.equal(flow[b, h].isfinite(), known)
                error = (flow[b, h].double() - exact[b, h])[known].abs()
                # Eight products are added up in fp32, and the result is rounded to it.
                assert (error <= 2**-21 * (size[b, h] + exact[b, h].abs() + 1)[known]).all()


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_crosses_the_ends_of_chunks_without_the_sums_of_keys(
    library: ctypes.CDLL, shape: str, head_dim: int
) -> None:
    """As after pt_key_grads: the states on both sides of an end meet, and nothing goes on beyond the last."""
    case = replace(SHAPES[shape], head_dim=head_dim, gate=0.01)
    run = Run(library, case, 80)
    states, grad_states = (random(*run.state_shape, seed=seed).to(case.dtype) for seed in (1, 2))
    weights = torch.tensor([2.0 if d else 1.0 for *_, d in tile_pairs(head_dim)], device=DEVICE, dtype=torch.float64)
    entering, leaving = unpack_states(states, head_dim)[:, 1:], unpack_states(grad_states, head_dim)[:, :-1]
    terms = (weights[:, None, None] * entering * leaving).unflatten(0, (case.batch, case.key_heads))
    exact, size = (torch.nn.functional.pad(x.sum((3, 4, 5)), (0, 1)) for x in (terms, terms.abs()))
    for every_chunk in (False, True):
        flow = run.state_flow(states, grad_states, None, every_chunk)
        known = torch.tensor(
            [[known_ends(case, row.tolist()) for row in rows] for rows in run.chunk_decay], device=DEVICE
        )
        assert torch.equal(flow.isfinite(), known | every_chunk)
        error = (flow.double() - exact)[known | every_chunk].abs()
        assert (error <= 2**-21 * (size + exact.abs() + 1)[known | every_chunk]).all()
        assert not flow[..., -1].any()


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("initial_state", [False, True], ids=["", "initial_state"])
@pytest.mark.parametrize("documents", [(), DOCUMENTS], ids=["", "documents"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_gradients_between_known_ends(
    library: ctypes.CDLL,
    shape: str,
    documents: tuple[int, ...],
    initial_state: bool,
    scaled: bool,
) -> None:
    case = replace(SHAPES[shape], head_dim=32, documents=documents, boundary=initial_state)
    run = Run(library, case, 80)
    query_dots, key_dots, flow = random_sums(run)
    count = flow.shape[-1]
    scales = None
    if scaled:
        scales = tuple(2.0 ** torch.randint(-9, 9, flow.shape[:2], device=DEVICE) for _ in range(2))
    ours = run.gate_grad(query_dots, key_dots, flow if count > 1 else None, scales)

    group = case.query_heads // case.key_heads
    gained = query_dots.double().unflatten(1, (case.key_heads, group)).sum(2) - key_dots[0].double()
    exact = torch.zeros_like(ours, dtype=torch.float64)
    closed = {*documents} | (set() if initial_state else {0})
    for b in range(case.batch):
        for h in range(case.key_heads):
            sum_, terms = 0.0, gained[b, h].tolist()
            for t in range(case.tokens - 1, -1, -1):
                end = (t + 1) % case.chunk == 0 or t == case.tokens - 1
                if end and count > 1 and math.isfinite(flow[b, h, t // case.chunk]):
                    sum_ = float(flow[b, h, t // case.chunk])
                sum_ = 0.0 if t in closed else sum_ + terms[t]
                exact[b, t, h] = sum_
    if scales is not None:
        exact /= (scales[0] * scales[1])[:, None]
    # Sums are fp64; a group of query heads is added up there, too, and the result is rounded to fp32.
    torch.testing.assert_close(ours.double(), exact, rtol=2**-23, atol=1e-10)
    assert all(not ours[:, t].any() for t in closed)


STEP, FORGOTTEN_STEP = 128, 2.0**-8


@pytest.mark.parametrize("gate", [0.02, 0.06, 1.0])  # few steps let less than 2^-8 pass, most of them, all
@pytest.mark.parametrize("documents", [(), (1, 200, 384, 500)], ids=["", "documents"])
@pytest.mark.parametrize(("tokens", "chunk"), [(1536, 128), (1500, 384), (2113, 1024), (5000, 2560)])
def test_gate_gradients_between_steps_that_are_forgotten(
    library: ctypes.CDLL, tokens: int, chunk: int, documents: tuple[int, ...], gate: float
) -> None:
    """As after pt_key_grads: a step's keys say what crosses its end, where nothing else does."""
    case = Case(
        batch=2, tokens=tokens, query_heads=2, key_heads=1, head_dim=32, chunk=chunk, gate=gate, documents=documents
    )
    run = Run(library, case, 80)
    query_dots, key_dots, flow = random_sums(run)
    ours = run.gate_grad(query_dots, key_dots, flow, None, key_dots[1])

    gained = query_dots.double().sum(1) - key_dots[0, :, 0].double()
    log2 = run.log_G[..., 0].double() / math.log(2)
    exact = torch.zeros_like(ours, dtype=torch.float64)
    closed = {0, *documents}
    forgotten = 0
    for b in range(case.batch):
        sum_, terms = 0.0, gained[b].tolist()
        for t in range(tokens - 1, -1, -1):
            if (t + 1) % chunk == 0 or t == tokens - 1:
                known = float(flow[b, 0, t // chunk])
                sum_ = known if math.isfinite(known) else sum_
            start = t + 1 - STEP
            passes = 2.0 ** float(log2[b, max(start, 0) : t + 1].sum())
            if any(start <= at <= t for at in documents):
                passes = 0.0
            if (t + 1) % STEP == 0 and t + 1 < tokens and passes < FORGOTTEN_STEP:
                sum_ = float(key_dots[1, b, 0, start : t + 1].double().sum())
                forgotten += 1
            sum_ = 0.0 if t in closed else sum_ + terms[t]
            exact[b, t, 0] = sum_
    assert forgotten > 0 or gate < 0.06
    # The sum of a step is in fp32.
    torch.testing.assert_close(ours.double(), exact, rtol=2**-20, atol=2**-18)
