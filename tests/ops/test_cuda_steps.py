"""Passes that keep the state beside the scan, in steps of 128 tokens: y from `pt_query_scan`, and dk and dv from
`pt_key_grads` where a final state has no gradient. Head dim 32 in bf16 on Hopper, with more than one chunk.
On a GPU its own kernels, else the Hopper ones emulated.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.stage_calls import Problem, Sizes, Strided, strided
from powertrain import native
from powertrain.ops import cuda, power_retention
from tests.ops.test_cuda import (
    BF16,
    FACTOR,
    ON_GPU,
    Case,
    _poisoned_memory,  # noqa: F401
    assert_accurate,
    assert_small,
    errors_of,
    evaluate,
    in_one_call,
    loaded_kernels,
    measure,
)

pytestmark = pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper (compute capability 9.0)"
)
BASE = Case(D=32, dtype=BF16, Hq=1, Hk=1)
CASES = {
    "chunks": replace(BASE, T=520, Hq=2, Hk=2),
    "batch": replace(BASE, B=3, T=200),
    "odd_blocks": replace(BASE, B=2, T=517, chunk_size=256),
    "chunk_of_odd_steps": replace(BASE, T=700, chunk_size=384),
    "gqa": replace(BASE, Hq=3, T=330),
    "ungated": replace(BASE, T=400, gate=None),
    "strong_gates": replace(BASE, T=400, gate=3.0),
    "documents": replace(BASE, T=400, documents=True),
    "gqa_documents": replace(BASE, B=2, T=250, Hq=2, documents=(1, 64, 100, 130)),
    # Four chunks make a span, at whose end alone the gates' gradient starts from states.
    "spans": replace(BASE, T=1100, gate=2e-3),
    "spans_forgotten": replace(BASE, T=900, gate=0.01),
    # y by steps alone, as the gradient of the final state takes the stages.
    "states": replace(BASE, T=400, state=True),
    "states_gqa_documents": replace(BASE, T=330, Hq=3, documents=True, state=True),
}


@pytest.fixture(scope="module", autouse=True)
def _library() -> Iterator[None]:
    with loaded_kernels(without=("sm80",)):
        yield


@pytest.fixture(autouse=True)
def _arch() -> Iterator[None]:
    with cuda.force_arch(90):
        yield


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_as_accurate_as_the_formula(name: str) -> None:
    assert_accurate(CASES[name])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("T", "chunk_size", "gate"), [(400, 128, 3.0), (900, 512, 1.0), (900, 512, 0.06)])
def test_gate_gradients_are_not_left_with_what_strong_gates_forget(
    T: int, chunk_size: int, gate: float, seed: int
) -> None:
    # dk takes steps of 128 tokens where dq takes the chunk. What one side of a pair rounds otherwise than the other
    # would stay in the sum down to the chunk's start, eight times the plain formula's error.
    error, plain = measure(replace(BASE, T=T, chunk_size=chunk_size, gate=gate), seed)["grad_log_G"]
    assert error <= plain


@pytest.mark.parametrize("seed", range(8))
def test_gate_gradients_where_steps_remember(seed: int) -> None:
    assert_accurate(replace(BASE, T=1100, chunk_size=512, gate=0.035), seed)


def segments_of(case: Case) -> int:
    """Time segments of the steps, from the size of their workspace."""
    problem = Problem(0, 90, case.B, case.Hq, case.Hk, case.D, case.chunk_size, 1.0, case.T)
    sizes = Sizes()
    native.call("pt_sizes_of", ctypes.byref(problem), ctypes.byref(sizes))
    return sizes.steps_workspace // sizes.boundary


def shifted(x: Tensor) -> Tensor:
    """The same numbers, in rows that begin 2 bytes after a multiple of 16."""
    return torch.nn.functional.pad(x, (1, 7))[..., 1:-7]


def packed_on_the_way(case: Case, *tensors: Tensor, reverse: bool = False) -> bool:
    problem = Problem(0, 90, case.B, case.Hq, case.Hk, case.D, case.chunk_size, 1.0, case.T)
    packs = ctypes.c_int32()
    arguments = ((Strided * len(tensors))(*map(strided, tensors)), len(tensors), ctypes.byref(packs))
    native.call("pt_packs_on_the_way", ctypes.byref(problem), int(reverse), int(case.state), *arguments)
    return bool(packs.value)


@pytest.mark.parametrize(("multiprocessors", "state", "seed"), [(1, False, 1), (3, False, 2), (3, True, 0)])
def test_the_same_bits_packed_on_the_way_or_before(
    monkeypatch: pytest.MonkeyPatch, multiprocessors: int, state: bool, seed: int
) -> None:
    """Rows that do not begin at multiples of 16 bytes are packed by kernels of their own; on the way queries by
    `query_scan`, keys and values by it where there is one time segment, else by `segment_state`."""
    monkeypatch.setenv("PT_EMULATED_SEED", str(seed))
    monkeypatch.setenv("PT_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    case = replace(BASE, T=450, Hq=2, documents=(1, 100, 300, 447), state=state)
    tensors = case.tensors()
    keywords = {"chunk_size": case.chunk_size, "impl": "cuda", **case.keywords()}
    names = ("Q", "K", "V")

    def before(**arguments: Tensor) -> Tensor:
        moved = {name: shifted(arguments[name]) for name in names}
        assert not packed_on_the_way(case, *moved.values())
        return power_retention(**(arguments | moved), **keywords)

    assert packed_on_the_way(case, *(tensors[name] for name in names))
    expected, cotangents = evaluate(power_retention, tensors, None, **keywords)
    assert not packed_on_the_way(case, shifted(cotangents[0]), reverse=True)
    assert ON_GPU or packed_on_the_way(case, cotangents[0], reverse=True) == (multiprocessors > 1)
    for function, dy in ((before, cotangents[0]), (power_retention, shifted(cotangents[0]))):
        ours, _ = evaluate(function, tensors, [dy], **({} if function is before else keywords))
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


SEGMENTS = {1: 1, 3: 3, 6: 4}  # by multiprocessors


@pytest.mark.skipif(ON_GPU, reason="the GPU has its own number of multiprocessors")
@pytest.mark.parametrize("multiprocessors", SEGMENTS)
@pytest.mark.parametrize("state", [False, True])
def test_segments_of_several_chunks(monkeypatch: pytest.MonkeyPatch, multiprocessors: int, state: bool) -> None:
    monkeypatch.setenv("PT_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    case = replace(BASE, T=900, Hq=2, Hk=1, documents=(300, 600), state=state)
    assert segments_of(case) == SEGMENTS[multiprocessors]
    assert_accurate(case)


def test_segments_of_several_chunks_on_a_gpu() -> None:
    case = replace(BASE, B=3, T=600, Hq=44, Hk=44) if ON_GPU else replace(BASE, T=600)
    assert not ON_GPU or segments_of(case) < 5
    assert_accurate(case)
    assert_same_bits(case)


@pytest.mark.skipif(ON_GPU, reason="the GPU has its own number of multiprocessors")
def test_y_is_the_same_for_every_chunk_of_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_EMULATED_MULTIPROCESSORS", "1")  # so that there is one time segment
    tensors = replace(BASE, T=700, Hq=2).tensors()

    def y(chunk_size: int) -> Tensor:
        with torch.no_grad():
            return power_retention(**tensors, chunk_size=chunk_size, impl="cuda")

    expected = y(128)
    assert all(torch.equal(y(chunk_size), expected) for chunk_size in (256, 384, 512))
    assert not torch.equal(y(640), expected)  # by the stages


def test_weights_that_one_key_takes() -> None:
    """Where y is nearly one value, dn' . v and the normaliser's part of dW cancel."""
    case = replace(BASE, T=400)
    tensors = case.tensors()
    tensors["K"][:, 3] *= 30
    assert_small(case, errors_of(case, tensors, *in_one_call(case, tensors)))


def test_initial_state_whose_end_nobody_reads() -> None:
    case = replace(BASE, T=400, Hq=2, state=True)
    tensors = case.tensors()

    def out_alone(**arguments: Tensor) -> Tensor:
        return power_retention(**arguments, chunk_size=case.chunk_size, impl="cuda")

    results, cotangents = evaluate(out_alone, tensors, None)
    assert_small(case, errors_of(replace(case, state=False), tensors, results, cotangents))


@pytest.mark.parametrize("seed", range(1 if ON_GPU else 4))
def test_two_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    # Warps take turns at random, and a segment has several chunks.
    monkeypatch.setenv("PT_EMULATED_SEED", str(seed))
    monkeypatch.setenv("PT_EMULATED_MULTIPROCESSORS", "1")
    assert_same_bits(replace(BASE, T=600, Hq=2, documents=True))


def assert_same_bits(case: Case) -> None:
    runs = []
    for _ in range(2):
        keywords = {"chunk_size": case.chunk_size, "impl": "cuda", **case.keywords()}
        runs.append(evaluate(power_retention, case.tensors(), None, **keywords)[0])
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_same_gradients_as_by_the_stages() -> None:
    """A gradient of the final state, all zero, takes the stages for dk and dv: the same numbers up to rounding."""
    case = replace(BASE, T=700, Hq=2)
    tensors = case.tensors()
    keywords = {"chunk_size": case.chunk_size, "impl": "cuda"}
    ours, cotangents = evaluate(power_retention, tensors, None, **keywords)

    def with_state(**arguments: Tensor) -> tuple[Tensor, ...]:
        return power_retention(**arguments, return_final_state=True, **keywords)

    _, state, total = with_state(**tensors)
    stages, _ = evaluate(with_state, tensors, [*cotangents, torch.zeros_like(state), torch.zeros_like(total)])
    errors = errors_of(case, tensors, ours, cotangents)
    for name, (_, plain) in errors.items():
        difference = (ours[name].double() - stages[name].double()).norm() / stages[name].double().norm()
        assert difference <= FACTOR * plain, name
        # Where they are the same kernels the bits are the same, and only there.
        assert torch.equal(ours[name], stages[name]) == (name in ("out0", "grad_Q")), name
