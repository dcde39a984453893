import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D
from scipy import stats

from powertrain.scaling.analysis import analyse
from powertrain.scaling.compare import Gain, GainInterval, compared
from powertrain.scaling.drawing import Pens
from powertrain.scaling.figures import draw_envelope, draw_gain, draw_isoflop, draw_perplexity
from powertrain.scaling.isoflop import MinimumInterval
from powertrain.scaling.plan import Coverage
from powertrain.scaling.recipe import Analysis
from powertrain.scaling.records import CurvePoint, Start
from powertrain.scaling.report import build, page, summary, write

from . import synthetic
from .test_compare import published_records

# Small, so that a report takes seconds; intervals are tested elsewhere.
QUICK = Analysis(bootstrap=200, law_bootstrap=20)
TWO = {m: synthetic.LAWS[m] for m in ("power", "softmax")}
FIGURES = ("envelope", "isoflop", "perplexity", "position", "seconds", "gain", "state_size")


def recipe(**changes):
    mixers = {m: v for m, v in synthetic.recipe().mixers.items() if m in TWO}
    return synthetic.recipe(**{"mixers": mixers, "analysis": QUICK, "figures": FIGURES, **changes})


def records(**changes):
    return synthetic.make_records(**{"laws": TWO, "documents": 40, "seeds": (0, 1), "rng_seed": 2, **changes})


@pytest.fixture(scope="module")
def files():
    return build(recipe(), records())


def test_a_report_has_every_figure_a_page_and_a_table(files):
    for kind in FIGURES:
        assert files[f"figures/{kind}-65536.png"].startswith(b"\x89PNG")
        assert b"<svg" in files[f"figures/{kind}-65536.svg"][:1000]
        assert f"figures/{kind}-65536.png" in files["README.md"].decode()
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(files["table.parquet"]))
    assert table.num_rows == len(records())


_AGAIN = """
import hashlib, sys
from tests.scaling.test_report import build, recipe, records
files = build(recipe(), list(reversed(records())))
for name in sorted(files):
    print(name, hashlib.sha256(files[name]).hexdigest())
"""


def test_the_same_records_give_the_same_bytes_in_another_process(files, tmp_path):
    """Another hash seed, thread count, matplotlibrc, locale, directory and order of the records."""
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsavefig.dpi: 50\nsvg.fonttype: none\n")
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "OMP_NUM_THREADS": "2",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", _AGAIN], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    theirs = dict(line.split() for line in done.stdout.splitlines())
    ours = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert theirs == ours


def test_the_page_states_verdicts_conventions_and_fairness(files):
    text = files["README.md"].decode()
    assert "power, deg 2 against its best rival wins" in text
    for words in ("conventions that flip it", "executed, no head", "same evaluation documents", "powertrain sweep run"):
        assert words in text
    values = json.loads(files["summary.json"])["contexts"]["65536"]
    assert {v["outcome"] for v in values["verdicts"]["algorithmic"]} == {"wins"}
    checks = {c["name"]: c["passed"] for c in values["checks"]}
    assert checks["same training documents and tokenizer"]
    assert checks["learning rate tuned with equal effort"]
    assert checks["same seeds for every mixer"]


def test_the_page_says_what_noise_it_does_not_know(files):
    options = {"curves": False, "budgets": (1e15, 3e15)}
    plain = [dataclasses.replace(r, document_loss=(), document_tokens=()) for r in records(**options)]
    single = [dataclasses.replace(r, document_loss=(), document_tokens=()) for r in records(seeds=(0,), **options)]
    for made, intervals, bands, why in (
        (
            records(seeds=(0,), **options),
            "documents alone)",
            "over parts of documents alone",
            "seeds (no configuration has two)",
        ),
        (plain, "seeds alone)", "over seeds alone", "documents (the records do not hold"),
        (single, "(interval not known)", None, "the same ones in all) and between seeds"),
    ):
        found = analyse(recipe(), made, 65536)
        text = page(recipe(), [found], [(65536, "perplexity")])
        assert text.count("**no verdict**") == 2
        assert "There is no verdict: the noise between" in text
        assert "power, deg 2 against its best rival has no verdict" in text
        assert "nobody *wins* or *loses*" in text
        assert "*Wins* and *loses*" not in text
        assert intervals in text
        assert why in text.split("## Method")[1]
        assert ("Student-t" in text) is (made is plain)
        assert f"Bands: bootstrap {bands}" in text if bands else "Bands: bootstrap" not in text
        values = json.loads(summary(recipe(), [found]))["contexts"]["65536"]["verdicts"]["algorithmic"][0]
        assert (values["margin_interval"] == [None, None]) is (bands is None)
    text = files["README.md"].decode()
    for words in ("no verdict", "documents alone", "seeds alone", "not known"):
        assert words not in text
    for words in ("Student-t", "over parts of documents and seeds", "*Wins* and *loses*"):
        assert words in text


def test_a_convention_that_cannot_be_compared_is_no_convention_that_agrees():
    """At one budget there is no line along which a loss could be read off at another price."""
    found = analyse(recipe(), records(curves=False, budgets=(1e15,)), 65536)
    different = {c: vs for c, vs in found.verdicts.items() if not vs}
    assert different, "softmax costs more where masked halves of blocks count"
    cell = page(recipe(), [found], []).split("**wins** | ")[1].split(" |")[0]
    assert cell == "; ".join(f"{c}: not comparable" for c in different)


def test_budgets_that_cost_too_different_flops_are_said_to_be():
    made = [
        dataclasses.replace(r, flops_per_token=dict.fromkeys(r.flops_per_token, 1e7))
        if r.mixer == "power"
        else dataclasses.replace(r, flops_per_token=dict.fromkeys(r.flops_per_token, 1e9), tokens=r.tokens * 7)
        for r in records(curves=False, budgets=(1e15,))
    ]
    text = page(recipe(), [analyse(recipe(), made, 65536)], [])
    assert "the cells of power, deg 2 and its rivals at 1e+15 cost too different FLOPs to be compared" in text
    assert "no budget was measured" not in text


def test_the_page_says_what_is_resampled():
    made = records(curves=False, budgets=(1e15,))
    rows = {"position_loss": ((1.0,),) * 40, "position_tokens": ((1,),) * 40, "position_bounds": (65536,)}
    whole = [dataclasses.replace(r, **rows) for r in made]
    numbered = [dataclasses.replace(r, document_numbers=tuple(i // 4 for i in range(40))) for r in whole]
    for given, resampled, evidence in (
        (made, "40 parts of documents of the evaluation text are resampled as sequences cut them", "40 parts of doc"),
        (whole, "40 sequences of the evaluation text are resampled (records do not say which", "40 sequences in every"),
        (
            numbered,
            "10 documents of the evaluation text are resampled (a sequence counts to the",
            "10 documents in every",
        ),
    ):
        text = page(recipe(), [analyse(recipe(), given, 65536)], [])
        assert resampled in text.split("## Method")[1]
        assert evidence in text.split("### Fairness")[1]


def test_curves_are_called_averages_in_both_captions(files):
    text = files["README.md"].decode()
    assert text.count("averaged over at least 50 steps and 10% more FLOPs") == 2


def test_the_legend_of_held_out_losses_shows_the_marks_that_are_drawn():
    found = analyse(recipe(), records(seeds=(0,)), 65536)
    (legend,) = [ax.get_legend() for ax in draw_envelope(recipe(), found).axes]
    drawn = {line.get_marker() for line in legend.findobj(Line2D)} - {"None"}
    assert drawn == {Pens(recipe(), []).marker(m) for m in TWO}


def test_a_mixer_whose_runs_are_all_too_short_has_marks_and_no_envelope():
    short = (CurvePoint(40 * 65536.0, 5.0),)
    shortened = [dataclasses.replace(r, curve=short) if r.mixer == "power" else r for r in records(seeds=(0,))]
    found = analyse(recipe(), shortened, 65536)
    assert set(found.envelopes) == {"softmax"}
    (ax,) = draw_envelope(recipe(), found).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["power, deg 2", "softmax", "annealed, held-out text"]


def test_position_bands_hold_the_noise_between_seeds():
    """Where all sequences lose as much, the bands are what two seeds of a configuration differ by."""
    options = {"budgets": (1e15,), "sizes": {"3m": 3e6}, "factors": (1.0,), "curves": False}
    for seeds in ((0,), (0, 1)):
        alike = [dataclasses.replace(r, position_loss=r.position_tokens) for r in records(seeds=seeds, **options)]
        found = analyse(recipe(analysis=Analysis(bootstrap=2000)), alike, 65536)
        (power,) = (c for c in found.positions if c.mixer == "power")
        width = power.difference_high - power.difference_low
        noise = found.sample.seed_noise
        if noise is None:
            np.testing.assert_allclose(width, 0, atol=1e-12)
            continue
        # Two means over two seeds each: a little narrower than one t of their summed variance, whose tails are longer.
        expected = 2 * stats.t.ppf(0.975, noise.degrees) * noise.deviation
        assert (0.7 * expected < width).all()
        assert (width < 1.1 * expected).all()


def test_the_caption_of_positions_says_what_bands_hold():
    options = {"budgets": (1e15,), "sizes": {"3m": 3e6}, "factors": (1.0,), "curves": False}
    for seeds, rows, bands in (
        (
            (0, 1),
            16,
            " Bands: bootstrap over evaluation sequences, the same ones for every mixer, and noise between seeds",
        ),
        ((0,), 16, " Bands: bootstrap over evaluation sequences, the same ones for every mixer.\n"),
        ((0, 1), 1, " Bands: noise between seeds, as a shift of all positions alike.\n"),
        ((0,), 1, "its difference to the baseline.\n"),
    ):
        made = [
            dataclasses.replace(r, position_loss=r.position_loss[:rows], position_tokens=r.position_tokens[:rows])
            for r in records(seeds=seeds, **options)
        ]
        assert bands in page(recipe(), [analyse(recipe(), made, 65536)], [(65536, "position")])


def isoflop_legend(found):
    figure = draw_isoflop(recipe(), found)
    (legend,) = figure.legends
    return figure, {text.get_text() for text in legend.get_texts()}


def test_isoflop_panels_and_lines_are_labelled():
    laws = {m: synthetic.LAWS[m] for m in ("power", "softmax", "window")}
    found = analyse(recipe(), records(laws=laws, curves=False, budgets=(1e15, 3e16)), 65536)
    figure, labels = isoflop_legend(found)
    figure.draw_without_rendering()
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [bool(ax.get_xlabel()) for ax in shown] == [False, True, True]
    ticks = [any(t.label1.get_visible() and t.label1.get_text() for t in ax.xaxis.get_major_ticks()) for ax in shown]
    assert ticks == [False, True, True]
    assert {"parabola", "minimum of the parabola"} <= labels


def test_isoflop_speaks_of_the_marks_that_it_draws():
    two = {s: synthetic.SIZES[s] for s in ("1m", "3m")}
    straight = analyse(recipe(), records(curves=False, sizes=two, budgets=(1e15,)), 65536)
    bent = analyse(recipe(), records(curves=False, budgets=(1e15,)), 65536)
    bent = dataclasses.replace(bent, flags=())
    for found, lines, mark, caption in (
        (straight, {"joined: no parabola"}, {"best at the edge: no minimum"}, "red ring"),
        (bent, {"parabola"}, {"minimum of the parabola"}, "Stars"),
    ):
        assert isoflop_legend(found)[1] == {"$10^{15}$ FLOPs", *lines, *mark}
        text = page(recipe(), [found], [(65536, "isoflop")])
        assert {word for word in ("red ring", "Stars") if word in text} == {caption}


def test_a_minimum_beside_the_best_size_at_the_edge_gets_no_star():
    """The vertex of 3.0, 3.05 and 4.0 is between the first two; nothing smaller than the best was measured."""
    losses = {"1m": 3.0, "3m": 3.05, "8m": 4.0}
    options = {"laws": {"power": TWO["power"]}, "budgets": (1e15,), "factors": (1.0,), "seeds": (0,), "curves": False}
    made = records(sizes={size: synthetic.SIZES[size] for size in losses}, **options)
    bent = [
        dataclasses.replace(
            r, loss=losses[r.size], document_loss=tuple(x * losses[r.size] / r.loss for x in r.document_loss)
        )
        for r in made
    ]
    found = analyse(recipe(), bent, 65536)
    (iso,) = found.isoflops
    assert not iso.parabola.on_edge
    figure, labels = isoflop_legend(found)
    assert labels == {"$10^{15}$ FLOPs", "parabola", "best at the edge: no minimum"}
    assert "*" not in {line.get_marker() for line in figure.axes[0].get_lines()}


def test_perplexity_is_labelled_at_the_budgets():
    found = analyse(recipe(), records(curves=False, budgets=(2e15, 6e15)), 65536)
    figure = draw_perplexity(recipe(), found)
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_xticklabels()] == [r"$2\times 10^{15}$", r"$6\times 10^{15}$"]
    assert len(ax.get_yticks()) >= 4


def test_the_page_says_what_is_missing():
    found = analyse(recipe(), records(curves=False, budgets=(1e15, 3e15), seeds=(0,)), 65536)
    own = frozenset(r.cell for r in found.records if (r.budget, r.mixer) == (1e15, "power"))
    asked = (
        Coverage(65536, 1e15, "power", own | {"to-come"}, len(own), 0, 0),
        Coverage(65536, 3e15, "power", frozenset(), 0, 0, 5),
    )
    text = page(recipe(), [found], [], asked)
    assert f"| 1e+15 | power, deg 2 | {len(own)} of {len(own) + 1} cells |" in text
    assert "| 3e+15 | power, deg 2 | nothing yet, at most 5 more once these are known |" in text
    assert "- 3e+15 FLOPs: incomplete: nothing yet, at most 5 more once these are known (power, deg 2)" in text


def test_findings_rest_on_the_cells_that_the_recipe_asks_for():
    kept = records(curves=False, budgets=(1e15,), factors=(0.5, 1.0))
    # Lower than anything else, with a rate that only power has been tried at.
    lucky = [
        dataclasses.replace(
            r,
            cell=f"{r.cell}-{b:.0e}",
            learning_rate_factor=4.0,
            loss=r.loss / 2,
            document_loss=tuple(x / 2 for x in r.document_loss),
            budget=b,
            tokens=r.tokens * b / r.budget,
        )
        for r in kept
        if r.mixer == "power" and r.learning_rate_factor == 1.0
        for b in (1e15, 3e15)
    ]
    cells = frozenset(r.cell for r in kept)
    mixers = sorted({r.mixer for r in kept})
    parts = [
        Coverage(65536, b, m, frozenset(r.cell for r in kept if r.place == (65536, b, m)), 0, 0, 0)
        for b in (1e15, 3e15)
        for m in mixers
    ]
    asked = {part.place: part.cells for part in parts}
    used = compared([*kept, *lucky], asked)
    assert {r.cell for r in used if r.budget == 1e15} == cells
    assert len([r for r in used if r.budget == 3e15]) == len(lucky) / 2, "in place of cells that are not there"
    assert {r.budget for r in compared([*kept, *lucky], {p: asked[p] for p in asked if p[1] == 1e15})} == {1e15}
    without = {place: ids for place, ids in asked.items() if place[2] != "window"}
    assert "window" not in {r.mixer for r in compared(kept, without)}, "the recipe has it no longer"
    settings = recipe(analysis=Analysis(bootstrap=100))
    files = build(settings, [*kept, *lucky], parts)
    text = files["README.md"].decode()
    assert f"{len(lucky)} finished cells are of other settings" in text
    assert f"none of the recipe's own is finished: power, deg 2 at 3e+15 FLOPs ({len(lucky) // 2})." in text
    alone = json.loads(build(settings, kept)["summary.json"])
    verdicts = [json.loads(files["summary.json"]), alone]
    losses = [v["contexts"]["65536"]["verdicts"]["algorithmic"][0]["losses"] for v in verdicts]
    assert losses[0] == losses[1]


def test_what_is_not_compared_still_says_how_much_seeds_differ_and_which_rates_are_worse():
    own = records(curves=False, budgets=(1e15,), factors=(0.5, 1.0), seeds=(0, 1))
    found = analyse(recipe(), own, 65536)
    edge = {f.mixer for f in found.flags if f.text.startswith("the highest learning rate")}
    assert edge == {r.mixer for r in own}

    def aside(change, **other):
        made = [
            dataclasses.replace(
                r,
                cell=f"{r.cell}-{seed}",
                seed=seed,
                learning_rate=2 * r.learning_rate,
                learning_rate_factor=2.0,
                loss=r.loss + change + 0.5 * seed,
                document_loss=(),
                document_tokens=(),
                **other,
            )
            for r in own
            if r.learning_rate_factor == 1.0 and r.seed == 0
            for seed in (0, 1)
        ]
        return analyse(recipe(), own, 65536, (), made)

    worse = aside(1.0)
    assert not [f for f in worse.flags if "highest learning rate" in f.text], "it was tried"
    assert worse.sample.seed_noise.deviation > 2 * found.sample.seed_noise.deviation
    assert worse.selected.keys() == found.selected.keys()
    assert all(worse.selected[key].loss == found.selected[key].loss for key in found.selected)
    lower = [f for f in aside(-1.0).flags if f.kind == "learning rate"]
    assert lower
    assert all("which is not compared, was lower" in f.text for f in lower)
    other_text = aside(-1.0, data={**own[0].data, "evaluation": "another"})
    assert not [f for f in other_text.flags if "which is not compared" in f.text]


def test_one_seed_one_rate_and_a_loss_that_rises_are_doubts():
    made = records(curves=False, budgets=(1e15, 3e15), factors=(1.0,), seeds=(0,))
    worse = [
        dataclasses.replace(r, loss=9.0, document_loss=(), document_tokens=())
        if r.mixer == "softmax" and r.budget == 3e15
        else r
        for r in made
    ]
    found = analyse(recipe(), worse, 65536)
    kinds = {(f.mixer, f.budget, f.kind) for f in found.flags}
    for mixer in {r.mixer for r in made}:
        assert {(mixer, 3e15, "seeds"), (mixer, 3e15, "learning rate")} <= kinds
    assert {(m, b) for m, b, kind in kinds if kind == "loss"} == {("softmax", 3e15)}
    text = page(recipe(), [found], [])
    assert "- 3e+15 FLOPs: loss: 9.0000, above the " in text
    assert "- 3e+15 FLOPs: seeds: only one was run (power, deg 2; softmax" in text
    assert "- every budget: not met: same evaluation documents and positions" in text


def test_the_page_names_what_has_no_time_of_its_own():
    made = records(curves=False, budgets=(1e15, 3e15), seeds=(0,))
    shared = [dataclasses.replace(r, runners=2) if r.place[1:] == (1e15, "softmax") else r for r in made]
    settings = recipe(analysis=Analysis(bootstrap=100))
    assert "Left out: softmax at 1e+15 FLOPs." in build(settings, shared)["README.md"].decode()
    assert "Left out" not in build(settings, made)["README.md"].decode()


def gain(**changes):
    point = Gain(1e16, 2.0, 1.0, "at least")
    values = {"low": 0.722, "low_bound": False, "high": 1.0, "high_bound": True, "censored_share": 0.774}
    return GainInterval(**{"mixer": "power", "budget": 1e16, "point": point, **values, **changes})


def test_bounds_of_several_mixers_at_one_budget_stand_side_by_side():
    laws = {m: synthetic.LAWS[m] for m in ("power", "softmax", "linear", "window")}
    found = analyse(recipe(), records(laws=laws, curves=False, budgets=(1e15,)), 65536)
    bounds = tuple(
        gain(mixer=m, budget=b, point=Gain(b, 2.0, 1.0, "at least"))
        for m in laws
        for b in (1e15, 3e15)
        if m != "softmax"
    )
    figure = draw_gain(recipe(), dataclasses.replace(found, gains=bounds))
    figure.draw_without_rendering()
    (ax,) = figure.axes
    marks = [line for line in ax.get_lines() if line.get_marker() in ("o", "s", "^", "D") and len(line.get_xdata())]
    across = sorted(float(ax.transData.transform((line.get_xdata()[0], 1.0))[0]) for line in marks)
    assert len(across) == len(bounds)
    # The widest mark is a square on its tip.
    assert min(np.diff(across)) > 2**0.5 * marks[0].get_markersize() * figure.dpi / 72


def test_the_interval_of_a_bound_is_printed():
    found = analyse(recipe(), records(curves=False, budgets=(1e15,)), 65536)
    inside = gain(point=Gain(1e16, 2.0, 0.9), low=0.7, high=1.2, high_bound=False, censored_share=0.001)
    text = page(recipe(), [dataclasses.replace(found, gains=(gain(), inside))], [])
    assert "| at least 1.000 | 0.722 to (bound); 77% of replicates are bounds |" in text
    assert "| 0.900 | 0.700 to 1.200; under 1% of replicates are bounds |" in text


def test_the_bounds_of_a_minimum_are_printed():
    found = analyse(recipe(), records(curves=False, budgets=(1e15,)), 65536)
    spreads = MinimumInterval(1e6, True, 3e6, False, 0.182), MinimumInterval(1e6, False, 3e6, True, 0.004), None
    for spread, words in zip(
        spreads,
        (
            "(bound) to 3e+06; 18% of replicates bracket no minimum",
            "1e+06 to (bound); under 1% of replicates bracket no minimum",
            "not known",
        ),
        strict=True,
    ):
        changed = tuple(dataclasses.replace(i, parameters_interval=spread) for i in found.isoflops if i.minimum)
        assert f" | {words} | " in page(recipe(), [dataclasses.replace(found, isoflops=changed)], [])


def test_the_page_says_why_a_loss_has_two_values(files):
    verdict = files["README.md"].decode().split("### Verdict")[1].split("|")[0]
    assert "geometric mean" in verdict
    assert "each cell's own loss" in verdict


def broken_checks(changed):
    found = analyse(recipe(), changed, 65536)
    return {c.name for c in found.checks if c.passed is False}


def test_unfair_records_are_called_so():
    fair = records(curves=False, budgets=(1e15, 3e15))
    assert broken_checks(fair) == set()
    first = fair[0]
    swap = lambda **changes: [dataclasses.replace(first, **changes), *fair[1:]]  # noqa: E731
    assert broken_checks(swap(data={**first.data, "tokens": "z"})) == {"same training documents and tokenizer"}
    assert broken_checks(swap(data={**first.data, "order": "z"})) == {
        "same order of the data for every mixer of a seed"
    }
    assert broken_checks(swap(device="another")) == {"one kind of device"}
    elsewhere = Start(0, "another", 1, first.environment)
    assert broken_checks(swap(starts=(elsewhere,))) == {"one kind of device"}
    shorter = swap(document_loss=(first.loss * 7,), document_tokens=(7,))
    assert "same evaluation documents and positions" in broken_checks(shorter)
    untuned = [r for r in fair if not (r.mixer == "softmax" and r.learning_rate_factor == 2.0)]
    assert broken_checks(untuned) == {"learning rate tuned with equal effort"}
    one_rate = [r for r in fair if r.mixer != "power" or r.budget < 3e15 or r.learning_rate_factor == 1.0]
    assert broken_checks(one_rate) == {"learning rate tuned with equal effort"}
    found = analyse(recipe(), one_rate, 65536)
    assert [(f.mixer, f.budget) for f in found.flags if "where another mixer had 3" in f.text] == [("power", 3e15)]
    seeds = [r for r in fair if not (r.mixer == "softmax" and r.seed == 1)]
    assert "same seeds for every mixer" in broken_checks(seeds)


def test_edges_are_flagged_and_never_silently_used():
    few = {s: n for s, n in synthetic.SIZES.items() if s in ("1m", "3m")}
    found = analyse(recipe(), records(curves=False, sizes=few, factors=(1.0, 2.0), budgets=(3e16,)), 65536)
    flags = {(f.mixer, f.kind, f.text) for f in found.flags}
    assert ("power", "size", "the largest size measured is the best") in flags
    assert any(kind == "learning rate" and "lowest learning rate tried" in text for _, kind, text in flags)
    text = page(recipe(), [found], [])
    assert "### What the data do not bound" in text
    assert "lowest learning rate tried" in text.split("### At the edge")[0], "a doubt stands beside its verdict"


def test_the_published_curves_go_through_a_report():
    published = recipe(contexts=(32768,), figures=("envelope", "gain", "perplexity", "position"))
    made = build(published, published_records())
    assert set(made) == {
        *(f"figures/{kind}-32768.{suffix}" for kind in ("envelope", "gain") for suffix in ("png", "svg")),
        "README.md",
        "summary.json",
        "table.parquet",
    }
    text = made["README.md"].decode()
    assert "Not drawn, because the records hold nothing for it: perplexity, position." in text
    assert "there is no verdict, only curves" in text
    end = json.loads(made["summary.json"])["contexts"]["32768"]["envelope_gains"]["power"][-1]
    assert end["loss"] == pytest.approx(2.179, abs=5e-4)
    assert end["gain"] == pytest.approx(1.40, abs=0.005)


def test_held_out_budgets_are_predicted():
    found = analyse(recipe(), records(curves=False, seeds=(0,)), 65536)
    for law in found.laws:
        assert law.held_out_budget == 3e16
        assert len(law.held_out) == len(synthetic.SIZES)
        assert law.held_out_error < 0.01
        assert all(p.first.budget < 3e16 for i in found.isoflops for p in i.points if i.budget < 3e16)


def test_parabolas_agree_with_the_law_where_both_exist():
    found = analyse(recipe(), records(curves=False, noise=0.0), 65536)
    for i in found.isoflops:
        if i.parabola is None or i.parabola.on_edge:
            continue
        low, high = i.parabola.fitted[0], i.parabola.fitted[-1]
        assert low < i.parabola.parameters < high
        lowest = min(p.loss for p in i.points)
        assert i.parabola.loss == pytest.approx(lowest, rel=0.02)


def test_no_records_is_one_sentence():
    with pytest.raises(ValueError, match="powertrain sweep run synthetic"):
        build(recipe(), [])


def test_writing_replaces_the_report_before(tmp_path):
    write({"README.md": b"a", "figures/x-1.png": b"b"}, tmp_path)
    write({"README.md": b"c", "figures/y-1.png": b"d"}, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"c"
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["y-1.png"]


def test_a_summary_holds_no_digit_beyond_the_sixth():
    found = analyse(recipe(), records(curves=False, budgets=(1e15,)), 65536)
    for number in json.dumps(json.loads(summary(recipe(), [found]))).replace(",", " ").split():
        digits = number.strip('[]{}":').split("e")[0].replace(".", "").replace("-", "").lstrip("0")
        if digits.isdigit():
            assert len(digits.rstrip("0")) <= 6, number
