"""The processes that train together: how they meet, what they agree on, and how a model is shared among them.

docs/distribution.md says why it is done so.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import itertools
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from powertrain.ops.context_shard import ContextGroup
from powertrain.processes import launcher
from powertrain.training.batching import Devices
from powertrain.training.config import TrainerConfig
from powertrain.training.ranks import Ranks, agree_to_start
from powertrain.training.signals import POLL, StopSignals

# Largest share of a GPU's memory that fsdp takes unasked, to gather and reduce once a step.
WHOLE_SHARE = 0.1


def launcher_environment(devices: Devices) -> ClusterEnvironment | None:
    """Return Lightning's view of what started this process as one of several, or None where it is alone."""
    match launcher():
        case "torchrun":
            return TorchElasticEnvironment()
        case "srun":
            # Lightning's own requeue saves inside the signal's handler, whose barrier meets other ranks' collectives.
            return SLURMEnvironment(auto_requeue=False)
        case "powertrain":
            environment = LightningEnvironment()
            environment.set_world_size(int(os.environ.get("WORLD_SIZE", devices.world_size)))
            environment.set_global_rank(environment.node_rank() * devices.per_node + environment.local_rank())
            return environment
    return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None


# Every process counts alike how often it has met the others, so that no meeting reads what an earlier one left.
_meetings = itertools.count()


@functools.cache
def _common_store(rank: int, size: int, address: str, port: str, timeout: timedelta) -> torch.distributed.Store:
    """Connect to the store of all processes, which rank 0 (or torchrun) keeps for as long as it lives.

    Address and port are those of the environment, which is where they are read from.

    Errors:
        OSError: another program has the port.
    """
    if _keeps_store(rank):
        try:
            # Without waiting for the others: native code that waits lets no signal through.
            return torch.distributed.TCPStore(
                address, int(port), size, True, timeout, wait_for_workers=False, multi_tenant=True
            )
        except torch.distributed.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise OSError(
                f"another program has port {port} of {address}, where the processes meet: set MASTER_PORT to a free one"
            ) from None
    store, _, _ = next(torch.distributed.rendezvous("env://", rank, size, timeout=timeout))
    return store


def _keeps_store(rank: int) -> bool:
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _wait_for_store(address: str, port: str, signals: StopSignals, timeout: timedelta) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        signals.raise_received()
        try:
            socket.create_connection((address, int(port)), timeout=1.0).close()
            return
        except OSError:
            time.sleep(POLL)
    raise TimeoutError(f"the first process has not opened {address}:{port} within {timeout.total_seconds():g} s")


@contextlib.contextmanager
def process_group(config: TrainerConfig, devices: Devices, signals: StopSignals) -> Iterator[Ranks]:
    """Meet the other processes of the run (NCCL on GPUs, gloo on CPUs); alone there is nothing to set up.

    Args:
        signals: deferred by the caller; one that comes before all have met ends the meeting, on all processes.
    Errors:
        Stopped: this process or another got a signal before all had met.
        ValueError: the processes that were started are not those that the configuration asks for.
    """
    environment = launcher_environment(devices)
    # Slurm's variables of a batch script, or of a shell in an allocation, are of many tasks, none of which runs here.
    started = environment.world_size() if environment is not None and launcher() is not None else 1
    if started != devices.world_size:
        raise ValueError(
            f"trainer.devices={config.devices} and trainer.num_nodes={config.num_nodes} make {devices.world_size}"
            f" processes, but {started} {'was' if started == 1 else 'were'} started: use `powertrain train`, torchrun"
            " or srun with equal numbers."
        )
    if devices.world_size == 1:
        # Lightning takes it from variables, of which one may be left over from something else.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        yield Ranks(device=devices.torch_device)
        return
    assert environment is not None
    rank, size, device = environment.global_rank(), environment.world_size(), devices.torch_device
    if device.type == "cuda":
        device = torch.device("cuda", environment.local_rank())
        torch.cuda.set_device(device)
    # Which GPU is this process's: srun says it by a name of its own.
    os.environ["LOCAL_RANK"] = str(environment.local_rank())
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    # The watch over hangs must speak first: it knows the stacks.
    timeout = timedelta(seconds=2 * config.hang_timeout + 60)
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    keeps_store = _keeps_store(rank)
    if not keeps_store:
        _wait_for_store(address, port, signals, timeout)
    common = _common_store(rank, size, address, port, timeout)
    store = torch.distributed.PrefixStore(f"fit/{next(_meetings)}", common)
    agree_to_start(torch.distributed.PrefixStore("meeting", store), size, signals, timeout, keeps_store=keeps_store)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    ranks = Ranks(rank, size, device, torch.distributed.PrefixStore("powertrain", store))
    yield ranks
    # Rank 0 keeps the store: it leaves last. After an error there may be nobody left to wait for.
    ranks.max(0)
    torch.distributed.destroy_process_group()
    _end_groups_before_python()


@functools.cache
def _end_groups_before_python() -> None:
    """Have what is left of process groups end before the interpreter does.

    A thread of gloo that lets go of a last tensor while the interpreter is being taken down cannot get its lock, and
    the process aborts. Models, meshes and groups refer to each other: only the garbage collector ends the threads.
    """
    atexit.register(gc.collect)


def context_group(ranks: Ranks, size: int) -> ContextGroup | None:
    """Return the `size` neighbouring ranks that share sequences with this one, None for 1; a collective of all."""
    if size == 1:
        return None
    group, _ = torch.distributed.new_subgroups(size)
    return ContextGroup(group, ranks.rank % size, size)


def shard_model(model: nn.Module, ranks: Ranks, precision: str) -> None:
    """Divide the parameters of `model` over all ranks (FSDP2), in place, each block a unit that is gathered as a whole.

    In bf16-mixed the blocks are gathered in bf16 and gradients reduced in fp32. What is not in a block (embedding,
    last norm, head) is gathered in fp32, so that the residual stream is fp32 as it is without sharding.

    Args:
        model: has `blocks`, an `nn.ModuleList`.
    """
    mesh = torch.distributed.init_device_mesh(ranks.device.type, (ranks.size,), mesh_dim_names=("shard",))
    gathered = torch.bfloat16 if precision == "bf16-mixed" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = model.blocks
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    outer = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=outer)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Put `model` on `device`; where it was built on the meta device, draw its weights (each rank only its shards)."""
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
        model.init_weights()  # type: ignore[operator]
    else:
        model.to(device)


def compile_model(model: nn.Module) -> None:
    """Compile the blocks of `model`, in place, so that the keys of its state stay the same.

    Block by block, because one graph then serves all blocks of a kind, gradients of the last blocks are reduced while
    those before are computed, and the hooks that gather a block's weights stay outside of its graph. What earlier
    models of this process left is forgotten: all blocks share the code that the compiler's limits count.
    """
    torch.compiler.reset()
    for block in model.blocks:  # type: ignore[union-attr]
        block.forward = torch.compile(block.forward)


class ShardedStrategy(DDPStrategy):
    """Lightning's distributed strategy for a model that is sharded already: nothing is wrapped, FSDP2 synchronises.

    Args:
        keeps_whole: between the micro-batches of a step, keep whole gradients and gathered blocks, instead of shards.
    """

    def __init__(self, *, keeps_whole: bool) -> None:
        super().__init__()
        self.keeps_whole = keeps_whole

    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        # The parameters are there already; Lightning's module learns its device.
        self.model_to_device()
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def teardown(self) -> None:
        """End without moving the model to the CPU, where its shards do not belong."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    @property
    def _sharded(self) -> FSDPModule:
        model = self.lightning_module.model  # type: ignore[union-attr]
        assert isinstance(model, FSDPModule)
        return model

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep what a micro-batch that is not the last has, if asked to: whole, unreduced gradients and the weights."""
        if not self.keeps_whole:
            yield
            return
        self._sharded.set_requires_gradient_sync(False)
        self._sharded.set_reshard_after_backward(False)
        try:
            yield
        finally:
            self._sharded.set_requires_gradient_sync(True)
            self._sharded.set_reshard_after_backward(True)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # Beside whole gradients, weights in 16 bits cost half as much again, and are gathered once a step.
        assert self.lightning_module is not None
        alone = self.lightning_module.trainer.accumulate_grad_batches == 1
        self._drop_blocks_after_forward(alone or not self.keeps_whole)
        return super().training_step(*args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        # Whatever follows (validation, a search for what is not finite) has no backward pass to drop them.
        self._drop_blocks_after_forward(True)
        super().post_backward(closure_loss)

    def _drop_blocks_after_forward(self, drop: bool) -> None:
        for block in self._sharded.blocks:  # type: ignore[attr-defined]
            block.set_reshard_after_forward(drop, recurse=False)


def _mean_in_order_of_ranks(state, bucket):  # DDP refuses annotations that are texts, as all are in this module
    """Average a bucket of gradients, each element added in the order of ranks; a communication hook of DDP.

    An all-reduce adds an element in an order that depends on its place in the bucket. DDP lays its buckets out anew
    after its first step, so with more than two ranks the first step after a resume would round differently.
    """
    values = bucket.buffer()
    size = torch.distributed.get_world_size()
    part = -(-values.numel() // size)
    sent = nn.functional.pad(values / size, (0, part * size - values.numel()))
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent)
    mine, *others = received.view(size, part)
    for other in others:
        mine += other
    torch.distributed.all_gather(list(sent.view(size, part)), mine)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(values.copy_(sent[: values.numel()]))
    return done


class ReproducibleStrategy(DDPStrategy):
    """DDP on CPUs, whose runs give the same bits however often they are interrupted."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, nn.parallel.DistributedDataParallel)
        self.model.register_comm_hook(None, _mean_in_order_of_ranks)


def _accumulates_whole(model: nn.Module, ranks: Ranks, config: TrainerConfig) -> bool:
    """Whether micro-batches keep whole gradients and weights (`TrainerConfig.fsdp_accumulation`); a collective."""
    if config.fsdp_accumulation != "auto":
        return config.fsdp_accumulation == "whole"
    if ranks.device.type == "cpu":
        return True
    # Gradients in fp32, and the blocks' weights in the precision that they are gathered in.
    held = sum(p.numel() for p in model.parameters()) * (6 if config.precision == "bf16-mixed" else 8)
    (smallest,) = ranks.max(-torch.cuda.get_device_properties(ranks.device).total_memory)
    return held <= WHOLE_SHARE * -smallest


def lightning_strategy(model: nn.Module, ranks: Ranks, config: TrainerConfig) -> Strategy | str:
    """Return Lightning's strategy for `model` on these processes; a collective where the model is sharded."""
    if ranks.size == 1:
        return "auto"
    if isinstance(model, FSDPModule):
        return ShardedStrategy(keeps_whole=_accumulates_whole(model, ranks, config))
    strategy = ReproducibleStrategy if ranks.device.type == "cpu" else DDPStrategy
    # Gradients alias the communication buckets: one copy less of all gradients.
    return strategy(gradient_as_bucket_view=True)


@torch.no_grad()
def local_shards(tensors: list[Tensor]) -> list[Tensor]:
    """Return what this process holds of each tensor: its shard of a sharded one, another as it is.

    The same operation on a list of sharded tensors asks Python about every one of them, while the GPU waits.
    """
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, the same on every rank; a collective where they are sharded."""
    norm = nn.utils.get_total_norm(local_shards(gradients))
    if not gradients or not isinstance(gradients[0], DTensor):
        return norm
    square = norm.square()
    torch.distributed.all_reduce(square, group=gradients[0].device_mesh.get_group())
    return square.sqrt()
