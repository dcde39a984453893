"""What happens to a run of several processes while a test looks on: callbacks by name."""

from __future__ import annotations

import gc
import weakref

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode


class KeepGradients(pl.Callback):
    """Writes the whole gradients of the first step, as they are after clipping, to `<run_dir>/gradients.pt`."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.step != 1 or not pl_module.at_step_end:
            return
        gradients = {}
        for name, parameter in pl_module.model.named_parameters():
            gradient = parameter.grad
            gradients[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).cpu()
        if trainer.is_global_zero:
            torch.save(gradients, pl_module.run_dir / "gradients.pt")


class CheckSharded(KeepGradients):
    """Asserts that parameters, gradients and moments are divided over the ranks, and that none is held whole."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        super().on_train_batch_end(trainer, pl_module)
        if not pl_module.at_step_end:
            return
        optimizer = trainer.optimizers[0]
        for name, parameter in pl_module.model.named_parameters():
            moments = [value for key, value in optimizer.state[parameter].items() if key != "step"]
            assert len(moments) == 2, (name, optimizer.state[parameter])
            for tensor in (parameter, parameter.grad, *moments):
                assert isinstance(tensor, DTensor), name
                assert tensor.to_local().numel() <= -(-tensor.shape[0] // trainer.world_size) * tensor[0].numel(), name
                assert tensor.dtype == torch.float32


class HeldBytes:
    """Bytes of the numbers that this process holds: every floating-point tensor with its gradient, views once.

    Not those without numbers, which a compilation leaves. The million objects of the imports are looked through once.
    """

    def __init__(self) -> None:
        gc.collect()
        self._earlier = [weakref.ref(tensor) for tensor in self._tensors()]
        gc.freeze()

    def end(self) -> None:
        gc.unfreeze()

    def count(self) -> int:
        gc.collect()
        storages = {}
        earlier = [tensor for reference in self._earlier if (tensor := reference()) is not None]
        for tensor in [*earlier, *self._tensors()]:
            for x in (tensor, tensor.grad if tensor.is_leaf else None):
                local = x.to_local() if isinstance(x, DTensor) else x
                if local is not None and local.is_floating_point():
                    storage = local.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    @staticmethod
    def _tensors() -> list[torch.Tensor]:
        return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter, DTensor)]


class CheckAccumulation(KeepGradients):
    """Asserts what each micro-batch of a step sends, what is held after it, and that all ends and validates sharded."""

    def setup(self, trainer, pl_module, stage):
        assert trainer.accumulate_grad_batches >= 3

    def on_fit_start(self, trainer, pl_module):
        self._held = HeldBytes()

    def on_fit_end(self, trainer, pl_module):
        self._held.end()

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._first = pl_module.at_step_end
        if self._first:
            # The gradients of the step before are still there, unless a validation dropped them.
            gradients = [p.grad.to_local() for p in pl_module.model.parameters() if p.grad is not None]
            self._before = self._held.count() - sum(gradient.nbytes for gradient in gradients)
        self._mode = CommDebugMode()
        self._mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._mode.__exit__(None, None, None)
        model, last = pl_module.model, pl_module.at_step_end
        counts, blocks = self._mode.get_comm_counts(), len(model.blocks)
        gathers = counts.get(torch.ops.c10d._allgather_base_, 0)
        reductions = counts.get(torch.ops.c10d._reduce_scatter_base_, 0)
        whole = sum(4 * parameter.numel() for parameter in model.parameters())  # bytes
        if pl_module.config.fsdp_accumulation == "sharded":
            # Blocks once for each direction; what is not in a block stays from its forward to its backward pass.
            assert (gathers, reductions) == (2 * blocks + 1, blocks + 1)
            self.check_sharded(model)
        else:
            assert (gathers, reductions) == (blocks + 1 if self._first else 0, blocks + 1 if last else 0)
        if last:
            self.check_sharded(model)
        elif pl_module.step > 0:  # before the first there are no moments
            # Half of the gradients (on two ranks) or all of weights and gradients, and what else comes and goes in a
            # process that has trained before: on which side of one whole copy it is, is what matters.
            held = self._held.count() - self._before
            assert (held < whole) == (pl_module.config.fsdp_accumulation == "sharded"), (held, whole)
        super().on_train_batch_end(trainer, pl_module)

    def check_sharded(self, module):
        assert all(isinstance(parameter, DTensor) for parameter in module.parameters())

    def on_validation_start(self, trainer, pl_module):
        self.check_sharded(pl_module.model)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        # What is not in a block is gathered once for all batches.
        self.check_sharded(pl_module.model.blocks)

    def on_validation_end(self, trainer, pl_module):
        self.check_sharded(pl_module.model)


class _NanWeightGradient(torch.autograd.Function):
    """A linear map of which only the weight's gradient is not finite."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient @ weight, torch.full_like(weight, float("nan"))


class SpoilGradient(pl.Callback):
    """Spoils one weight's gradient on rank 1 in step 2, and writes what is said of it to `<run_dir>/said.txt`."""

    def on_fit_start(self, trainer, pl_module):
        down = pl_module.model.blocks[1].mlp.down

        def forward(x):
            spoiled = trainer.global_rank == 1 and pl_module.step == 1
            return _NanWeightGradient.apply(x, down.weight) if spoiled else F.linear(x, down.weight)

        assert down.bias is None
        down.forward = forward
        if trainer.is_global_zero:
            pl_module.print = (pl_module.run_dir / "said.txt").write_text


SCENES = {"keep": KeepGradients, "sharded": CheckSharded, "accumulate": CheckAccumulation, "spoil": SpoilGradient}
