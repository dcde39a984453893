"""The optimizer, with weight decay on the parameters that the model names for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from powertrain.training.config import OptimConfig
from powertrain.training.distribution import local_shards


class _ShardedAdamW(torch.optim.AdamW):
    """AdamW whose update works on this process's shards; parameters and moments stay sharded tensors."""

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        # Fills the lists (parameters, gradients, moments, steps) that the update of this group then changes in place.
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = local_shards(tensors)
        return has_complex


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`; `model.decay_parameters()` names those that decay.

    Fused where every parameter lies on a device that has the kernel (CPU and CUDA), else one loop over tensors.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decay = model.decay_parameters()  # type: ignore[operator]
    assert decay <= set(named), f"decay_parameters names what is not trainable: {sorted(decay - set(named))}"
    groups = [
        {"params": [p for name, p in named.items() if name in decay], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named.items() if name not in decay], "weight_decay": 0.0},
    ]
    fused = config.fused and all(p.device.type in ("cpu", "cuda") for p in named.values())
    optimizer = _ShardedAdamW if any(isinstance(p, DTensor) for p in named.values()) else torch.optim.AdamW
    return optimizer(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
        foreach=None if fused else True,
    )
