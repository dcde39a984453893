"""Checks and times every stage of the kernel library alone, against float64, without powertrain's own Python.

    python kernels/check_stages.py LIBRARY [--arch 90] [--time] [--output FILE]

Errors are relative norms; `plain` is the same quantity from the quadratic formula evaluated in the same 16-bit type with fp32 accumulation.
Exits with 1 if any quantity is worse than twice that.
"""

import argparse
import ctypes
import json
import math
import statistics
import sys

import torch
from stage_calls import BLOCK, DEVICE, I32, Case, KernelInfo, Run, synchronize, tile_pairs, unpack_states
from stage_reference import cancelling_terms, exact_states, quadratic
from torch import Tensor


def error(out: Tensor, reference: Tensor) -> float:
    if not torch.isfinite(out).all():
        return math.nan
    wrong, size = float((out.double() - reference).norm()), float(reference.norm())
    return wrong / size if size > 0 else (0.0 if wrong == 0 else math.inf)  # nothing enters the first chunk


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether the tensors of `theirs` are the same bits in `ours`."""
    synchronize()
    return all(torch.equal(ours[name].view(torch.uint8), x.view(torch.uint8)) for name, x in theirs.items())


def pack_rows(run: Run, eps: float) -> dict[str, tuple[float, float]]:
    """What pt_pack makes, against torch: equal, except that the decays and what they multiply may be rounded differently."""
    out = run.pack()
    rows = {
        name: (error(out[name].double(), getattr(run, name).double()), 0.0)
        for name in ("packed_q", "packed_k", "packed_v")
    }
    rows["decayed_v"] = (error(out["decayed_v"].double(), run.decayed_v.double()), eps)
    integers = run.case.batch * -(-run.case.tokens // BLOCK) * BLOCK  # at the end: starts of documents
    if not torch.equal(out["gates"][-integers:].view(torch.int32), run.gates[-integers:].view(torch.int32)):
        rows["document_start"] = (math.nan, 0.0)
    rows["gates"] = (error(out["gates"][:-integers], run.gates[:-integers].double()), 2.0**-22)
    if not equal(run.pack(gates_alone=True), {"gates": out["gates"]}):
        rows["gates alone"] = (math.nan, 0.0)
    return rows


def check(library: ctypes.CDLL, case: Case, arch: int, stages: int) -> dict:
    run = Run(library, case, arch)
    reference, final = exact_states(run)
    forward = (
        run.forward()
        if stages > 1
        else {
            "states": run.new(*run.state_shape, dtype=case.dtype),
            "final": run.new(*run.boundary_shape, dtype=torch.float32),
        }
    )
    if stages == 1:
        run.chunk_state(False, forward["states"], forward["final"])
    synchronize()
    got = unpack_states(forward["states"], case.head_dim) / run.problem.state_scale
    eps = 2.0 ** (-9 if case.dtype == torch.bfloat16 else -12)  # half the spacing at 1
    rows = pack_rows(run, eps) | {
        "states": (error(got, reference), 2 * eps),
        "final": (error(forward["final"][..., : case.head_dim + 1], final), 2 * eps),
    }
    if stages > 1:
        exact, plain = quadratic(run, True), quadratic(run, False)
        terms = cancelling_terms(run) if stages > 3 else {}
        out = dict(forward)
        if stages > 2:
            out |= run.backward(forward, stages > 3)
            again = run.backward(run.forward(), stages > 3)
            if not equal(out, again):
                rows["deterministic"] = (math.nan, 0.0)
        synchronize()
        if "key_dots" in out:
            out["query_dots"] = out["query_dots"][..., : case.tokens]
            out["key_dots"] = out["key_dots"][0, ..., : case.tokens]
            # The queries' sums vanish exactly: their error is measured against the size of the keys'.
            size = exact["key_dots"].norm() / exact["key_dots"].numel() ** 0.5
            for group in (exact, plain, out):
                group["query_dots"] = group["query_dots"] + size
        if "dinitial" in out:
            out["dinitial"] = out["dinitial"][..., : case.head_dim + 1]
        if run.sizes.steps_workspace:
            rows |= query_scan_rows(run, exact, plain, reference, final, eps)
        if stages > 3 and run.sizes.steps_workspace and not case.boundary:
            rows |= key_grad_rows(run, forward, reference, exact, plain, out, eps)
        for name in exact:
            if name in terms and exact[name].norm() < 1e-9 * terms[name]:  # T = 1: zero, the sum of terms that cancel
                wrong = float((out[name].double() - exact[name]).norm()) / terms[name]
                rows[name] = (wrong, eps)
            elif name in out:
                rows[name] = (error(out[name], exact[name]), error(plain[name], exact[name]))
        # The normaliser is not rounded to 16 bits at the end, the operands of its sum are.
        rows["normalizer"] = (rows["normalizer"][0], max(rows["normalizer"][1], eps / 2))
    return {name: {"error": e, "plain": p, "ok": e <= 2 * p} for name, (e, p) in rows.items()}


def query_scan_rows(
    run: Run, exact: dict[str, Tensor], plain: dict[str, Tensor], states: Tensor, final: Tensor, eps: float
) -> dict[str, tuple[float, float]]:
    """What pt_query_scan computes."""
    ours, again = run.query_scan(), run.query_scan()
    dim = run.case.head_dim
    rows = {}
    if not equal(ours, again):
        rows["query_scan deterministic"] = (math.nan, 0.0)
    packed = {name: getattr(run, name) for name in ("packed_q", "packed_k", "packed_v")}
    for wanted in (True, False):  # a final state: tokens are packed by one kernel or another
        if not equal(run.query_scan(wanted, packs=True), run.query_scan(wanted) | packed):
            rows[f"query_scan packing, final {wanted}"] = (math.nan, 0.0)
    if not all(x.isfinite().all() for x in ours.values()):
        rows["query_scan written"] = (math.nan, 0.0)
    # chunk_scan_grad takes both entries of a pair in a tile on the diagonal for one number.
    diagonal = torch.tensor([d == 0 for *_, d in tile_pairs(dim)], device=DEVICE)
    norms = ours["states"][:, :, diagonal, -1, :, :2].unflatten(-2, (8, 8))
    if not torch.equal(norms, norms.transpose(-3, -2)):
        rows["query_scan symmetric"] = (math.nan, 0.0)
    for name in ("y", "normalizer"):
        rows[f"query_scan {name}"] = (error(ours[name], exact[name]), error(plain[name], exact[name]))
    rows["query_scan normalizer"] = (rows["query_scan normalizer"][0], max(rows["query_scan normalizer"][1], eps / 2))
    rows["query_scan states"] = (error(unpack_states(ours["states"], dim), states), 2 * eps)
    rows["query_scan final"] = (error(ours["final"][..., :dim], final[..., :dim]), eps)
    rows["query_scan final normalizer"] = (error(ours["final"][..., dim], final[..., dim]), eps / 2)
    alone = run.query_scan(final_only=True)["final"]
    if not torch.equal(alone, ours["final"]):
        rows["query_scan final alone"] = (math.nan, 0.0)
    return rows


def key_grad_rows(
    run: Run,
    forward: dict[str, Tensor],
    states: Tensor,
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
    out: dict[str, Tensor],
    eps: float,
) -> dict[str, tuple[float, float]]:
    """What pt_key_grads computes, and what crosses the ends of chunks by its gradients of states."""
    ours, again = run.key_grads(), run.key_grads()
    dim, tokens = run.case.head_dim, run.case.tokens
    flow = run.state_flow(forward["states"], ours["dstates"], None, True)
    rows = {}
    if not equal(ours, again):
        rows["key_grads deterministic"] = (math.nan, 0.0)
    # dn' may be rounded differently here and there; but what follows from it is the same.
    packing, expected = run.key_grads(packs=forward), run.packed_dn
    rows["key_grads packing"] = (error(packing["packed_dn"].double(), expected.double()), eps)
    run.packed_dn = packing["packed_dn"]
    if not equal(packing, run.key_grads()):
        rows["key_grads packed before"] = (math.nan, 0.0)
    run.packed_dn = expected
    if not all(x.isfinite().all() for x in ours.values()):
        rows["key_grads written"] = (math.nan, 0.0)
    ours["dstates"] = unpack_states(ours["dstates"], dim)
    ours["key_dots"] = ours["key_dots"][0, ..., :tokens]
    for name in ("dv", "dk", "key_dots"):
        rows[f"key_grads {name}"] = (error(ours[name], exact[name]), error(plain[name], exact[name]))
    # The stages' are as exact.
    rows["key_grads dstates"] = (error(ours["dstates"], unpack_states(out["dstates"], dim)), 2 * eps)
    rows["key_grads dinitial"] = (error(ours["dinitial"][..., : dim + 1], out["dinitial"].double()), 2 * eps)
    alone = run.key_grads(final_only=True)["dinitial"]
    if not torch.equal(alone, ours["dinitial"]):
        rows["key_grads dinitial alone"] = (math.nan, 0.0)
    # Every term of <S, E> is wrong by half a spacing of both at most.
    weights = torch.tensor([2.0 if d else 1.0 for *_, d in tile_pairs(dim)], device=DEVICE)
    terms = states[:, 1:] * ours["dstates"][:, :-1] * weights[:, None, None]
    rows["key_grads flow"] = (float((flow.double() - exact["flow"]).norm() / terms.norm()), 2 * eps)
    return rows


def median_ms(call, repeats: int = 10) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def time_stages(library: ctypes.CDLL, case: Case, arch: int, stages: int) -> dict[str, float]:
    run = Run(library, case, arch)
    forward = run.forward() if stages > 1 else {"states": run.new(*run.state_shape, dtype=case.dtype)}
    out = {"chunk_state": median_ms(lambda: run.chunk_state(False, forward["states"], None))}
    if stages > 1:
        out["chunk_scan y"] = median_ms(
            lambda: run.chunk_scan(False, forward["states"], forward["y"], forward["normalizer"])
        )
    if stages > 2:
        back = run.backward(forward, stages > 3)
        out["chunk_state reverse"] = median_ms(lambda: run.chunk_state(True, back["dstates"], None))
        out["chunk_scan dv"] = median_ms(lambda: run.chunk_scan(True, back["dstates"], back["dv"], None))
        if stages > 3:
            out["chunk_scan_grad dq"] = median_ms(
                lambda: run.chunk_scan_grad(False, forward["states"], back["dq"], back["query_dots"])
            )
            out["chunk_scan_grad dk"] = median_ms(
                lambda: run.chunk_scan_grad(True, back["dstates"], back["dk"], back["key_dots"])
            )
    return out


def cases(head_dim: int, dtype: torch.dtype) -> dict[str, Case]:
    base = {"head_dim": head_dim, "dtype": dtype}
    return {
        "two chunks": Case(**base),
        "no gate": Case(gate=0.0, **base),
        "tail": Case(batch=2, tokens=1000, chunk=192, **base),
        "T=1": Case(tokens=1, chunk=64, **base),
        "odd blocks": Case(batch=2, tokens=1000, query_heads=2, key_heads=1, chunk=384, gate=0.005, **base),
        "chunk beyond T": Case(tokens=300, chunk=1024, **base),
        "grouped heads": Case(query_heads=6, key_heads=2, tokens=700, chunk=128, **base),
        "documents": Case(tokens=1024, chunk=256, documents=(1, 65, 128, 300, 512, 777), gate=0.01, **base),
        "boundary": Case(tokens=600, chunk=256, boundary=True, query_heads=4, key_heads=2, **base),
        "steps, documents, boundary": Case(
            tokens=800, chunk=128, query_heads=2, key_heads=1, documents=(200, 640), boundary=True, **base
        ),
        "strong gate": Case(tokens=512, chunk=512, gate=20.0, **base),
        "long chunk": Case(tokens=1100, chunk=1024, query_heads=2, key_heads=1, gate=0.001, **base),
        "long chunk, documents": Case(
            tokens=900, chunk=768, query_heads=1, key_heads=1, gate=0.001, documents=(300, 500, 641), **base
        ),
        "segments": Case(tokens=1000, chunk=64, query_heads=1, key_heads=1, gate=0.001, boundary=True, **base),
        "segments and documents": Case(tokens=1000, chunk=64, query_heads=2, key_heads=1, documents=(500,), **base),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--arch", type=int, default=0, choices=(0, 80, 90))
    parser.add_argument(
        "--stages",
        type=int,
        default=4,
        help="1 chunk_state, 2 and chunk_scan, 3 and their reverse, 4 and chunk_scan_grad; from 2 on query_scan, at 4 key_grads, "
        "where they take the problem",
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--cases", nargs="+", help="only these")
    parser.add_argument("--time", action="store_true", help="time the headline problem")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024])
    parser.add_argument("--output", help="write everything as JSON")
    args = parser.parse_args()
    library = ctypes.CDLL(args.library)
    library.pt_last_error.restype = ctypes.c_char_p
    record: dict = {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU emulation",
        "torch": torch.__version__,
        "kernels": [],
        "checks": [],
        "times_ms": [],
    }
    count = I32()
    library.pt_kernel_count(ctypes.byref(count))
    for index in range(count.value):
        info = KernelInfo()
        if library.pt_kernel_info(index, ctypes.byref(info)):
            raise RuntimeError(library.pt_last_error().decode())
        record["kernels"].append(
            {name: getattr(info, name) for name, _ in KernelInfo._fields_} | {"name": info.name.decode()}
        )
    good = True
    for head_dim in args.head_dims:
        for dtype in args.dtypes:
            for name, case in cases(head_dim, getattr(torch, dtype)).items():
                if args.cases and name not in args.cases:
                    continue
                rows = check(library, case, args.arch, args.stages)
                record["checks"].append({"head_dim": head_dim, "dtype": dtype, "case": name, "rows": rows})
                good &= all(row["ok"] for row in rows.values())
                text = "  ".join(
                    f"{n} {r['error']:.1e}/{r['plain']:.1e}{'' if r['ok'] else ' <--'}" for n, r in rows.items()
                )
                print(f"K={head_dim} {dtype} {name}: {text}", flush=True)
    if args.time:
        for head_dim in args.head_dims:
            for dtype in args.dtypes:
                for chunk in args.chunks:
                    case = Case(
                        tokens=65536,
                        query_heads=8,
                        key_heads=8,
                        head_dim=head_dim,
                        chunk=chunk,
                        gate=0.01,
                        dtype=getattr(torch, dtype),
                    )
                    times = time_stages(library, case, args.arch, args.stages)
                    record["times_ms"].append({"head_dim": head_dim, "dtype": dtype, "chunk": chunk, "stages": times})
                    text = "  ".join(f"{n} {ms:.3f}" for n, ms in times.items())
                    print(f"K={head_dim} {dtype} chunk={chunk} ms: {text}  total {sum(times.values()):.3f}", flush=True)
    if args.output:
        with open(args.output, "w") as file:
            json.dump(record, file, indent=1)
    print("all within twice the plain evaluation" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
