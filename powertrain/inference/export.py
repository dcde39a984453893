"""`powertrain export`: the weights of a checkpoint as one safetensors file, whatever processes wrote it."""

import argparse
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from powertrain.files import replacing_file
from powertrain.inference.generate import load_run, run_directory


def export_weights(model: nn.Module, path: str | Path) -> None:
    """Write the weights of `model` under their own names; the file appears whole or not at all.

    Errors: OSError where it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with replacing_file(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})


def main(argv: list[str]) -> int:
    """`powertrain export RUN`: write the weights of a run's best checkpoint, or of the one given; returns 0."""
    parser = argparse.ArgumentParser(
        prog="powertrain export", description="Write the weights of a run as one safetensors file."
    )
    parser.add_argument("run", help="a run directory (its best checkpoint is taken), or a checkpoint in one")
    parser.add_argument("--output", type=Path, help="file to write (default: model.safetensors in the run directory)")
    arguments = parser.parse_args(argv)
    model, _ = load_run(arguments.run)
    output = arguments.output or run_directory(arguments.run) / "model.safetensors"
    export_weights(model, output)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {output}")
    return 0
