"""The processes that make batches for a training process."""

from __future__ import annotations

import multiprocessing.context
import signal

# What asks a training process to save and end; see `powertrain.training.signals`.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Worker(multiprocessing.context.ForkProcess):
    """A process that signals to its process group do not reach; the process that started it ends it.

    Terminals, Slurm and `timeout` signal all processes of a group or step. The training process then still needs its
    batches up to the end of the step that it saves.
    """

    def start(self) -> None:
        """Start with the signals blocked from the first instruction on, which a handler set later would not give."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            super().start()
            # At exit, multiprocessing ends what is left by this method of what it keeps, and waits for it.
            self._popen.terminate = self._popen.kill  # type: ignore[attr-defined]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """End it by KILL, since TERM does not reach it."""
        self.kill()


class WorkerContext(multiprocessing.context.ForkContext):
    """Has a `DataLoader` start such workers; forked, as the windows that they read are open already."""

    Process = Worker
