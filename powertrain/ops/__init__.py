"""Public ops: power retention, the attention baselines beside it, and the head loss."""

from powertrain.ops.api import linear_attention, power_retention, power_retention_with_normalizer
from powertrain.ops.attention import softmax_attention, window_attention
from powertrain.ops.inference import power_retention_inference
from powertrain.ops.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "linear_attention",
    "linear_cross_entropy",
    "power_retention",
    "power_retention_inference",
    "power_retention_with_normalizer",
    "softmax_attention",
    "window_attention",
]
