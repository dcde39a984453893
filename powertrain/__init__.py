"""powertrain: language models with power retention, from config to perplexity curve."""

from typing import TYPE_CHECKING, Any

from powertrain.version import __version__

if TYPE_CHECKING:
    from powertrain.ops import power_retention, power_retention_inference

__all__ = ["__version__", "power_retention", "power_retention_inference"]


def __getattr__(name: str) -> Any:
    # torch takes more than a second to import; `powertrain --help` must not wait for it.
    if name in ("power_retention", "power_retention_inference"):
        from powertrain import ops

        return getattr(ops, name)
    raise AttributeError(f"module 'powertrain' has no attribute {name!r}")
