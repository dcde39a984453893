"""`pt_pack` alone against the layouts and decays made of the same inputs in torch: however the chunks divide among
thread blocks, and with documents that begin before, in and after what a thread block packs.
"""

import ctypes
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.stage_calls import BLOCK, Case, Run

ON_GPU = torch.cuda.is_available()
MANY = 40 if ON_GPU else 2  # heads enough for thread blocks of 512 tokens on every multiprocessor


SHAPES = {
    "one_token": Case(tokens=1, chunk=64),
    "few": Case(batch=2, tokens=517, query_heads=4, gate=0.01),
    "many": Case(tokens=4001, query_heads=MANY, key_heads=MANY, gate=0.001),
    "batch": Case(batch=3, tokens=1501, query_heads=MANY, key_heads=MANY, gate=0.01),
}
DOCUMENTS = {
    "no_documents": (),
    "few_documents": (1000, 2900),
    "documents": (1, 2, 64, 65, 127, 300, 511, 512, 640, 1023, 1024, 3000),
}


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("chunk", [64, 192, 512, 640, 1024, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_packs_and_gates(library: ctypes.CDLL, shape: str, chunk: int, documents: str, head_dim: int) -> None:
    case = SHAPES[shape]
    starts = tuple(start for start in DOCUMENTS[documents] if start < case.tokens)
    assert_packed(library, replace(case, chunk=chunk, documents=starts, head_dim=head_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [(), (200, 1700)])
@pytest.mark.parametrize("gate", [0.0, 1e-5, 0.1, 20.0])
def test_a_chunk_of_many_thread_blocks(
    library: ctypes.CDLL, gate: float, documents: tuple[int, ...], dtype: torch.dtype
) -> None:
    # Longer than the gates that a thread block sums at once, and longer than the sequence.
    case = Case(tokens=10000, query_heads=1, key_heads=1, head_dim=32, chunk=1 << 20, gate=gate, dtype=dtype)
    assert_packed(library, replace(case, documents=documents))


def assert_packed(library: ctypes.CDLL, case: Case) -> None:
    run = Run(library, case, 80)
    out = run.pack()
    for name in ("packed_q", "packed_k", "packed_v"):
        assert torch.equal(out[name], getattr(run, name)), name
    starts = case.batch * -(-case.tokens // BLOCK) * BLOCK  # integers, at the end of the gates
    assert torch.equal(out["gates"][-starts:].view(torch.int32), run.gates[-starts:].view(torch.int32))
    gates, exact = out["gates"][:-starts], run.gates[:-starts]
    # What a document closes is zero exactly; a decay may underflow a little later than the exact one.
    assert (gates[exact == 0].abs() < torch.finfo(torch.float32).tiny).all()
    # Decay to a block's end is a difference of two sums of at most 64 gates.
    rtol = max(2e-6, 4e-6 * case.gate)
    torch.testing.assert_close(gates, exact, rtol=rtol, atol=2e-7)
    values, normalizer = split(out["decayed_v"])
    exact_values, exact_normalizer = split(run.decayed_v)
    eps = torch.finfo(case.dtype).eps
    torch.testing.assert_close(values, exact_values, rtol=eps, atol=1e-7)
    torch.testing.assert_close(normalizer, exact_normalizer, rtol=max(eps**2, rtol), atol=1e-7)


def split(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Decayed values, and the normaliser's high and low column as one number."""
    groups = packed.float()
    return groups[:, :, :, :-1], groups[:, :, :, -1].sum(-1)
