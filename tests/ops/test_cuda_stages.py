"""The Hopper kernels stage by stage against float64, emulated: what runs without a GPU elsewhere are the sm80 ones.

The emulation is slow: at the wider heads only the cases that the narrow one's path does not share.
"""

import os
import subprocess
import sys

import pytest
import torch

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
