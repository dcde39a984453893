"""Memory is linear in T, with a small constant."""

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import json, resource, sys
import torch
from powertrain.ops import power_retention
torch.set_num_threads(2)
T, deg, dim = map(int, sys.argv[1:])
tensors = [torch.randn(1, T, 1, dim, requires_grad=True) for _ in range(3)]
log_G = torch.full((1, T, 1), -1e-3, requires_grad=True)
power_retention(*[x[:, :256] for x in tensors], log_G[:, :256], chunk_size=64, deg=2).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
power_retention(*tensors, log_G, deg=deg).sum().backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"before": before / 1024, "after": after / 1024}))
"""


def peak_mebibytes(T: int, deg: int = 2, dim: int = 64) -> dict[str, float]:
    """Return the peak resident memory of a fresh process before and after one forward and backward pass, in MiB."""
    command = [sys.executable, "-c", _PROGRAM, str(T), str(deg), str(dim)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_at_4096_tokens() -> None:
    """A sixteenth of the tokens, within a sixteenth of 2 GB beyond what the process and the fixed buffers take."""
    peak = peak_mebibytes(4096)
    assert peak["after"] - peak["before"] < 2000 / 16 + 150


def test_quadratic_form_holds_no_matrix_of_all_weights() -> None:
    """Degree 4 at dimension 64 stays quadratic in time; 4096^2 fp32 weights and their gradients would be 256 MiB."""
    peak = peak_mebibytes(4096, deg=4)
    assert peak["after"] - peak["before"] < 128


@pytest.mark.slow
def test_memory_at_65536_tokens() -> None:
    assert peak_mebibytes(65536)["after"] < 2000
