"""Passes of the CUDA path in two calls, between which another process's state may arrive: as accurate as in one call,
and refused where they are not what the first call began.
"""

import ctypes
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.stage_calls import BackwardPass, ForwardPass, Problem, Strided
from powertrain import native
from powertrain.ops import cuda, power_retention
from powertrain.ops.cuda_ops import (
    final_state_cuda_op,
    finish_cuda_bwd_op,
    finish_cuda_op,
    initial_state_grad_cuda_op,
)
from tests.ops.test_cuda import (
    BF16,
    EMULATED_DIMS,
    FP16,
    ON_GPU,
    SMALL,
    Case,
    _arch,  # noqa: F401
    _library,  # noqa: F401
    _poisoned_memory,  # noqa: F401
    assert_small,
    errors_of,
    evaluate,
    in_one_call,
    of_head_dim,
    relative_error,
)


def in_two_calls(
    case: Case, tensors: dict[str, Tensor], cotangents: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """out and gradients of passes in two calls, by name; then the states that the first calls give."""
    q, k, v, state, total = (tensors[name] for name in ("Q", "K", "V", "initial_state", "sum_of_keys"))
    log_g, cu_seqlens, arch = tensors.get("log_G"), case.keywords().get("cu_seqlens"), cuda.forced_arch()
    grad_out, *grad_states = cotangents
    *final, begun = final_state_cuda_op(q, k, v, log_g, cu_seqlens, case.chunk_size, True, arch)
    out = finish_cuda_op(q, state, total, begun, case.Hk, case.chunk_size, arch)
    *initial, backward = initial_state_grad_cuda_op(grad_out, out, begun, case.Hk, case.chunk_size, True, arch)
    grads = finish_cuda_bwd_op(
        *grad_states, out, begun, backward, cu_seqlens, case.Hk, log_g is not None, case.chunk_size, arch
    )
    names = ["Q", "K", "V"] + ([] if log_g is None else ["log_G"])
    return {"out0": out} | {f"grad_{name}": grads[i] for i, name in enumerate(names)}, [*final, *initial]


TWO_CALLS = {
    "gqa": Case(B=2, T=200, Hq=4, chunk_size=64),
    "ragged": Case(T=517, chunk_size=192),
    "ungated": Case(T=257, gate=None),
    "strong_gates": Case(T=400, gate=3.0),
    "one_chunk": Case(B=2, T=100),
    "above_block": Case(T=65, chunk_size=64),
    "documents": Case(B=2, T=330, documents=True),
    "spans": Case(T=450, chunk_size=64, gate=2e-3),
    "two_documents_ungated": Case(T=330, gate=None, documents=(200,)),
}


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [(name, dim) for name in TWO_CALLS for dim in ((32, 64, 128) if ON_GPU else EMULATED_DIMS.get(name, (32,)))],
)
def test_two_calls_are_as_accurate_as_the_formula(name: str, head_dim: int) -> None:
    case = replace(of_head_dim(TWO_CALLS[name], head_dim), state=True)
    tensors = case.tensors()
    whole, cotangents = in_one_call(case, tensors)
    ours, _ = in_two_calls(case, tensors, cotangents)
    errors = errors_of(case, tensors, ours, cotangents)
    assert_small(case, errors)
    # States are rounded once more. The gates' gradient is a difference of sums: what a rounding is of it shows in a
    # plain evaluation's error.
    for result, value in ours.items():
        allowed = torch.finfo(BF16).eps / 2
        if result == "grad_log_G":
            allowed = max(allowed, errors[result][1])
        assert relative_error(value, whole[result]) <= allowed, result


@pytest.mark.parametrize("T", [100, 300], ids=["one_chunk", "chunks"])
def test_where_nothing_comes_from_outside_two_calls_are_as_one(T: int) -> None:
    case = Case(B=2, T=T, Hq=4, D=SMALL, state=True)
    tensors = case.tensors()
    tensors |= {name: torch.zeros_like(tensors[name]) for name in ("initial_state", "sum_of_keys")}
    _, cotangents = in_one_call(case, tensors)
    cotangents[1:] = (torch.zeros_like(x) for x in cotangents[1:])
    whole, _ = evaluate(
        power_retention, tensors, cotangents, chunk_size=case.chunk_size, return_final_state=True, impl="cuda"
    )
    ours, states = in_two_calls(case, tensors, cotangents)
    final, grads = states[:2], states[2:]
    assert all(torch.equal(state, whole[name]) for state, name in zip(final, ("out1", "out2"), strict=True))
    # Only the normaliser's sums are split into hi and lo anew, which changes them by roundings in fp32: up to one
    # result in fifty then rounds to the next 16-bit number, by eps / sqrt(12) of it on average.
    ours |= zip(("grad_initial_state", "grad_sum_of_keys"), grads, strict=True)
    for name, value in ours.items():
        assert relative_error(value, whole[name]) <= torch.finfo(BF16).eps / math.sqrt(12 * 50), name


def test_fp16_has_no_pass_in_two_calls() -> None:
    tensors = Case(T=70, D=SMALL, dtype=FP16, state=True).tensors()
    q, k, v, log_g, state, total = tensors.values()
    with pytest.raises(RuntimeError, match="a pass in two calls: not in fp16"):
        final_state_cuda_op(q, k, v, log_g, None, 64, True, cuda.forced_arch())
    out, _, _, saved = cuda.power_retention_cuda(q, k, v, log_g, state, total, None, 64, False)
    with pytest.raises(RuntimeError, match="a pass in two calls: not in fp16"):
        initial_state_grad_cuda_op(out, out, saved, 2, 64, True, cuda.forced_arch())


def test_what_one_call_left_is_not_taken_for_another_problem() -> None:
    case = Case(T=70, D=SMALL, chunk_size=64, state=True)
    tensors = case.tensors()
    q, k, v, state, total = (tensors[name] for name in ("Q", "K", "V", "initial_state", "sum_of_keys"))
    *_, begun = final_state_cuda_op(q, k, v, None, None, 64, True, cuda.forced_arch())
    with pytest.raises(ValueError, match="begun must be Byte of shape"):
        finish_cuda_op(q, state, total, begun, 2, 128, cuda.forced_arch())
    out = finish_cuda_op(q, state, total, begun, 2, 64, cuda.forced_arch())
    with pytest.raises(ValueError, match="begun must be Byte of shape"):
        finish_cuda_bwd_op(state, total, out, begun, begun, None, 2, False, 64, cuda.forced_arch())


@pytest.mark.parametrize(
    ("function", "phase", "given"),
    [
        ("pt_forward", 3, "final_state"),
        ("pt_forward", 1, "final_state initial_state"),
        ("pt_forward", 1, "final_state out"),
        ("pt_forward", 1, "out"),
        ("pt_forward", 2, "out"),
        ("pt_forward", 2, "initial_state final_state"),
        ("pt_forward", 2, "initial_state out final_state"),
        ("pt_backward", -1, "normalizer dq"),
        ("pt_backward", 1, "normalizer dinitial_state dinitial_sum_of_keys"),
        ("pt_backward", 1, "normalizer begun dinitial_state dinitial_sum_of_keys dq"),
        ("pt_backward", 1, "normalizer begun dinitial_state dinitial_sum_of_keys dfinal_state"),
        ("pt_backward", 1, "normalizer begun"),
        ("pt_backward", 2, "begun dfinal_state"),
        ("pt_backward", 2, "dq dfinal_state"),
        ("pt_backward", 2, "begun dq"),
        ("pt_backward", 2, "begun dq dfinal_state dinitial_state dinitial_sum_of_keys"),
    ],
)
def test_wrong_calls_of_a_phase_are_refused(function: str, phase: int, given: str) -> None:
    params: ForwardPass | BackwardPass = ForwardPass() if function == "pt_forward" else BackwardPass()
    nowhere = 256  # refused before anything is read
    params.phase, params.saved, params.workspace = phase, nowhere, nowhere
    if isinstance(params, BackwardPass):
        params.has_initial_state = 1
    for name in given.split():
        setattr(params, name, Strided(nowhere) if name in ("out", "dq") else nowhere)
    problem = Problem(0, 80, 1, 1, 1, 32, 64, 1.0, 70)
    with pytest.raises(RuntimeError, match="does not hold" if phase in (1, 2) else f"phase {phase}: PT_WHOLE"):
        native.call(function, ctypes.byref(problem), ctypes.byref(params), None)
