"""The Hopper kernels stage by stage against float64, emulated: what runs without a GPU elsewhere are the sm80 ones.

The emulation is slow: at the wider heads only the cases that the narrow one's path does not share.
"""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from kernels.stage_calls import Case, Run
from tests.ops.emulation import KERNELS, emulated_library

LONG = ["long chunk", "long chunk, documents"]  # more columns than a row tile has rows
CASES = {
    32: [
        "two chunks",
        "odd blocks",
        "tail",
        "T=1",
        "grouped heads",
        "documents",
        "boundary",
        "steps, documents, boundary",
        *LONG,
    ],
    64: ["two chunks", "grouped heads", "documents", *LONG],
    128: ["two chunks"],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not emulated")
@pytest.mark.parametrize(("head_dim", "seed", "multiprocessors"), [(32, 0, 6), (32, 1, 1), (64, 0, 6), (128, 0, 6)])
def test_sm90_stages_are_as_accurate_as_the_formula(head_dim: int, seed: int, multiprocessors: int) -> None:
    """In the emulation's own order, and with copies and warps at random times; with one multiprocessor a time segment
    has several chunks.
    """
    library = emulated_library(without=("sm80",))
    command = [sys.executable, str(KERNELS / "check_stages.py"), str(library), "--arch", "90"]
    command += ["--head-dims", str(head_dim), "--dtypes", "bfloat16", "--cases", *CASES[head_dim]]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PT_EMULATED_SEED": str(seed), "PT_EMULATED_MULTIPROCESSORS": str(multiprocessors)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == len(CASES[head_dim]) + 1, result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not emulated")
def test_states_of_segments_do_not_depend_on_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and warps at random times, and more blocks of tokens in a segment than segment_state has buffers for: the
    final state and the gradient of the initial one have the same bits.
    """
    library = ctypes.CDLL(str(emulated_library(without=("sm80",))))
    library.pt_last_error.restype = ctypes.c_char_p
    monkeypatch.setenv("PT_EMULATED_MULTIPROCESSORS", "1")
    monkeypatch.setenv("PT_EMULATED_SEED", "0")
    run = Run(library, Case(tokens=1536, key_heads=1, head_dim=32, chunk=128, gate=1e-3), 90)
    forward = run.query_scan()
    run.packed_dn = run.pack_dn(run.dy, forward["y"], forward["normalizer"])

    def states() -> tuple[torch.Tensor, torch.Tensor]:
        return run.query_scan(final_only=True)["final"], run.key_grads(final_only=True)["dinitial"]

    expected = states()
    assert all(x.isfinite().all() for x in expected)
    for seed in range(1, 41):
        monkeypatch.setenv("PT_EMULATED_SEED", str(seed))
        assert all(map(torch.equal, states(), expected)), f"seed {seed}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not emulated")
@pytest.mark.parametrize("seed", [0, 3])
def test_packing_does_not_depend_on_the_schedule(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """More blocks of tokens in a segment than there are buffers to copy them to: the bits of what is packed on the way,
    and of what follows from it, are those of tokens that were packed before.
    """
    library = ctypes.CDLL(str(emulated_library(without=("sm80",))))
    library.pt_last_error.restype = ctypes.c_char_p
    monkeypatch.setenv("PT_EMULATED_MULTIPROCESSORS", "1")
    monkeypatch.setenv("PT_EMULATED_SEED", "0")
    run = Run(library, Case(tokens=1500, query_heads=2, key_heads=1, head_dim=32, chunk=128, gate=1e-3), 90)
    forward = run.query_scan()
    run.packed_dn = run.pack_dn(run.dy, forward["y"], forward["normalizer"])
    run.packed_dn = run.key_grads(packs=forward)["packed_dn"]  # dn' itself may be rounded differently by torch
    backward = run.key_grads() | {"packed_dn": run.packed_dn}
    keys = {"packed_k": run.packed_k, "packed_v": run.packed_v}
    alone = keys | {"final": forward["final"]}
    forward_alone = {name: x for name, x in forward.items() if name != "final"} | keys | {"packed_q": run.packed_q}

    monkeypatch.setenv("PT_EMULATED_SEED", str(seed))
    ours = (
        run.query_scan(packs=True),
        run.query_scan(final=False, packs=True),
        run.query_scan(final_only=True, packs=True),
        run.key_grads(packs=forward),
    )
    expected = (forward_alone | alone, forward_alone, alone, backward)
    for results, theirs in zip(ours, expected, strict=True):
        assert all(torch.equal(results[name].view(torch.uint8), x.view(torch.uint8)) for name, x in theirs.items())
