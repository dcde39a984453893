"""Slices of sequences on 2, 3 and 4 processes give what one process gives for the whole: outputs, losses and all
gradients, for every op and every mixer, with documents, gates, grouped heads and lengths that the ranks do not divide.
"""

import pytest
import torch

from powertrain.ops.reference import power_retention_quadratic, power_retention_recurrent
from tests.context_ranks import (
    KERNEL_CASES,
    MODEL_MIXERS,
    MODEL_TOKENS,
    OP_CASES,
    cotangent,
    launch,
    model_batch,
    model_of,
)
from tests.ops.accuracy import FACTOR, FLOOR_EPS, assert_results_as_accurate, relative_error
from tests.ops.emulation import emulated_library
from tests.ops.test_attention import dense

# Of one forward and backward pass. Two power layers: one in each direction. The hybrid, whose layers run again in the
# backward pass: the same for its power layer, and the keys and values of its window twice.
ALL_GATHERS = {"power": 4, "hybrid": 4}
EPS = torch.finfo(torch.float32).eps


def check_op(case, parts):
    actual = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    inputs = case.inputs()
    if case.kind != "power":
        return assert_results_as_accurate(actual, [cotangent(case)], dense, inputs)
    inputs.keywords.pop("chunk_size")

    def quadratic(**kwargs):
        return power_retention_quadratic(**kwargs)[0]

    def recurrent(**kwargs):
        return power_retention_recurrent(**kwargs)[0]

    return assert_results_as_accurate(actual, [cotangent(case)], quadratic, inputs, plain_fp32=recurrent)


def whole_results(model):
    """Losses, logits and gradients of one process, by name, and its stats."""
    batch = model_batch()
    output = model(**batch, loss_reduction="sum", collect_stats=True)
    output.loss.backward()
    with torch.no_grad():
        each = model(**batch, loss_reduction="none").loss
        logits = model(batch["input_ids"], cu_seqlens=batch["cu_seqlens"]).logits
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": output.loss.detach(), "each": each, "logits": logits, **grads}, output.stats


def rounded_anew(mixer, size, seed):
    """The model with a rounding error in every weight and with states where the slices of `size` ranks begin."""
    model = model_of(mixer, chunk_size=MODEL_TOKENS // size, switch_over_seq_len=None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + EPS * torch.randn(parameter.shape, generator=generator)
    return model


def check_model(mixer, parts):
    """The whole may be missed by a few times what a rounding error in every weight changes on one process."""
    whole, stats = whole_results(model_of(mixer))
    others = [whole_results(rounded_anew(mixer, len(parts), seed))[0] for seed in range(2)]
    actual = {name: sum(part["grads"][name] for part in parts) for name in parts[0]["grads"]}
    actual["loss"] = sum(part["loss"] for part in parts)
    actual |= {name: torch.cat([part[name] for part in parts], dim=1) for name in ("each", "logits")}
    assert actual.keys() == whole.keys()
    failures = []
    for name, value in whole.items():
        error = relative_error(actual[name], value)
        allowed = FACTOR * max(relative_error(other[name], value) for other in others) + FLOOR_EPS * EPS
        if not error <= allowed:
            failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    for part in parts:
        assert part["stats"].keys() == stats.keys()
        for name, value in stats.items():
            torch.testing.assert_close(part["stats"][name], value, rtol=1e-4, atol=0)
    assert not failures, "; ".join(failures)
    if mixer in ALL_GATHERS:
        assert {part["all_gathers"] for part in parts} == {ALL_GATHERS[mixer]}


def check_overflow(parts):
    """What overflows in documents of one rank changes nothing in those of the others."""
    for rank, part in enumerate(parts):
        for name, value in part["overflow"].items():
            where = f"{name} on rank {rank}"
            if rank == 1:
                assert not value[0].isfinite().all(), f"{where} does not overflow"
                value, usual = value[1:], part["power"][name][1:]
            else:
                usual = part["power"][name]
            assert torch.equal(value, usual), f"{where} changes"


def failures_of(cases, parts):
    failures = []
    for name, case in cases.items():
        try:
            check_op(case, [part[name] for part in parts])
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    return failures


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not emulated")
def test_slices_on_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("POWERTRAIN_KERNELS_LIBRARY", str(emulated_library(without=("sm90",))))
    monkeypatch.setenv("POWERTRAIN_KERNELS_ARCH", "80")
    failures = failures_of(KERNEL_CASES, launch(2, tmp_path, "emulated kernels"))
    assert not failures, "\n".join(failures)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_slices_on_gpus(tmp_path):
    failures = failures_of(OP_CASES | KERNEL_CASES, launch(min(4, torch.cuda.device_count()), tmp_path, "gpus"))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_slices_give_what_the_whole_gives(size, tmp_path):
    parts = launch(size, tmp_path)
    failures = failures_of(OP_CASES, parts)
    for mixer in MODEL_MIXERS:
        try:
            check_model(mixer, [part[f"model_{mixer}"] for part in parts])
        except AssertionError as error:
            failures.append(f"model of {mixer}: {error}")
    try:
        check_overflow(parts)
    except AssertionError as error:
        failures.append(f"overflow: {error}")
    assert not failures, "\n".join(failures)
