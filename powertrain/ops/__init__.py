"""Public ops: power retention, the attention baselines beside it, and the head loss."""

from powertrain.ops.api import linear_attention, power_retention, power_retention_with_normalizer

__all__ = ["linear_attention", "power_retention", "power_retention_with_normalizer"]
