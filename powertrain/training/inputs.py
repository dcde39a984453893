"""What this process's model is called with for a batch: all of it, or a slice of each sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from powertrain.ops.context_shard import ContextGroup


def model_inputs(batch: dict[str, Tensor], context: ContextGroup | None) -> dict[str, Any]:
    """Return `input_ids`, `labels` and `cu_seqlens` of a batch (docs/architecture.md) as arguments of the model.

    With `context`, the processes that share sequences with this one, ids and labels are this process's slices, and
    `shard`, which knows the documents, is there in place of `cu_seqlens`.
    """
    ids, labels, cu_seqlens = batch["input_ids"], batch["labels"], batch.get("cu_seqlens")
    if context is None:
        return {"input_ids": ids, "labels": labels, "cu_seqlens": cu_seqlens}
    shard = context.shard(ids.shape[0], ids.shape[1], cu_seqlens)
    return {"input_ids": shard.take(ids), "labels": shard.take(labels), "shard": shard}


def own_part(x: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the part of x `(B, T)`, of the whole batch, that belongs to the labels in `inputs`."""
    return inputs["shard"].take(x) if "shard" in inputs else x
