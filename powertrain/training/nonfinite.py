"""Non-finite losses and gradients: find the layer that went first, and keep what replays the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def autocast(precision: str, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context that Lightning enters for `precision` (see `TrainerConfig.precision`)."""
    if precision == "bf16-mixed":
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def diagnose(model: nn.Module, micro_batches: list[dict[str, Tensor]], precision: str) -> Diagnosis:
    """Run the micro-batches forward and backward under observation; gradients are left empty.

    Args:
        model: takes `(input_ids, labels=, cu_seqlens=)` and returns an object with `loss`.
        micro_batches: batches on the model's device.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return Diagnosis(float("nan"), weights=name)
    found: dict[str, str] = {}
    handles = []

    def observe_gradient(name: str, gradient: Tensor) -> None:
        if "backward" not in found and not _finite(gradient):
            found["backward"] = name

    def observe_output(name: str, output: Any) -> None:
        for tensor in _tensors(output):
            if "forward" not in found and not _finite(tensor):
                found["forward"] = name
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: observe_gradient(f"{name}'s output", gradient))

    for name, module in model.named_modules():
        label = name or "the loss"
        handles.append(module.register_forward_hook(lambda _m, _i, output, label=label: observe_output(label, output)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(lambda gradient, name=name: observe_gradient(name, gradient)))
    total, labels_seen = 0.0, 0
    try:
        with torch.enable_grad():
            for batch in micro_batches:
                device_type = batch["input_ids"].device.type
                with autocast(precision, device_type):
                    # Not through a compiled call: the observers belong to the layers of the eager model.
                    output = nn.Module._call_impl(
                        model,
                        batch["input_ids"],
                        labels=batch["labels"],
                        cu_seqlens=batch.get("cu_seqlens"),
                        loss_reduction="sum",
                    )
                total += float(output.loss.detach())
                labels_seen += int((batch["labels"] != IGNORE_INDEX).sum())
                if found:
                    break
                output.loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return Diagnosis(total / max(1, labels_seen), forward=found.get("forward"), backward=found.get("backward"))


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
) -> Path | None:
    """Write what replays the step of this rank; None where the directory beside it already holds enough records."""
    others = [entry for entry in directory.parent.glob("step-*") if entry != directory]
    if len(others) >= MAX_RECORDS:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"rank-{rank}.pt"
    torch.save(
        {
            "step": step,
            "precision": precision,
            "model_config": model_config,
            "state_dict": {name: value.detach().cpu() for name, value in model.state_dict().items()},
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
        path: `runs/<run_id>/nonfinite/step-N/rank-R.pt`.
        model: a model of the record's shape; None builds the GPT that the record describes.
        device: where to run; another device than the training's may round differently.
    Returns:
        The diagnosis of this run; `str()` of it is the sentence that training printed.
    """
    record = torch.load(path, map_location=device, weights_only=True)
    if model is None:
        from powertrain.models.config import MixerConfig, ModelConfig
        from powertrain.models.gpt import GPT

        fields = dict(record["model_config"])
        model = GPT(ModelConfig(**{**fields, "mixer": MixerConfig(**fields["mixer"])}))
    model = model.to(device).train()
    model.load_state_dict(record["state_dict"])
    before = capture_rng()
    restore_rng({name: value.cpu() if isinstance(value, Tensor) else value for name, value in record["rng"].items()})
    try:
        return diagnose(model, record["micro_batches"], record["precision"])
    finally:
        restore_rng(before)
