"""`powertrain train`: compose -> validate -> instantiate -> fit."""

from __future__ import annotations

import argparse
from pathlib import Path

from powertrain.config import GROUPS, compose, options, share_dir, to_values

EXAMPLES = """\
examples:
  powertrain train experiment=quickstart
  powertrain train model=124m mixer=softmax data=text data.files='corpus/*.txt' trainer.max_tokens=1e9
  powertrain train model=10m budget=flops budget.value=1e15 logger=wandb
  powertrain train experiment=quickstart --cfg job      print the composed configuration; nothing runs

The same command again resumes the run. Ctrl-C saves, and says how to resume.
"""


def parser(directories: list[Path]) -> argparse.ArgumentParser:
    """Return the parser of `powertrain train`; its help lists every group and its options."""
    groups = "\n".join(f"  {g + '=':<12} {', '.join(options(g, directories))}" for g in GROUPS)
    result = argparse.ArgumentParser(
        prog="powertrain train",
        usage="powertrain train [group=option ...] [key=value ...] [--cfg job] [--config-dir DIR]",
        description="Train a language model from configuration.",
        epilog=f"groups and their options:\n{groups}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("overrides", nargs="*", help="Hydra overrides; `--cfg job` shows every key and its value")
    result.add_argument("--cfg", choices=["job"], help="print the composed, validated configuration and stop")
    result.add_argument("--config-dir", type=Path, help="directory of your own groups, as experiment/mine.yaml")
    return result


def main(argv: list[str]) -> int:
    """Run `powertrain train` and return its exit code: 0 done, 2 bad input, 130 interrupted and saved."""
    arguments = parser([share_dir("conf")]).parse_intermixed_args(argv)
    config = compose(arguments.overrides, arguments.config_dir)
    if arguments.cfg:
        import yaml

        print(yaml.safe_dump(to_values(config), sort_keys=False), end="")
        return 0
    raise NotImplementedError
