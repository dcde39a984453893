import math

import pytest
import torch

from powertrain.training.hardware import peak_flops
from powertrain.training.metrics import ValidationMetrics, bits_per_byte, perplexity, positions_in_context


def test_positions_restart_at_documents_and_ignore_empty_ones():
    offsets = torch.tensor([0, 3, 3, 4, 8, 8, 8], dtype=torch.int32)
    assert positions_in_context(offsets, 8).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def batches(seed=0, rows=6, context=300):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(rows, context, generator=generator) * 5
    labels = torch.randint(0, 50, (rows, context), generator=generator)
    labels[torch.rand(rows, context, generator=generator) < 0.3] = -100
    sizes = torch.randint(0, 6, (rows, context), generator=generator, dtype=torch.int32)
    cuts = [sorted({0, *torch.randint(0, context, (3,), generator=generator).tolist()}) for _ in range(rows)]
    return losses, labels, sizes, cuts


def offsets(cuts, context):
    flat = [row * context + cut for row, row_cuts in enumerate(cuts) for cut in row_cuts]
    return torch.tensor([*flat, len(cuts) * context, len(cuts) * context], dtype=torch.int32)


@pytest.mark.parametrize("rows_per_batch", [1, 2, 6])
def test_validation_metrics_equal_a_plain_loop(rows_per_batch):
    losses, labels, sizes, cuts = batches()
    metrics = ValidationMetrics(300, torch.device("cpu"))
    for i in range(0, 6, rows_per_batch):
        part = slice(i, i + rows_per_batch)
        positions = positions_in_context(offsets(cuts[part], 300), labels[part].numel())
        metrics.update(losses[part], labels[part], positions, sizes[part])
    result = metrics.compute(bytes_per_token=None)

    sums, counts, total_bytes = {}, {}, 0
    for row in range(6):
        for t in range(300):
            if labels[row, t] == -100:
                continue
            position = t - max(cut for cut in cuts[row] if cut <= t)
            bound = next(b for b in (64, 128, 256, 512) if position < b)
            sums[bound] = sums.get(bound, 0.0) + losses[row, t].double().item()
            counts[bound] = counts.get(bound, 0) + 1
            total_bytes += sizes[row, t].item()
    total, count = sum(sums.values()), sum(counts.values())
    assert result["val/loss"] == pytest.approx(total / count)
    assert result["val/perplexity"] == pytest.approx(math.exp(total / count))
    assert result["val/bits_per_byte"] == pytest.approx(total / math.log(2) / total_bytes)
    found = {int(k.rsplit("/", 1)[1]): v for k, v in result.items() if "by_position" in k}
    assert found == pytest.approx({bound: sums[bound] / counts[bound] for bound in sums})


def test_losses_of_ignored_labels_do_not_count_even_if_not_finite():
    metrics = ValidationMetrics(4, torch.device("cpu"))
    losses = torch.tensor([[1.0, float("nan"), 3.0, float("inf")]])
    labels = torch.tensor([[1, -100, 2, -100]])
    metrics.update(losses, labels, torch.arange(4)[None], None)
    assert metrics.compute(None)["val/loss"] == 2.0


def test_bits_per_byte_falls_back_on_the_corpus_and_may_be_unknown():
    metrics = ValidationMetrics(4, torch.device("cpu"))
    metrics.update(torch.full((1, 4), math.log(2)), torch.ones(1, 4, dtype=torch.int64), torch.arange(4)[None], None)
    assert metrics.compute(2.0)["val/bits_per_byte"] == pytest.approx(0.5)
    assert "val/bits_per_byte" not in metrics.compute(None)


def test_a_split_without_labels_is_refused():
    with pytest.raises(ValueError, match="no label"):
        ValidationMetrics(4, torch.device("cpu")).compute(None)


def test_perplexity_and_bits_per_byte():
    assert perplexity(math.log(10)) == pytest.approx(10)
    assert perplexity(1e6) == math.inf
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)


def test_only_bf16_has_a_peak():
    assert peak_flops("NVIDIA H200", "bf16-mixed") == 989.4e12
    assert peak_flops("NVIDIA H200", "32-true") is None


@pytest.mark.parametrize(
    ("device_name", "peak"),
    [
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", None),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA GH200 144G HBM3e", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA H800 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", None),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A3000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla T4", None),
        ("Intel Xeon", None),
    ],
)
def test_a_peak_is_known_by_what_the_driver_calls_a_device_and_by_nothing_alike(device_name, peak):
    assert peak_flops(device_name, "bf16-mixed") == peak
