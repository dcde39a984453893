import dataclasses
import json
import math
import re

import pytest

from powertrain.cli import main
from powertrain.scaling import timing
from powertrain.scaling.analysis import analyse
from powertrain.scaling.records import Start
from powertrain.schema import ConfigError

from . import synthetic
from .test_execute import recipe_in, state_in

SPEED = timing.Timing("power", "8m", 65536, 65536, "NVIDIA H200", 1, 2e6, (1e6, 2e6, 3e6), {"commit": "0"})


def records(**changes):
    return synthetic.make_records(**{"curves": False, "budgets": (1e15, 3e15), "factors": (1.0,), **changes})


def test_seconds_are_those_of_the_timing_else_of_a_run_alone():
    shared = [dataclasses.replace(r, runners=4 if r.mixer == "softmax" else 1) for r in records()]
    timed = timing.with_timings(shared, [SPEED])
    for before, after in zip(shared, timed, strict=True):
        if (after.mixer, after.size) == ("power", "8m"):
            assert after.seconds == after.tokens / 2e6
        elif after.mixer == "softmax":
            assert after.seconds is None
        else:
            assert after.seconds == before.seconds
        assert dataclasses.replace(after, seconds=before.seconds) == before


def test_device_seconds_count_every_device():
    both = dataclasses.replace(SPEED, devices=2)
    record = dataclasses.replace(records()[0], size="8m", devices=2)
    assert timing.with_timings([record], [both])[0].seconds == 2 * record.tokens / 2e6
    other = dataclasses.replace(record, device="NVIDIA H100 80GB HBM3")
    assert timing.with_timings([other], [both])[0].seconds == other.seconds, "another device's speed says nothing"


def test_winners_are_what_the_report_selects_once():
    own = records(noise=0.0)
    # Lower than all others, of a setting that the recipe does not ask for.
    lucky = dataclasses.replace(
        own[0], cell="other", size="elsewhere", loss=own[0].loss / 2, document_loss=(), document_tokens=()
    )
    asked = {r.place: {o.cell for o in own if o.place == r.place} for r in own}
    found = timing.winners([*own, lucky], asked)
    assert len({timing.key_of(r) for r in found}) == len(found)
    selected = analyse(synthetic.recipe(), own, 65536).selected
    assert {(r.mixer, r.size) for r in found} == {(mixer, p.size) for (mixer, _), p in selected.items()}


def test_a_timing_is_read_back_and_replaced(tmp_path):
    timing.write(tmp_path, SPEED)
    again = dataclasses.replace(SPEED, tokens_per_second=3e6)
    path = timing.write(tmp_path, again)
    assert timing.read(tmp_path) == [again]
    assert re.fullmatch(r"[A-Za-z0-9_.-]+\.json", path.name)
    path.write_text("{")
    with pytest.raises(ConfigError, match=path.name):
        timing.read(tmp_path)


def test_a_timing_that_cannot_be_trusted_is_named(tmp_path):
    path = timing.write(tmp_path, SPEED)
    values = json.loads(path.read_text())
    for broken, words in (
        (json.dumps({**values, "tokens_per_second": 0.0}).encode(), "tokens_per_second=0 must be"),
        (json.dumps({**values, "tokens_per_second": math.nan}).encode(), "tokens_per_second=nan must be"),
        (json.dumps({**values, "devices": 0}).encode(), "devices=0 must be"),
        (b"\xff\xfe", "decode"),
    ):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=f"{path.name}: .*{words}"):
            timing.read(tmp_path)


def version_check(timings, changed=None):
    found = analyse(synthetic.recipe(), changed or records(), 65536, timings)
    (check,) = (c for c in found.checks if c.name == "one version of the code")
    return check.passed, check.evidence


def test_a_comparison_holds_the_code_of_its_timings_too():
    commit = "0" * 12
    of_records = {"commit": commit, "torch": "2"}
    own = [dataclasses.replace(r, environment=of_records) for r in records()]
    same = dataclasses.replace(SPEED, environment=of_records)
    assert version_check([same], own) == (True, commit)
    later = dataclasses.replace(SPEED, environment={"commit": "1", "torch": "2"})
    assert version_check([later], own) == (False, f"commit {commit} (records); commit 1 (timings)")
    upgraded = dataclasses.replace(SPEED, environment={"commit": commit, "torch": "3"})
    assert version_check([upgraded], own) == (False, "torch 2 (records); torch 3 (timings)")
    assert version_check([dataclasses.replace(later, context=8192)], own)[0], "it speaks for none of these records"
    # A cell that another commit began.
    starts = tuple(Start(step, "NVIDIA H200", 1, {"commit": commit}) for step, commit in ((0, "e"), (7, "f")))
    continued = [dataclasses.replace(r, starts=starts, environment={"commit": "f"}) for r in own]
    assert version_check([], continued) == (False, "commit e, f (records)")
    nowhere = [dataclasses.replace(r, environment={}) for r in records()]
    assert version_check([], nowhere) == (None, "not recorded")


def test_timings_are_logged_nowhere(tmp_path, monkeypatch):
    """They would all be one run of W&B."""
    path = recipe_in(tmp_path)
    path.write_text(path.read_text().replace("overrides:\n", "overrides:\n  - logger.wandb=true\n", 1))
    cell = state_in(path, tmp_path / "sweeps").expand().cells[0]
    assert cell.config.logger.wandb

    def train(config, *, command):
        raise RuntimeError(f"wandb={config.logger.wandb}")

    monkeypatch.setattr("powertrain.train.run", train)
    with pytest.raises(RuntimeError, match="wandb=False"):
        timing.measure(cell, tmp_path)


def test_a_sweep_is_prepared_run_timed_and_reported(tmp_path, capsys):
    """Two runners are claimed to share the device: only timings make their times comparable."""
    recipe = str(recipe_in(tmp_path))
    here = ["--directory", str(tmp_path / "sweeps")]
    assert main(["sweep", "time", recipe, *here]) == 2
    assert "has no records yet" in capsys.readouterr().err
    assert main(["sweep", "prepare", recipe, *here]) == 0
    assert "prepared 40 documents" in capsys.readouterr().err
    assert main(["sweep", "run", recipe, *here, "--quiet", "--shared-by", "2", "--no-wait", "--max-hours", "0.1"]) == 0
    assert main(["sweep", "time", recipe, *here]) == 0
    assert "tokens per second on cpu" in capsys.readouterr().out
    root = tmp_path / "sweeps" / "tiny"
    assert {t.mixer for t in timing.read(root / "timings")} == {"power", "softmax"}
    assert all(len(t.readings) == timing.READINGS for t in timing.read(root / "timings"))
    assert not list(root.glob("timing-*"))
    assert main(["sweep", "time", recipe, *here]) == 0
    assert "everything that won is timed" in capsys.readouterr().out
    # A timing of other code says nothing about this one.
    of_power = next(t for t in timing.read(root / "timings") if t.mixer == "power")
    timing.write(root / "timings", dataclasses.replace(of_power, environment={**of_power.environment, "torch": "1.0"}))
    assert main(["sweep", "report", recipe, *here]) == 0
    line = next(x for x in (root / "report" / "README.md").read_text().splitlines() if "| one version of the code" in x)
    assert "**no**" in line
    assert "torch 1.0, " in line
    assert main(["sweep", "time", recipe, *here]) == 0
    assert "1 timing in" in capsys.readouterr().out
    assert len({str(t.environment) for t in timing.read(root / "timings")}) == 1
    records_there = [json.loads(p.read_text()) for p in (root / "records").glob("*.json")]
    assert {r["runners"] for r in records_there} == {2}
    # A cell that is gone is a cell that is missing.
    next(iter(sorted((root / "records").glob("*.json")))).unlink()
    assert main(["sweep", "report", recipe, *here]) == 0
    page = (root / "report" / "README.md").read_text()
    assert "### What is missing" in page
    assert "| 0 of 1 cell |" in page
    # What is left continues only on the same documents.
    missing = next(iter(sorted((root / "records").glob("*.json"))))
    text = missing.read_text()
    (tmp_path / "texts" / "40.txt").write_text("one more document than the records know")
    assert main(["sweep", "run", recipe, *here, "--quiet"]) == 2
    assert "cells of both do not compare" in capsys.readouterr().err
    assert missing.read_text() == text
