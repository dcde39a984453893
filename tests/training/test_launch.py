"""Several processes end together: with one cause, on a signal, and when one hangs."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from powertrain.processes import global_rank, is_rank_zero, launcher, local_rank
from powertrain.run_status import read_status
from powertrain.training import launch as launching
from powertrain.training.distribution import _common_store
from powertrain.training.launch import launch
from powertrain.training.records import read_metrics
from powertrain.training.watchdog import EXIT_CODE
from tests.forked import Forked
from tests.training import faulty_train

# Long, and so begun first.
pytestmark = pytest.mark.first

OPTIONS = (
    *("data=text", "data.tokenizer.kind=bytes", "data.num_workers=0", "data.val_fraction=0.2"),
    *("data.max_val_tokens=512", "model=1m", "model.n_layers=2", "model.d_model=32", "model.n_heads=2"),
    *("model.n_kv_heads=2", "model.head_dim=16", "trainer=cpu", "trainer.devices=2", "trainer.context_length=64"),
    *("trainer.global_batch_tokens=256", "trainer.micro_batch_size=1", "trainer.precision=32-true"),
    *("trainer.max_steps=8", "trainer.val_every_steps=4", "trainer.checkpoint_every_steps=2"),
    *("trainer.log_every_steps=1", "sample.max_new_tokens=0"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        text = "".join(f"def f{number}_{i}(x):\n    return x + {i}\n\n" for i in range(20))
        (directory / f"{number}.py").write_text(text)
    return directory


def train(corpus: Path, runs: Path, run_id: str, fault: str, *options: str) -> Forked:
    """Start `powertrain train` on two processes with a fault; see faulty_train.py."""
    arguments = [fault, *OPTIONS, f"data.files={corpus}/*.py", f"paths.cache={corpus / 'cache'}", f"paths.runs={runs}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return Forked(
        faulty_train.launched, [*arguments, f"run_id={run_id}", *options], environment, runs / f"{run_id}.err"
    )


def complaints(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("powertrain")]


def ends(corpus: Path, runs: Path, **started: tuple[str, ...]) -> dict[str, tuple[int, str]]:
    """Start runs at the same time, with their faults and options; return each one's exit code and stderr."""
    processes = {name: train(corpus, runs, name, *arguments) for name, arguments in started.items()}
    if "signal" in processes:
        records = runs / "signal" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (records.exists() and read_metrics(runs / "signal")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        processes["signal"].send_signal(signal.SIGTERM)
    ended = {}
    for name, process in processes.items():
        ended[name] = (process.wait(400), (runs / f"{name}.err").read_text())
    return ended


def number_of_threads() -> int:
    return torch.get_num_threads()


def test_a_forked_process_has_the_threads_that_its_environment_says():
    processes = [Forked(number_of_threads, [], {**os.environ, "OMP_NUM_THREADS": number}) for number in ("3", "1")]
    assert [process.wait(60) for process in processes] == [3, 1]


def test_a_process_that_a_failed_test_has_left_does_not_keep_the_tests_from_ending():
    script = "kept = Forked(signal.pause, [], {}, server=False); raise KeyError"
    test = f"import signal; from tests.forked import Forked; {script}"
    ended = subprocess.run([sys.executable, "-c", test], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "KeyError"


# Several runs in one test, side by side: they wait more than they compute.


@pytest.mark.slow
def test_a_fault_of_one_rank_ends_all_and_is_said_first(corpus, tmp_path):
    ended = ends(
        corpus,
        tmp_path,
        error=("error:1:5",),
        kill=("kill:1:5",),
        hang=("hang:1:5", "trainer.hang_timeout=20", "trainer.strategy=fsdp"),
        hang_at_start=("hang:1:0", "trainer.hang_timeout=20"),
    )

    code, stderr = ended["error"]
    assert code == 1
    assert complaints(stderr) == ["powertrain train: rank 1: KeyError: 'the fault of this rank'"]
    assert 'raise KeyError("the fault of this rank")' in stderr

    # A killed rank says nothing; the launcher does.
    code, stderr = ended["kill"]
    assert code == 128 + signal.SIGKILL
    first, *_ = complaints(stderr)
    assert first.startswith("powertrain: rank 1 (process ")
    assert first.endswith("was ended by SIGKILL (out of memory?); the other processes are stopped")

    # A hang shows the stacks of all ranks.
    for name, waits in (("hang", "_agree"), ("hang_at_start", "in fit")):
        code, stderr = ended[name]
        assert code == 70
        for rank, place in ((0, waits), (1, "in happen")):
            stacks = (tmp_path / name / "hang" / f"rank-{rank}.txt").read_text()
            assert place in stacks
            assert stacks in stderr
            assert f"rank {rank}: nothing was finished for " in stderr
        assert len(complaints(stderr)) == 2
        status = read_status(tmp_path / name)
        assert status.state == "failed"
        assert status.message.startswith("hang: rank 0: nothing was finished for ")


@pytest.mark.slow
def test_what_all_ranks_agree_on_ends_all_with_one_message_and_costs_no_checkpoint(corpus, tmp_path):
    ended = ends(
        corpus,
        tmp_path,
        nan=("nan:1:5", "trainer.strategy=fsdp"),
        disk=("disk:1:3", "trainer.strategy=fsdp"),
        signal=("hang:1:100000", "trainer.max_steps=100000", "trainer.strategy=fsdp"),
    )

    code, stderr = ended["nan"]
    record = tmp_path / "nan" / "nonfinite" / "step-00000006"
    assert code == 1
    (message,) = complaints(stderr)
    assert message.startswith("powertrain train: step 6: the loss is not finite on rank 1: the weights of embedding")
    assert message.endswith(f"replay it from {record / 'rank-1.pt'}")
    assert {path.name for path in record.iterdir()} == {"rank-0.pt", "rank-1.pt", "weights.pt"}
    # The save of step 4 was in flight or done: an error later on does not cost it.
    assert (tmp_path / "nan" / "checkpoints" / "last").resolve().name == "step-00000004"

    code, stderr = ended["disk"]
    assert code == 1
    (message,) = complaints(stderr)
    assert message.startswith("powertrain train: the checkpoint of step 4 could not be written to ")
    assert message.endswith("the checkpoint of step 2 is intact")
    assert (tmp_path / "disk" / "checkpoints" / "last").resolve().name == "step-00000002"
    assert not list((tmp_path / "disk" / "checkpoints").glob(".*"))

    # A signal to the launcher saves the run on all ranks.
    code, stderr = ended["signal"]
    assert code == 128 + signal.SIGTERM
    assert complaints(stderr) == []
    last = (tmp_path / "signal" / "checkpoints" / "last").resolve()
    assert int(last.name.removeprefix("step-")) == read_metrics(tmp_path / "signal")[-1]["step"]


def test_a_rank_that_does_not_end_by_itself_is_killed(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(launching, "GRACE", 0.5)
    code = (
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    assert launch([sys.executable, "-c", code], 2) == 3
    assert time.monotonic() - started < 30
    assert capfd.readouterr().err == ""


def test_each_process_is_told_who_it_is_and_gets_the_launchers_signals(tmp_path, monkeypatch):
    code = (
        "import os, signal, sys, time\n"
        f"open(f'{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(os.environ[k] for k in"
        " ('LOCAL_RANK', 'NODE_RANK', 'WORLD_SIZE', 'MASTER_ADDR')))\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))\n"
        f"open(f'{tmp_path}/ready-' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(60)\n"
    )

    def signal_when_ready():
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    threading.Thread(target=signal_when_ready, daemon=True).start()
    assert launch([sys.executable, "-c", code], 2, num_nodes=2) == 0
    assert (tmp_path / "2").read_text() == "0 1 4 10.0.0.1"
    assert (tmp_path / "3").read_text() == "1 1 4 10.0.0.1"


def test_processes_of_one_machine_meet_there_whatever_the_environment_says(tmp_path, monkeypatch):
    code = f"import os; open('{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['MASTER_ADDR'])"
    for name, value in {"NODE_RANK": "3", "MASTER_ADDR": "no-such-host", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch([sys.executable, "-c", code], 2) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["127.0.0.1"] * 2


def test_a_signal_while_processes_are_started_reaches_those_there_are_and_starts_no_more(monkeypatch):
    start, started = subprocess.Popen, []

    def start_and_signal(*arguments, **keywords):
        started.append(start(*arguments, **keywords))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(launching.subprocess, "Popen", start_and_signal)
    began = time.monotonic()
    assert launch(["sleep", "60"], 2) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30
    assert len(started) == 1


def test_several_machines_need_to_know_where_to_meet(monkeypatch):
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"trainer\.num_nodes=2 needs a launcher .* set NODE_RANK, MASTER_ADDR"):
        launch(["true"], 2, num_nodes=2)


def test_a_port_that_is_taken_is_one_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(OSError, match=rf"another program has port {port} of 127\.0\.0\.1.*set MASTER_PORT"):
            _common_store(0, 2, "127.0.0.1", port, timedelta(seconds=5))


def test_a_watch_that_cannot_write_its_file_still_ends_what_hangs(tmp_path):
    (tmp_path / "hang").touch()
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from powertrain.training.ranks import ALONE\n"
        "from powertrain.training.watchdog import HangWatch\n"
        "watch = HangWatch(0.2, Path(sys.argv[1]))\n"
        "watch.start(ALONE)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_CODE
    assert "nothing was finished for" in done.stderr
    assert 'File "<string>", line 7' in done.stderr


def test_who_started_this_process(monkeypatch):
    names = ("LOCAL_RANK", "RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    for name in names:
        monkeypatch.delenv(name, raising=False)

    def seen():
        return launcher(), global_rank(), local_rank(), is_rank_zero()

    assert seen() == (None, 0, 0, True)
    # What one of several has left in the environment of another.
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
        assert seen() == (None, 0, 0, True)
    monkeypatch.setenv("RANK", "3")
    assert seen() == ("powertrain", 3, 1, False)
    monkeypatch.setenv("RANK", "0")
    assert seen() == ("powertrain", 0, 1, True)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert seen() == ("srun", 1, 1, False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert seen() == ("torchrun", 0, 1, True)
