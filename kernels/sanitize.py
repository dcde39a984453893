"""Runs the whole CUDA path under compute-sanitizer: `python kernels/sanitize.py [--tools memcheck racecheck]`.

A sweep of small problems, forward and backward, on the kernels that the device would choose and on the sm80 ones:
every head dim, both types, tails, documents, groups of query heads, states at both ends. Memory comes straight from
the driver (no caching allocator), so that each buffer has its own bounds. Exits with 1 if any tool reports anything.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck")
KERNEL_NAMES = "kernel_substring=powertrain"  # torch's own kernels are not what is checked

# batch, tokens, query heads, key heads, chunk, documents, states
SHAPES = (
    (1, 1, 1, 1, 64, False, False),
    (2, 130, 4, 2, 64, False, False),
    (1, 200, 2, 1, 128, True, False),
    (1, 190, 2, 2, 64, False, True),
    (1, 300, 1, 1, 512, False, True),
)


def sweep() -> None:
    """Run every problem once, forward and backward."""
    import torch

    from powertrain.ops import cuda, power_retention

    for shape, head_dim, dtype, arch in itertools.product(
        SHAPES, (32, 64, 128), (torch.bfloat16, torch.float16), (0, 80)
    ):
        batch, tokens, query_heads, key_heads, chunk_size, documents, states = shape
        q = torch.randn(batch, tokens, query_heads, head_dim, device="cuda").to(dtype).requires_grad_()
        k, v = (
            torch.randn(batch, tokens, key_heads, head_dim, device="cuda").to(dtype).requires_grad_() for _ in range(2)
        )
        leaves = [q, k, v, (-0.1 * torch.rand(batch, tokens, key_heads, device="cuda")).requires_grad_()]
        keywords = {}
        if states:
            features = head_dim * (head_dim + 1) // 2
            state = torch.rand(batch, key_heads, features, head_dim, device="cuda").requires_grad_()
            total = (10 + torch.rand(batch, key_heads, features, device="cuda")).requires_grad_()
            keywords = {"initial_state": state, "sum_of_keys": total}
            leaves += [state, total]
        if documents:
            offsets = sorted({0, 1, tokens // 2, batch * tokens} | {row * tokens for row in range(batch)})
            keywords["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32, device="cuda")
        with cuda.force_arch(arch):
            result = power_retention(
                *leaves[:4], chunk_size=chunk_size, return_final_state=states, impl="cuda", **keywords
            )
            outputs = result if states else (result,)
            torch.autograd.grad(outputs, leaves, [torch.randn_like(x) for x in outputs])
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--sweep", action="store_true", help="run the problems themselves (what the tools run)")
    args = parser.parse_args()
    if args.sweep:
        sys.path.insert(0, str(ROOT))
        sweep()
        return 0
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool in args.tools:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", KERNEL_NAMES]
        result = subprocess.run([*command, sys.executable, __file__, "--sweep"], env=environment, check=False)
        print(f"{tool}: {'clean' if result.returncode == 0 else f'exit status {result.returncode}'}", flush=True)
        if result.returncode != 0:
            failed.append(tool)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
