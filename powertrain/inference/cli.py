"""`powertrain generate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from powertrain.config import check_text
from powertrain.run_status import read_status

if TYPE_CHECKING:
    from powertrain.training.checkpoint import Checkpoint


def main(argv: list[str]) -> int:
    """`powertrain generate RUN`: print the prompt and its continuation as it is generated; returns 0.

    Of an unfinished run, a line on stderr says how far it is.
    """
    parser = argparse.ArgumentParser(prog="powertrain generate", description="Continue a prompt with a trained run.")
    parser.add_argument(
        "run", help="a run directory (its best checkpoint is taken), or a checkpoint or exported file in one"
    )
    parser.add_argument("--prompt", default="", help="the text to continue; none starts a new document")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="at most this many tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=None, help="sample among the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, default=None, help="sample among the fewest tokens that reach p")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts (default: 0)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    arguments = parser.parse_args(argv)
    check_text("--prompt ", arguments.prompt)
    # After what is wrong with the arguments alone: torch takes seconds.
    from powertrain.inference.generate import generate_text, load_run_and_checkpoint, run_directory

    device = _device(arguments.device)
    path = Path(arguments.run)
    model, tokenizer, checkpoint = load_run_and_checkpoint(path, device)
    note = None if checkpoint is None else _unfinished(run_directory(path), checkpoint)
    if note is not None:
        print(f"powertrain generate: {note}", file=sys.stderr, flush=True)
    print(arguments.prompt, end="", flush=True)
    for piece in generate_text(
        model,
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    ):
        print(piece, end="", flush=True)
    print()
    return 0


def _device(asked: str | None) -> str:
    """The device to generate on; None asks for a GPU where there is one."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = [*(["cuda"] if gpus else []), "cpu", *(f"cuda:{i}" for i in range(gpus))]
    if asked is not None and asked not in allowed:
        raise ValueError(f"--device {asked} is no device of this machine; allowed: {', '.join(allowed)}")
    return asked or allowed[0]


def _unfinished(run: Path, checkpoint: Checkpoint) -> str | None:
    """How far an unfinished run was at its checkpoint, in a line for the user; None where it has all its steps."""
    status = read_status(run)
    if status is None or status.state == "finished":
        return None
    total = status.total_steps
    planned = "" if not total else f" of {total:,} ({checkpoint.step / total:.1%})"
    loss = "" if checkpoint.val_loss is None else f", validation loss {checkpoint.val_loss:.4f} nats per token"
    return f"the run is not finished: its weights are those of step {checkpoint.step:,}{planned}{loss}"
