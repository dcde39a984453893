"""Configurations and costs of a recipe's combinations: Hydra composition and `powertrain.models.flops`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from powertrain.config import RunConfig, compose, planned_vocabulary
from powertrain.models.config import ModelConfig
from powertrain.scaling.cells import Cost
from powertrain.scaling.recipe import Recipe
from powertrain.schema import ConfigError

DeviceType = Literal["cpu", "cuda"]


def state_size(model: ModelConfig, context: int) -> float:
    """Return how many numbers hold the history of one sequence, over all layers; 0 where they grow with the context."""
    from powertrain.ops.sympow import phi_dimension

    total = 0
    for mixer in model.layer_mixers:
        if mixer.kind == "softmax":
            return 0.0
        if mixer.kind == "window":
            total += 2 * model.n_kv_heads * model.head_dim * min(mixer.window, context)
        else:
            features = phi_dimension(model.head_dim, 1 if mixer.kind == "linear" else mixer.deg)
            # The state and the sum of keys, the normaliser's own column.
            total += model.n_kv_heads * features * (model.head_dim + 1)
    return float(total)


def model_cost(model: ModelConfig, context: int, device_type: DeviceType) -> Cost:
    """Return what a token of training costs, forward and backward, under every convention."""
    from powertrain.models.flops import TokenFlops, model_flops, num_parameters

    flops = model_flops(model, context, device_type=device_type)
    parameters = num_parameters(model)
    total = float(sum(parameters.values()))
    by_part = {
        part.name: getattr(flops.algorithmic.forward, part.name) + getattr(flops.algorithmic.backward, part.name)
        for part in dataclasses.fields(TokenFlops)
    }
    return Cost(
        flops_per_token={
            "algorithmic": flops.algorithmic.total,
            "executed": flops.executed.total,
            "algorithmic, no head": flops.algorithmic.without_head,
            "executed, no head": flops.executed.without_head,
        },
        flops_by_part=by_part,
        parameters=total - parameters["embedding"] - parameters["head"],
        parameters_total=total,
        state_size=state_size(model, context),
    )


class ComposedCatalog:
    """The catalog of a recipe; every combination is composed and counted once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._configs: dict[tuple[str, str, int], RunConfig] = {}
        self._costs: dict[tuple[str, str, int], Cost] = {}

    def config(self, mixer: str, size: str, context: int) -> RunConfig:
        """Return the composed configuration, its vocabulary filled in.

        Errors:
            ConfigError: the recipe's overrides contradict the schema or each other, or ask for a dry run.
        """
        key = (mixer, size, context)
        if key not in self._configs:
            recipe = self.recipe
            overrides = [
                *recipe.overrides,
                *recipe.ladder[size].overrides,
                *recipe.mixers[mixer].overrides,
                f"trainer.context_length={context}",
                f"trainer.global_batch_tokens={context}",
                f"data.max_val_tokens={recipe.evaluation.tokens}",
                # A sweep's cells are measured, not read.
                "sample.max_new_tokens=0",
            ]
            try:
                config = compose(overrides)
                if config.cluster.dry_run:
                    raise ConfigError(
                        "cluster.dry_run=true is not for a sweep: `powertrain sweep plan` prints what would run"
                    )
                model = dataclasses.replace(config.model, vocab_size=planned_vocabulary(config))
            except ConfigError as error:
                raise ConfigError(f"{recipe.name}: {mixer}, {size}: {error}") from error
            self._configs[key] = dataclasses.replace(config, model=model)
        return self._configs[key]

    def cost(self, mixer: str, size: str, context: int) -> Cost:
        """Return what a token of training costs where the recipe trains; only executed FLOPs depend on that."""
        key = (mixer, size, context)
        if key not in self._costs:
            config = self.config(*key)
            device_type: DeviceType = "cpu" if config.trainer.accelerator == "cpu" else "cuda"
            self._costs[key] = model_cost(config.model, context, device_type)
        return self._costs[key]
