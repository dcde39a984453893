"""The states at both ends without outputs are those of the whole op."""

import pytest
import torch

from powertrain.ops import power_retention_with_normalizer
from powertrain.ops.api import positive_feature_map
from powertrain.ops.boundary_states import final_state, initial_state_grad
from tests.ops.accuracy import make_inputs, relative_error
from tests.ops.test_power_retention import with_documents, with_state


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "whole"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("deg", [1, 2, 4])
def test_final_state_and_gradient_of_the_initial_state(deg: int, gated: bool, documents: bool) -> None:
    inputs = with_state(make_inputs(2, 70, 4, 2, 5, 3, dtype=torch.float64, gated=gated), deg)
    inputs = with_documents(inputs) if documents else inputs
    options = {"deg": deg, "chunk_size": 16, "cu_seqlens": inputs.keywords.get("cu_seqlens")}
    leaves = [inputs.tensors.pop(name).requires_grad_() for name in ("initial_state", "sum_of_keys")]
    Q, K, V, log_G = (inputs.tensors.get(name) for name in ("Q", "K", "V", "log_G"))
    _, _, *expected = power_retention_with_normalizer(Q, K, V, log_G, return_final_state=True, **options)
    q, k = (positive_feature_map(Q), positive_feature_map(K)) if deg == 1 else (Q, K)
    found = final_state(k, V, log_G, options["cu_seqlens"], deg)

    out, normalizer, _, _ = power_retention_with_normalizer(Q, K, V, log_G, leaves[0], sum_of_keys=leaves[1], **options)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected += torch.autograd.grad(out, leaves, grad_out)
    scale = Q.shape[3] ** -0.5
    found += initial_state_grad(grad_out, q, log_G, options["cu_seqlens"], out.detach(), normalizer, 2, scale, deg)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < 1e-12


def test_what_overflows_in_another_document_stays_there() -> None:
    tensors = make_inputs(1, 40, 2, 1, 4, 3, dtype=torch.float32, gated=False).tensors
    Q, K, V = tensors.values()
    cu_seqlens = torch.tensor([0, 10, 30, 40])
    grad_out, out, normalizer = torch.ones(1, 40, 2, 3), torch.ones(1, 40, 2, 3), torch.ones(1, 40, 2)

    def states() -> tuple[torch.Tensor, ...]:
        return *final_state(K, V, None, cu_seqlens, 2), *initial_state_grad(
            grad_out, Q, None, cu_seqlens, out, normalizer, 1, 0.5, 2
        )

    expected = states()
    Q[:, 20] *= 1e38
    K[:, 20] *= 1e38
    for a, b in zip(states(), expected, strict=True):
        assert torch.equal(a, b)
