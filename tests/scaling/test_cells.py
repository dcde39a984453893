import dataclasses
import re

import pytest

from powertrain.scaling.catalog import ComposedCatalog
from powertrain.scaling.cells import Expander, infeasible, least_memory, make_cell
from powertrain.scaling.recipe import Limits, Recipe, Rule, Stage
from powertrain.schema import ConfigError, build

from . import synthetic
from .fakes import FakeCatalog, fake_record
from .test_recipe import minimal

STAGES = (
    Stage((1e15,), "all", "grid"),
    Stage((3e15, 1e16), "frontier", "tuned"),
    Stage((1e16,), "best", "tuned", seeds=(1, 2)),
)


def staged(**changes):
    return synthetic.recipe(stages=STAGES, limits=Limits(min_steps=20), warmup_steps=5, **changes)


def expand(recipe, outcomes, failed=frozenset()):
    return Expander(recipe, FakeCatalog(), outcomes, failed).expand()


def run_all(recipe, failed=frozenset(), loss=lambda cell: fake_record(cell).loss):
    """Finish whatever is decided until nothing more follows."""
    outcomes = {}
    while True:
        expansion = expand(recipe, outcomes, failed)
        missing = [c for c in expansion.cells if c.id not in outcomes and c.id not in failed]
        if not missing:
            return expansion, outcomes
        outcomes.update((c.id, loss(c)) for c in missing)


def test_a_cell_is_the_hash_of_its_resolved_config():
    recipe = staged()
    cell = make_cell(recipe, FakeCatalog(), "power", "3m", 65536, 1e15)
    assert cell.id == cell.config.resolved_run_id()
    assert cell.id.startswith("synthetic-")
    again = make_cell(recipe, FakeCatalog(), "power", "3m", 65536, 1e15)
    assert again.id == cell.id
    elsewhere = dataclasses.replace(
        cell.config,
        paths=dataclasses.replace(cell.config.paths, runs="/elsewhere"),
        logger=dataclasses.replace(cell.config.logger, wandb=True),
    )
    assert elsewhere.resolved_run_id() == cell.id, "where and how it is logged does not make another cell"
    others = [
        make_cell(recipe, FakeCatalog(), "softmax", "3m", 65536, 1e15),
        make_cell(recipe, FakeCatalog(), "power", "1m", 65536, 1e15),
        make_cell(recipe, FakeCatalog(), "power", "3m", 65536, 3e15),
        make_cell(recipe, FakeCatalog(), "power", "3m", 65536, 1e15, seed=1),
        make_cell(recipe, FakeCatalog(), "power", "3m", 65536, 1e15, 0, 2.0),
    ]
    assert len({cell.id, *(o.id for o in others)}) == 6


def test_a_cell_spends_its_budget_within_one_step():
    cell = make_cell(staged(), FakeCatalog(), "softmax", "8m", 65536, 1e16)
    spent = cell.tokens * cell.cost.flops_per_token["algorithmic"]
    assert 0 <= 1e16 - spent < cell.batch_tokens * cell.cost.flops_per_token["algorithmic"]
    assert cell.config.budget.kind == "steps"
    assert cell.config.budget.value == cell.steps


def test_the_convention_decides_how_long_a_budget_lasts():
    steps = {
        c: make_cell(staged(convention=c), FakeCatalog(), "softmax", "8m", 65536, 1e16).steps
        for c in ("algorithmic", "executed", "algorithmic, no head")
    }
    assert steps["executed"] < steps["algorithmic"] < steps["algorithmic, no head"]


def test_budgets_share_a_trunk_and_learning_rates_do_not():
    recipe, catalog = staged(), FakeCatalog()
    small, large = (make_cell(recipe, catalog, "power", "3m", 65536, b) for b in (1e15, 3e15))
    assert small.trunk == large.trunk
    assert small.id != large.id
    assert small.decay_start < large.decay_start
    assert make_cell(recipe, catalog, "power", "3m", 65536, 1e15, 0, 2.0).trunk != small.trunk
    assert make_cell(recipe, catalog, "power", "3m", 65536, 1e15, 1).trunk != small.trunk


def test_at_first_only_the_grid_is_decided_and_the_rest_is_priced():
    expansion = expand(staged(), {})
    assert {c.budget for c in expansion.cells} == {1e15}
    assert all(p.candidates for p in expansion.pending)
    assert {(p.budget, p.mixer) for p in expansion.pending} == {(b, m) for b in (3e15, 1e16) for m in staged().mixers}


def test_what_is_awaited_is_counted():
    recipe = staged()
    awaited = {(p.choice, p.awaits) for p in expand(recipe, {}).pending if p.mixer == "power" and p.budget == 3e15}
    cells = [c for c in expand(recipe, {}).cells if c.mixer == "power"]
    assert awaited == {("sizes=frontier", tuple(c.id for c in cells))}
    outcomes = {c.id: fake_record(c).loss for c in cells[:-1]}
    pending = expand(recipe, outcomes).pending
    assert {p.awaits for p in pending if p.mixer == "power" and p.budget == 3e15} == {(cells[-1].id,)}


def test_every_mixer_gets_the_same_grid_on_every_feasible_size():
    expansion = expand(staged(), {})
    tried = {}
    for c in expansion.cells:
        tried.setdefault((c.mixer, c.size), set()).add(c.learning_rate_factor)
    assert set(map(frozenset, tried.values())) == {frozenset({0.5, 1.0, 2.0})}


def test_later_stages_follow_the_results():
    expansion, _ = run_all(staged())
    assert not expansion.pending
    later = [c for c in expansion.cells if c.budget > 1e15]
    assert {c.learning_rate_factor for c in later} == {1.0}, "the best factor of the grid, for every mixer"
    sizes = list(synthetic.SIZES)
    for mixer in staged().mixers:
        frontier = [c for c in later if c.mixer == mixer and c.budget == 3e15]
        rungs = sorted(sizes.index(c.size) for c in frontier)
        assert len(rungs) == 3
        assert rungs == list(range(rungs[0], rungs[-1] + 1))
        seeds = [c for c in expansion.cells if c.mixer == mixer and c.seed > 0]
        at = [c for c in expansion.cells if c.mixer == mixer and c.budget == 1e16 and c.seed == 0]
        best = min(at, key=lambda c: fake_record(c).loss)
        assert {(c.size, c.seed) for c in seeds} == {(best.size, 1), (best.size, 2)}


def test_a_frontier_takes_the_nearest_rungs_that_the_limits_allow():
    limits = Limits(min_steps=20, max_tokens_per_parameter=20.0)
    stages = (Stage((1e15,), "all", "grid"), Stage((3e15,), "frontier", "tuned", rungs=2))
    recipe = synthetic.recipe(stages=stages, limits=limits, warmup_steps=5)
    # The smallest is always the best, so that the rungs around the next optimum are those with too many tokens.
    expansion, _ = run_all(recipe, loss=lambda cell: cell.cost.parameters * 1e-6)
    expander = Expander(recipe, FakeCatalog(), {})
    for mixer in recipe.mixers:
        feasible = expander.feasible_sizes(mixer, 65536, 3e15)
        taken = [c.size for c in expansion.cells if c.mixer == mixer and c.budget == 3e15]
        assert taken == feasible[:2]
        assert feasible[0] != next(iter(recipe.ladder))


def test_a_tuned_rate_is_that_of_its_own_mixer():
    favourite = {"power": 2.0, "softmax": 0.5, "linear": 1.0, "window": 2.0}

    def loss(cell):
        return fake_record(cell).loss - 0.2 * (cell.learning_rate_factor == favourite[cell.mixer])

    expansion, _ = run_all(staged(), loss=loss)
    for cell in expansion.cells:
        if cell.budget > 1e15:
            assert cell.learning_rate_factor == favourite[cell.mixer]


def test_factors_try_rates_around_the_tuned_one_and_later_stages_take_the_best():
    stages = (
        Stage((1e15,), "all", "grid"),
        Stage((3e15,), "frontier", "tuned", factors=(0.5, 1.0)),
        Stage((3e15,), "best", "tuned", seeds=(1,)),
        Stage((1e16,), "frontier", "tuned"),
    )
    recipe = synthetic.recipe(stages=stages, limits=Limits(min_steps=20), warmup_steps=5)

    def loss(cell):
        # At 1e15 the grid's 1 is best; with more tokens power wants half of it, below the grid's 0.5 even.
        favourite = 0.25 if cell.mixer == "power" and cell.budget > 1e15 else 0.5 if cell.mixer == "power" else 1.0
        return cell.cost.parameters * 1e-9 + abs(cell.learning_rate_factor - favourite)

    priced = [p for p in expand(recipe, {}).pending if p.budget == 3e15 and p.stage == 1]
    assert {len(p.candidates) for p in priced} == {6}, "two rates on each of three rungs, at most"
    expansion, _ = run_all(recipe, loss=loss)
    for mixer in recipe.mixers:
        tuned = {0.25, 0.5} if mixer == "power" else {0.5, 1.0}
        best = 0.25 if mixer == "power" else 1.0
        cells = [c for c in expansion.cells if c.mixer == mixer]
        sizes = {c.size for c in cells if c.budget == 3e15}
        first = {(c.size, c.learning_rate_factor) for c in cells if c.budget == 3e15 and c.seed == 0}
        assert first == {(size, factor) for size in sizes for factor in tuned}
        assert {c.learning_rate_factor for c in cells if c.seed == 1 or c.budget == 1e16} == {best}


def test_what_is_tuned_at_a_budget_comes_from_all_stages_that_tuned_there():
    stages = (
        Stage((1e15,), "all", "grid"),
        Stage((3e15,), "frontier", "tuned", factors=(0.25, 1.0)),
        Stage((3e15,), "frontier", "tuned", rungs=1, factors=(0.5, 1.0)),
        Stage((3e15,), "best", "tuned", seeds=(1,)),
    )
    batches = Rule(65536, grid=(1.0, 2.0))
    recipe = synthetic.recipe(stages=stages, limits=Limits(min_steps=20), warmup_steps=5, batch_tokens=batches)

    def loss(cell):
        # The second stage finds 0.25, the third half of that; twice the batch is better than the rule's.
        favourite = 1.0 if cell.budget < 3e15 else 0.125
        return cell.cost.parameters * 1e-9 + abs(cell.learning_rate_factor - favourite) + 0.1 / cell.batch_factor

    expansion, _ = run_all(recipe, loss=loss)
    for mixer in recipe.mixers:
        cells = [c for c in expansion.cells if c.mixer == mixer and c.budget == 3e15]
        assert {c.batch_factor for c in cells} == {2.0}, "the factors are of the learning rate alone"
        assert {c.learning_rate_factor for c in cells if c.seed == 1} == {0.125}
        assert {c.learning_rate_factor for c in cells if c.seed == 0} == {0.25, 1.0, 0.125}


def test_a_failed_cell_does_not_hold_up_the_rest():
    first = expand(staged(), {})
    broken = {c.id for c in first.cells if c.mixer == "power" and c.learning_rate_factor == 1.0}
    expansion, outcomes = run_all(staged(), failed=broken)
    assert not expansion.pending
    assert not broken & set(outcomes)
    later = {c.learning_rate_factor for c in expansion.cells if c.mixer == "power" and c.budget > 1e15}
    assert later <= {0.5, 2.0}
    everything = {c.id for c in first.cells if c.mixer == "power"}
    expansion, _ = run_all(staged(), failed=everything)
    assert any("no cell of power" in str(d.reason) for d in expansion.dropped)


def test_the_expansion_does_not_depend_on_the_order_of_results():
    _, outcomes = run_all(staged())
    backwards = dict(reversed(outcomes.items()))
    assert [c.id for c in expand(staged(), outcomes).cells] == [c.id for c in expand(staged(), backwards).cells]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(min_steps=10**6), "fewer than 1000000"),
        (Limits(min_steps=20, max_tokens=1e6), "of the data"),
        (Limits(min_steps=20, min_tokens_per_parameter=1e6), "tokens per parameter, fewer"),
        (Limits(min_steps=20, max_tokens_per_parameter=1e-3), "tokens per parameter, more"),
        (Limits(min_steps=20, memory_gib=0.01), "GiB"),
    ],
)
def test_an_infeasible_cell_is_dropped_with_the_reason(limits, words):
    recipe = synthetic.recipe(limits=limits, warmup_steps=5)
    cell = make_cell(recipe, FakeCatalog(), "power", "3m", 65536, 1e15)
    assert words in str(infeasible(recipe, cell))
    expansion = Expander(recipe, FakeCatalog(), {}).expand()
    assert not any(c.mixer == "power" and c.size == "3m" and c.budget == 1e15 for c in expansion.cells)
    assert any(words in str(d.reason) and d.size == "3m" for d in expansion.dropped)


@pytest.mark.parametrize(
    ("section", "keys", "budgets", "words"),
    [
        ("mixers", ("power", "again"), (1e12,), "power 1m at 1e+12 FLOPs and again 1m at 1e+12 are the same run"),
        ("ladder", ("1m", "same"), (1e12,), "power 1m at 1e+12 FLOPs and power same at 1e+12 are the same run"),
        (None, (), (1e12, 1.00001e12), "power 1m at 1e+12 FLOPs and power 1m at 1.00001e+12 are the same run"),
    ],
)
def test_what_is_the_same_run_under_two_names_is_refused(section, keys, budgets, words):
    values = minimal(stages=[{"budgets": list(budgets), "sizes": "all", "learning_rates": "grid"}])
    if section:
        values[section] = {**values[section], keys[1]: values[section][keys[0]]}
    recipe = build(Recipe, values)
    with pytest.raises(ConfigError, match=re.escape(words)):
        Expander(recipe, ComposedCatalog(recipe), {}).expand()


def test_memory_counts_weights_optimizer_and_activations():
    recipe = synthetic.recipe()
    cell = make_cell(recipe, FakeCatalog(), "power", "3m", 65536, 1e15)
    model = cell.config.model
    expected = 16 * cell.cost.parameters_total + 34 * model.d_model * model.n_layers * 65536
    assert least_memory(cell) == expected


def test_batches_are_whole_sequences():
    recipe = synthetic.recipe(batch_tokens=Rule(100_000, grid=(1.0, 3.0)))
    cells = [make_cell(recipe, FakeCatalog(), "power", "3m", 65536, 1e15, 0, 1.0, f) for f in (1.0, 3.0)]
    assert [c.batch_tokens for c in cells] == [2 * 65536, 5 * 65536]
