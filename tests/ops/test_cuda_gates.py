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
    count, span = run.state_shape[1], chunks_of_span(case)
    query_dots = dots_of(case, (case.batch, case.query_heads), seed=1)
    key_dots = dots_of(case, (2, case.batch, case.key_heads), seed=2)
    flow = 30 * random(case.batch, case.key_heads, count, seed=3)
    last_of_span = torch.tensor([n % span == span - 1 or n == count - 1 for n in range(count)], device=DEVICE)
    flow[(random(*flow.shape, seed=4) > 0) & ~last_of_span] = math.inf
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
