"""Non-finite losses and gradients: find the layer that went first, and keep what replays the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from powertrain.ops.context_shard import ContextGroup
from powertrain.training.inputs import model_inputs
from powertrain.training.metrics import IGNORE_INDEX
from powertrain.training.rng import capture_rng, restore_rng

# Each record holds the weights; a run that skips updates for weeks must not fill the disk with them.
MAX_RECORDS = 5


class NonFiniteError(RuntimeError):
    """Training stopped before an update because a loss or gradient was not finite; the message says where."""


@dataclass(frozen=True)
class Diagnosis:
    """What a replay of a step's micro-batches found, in the order in which numbers were computed."""

    loss: float  # mean loss over the labels of all micro-batches, nats per token
    weights: str | None = None  # first parameter that was not finite before the step
    forward: str | None = None  # first layer whose output was not finite
    backward: str | None = None  # first layer or parameter whose gradient was not finite

    def __str__(self) -> str:
        if self.weights:
            return f"the weights of {self.weights} were not finite before the step"
        if self.forward:
            return f"the output of {self.forward} went first"
        if self.backward:
            return f"the gradient of {self.backward} went first"
        return "a replay of the batch was finite (an overflow in the sum over micro-batches or ranks, or chance)"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


@contextlib.contextmanager
def fp32_products(precision: str, device_type: str) -> Iterator[None]:
    """Let a GPU round the factors of fp32 products to TF32 beside bf16 ones: to 11 bits, where bf16 has 8."""
    before = torch.get_float32_matmul_precision()
    if precision == "bf16-mixed" and device_type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def autocast(precision: str, device_type: str) -> Iterator[None]:
    """Compute as training does: in `fp32_products` and the context that Lightning enters for `precision` (see
    `TrainerConfig.precision`).
    """
    with fp32_products(precision, device_type):
        if precision == "bf16-mixed":
            with torch.autocast(device_type, dtype=torch.bfloat16):
                yield
        else:
            yield


def diagnose(
    model: nn.Module, micro_batches: list[dict[str, Tensor]], precision: str, context: ContextGroup | None = None
) -> Diagnosis:
    """Run the micro-batches forward and backward under observation; gradients are left empty.

    Every process runs all of them whatever it finds, because those that share a model or sequences do it together.

    Args:
        model: takes `(input_ids, labels=, cu_seqlens=)` and returns an object with `loss`.
        micro_batches: batches on the model's device.
        context: the processes that share the sequences with this one.
    """
    weights = next((name for name, parameter in model.named_parameters() if not _finite(parameter)), None)
    found: dict[str, str] = {}
    handles: list[RemovableHandle] = []
    observed: set[str] = set()  # parameters whose gradients are looked at
    # Only the first micro-batch in which something was found tells where it began.
    observing = True

    def observe(key: str, name: str, tensor: Tensor) -> None:
        if observing and key not in found and not _finite(tensor):
            found[key] = name

    def observe_gradient(name: str, gradient: Tensor) -> None:
        observe("backward", name, gradient)

    def observe_output(name: str, output: Any) -> None:
        for tensor in _tensors(output):
            observe("forward", name, tensor)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: observe_gradient(f"{name}'s output", gradient))

    def observe_parameters(prefix: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(prefix):
            if parameter.requires_grad and name not in observed and not isinstance(parameter, DTensor):
                observed.add(name)
                handles.append(parameter.register_hook(lambda gradient, name=name: observe_gradient(name, gradient)))

    for name, module in model.named_modules():
        label = name or "the loss"
        handles.append(module.register_forward_hook(lambda _m, _i, output, label=label: observe_output(label, output)))
        # Gradients of a sharded model arrive at the gathered parameters, which modules have only while they run.
        handles.append(module.register_forward_pre_hook(lambda module, _i, name=name: observe_parameters(name, module)))
    total, labels_seen = 0.0, 0
    try:
        # Compiled code would run without the observers.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            for batch in micro_batches:
                device_type = batch["input_ids"].device.type
                with autocast(precision, device_type):
                    inputs = model_inputs(batch, context)
                    output = model(**inputs, loss_reduction="sum")
                total += float(output.loss.detach())
                labels_seen += int((inputs["labels"] != IGNORE_INDEX).sum())
                output.loss.backward()
                observing = observing and not found
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return Diagnosis(total / max(1, labels_seen), weights, found.get("forward"), found.get("backward"))


def first_fault(diagnoses: list[Diagnosis]) -> tuple[int | None, Diagnosis]:
    """Return the rank whose diagnosis lies earliest in the computation, and that diagnosis; equals by rank.

    The rank is None where no replay found anything: gradients are summed by then, and do not tell whose it was.
    """

    def stage(rank: int) -> int:
        found = diagnoses[rank]
        return next((i for i, name in enumerate((found.weights, found.forward, found.backward)) if name), 3)

    rank = min(range(len(diagnoses)), key=stage)
    return (rank if stage(rank) < 3 else None), diagnoses[rank]


def has_room(directory: Path) -> bool:
    """Whether the directory of records that `directory` lies in has room for it."""
    others = [entry for entry in directory.parent.glob("step-*") if entry != directory]
    return len(others) < MAX_RECORDS


def save_record(
    directory: Path,
    rank: int,
    *,
    model: nn.Module,
    model_config: dict[str, Any] | None,
    micro_batches: list[dict[str, Tensor]],
    rng: dict[str, Any],
    step: int,
    precision: str,
    diagnosis: Diagnosis,
) -> Path:
    """Write what replays the step of this rank; the weights once for all ranks, by rank 0. A collective."""
    directory.mkdir(parents=True, exist_ok=True)
    # One at a time: no more than one whole weight of a sharded model is on a device.
    weights = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if rank == 0:
            weights[name] = whole.detach().cpu()
    if rank == 0:
        torch.save(weights, directory / "weights.pt")
    path = directory / f"rank-{rank}.pt"
    torch.save(
        {
            "step": step,
            "precision": precision,
            "model_config": model_config,
            "micro_batches": [{name: value.cpu() for name, value in batch.items()} for batch in micro_batches],
            "rng": rng,
            "diagnosis": str(diagnosis),
        },
        path,
    )
    return path


def replay(path: str | Path, *, model: nn.Module | None = None, device: str = "cpu") -> Diagnosis:
    """Run the batch of a saved record again, with the weights and random state it had.

    Args:
        path: `runs/<run_id>/nonfinite/step-N/rank-R.pt`; the weights lie beside it.
        model: a model of the record's shape; None builds the GPT that the record describes.
        device: where to run; another device than the training's may round differently.
    Returns:
        The diagnosis of this run; `str()` of it is the sentence that training printed.
    """
    path = Path(path)
    record = torch.load(path, map_location=device, weights_only=True)
    weights = torch.load(path.with_name("weights.pt"), map_location=device, weights_only=True)
    if model is None:
        from powertrain.models.config import MixerConfig, ModelConfig
        from powertrain.models.gpt import GPT

        fields = dict(record["model_config"])
        model = GPT(ModelConfig(**{**fields, "mixer": MixerConfig(**fields["mixer"])}))
    model = model.to(device).train()
    model.load_state_dict(weights)
    before = capture_rng()
    restore_rng(record["rng"])
    try:
        return diagnose(model, record["micro_batches"], record["precision"])
    finally:
        restore_rng(before)
