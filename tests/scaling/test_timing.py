import dataclasses
import json
import re

import pytest

from powertrain.cli import main
from powertrain.scaling import timing
from powertrain.schema import ConfigError

from . import synthetic
from .test_execute import recipe_in

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


def test_winners_are_the_lowest_of_each_budget_once():
    found = timing.winners(records(noise=0.0))
    assert len({timing.key_of(r) for r in found}) == len(found)
    lowest = {}
    for r in records(noise=0.0):
        lowest.setdefault((r.mixer, r.budget), []).append((r.loss, r.size))
    expected = {(mixer, min(losses)[1]) for (mixer, _), losses in lowest.items()}
    assert {(r.mixer, r.size) for r in found} == expected


def test_a_timing_is_read_back_and_replaced(tmp_path):
    timing.write(tmp_path, SPEED)
    again = dataclasses.replace(SPEED, tokens_per_second=3e6)
    path = timing.write(tmp_path, again)
    assert timing.read(tmp_path) == [again]
    assert re.fullmatch(r"[A-Za-z0-9_.-]+\.json", path.name)
    path.write_text("{")
    with pytest.raises(ConfigError, match=path.name):
        timing.read(tmp_path)


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
    records_there = [json.loads(p.read_text()) for p in (root / "records").glob("*.json")]
    assert {r["runners"] for r in records_there} == {2}
    # A cell that is gone is a cell that is missing.
    next(iter(sorted((root / "records").glob("*.json")))).unlink()
    assert main(["sweep", "report", recipe, *here]) == 0
    page = (root / "report" / "README.md").read_text()
    assert "### What is missing" in page
    assert "| 0 of 1 cells |" in page
    # What is left continues only on the same documents.
    missing = next(iter(sorted((root / "records").glob("*.json"))))
    text = missing.read_text()
    (tmp_path / "texts" / "40.txt").write_text("one more document than the records know")
    assert main(["sweep", "run", recipe, *here, "--quiet"]) == 2
    assert "cells of both do not compare" in capsys.readouterr().err
    assert missing.read_text() == text
