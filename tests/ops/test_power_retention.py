"""Power retention against its oracles: outputs and every gradient, in every precision, for awkward shapes and hostile
values.
"""

import pytest
import torch
from torch import Tensor

from powertrain.ops import linear_attention, power_retention, power_retention_with_normalizer
from powertrain.ops.normalized import NORMALIZER_FLOOR
from powertrain.ops.plan import choose_chunk_size
from powertrain.ops.reference import ORACLES, power_retention_quadratic, power_retention_recurrent
from powertrain.ops.sympow import phi_dimension
from tests.ops.accuracy import Inputs, assert_as_accurate, evaluate, make_inputs, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def quadratic_out(**kwargs: object) -> Tensor:
    return power_retention_quadratic(**kwargs)[0]  # type: ignore[arg-type]


def recurrent_out(**kwargs: object) -> Tensor:
    return power_retention_recurrent(**kwargs)[0]  # type: ignore[arg-type]


def with_state(inputs: Inputs, deg: int = 2, seed: int = 5) -> Inputs:
    """Add the state of some earlier tokens."""
    Q, K, V = (inputs.tensors[name] for name in "QKV")
    earlier = make_inputs(Q.shape[0], 9, Q.shape[2], K.shape[2], Q.shape[3], V.shape[3], dtype=torch.float64, seed=seed)
    _, state, sum_of_keys = power_retention_quadratic(**earlier.tensors, deg=deg)
    dtype = torch.float64 if Q.dtype == torch.float64 else torch.float32
    inputs.tensors |= {"initial_state": state.to(dtype), "sum_of_keys": sum_of_keys.to(dtype)}
    return inputs


def with_documents(inputs: Inputs) -> Inputs:
    """Add documents: long ones, of one token, empty ones, a boundary on a chunk's edge, padding at the end."""
    B, T = inputs.tensors["Q"].shape[:2]
    offsets = {0, 1, 16, 17, 40, T - 1} | {row * T for row in range(B + 1)} | {row * T + 23 for row in range(B)}
    ordered = sorted(offset for offset in offsets if 0 <= offset <= B * T)
    inputs.keywords["cu_seqlens"] = torch.tensor(
        [*ordered[:2], ordered[1], *ordered[2:], B * T, B * T], dtype=torch.int32
    )
    return inputs


# B, T, Hq, Hk, K, V, deg, chunk_size
SHAPES = {
    "chunks": (2, 70, 2, 2, 8, 8, 2, 16),
    "ragged": (1, 61, 2, 1, 5, 3, 2, 7),
    "gqa": (2, 45, 6, 2, 8, 4, 2, 16),
    "quadratic": (1, 300, 2, 2, 8, 8, 2, None),
    "blocks_in_chunk": (1, 420, 2, 1, 4, 6, 2, 300),
    "deg4": (1, 50, 2, 2, 5, 4, 4, 16),
    "deg1": (1, 50, 4, 2, 6, 5, 1, 16),
    "one_token": (2, 1, 2, 1, 6, 4, 2, None),
    "chunk_of_one": (1, 5, 1, 1, 4, 4, 2, 1),
    "head_of_one": (1, 20, 1, 1, 1, 1, 2, 8),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_accurate_as_the_formula(shape: str, gated: bool, dtype: torch.dtype) -> None:
    *sizes, deg, chunk_size = SHAPES[shape]
    inputs = make_inputs(*sizes, dtype=dtype, gated=gated)
    inputs.keywords["deg"] = deg

    def chunked(**kwargs: object) -> object:
        return power_retention(**kwargs, chunk_size=chunk_size)  # type: ignore[arg-type]

    assert_as_accurate(chunked, quadratic_out, inputs, plain_fp32=recurrent_out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["chunks", "gqa", "blocks_in_chunk", "deg4", "one_token"])
def test_states_at_both_ends(shape: str, dtype: torch.dtype) -> None:
    *sizes, deg, chunk_size = SHAPES[shape]
    inputs = with_state(make_inputs(*sizes, dtype=dtype), deg)
    inputs.keywords["deg"] = deg

    def chunked(**kwargs: object) -> object:
        return power_retention(**kwargs, chunk_size=chunk_size, return_final_state=True)  # type: ignore[arg-type]

    def plain(**kwargs: Tensor) -> object:
        states = {name: kwargs.pop(name).to(kwargs["Q"].dtype) for name in ("initial_state", "sum_of_keys")}
        return power_retention_quadratic(**kwargs, **states)

    assert_as_accurate(chunked, plain, inputs, plain_fp32=power_retention_recurrent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["chunks", "ragged", "gqa", "blocks_in_chunk"])
def test_documents(shape: str, dtype: torch.dtype) -> None:
    *sizes, deg, chunk_size = SHAPES[shape]
    inputs = with_documents(make_inputs(*sizes, dtype=dtype))
    inputs.keywords["deg"] = deg

    def chunked(**kwargs: object) -> object:
        return power_retention(**kwargs, chunk_size=chunk_size)  # type: ignore[arg-type]

    assert_as_accurate(chunked, quadratic_out, inputs, plain_fp32=recurrent_out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["chunks", "ragged", "gqa", "blocks_in_chunk"])
def test_a_state_enters_the_first_document_of_each_row_and_no_other(shape: str, dtype: torch.dtype) -> None:
    *sizes, deg, chunk_size = SHAPES[shape]
    inputs = with_documents(with_state(make_inputs(*sizes, dtype=dtype), deg))
    inputs.keywords["deg"] = deg

    def chunked(**kwargs: object) -> object:
        return power_retention(**kwargs, chunk_size=chunk_size)  # type: ignore[arg-type]

    def plain(**kwargs: Tensor) -> object:
        states = {name: kwargs.pop(name).to(kwargs["Q"].dtype) for name in ("initial_state", "sum_of_keys")}
        return power_retention_quadratic(**kwargs, **states)[0]

    assert_as_accurate(chunked, plain, inputs, plain_fp32=recurrent_out)


@pytest.mark.parametrize("case", ["plain", "state", "documents", "state and documents"])
@pytest.mark.parametrize("deg", [1, 2, 4])
def test_oracles_agree(deg: int, case: str) -> None:
    inputs = make_inputs(2, 26, 4, 2, 5, 3, dtype=torch.float64)
    inputs = with_state(inputs, deg) if "state" in case else inputs
    inputs = with_documents(inputs) if "documents" in case else inputs
    inputs.keywords["deg"] = deg
    results = [evaluate(oracle, inputs)[0] for oracle in ORACLES.values()]
    results.append(
        evaluate(lambda **kwargs: power_retention(**kwargs, chunk_size=8, return_final_state=True), inputs)[0]  # type: ignore[arg-type]
    )
    for other in results[1:]:
        for name, value in results[0].items():
            # A state of one key is ill-conditioned, the more the higher the degree.
            assert relative_error(other[name], value) < 1e-6, name


def test_gradcheck_of_the_chunked_path() -> None:
    inputs = with_state(make_inputs(1, 7, 2, 1, 2, 2, dtype=torch.float64))
    names = list(inputs.tensors)

    def function(*tensors: Tensor) -> object:
        return power_retention(**dict(zip(names, tensors, strict=True)), chunk_size=3, return_final_state=True)  # type: ignore[arg-type]

    # Gates perturbed upwards must stay at most 0.
    inputs.tensors["log_G"] -= 0.1
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.tensors.values()])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("lengths", [(40, 30), (1, 69), (33, 1, 36)])
def test_continuation_through_the_state_is_exact_with_gradients(lengths: tuple[int, ...], gated: bool) -> None:
    inputs = make_inputs(2, 70, 4, 2, 6, 5, dtype=torch.float64, gated=gated)

    def in_parts(**kwargs: Tensor) -> Tensor:
        outputs, state, total = [], None, None
        for parts in zip(*(x.split(lengths, dim=1) for x in kwargs.values()), strict=True):
            out, state, total = power_retention(
                **dict(zip(kwargs, parts, strict=True)),
                initial_state=state,
                sum_of_keys=total,
                return_final_state=True,
                chunk_size=16,
            )
            outputs.append(out)
        return torch.cat(outputs, dim=1)

    whole, _ = evaluate(quadratic_out, inputs)
    parts, _ = evaluate(in_parts, inputs)
    for name, value in whole.items():
        assert relative_error(parts[name], value) < 1e-12, name


def test_only_the_final_state_is_used() -> None:
    inputs = make_inputs(1, 40, 2, 2, 4, 3, dtype=torch.float64)

    def total_only(**kwargs: Tensor) -> Tensor:
        return power_retention(**kwargs, chunk_size=16, return_final_state=True)[2]

    leaves = {name: x.requires_grad_() for name, x in inputs.tensors.items()}
    grads = torch.autograd.grad(total_only(**leaves).square().sum(), list(leaves.values()), allow_unused=True)
    exact = torch.autograd.grad(
        power_retention_recurrent(**leaves)[2].square().sum(), list(leaves.values()), allow_unused=True
    )
    for name, grad, reference in zip(leaves, grads, exact, strict=True):
        reference = torch.zeros_like(grad) if reference is None else reference
        assert relative_error(grad, reference) < 1e-12, name


@pytest.mark.parametrize("chunk_size", [16, None])
def test_nothing_leaks_across_documents(chunk_size: int | None) -> None:
    inputs = make_inputs(1, 90, 4, 2, 6, 5, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 30, 61, 90])
    middle = slice(30, 61)
    mask = torch.ones(90, dtype=torch.bool)
    mask[middle] = False

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = power_retention(**leaves, chunk_size=chunk_size, cu_seqlens=cu_seqlens)
        return out[:, middle], torch.autograd.grad(out[:, middle].square().sum(), list(leaves.values()))

    perturbed = {name: x.clone() for name, x in inputs.tensors.items()}
    for name, x in perturbed.items():
        x[:, mask] = x[:, mask] * 3 - (1 if name == "log_G" else 0)
    out, grads = run(inputs.tensors)
    other_out, other_grads = run(perturbed)
    assert torch.equal(out, other_out)
    for grad, other in zip(grads, other_grads, strict=True):
        assert torch.equal(grad[:, middle], other[:, middle])
        assert not grad[:, mask].any()


@pytest.mark.parametrize("token", [3, 93, 150])
@pytest.mark.parametrize("chunk_size", [16, 100, 200])
@pytest.mark.parametrize("deg", [1, 2, 4])
def test_what_overflows_stays_in_its_document(deg: int, chunk_size: int, token: int) -> None:
    """Finite inputs whose scores, powers and states are not: 0 times infinity would be NaN everywhere else."""
    inputs = make_inputs(1, 200, 4, 2, 6, 5, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 5, 90, 95, 160, 200])
    document = torch.bucketize(torch.arange(200), cu_seqlens, right=True)
    others = document != document[token]
    perturbed = {name: x.clone() for name, x in inputs.tensors.items()}
    perturbed["Q"][:, token] *= 1e38
    perturbed["K"][:, token] *= 1e38

    def run(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = power_retention(**leaves, deg=deg, chunk_size=chunk_size, cu_seqlens=cu_seqlens)
        return out, *torch.autograd.grad(out[:, others].square().sum(), list(leaves.values()))

    expected, actual = run(inputs.tensors), run(perturbed)
    assert not actual[0][:, token].isfinite().all()
    for a, b in zip(expected, actual, strict=True):
        assert torch.equal(a[:, others], b[:, others])


@pytest.mark.parametrize("value", [1e38, torch.inf, torch.nan])
@pytest.mark.parametrize("chunk_size", [16, 200])
@pytest.mark.parametrize("name", ["Q", "K"])
def test_what_is_not_finite_stays_out_of_earlier_tokens(name: str, chunk_size: int, value: float) -> None:
    tensors = make_inputs(1, 200, 4, 2, 6, 5, dtype=torch.float32).tensors
    expected = power_retention(**tensors, chunk_size=chunk_size)
    tensors[name][:, 93] *= value
    assert torch.equal(power_retention(**tensors, chunk_size=chunk_size)[:, :93], expected[:, :93])


def test_documents_equal_separate_calls() -> None:
    inputs = make_inputs(1, 90, 2, 2, 6, 5, dtype=torch.float64)
    packed = power_retention(**inputs.tensors, chunk_size=16, cu_seqlens=torch.tensor([0, 30, 30, 61, 90]))
    separate = [
        power_retention(**{name: x[:, start:stop] for name, x in inputs.tensors.items()})
        for start, stop in ((0, 30), (30, 61), (61, 90))
    ]
    assert relative_error(packed, torch.cat(separate, dim=1)) < 1e-12


def test_final_state_with_documents_is_that_of_the_last_document() -> None:
    inputs = make_inputs(1, 50, 2, 2, 4, 3, dtype=torch.float64)
    _, state, total = power_retention(
        **inputs.tensors, cu_seqlens=torch.tensor([0, 20, 50, 50]), return_final_state=True, chunk_size=16
    )
    last = {name: x[:, 20:] for name, x in inputs.tensors.items()}
    _, expected_state, expected_total = power_retention(**last, return_final_state=True)
    assert relative_error(state, expected_state) < 1e-12
    assert relative_error(total, expected_total) < 1e-12


def test_strided_inputs() -> None:
    inputs = make_inputs(2, 40, 4, 2, 6, 6, dtype=torch.float32)
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.tensors.items()}
    strided["Q"] = torch.stack([strided["Q"], strided["Q"]], dim=-1)[..., 0]
    assert not strided["Q"].is_contiguous()
    a, cotangents = evaluate(power_retention, inputs)
    leaves = [x.requires_grad_() for x in strided.values()]
    out = power_retention(**strided)
    grads = torch.autograd.grad(out, leaves, cotangents[0].transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(out, a["out0"])
    for name, grad in zip(strided, grads, strict=True):
        assert torch.equal(grad, a[f"grad_{name}"])


def hostile(name: str, dtype: torch.dtype) -> Inputs:
    inputs = make_inputs(1, 70, 2, 1, 8, 6, dtype=dtype)
    tensors = inputs.tensors
    if name == "zero_queries":
        tensors["Q"][:, ::3] = 0
    elif name == "all_zero":
        tensors["Q"].zero_()
        tensors["K"].zero_()
    elif name == "large_scores":
        # |scale q.k| reaches 1e3, within fp16's range of inputs.
        direction = torch.nn.functional.normalize(tensors["K"].float(), dim=-1)
        tensors["K"] = (direction * 50).to(dtype)
        tensors["Q"] = (direction.repeat_interleave(2, dim=2) * 20 * 8**0.5).to(dtype)
    elif name == "strong_gates":
        tensors["log_G"] = torch.full_like(tensors["log_G"], -50.0)
    elif name == "mixed_gates":
        # A fp32 cumulative sum would leave errors of 1e-4 in the exponent of the later, weak gates.
        tensors["log_G"] = torch.full_like(tensors["log_G"], -0.001)
        tensors["log_G"][:, :40] = -50.0
    elif name == "closed_gates":
        tensors["log_G"][:, ::7] = -torch.inf
    elif name == "tiny_queries":
        tensors["Q"] *= 1e-4
    return inputs


HOSTILE = ["zero_queries", "all_zero", "large_scores", "strong_gates", "mixed_gates", "closed_gates", "tiny_queries"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_size", [16, 70])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_inputs_give_finite_results(name: str, chunk_size: int, dtype: torch.dtype) -> None:
    results, _ = evaluate(lambda **kwargs: power_retention(**kwargs, chunk_size=chunk_size), hostile(name, dtype))
    for key, value in results.items():
        assert torch.isfinite(value).all(), key


@pytest.mark.parametrize("name", ["zero_queries", "strong_gates", "mixed_gates", "large_scores"])
def test_hostile_inputs_are_accurate_in_fp32(name: str) -> None:
    inputs = hostile(name, torch.float32)
    assert_as_accurate(
        lambda **kwargs: power_retention(**kwargs, chunk_size=16), quadratic_out, inputs, plain_fp32=recurrent_out
    )


@pytest.mark.parametrize("chunk_size", [128, 1024])
def test_weak_gates_stay_exact_after_strong_ones(chunk_size: int) -> None:
    """512 gates of -50 put the cumulative sum at -25600, where fp32 resolves 2e-3; the weights after them must not
    notice.
    """
    inputs = make_inputs(1, 1024, 1, 1, 4, 4, dtype=torch.float32)
    inputs.tensors["log_G"] = torch.full((1, 1024, 1), -0.001)
    inputs.tensors["log_G"][:, :512] = -50.0
    assert_as_accurate(
        lambda **kwargs: power_retention(**kwargs, chunk_size=chunk_size),
        quadratic_out,
        inputs,
        plain_fp32=recurrent_out,
    )


def test_zero_queries_give_zero_and_no_gradient() -> None:
    inputs = hostile("zero_queries", torch.float32)
    results, _ = evaluate(lambda **kwargs: power_retention(**kwargs, chunk_size=16), inputs)
    assert not results["out0"][:, ::3].any()
    assert not results["grad_Q"][:, ::3].any()


def test_normalizer_is_the_sum_of_weights() -> None:
    inputs = make_inputs(1, 40, 4, 2, 6, 5, dtype=torch.float64)
    ones = {**inputs.tensors, "V": torch.ones_like(inputs.tensors["V"])}
    _, normalizer, _, _ = power_retention_with_normalizer(**inputs.tensors, chunk_size=16)
    assert normalizer.shape == (1, 40, 4)
    assert not normalizer.requires_grad
    # With values of 1 the un-normalised output is the normaliser: recover it from the recurrent state.
    _, state, total = power_retention_recurrent(**ones)
    assert relative_error(state[..., 0], total) < 1e-12
    _, last, _, _ = power_retention_with_normalizer(**ones)
    assert relative_error(last, normalizer) < 1e-12
    assert normalizer.min() > NORMALIZER_FLOOR


def test_scale_and_implementation_arguments() -> None:
    inputs = make_inputs(1, 20, 2, 2, 4, 3, dtype=torch.float64).tensors
    default = power_retention(**inputs)
    # Outputs are ratios of weights: the scale cancels unless a state of another scale takes part.
    assert relative_error(power_retention(**inputs, scale=3.0), default) < 1e-12
    assert torch.equal(power_retention(**inputs, impl="torch"), default)
    with pytest.raises(ValueError, match="cuda"):
        power_retention(**inputs, impl="cuda")


def test_linear_attention_is_degree_one() -> None:
    inputs = make_inputs(1, 50, 2, 2, 6, 4, dtype=torch.float64)
    Q, K, V = (inputs.tensors[name] for name in "QKV")
    features = [torch.nn.functional.elu(x) + 1 for x in (Q, K)]
    weights = torch.einsum("bihd,bjhd->bhij", *features).tril()
    expected = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), V)
    assert relative_error(linear_attention(Q, K, V, chunk_size=16), expected) < 1e-12


def test_switch_over_uses_the_quadratic_form() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make_inputs(1, 64, 1, 1, 8, 8, dtype=torch.float32).tensors
    counts = {}
    for switch in (None, 64):
        with FlopCounterMode(display=False) as counter:
            power_retention(**inputs, chunk_size=16, switch_over_seq_len=switch)
        counts[switch] = counter.get_total_flops()
    assert counts[64] == 64 * 64 * 2 * (8 + 9)
    assert counts[None] != counts[64]


@pytest.mark.parametrize(("key_dim", "deg"), [(64, 2), (128, 2), (16, 4), (64, 1)])
def test_default_chunk_size_switches_to_states_once(key_dim: int, deg: int) -> None:
    quadratic = [choose_chunk_size(tokens=2**n, key_dim=key_dim, value_dim=key_dim, deg=deg) == 2**n for n in range(21)]
    assert quadratic[0]
    assert not quadratic[-1]
    assert sorted(quadratic, reverse=True) == quadratic


def test_quadratic_form_where_the_state_is_enormous() -> None:
    assert phi_dimension(64, 4) == 766480
    assert choose_chunk_size(tokens=65536, key_dim=64, value_dim=64, deg=4) == 65536
