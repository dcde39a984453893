import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from powertrain.config import override_keys, share_dir
from powertrain.scaling.catalog import ComposedCatalog
from powertrain.scaling.cells import make_cell
from powertrain.scaling.recipe import DECIDED, Recipe, Rule, load_recipe
from powertrain.scaling.records import RecordStore
from powertrain.schema import ConfigError, build

from . import synthetic

SHIPPED = sorted(p.stem for p in share_dir("recipes").glob("*.yaml"))


def minimal(**changes):
    values = {
        "name": "x",
        "question": "?",
        "contexts": [128],
        "mixers": {"power": {"overrides": ["mixer=power"]}, "softmax": {"overrides": ["mixer=softmax"]}},
        "ladder": {"1m": {"overrides": ["model=1m"]}},
        "subject": "power",
        "baseline": "softmax",
        "stages": [{"budgets": [1e12], "sizes": "all", "learning_rates": "grid"}],
        "learning_rate": {"value": 1e-3},
        "batch_tokens": {"value": 1024},
    }
    return {**values, **changes}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": [1e12]}, ["budget"]),
        ({"learning_rate": {"value": 1e-3, "grids": [1]}}, ["learning_rate.grids", "learning_rate.grid"]),
        ({"figures": ["envelop"]}, ["figures", "envelope"]),
        ({"subject": "powr"}, ["powr", "power"]),
        ({"baseline": "power"}, ["nothing to compare"]),
        ({"name": "../x"}, ["../x"]),
        ({"contexts": []}, ["contexts"]),
        ({"stages": [{"budgets": [1e12], "sizes": "frontier", "learning_rates": "grid"}]}, ["first stage"]),
        (
            {"convention": "algorithmics"},
            ["convention", "'algorithmic, no head', 'executed, no head'"],
        ),
        ({"decay_fraction": 1.0}, ["decay_fraction"]),
        (
            {"stages": [{"budgets": [1e12], "sizes": "all", "learning_rates": "grid", "factors": [0.5, 1.0]}]},
            ["factors=[0.5, 1.0]", "the grid has its own"],
        ),
        (
            {"stages": [*minimal()["stages"], {"budgets": [1e12], "sizes": "best", "factors": [1.0, 0.5]}]},
            ["factors=[1.0, 0.5]", "rising"],
        ),
        ({"warmup_steps": 90}, ["warmup_steps=90", "min_steps=100"]),
        ({"batch_tokens": {"value": 1024, "grid": [2, 1]}}, ["grid=[2.0, 1.0]"]),
        ({"analysis": {"confidence": 95}}, ["confidence=95"]),
        ({"overrides": ["trainer.max_steps=10"]}, ["trainer.max_steps=10", "stages.budgets"]),
        ({"overrides": ["+optim.lr=1e-3"]}, ["+optim.lr=1e-3", "give learning_rate"]),
        ({"overrides": ["schedule=cosine"]}, ["schedule=cosine", "decay_fraction"]),
        ({"ladder": {"1m": {"overrides": ["model=1m", "trainer.global_batch_tokens=2048"]}}}, ["give batch_tokens"]),
        ({"contexts": [128, 128]}, ["contexts=[128, 128]", "each once"]),
        ({"figures": ["gain", "gain"]}, ["figures=['gain', 'gain']", "each once"]),
        ({"stages": [{"budgets": [math.inf], "sizes": "all", "learning_rates": "grid"}]}, ["budgets=[inf]"]),
        ({"stages": [{"budgets": [math.nan], "sizes": "all", "learning_rates": "grid"}]}, ["budgets=[nan]"]),
        ({"learning_rate": {"value": math.nan}}, ["value=nan"]),
        ({"learning_rate": {"value": 1e-3, "exponent": math.inf}}, ["exponent=inf"]),
        ({"learning_rate": {"value": 1e-3, "grid": [math.nan]}}, ["grid=[nan]"]),
        ({"batch_tokens": {"value": math.inf}}, ["value=inf"]),
        ({"limits": {"max_tokens": math.nan}}, ["max_tokens=nan"]),
        ({"limits": {"memory_gib": -1}}, ["memory_gib=-1"]),
        (
            {"limits": {"min_tokens_per_parameter": 50, "max_tokens_per_parameter": 10}},
            ["min_tokens_per_parameter=50", "max_tokens_per_parameter=10"],
        ),
        ({"analysis": {"huber_delta": math.nan}}, ["huber_delta=nan"]),
        ({"mixers": {**minimal()["mixers"], "po/wer": {"overrides": ["mixer=power"]}}}, ["mixers", "'po/wer'"]),
        ({"ladder": {"a-b": {"overrides": ["model=1m"]}}}, ["ladder", "'a-b'"]),
        (
            {"ladder": {"a b": {"overrides": ["model=1m"]}, "a_b": {"overrides": ["model=10m"]}}},
            ["'a b' and 'a_b'", "same files"],
        ),
        (
            {"mixers": {**minimal()["mixers"], "softmax": {"overrides": ["mixer=softmax", "seed=1"]}}},
            ["seed=1", "stages.seeds"],
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_what_was_given_and_what_is_allowed(changes, words):
    with pytest.raises(ConfigError) as error:
        build(Recipe, minimal(**changes))
    for word in words:
        assert word in str(error.value)


def test_every_key_that_a_sweep_decides_is_one_that_it_replaces():
    assert {key for key in DECIDED if "." in key or key in ("name", "run_id", "seed")} <= set(override_keys())
    recipe = build(Recipe, minimal())
    cell = make_cell(recipe, ComposedCatalog(recipe), "power", "1m", 128, 1e12)
    given = ["name=other", "run_id=other", "seed=7", "optim.lr=0.7", "schedule.kind=cosine", "schedule.warmup=7"]
    given += ["schedule.decay=7", "schedule.unit=flops", "trainer.max_steps=7", "trainer.context_length=256"]
    given += ["trainer.global_batch_tokens=512", "data.max_val_tokens=7", "logger.wandb_group=other"]
    given += ["logger.wandb_job_type=other", "logger.wandb_tags=[other]"]
    replaced = dataclasses.replace(recipe)
    # Past the check that refuses them.
    object.__setattr__(replaced, "overrides", tuple(given))
    assert make_cell(replaced, ComposedCatalog(replaced), "power", "1m", 128, 1e12).config == cell.config


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"budgets": [3e12], "sizes": "best"}], "needs an earlier stage there"),
        ([{"budgets": [3e11], "sizes": "frontier"}], "needs a smaller budget before"),
        ([{"budgets": [3e11], "sizes": "all"}], "needs a grid there or below"),
    ],
)
def test_a_stage_that_depends_on_nothing_is_refused(stages, words):
    with pytest.raises(ConfigError, match=words):
        build(Recipe, minimal(stages=[*minimal()["stages"], *stages]))


def test_a_file_that_does_not_parse_or_exist_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    for content in (b"name: [x\n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken\.yaml: cannot be read as YAML"):
            load_recipe(str(path))
    with pytest.raises(ConfigError, match="did you mean 'smoke'"):
        load_recipe("smokee")


def test_a_rule_is_a_power_law_of_the_parameters():
    rule = Rule(4e-3, reference_parameters=1e6, exponent=-0.5)
    assert rule.at(4e6, 2.0) == pytest.approx(4e-3)


def test_a_rule_whose_value_is_no_float_says_at_which_size():
    with pytest.raises(ConfigError, match=r"value=0\.001 and exponent=1000 give e\^2296 at 1e\+08 parameters"):
        Rule(1e-3, exponent=1000).at(1e8)


def test_the_fingerprint_follows_the_content():
    assert synthetic.recipe().fingerprint() == synthetic.recipe().fingerprint()
    assert synthetic.recipe().fingerprint() != synthetic.recipe(warmup_steps=51).fingerprint()


@pytest.mark.parametrize(
    ("name", "mixer", "size", "context", "budget", "expected"),
    [
        ("smoke", "power", "xs", 256, 2e10, ("smoke-f879e08f", 232, 118784)),
        ("smoke", "softmax", "m", 256, 2e10, ("smoke-f2e4c8b7", 21, 10752)),
        ("smoke", "window", "m", 256, 2e10, ("smoke-e13890c4", 24, 12288)),
        ("flops_65k", "power", "0.05m", 65536, 1e15, ("flops_65k-4dad6028", 6288, 412090368)),
        ("flops_65k", "softmax", "0.05m", 65536, 1e15, ("flops_65k-63dffd00", 488, 31981568)),
        ("flops_65k", "linear", "350m", 65536, 1e15, ("flops_65k-3d93917c", 8, 524288)),
        ("flops_65k", "window", "350m", 65536, 1e15, ("flops_65k-00d3b657", 6, 393216)),
    ],
)
def test_cells_of_shipped_recipes_keep_their_ids(name, mixer, size, context, budget, expected):
    """Whoever changes these on purpose makes everybody's finished cells of the recipe start again."""
    recipe = load_recipe(name)
    cell = make_cell(recipe, ComposedCatalog(recipe), mixer, size, context, budget)
    assert (cell.id, cell.steps, cell.tokens) == expected


def test_a_recipe_may_spread_the_gates(tmp_path):
    values = minimal()
    values["mixers"]["spread"] = {"overrides": ["mixer=power", "mixer.gate_init=[0.9,0.9999]"]}
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(values, default_flow_style=True))
    recipe = load_recipe(str(path))
    catalog = ComposedCatalog(recipe)
    spread, power = (make_cell(recipe, catalog, mixer, "1m", 128, 1e12) for mixer in ("spread", "power"))
    assert spread.config.model.mixer.gate_init == (0.9, 0.9999)
    assert spread.steps == power.steps
    assert spread.id == make_cell(recipe, ComposedCatalog(recipe), "spread", "1m", 128, 1e12).id != power.id


def test_a_dry_run_is_not_for_a_sweep():
    recipe = load_recipe("smoke")
    recipe = dataclasses.replace(recipe, overrides=(*recipe.overrides, "cluster.dry_run=true"))
    with pytest.raises(ConfigError, match="dry_run=true is not for a sweep"):
        ComposedCatalog(recipe).config("power", "xs", 256)


def committed():
    return sorted(path.parent for path in (Path(__file__).parents[2] / "sweeps").glob("*/records"))


@pytest.mark.parametrize("directory", committed(), ids=lambda path: path.name)
def test_committed_records_are_of_cells_that_their_recipe_still_makes(directory):
    """A formula of FLOPs, a rule or a default that moves would make every finished cell start again, unseen."""
    recipe = load_recipe(directory.name)
    catalog = ComposedCatalog(recipe)
    for r in RecordStore(directory / "records").read():
        cell = make_cell(
            recipe, catalog, r.mixer, r.size, r.context, r.budget, r.seed, r.learning_rate_factor, r.batch_factor
        )
        assert (cell.id, cell.steps, cell.tokens) == (r.cell, r.steps, r.tokens)
