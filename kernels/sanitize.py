"""Runs the whole CUDA path under compute-sanitizer: `python kernels/sanitize.py [--tools memcheck racecheck]`.

A sweep of small problems, forward and backward, on the kernels that the device would choose and on the sm80 ones:
every head dim, both types, tails, documents, groups of query heads, states at both ends. Memory comes straight from
the driver (no caching allocator), so that each buffer has its own bounds; inputs are copied from the host, because what
torch's kernels write goes unseen. One process for each tool, head dim, type and kernels, as many at once as there are
CPUs: racecheck takes minutes at head dim 128. Exits with 1 if any tool reports anything.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    (1, 600, 2, 1, 1024, False, False),  # more columns than a row tile has rows
    (2, 400, 16, 16, 64, False, True),  # more row tiles than multiprocessors
    (1, 1100, 2, 1, 512, True, False),  # several steps of query_scan and key_grads in a time segment
    (2, 450, 33, 33, 128, False, False),  # and several chunks
    (3, 330, 44, 44, 128, False, False),  # and one time segment, so that query_scan packs
)


HEAD_DIMS = (32, 64, 128)
DTYPES = ("bfloat16", "float16")
ARCHS = (0, 80)  # the kernels that the device would choose, and sm80's


def sweep(head_dim: int, dtype_name: str, arch: int) -> None:
    """Run every problem of one head dim and type once, forward and backward."""
    import torch

    from powertrain.ops import cuda, power_retention

    dtype = getattr(torch, dtype_name)
    for shape in SHAPES:
        batch, tokens, query_heads, key_heads, chunk_size, documents, states = shape

        def leaf(x: torch.Tensor) -> torch.Tensor:
            return x.cuda().requires_grad_()

        q = leaf(torch.randn(batch, tokens, query_heads, head_dim).to(dtype))
        k, v = (leaf(torch.randn(batch, tokens, key_heads, head_dim).to(dtype)) for _ in range(2))
        leaves = [q, k, v, leaf(-0.1 * torch.rand(batch, tokens, key_heads))]
        keywords = {}
        if states:
            features = head_dim * (head_dim + 1) // 2
            state = leaf(torch.rand(batch, key_heads, features, head_dim))
            total = leaf(10 + torch.rand(batch, key_heads, features))
            keywords = {"initial_state": state, "sum_of_keys": total}
            leaves += [state, total]
        if documents:
            offsets = sorted({0, 1, tokens // 2, batch * tokens} | {row * tokens for row in range(batch)})
            keywords["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32).cuda()
        with cuda.force_arch(arch):
            result = power_retention(
                *leaves[:4], chunk_size=chunk_size, return_final_state=states, impl="cuda", **keywords
            )
            outputs = result if states else (result,)
            torch.autograd.grad(outputs, leaves, [torch.randn(x.shape).to(x.dtype).cuda() for x in outputs])
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS), choices=HEAD_DIMS)
    parser.add_argument(
        "--sweep", nargs=3, metavar=("K", "DTYPE", "ARCH"), help="run these problems (what the tools run)"
    )
    args = parser.parse_args()
    if args.sweep:
        sys.path.insert(0, str(ROOT))
        head_dim, dtype, arch = args.sweep
        sweep(int(head_dim), dtype, int(arch))
        return 0
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(tool: str, *problems: int | str) -> subprocess.CompletedProcess[str]:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", KERNEL_NAMES]
        return subprocess.run(
            [*command, sys.executable, __file__, "--sweep", *map(str, problems)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    # What takes longest begins first.
    runs = list(itertools.product(args.tools, sorted(args.head_dims, reverse=True), DTYPES, ARCHS))
    failed = False
    with ThreadPoolExecutor(min(len(runs), os.cpu_count() or 1)) as pool:
        results = pool.map(lambda problems: run(*problems), runs)
        for (tool, head_dim, dtype, arch), result in zip(runs, results, strict=True):
            clean = result.returncode == 0
            what = f"{tool}, head dim {head_dim}, {dtype}, {f'sm{arch}' if arch else 'chosen'} kernels"
            print(f"{what}: {'clean' if clean else f'exit status {result.returncode}'}", flush=True)
            if not clean:
                print("\n".join(result.stdout.splitlines()[:40]), flush=True)
                failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
