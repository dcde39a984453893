import errno
import fcntl
import json
import os
import time

import pytest
import yaml

from powertrain.cli import main
from powertrain.cluster import submit
from powertrain.config import compose, from_values, to_values
from powertrain.data.prepare import prepare
from powertrain.native import KernelBuildError, KernelsUnavailable
from powertrain.run_status import RunStatus, read_status, write_status


@pytest.fixture
def slurm_stubs(stub):
    """Commands of a Slurm that accepts job 41 and whose queue is empty; returns the calls of sbatch."""
    stub("scontrol", "Slurmctld(primary) at host is UP\n")
    stub("squeue")
    return stub("sbatch", "41;main\n")


@pytest.fixture
def overrides(tmp_path):
    return [
        "cluster=slurm",
        "cluster.nodes=2",
        "cluster.tasks_per_node=3",
        "trainer.global_batch_tokens=6144",
        "run_id=r",
        f"paths.runs={tmp_path / 'runs'}",
    ]


def test_a_submission_leaves_all_that_the_job_needs_and_says_how_to_follow_it(
    overrides, slurm_stubs, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *overrides, "paths.runs=runs"]) == 0
    home = tmp_path / "runs" / "r" / "slurm"
    assert capsys.readouterr().out.splitlines() == [
        "submitted job 41: run r on 2 x 3 processes",
        f"  log       tail -F {home}/41.log",
        "  queue     squeue --job 41",
        f"  progress  powertrain runs {tmp_path / 'runs'}",
        "  end it    scancel 41     (the same command again continues the run)",
    ]
    assert json.loads(slurm_stubs.read_text())["argv"] == ["--parsable", str(home / "job.sh")]
    assert submit.submitted_job_id(tmp_path / "runs" / "r") == "41"
    config = from_values(yaml.safe_load((home / "config.yaml").read_text()))
    assert (config.trainer.num_nodes, config.trainer.devices, config.trainer.accelerator) == (2, 3, "cpu")
    assert (config.run_id, config.paths.runs) == ("r", str(tmp_path / "runs"))
    (code,) = (home / "code").iterdir()
    script = (home / "job.sh").read_text()
    assert f"#SBATCH --chdir={tmp_path}\n" in script
    assert f'export PYTHONPATH={code}"' in script
    assert f"-P -m powertrain train --config {home}/config.yaml &\n" in script
    assert f"-P -m powertrain.cluster.requeue {tmp_path / 'runs' / 'r'} || true' TERM\n" in script
    assert (code / "powertrain" / "train.py").exists()


def test_a_dry_run_prints_the_very_script_and_touches_nothing(overrides, slurm_stubs, tmp_path, capsys):
    assert main(["train", *overrides, "cluster.dry_run=true"]) == 0
    printed = capsys.readouterr()
    assert not (tmp_path / "runs").exists()
    assert not slurm_stubs.exists()
    assert "nothing was submitted or written" in printed.err
    assert [line.split()[0] for line in printed.err.splitlines()[:2]] == ["model", "plan"]
    assert main(["train", *overrides]) == 0
    assert printed.out == (tmp_path / "runs" / "r" / "slurm" / "job.sh").read_text()


@pytest.mark.parametrize("flags", [[], ["cluster.dry_run=true"]])
def test_what_the_data_here_contradict_is_not_submitted(overrides, slurm_stubs, tmp_path, capsys, flags):
    (tmp_path / "book.txt").write_text("A sentence that comes again. " * 4000)
    small = [*overrides, "model=1m", "data=text", f"data.files={tmp_path / 'book.txt'}", "data.split=tail"]
    small += ["data.tokenizer.kind=bytes", f"paths.cache={tmp_path / 'cache'}"]
    config = compose(small)
    prepare(config.data, config.paths.cache)
    assert main(["train", *small, *flags]) == 2
    assert "no budget is given" in capsys.readouterr().err
    assert not slurm_stubs.exists()
    assert not (tmp_path / "runs").exists()
    assert main(["train", *small, *flags, "trainer.max_tokens=1e5"]) == 0


def test_a_job_sees_nothing_of_the_job_or_launcher_around_its_submission(overrides, slurm_stubs, monkeypatch):
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "lab", "MY_KEY": "x"}
    foreign = {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "9", "RANK": "2", "MASTER_ADDR": "h", "CUDA_VISIBLE_DEVICES": "1"}
    for key, value in {**kept, **foreign}.items():
        monkeypatch.setenv(key, value)
    assert main(["train", *overrides]) == 0
    environment = json.loads(slurm_stubs.read_text())["env"]
    assert {key: environment[key] for key in kept} == kept
    assert not foreign.keys() & environment.keys()


def test_variables_of_sbatch_do_not_outrank_the_script(overrides, slurm_stubs, monkeypatch, capsys):
    dropped = [
        "SBATCH_ARRAY_INX", "SBATCH_CONSTRAINT", "SBATCH_EXPORT", "SBATCH_NO_REQUEUE", "SBATCH_OUTPUT",
        "SBATCH_SIGNAL", "SBATCH_TIMELIMIT",
    ]  # fmt: skip
    # Null in the configuration leaves these to the cluster, and nothing sets the last.
    kept = ["SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_MEM_PER_CPU", "SBATCH_RESERVATION"]
    for name in dropped + kept:
        monkeypatch.setenv(name, "1")
    assert main(["train", *overrides, "cluster.time=1:00:00", "cluster.sbatch.constraint=h100"]) == 0
    environment = json.loads(slurm_stubs.read_text())["env"]
    assert sorted(name for name in environment if name.startswith("SBATCH_")) == sorted(kept)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "SBATCH_" in line]
    assert all(name in line for name in dropped)
    assert not any(name in line for name in kept)


def test_a_run_that_is_queued_is_not_submitted_twice(overrides, slurm_stubs, stub, capsys):
    assert main(["train", *overrides]) == 0
    stub("squeue", "41|PENDING|N/A\n")
    assert main(["train", *overrides]) == 2
    assert "job 41 of the run r is PENDING already: `scancel 41` ends it" in capsys.readouterr().err
    stub("squeue")
    assert main(["train", *overrides]) == 0


def test_of_two_submissions_at_once_the_second_is_refused_and_changes_nothing(
    overrides, slurm_stubs, tmp_path, capsys, monkeypatch
):
    codes, copy_code = [], submit.copy_code

    def meanwhile(directory):
        codes.append(main(["train", *overrides, "cluster.time=2:00:00"]))
        return copy_code(directory)

    monkeypatch.setattr(submit, "copy_code", meanwhile)
    assert main(["train", *overrides, "cluster.time=1:00:00"]) == 0
    assert codes == [2]
    assert "another process is submitting the run r: wait for that one" in capsys.readouterr().err
    home = tmp_path / "runs" / "r" / "slurm"
    assert yaml.safe_load((home / "config.yaml").read_text())["cluster"]["time"] == "1:00:00"
    assert "#SBATCH --time=1:00:00\n" in (home / "job.sh").read_text()
    assert len(slurm_stubs.read_text().splitlines()) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_takes_submissions(number, overrides, slurm_stubs, monkeypatch):
    def no_locks(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert main(["train", *overrides]) == 0


def test_a_run_that_trains_without_slurm_is_not_submitted(overrides, slurm_stubs, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "r"
    run_dir.mkdir(parents=True)
    write_status(run_dir, RunStatus("running", host="elsewhere", pid=3, updated=time.time()))
    assert main(["train", *overrides]) == 2
    assert "is being trained by process 3 on elsewhere" in capsys.readouterr().err
    assert not slurm_stubs.exists()


def test_the_record_of_a_job_that_died_without_a_word_does_not_stand_in_the_way(overrides, slurm_stubs, tmp_path):
    assert main(["train", *overrides]) == 0
    run_dir = tmp_path / "runs" / "r"
    write_status(run_dir, RunStatus("running", step=5, job_id="41", host="elsewhere", updated=time.time()))
    assert main(["train", *overrides]) == 0
    status = read_status(run_dir)
    assert (status.state, status.step, status.message) == ("failed", 5, "job 41 ended without a word")


def test_the_directory_of_another_run_is_refused_before_anything_is_written(overrides, slurm_stubs, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "r"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_values(compose([*overrides, "seed=1"]))))
    assert main(["train", *overrides]) == 2
    assert "holds another run (seed was 1, now 0)" in capsys.readouterr().err
    assert [p.name for p in run_dir.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("recorded", ["32-true", "bf16-mixed"])
def test_a_precision_is_left_to_the_job_and_to_what_its_run_records(overrides, slurm_stubs, tmp_path, recorded, capsys):
    assert main(["train", *overrides]) == 0
    run_dir = tmp_path / "runs" / "r"
    assert yaml.safe_load((run_dir / "slurm" / "config.yaml").read_text())["trainer"]["precision"] == "auto"
    config = compose([*overrides, f"trainer.precision={recorded}"])
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_values(config)))
    assert main(["train", *overrides]) == 0
    other = "bf16-mixed" if recorded == "32-true" else "32-true"
    capsys.readouterr()
    assert main(["train", *overrides, f"trainer.precision={other}"]) == 2
    assert f"holds another run (trainer.precision was '{recorded}', now '{other}')" in capsys.readouterr().err


def test_what_slurm_refuses_is_one_sentence(overrides, slurm_stubs, stub, capsys):
    stub("sbatch", code=1, error="sbatch: error: Batch job submission failed: Invalid partition name specified")
    assert main(["train", *overrides, "cluster.partition=nope"]) == 2
    assert "Invalid partition name specified" in capsys.readouterr().err


def test_a_directory_that_pythonpath_cannot_name_is_refused(overrides, slurm_stubs, tmp_path, capsys):
    assert main(["train", *overrides, f"paths.runs='{tmp_path}/a:b'"]) == 2
    assert "take no colons" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_so_is_the_directory_of_a_sweep(slurm_stubs, tmp_path, capsys, flags):
    directory = tmp_path / "a\\b"
    assert main(["sweep", "run", "smoke", "--directory", str(directory), "--slurm", "2", *flags]) == 2
    assert "take no colons, backslashes" in capsys.readouterr().err
    assert not slurm_stubs.exists()
    assert not directory.exists()


@pytest.fixture
def on_gpus(overrides):
    return [o for o in overrides if not o.startswith("cluster.tasks")] + ["cluster.gpus_per_node=3"]


def test_kernels_are_built_at_submission_where_there_is_a_compiler(on_gpus, slurm_stubs, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr("powertrain.native.build_missing", lambda: built.append(1))
    assert main(["train", *on_gpus]) == 0
    assert built == [1]
    script = (tmp_path / "runs" / "r" / "slurm" / "job.sh").read_text()
    assert "#SBATCH --gpus-per-node=3\n" in script
    assert "kernels build" not in script


@pytest.mark.parametrize("error", [KernelsUnavailable("no nvcc"), PermissionError(13, "Permission denied", "/cache")])
def test_kernels_are_built_once_in_the_job_where_they_cannot_be_here(
    on_gpus, slurm_stubs, tmp_path, monkeypatch, error
):
    def unavailable():
        raise error

    monkeypatch.setattr("powertrain.native.build_missing", unavailable)
    assert main(["train", *on_gpus]) == 0
    script = (tmp_path / "runs" / "r" / "slurm" / "job.sh").read_text()
    assert script.count("-m powertrain kernels build ||") == 1


def test_kernels_that_do_not_compile_end_the_submission(on_gpus, slurm_stubs, monkeypatch, capsys):
    def broken():
        raise KernelBuildError("error: expected a ;")

    monkeypatch.setattr("powertrain.native.build_missing", broken)
    assert main(["train", *on_gpus]) == 2
    assert "nothing was submitted: error: expected a ;" in capsys.readouterr().err
    assert not slurm_stubs.exists()


def test_slurm_is_asked_before_minutes_of_compilation(on_gpus, slurm_stubs, stub, monkeypatch, capsys):
    stub("scontrol", code=1, error="slurm_load: Unable to contact slurm controller")
    monkeypatch.setattr("powertrain.native.build_missing", lambda: pytest.fail("compiled first"))
    assert main(["train", *on_gpus]) == 2
    assert "Unable to contact slurm controller" in capsys.readouterr().err


def test_a_saved_configuration_is_run_as_it_is(overrides, tmp_path, capsys):
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(to_values(compose(overrides))))
    assert main(["train", "--config", str(saved), "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(saved.read_text())
    assert main(["train", "--config", str(saved), "seed=1"]) == 2
    assert "give no overrides" in capsys.readouterr().err


def test_submitting_needs_no_heavy_imports(overrides, slurm_stubs, tmp_path, monkeypatch):
    import subprocess
    import sys

    # Of data that are prepared it says more, which takes more.
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))
    probe = (
        f"import sys; from powertrain.cli import main; code = main({['train', *overrides]!r})\n"
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'lightning', 'datasets', 'wandb')))"
    )
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
