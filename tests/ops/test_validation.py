"""Every wrong input is a ValueError that states the value and what is allowed."""

import pytest
import torch

from powertrain.ops import power_retention, softmax_attention, window_attention
from tests.ops.accuracy import make_inputs

B, T, HQ, HK, DIM, VALUE = 2, 6, 4, 2, 4, 3


def z(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


CASES = {
    "type": ({"K": z(B, T, HK, DIM).numpy()}, "K is a numpy.ndarray; expected a torch.Tensor"),
    "rank of Q": ({"Q": z(T, HQ, DIM)}, r"Q has 3 dimensions, shape \(6, 4, 4\); expected 4: \(B, T, Hq, K\)"),
    "rank of V": ({"V": z(B, T, HK)}, r"V has 3 dimensions"),
    "integer": ({"Q": z(B, T, HQ, DIM, dtype=torch.int64)}, "Q has dtype torch.int64; allowed are"),
    "dtypes": ({"K": z(B, T, HK, DIM, dtype=torch.bfloat16)}, "share a dtype; got torch.float32, torch.bfloat16"),
    "device": ({"V": z(B, T, HK, VALUE).to("meta")}, "on one device; got cpu, cpu and meta"),
    "batch": ({"K": z(B + 1, T, HK, DIM)}, "share the batch size; got 2, 3 and 2"),
    "length": ({"K": z(B, T + 1, HK, DIM)}, "share the sequence length; got 6, 7 and 6"),
    "heads of V": ({"V": z(B, T, 1, VALUE)}, "same number of heads; got 2 and 1"),
    "query heads": ({"Q": z(B, T, 3, DIM)}, "multiple of key heads; got 3 query heads and 2 key heads"),
    "head dim": ({"K": z(B, T, HK, DIM + 1)}, "share the head dimension; got 4 and 5"),
    "empty": ({"Q": z(B, 0, HQ, DIM)}, "every size must be at least 1"),
    "gate shape": ({"log_G": z(B, T, HQ)}, r"log_G has shape \(2, 6, 4\); expected \(B, T, Hk\) = \(2, 6, 2\)"),
    "gate dtype": ({"log_G": z(B, T, HK, dtype=torch.bfloat16)}, "log_G has dtype torch.bfloat16; expected float32"),
    "positive gate": ({"log_G": z(B, T, HK) + 0.5}, "log_G must be at most 0 .*; its maximum is 0.5"),
    "positive gate beside nan": (
        {"log_G": torch.cat([z(B, 1, HK) * torch.nan, z(B, T - 1, HK) + 0.5], dim=1)},
        "log_G must be at most 0 .*; its maximum is 0.5",
    ),
    "cu rank": ({"cu_seqlens": torch.tensor([[0, 12]])}, r"cu_seqlens has shape \(1, 2\)"),
    "cu dtype": ({"cu_seqlens": torch.tensor([0.0, 6, 12])}, "cu_seqlens has dtype torch.float32"),
    "cu end": ({"cu_seqlens": torch.tensor([0, 6, 11])}, r"runs from 0 to 11; it must run from 0 to B\*T = 12"),
    "cu start": ({"cu_seqlens": torch.tensor([1, 6, 12])}, "runs from 1 to 12"),
    "cu order": ({"cu_seqlens": torch.tensor([0, 6, 5, 12])}, "decreases from 6 to 5"),
    "cu rows": ({"cu_seqlens": torch.tensor([0, 5, 12])}, "lacks the row start 6"),
    "scale": ({"scale": float("nan")}, "scale=nan must be a finite number"),
    "scale type": ({"scale": "a"}, "scale='a' must be a finite number other than 0"),
    "gate type": ({"log_G": [0.0]}, "log_G is a builtins.list; expected a torch.Tensor or None"),
    "cu type": ({"cu_seqlens": [0, 6, 12]}, "cu_seqlens is a builtins.list; expected a torch.Tensor or None"),
}

POWER_CASES = {
    "odd deg": ({"deg": 3}, r"deg=3 is odd: .* allowed are 1"),
    "high deg": ({"deg": 6}, "deg=6 is not supported; allowed are 1 .*, 2 and 4"),
    "zero deg": ({"deg": 0}, "deg=0 is not supported"),
    "float deg": ({"deg": 2.0}, "deg=2.0 must be an integer"),
    "chunk": ({"chunk_size": 0}, "chunk_size=0 must be None or an integer of at least 1"),
    "switch": ({"switch_over_seq_len": -1}, "switch_over_seq_len=-1"),
    "impl": ({"impl": "triton"}, "impl='triton' is unknown"),
    "state alone": ({"initial_state": z(B, HK, 10, VALUE)}, "sum_of_keys is None"),
    "sum alone": ({"sum_of_keys": z(B, HK, 10)}, "initial_state is None"),
    "state shape": (
        {"initial_state": z(B, HK, 16, VALUE), "sum_of_keys": z(B, HK, 16)},
        r"expected \(B, Hk, F, V\) = \(2, 2, 10, 3\)",
    ),
    "state type": ({"initial_state": [0.0], "sum_of_keys": z(B, HK, 10)}, "initial_state is a builtins.list"),
    "sum type": ({"initial_state": z(B, HK, 10, VALUE), "sum_of_keys": 3}, "sum_of_keys is a builtins.int"),
    "state dtypes": (
        {"initial_state": z(B, HK, 10, VALUE), "sum_of_keys": z(B, HK, 10, dtype=torch.float64)},
        "must share a dtype",
    ),
}


@pytest.mark.parametrize("case", CASES | POWER_CASES)
def test_power_retention(case: str) -> None:
    change, message = (CASES | POWER_CASES)[case]
    with pytest.raises(ValueError, match=message):
        power_retention(**(make_inputs(B, T, HQ, HK, DIM, VALUE, dtype=torch.float32).tensors | change))


@pytest.mark.parametrize("case", CASES)
def test_baselines(case: str) -> None:
    change, message = CASES[case]
    arguments = make_inputs(B, T, HQ, HK, DIM, VALUE, dtype=torch.float32).tensors | change
    with pytest.raises(ValueError, match=message):
        softmax_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments, window=3)


def test_closed_gates_are_allowed() -> None:
    tensors = make_inputs(B, T, HQ, HK, DIM, VALUE, dtype=torch.float32).tensors
    tensors["log_G"] = torch.full((B, T, HK), -torch.inf)
    # Each token sees itself alone.
    torch.testing.assert_close(power_retention(**tensors), tensors["V"].repeat_interleave(HQ // HK, dim=2))
