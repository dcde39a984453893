"""A run without a model: steps of a tenth of a second, checkpoints, and the signals as training takes them.

    worker.py RUN_DIR [--steps N | --until FILE] [--fail-rank R] [--deaf]

Appends attempt and step to RUN_DIR/trace, and ends after N steps, or with the first one that finds FILE: a test that
waits for something in the middle of a run says itself when the middle is over. `--deaf` takes no notice of signals in
its first attempt, as a validation longer than the time that is left.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from powertrain.cluster.queue import current_job_id
from powertrain.cluster.requeue import requeue
from powertrain.run_status import StatusReport


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--until", type=Path)
    parser.add_argument("--fail-rank", type=int)
    parser.add_argument("--deaf", action="store_true")
    arguments = parser.parse_args()
    rank = int(os.environ["SLURM_PROCID"])
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    received: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda number, frame: received.append(number))
    run_dir = arguments.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, trace = run_dir / "checkpoints" / "last", run_dir / "trace"
    step = int(os.readlink(checkpoint).rpartition("-")[2]) if checkpoint.is_symlink() else 0

    def finished() -> bool:
        return arguments.until.exists() if arguments.until else step >= arguments.steps

    with StatusReport(run_dir, job_id=current_job_id(), enabled=rank == 0) as report:
        print(f"attempt {attempt} from step {step}", flush=True)
        while not finished():
            step += 1
            time.sleep(0.1)
            if rank == arguments.fail_rank and step == 5:
                raise RuntimeError(f"the fault of rank {rank}")
            if rank == 0:
                with trace.open("a") as file:
                    file.write(f"{attempt} {step}\n")
                report.update(step=step, total_steps=arguments.steps or step, loss=1.0 / step)
            if received and not (arguments.deaf and attempt == 0):
                if rank == 0:
                    checkpoint.parent.mkdir(exist_ok=True)
                    checkpoint.unlink(missing_ok=True)
                    checkpoint.symlink_to(f"step-{step:08d}")
                report.interrupted(signal.Signals(received[0]).name)
                break
    if received and not finished() and rank == 0:
        print(requeue(run_dir, received[0]).sentence, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
