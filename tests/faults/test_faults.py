"""A small campaign (docs/faults.md): what `make faults` does at length."""

import dataclasses
import json
import random

import pytest

from tests.faults import policies
from tests.faults.campaign import ALONE, KILL, PREEMPT, PREPARE, READ, SAVE, Chain, prepare
from tests.faults.launch import Layout
from tests.faults.process import read_trace
from tests.faults.run import Mismatch, saved_for_certain

# Long, and so begun first.
pytestmark = pytest.mark.first

TWO, FOUR = Layout(2), Layout(4)
CASES = (
    ("the newest is cut in half", ALONE),
    ("cut while it is read", TWO),
    ("nonfinite=stop", TWO),
)


@pytest.mark.slow
def test_runs_survive_a_small_campaign(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shop = prepare(tmp_path, (ALONE, TWO, FOUR))
    chains = [
        Chain(shop, "alone", (ALONE,), [PREPARE, KILL, SAVE, READ], random.Random(0)),
        # More ranks than two add in an order that only care keeps the same.
        Chain(shop, "four", (FOUR,), [PREEMPT], random.Random(1)),
        Chain(shop, "changing", (ALONE, TWO), [SAVE, PREEMPT], random.Random(2)),
    ]
    for chain in chains:
        outcomes = chain.execute()
        assert [outcome.reason for outcome in outcomes if not outcome.survived] == []
        assert len(outcomes) + chain.missed == len(chain.kinds)
    assert sum(chain.missed for chain in chains) <= 1
    assert chains[-1].moves == len(chains[-1].run.attempts) - 1

    by_name = {(case.name, case.layout): (case, act) for case, act in policies.cases(shop, seed=0)}
    for key in CASES:
        assert policies.attempt_case(*by_name[key]).reason is None

    # And the tool sees what it looks for.
    run, reference = chains[0].run, shop.references.by_layout[ALONE]
    run.check(reference)
    lost = dataclasses.replace(reference, records=reference.records[:-1])
    with pytest.raises(Mismatch, match="records instead of"):
        run.check(lost)
    step = max(line["step"] for line in read_trace(run.attempts[-1].directory / "trace.jsonl") if "step" in line)
    other_tokens = dataclasses.replace(reference, rows={**reference.rows, step: ["other"] * 4})
    with pytest.raises(Mismatch, match=f"step {step} trained on other tokens"):
        run.check(other_tokens)
    with pytest.raises(Mismatch, match="there was a checkpoint of step 61"):
        run.check(reference, at_least=61)
    metrics = run.run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    record = json.loads(lines[9])
    record["train/loss"] *= 1 + 1e-5
    metrics.write_text("\n".join([*lines[:9], json.dumps(record), *lines[10:], ""]))
    with pytest.raises(Mismatch, match="a record is"):
        run.check(reference)
    with pytest.raises(Mismatch, match=r"\(10, 'train/loss'\) is"):
        run.check(reference, shop.references.tolerance())


@pytest.mark.parametrize(("last_step", "saved"), [(0, 0), (5, 0), (6, 0), (10, 0), (11, 5), (15, 5), (16, 10)])
def test_a_save_is_certain_once_the_next_one_has_begun(last_step, saved):
    assert saved_for_certain(last_step) == saved
