"""What happens to a run of several processes while a test looks on: callbacks by name."""

from __future__ import annotations

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
            gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
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


class CountMessages(pl.Callback):
    """Asserts what each micro-batch of a step sends: the first gathers each block's weights, and the rest's, and the
    last reduces their gradients.
    """

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._first = pl_module.at_step_end
        self._mode = CommDebugMode()
        self._mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._mode.__exit__(None, None, None)
        assert trainer.accumulate_grad_batches > 1
        counts, units = self._mode.get_comm_counts(), len(pl_module.model.blocks) + 1
        assert counts.get(torch.ops.c10d._allgather_base_, 0) == (units if self._first else 0)
        assert counts.get(torch.ops.c10d._reduce_scatter_base_, 0) == (units if pl_module.at_step_end else 0)


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


SCENES = {"keep": KeepGradients, "sharded": CheckSharded, "count": CountMessages, "spoil": SpoilGradient}
