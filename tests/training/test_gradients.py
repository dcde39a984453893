"""The gradient of a step is that of one big batch, whatever the micro-batches and ranks."""

import json

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from powertrain.training.config import OptimConfig
from powertrain.training.optim import build_optimizer
from tests.training.fakes import CONTEXT, TinyModel, make_batch, run_tiny


class Keep(pl.Callback):
    """Keeps gradients and weights as they are after the first step."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.step == 1 and pl_module.at_step_end:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.model.named_parameters()}
            self.norm = pl_module._grad_norm
            self.loss = pl_module.loss


def expected_gradients(rows=4):
    torch.manual_seed(0)
    model = TinyModel(dropout=0.0).double()
    batch = make_batch(0, rows)
    logits = model(batch["input_ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, loss.item()


def norm_of(gradients):
    return torch.cat([g.flatten() for g in gradients.values()]).double().norm().item()


def assert_gradients(found, wanted, scale=1.0):
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), wanted[name] * scale, rtol=1e-4, atol=1e-7)


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
    wanted, loss = expected_gradients()
    keep = first_step(tmp_path, micro_batch_size=micro_batch_size, grad_clip=None)
    assert_gradients(keep.gradients, wanted)
    assert keep.loss == pytest.approx(loss, rel=1e-6)
    assert keep.norm == pytest.approx(norm_of(wanted), rel=1e-5)


def test_clipping_bounds_the_norm_and_logs_it_before(tmp_path):
    wanted, _ = expected_gradients()
    true_norm = norm_of(wanted)
    limit = true_norm / 3
    keep = first_step(tmp_path, grad_clip=limit)
    assert_gradients(keep.gradients, wanted, scale=1 / 3)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["train/grad_norm"] == pytest.approx(true_norm, rel=1e-5)


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
    updates = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = TinyModel()
        optimizer = build_optimizer(model, OptimConfig(fused=fused))
        assert optimizer.defaults["fused"] is fused
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = parameter.detach() * 0.1 + 0.01
            optimizer.step()
        updates.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-5, atol=1e-7)
