"""What every rank of a context-parallel group computes for `test_context_parallel.py`, and its problems."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from powertrain.models.config import MixerConfig
from powertrain.ops import cuda_plan
from powertrain.ops.context_parallel import context_attention, context_power_retention
from powertrain.ops.context_shard import ContextGroup, ContextShard
from tests.models.small import MIXERS, small_model, tokens
from tests.ops.accuracy import Inputs, make_inputs

# A document per kind of place: across several slices, inside one, of one token, none (a repeated offset), and, for
# T = 61, from the first token of a slice of 2, 3 and 4 ranks on (30, 20 and 40, 15 and 45).
BOUNDARIES = (0, 3, 4, 15, 20, 30, 30, 40, 45, 59)


def offsets(B: int, T: int, boundaries: tuple[int, ...]) -> Tensor:
    """Offsets of rows whose first has all `boundaries`, the second the first half of them, the third none."""
    starts = [row * T + at for row in range(B) for at in boundaries[: max(1, len(boundaries) >> row) if row < 2 else 1]]
    return torch.tensor([*starts, B * T, B * T], dtype=torch.int32)


@dataclass(frozen=True)
class OpCase:
    """A problem of one op; sizes are B, T, Hq, Hk, K and V."""

    sizes: tuple[int, int, int, int, int, int] = (3, 61, 4, 2, 5, 4)
    kind: str = "power"  # power, softmax or window
    dtype: torch.dtype = torch.float32
    documents: bool = True
    gated: bool = True
    gate_shift: float = 3.0
    checkpointed: bool = False  # power: the op runs again in the backward pass
    keywords: tuple[tuple[str, Any], ...] = ()

    def inputs(self) -> Inputs:
        inputs = make_inputs(*self.sizes, dtype=self.dtype, gated=self.gated, gate_shift=self.gate_shift)
        inputs.keywords |= dict(self.keywords)
        if self.documents:
            inputs.keywords["cu_seqlens"] = offsets(*self.sizes[:2], BOUNDARIES)
        return inputs

    def run(self, shard: ContextShard, slices: dict[str, Tensor], keywords: dict[str, Any]) -> Tensor:
        inputs = slices["Q"], slices["K"], slices["V"], slices.get("log_G")
        if self.kind != "power":
            return context_attention(*inputs, shard, **keywords)
        if self.checkpointed:
            shard, keywords = shard.remembering(), {**keywords, "layer": 0}
            return checkpoint(context_power_retention, *inputs, shard, use_reentrant=False, **keywords)[0]
        return context_power_retention(*inputs, shard, **keywords)[0]


def _power(**changes: Any) -> OpCase:
    keywords = {"chunk_size": 8, **changes.pop("keywords", {})}
    return OpCase(keywords=tuple(keywords.items()), **changes)


OP_CASES = {
    "power": _power(),
    "power_fp64": _power(dtype=torch.float64),
    "power_bf16": _power(dtype=torch.bfloat16),
    "power_ungated": _power(gated=False),
    "power_one_document": _power(documents=False),
    "power_ungated_one_document": _power(documents=False, gated=False, dtype=torch.float64),
    "power_strong_gates": _power(documents=False, gate_shift=-4.0),
    "power_one_chunk": _power(keywords={"chunk_size": None}),
    "power_deg4": _power(keywords={"deg": 4}),
    "power_deg1": _power(keywords={"deg": 1}),
    # Slices of one and two tokens.
    "power_short": _power(sizes=(2, 5, 2, 1, 3, 3), documents=False),
    "softmax": OpCase(kind="softmax"),
    "softmax_fp64": OpCase(kind="softmax", dtype=torch.float64),
    "softmax_bf16": OpCase(kind="softmax", dtype=torch.bfloat16, gated=False),
    "softmax_plain": OpCase(kind="softmax", gated=False, documents=False),
    # Windows of one token, of less than a slice, and of more than one slice.
    "window_1": OpCase(kind="window", keywords=(("window", 1),), dtype=torch.float64),
    "window_7": OpCase(kind="window", keywords=(("window", 7),)),
    "window_37": OpCase(kind="window", keywords=(("window", 37),), documents=False),
    "window_37_fp64": OpCase(kind="window", keywords=(("window", 37),), dtype=torch.float64),
}

# Documents of which get keys whose state no fp32 can hold.
OVERFLOWING = OP_CASES["power"]

# What the CUDA kernels take, emulated on a CPU.
KERNEL_CASES = {
    "kernels": _power(sizes=(2, 150, 4, 2, 32, 32), dtype=torch.bfloat16, keywords={"chunk_size": 64}),
    "kernels_one_document": _power(
        sizes=(1, 150, 2, 1, 32, 32), dtype=torch.bfloat16, documents=False, gated=False, keywords={"chunk_size": 128}
    ),
    # Chunks that a slice's state passes through.
    "kernels_long": _power(
        sizes=(1, 500, 2, 1, 32, 32), dtype=torch.bfloat16, documents=False, keywords={"chunk_size": 64}
    ),
    "kernels_checkpointed": _power(
        sizes=(2, 150, 2, 1, 32, 32), dtype=torch.bfloat16, checkpointed=True, keywords={"chunk_size": 64}
    ),
    "kernels_fp16": _power(sizes=(2, 150, 2, 1, 32, 32), dtype=torch.float16, keywords={"chunk_size": 64}),
}

MODEL_MIXERS = {**MIXERS, "hybrid_all": MixerConfig(kind="power,softmax,window,linear", window=7, chunk_size=16)}
MODEL_ROWS, MODEL_TOKENS = 2, 61


def model_of(mixer: str, **changes: Any) -> torch.nn.Module:
    """A small model with grouped query heads, of as many layers as the pattern has kinds; `changes` of the mixer.

    Chunks are as long as slices, because a chunk that begins soon after a document has a state of few keys, which is
    ill-conditioned (docs/op.md), whereas the other cut of the whole would have none.
    """
    layers = {"n_layers": 4} if mixer == "hybrid_all" else {}
    changes = {"chunk_size": None, **changes}
    return small_model(replace(MODEL_MIXERS[mixer], **changes), activation_checkpointing=mixer == "hybrid", **layers)


def model_batch() -> dict[str, Tensor]:
    ids = tokens(MODEL_ROWS, MODEL_TOKENS + 1)
    labels = ids[:, 1:].clone()
    labels[0, 17:29] = -100
    return {
        "input_ids": ids[:, :-1],
        "labels": labels,
        "cu_seqlens": offsets(MODEL_ROWS, MODEL_TOKENS, BOUNDARIES),
    }


def _op_results(case: OpCase, ranks: ContextGroup, device: str) -> dict[str, Tensor]:
    return _results_of(case, case.inputs(), ranks, device)


def _overflow_results(ranks: ContextGroup) -> dict[str, Tensor]:
    """Those of `OVERFLOWING` where all documents of the first row on rank 1, which begin and end there, overflow."""
    inputs = OVERFLOWING.inputs()
    bounds = ranks.shard(*OVERFLOWING.sizes[:2]).bounds
    inputs.tensors["K"][0, bounds[1] : bounds[2]] = 1e30
    return _results_of(OVERFLOWING, inputs, ranks, "cpu")


def _results_of(case: OpCase, inputs: Inputs, ranks: ContextGroup, device: str) -> dict[str, Tensor]:
    B, T, *_ = case.sizes
    keywords = dict(inputs.keywords)
    cu_seqlens = keywords.pop("cu_seqlens", None)
    shard = ranks.shard(B, T, cu_seqlens if cu_seqlens is None else cu_seqlens.to(device))
    slices = {name: shard.take(x).to(device).requires_grad_() for name, x in inputs.tensors.items()}
    out = case.run(shard, slices, keywords)
    grads = torch.autograd.grad(out, list(slices.values()), shard.take(cotangent(case)).to(device))
    named = {f"grad_{name}": grad.cpu() for name, grad in zip(slices, grads, strict=True)}
    return {"out0": out.detach().cpu(), **named}


def cotangent(case: OpCase) -> Tensor:
    B, T, Hq, _, _, V = case.sizes
    return torch.randn(B, T, Hq, V, generator=torch.Generator().manual_seed(1)).to(case.dtype)


def _model_results(mixer: str, ranks: ContextGroup) -> dict[str, Any]:
    batch = model_batch()
    model = model_of(mixer)
    shard = ranks.shard(MODEL_ROWS, MODEL_TOKENS, batch["cu_seqlens"])
    ids, labels = shard.take(batch["input_ids"]), shard.take(batch["labels"])
    with torch.no_grad():
        each = model(ids, labels=labels, shard=shard, loss_reduction="none").loss
        logits = model(ids, shard=shard).logits
    with mock.patch.object(dist, "all_gather", side_effect=dist.all_gather) as all_gather:
        output = model(ids, labels=labels, shard=shard, loss_reduction="sum", collect_stats=True)
        output.loss.backward()
    return {
        "loss": output.loss.detach(),
        "each": each,
        "logits": logits,
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "stats": output.stats,
        "all_gathers": all_gather.call_count,
    }


def _rank(rank: int, size: int, folder: str, where: str) -> None:
    torch.set_num_threads(1)
    device = "cpu"
    if where == "gpus":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    backend = "nccl" if where == "gpus" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    ranks = ContextGroup.of(dist.group.WORLD)
    if where == "emulated kernels":
        cuda_plan.DEVICE_TYPES.append("cpu")
    cases = {"cpus": OP_CASES, "emulated kernels": KERNEL_CASES, "gpus": OP_CASES | KERNEL_CASES}[where]
    results: dict[str, Any] = {name: _op_results(case, ranks, device) for name, case in cases.items()}
    if where == "cpus":
        results["overflow"] = _overflow_results(ranks)
        results |= {f"model_{mixer}": _model_results(mixer, ranks) for mixer in MODEL_MIXERS}
    torch.save(results, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


def launch(size: int, folder: Path, where: str = "cpus") -> list[dict[str, Any]]:
    """Run `size` processes and return the results of each, by case.

    where: cpus (every op and model), emulated kernels (`KERNEL_CASES` on CPUs) or gpus (every op, by NCCL).
    """
    mp.start_processes(_rank, (size, str(folder), where), nprocs=size, start_method="spawn")
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(size)]
