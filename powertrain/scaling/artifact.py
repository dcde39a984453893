"""The report as a W&B artifact: the only place of the sweeps that knows W&B."""

from __future__ import annotations

from pathlib import Path

from powertrain.scaling.recipe import Recipe
from powertrain.training.config import LoggerConfig


def log_report(recipe: Recipe, logger: LoggerConfig, report: Path, directory: Path) -> str:
    """Log a report's files as an artifact in the sweep's group, offline where there is no key, and say where.

    Args:
        logger: of the sweep's cells.
        report: directory of the finished report.
        directory: where W&B keeps its own files.
    """
    import wandb

    from powertrain.training.loggers import wandb_mode

    mode = wandb_mode(logger)
    run = wandb.init(
        project=logger.wandb_project,
        entity=logger.wandb_entity,
        group=recipe.name,
        job_type="report",
        name=f"{recipe.name}-report",
        dir=directory,
        mode=mode,  # type: ignore[arg-type]
        config={"sweep": recipe.name, "recipe": recipe.fingerprint()},
        settings=wandb.Settings(silent=True, console="off"),
    )
    artifact = wandb.Artifact(f"{recipe.name}-report", type="report", metadata={"recipe": recipe.fingerprint()})
    artifact.add_dir(str(report))
    run.log_artifact(artifact)
    run.finish()
    return f"W&B artifact {recipe.name}-report ({mode})"
