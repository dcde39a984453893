"""The gradient of a step is that of one big batch, whatever the micro-batches and ranks."""

import json

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from powertrain.training.config import OptimConfig
from powertrain.training.optim import build_optimizer
from tests.ops.accuracy import FACTOR, FLOOR_EPS, relative_error
from tests.training.fakes import CONTEXT, TinyModel, make_batch, run_tiny

EPS = torch.finfo(torch.float32).eps


class Keep(pl.Callback):
    """Keeps gradients and weights as they are after the first step."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.step == 1 and pl_module.at_step_end:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.model.named_parameters()}
            self.norm = pl_module._grad_norm
            self.loss = pl_module.loss


def round_anew(model, seed, eps=EPS):
    """Put a rounding error into every weight of `model`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + eps * torch.randn(parameter.shape, generator=generator)


def norm_of(tensors):
    return torch.cat([x.flatten() for x in tensors]).double().norm()


def expected_step(rows=4, rounded=None):
    """Gradients by parameter, their norm and the loss of TinyModel's first step, by autograd in fp64."""
    torch.manual_seed(0)
    model = TinyModel(dropout=0.0).double()
    if rounded is not None:
        round_anew(model, rounded)
    batch = make_batch(0, rows)
    logits = model(batch["input_ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return {**gradients, "norm": norm_of(gradients.values()), "loss": loss.detach()}


def assert_as_rounded(actual, exact, others):
    """Each may be missed by a few times what rounding errors in every weight, as `others` have them, change."""
    assert actual.keys() == exact.keys()
    failures = []
    for name, value in exact.items():
        error = relative_error(torch.as_tensor(actual[name]), value)
        allowed = FACTOR * max(relative_error(other[name], value) for other in others)
        allowed += FLOOR_EPS * EPS
        if not error <= allowed:
            failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    assert not failures, "; ".join(failures)


def assert_first_step(gradients, norm, loss):
    """Compare TinyModel's first step of 4 rows with autograd."""
    actual = {**gradients, "norm": norm, "loss": loss}
    assert_as_rounded(actual, expected_step(), [expected_step(rounded=seed) for seed in range(2)])


def first_step(tmp_path, **settings):
    keep = Keep()
    torch.manual_seed(0)
    model = TinyModel(dropout=0.0)
    run_tiny(tmp_path / "run", steps=1, model=model, callbacks=[keep], **settings)
    return keep


def test_micro_batches_hold_different_numbers_of_labels():
    counts = [int((make_batch(i, 1)["labels"] >= 0).sum()) for i in range(4)]
    assert len(set(counts)) == 4
    assert sum(counts) < 4 * CONTEXT


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(tmp_path, micro_batch_size):
    keep = first_step(tmp_path, micro_batch_size=micro_batch_size, grad_clip=None)
    assert_first_step(keep.gradients, keep.norm, keep.loss)


def test_clipping_bounds_the_norm_and_logs_it_before(tmp_path):
    norm = float(expected_step()["norm"])
    keep = first_step(tmp_path, grad_clip=norm / 3)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    # Clipping divides by the norm and 1e-6.
    unclipped = {name: gradient * 3 * (1 + 1e-6 / norm) for name, gradient in keep.gradients.items()}
    assert_first_step(unclipped, record["train/grad_norm"], record["train/loss"])


def test_a_step_without_labels_changes_nothing_but_the_decay(tmp_path):
    from tests.training.fakes import FakeData

    class Silent(FakeData):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
            return batch

    keep = Keep()
    run_tiny(tmp_path / "run", steps=1, data=Silent(), callbacks=[keep])
    assert keep.loss == 0.0
    assert keep.norm == 0.0


def test_decay_shrinks_what_the_model_names_and_nothing_else():
    model = TinyModel()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in model.decay_parameters() else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    assert {n for n, _ in model.named_parameters()} > model.decay_parameters()


def test_fused_and_unfused_updates_agree():
    def update(fused, rounded=None):
        torch.manual_seed(0)
        model = TinyModel()
        if rounded is not None:
            round_anew(model, rounded)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = build_optimizer(model, OptimConfig(fused=fused))
        assert optimizer.defaults["fused"] is fused
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = parameter.detach() * 0.1 + 0.01
            optimizer.step()
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    assert_as_rounded(update(True), update(False), [update(False, seed) for seed in range(2)])
