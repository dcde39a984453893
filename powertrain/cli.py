"""The command line: `powertrain <command> ...`. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

# command -> (module, function, one line of help); the function takes the remaining arguments and returns an exit code.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": ("powertrain.train_cli", "main", "train a model: powertrain train [group=option] [key=value] ..."),
    "generate": ("powertrain.inference.cli", "main", "continue a prompt with a trained run"),
    "export": ("powertrain.inference.export", "main", "write the weights of a run as one safetensors file"),
    "runs": ("powertrain.runs", "main", "list the runs of this directory with state, progress and loss"),
    "sweep": ("powertrain.scaling.cli", "main", "plan, run and report a scaling sweep: powertrain sweep plan RECIPE"),
    "bench": ("powertrain.bench.cli", "main", "side-by-side benchmarks: powertrain bench op | kernels | distributed"),
    "kernels": ("powertrain.native.cli", "main", "build the CUDA kernel library, or say what was built and chosen"),
}


def usage() -> str:
    """Return the top-level help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: powertrain <command> [arguments]",
            "",
            "Train language models with power retention, from config to perplexity curve.",
            "",
            "commands:",
            *lines,
            "",
            "  powertrain <command> --help   says more about one command",
            "  powertrain --version          prints the version",
            "",
            "Start here: powertrain train experiment=quickstart",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    A mistake of the user ends with one sentence on stderr and exit code 2; `POWERTRAIN_TRACEBACK=1` shows where. After
    Ctrl-C, another one ends the process at once.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from powertrain.version import __version__

        print(f"powertrain {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        from powertrain.schema import nearest

        print(f"powertrain: unknown command '{name}': {nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[name]
    try:
        command: Callable[[list[str]], int] = getattr(import_module(module), function)
        code = command(rest)
        if code == 128 + signal.SIGINT and argv is None:
            _end_quietly_from_now_on()
        return code
    except KeyboardInterrupt:
        if argv is None:
            _end_quietly_from_now_on()
        print(f"powertrain {name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        # Users' mistakes are ValueErrors with a sentence of their own, and the file system's troubles OSErrors.
        if os.environ.get("POWERTRAIN_TRACEBACK", "0") not in ("", "0"):
            raise
        print(f"powertrain {name}: {error}", file=sys.stderr)
        if not _is_ours(error):
            print("(POWERTRAIN_TRACEBACK=1 shows where this arose)", file=sys.stderr)
        return 2


def _end_quietly_from_now_on() -> None:
    """Have further Ctrl-C end this process without a word: it has said all, and Python only waits for its threads."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))


def _is_ours(error: Exception) -> bool:
    """Whether powertrain itself raised `error`, whose sentence then says all; Python or a library raises the others."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(frame.filename).is_relative_to(Path(__file__).parent) and (frame.line or "").startswith("raise ")


if __name__ == "__main__":
    sys.exit(main())
