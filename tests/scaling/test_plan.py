import dataclasses
import json
import math
import re
import time
from collections import Counter

import pytest
import yaml

from powertrain import config
from powertrain.scaling import catalog, cli, pricing
from powertrain.scaling.catalog import ComposedCatalog, model_cost, state_size
from powertrain.scaling.cells import Dropped, Expander, Expansion, Reason
from powertrain.scaling.plan import as_rows, make_plan
from powertrain.scaling.plan_text import dropped, later, render, rounded_batches, summary, unpriced
from powertrain.scaling.pricing import (
    ASSUMED_UTILISATION,
    LAYER_SECONDS,
    OVERHEAD_SECONDS,
    Estimate,
    Pricer,
    choose_device,
    find_device,
)
from powertrain.scaling.recipe import Limits, Recipe, Rule, Stage, Variant, load_recipe
from powertrain.scaling.records import RecordStore
from powertrain.scaling.run import SweepPaths, SweepState
from powertrain.scaling.timing import Timing
from powertrain.schema import ConfigError, build

from . import synthetic
from .fakes import FakeCatalog, fake_record
from .test_recipe import SHIPPED

T, D, LAYERS, HEADS, WIDTH, FF, VOCABULARY, CHUNK, WINDOW = 512, 64, 2, 4, 16, 128, 512, 64, 100


def small_recipe():
    shape = [f"model.n_layers={LAYERS}", f"model.d_model={D}", f"model.n_heads={HEADS}", f"model.n_kv_heads={HEADS}"]
    shape += [f"model.head_dim={WIDTH}", f"model.d_ff={FF}", f"data.tokenizer.vocab_size={VOCABULARY}"]
    mixers = {
        "power": [f"mixer.chunk_size={CHUNK}"],
        "linear": [f"mixer.chunk_size={CHUNK}"],
        "window": [f"mixer.window={WINDOW}"],
        "softmax": [],
    }
    values = {
        "name": "hand",
        "question": "?",
        "contexts": [T],
        "mixers": {m: {"overrides": [f"mixer={m}", *extra]} for m, extra in mixers.items()},
        "ladder": {"one": {"overrides": ["model=1m", *shape]}},
        "subject": "power",
        "baseline": "softmax",
        "stages": [{"budgets": [1e12], "sizes": "all", "learning_rates": "grid"}],
        "learning_rate": {"value": 1e-3},
        "batch_tokens": {"value": T},
    }
    return build(Recipe, values)


def by_hand(mixer):
    """Forward and backward FLOPs of one sequence by part, counted token by token; a multiply-add is two.

    Every weight is used once forward and twice backward. Attention over a pair of tokens: q.k and p v forward (4 d);
    backward q.k again, dv, dp, dq and dk (10 d). Power and linear carry one more column in v, the normaliser.
    """
    gates = HEADS if mixer in ("power", "linear") else 0
    matrices = D * HEADS * WIDTH * 4 + D * gates + 3 * D * FF
    parts = {"weights": 3 * 2 * matrices * LAYERS * T, "head": 3 * 2 * D * VOCABULARY * T}
    pairs = updates = queries = 0
    for i in range(T):
        if mixer == "softmax":
            pairs += i + 1
        elif mixer == "window":
            pairs += min(i + 1, WINDOW)
        else:
            pairs += i % CHUNK + 1
            # The last chunk's state has no reader, and the first chunk has no state to read.
            updates += i < T - CHUNK
            queries += i >= CHUNK
    features = {"power": WIDTH * (WIDTH + 1) // 2, "linear": WIDTH}.get(mixer, 0)
    columns = WIDTH + 1 if features else WIDTH
    forward, backward = 2 * (WIDTH + columns), 2 * (3 * WIDTH + 2 * columns)
    parts["intra_chunk"] = (forward + backward) * pairs * HEADS * LAYERS
    parts["state_update"] = 3 * 2 * features * columns * updates * HEADS * LAYERS
    parts["state_query"] = 3 * 2 * features * columns * queries * HEADS * LAYERS
    return parts


@pytest.fixture(scope="module")
def planned():
    recipe = small_recipe()
    return {c.mixer: c for c in Expander(recipe, ComposedCatalog(recipe), {}).expand().cells}


@pytest.mark.parametrize("mixer", ["power", "linear", "window", "softmax"])
def test_planned_flops_equal_a_count_by_hand(planned, mixer):
    cell = planned[mixer]
    expected = by_hand(mixer)
    for part, flops in expected.items():
        assert cell.cost.flops_by_part[part] * T == pytest.approx(flops, rel=1e-12), part
    total = sum(expected.values())
    assert cell.cost.flops_per_token["algorithmic"] * T == pytest.approx(total, rel=1e-12)
    assert cell.cost.flops_per_token["algorithmic, no head"] * T == pytest.approx(total - expected["head"], rel=1e-12)
    assert cell.cost.flops_per_token["executed"] >= cell.cost.flops_per_token["algorithmic"]
    assert cell.steps == int(1e12 / total)


def test_state_sizes_are_what_a_sequence_is_remembered_by(planned):
    features = WIDTH * (WIDTH + 1) // 2
    assert planned["power"].cost.state_size == LAYERS * HEADS * features * (WIDTH + 1)
    assert planned["linear"].cost.state_size == LAYERS * HEADS * WIDTH * (WIDTH + 1)
    assert planned["window"].cost.state_size == LAYERS * 2 * HEADS * WIDTH * WINDOW
    assert planned["softmax"].cost.state_size == 0
    model = planned["window"].config.model
    assert state_size(model, 10) == LAYERS * 2 * HEADS * WIDTH * 10


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_planned_in_seconds(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(catalog, "compose", config.compose)  # and not what other tests have composed
    start = time.process_time()
    assert cli.main(["plan", name, "--directory", str(tmp_path), "--json"]) == 0
    assert time.process_time() - start < 30
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({r["mixer"] for r in rows}) > 1
    for row in rows:
        assert row["flops"]["algorithmic"] <= row["budget"]
        assert row["flops"]["algorithmic"] == pytest.approx(sum(row["flops_by_part"].values()))
    assert not list(tmp_path.iterdir()), "a plan leaves nothing behind"


def fake_plan(stages, records=(), device="H200", finished=()):
    recipe = synthetic.recipe(stages=stages, limits=Limits(min_steps=20), warmup_steps=5)
    outcomes = {r.cell: r.loss for r in records}
    return make_plan(Expander(recipe, FakeCatalog(), outcomes).expand(), find_device(device), records, finished)


def test_time_is_executed_flops_over_the_assumed_rate_or_that_of_launching_kernels():
    plan = fake_plan((Stage((1e15,), "all", "grid"),))
    bound = set()
    for cell in plan.expansion.cells:
        if cell.mixer == "linear":
            continue
        working = cell.tokens * cell.cost.flops_per_token["executed"] / (989.4e12 * ASSUMED_UTILISATION)
        launching = cell.steps * cell.config.model.n_layers * LAYER_SECONDS
        bound.add(working > launching)
        expected = max(working, launching) + OVERHEAD_SECONDS
        assert plan.estimates[cell.id].seconds == pytest.approx(expected)
    assert bound == {True, False}
    assert plan.hours == pytest.approx(sum(e.seconds for e in plan.estimates.values() if e.seconds) / 3600)
    assert {e.basis for e in plan.estimates.values()} == {"assumed", "unknown"}
    assert "~ assumed: 30% of the peak" in summary(plan)


def priced(cell, *records, device="H200", timings=(), cells=()):
    return Pricer(find_device(device), records, timings).estimate([cell, *cells])[cell.id]


def record_of(cell, seconds=100.0, **changes):
    return dataclasses.replace(fake_record(cell), **{"seconds": seconds, "device": "NVIDIA H200", **changes})


def test_measured_times_replace_the_assumed_one():
    cell = fake_plan((Stage((1e15,), "all", "grid"),)).expansion.cells[0]
    estimate = priced(cell, record_of(cell))
    assert (estimate.basis, estimate.measured) == ("alone", True)
    assert estimate.seconds == pytest.approx(100.0 + OVERHEAD_SECONDS)


def test_a_record_that_shared_the_device_bounds_the_time_and_a_timing_replaces_it():
    """Eight runners at once: the fastest of them was slowed least, and alone it would still have been faster."""
    cell = fake_plan((Stage((1e15,), "all", "grid"),)).expansion.cells[0]
    shared = [record_of(cell, seconds, runners=8) for seconds in (700.0, 300.0, 500.0)]
    assert priced(cell, *shared) == Estimate(pytest.approx(300.0 + OVERHEAD_SECONDS), cell.steps, "bound")
    key = cell.mixer, cell.size, cell.context, cell.batch_tokens, "NVIDIA H200", 1
    timing = Timing(*key, tokens_per_second=cell.tokens / 80, readings=(), environment={})
    timed = priced(cell, *shared, timings=[timing])
    assert timed == Estimate(pytest.approx(80.0 + OVERHEAD_SECONDS), cell.steps, "alone")


def test_records_of_another_device_count_in_the_ratio_of_the_peaks():
    cell = next(c for c in fake_plan((Stage((1e15,), "all", "grid"),)).expansion.cells if c.mixer == "linear")
    far = record_of(cell, device="NVIDIA H100 80GB HBM3", runners=8)
    estimate = priced(cell, far, device="A100")
    assert (estimate.basis, estimate.measured) == ("scaled", False)
    assert estimate.seconds == pytest.approx(100.0 * 989.4 / 312 + OVERHEAD_SECONDS)
    assert priced(cell, far, record_of(cell, 200.0, runners=8)).basis == "bound", "this device's own come first"
    assert priced(cell, record_of(cell, device="cpu")).seconds is None
    # A name that contains another's is another device: the NVL has 0.84 of the peak.
    assert priced(cell, record_of(cell, device="NVIDIA H100 NVL"), device="H100").basis == "scaled"


def test_other_sizes_bound_the_time_by_flops_upwards_and_by_layers_downwards():
    cells = {c.size: c for c in fake_plan((Stage((1e16,), "all", "grid"),)).expansion.cells if c.mixer == "power"}
    small, middle, large = cells["1m"], cells["3m"], cells["8m"]
    assert middle.config.model.n_layers == 4
    shallow = dataclasses.replace(small.config.model, n_layers=3)
    small = dataclasses.replace(small, config=dataclasses.replace(small.config, model=shallow))
    step = 100.0 / middle.steps
    flops = large.cost.flops_per_token["executed"] / middle.cost.flops_per_token["executed"]
    for cell, growth in ((large, flops), (small, 0.75)):
        estimate = priced(cell, record_of(middle), cells=[middle])
        assert estimate == Estimate(pytest.approx(growth * step * cell.steps + OVERHEAD_SECONDS), cell.steps, "bound")


def test_budgets_of_a_trunk_pay_for_shared_steps_once():
    plan = fake_plan((Stage((1e15, 3e15), "all", "grid"),))
    trunks = {}
    for cell in plan.expansion.cells:
        trunks.setdefault(cell.trunk, []).append(cell)
    both = next(sorted(cells, key=lambda c: c.steps) for cells in trunks.values() if len(cells) == 2)
    small, large = both
    assert plan.estimates[small.id].new_steps == small.steps
    assert plan.estimates[large.id].new_steps == large.steps - small.decay_start


def test_steps_are_shared_with_trunks_that_are_here():
    """Records that came from another machine came without their trunks."""
    plan = fake_plan((Stage((1e15, 3e15), "all", "grid"),))
    small = plan.expansion.cells[0]
    large = next(c for c in plan.expansion.cells if c.trunk == small.trunk and c.budget > small.budget)

    def new_steps(*finished, **trunks):
        made = make_plan(plan.expansion, find_device("H200"), finished=finished, trunk_steps=trunks)
        return made.estimates[large.id].new_steps

    assert new_steps() == large.steps - small.decay_start
    assert new_steps(small.id) == large.steps
    assert new_steps(small.id, **{small.trunk: 7}) == large.steps - 7
    assert new_steps(small.id, **{small.trunk: 10**9}) == large.steps - large.decay_start


def test_a_reason_that_drops_cells_is_said_once_with_every_size_budget_and_number():
    few, short = "{} tokens per parameter, fewer than 2", "{} steps of 65536 tokens, fewer than 40"
    reasons = (
        ("10m", 1e15, Reason(few, "1.2")),
        ("25m", 1e15, Reason(few, "0.135")),
        ("25m", 3e15, Reason(few, "1.4e-01")),
        ("124m", 1e15, Reason(short, "19")),
        ("best", 1e15, Reason("no cell of power at 1e+15 FLOPs finished")),
    )
    cells = fake_plan((Stage((1e15,), "all", "grid"),)).expansion.cells
    expansion = Expansion(cells, (), tuple(Dropped("power", size, 65536, budget, why) for size, budget, why in reasons))
    assert dropped(expansion) == [
        "dropped: power 10m, 25m at 1e+15; 25m at 3e+15 FLOPs: 1.2, 0.135; 1.4e-01 tokens per parameter, fewer than 2",
        "dropped: power 124m at 1e+15 FLOPs: 19 steps of 65536 tokens, fewer than 40",
        "dropped: power best at 1e+15 FLOPs: no cell of power at 1e+15 FLOPs finished",
    ]
    elsewhere = Expansion(cells, (), (Dropped("power", "1m", 8192, 1e15, Reason("{} steps", "19")),))
    assert dropped(elsewhere) == ["dropped: power 1m at 1e+15 FLOPs, context 8192: 19 steps"]


def test_what_waits_takes_a_line_for_each_stage_and_budget():
    stages = (Stage((1e15,), "all", "grid"), Stage((3e15, 1e16), "frontier", "tuned"))
    expansion = fake_plan(stages).expansion
    grids = Counter(c.mixer for c in expansion.cells)
    most = {(p.mixer, p.budget): len(p.candidates) for p in expansion.pending}
    assert len(most) == len(expansion.pending) == 8
    assert later(expansion) == [
        f"later: sizes=frontier at {budget:.3g} FLOPs, at most {sum(most[m, budget] for m in grids)} cells: "
        + ", ".join(f"{m} {most[m, budget]} after {grids[m]} others" for m in grids)
        for budget in (3e15, 1e16)
    ]


def test_a_plan_that_no_terminal_shows_has_a_line_for_each_thing_it_says(tmp_path, capsys):
    assert cli.main(["plan", "flops_65k", "--directory", str(tmp_path), "--device", "H100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    recipe = load_recipe("flops_65k")
    expansion = Expander(recipe, ComposedCatalog(recipe), {}).expand()
    said = [line for line in lines if line.startswith(("later", "dropped"))]
    assert said == later(expansion) + dropped(expansion)
    assert len(said) < (len(expansion.pending) + len(expansion.dropped)) / 2
    assert any(re.fullmatch(r"\d+ cells, 0 finished .* FLOPs to go, .*\)", line) for line in lines)


def test_a_plan_has_the_cells_that_run_has_and_says_which_a_device_is_too_small_for(tmp_path, capsys):
    recipe = dataclasses.replace(small_recipe(), ladder={"3b": Variant(("model=3b",)), "1m": Variant(("model=1m",))})
    recipe = dataclasses.replace(recipe, stages=(Stage((1e19,), "all", "grid"),))
    state = SweepState(recipe, ComposedCatalog(recipe), SweepPaths(tmp_path))
    expansion = state.expand()
    assert {c.size for c in expansion.cells} == {"3b", "1m"}
    for device, small in (("L4", True), ("H200", False), ("cpu", False)):
        plan = make_plan(expansion, find_device(device))
        lines = [str(line) for line in render(plan, 160)]
        said = [line for line in lines if line.startswith("too large: power 3b needs at least ")]
        assert bool(said) is small
        assert len([line for line in lines if line.startswith("too large")]) == (len(recipe.mixers) if small else 0)
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(recipe)))))
    assert cli.main(["plan", str(path), "--directory", str(tmp_path), "--device", "L4", "--json"]) == 0
    assert {json.loads(line)["cell"] for line in capsys.readouterr().out.splitlines()} == {
        c.id for c in expansion.cells
    }


def shown(plan, width=160, **options):
    """The title of a plan's only table, its header and its rows."""
    from rich.console import Console

    title, table, *_ = render(plan, width, **options)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(title, table, sep="\n")
    return [line.rstrip() for line in capture.get().splitlines()]


def shipped_plan(name, finished=lambda cell: False):
    recipe = load_recipe(name)
    expansion = Expander(recipe, ComposedCatalog(recipe), {}).expand()
    return make_plan(expansion, find_device("H100"), finished={c.id for c in expansion.cells if finished(c)})


def test_finished_cells_of_a_size_share_a_row_unless_all_are_asked_for():
    cells = shipped_plan("smoke").expansion.cells
    grid = [c for c in cells if (c.mixer, c.size) == ("power", "xs")]
    plan = shipped_plan("smoke", lambda c: c in (*grid, cells[-1]))
    pending = sum(len(p.candidates) for p in plan.expansion.pending)
    _, _, *rows = shown(plan)
    assert len(rows) == len(cells) - len(grid) + 1 + pending
    (together,) = (r.split() for r in rows if r.endswith(f" {len(grid)} cells"))
    assert together[:5] == ["2e+10", "power", "xs", f"{len(grid)}", "rates"]
    assert f"{grid[0].steps}" in together
    assert [r.split()[-2] for r in rows if r.endswith(cells[-1].id)] == ["done"]
    assert sum(r.endswith("at most") for r in rows) == pending
    _, _, *every = shown(plan, every=True)
    assert {c.id for c in cells} <= {r.split()[-1] for r in every}
    assert len(every) == len(as_rows(plan)) == len(cells) + pending


def test_a_narrow_terminal_is_spared_columns_and_told_which():
    plan = shipped_plan("flops_65k")
    shares, cell = {"weights", "head", "pairs", "state"}, {"cell"}
    for width, absent in ((160, set()), (100, shares), (80, shares | cell)):
        title, *table = shown(plan, width)
        assert len(table) == 1 + len(as_rows(plan)), "no row takes two lines"
        assert not any("…" in line for line in table)
        assert (shares | cell | {"batch", "tokens"}) - set(table[0].split()) == absent
        assert {name for name in shares | cell if name in title} == absent


def test_finished_cells_cost_nothing_more():
    plan = fake_plan((Stage((1e15,), "all", "grid"),))
    done = {c.id for c in plan.expansion.cells}
    after = fake_plan((Stage((1e15,), "all", "grid"),), finished=done)
    assert after.hours == 0
    assert "finished" in summary(after)


def test_mixers_without_kernels_are_left_out_of_the_sum_until_measured():
    stages = (Stage((1e15,), "all", "grid"),)
    plan = fake_plan(stages)
    linear = [c for c in plan.expansion.cells if c.mixer == "linear"]
    assert plan.unpriced == linear
    assert plan.hours > 0
    assert unpriced(plan).endswith(f": {len(linear)} cells of linear (deg is 1, and the kernels are written for deg 2)")
    # The rates of one count for all of its mixer.
    record = dataclasses.replace(fake_record(linear[0]), seconds=100.0, device="NVIDIA H200")
    measured = fake_plan(stages, [record])
    assert not measured.unpriced
    assert measured.hours > plan.hours


def test_a_recipe_is_priced_on_the_device_that_it_asks_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pricing, "gpu_here", lambda: None)
    here = ["--directory", str(tmp_path)]
    assert cli.main(["plan", "smoke", *here]) == 0
    output = capsys.readouterr().out
    assert "time on cpu unknown" in output
    assert "not in the sum" not in output
    assert cli.main(["plan", "flops_65k", *here]) == 0
    output = capsys.readouterr().out
    assert "H200-hours" in output
    assert "cells of linear (deg is 1, and the kernels are written for deg 2)" in output.replace("\n", " ")
    recipe = load_recipe("smoke")
    model = ComposedCatalog(recipe).config("power", "xs", 256).model
    executed = {device: model_cost(model, 256, device).flops_per_token["executed"] for device in ("cpu", "cuda")}
    assert ComposedCatalog(recipe).cost("power", "xs", 256).flops_per_token["executed"] == executed["cpu"]


def test_a_plan_is_priced_for_the_gpu_here_or_the_records_device_and_says_which_and_why():
    cell = fake_plan((Stage((1e15,), "all", "grid"),)).expansion.cells[0]
    names = ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "cpu", "cpu", "cpu")
    records = [dataclasses.replace(fake_record(cell), device=name) for name in names]
    device, why = choose_device(records, "NVIDIA L40")
    assert (device.name, device.memory_gib, why) == ("L40", 44.0, "the GPU here")
    for gpu in (None, "NVIDIA T4"):
        device, why = choose_device(records, gpu)
        assert (device.name, device.memory_gib, why) == ("A100", 39.0, "the device of most records")
    device, why = choose_device(records[3:], None)
    assert device == find_device("H200")
    plan = make_plan(Expander(synthetic.recipe(), FakeCatalog(), {}).expand(), device, chosen=why)
    assert f"H200-hours ({why}; --device prices another; ~ assumed" in summary(plan)


@pytest.mark.parametrize(
    ("driver_name", "name", "memory_gib"),
    [
        ("NVIDIA GH200 480GB", "GH200", None),
        ("NVIDIA H200", "H200", 139.0),
        ("NVIDIA H100 80GB HBM3", "H100", 79.0),
        ("NVIDIA H100 NVL", "H100 NVL", 93.0),
        ("NVIDIA A100-SXM4-80GB", "A100", 79.0),
        ("NVIDIA A100-PCIE-40GB", "A100", 39.0),
        ("NVIDIA A100-SXM-64GB", "A100", 63.0),
        ("NVIDIA L4", "L4", 22.0),
    ],
)
def test_a_driver_s_name_says_the_device_and_its_memory(driver_name, name, memory_gib):
    device = pricing.recognised(driver_name)
    assert (device.name, device.memory_gib) == (name, memory_gib)
    assert device.peak_flops == find_device(name).peak_flops


def test_devices_that_are_named_alike_are_not_recognised():
    for driver_name in ("NVIDIA GB200", "NVIDIA RTX A4000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"):
        assert pricing.recognised(driver_name) is None


def test_the_command_asks_the_machine_and_its_records_for_the_device(tmp_path, capsys, monkeypatch):
    recipe = load_recipe("flops_65k")
    cell = Expander(recipe, ComposedCatalog(recipe), {}).expand().cells[0]
    h100 = dataclasses.replace(fake_record(cell), device="NVIDIA H100 80GB HBM3")
    RecordStore(tmp_path / "flops_65k" / "records").append(h100)
    for gpu, options, name, why in (
        (None, [], "H100", "(the device of most records; "),
        ("NVIDIA A100-SXM4-80GB", [], "A100", "(the GPU here; "),
        ("NVIDIA A100-SXM4-80GB", ["--device", "B200"], "B200", "(~ "),
    ):
        monkeypatch.setattr(pricing, "gpu_here", lambda gpu=gpu: gpu)
        assert cli.main(["plan", "flops_65k", "--directory", str(tmp_path), *options]) == 0
        assert f"{name}-hours {why}" in capsys.readouterr().out.replace("\n", " ")


def test_without_a_known_rate_there_is_no_time():
    plan = fake_plan((Stage((1e15,), "all", "grid"),), device="cpu")
    assert plan.hours is None
    assert "unknown" in summary(plan)


def test_a_batch_that_becomes_another_is_said_once():
    recipe = synthetic.recipe(batch_tokens=Rule(100_000), limits=Limits(min_steps=20), warmup_steps=5)
    expansion = Expander(recipe, FakeCatalog(), {}).expand()
    assert rounded_batches(recipe, expansion) == "batch_tokens=100000 becomes 131072 (2 sequences of 65536)"
    whole = dataclasses.replace(recipe, batch_tokens=Rule(131072))
    assert rounded_batches(whole, Expander(whole, FakeCatalog(), {}).expand()) is None
    grown = dataclasses.replace(recipe, batch_tokens=Rule(100_000, reference_parameters=1e6, exponent=0.5))
    line = rounded_batches(grown, Expander(grown, FakeCatalog(), {}).expand())
    assert line.endswith("others")
    assert "\n" not in line


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'H200'"):
        find_device("H2000")
    assert find_device("h200").memory_gib > 100
    assert math.isclose(find_device("A100").peak_flops, 312e12)
