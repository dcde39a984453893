"""How a global batch is cut: devices, sequences of one forward pass, and micro-batches of one step."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, replace

import torch
from torch import nn

from powertrain.divisors import divisors
from powertrain.processes import local_rank
from powertrain.training.config import TrainerConfig
from powertrain.training.nonfinite import autocast
from powertrain.wording import counted

# On a CPU more tokens in a pass only spend memory: the matrix products are large enough.
CPU_MICRO_BATCH_TOKENS = 8192
# Share of the GPU's memory left to the optimizer's temporaries, NCCL and fragmentation by the probe below.
GPU_RESERVE = 0.1


@dataclass(frozen=True)
class Devices:
    """Where a run executes."""

    accelerator: str  # cpu or gpu, as Lightning names them
    per_node: int  # processes on each node
    num_nodes: int
    context_parallel: int = 1  # neighbouring processes that share each sequence

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.per_node * self.num_nodes

    @property
    def data_parallel(self) -> int:
        """Processes, or groups of those that share sequences, that read different samples."""
        return self.world_size // self.context_parallel

    @property
    def torch_device(self) -> torch.device:
        """The device of this process, as far as its local rank is known from the environment."""
        if self.accelerator == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", local_rank())


def resolve_devices(config: TrainerConfig) -> Devices:
    """Decide accelerator and number of processes from the configuration and the machine.

    Errors:
        ValueError: more GPUs are asked for than there are, they do not divide into groups that share sequences, or the
            global batch cannot be shared equally.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accelerator = config.accelerator if config.accelerator != "auto" else ("gpu" if gpus else "cpu")
    if accelerator == "gpu":
        per_node = gpus if config.devices == "auto" else int(config.devices)
        if per_node < 1 or per_node > gpus:
            needed = f"{per_node} GPUs" if per_node > 1 else "a GPU"
            raise ValueError(
                f"trainer.accelerator={config.accelerator} with trainer.devices={config.devices} needs"
                f" {needed} on this machine, which has {gpus or 'none'}."
            )
    else:
        per_node = 1 if config.devices == "auto" else int(config.devices)
    devices = Devices(accelerator, per_node, config.num_nodes, config.context_parallel)
    if devices.world_size % config.context_parallel:
        raise ValueError(
            f"trainer.context_parallel={config.context_parallel} does not divide the {devices.world_size} processes of"
            f" trainer.devices={config.devices} and trainer.num_nodes={config.num_nodes} into equal groups;"
            f" allowed are {divisors(devices.world_size)}."
        )
    rows = config.global_batch_tokens // config.context_length
    if rows % devices.data_parallel:
        sharing = f"groups of {config.context_parallel} processes" if config.context_parallel > 1 else "processes"
        raise ValueError(
            f"trainer.global_batch_tokens={config.global_batch_tokens} is {counted(rows, 'sequence')} of"
            f" {config.context_length} tokens, which {devices.data_parallel} {sharing} cannot share equally;"
            f" give a multiple of {config.context_length * devices.data_parallel}."
        )
    return devices


def with_precision(config: TrainerConfig) -> TrainerConfig:
    """Decide a precision that is left to the device: bf16-mixed on a GPU that computes in bf16, else 32-true.

    On every CPU it is 32-true, so that the numbers of a run do not depend on which CPU of a cluster it met.

    Errors:
        ValueError: see `resolve_devices`.
    """
    if config.precision != "auto":
        return config
    on_gpu = resolve_devices(config).accelerator == "gpu"
    in_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(config, precision="bf16-mixed" if in_bf16 else "32-true")


def _fits(model: nn.Module, rows: int, context: int, precision: str, device: torch.device) -> bool:
    """Whether a forward and backward pass leaves room for the optimizer's two moments and the reserve."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    ids = torch.zeros(rows, context, dtype=torch.int64, device=device)
    cu_seqlens = torch.arange(0, rows * context + 1, context, dtype=torch.int32, device=device)
    try:
        with autocast(precision, "cuda"):
            loss = model(ids, labels=ids, cu_seqlens=cu_seqlens, loss_reduction="sum").loss
        loss.backward()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        loss = None
        model.zero_grad(set_to_none=True)
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # Of a GPU that other processes use as well, only the rest is ours.
    free, _ = torch.cuda.mem_get_info(device)
    ours = free + torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_allocated(device) + moments <= (1 - GPU_RESERVE) * ours


def choose_micro_batch_size(model: nn.Module, config: TrainerConfig, devices: Devices) -> int:
    """Return the sequences of one forward pass on one device.

    The configured number, else the largest divisor of a device's share of the global batch that fits: on a GPU the
    largest whose forward and backward pass fit its memory, on a CPU the largest of at most 8192 tokens. Where
    processes share sequences, a device has its slice of each.

    Errors:
        ValueError: the configured number does not divide the share, one sequence does not fit the GPU, or on GPUs
            there is none although processes share the model or sequences.
    """
    share = config.global_batch_tokens // config.context_length // devices.data_parallel
    tokens = -(-config.context_length // devices.context_parallel)  # of a sequence, on one device
    candidates = divisors(share)
    if config.micro_batch_size is not None:
        if config.micro_batch_size not in candidates:
            raise ValueError(
                f"trainer.micro_batch_size={config.micro_batch_size} does not divide the"
                f" {counted(share, 'sequence')} that each of {devices.data_parallel}"
                f" {'groups of ' if devices.context_parallel > 1 else ''}processes has in a global batch;"
                f" allowed are {candidates}."
            )
        return config.micro_batch_size
    if devices.accelerator == "cpu":
        limit = max(1, CPU_MICRO_BATCH_TOKENS // tokens)
        return max(n for n in candidates if n <= limit)
    if config.strategy == "fsdp":
        raise ValueError(
            "trainer.strategy=fsdp needs trainer.micro_batch_size on GPUs, because what fits is tried out with the"
            f" whole model on one of them; allowed are {candidates}."
        )
    if devices.context_parallel > 1:
        raise ValueError(
            f"trainer.context_parallel={devices.context_parallel} needs trainer.micro_batch_size on GPUs, because what"
            " fits is tried out on one of them, without what the processes of a sequence exchange; allowed are"
            f" {candidates}."
        )
    device = devices.torch_device
    if config.deterministic:
        # cuBLAS reads it with the first product of the process, which is one of the trials below; Lightning sets it
        # only afterwards.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model.to(device)
    # From small to large: a pass that runs out of memory costs more than all that fit.
    best = None
    for rows in candidates:
        if not _fits(model, rows, tokens, config.precision, device):
            break
        best = rows
    gc.collect()
    torch.cuda.empty_cache()
    if best is None:
        raise ValueError(
            f"one sequence of trainer.context_length={config.context_length} does not fit the memory of"
            f" {torch.cuda.get_device_name(device)}; shorten it, take a smaller model, or set"
            " model.activation_checkpointing=true."
        )
    return best
