"""The whole way through a real Slurm: submission, signals, requeue, failing machines and processes."""

import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from powertrain.cli import main
from powertrain.cluster.config import ClusterConfig
from powertrain.cluster.requeue import UNANSWERED_FILE
from powertrain.cluster.script import BatchJob
from powertrain.cluster.submit import submit_job, submitted_job_id
from powertrain.run_status import read_status
from powertrain.training.records import read_metrics
from tests.forked import launch_forked

# Nothing here is judged by how long it takes: limits are so wide that only what never happens meets them.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 300.0
# Of a run that a test ends before: more than it waits for anything.
ENDLESS = ("--steps", "10000")
ENDLESS_TRAINING = ("trainer.max_steps=10000000", "trainer.val_every_steps=1000")


def wait_until(condition, what, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {patience:.0f} s until {what() if callable(what) else what}"
        time.sleep(0.2)


def show(slurm, job_id):
    """Return what the controller says of a job, as a dict."""
    fields = {}
    for word in slurm.command("scontrol", "--oneliner", "show", "job", job_id).split():
        key, _, value = word.partition("=")
        fields.setdefault(key, value)
    return fields


def wait_for_state(slurm, job_id, *states):
    last = {}

    def there():
        last.update(show(slurm, job_id))
        return last["JobState"] in states

    wait_until(there, lambda: f"job {job_id} is {states}: {last}")
    return last


class FakeRun:
    """A job that runs worker.py."""

    def __init__(self, directory, *arguments, array=None, dependency=None, **cluster):
        self.run_dir = directory / "run"
        self.log_dir = directory / "logs"
        job = BatchJob(
            name=directory.name,
            # In an array each task has a directory of its own.
            command=("bash", "-c", 'exec "$@" ', "-", sys.executable, str(WORKER), str(self.run_dir), *arguments)
            if array is None
            else (
                "bash",
                "-c",
                'run="$1-$SLURM_ARRAY_TASK_ID"; shift; exec "$0" "$1" "$run" "${@:2}"',
                sys.executable,
                str(self.run_dir),
                str(WORKER),
                *arguments,
            ),
            work_dir=directory,
            log_dir=self.log_dir,
            code=ROOT,
            last_resort=(sys.executable, "-m", "powertrain.cluster.requeue", str(self.run_dir)),
            unanswered=self.run_dir / "slurm" / UNANSWERED_FILE,
            array=array,
            dependency=dependency,
        )
        self.job_id = submit_job(ClusterConfig(kind="slurm", **cluster), job, directory / "job.sh")

    @property
    def log(self):
        return (self.log_dir / f"{self.job_id}.log").read_text()

    def trace(self, suffix=""):
        """Return (attempt, step) of every step."""
        path = self.run_dir.with_name(self.run_dir.name + suffix) / "trace"
        if not path.exists():
            return []
        return [tuple(map(int, line.split())) for line in path.read_text().splitlines()]

    def wait_for_step(self, step, suffix="", attempt=0):
        """Wait until `attempt` has made `step` or a later one."""
        wait_until(
            lambda: any(a == attempt and s >= step for a, s in self.trace(suffix)),
            lambda: f"step {step} of attempt {attempt}; the trace is {self.trace(suffix)[-3:]}",
        )


def assert_continued(trace, attempts=(0, 1)):
    """Every step was made once, over these attempts."""
    assert [step for _, step in trace] == list(range(1, len(trace) + 1))
    assert {attempt for attempt, _ in trace} == set(attempts)


TINY = [
    "model=1m", "model.n_layers=1", "model.d_model=32", "model.n_heads=1", "model.n_kv_heads=1", "model.head_dim=32",
    "model.d_ff=64", "data=text", "data.tokenizer.kind=bytes", "data.max_val_tokens=256", "data.num_workers=0",
    "trainer.context_length=64", "trainer.global_batch_tokens=512", "trainer.precision=32-true",
    "trainer.log_every_steps=1", "sample.max_new_tokens=0", "data.val_fraction=0.2",
]  # fmt: skip


def losses(run_dir):
    records = [r for r in read_metrics(run_dir) if "train/loss" in r]
    return [r["step"] for r in records], [r["train/loss"] for r in records]


class Training:
    """A job that `powertrain train` has submitted."""

    def __init__(self, directory, *overrides):
        corpus = directory / "corpus"
        corpus.mkdir()
        for index in range(60):
            (corpus / f"{index:02d}.txt").write_text(f"document {index}: " + "so it went on, and on. " * (20 + index))
        self.run_dir = directory / "runs" / "run"
        self.common = [
            *TINY, f"data.files={corpus}/*.txt", f"paths.runs={self.run_dir.parent}",
            f"paths.cache={directory / 'cache'}", *(o for o in overrides if not o.startswith(("cluster.", "logger."))),
        ]  # fmt: skip
        job = ["cluster=slurm", "cluster.env.MASTER_ADDR=127.0.0.1", "cluster.env.OMP_NUM_THREADS=1", "run_id=run"]
        assert main(["train", *self.common, *job, *(o for o in overrides if o not in self.common)]) == 0
        self.job_id = submitted_job_id(self.run_dir)

    @property
    def log(self):
        path = self.run_dir / "slurm" / f"{self.job_id}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_step(self, step):
        wait_until(
            lambda: losses(self.run_dir)[0][-1:] >= [step],
            lambda: f"step {step} is logged; the job said: {self.log[-4000:]}",
        )

    def wait_for_another_attempt(self, signal_name):
        """Wait until the signal has ended an attempt, and return the step that it saved."""
        said = re.compile(
            rf"Interrupted by {signal_name}\. Everything is saved at step (\d+)\..*is queued again", re.DOTALL
        )
        return int(wait_until(lambda: said.search(self.log), lambda: f"it is queued again: {self.log[-4000:]}")[1])


@pytest.fixture(scope="module")
def deaf(slurm, tmp_path_factory):
    """A job that meets its time limit, submitted before the other tests, because Slurm's shortest is a minute."""
    # On a node that no test takes down.
    limit = {"time": "0:01:00", "signal_seconds": 50, "sbatch": {"nodelist": "node1"}}
    return FakeRun(tmp_path_factory.mktemp("deaf"), *ENDLESS, "--deaf", **limit)


@pytest.fixture(autouse=True)
def _limit_runs_meanwhile(deaf):
    pass


def test_training_on_two_machines_survives_a_signal_in_mid_step_and_a_lost_machine(
    slurm, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    steps = 600
    run = Training(
        tmp_path, f"trainer.max_steps={steps}", "trainer.val_every_steps=200", "trainer.checkpoint_every_steps=50",
        "cluster.nodes=2", "cluster.tasks_per_node=2", "cluster.sbatch.exclude=node3", "logger.wandb=true",
    )  # fmt: skip
    run_dir, job_id = run.run_dir, run.job_id
    assert f"submitted job {job_id}: run run on 2 x 2 processes" in capsys.readouterr().out

    run.wait_for_step(5)
    slurm.command("scancel", "--signal=USR1", job_id)
    saved = run.wait_for_another_attempt("SIGUSR1")
    slurm.command("scontrol", "hold", job_id)
    first = losses(run_dir)[0][-1]
    assert saved == first
    assert read_status(run_dir).state == "interrupted"
    wait_for_state(slurm, job_id, "PENDING")
    assert main(["runs", str(run_dir.parent)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["run", "pending"]
    slurm.command("scontrol", "release", job_id)

    run.wait_for_step(first + 5)
    _, second_node = slurm.command("scontrol", "show", "hostnames", show(slurm, job_id)["NodeList"]).split()
    slurm.command("scontrol", "update", f"nodename={second_node}", "state=down", "reason=test")
    try:
        # On other machines: Slurm lets the processes on the one that it takes for lost run on, and ends them when it is
        # back, together with whatever has the number of their job.
        assert wait_for_state(slurm, job_id, "COMPLETED")["Restarts"] == "2"
    finally:
        slurm.command("scontrol", "update", f"nodename={second_node}", "state=resume")

    # One record for each step, whatever the attempts, and the very losses of four processes that nothing interrupted.
    made, values = losses(run_dir)
    assert made == list(range(1, steps + 1))
    assert read_status(run_dir).state == "finished"
    assert (read_status(run_dir).step, read_status(run_dir).job_id) == (steps, job_id)
    assert launch_forked("powertrain.cli", ["train", *run.common, "run_id=unbroken", "trainer.devices=4"], 4) == 0
    assert losses(tmp_path / "runs" / "unbroken")[1] == values
    # All attempts have written to one W&B run.
    assert {p.name.rpartition("-")[2] for p in (run_dir / "wandb").glob("offline-run-*")} == {"run"}


def assert_trained_on(slurm, run, saved):
    """It goes on from the step that it saved, and no step is missing or made twice."""
    run.wait_for_step(saved + 5)
    slurm.command("scancel", run.job_id)
    wait_for_state(slurm, run.job_id, "CANCELLED")
    made, _ = losses(run.run_dir)
    assert made == list(range(1, len(made) + 1))


def test_before_its_time_limit_a_run_saves_and_continues(slurm, tmp_path):
    # Slurm sends the signal up to half a minute early; training has begun by then.
    run = Training(tmp_path, *ENDLESS_TRAINING, "cluster.time=0:02:00", "cluster.signal_seconds=50")
    assert_trained_on(slurm, run, run.wait_for_another_attempt("SIGUSR1"))


def wait_for_process(word):
    """Wait until a Python process has `word` among its arguments, and return its id."""

    def started():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                program, *arguments = path.read_text().split("\0")
            except OSError:
                continue  # it has ended meanwhile
            if "python" in Path(program).name and word in arguments:
                return path.parent.name

    return wait_until(started, f"a process runs with {word}")


# In the middle of imports, and (0) perhaps before Python takes any signal: the batch script asks in place of the run.
@pytest.mark.parametrize("seconds", [0, 1.5])
def test_a_signal_while_a_run_starts_has_it_queued_again(slurm, tmp_path, seconds):
    run = Training(tmp_path, *ENDLESS_TRAINING)
    process = wait_for_process(str(run.run_dir / "slurm" / "config.yaml"))
    time.sleep(seconds)
    slurm.command("scancel", "--signal=USR1", run.job_id)
    wait_until(lambda: not Path("/proc", process).exists(), "the process ends")
    run.wait_for_step(5)
    assert show(slurm, run.job_id)["Restarts"] == "1"
    slurm.command("scancel", run.job_id)
    wait_for_state(slurm, run.job_id, "CANCELLED")


def test_processes_that_end_well_leave_the_others_their_time(slurm, tmp_path):
    command = ("bash", "-c", 'if [ "$SLURM_PROCID" = 0 ]; then sleep 8; fi')
    job = BatchJob(name="wait", command=command, work_dir=tmp_path, log_dir=tmp_path / "logs")
    job_id = submit_job(ClusterConfig(kind="slurm", nodes=2), job, tmp_path / "job.sh")
    assert wait_for_state(slurm, job_id, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"


def test_the_first_rank_that_fails_ends_all_with_its_error(slurm, tmp_path):
    run = FakeRun(tmp_path, *ENDLESS, "--fail-rank", "3", nodes=2, tasks_per_node=2)
    assert wait_for_state(slurm, run.job_id, "FAILED")["Restarts"] == "0"
    assert "3: RuntimeError: the fault of rank 3" in run.log
    errors = [line for line in run.log.splitlines() if "Error" in line or "error" in line]
    assert errors[0].startswith("3: "), run.log


def test_tasks_of_an_array_are_queued_again_each_for_itself(slurm, tmp_path):
    enough = tmp_path / "enough"
    run = FakeRun(tmp_path, "--until", str(enough), array="0-2")
    for index in range(3):
        run.wait_for_step(5, f"-{index}")
    # The last one carries the array's own id.
    slurm.command("scancel", "--signal=USR1", f"{run.job_id}_0", f"{run.job_id}_2")
    for index in (0, 2):
        run.wait_for_step(1, f"-{index}", attempt=1)
    enough.touch()
    for index in range(3):
        attempts = (0,) if index == 1 else (0, 1)
        state = wait_for_state(slurm, f"{run.job_id}_{index}", "COMPLETED")
        assert state["Restarts"] == str(attempts[-1])
        assert_continued(run.trace(f"-{index}"), attempts)
    assert sorted(p.name for p in run.log_dir.iterdir()) == [f"{run.job_id}_{index}.log" for index in range(3)]


def test_a_preempted_run_saves_and_continues(slurm, tmp_path):
    run = Training(tmp_path, *ENDLESS_TRAINING, "cluster.sbatch.nodelist=node3")
    run.wait_for_step(5)
    slurm.command(
        "sbatch", "--partition=urgent", "--nodelist=node3", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    assert_trained_on(slurm, run, run.wait_for_another_attempt("SIGTERM"))
    assert show(slurm, run.job_id)["Restarts"] == "1"


def test_a_run_that_slurm_does_not_answer_is_queued_again_by_its_script(slurm, tmp_path):
    real, down = shutil.which("scontrol"), tmp_path / "down"
    (tmp_path / "bin").mkdir()
    busy = tmp_path / "bin" / "scontrol"
    busy.write_text(f'#!/bin/sh\n[ -e {down} ] || exec {real} "$@"\necho "Socket timed out" >&2\nexit 1\n')
    busy.chmod(0o755)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("cluster: {signal_seconds: 10}\n")
    enough = tmp_path / "enough"
    run = FakeRun(tmp_path, "--until", str(enough), env={"PATH": f"{busy.parent}:{os.environ['PATH']}"})
    run.wait_for_step(5)
    down.touch()
    slurm.command("scancel", "--signal=USR1", run.job_id)
    wait_until(lambda: (run.run_dir / "slurm" / UNANSWERED_FILE).exists(), "rank 0 gives up")
    down.unlink()
    run.wait_for_step(1, attempt=1)
    enough.touch()
    assert wait_for_state(slurm, run.job_id, "COMPLETED")["Restarts"] == "1"
    assert_continued(run.trace())
    assert "since Slurm gave no answer for 8 s" in run.log


def test_a_cancelled_run_saves_and_stays_cancelled(slurm, tmp_path):
    run = FakeRun(tmp_path, *ENDLESS)
    run.wait_for_step(5)
    slurm.command("scancel", run.job_id)
    assert wait_for_state(slurm, run.job_id, "CANCELLED")["Restarts"] == "0"
    wait_until(lambda: "no other attempt is asked for" in run.log, "the worker says so")
    assert os.readlink(run.run_dir / "checkpoints" / "last") == f"step-{run.trace()[-1][1]:08d}"


def test_jobs_wait_for_jobs(slurm, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    enough = tmp_path / "enough"
    first = FakeRun(tmp_path / "a", "--until", str(enough))
    second = FakeRun(tmp_path / "b", "--steps", "1", dependency=f"afterok:{first.job_id}")
    first.wait_for_step(1)
    assert show(slurm, second.job_id)["Reason"] == "Dependency"
    enough.touch()
    wait_for_state(slurm, second.job_id, "COMPLETED")
    assert show(slurm, first.job_id)["JobState"] == "COMPLETED"
    assert (second.run_dir / "trace").stat().st_mtime > (first.run_dir / "trace").stat().st_mtime


def test_variables_of_sbatch_change_nothing_that_the_script_sets(slurm, tmp_path, monkeypatch):
    hostile = {"NO_REQUEUE": "1", "ARRAY_INX": "0-3", "OUTPUT": "elsewhere", "TIMELIMIT": "1", "JOB_NAME": "bash"}
    for name, value in hostile.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    run = FakeRun(tmp_path, "--steps", "1", time="1:00:00")
    state = wait_for_state(slurm, run.job_id, "COMPLETED")
    assert (state["Requeue"], state["TimeLimit"], state["JobName"]) == ("1", "01:00:00", f"pt-{tmp_path.name}")
    assert "ArrayJobId" not in state
    assert "attempt 0 from step 0" in run.log


def test_no_text_is_taken_as_shell_or_as_options(slurm, tmp_path):
    hostile = tmp_path / "a \"b\" 'c' $(touch canary) `touch canary` %j # --array=0-9"
    hostile.mkdir()
    comment = "x\" --array=0-9 # $(touch canary) 'y"
    run = FakeRun(
        hostile, "--steps", "1", env={"HOSTILE": "$(touch canary)"}, sbatch={"comment": comment, "nodelist": "node4"}
    )
    state = wait_for_state(slurm, run.job_id, "COMPLETED")
    assert "ArrayJobId" not in state
    assert [p.name for p in run.log_dir.iterdir()] == [f"{run.job_id}.log"]
    assert "attempt 0 from step 0" in run.log
    assert f"Comment={comment}" in slurm.command("scontrol", "--oneliner", "show", "job", run.job_id)
    assert not list(tmp_path.glob("**/canary"))


def test_at_its_time_limit_the_script_asks_for_a_run_that_could_not(slurm, deaf):
    deaf.wait_for_step(1, attempt=1)
    slurm.command("scancel", deaf.job_id)
    assert "DUE TO TIME LIMIT" in deaf.log
