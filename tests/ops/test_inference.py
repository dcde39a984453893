"""Token-by-token decoding equals the training form, whatever is folded when."""

import pytest
import torch
from torch import Tensor

from powertrain.ops import inference, power_retention, power_retention_inference
from powertrain.ops.reference import power_retention_quadratic
from tests.ops.accuracy import make_inputs, relative_error


def decode(tensors: dict[str, Tensor], deg: int, switch: int | None, prompt: int, step: int = 1) -> Tensor:
    """Run `prompt` tokens at once and then `step` at a time, keeping the keys that are not folded as a caller would."""
    length = tensors["Q"].shape[1]
    outputs, folded, state, total = [], 0, None, None
    stops = [prompt, *range(prompt + step, length, step), length]
    for start, stop in zip([0, *stops], stops, strict=False):
        unfolded = {name: x[:, folded:stop] for name, x in tensors.items() if name != "Q"}
        out, new_state, total = power_retention_inference(
            tensors["Q"][:, start:stop],
            **unfolded,
            initial_state=state,
            sum_of_keys=total,
            deg=deg,
            switch_over_seq_len=switch,
        )
        folds = switch is not None and stop - folded >= switch
        assert folds == (new_state is not state)
        folded, state = (stop, new_state) if folds else (folded, state)
        outputs.append(out)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("switch", "prompt", "step"), [(7, 1, 1), (1, 1, 1), (16, 20, 1), (None, 5, 1), (8, 30, 3)])
@pytest.mark.parametrize("deg", [1, 2, 4])
def test_decoding_equals_the_training_form(deg: int, switch: int | None, prompt: int, step: int, gated: bool) -> None:
    tensors = make_inputs(2, 40, 4, 2, 5, 3, dtype=torch.float64, gated=gated).tensors
    expected = power_retention(**tensors, deg=deg)
    assert relative_error(decode(tensors, deg, switch, prompt, step), expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_dtypes(dtype: torch.dtype) -> None:
    tensors = make_inputs(1, 30, 4, 2, 6, 4, dtype=dtype).tensors
    out, state, total = power_retention_inference(**tensors, switch_over_seq_len=30)
    assert out.dtype == dtype
    assert state is not None
    assert total is not None
    assert state.dtype == total.dtype == torch.float32
    assert (
        relative_error(out, power_retention(**{k: x.double() for k, x in tensors.items()})) < 2 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_inputs_and_not_the_arithmetic(dtype: torch.dtype, queries: int) -> None:
    """A state of 1e5 tokens is beyond fp16."""
    tensors = make_inputs(1, 30, 4, 2, 16, 8, dtype=torch.float32, gated=False).tensors
    *_, state, total = (x.float() * 1e5 for x in power_retention_quadratic(**tensors))
    tensors["Q"] = tensors["Q"][:, -queries:]
    low = {name: x.to(dtype) for name, x in tensors.items()}
    expected = power_retention_inference(**low, initial_state=state, sum_of_keys=total, switch_over_seq_len=8)
    read = power_retention_inference(low["Q"], None, None, None, state, total)
    with torch.autocast("cpu", dtype):
        actual = power_retention_inference(**tensors, initial_state=state, sum_of_keys=total, switch_over_seq_len=8)
        read_there = power_retention_inference(tensors["Q"], None, None, None, state, total)
    for a, b in zip((*actual, *read_there), (*expected, *read), strict=True):
        assert a is not None
        assert a.dtype == b.dtype
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("with_keys", [True, False])
def test_many_queries_go_by_blocks(with_keys: bool, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_BLOCK", 4)
    phi, rows = inference.phi, []
    monkeypatch.setattr(inference, "phi", lambda x, deg: rows.append(x.shape[1]) or phi(x, deg))
    tensors = make_inputs(2, 40, 4, 2, 5, 3, dtype=torch.float64, gated=gated).tensors
    first, rest = ({name: x[:, span] for name, x in tensors.items()} for span in (slice(20), slice(20, None)))
    _, state, total = power_retention_inference(**first, switch_over_seq_len=1)
    if with_keys:
        queries = rest.pop("Q")[:, 3:]
        out, _, _ = power_retention_inference(queries, **rest, initial_state=state, sum_of_keys=total)
        assert relative_error(out, power_retention(**tensors)[:, 23:]) < 1e-9
    else:
        queries = rest["Q"]
        out, _, _ = power_retention_inference(queries, None, None, None, state, total)
        one_by_one = [power_retention_inference(q, None, None, None, state, total)[0] for q in queries.split(1, 1)]
        assert relative_error(out, torch.cat(one_by_one, dim=1)) < 1e-12
    assert max(rows) == 2 * 4  # query heads of a key head


def test_state_alone_answers_queries() -> None:
    tensors = make_inputs(2, 21, 4, 2, 5, 3, dtype=torch.float64).tensors
    _, state, total = power_retention_inference(**tensors, switch_over_seq_len=1)
    query = tensors["Q"][:, -1:]
    out, same_state, same_total = power_retention_inference(query, None, None, initial_state=state, sum_of_keys=total)
    assert same_state is state
    assert same_total is total
    # The last token of the training form reads the same content.
    assert relative_error(out, power_retention(**tensors)[:, -1:]) < 1e-9


def test_the_state_decays_for_every_query_by_its_own_gates() -> None:
    tensors = make_inputs(1, 30, 2, 2, 4, 3, dtype=torch.float64, gate_shift=-1.0).tensors
    assert relative_error(decode(tensors, 2, 6, 8, 5), power_retention(**tensors)) < 1e-9


def test_zero_queries_give_zero() -> None:
    tensors = make_inputs(1, 4, 2, 1, 4, 3, dtype=torch.float32).tensors
    _, state, total = power_retention_inference(**tensors, switch_over_seq_len=1)
    out, _, _ = power_retention_inference(torch.zeros(1, 1, 2, 4), None, None, None, state, total)
    assert torch.equal(out, torch.zeros(1, 1, 2, 3))


def test_errors_name_what_is_missing() -> None:
    tensors = make_inputs(1, 4, 2, 1, 4, 3, dtype=torch.float32).tensors
    Q, K, V, log_G = tensors.values()
    with pytest.raises(ValueError, match="needs keys and values, or a state"):
        power_retention_inference(Q, None, None)
    with pytest.raises(ValueError, match="V is None"):
        power_retention_inference(Q, K, None)
    with pytest.raises(ValueError, match="Q has 4 tokens, K 2"):
        power_retention_inference(Q, K[:, :2], V[:, :2])
    with pytest.raises(ValueError, match=r"expected \(B, Hk, F, V\) = \(1, 1, 10, 3\)"):
        power_retention_inference(Q, K, V, log_G, torch.zeros(1, 1, 9, 3), torch.zeros(1, 1, 9))
    with pytest.raises(ValueError, match="sum_of_keys is None"):
        power_retention_inference(Q, K, V, log_G, torch.zeros(1, 1, 10, 3))
    with pytest.raises(ValueError, match="switch_over_seq_len=0"):
        power_retention_inference(Q, K, V, switch_over_seq_len=0)
    state, total = torch.zeros(1, 1, 10, 3), torch.zeros(1, 1, 10)
    with pytest.raises(ValueError, match="belongs to keys"):
        power_retention_inference(Q, None, None, log_G, state, total)
    for arguments, message in (
        ((None, K, V), "Q is a builtins.NoneType; expected a torch.Tensor$"),
        ((Q, [1], V), "K is a builtins.list; expected a torch.Tensor$"),
        ((Q, K, [1]), "V is a builtins.list"),
        ((Q, K, V, [0.0]), "log_G is a builtins.list; expected a torch.Tensor or None"),
        ((Q, K, V, log_G, [1], total), "initial_state is a builtins.list; expected a torch.Tensor or None"),
        ((Q, None, None, None, [1], [1]), "initial_state is a builtins.list"),
        ((Q, None, None, None, state, [1]), "sum_of_keys is a builtins.list"),
        ((Q, None, None, [0.0], state, total), "log_G is a builtins.list"),
        ((None, None, None, None, state, total), "Q is a builtins.NoneType"),
        ((Q.sum(), None, None, None, state, total), "Q has 0 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            power_retention_inference(*arguments)
