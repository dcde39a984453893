"""Processes forked from a server that has imported everything and has no threads.

An interpreter of its own needs seconds for its imports, several times what a small training takes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import util
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from powertrain.training import launch as launching

PRELOAD = (
    "hydra",
    "powertrain.data.datamodule",
    "powertrain.inference.generate",
    "powertrain.models.gpt",
    "powertrain.train",
    "powertrain.train_cli",
    "powertrain.training.fit",
    "powertrain.training.loggers",
    "powertrain.training.plots",
    "tests.faults.process",
    "tests.training.faulty_train",
    "tests.training.paused_train",
    "tests.training.rank_script",
)


class Forked:
    """`main()` in a process with arguments and an environment; used like a `subprocess.Popen`, and killed at exit.

    Args:
        errors: file that stderr is appended to. None: it and stdout stay those of the server.
        output: with `errors`, file that stdout is appended to; None drops it.
        server: False forks from this process, which must have no threads.
    """

    def __init__(
        self,
        main: Callable[[], int],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        errors: Path | None = None,
        output: Path | None = None,
        *,
        server: bool = True,
    ) -> None:
        context = multiprocessing.get_context("forkserver" if server else "fork")
        if server:
            context.set_forkserver_preload(list(PRELOAD))
        inside = main, list(arguments), dict(environment), errors, output
        self._process = context.Process(target=_run, args=inside)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        # At its exit this process would wait for it forever, where a test has failed before it ended it.
        util.Finalize(self, self._process.kill, exitpriority=0)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"process {self.pid} has not ended after {timeout} s"
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


def _run(
    main: Callable[[], int],
    arguments: list[str],
    environment: dict[str, str],
    errors: Path | None,
    output: Path | None,
) -> None:
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    # What a new interpreter would find. With the server's way of starting processes, which is inherited, locks would
    # outlive a killed process.
    multiprocessing.set_start_method(None, force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["powertrain", *arguments]
    if errors is not None:
        for path, target in ((output or Path(os.devnull), 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), target)
    # PyTorch and Lightning read these when they are imported.
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    rank_zero_only.rank = int(environment.get("RANK", "0"))
    code = main()
    sys.stdout.flush()
    sys.exit(code)


def launch_forked(module: str, arguments: Sequence[str], processes: int, *, server: bool = True) -> int:
    """Return what `powertrain.training.launch.launch` returns, of processes that run `module.main()`."""

    def popen(command: list[str], *, env: dict[str, str], start_new_session: bool) -> Forked:
        if server:
            # The child of another process than the launcher would end itself, as one whose launcher is gone.
            env = {name: value for name, value in env.items() if name != launching.LAUNCHER}
        return Forked(importlib.import_module(module).main, command, env, server=server)

    with mock.patch.object(launching, "subprocess", SimpleNamespace(Popen=popen)):
        return launching.launch(list(arguments), processes)
