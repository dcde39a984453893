import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from powertrain.cluster.config import ClusterConfig
from powertrain.cluster.script import BatchJob, batch_script, directive

HOSTILE = (
    "$(touch canary)",
    "`touch canary`",
    "'; touch canary; '",
    '"; touch canary; "',
    "$HOME ${PATH} $$ !! ~ * ? [a] {b,c} \\ # & | > canary",
    "a b\tc  d",
)


def job(**values):
    return BatchJob(**{"name": "r", "command": ("true",), "work_dir": Path("/w"), "log_dir": Path("/l"), **values})


def run_script(script, tmp_path, **variables):
    environment = {**os.environ, "SLURM_JOB_NODELIST": "n1", **variables}
    return subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, env=environment, capture_output=True)


def test_commands_and_variables_reach_the_job_as_they_are(tmp_path, stub):
    calls = stub("srun")
    stub("scontrol", "n1\nn2\n")
    env = {f"V{index}": text for index, text in enumerate(HOSTILE)} | {"LINES_": "a\nb"}
    cluster = ClusterConfig(kind="slurm", env=env)
    script = batch_script(cluster, job(command=("program", *HOSTILE), once=(("first", *HOSTILE),)))
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr
    first, ranks = map(json.loads, calls.read_text().splitlines())
    assert first["argv"] == ["--nodes=1", "--ntasks=1", "first", *HOSTILE]
    assert ranks["argv"] == ["--kill-on-bad-exit=1", "--wait=0", "--label", "program", *HOSTILE]
    assert {key: ranks["env"][key] for key in env} == env
    assert ranks["env"]["MASTER_ADDR"] == "n1"
    assert not list(tmp_path.glob("**/canary"))


def test_threads_and_address_follow_the_job_and_yield_to_the_configuration(tmp_path, stub):
    calls = stub("srun")
    stub("scontrol", "n1\n")
    given = ClusterConfig(kind="slurm", env={"MASTER_ADDR": "10.0.0.1", "OMP_NUM_THREADS": "3"}, setup=("export X=1",))
    assert run_script(batch_script(given, job(code=Path("/co de"))), tmp_path, PYTHONPATH="/old").returncode == 0
    plain = ClusterConfig(kind="slurm")
    variables = {"SLURM_CPUS_PER_TASK": "7", "OMP_NUM_THREADS": ""}
    assert run_script(batch_script(plain, job()), tmp_path, **variables).returncode == 0
    # Where nobody says how many, whatever Slurm gives: an explicit 1 would be all that a process gets.
    shared = ClusterConfig(kind="slurm", tasks_per_node=2, cpus_per_task=None)
    variables = {"SLURM_CPUS_ON_NODE": "8", "OMP_NUM_THREADS": ""}
    assert run_script(batch_script(shared, job()), tmp_path, **variables).returncode == 0
    assert run_script(batch_script(shared, job()), tmp_path, OMP_NUM_THREADS="").returncode == 0
    one, two, three, four = (json.loads(line)["env"] for line in calls.read_text().splitlines())
    assert (one["MASTER_ADDR"], one["OMP_NUM_THREADS"], one["X"]) == ("10.0.0.1", "3", "1")
    assert one["PYTHONPATH"] == "/co de:/old"
    assert (two["SRUN_CPUS_PER_TASK"], two["OMP_NUM_THREADS"]) == ("7", "7")
    assert (three.get("SRUN_CPUS_PER_TASK"), three["OMP_NUM_THREADS"]) == (None, "4")
    assert (four.get("SRUN_CPUS_PER_TASK"), four["OMP_NUM_THREADS"]) == (None, "1")


@pytest.mark.parametrize("code", [0, 1, 143])
def test_the_job_ends_with_the_code_of_its_processes(tmp_path, stub, code):
    stub("srun", code=code)
    stub("scontrol", "n1\n")
    assert run_script(batch_script(ClusterConfig(), job(last_resort=("true",))), tmp_path).returncode == code


@pytest.mark.parametrize(("leaves", "asked"), [("touch", ["asked"]), ("ls", [])])
def test_the_script_asks_again_where_slurm_did_not_answer_the_run(tmp_path, stub, leaves, asked):
    stub("scontrol", "n1\n")
    srun = tmp_path / "stubs" / "srun"
    srun.write_text(f'#!/bin/sh\n{leaves} "{tmp_path}/no answer"\nexit 1\n')
    srun.chmod(0o755)
    # What an earlier attempt left is not this one's.
    (tmp_path / "no answer").touch()
    last_resort = ("sh", "-c", "echo asked; false")
    script = batch_script(ClusterConfig(), job(last_resort=last_resort, unanswered=tmp_path / "no answer"))
    done = run_script(script, tmp_path)
    assert (done.returncode, done.stdout.split()) == (1, asked)


def test_a_last_resort_that_fails_leaves_the_processes_their_time_to_save(tmp_path, stub):
    stub("scontrol", "n1\n")
    (tmp_path / "stubs" / "srun").write_text("#!/bin/sh\nkill -TERM $PPID\nsleep 1\necho saved\nexit 3\n")
    (tmp_path / "stubs" / "srun").chmod(0o755)
    done = run_script(batch_script(ClusterConfig(), job(last_resort=("sh", "-c", "echo asked; false"))), tmp_path)
    assert (done.returncode, done.stdout.split()) == (3, ["asked", "saved"])


def test_processes_that_end_while_the_last_resort_asks_end_the_job_with_their_code(tmp_path, stub):
    stub("scontrol", "n1\n")
    (tmp_path / "stubs" / "srun").write_text("#!/bin/sh\nkill -TERM $PPID\nsleep 0.2\nexit 3\n")
    (tmp_path / "stubs" / "srun").chmod(0o755)
    done = run_script(batch_script(ClusterConfig(), job(last_resort=("sleep", "0.8"))), tmp_path)
    assert done.returncode == 3


def test_the_script_asks_where_a_signal_came_before_the_processes_took_any(tmp_path, stub):
    stub("scontrol", "n1\n")
    stub("srun", code=128 + signal.SIGUSR1)
    unanswered = tmp_path / "no answer"
    script = batch_script(ClusterConfig(), job(last_resort=("cat", str(unanswered)), unanswered=unanswered))
    done = run_script(script, tmp_path)
    assert (done.returncode, int(done.stdout)) == (128 + signal.SIGUSR1, signal.SIGUSR1)


def test_a_failing_line_of_the_setup_ends_the_job_before_it_trains(tmp_path, stub):
    calls = stub("srun")
    assert run_script(batch_script(ClusterConfig(kind="slurm", setup=("false",)), job()), tmp_path).returncode == 1
    assert not calls.exists()


def test_a_command_done_once_may_fail(tmp_path, stub):
    stub("srun", code=3)
    stub("scontrol", "n1\n")
    done = run_script(batch_script(ClusterConfig(), job(once=(("first",),))), tmp_path)
    assert (done.returncode, "not done; going on without it" in done.stdout) == (3, True)


def test_every_resource_becomes_a_directive():
    cluster = ClusterConfig(
        kind="slurm",
        nodes=2,
        gpus_per_node=8,
        cpus_per_task=12,
        mem="0",
        time="1-12:00:00",
        partition="gpu",
        account="lab",
        qos="high",
        signal_seconds=120,
        sbatch={"constraint": "a100|h100", "exclusive": True, "contiguous": False, "nice": 5, "exclude": None},
    )
    lines = batch_script(cluster, job(array="0-3%2", dependency="afterok:7", log_dir=Path("/100%"))).splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert directives == [
        "#SBATCH --job-name=pt-r",
        "#SBATCH --chdir=/w",
        "#SBATCH --output=/100%%/%A_%a.log",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --mem=0",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --qos=high",
        "#SBATCH --array=0-3%2",
        "#SBATCH --dependency=afterok:7",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --constraint=a100|h100",
        "#SBATCH --exclusive",
        "#SBATCH --nice=5",
    ]
    # sbatch stops reading directives at the first command.
    assert lines[1 : 1 + len(directives)] == directives


def test_directives_are_quoted_for_slurm():
    assert directive("comment", 'a "b" \\c') == '#SBATCH --comment="a \\"b\\" \\\\c"'
