"""The whole journey, from the command line to the run directory, on a small corpus."""

import errno
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from powertrain.cli import main
from powertrain.config import compose, options, read_config, share_dir, to_values
from powertrain.data.prepare import split_of
from powertrain.inference.cache import DecodeCache
from powertrain.inference.generate import load_run
from powertrain.run_status import RunBusyError, RunStatus, write_status
from powertrain.schema import ConfigError
from powertrain.train import environment, plan, run
from powertrain.training.checkpoint import Checkpoint
from powertrain.training.fit import RunLockedError
from powertrain.training.loggers import read_metrics
from tests.training.fakes import locked_by_another

TINY = [
    "model=1m", "model.n_layers=1", "model.d_model=32", "model.n_heads=1", "model.n_kv_heads=1", "model.head_dim=32",
    "model.d_ff=64", "data=text", "data.tokenizer.kind=bytes", "data.max_val_tokens=256", "data.num_workers=0",
    "trainer.context_length=64", "trainer.global_batch_tokens=256", "trainer.accelerator=cpu",
    "trainer.val_every_steps=4", "trainer.log_every_steps=1", "sample.max_new_tokens=8",
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i:02d}.txt").write_text(
            f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (3 + i)
        )
    return [*TINY, f"data.files={corpus}/*.txt", f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]


def only_run(tmp_path):
    (run_dir,) = (tmp_path / "runs").iterdir()
    return run_dir


def losses(run_dir):
    return {r["step"]: r["train/loss"] for r in read_metrics(run_dir) if "train/loss" in r}


def test_one_command_trains_and_shows_what_came_out(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["train", *tiny, "trainer.max_steps=8", "sample.prompt=the ", "schedule.warmup=0.5"]) == 0
    out = capsys.readouterr().out
    run_dir = only_run(tmp_path)
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "plots", "tokenizer", "sample.txt"} <= {
        p.name for p in run_dir.iterdir()
    }
    assert sorted(losses(run_dir)) == list(range(1, 9))
    assert "validation loss" in out
    assert "bits per byte" in out
    assert str(run_dir / "plots" / "loss.png") in out
    assert (run_dir / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (run_dir / "sample.txt").read_text().startswith("the")
    recorded = json.loads((run_dir / "environment.json").read_text())
    assert recorded["versions"]["torch"] == torch.__version__ == environment()["versions"]["torch"]
    assert recorded["command"].startswith("powertrain train ")
    last = read_metrics(run_dir)[-1]
    assert last["tokens"] == 8 * 256
    assert last["flops"] > 0

    # The line that continues the run is a command that works.
    (further,) = [
        line.split(":", 1)[1].strip() for line in out.splitlines() if line.startswith("Train it twice as long")
    ]
    assert {"model=1m", "schedule.warmup=0.5"} <= set(shlex.split(further))
    assert further.startswith("OMP_NUM_THREADS=1 ")
    assert f"generate {run_dir} --top-k 50 --prompt the\n" in out
    words = shlex.split(further)
    assert main(words[words.index("train") :]) == 0
    again = capsys.readouterr().out
    assert "\nfound   a checkpoint of step 8 to go on from\n" in again
    assert f"trainer.max_tokens={2 * 16 * 256}\n" in again
    assert sorted(losses(run_dir)) == list(range(1, 17))


def test_a_dry_run_says_what_the_run_will_say_of_itself_and_touches_nothing(tiny, tmp_path, capsys, monkeypatch):
    dry = ["train", *tiny, "trainer.max_steps=600", "cluster.dry_run=true"]
    assert main(dry) == 0
    model, plan = capsys.readouterr().out.splitlines()
    assert "600 steps of 256 tokens = 154k tokens (data not prepared yet" in plan
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()

    assert main(["train", *tiny, "trainer.max_steps=1"]) == 0
    capsys.readouterr()
    assert main(dry) == 0
    same_model, plan, warning = capsys.readouterr().out.splitlines()
    assert same_model == model
    assert warning.startswith("warning the run goes ")
    monkeypatch.setattr("powertrain.training.fit.fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(compose([*tiny, "trainer.max_steps=600"]))
    assert capsys.readouterr().out.splitlines()[-3:] == [model, plan, warning]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.tokenizer.kind=pretrained", "data.tokenizer.path=/nowhere"], "path='/nowhere' does not exist"),
        (["data.files=/nowhere/*.txt"], "no file matches data.files='/nowhere/*.txt'"),
        (["trainer.accelerator=gpu", "trainer.devices=64"], "needs 64 GPUs on this machine"),
        (["trainer.devices=3"], "which 3 processes cannot share equally"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(overrides, sentence, tiny, capsys):
    for command in ([], ["cluster.dry_run=true"]):
        assert main(["train", *tiny, *overrides, *command]) == 2
        printed = capsys.readouterr()
        assert sentence in printed.err
        assert "plan" not in printed.out


def test_a_dry_run_refuses_prepared_data_and_runs_that_the_run_would_refuse(tiny, tmp_path, capsys):
    assert main(["train", *tiny, "trainer.max_steps=1", "run_id=mine"]) == 0
    capsys.readouterr()
    assert main(["train", *tiny, "run_id=mine", "seed=7", "cluster.dry_run=true"]) == 2
    assert "holds another run (seed was" in capsys.readouterr().err
    long = ["trainer.context_length=65536", "trainer.global_batch_tokens=65536"]
    assert main(["train", *tiny, *long, "cluster.dry_run=true"]) == 2
    assert "trainer.context_length=65536: the train split holds" in capsys.readouterr().err
    (shard,) = (tmp_path / "cache").rglob("tokens-00000.bin")
    shard.write_bytes(shard.read_bytes()[:-2])
    for command in ([], ["cluster.dry_run=true"]):
        assert main(["train", *tiny, "run_id=new", *command]) == 1
        assert "prepared tokens are damaged" in capsys.readouterr().err


def test_a_vocabulary_is_assumed_until_the_data_are_prepared_and_refused_where_they_have_another(tiny, capsys):
    def model_line(*overrides):
        assert main(["train", *tiny, *overrides, "trainer.max_steps=1", "cluster.dry_run=true"]) == 0
        return capsys.readouterr().out.splitlines()[0]

    assert "vocabulary" not in model_line()  # bytes are 257
    for overrides, size in (["model.vocab_size=300"], 300), (["data.tokenizer.kind=bpe"], "16,384"):
        assert f", vocabulary {size} (assumed: the data say when they are prepared)" in model_line(*overrides)
    assert main(["train", *tiny, "model.vocab_size=257", "trainer.max_steps=1"]) == 0
    capsys.readouterr()
    assert "vocabulary" not in model_line("model.vocab_size=257")
    sentence = "model.vocab_size=300 contradicts the data, whose tokenizer has 257 entries: leave it out"
    for dry in ([], ["cluster.dry_run=true"]):
        assert refusals([*tiny, "model.vocab_size=300", *dry], capsys) == [f"powertrain train: {sentence}"]


def test_a_dry_run_does_not_know_the_size_of_a_tokenizer_that_is_not_loaded(tiny, tmp_path, capsys):
    tokenizer = ["data.tokenizer.kind=pretrained", "data.tokenizer.path=some/name"]
    assert main(["train", *tiny, *tokenizer, "cluster.dry_run=true"]) == 0
    assert capsys.readouterr().out.startswith("plan    not known: a pretrained tokenizer's size")
    # Its data may be where the job is.
    job = ["cluster=slurm", "data.files=/nowhere/*.txt", "trainer.accelerator=auto"]
    assert main(["train", *tiny, *job, "cluster.dry_run=true"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("plan    not known here: no file matches")
    assert printed.out.startswith("#!")


def test_a_dry_run_of_a_saved_configuration_trains_nothing(tiny, tmp_path, capsys):
    config = compose([*tiny, "cluster=slurm", "cluster.dry_run=true", "trainer.max_steps=1"])
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(to_values(config)))
    assert main(["train", "--config", str(tmp_path / "saved.yaml")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["model", "plan"]
    assert not (tmp_path / "runs").exists()


def test_run_refuses_a_dry_run_and_names_what_makes_one(tiny, tmp_path):
    config = compose([*tiny, "trainer.max_steps=1", "cluster.dry_run=true"])
    with pytest.raises(
        ConfigError, match=r"cluster\.dry_run=true is for `powertrain train`.* call powertrain\.train\.plan"
    ):
        run(config)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()
    assert [line.split()[0] for line in plan(config)] == ["model", "plan"]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_run_on_a_cpu_that_nobody_gave_a_length_names_the_quickstart_before_it_prepares_anything(
    tiny, tmp_path, capsys, monkeypatch
):
    # All that TINY says of the model is left out.
    long = ["train", "trainer.accelerator=cpu", f"paths.runs={tmp_path}", f"paths.cache={tmp_path / 'cache'}"]
    flops = []
    for overrides in ([], ["experiment=quickstart"]):
        assert main([*long, *overrides, "cluster.dry_run=true"]) == 0
        said = capsys.readouterr().out.splitlines()
        flops.append(float(re.search(r"(\S+) FLOPs", said[1])[1]))
        assert len(said) == 2 + (not overrides)
        if not overrides:
            note = said[2]
    times = re.fullmatch(
        r"note    no budget is given, so 10m-power-python_stdlib trains 179M tokens \(20 per parameter\) on a CPU: "
        r"([\d,]+) times the FLOPs of `powertrain train experiment=quickstart`, which takes minutes", note
    )[1]  # fmt: skip
    assert int(times.replace(",", "")) == pytest.approx(flops[0] / flops[1], rel=0.01)

    monkeypatch.setattr("powertrain.train_cli.run", interrupted)
    for overrides, expected in ([], [note]), (["trainer.max_tokens=1e9"], []), (tiny, []):
        assert main([*long, *overrides]) == 130
        assert capsys.readouterr().out.splitlines() == expected


def test_the_same_command_again_resumes_and_says_so(tiny, tmp_path, capsys):
    assert main(["train", *tiny, "trainer.max_steps=4"]) == 0
    before = (only_run(tmp_path) / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert main(["train", *tiny, "trainer.max_steps=4"]) == 0
    assert "finished already, at step 4" in capsys.readouterr().out
    assert (only_run(tmp_path) / "metrics.jsonl").read_text() == before


def test_a_precision_left_to_the_device_is_recorded_as_what_it_came_to(tiny, tmp_path, capsys):
    command = ["train", *tiny, "trainer.max_steps=1"]
    assert main(command) == 0
    assert "\ndevice  CPU, 32-true\n" in capsys.readouterr().out
    run_dir = only_run(tmp_path)
    config = read_config(run_dir / "config.yaml")
    assert config.trainer.precision == "32-true"
    saved = Checkpoint(run_dir / "checkpoints" / "last").values["config"]
    assert saved["trainer"]["precision"] == "32-true"
    assert saved["run_id"] == run_dir.name  # the hash of what it records may be another
    # Of what was asked for: it is found again, from the record too.
    asked = compose(command[1:])
    assert run_dir.name == asked.resolved_run_id() == config.resolved_run_id()
    result = run(asked)
    assert (result.fit.resumed_step, result.config) == (1, config)
    assert run(config).fit.resumed_step == 1
    capsys.readouterr()
    # Of the same id.
    assert main([*command, "trainer.precision=bf16-mixed"]) == 2
    assert "holds another run (trainer.precision was '32-true', now 'bf16-mixed'): " in capsys.readouterr().err
    assert only_run(tmp_path) == run_dir


def test_a_run_goes_on_in_the_precision_that_it_records(tiny, tmp_path, capsys):
    tiny = [*tiny, "schedule=constant", "schedule.warmup=0"]
    in_bf16 = [*tiny, "trainer.precision=bf16-mixed"]
    whole = run(compose([*in_bf16, "trainer.max_steps=8", "run_id=whole"]))
    in_fp32 = run(compose([*tiny, "trainer.max_steps=8", "run_id=fp32"]))
    assert losses(whole.run_dir) != losses(in_fp32.run_dir)

    first = run(compose([*in_bf16, "trainer.max_steps=4", "run_id=broken"]))
    again = ["train", *tiny, "trainer.max_steps=8", "run_id=broken"]
    assert main([*again, "cluster.dry_run=true"]) == 0
    capsys.readouterr()
    assert main([*again, "trainer.precision=32-true"]) == 2
    assert "holds another run (trainer.precision was 'bf16-mixed', now '32-true'): " in capsys.readouterr().err
    result = run(compose(again[1:]))
    assert (result.run_dir, result.fit.resumed_step) == (first.run_dir, 4)
    assert result.config.trainer.precision == "bf16-mixed"
    assert losses(result.run_dir) == losses(whole.run_dir)
    assert read_config(result.run_dir / "config.yaml") == result.config


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_saves_and_the_resumed_run_equals_the_unbroken_one(tiny, tmp_path, signum):
    """As a terminal and a scheduler send it: to the data workers too."""
    command = [sys.executable, "-m", "powertrain", "train", *tiny, "trainer.max_steps=40", "run_id=broken"]
    command.append("data.num_workers=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    metrics = tmp_path / "runs" / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("train/loss") >= 5):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 128 + signum, err
    assert "Interrupted. Everything is saved at step" in out
    assert "powertrain train" in out.splitlines()[-1]
    torch.set_num_threads(1)
    broken = run(compose([*tiny, "trainer.max_steps=40", "run_id=broken"]))
    assert 5 <= broken.fit.resumed_step < 40
    whole = run(compose([*tiny, "trainer.max_steps=40", "run_id=whole"]))
    assert losses(broken.run_dir) == losses(whole.run_dir)
    assert sorted(losses(whole.run_dir)) == list(range(1, 41))


def test_another_run_of_the_same_id_is_refused_and_nothing_is_lost(tiny, tmp_path, capsys):
    assert main(["train", *tiny, "trainer.max_steps=2", "run_id=mine"]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "runs" / "mine").iterdir() if p.is_file()}
    assert main(["train", *tiny, "trainer.max_steps=2", "run_id=mine", "optim.lr=0.5"]) == 2
    assert "holds another run (optim.lr was 0.001, now 0.5)" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "runs" / "mine").iterdir() if p.is_file()} == before


def test_a_run_whose_configuration_is_damaged_is_left_as_it_is(tiny, tmp_path, capsys):
    saved = tmp_path / "runs" / "mine" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text("")  # as a machine that went down may leave it
    assert main(["train", *tiny, "trainer.max_steps=1", "run_id=mine"]) == 2
    assert f"{saved} must hold a mapping of options, and holds nothing" in capsys.readouterr().err
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("debug", "change"),
    [("debug=fast", "debug.max_steps was 3, now None"), ("debug=overfit", "debug.overfit was True, now False")],
)
def test_what_debug_computes_is_not_taken_for_the_run(debug, change, tiny, tmp_path, capsys):
    assert main(["train", *tiny, "trainer.max_steps=4", debug]) == 0
    # Three steps are three, whatever the budget.
    assert ("Train it twice as long" in capsys.readouterr().out) == (debug != "debug=fast")
    debugged = only_run(tmp_path)
    real = run(compose([*tiny, "trainer.max_steps=4"]))
    assert real.run_dir != debugged
    assert real.fit.resumed_step == 0
    capsys.readouterr()
    assert main(["train", *tiny, "trainer.max_steps=4", f"run_id={debugged.name}"]) == 2
    assert f"holds another run ({change}" in capsys.readouterr().err


def test_a_second_start_changes_nothing_of_a_live_run(tiny, tmp_path):
    run_dir = run(compose([*tiny, "trainer.max_steps=2", "run_id=mine"])).run_dir
    # Its heartbeat is late, and its lock is not.
    write_status(run_dir, RunStatus("running", step=2, host="elsewhere", pid=9, updated=time.time() - 61))
    with locked_by_another(run_dir):
        before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
        with pytest.raises(RunLockedError, match="process 9 on elsewhere"):
            run(compose([*tiny, "trainer.max_steps=9", "run_id=mine"]))
        assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


def test_where_there_are_no_locks_the_heartbeat_keeps_a_second_start_out(tiny, tmp_path, monkeypatch):
    flock = fcntl.flock

    def only_of_data(file, how):
        if not isinstance(file, int):  # as filelock does
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", only_of_data)
    with pytest.warns(UserWarning, match="has no locks"):
        run_dir = run(compose([*tiny, "trainer.max_steps=2", "run_id=mine"])).run_dir
    config = (run_dir / "config.yaml").read_bytes()
    write_status(run_dir, RunStatus("running", step=2, host="elsewhere", pid=9, updated=time.time()))
    with pytest.warns(UserWarning, match="has no locks"), pytest.raises(RunBusyError, match="process 9 on elsewhere"):
        run(compose([*tiny, "trainer.max_steps=9", "run_id=mine"]))
    assert (run_dir / "config.yaml").read_bytes() == config


def test_a_context_that_the_data_cannot_fill_is_one_sentence(tiny, tmp_path, capsys):
    assert main(["train", *tiny, "trainer.context_length=65536", "trainer.global_batch_tokens=65536"]) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "trainer.context_length=65536" in line]
    assert "split holds" in sentence
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("split", "fraction", "short"),
    [("document", 0.01, "validation"), ("tail", 0.01, "validation"), ("tail", 0.995, "train")],
)
def test_a_split_shorter_than_a_context_is_refused_with_what_works(split, fraction, short, tiny, tmp_path, capsys):
    context = ["trainer.context_length=1024", "trainer.global_batch_tokens=4096", "trainer.max_steps=1"]
    if split == "document":
        (tmp_path / "corpus" / "short.txt").write_text(text_of_the_validation_split(0.01))
    command = ["train", *tiny, *context, f"data.split={split}"]
    for dry in ([], ["cluster.dry_run=true"]):
        assert main([*command, f"data.val_fraction={fraction}", *dry]) == 2
        said = capsys.readouterr()
        (sentence,) = [line for line in said.err.splitlines() if line.startswith("powertrain")]
        assert f"trainer.context_length=1024: the {short} split holds " in sentence
        assert "plan" not in said.out
    fits = re.findall(r"(?:data\.split=tail with )?(?:data|trainer)\.\w+=[\d.]+", sentence)[1:]
    assert [option.partition("=")[0] for option in fits] == [
        "data.val_fraction", *["data.split"] * (split == "document"), "trainer.context_length"
    ]  # fmt: skip
    for option in fits:
        assert main([*command, f"data.val_fraction={fraction}", *option.split(" with ")]) == 0, option
    longest = int(fits[-1].partition("=")[2])
    assert main([*command, f"data.val_fraction={fraction}", f"trainer.context_length={2 * longest}"]) == 2


def test_a_run_without_a_budget_is_refused_where_its_data_are_far_too_few(tiny, tmp_path, capsys):
    tiny = [*tiny, "data.max_documents=4", "data.split=tail", "data.val_fraction=0.3"]
    (sentence,) = refusals(tiny, capsys)
    assert "powertrain train: no budget is given, and 20 tokens per parameter would be " in sentence
    assert not (tmp_path / "runs").exists()
    assert refusals([*tiny, "cluster.dry_run=true"], capsys) == [sentence]
    budget = re.search(r"trainer\.max_tokens=\d+ for one", sentence)[0].removesuffix(" for one")
    assert main(["train", *tiny, budget]) == 0
    assert "warning" not in capsys.readouterr().out


def refusals(overrides, capsys):
    assert main(["train", *overrides]) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("powertrain")]


def text_of_the_validation_split(fraction):
    """Return a short document that validates wherever as large a share does."""
    return next(text for n in itertools.count() if split_of(text := f"short {n}", fraction, 0) == "validation")


# With a rate to match, one update makes weights of any size.
DIVERGING = ["optim.weight_decay=0", "model.tied_embeddings=false", "schedule.warmup=0", "trainer.max_steps=1"]


def test_a_run_that_diverged_ends_with_what_there_is_to_say(tiny, capsys):
    assert main(["train", *tiny, *DIVERGING, "optim.lr=100"]) == 0
    out = capsys.readouterr().out
    # Of more than 709 nats no float holds the perplexity.
    assert re.search(r"^validation loss \d+\.\d+ nats per token, perplexity not finite, \d", out, re.MULTILINE)
    assert "A sample of 8 tokens" in out


@pytest.mark.parametrize("mixer", ["power", "softmax"])
def test_a_run_of_no_numbers_at_all_ends_without_a_sample(mixer, tiny, capsys):
    overrides = [*tiny, *DIVERGING, f"mixer={mixer}", "optim.lr=1e30"]
    assert main(["train", *overrides]) == 0
    out = capsys.readouterr().out
    assert "\nvalidation loss not finite\n" in out
    assert "\nNo sample: the model's logits are not finite" in out
    assert "\nGenerate from it: " in out
    assert math.isnan(run(compose(overrides)).val_loss)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID"])
def test_a_rank_that_another_program_has_left_in_the_environment_costs_a_run_alone_nothing(tiny, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    result = run(compose([*tiny, "trainer.max_steps=1"]))
    assert result.metrics["val/loss"] > 0
    for file in ("config.yaml", "status.json", "tokenizer/tokenizer.json"):
        assert (result.run_dir / file).exists(), file


def test_budget_in_flops(tiny, tmp_path):
    result = run(compose([*tiny, "budget=flops", "budget.value=1e8"]))
    per_step = result.length.flops_per_step
    assert (result.fit.counters.step - 1) * per_step < 1e8 <= result.fit.counters.step * per_step


def test_generate_continues_a_run(tiny, tmp_path, capsys):
    assert main(["train", *tiny, "trainer.max_steps=1", "sample.max_new_tokens=0"]) == 0
    assert "A sample" not in capsys.readouterr().out
    assert main(["generate", str(only_run(tmp_path)), "--prompt", "the ", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the ")


def test_a_run_whose_gates_start_spread_trains_resumes_and_generates(tiny, tmp_path, capsys):
    heads = ["model.n_heads=2", "model.n_kv_heads=2", "model.head_dim=16", "mixer.gate_init=[0.9,0.9999]"]
    command = ["train", *tiny, *heads, "run_id=spread"]
    assert main([*command, "trainer.max_steps=2"]) == 0
    run_dir = only_run(tmp_path)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["mixer"]["gate_init"] == [0.9, 0.9999]
    # The mean log gate: that of the two heads, which have hardly moved.
    half_life = math.log(0.5) / (math.log(0.9 * 0.9999) / 2)
    assert read_metrics(run_dir)[0]["power/gate_half_life/0"] == pytest.approx(half_life, rel=0.02)
    assert main([*command, "trainer.max_steps=4"]) == 0
    assert sorted(losses(run_dir)) == [1, 2, 3, 4]
    capsys.readouterr()

    model, _ = load_run(run_dir)
    assert model.config.mixer.gate_init == (0.9, 0.9999)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    cache = DecodeCache(model.config)
    with torch.no_grad():
        step_by_step = [model(part, cache=cache).logits for part in ids.split([7] + [1] * 33, dim=1)]
        torch.testing.assert_close(torch.cat(step_by_step, dim=1), model(ids).logits, rtol=1e-3, atol=1e-3)
    assert main(["generate", str(run_dir), "--prompt", "the ", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the ")


@pytest.mark.parametrize("mixer", options("mixer", [share_dir("conf")]))
def test_every_mixer_trains(mixer, tiny):
    result = run(compose([*tiny, f"mixer={mixer}", "model.n_layers=4", "mixer.window=32", "trainer.max_steps=2"]))
    assert result.fit.finished
    assert result.val_loss == pytest.approx(5.5, abs=1.0)  # near ln 257, a uniform guess


@pytest.mark.parametrize("experiment", options("experiment", [share_dir("conf")]))
def test_every_experiment_runs_fast(experiment, tiny, tmp_path):
    # The experiment's own model shape, mixer, data source and optimiser; a small corpus and few tokens.
    kept = [o for o in tiny if o.split("=")[0] in ("paths.runs", "paths.cache", "data.files", "data")]
    size = ["trainer.context_length=64", "trainer.global_batch_tokens=128", "debug=fast", "data.tokenizer.kind=bytes"]
    result = run(
        compose([f"experiment={experiment}", *kept, *size, "mixer.chunk_size=null", "data.max_val_tokens=128",
                 "trainer.accelerator=cpu", "model.n_layers=2", "trainer.compile=false"])
    )  # fmt: skip
    assert result.fit.counters.step == 3
    saved = yaml.safe_load((result.run_dir / "config.yaml").read_text())
    assert saved["name"] == experiment
