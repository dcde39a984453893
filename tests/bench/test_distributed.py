"""The benchmark of distribution runs on CPUs, and what it writes is enough to repeat it."""

import json
from pathlib import Path

import pytest
import torch

from powertrain.bench import distributed
from powertrain.bench.distributed import main

# Long, and so begun first.
pytestmark = pytest.mark.first


def test_writes_rows_ratios_and_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "distributed.json"
    assert main(["--cpu", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    rows = {row["name"]: row for row in record["rows"]}
    processes = {"one": 1, "ddp": 2, "fsdp": 2, "long": 1, "context": 2}
    assert {name: row["processes"] for name, row in rows.items()} == processes
    assert [rows[name]["baseline"] for name in processes] == ["one", "one", "one", "long", "long"]
    for row in rows.values():
        assert row["tokens_per_second"] > 0
        assert row["times_the_baseline"] == row["tokens_per_second"] / rows[row["baseline"]]["tokens_per_second"]
    for name in ("ddp", "fsdp"):
        assert 0 < rows[name]["save_pause_seconds"] < rows[name]["save_seconds"]
    assert record["torch"] == torch.__version__
    assert record["command"].startswith("powertrain bench distributed --cpu")
    assert "tokens/s" in capsys.readouterr().out


def test_a_trial_on_cpus_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "launch", lambda *_: 143)
    assert main(["--cpu"]) == 143
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_cut_short_writes_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = distributed.launch
    monkeypatch.setattr(distributed, "launch", lambda command, n: real(command, n) if n == 1 else 143)
    output = tmp_path / "distributed.json"
    assert main(["--cpu", "--cases", "context", "--output", str(output)]) == 143
    assert [row["name"] for row in json.loads(output.read_text())["rows"]] == ["long"]
    assert "context not measured" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.device_count() >= 64, reason="needs a machine with fewer GPUs")
def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--processes=64 needs as many GPUs, and this machine has"):
        main(["--processes", "64"])
