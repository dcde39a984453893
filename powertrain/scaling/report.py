"""`powertrain sweep report`: figures, a page and a table, from the records alone, the same bytes anywhere."""

from __future__ import annotations

import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from powertrain.files import write_file
from powertrain.scaling.analysis import Findings, analyse
from powertrain.scaling.compare import ENVELOPE_BIN, ENVELOPE_STEPS, Verdict, compared
from powertrain.scaling.drawing import render, style
from powertrain.scaling.figures import DRAW, has_edge, has_minimum
from powertrain.scaling.isoflop import MinimumInterval
from powertrain.scaling.plan import Coverage, asked_for
from powertrain.scaling.recipe import CONVENTIONS, Figure, Recipe
from powertrain.scaling.records import CellRecord, table
from powertrain.scaling.resample import NOISE, Noise, Sample, Unit
from powertrain.scaling.timing import Timing, with_timings
from powertrain.wording import counted

_AVERAGED = f"averaged over at least {ENVELOPE_STEPS} steps and {ENVELOPE_BIN - 1:.0%} more FLOPs"
CAPTIONS: dict[Figure, str] = {
    "envelope": (
        f"Loss against FLOPs. Thin: the training loss of every run before its learning rate falls, {_AVERAGED}. Thick: "
        "the lowest that any run of the mixer reached by then. Marks: the annealed loss on held-out text of each "
        "budget's best run."
    ),
    "isoflop": (
        "Annealed loss against size, one colour per budget; each mark is the best learning rate of its size. Solid: a "
        "parabola in log parameters. Dotted: marks that no parabola goes through, because they are fewer than three or "
        "do not bend upwards."
    ),
    "perplexity": "Perplexity on held-out text of each mixer's best configuration per budget.",
    "position": "Loss by position in the context at the largest budget shared, and its difference to the baseline.",
    "seconds": (
        "The same runs against FLOPs and against measured time: at the speed that each mixer and size reaches alone on "
        "the device (`powertrain sweep time`) where that was measured, else the time of the run itself. Runs that "
        "shared the device and were not timed are left out on the right."
    ),
    "gain": (
        "Compute with which the baseline reaches the same loss, over the compute spent: above 1 is better than the "
        "baseline. Marks: annealed, with intervals; an arrow marks a bound, where the baseline was never measured "
        "that low or high. Thin lines: the same between the envelopes, from where both exist: of training loss, "
        f"{_AVERAGED}."
    ),
    "state_size": (
        "Loss at fixed FLOPs against the numbers that hold a sequence's history, and against the ratio of weight "
        "FLOPs to "
        "state FLOPs."
    ),
}


def _caption(recipe: Recipe, kind: Figure, findings: Findings) -> str:
    # Marks that need not occur are spoken of where they do.
    text = CAPTIONS[kind]
    if kind == "isoflop" and has_minimum(findings):
        text += " Stars: minima of the parabolas."
    if kind == "isoflop" and has_edge(findings):
        text += " A red ring marks a best size at the edge of those measured, which is no minimum."
    if kind == "perplexity" and _known(findings.sample):
        known = _known(findings.sample)
        text += (
            f" Bands: bootstrap over {' and '.join(known)}{' alone' if len(known) == 1 else ''}, without the shift "
            "that a draw of text gives all mixers alike."
        )
    if kind == "position":
        # One sequence cannot be resampled.
        several = any(len(p.first.position_tokens) > 1 for p in findings.selected.values())
        bands = ["bootstrap over evaluation sequences, the same ones for every mixer"] if several else []
        bands += ["noise between seeds, as a shift of all positions alike"] if findings.sample.seed_noise else []
        text += f" Bands: {', and '.join(bands)}." if bands else ""
    if kind == "perplexity" and any(law.frontier for law in findings.laws):
        text += " Dashed: the fitted law at the size that it finds best, which need not be one that was trained."
    if kind == "seconds":
        untimed = [
            f"{recipe.label(m)} at {b:.3g}" for (m, b), p in sorted(findings.selected.items()) if p.seconds is None
        ]
        text += f" Left out: {', '.join(untimed)} FLOPs." if untimed else ""
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + " --- |" * len(header), *(f"| {' | '.join(r)} |" for r in rows), ""]


def _signed(x: float) -> str:
    # A minus that renders as one, and no negative zero.
    return f"{x:+.4f}".replace("-", "−") if abs(x) >= 5e-5 else "0.0000"


def _interval(low: float, high: float, sample: Sample) -> str:
    return f"{_signed(low)} to {_signed(high)}{_alone(sample)}" if _known(sample) else "interval not known"


def _known(sample: Sample) -> list[str]:
    """Return what intervals are over."""
    names: dict[Noise, str] = {"documents": sample.unit, "seeds": "seeds"}
    return [names[source] for source in NOISE if source not in sample.unknown]


def _alone(sample: Sample) -> str:
    known = _known(sample)
    return f", {known[0]} alone" if len(known) == 1 else ""


def _not_known(sample: Sample) -> str:
    """Return which noise is not known, and why."""
    reasons: dict[Noise, str] = {
        "documents": "between evaluation documents (the records do not hold losses of several, the same ones in all)",
        "seeds": "between seeds (no configuration has two)",
    }
    return " and ".join(reasons[source] for source in sample.unknown)


def headline(recipe: Recipe, findings: Findings) -> str:
    """Return one sentence: at how many budgets the subject is lowest, and where not."""
    subject = recipe.label(recipe.subject)
    verdicts = findings.verdicts[recipe.convention]
    if not verdicts:
        of_rivals = {b for m, b in findings.selected if m != recipe.subject}
        shared = {b for m, b in findings.selected if m == recipe.subject} & of_rivals
        reason = f"no budget was measured for {subject} and a rival"
        if shared:
            budgets = ", ".join(f"{b:.3g}" for b in sorted(shared))
            reason = f"the cells of {subject} and its rivals at {budgets} cost too different FLOPs to be compared"
        return f"At context {findings.context} {reason}: there is no verdict, only curves."
    parts = []
    for outcome, words in (
        ("wins", "wins"),
        ("loses", "loses"),
        ("inconclusive", "is inconclusive"),
        ("unfinished", "is unfinished (lowest of what was measured)"),
        ("no verdict", "has no verdict (one seed)" if findings.sample.unknown == ("seeds",) else "has no verdict"),
    ):
        budgets = ", ".join(f"{v.budget:.3g}" for v in verdicts if v.outcome == outcome)
        if budgets:
            parts.append(f"{words} at {budgets} FLOPs")
    return f"At context {findings.context}, {subject} against its best rival {'; '.join(parts)}."


def _incomplete(parts: Sequence[Coverage], context: int) -> list[Coverage]:
    return [p for p in parts if p.context == context and not p.complete]


def _so_far(parts: Sequence[Coverage], context: int) -> str:
    own = [p for p in parts if p.context == context]
    if all(p.complete for p in own):
        return ""
    later = " and further ones to come" if any(p.later for p in own) else ""
    return f" So far: {sum(p.finished for p in own)} of {counted(sum(p.planned for p in own), 'cell')}{later}."


def _missing_lines(recipe: Recipe, findings: Findings, parts: Sequence[Coverage]) -> list[str]:
    incomplete = _incomplete(parts, findings.context)
    if not incomplete:
        return []
    rows = [[f"{p.budget:.3g}", recipe.label(p.mixer), str(p)] for p in incomplete]
    text = "The sweep is not finished; what follows rests on the cells that are. `powertrain sweep run` continues it."
    return ["### What is missing", "", text, "", *_table(["FLOPs", "mixer", "there is"], rows)]


def _others_lines(recipe: Recipe, findings: Findings, others: Sequence[CellRecord]) -> list[str]:
    here = {r.cell for r in others if r.context == findings.context}
    if not here:
        return []
    text = (
        f"{len(here)} finished {'cell is' if len(here) == 1 else 'cells are'} of other settings than the recipe now "
        "asks for (of a learning rate that was the tuned one before the grid was extended, say): `table.parquet` holds "
        "them, and findings leave them out"
    )
    used = Counter((r.budget, r.mixer) for r in findings.records if r.cell in here)
    if used:
        places = ", ".join(f"{recipe.label(m)} at {b:.3g} FLOPs ({n})" for (b, m), n in sorted(used.items()))
        text += f", but where none of the recipe's own is finished: {places}"
    return [text + ".", ""]


def _verdict_rows(recipe: Recipe, findings: Findings, parts: Sequence[Coverage]) -> list[list[str]]:
    rows = []
    for v in findings.verdicts[recipe.convention]:
        duel = v.duels[0]
        margin = f"{v.margin:.4f} ({_interval(*v.margin_interval, findings.sample)}) below {recipe.label(v.runner_up)}"
        spread = _interval(duel.low, duel.high, findings.sample)
        flips = "; ".join(f"{c}: {outcome}" for c, outcome in findings.flips(recipe, v.budget))
        unknown = "; ".join(f"{c}: not comparable" for c in findings.not_comparable(v.budget))
        rows.append(
            [
                f"{v.budget:.3g}",
                f"{recipe.label(v.lowest)} ({v.losses[v.lowest]:.4f})",
                margin,
                f"{_signed(duel.difference)} ({spread}) to {recipe.label(duel.rival)}",
                f"**{v.outcome}**",
                "; ".join(text for text in (flips or ("" if unknown else "none"), unknown) if text),
                str(len(_doubts(recipe, findings, parts, v))),
            ]
        )
    return rows


def _doubts(recipe: Recipe, findings: Findings, parts: Sequence[Coverage], verdict: Verdict) -> list[str]:
    used = {
        m: findings.selected[m, verdict.budget].size for m in verdict.losses if (m, verdict.budget) in findings.selected
    }
    flags = [f for f in findings.flags if f.budget == verdict.budget and f.size == used.get(f.mixer)]
    incomplete = [p for p in _incomplete(parts, findings.context) if p.budget == verdict.budget]
    alike: dict[str, list[str]] = defaultdict(list)
    for mixer in verdict.unmeasured:
        alike["not measured at this budget"].append(recipe.label(mixer))
    for flag in flags:
        alike[f"{flag.kind}: {flag.text}"].append(recipe.label(flag.mixer))
    for part in incomplete:
        alike[f"incomplete: {part}"].append(recipe.label(part.mixer))
    return [f"{doubt} ({'; '.join(labels)})" for doubt, labels in alike.items()]


def _doubt_lines(recipe: Recipe, findings: Findings, parts: Sequence[Coverage]) -> list[str]:
    lines = [
        f"- {v.budget:.3g} FLOPs: {doubt}"
        for v in findings.verdicts[recipe.convention]
        for doubt in _doubts(recipe, findings, parts, v)
    ]
    lines += [f"- every budget: not met: {c.name} ({c.evidence})" for c in findings.checks if c.passed is False]
    return ["Doubts, of the configurations that are compared:", "", *lines, ""] if lines else []


def _convention_rows(recipe: Recipe, findings: Findings) -> list[list[str]]:
    budgets = sorted({v.budget for vs in findings.verdicts.values() for v in vs})
    rows = []
    for budget in budgets:
        row = [f"{budget:.3g}"]
        for convention in CONVENTIONS:
            found: Verdict | None = next((v for v in findings.verdicts[convention] if v.budget == budget), None)
            if found is None:
                row.append("not comparable")
                continue
            mark = " (extrapolated)" if found.extrapolated else ""
            row.append(f"{found.outcome}, {_signed(found.duels[0].difference)} to {found.duels[0].rival}{mark}")
        rows.append(row)
    return rows


def _share(share: float) -> str:
    return "under 1%" if share < 0.01 else f"{share:.0%}"


def _gain_rows(recipe: Recipe, findings: Findings) -> list[list[str]]:
    rows = []
    for g in sorted(findings.gains, key=lambda g: (g.budget, g.mixer)):
        bound = f"{g.point.bound} " if g.point.bound else ""
        censored = f"; {_share(g.censored_share)} of replicates are bounds" if g.censored_share else ""
        low = "(bound)" if g.low_bound else f"{g.low:.3f}"
        high = "(bound)" if g.high_bound else f"{g.high:.3f}"
        spread = f"{low} to {high}{censored}" if _known(findings.sample) else "not known"
        rows.append(
            [
                recipe.label(g.mixer),
                f"{g.point.compute:.3g}",
                f"{g.point.loss:.4f}",
                f"{bound}{g.point.gain:.3f}",
                spread,
                "annealed",
            ]
        )
    for mixer, curve in sorted(findings.envelope_gains.items()):
        if curve:
            end = curve[-1]
            bound = f"{end.bound} " if end.bound else ""
            row = [recipe.label(mixer), f"{end.compute:.3g}", f"{end.loss:.4f}", f"{bound}{end.gain:.3f}", ""]
            rows.append([*row, "end of the envelope of training curves"])
    return rows


def _law_lines(recipe: Recipe, findings: Findings) -> list[str]:
    rows, reasons = [], []
    for finding in findings.laws:
        label = recipe.label(finding.mixer)
        if finding.fit is None:
            reasons.append(f"- {label}: no law, {finding.reason}.")
            continue
        fit, (low, high) = finding.fit, finding.fit.interval(recipe.analysis.confidence)
        error = finding.held_out_error
        rows.append(
            [
                label,
                f"{fit.law.E:.3f} ({low.E:.3f} to {high.E:.3f})",
                f"{fit.law.alpha:.3f} ({low.alpha:.3f} to {high.alpha:.3f})",
                f"{fit.law.beta:.3f} ({low.beta:.3f} to {high.beta:.3f})",
                f"{fit.points}",
                f"{100 * fit.rms_residual:.2f} %",
                "none" if error is None else f"{100 * error:.2f} % at {finding.held_out_budget:.3g}",
                ", ".join(fit.undetermined) or "none",
            ]
        )
    header = ["mixer", "E", "alpha", "beta", "points", "residual", "error on the held-out budget", "not determined"]
    return [*(_table(header, rows) if rows else []), *reasons, ""]


def _size_interval(spread: MinimumInterval | None) -> str:
    if spread is None:
        return "not known"
    low = "(bound)" if spread.low_bound else f"{spread.low:.3g}"
    high = "(bound)" if spread.high_bound else f"{spread.high:.3g}"
    share = spread.unbracketed_share
    return f"{low} to {high}" + (f"; {_share(share)} of replicates bracket no minimum" if share else "")


def _isoflop_rows(recipe: Recipe, findings: Findings) -> list[list[str]]:
    rows = []
    for i in findings.isoflops:
        best, spread = i.best, ""
        if i.minimum is not None:
            fitted = f"{i.minimum.parameters:.3g} ({i.minimum.loss:.4f})"
            spread = _size_interval(i.parameters_interval)
        else:
            fitted = "no parabola" if i.parabola is None else "minimum not bracketed"
        measured = f"{best.size}: {best.first.parameters:.3g} ({best.loss:.4f})"
        row = [recipe.label(i.mixer), f"{i.budget:.3g}", str(len(i.points)), measured, fitted, spread]
        rows.append([*row, f"{best.first.learning_rate:.3g}"])
    return rows


def _resampled(findings: Findings) -> str:
    """Return which text is resampled, and where it is less independent than the bootstrap takes it to be."""
    sample = findings.sample
    sequences = all(len(r.document_tokens) == len(r.position_tokens) for r in findings.records)
    what: dict[Unit, str] = {
        "documents": " (a sequence counts to the document that most of it is of)" if sequences else "",
        "parts of documents": (
            " as sequences cut them (records do not say which are of one document: where many are, intervals "
            "are too narrow)"
        ),
        "sequences": (
            " (records do not say which hold parts of one document: where many do, intervals are too narrow)"
        ),
    }
    return f"{sample.documents} {sample.unit} of the evaluation text are resampled{what[sample.unit]}"


def _intervals(recipe: Recipe, findings: Findings) -> str:
    """Return what the intervals at one context are made of."""
    sample = findings.sample
    where = f"At context {findings.context}, intervals"
    parts = []
    if "documents" not in sample.unknown:
        parts.append(f"{_resampled(findings)}, the same ones for every mixer")
    if "seeds" not in sample.unknown:
        parts.append(
            "between-seed noise is Student-t with the deviation pooled over all configurations that have several "
            "seeds, those of other settings too, and taken to be that of configurations that were run once"
        )
    confidence, replicates = f"{recipe.analysis.confidence:.0%}", recipe.analysis.bootstrap
    text = f"{where} are {confidence} percentiles of {replicates} bootstrap replicates: {'; '.join(parts)}."
    if not parts:
        text = f"{where} are not known."
    if sample.unknown:
        return f"{text} The noise {_not_known(sample)} is not known, and not in them: nobody *wins* or *loses*."
    return (
        f"{text} *Wins* and *loses* mean that the interval of the paired difference excludes zero; no correction is "
        "made for the number of budgets."
    )


def _method(recipe: Recipe, results: Sequence[Findings]) -> list[str]:
    return [
        "- All mixers train on the same documents in the same order (a function of the seed and the step), and are "
        "measured "
        "on the same evaluation documents at the same positions.",
        f"- Budgets count FLOPs under the convention `{recipe.convention}`. *Algorithmic* counts the products that the "
        "mathematics needs: causal pairs only for softmax and window attention, the chunk that is run for power and "
        "linear "
        "layers. *Executed* counts the products that the implementation runs: masked halves of blocks, states formed "
        "again. "
        "Each with and without the vocabulary head.",
        "- Under another convention the same cells have other prices: losses are then compared at the geometric mean "
        "of the "
        "mixers' prices, along each mixer's line through its budgets in log FLOPs.",
        *(f"- {_intervals(recipe, findings)}" for findings in results),
        "- A mixer's configuration at a budget is the lowest among those with the most seeds; its interval does not "
        "hold the "
        "luck of that choice.",
        "- The parametric law L(N, D) = E + A / N^alpha + B / D^beta is fitted by the sum of Huber losses of log L, "
        "from 64 starts, without the largest budget, which then tests it.",
    ]


def page(
    recipe: Recipe,
    results: Sequence[Findings],
    drawn: Sequence[tuple[int, Figure]],
    parts: Sequence[Coverage] = (),
    others: Sequence[CellRecord] = (),
) -> str:
    """Return the Markdown page of a report.

    Args:
        results: findings per context.
        drawn: (context, figure) of every figure that has data.
        parts: how much there is of what the recipe asks for; empty: not known, and not spoken of.
        others: finished cells of other settings than the recipe asks for.
    """
    lines = [f"# Sweep `{recipe.name}`", "", recipe.question, "", f"    powertrain sweep run {recipe.name}", ""]
    lines[-2:] = [f"    powertrain sweep run {recipe.name}", f"    powertrain sweep report {recipe.name}", ""]
    lines += [*(f"**{headline(recipe, f)}**{_so_far(parts, f.context)}" for f in results), ""]
    lines += [*(f"- {note}" for note in recipe.notes), ""] if recipe.notes else []
    for findings in results:
        kinds = [kind for context, kind in drawn if context == findings.context]
        lines += _context_section(recipe, findings, kinds, parts, others)
    lines += ["## Method", "", *_method(recipe, results), ""]
    return "\n".join(lines)


def _no_verdict_lines(findings: Findings) -> list[str]:
    if not findings.sample.unknown:
        return []
    return [f"There is no verdict: the noise {_not_known(findings.sample)} is not known.", ""]


def _context_section(
    recipe: Recipe,
    findings: Findings,
    kinds: Sequence[Figure],
    parts: Sequence[Coverage],
    others: Sequence[CellRecord],
) -> list[str]:
    lines = [f"## Context {findings.context}", "", *_missing_lines(recipe, findings, parts)]
    lines += _others_lines(recipe, findings, others)
    rows = _verdict_rows(recipe, findings, parts)
    if rows:
        subject = recipe.label(recipe.subject)
        header = [
            "FLOPs",
            "lowest loss",
            "margin",
            f"{subject}, difference",
            "verdict",
            "conventions that flip it",
            "doubts",
        ]
        lines += ["### Verdict", ""]
        lines += [
            "Losses are compared at one number of FLOPs, the geometric mean of what a budget's cells cost (they end on "
            "whole steps), along each mixer's line through its budgets where it has several. The tables of gains and "
            "of sizes hold each cell's own loss, which differs in the last digits.",
            "",
            *_no_verdict_lines(findings),
            *_table(header, rows),
            *_doubt_lines(recipe, findings, parts),
        ]
        lines += [f"{subject} against its best rival, under each convention:", ""]
        lines += _table(["FLOPs", *CONVENTIONS], _convention_rows(recipe, findings))
    marks = {True: "yes", False: "**no**", None: "not recorded"}
    rows = [[c.name, marks[c.passed], c.evidence] for c in findings.checks]
    lines += ["### Fairness, judged from the records", "", *_table(["condition", "met", "evidence"], rows)]
    for kind in kinds:
        stem = f"figures/{kind}-{findings.context}"
        lines += [
            f"### {kind.replace('_', ' ').capitalize()}",
            "",
            f"![{kind}]({stem}.png)",
            "",
            _caption(recipe, kind, findings),
            "",
        ]
        lines += [f"([SVG]({stem}.svg))", ""]
    missing = [kind for kind in recipe.figures if kind not in kinds]
    if missing:
        lines += [f"Not drawn, because the records hold nothing for it: {', '.join(missing)}.", ""]
    rows = _gain_rows(recipe, findings)
    if rows:
        spread = f"interval{_alone(findings.sample)}"
        header = ["mixer", "FLOPs", "loss", f"gain over {recipe.label(recipe.baseline)}", spread, "from"]
        lines += ["### Compute-equivalent gain", "", *_table(header, rows)]
    if findings.isoflops:
        header = [
            "mixer",
            "FLOPs",
            "sizes",
            "best measured (loss)",
            "parabola's minimum (loss)",
            f"interval{_alone(findings.sample)}",
            "learning rate",
        ]
        lines += ["### Sizes at equal FLOPs", "", *_table(header, _isoflop_rows(recipe, findings))]
        lines += ["### Parametric law", "", *_law_lines(recipe, findings)]
    if findings.flags:
        rows = [[recipe.label(f.mixer), f"{f.budget:.3g}", f.size, f.kind, f.text] for f in findings.flags]
        lines += ["### What the data do not bound", "", *_table(["mixer", "FLOPs", "size", "what", "finding"], rows)]
    return lines


def summary(recipe: Recipe, results: Sequence[Findings]) -> str:
    """Return the verdicts as JSON, for other programs; numbers to six digits."""
    contexts = {}
    for findings in results:
        contexts[str(findings.context)] = {
            "headline": headline(recipe, findings),
            "unknown_noise": findings.sample.unknown,
            "verdicts": {c: [asdict(v) for v in vs] for c, vs in findings.verdicts.items()},
            "gains": [asdict(g) for g in findings.gains],
            "envelope_gains": {m: [asdict(g) for g in gs] for m, gs in findings.envelope_gains.items()},
            "flags": [asdict(f) for f in findings.flags],
            "checks": [asdict(c) for c in findings.checks],
        }
    whole = {"sweep": recipe.name, "recipe": recipe.fingerprint(), "contexts": contexts}
    return json.dumps(_rounded(whole), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _rounded(value: object) -> object:
    # Six digits, as in the figures: machines differ in the last bits of a sum.
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value


def build(
    recipe: Recipe, records: Sequence[CellRecord], parts: Sequence[Coverage] = (), timings: Sequence[Timing] = ()
) -> dict[str, bytes]:
    """Return every file of a report by its relative path; a pure function of its arguments.

    Args:
        records: finished cells.
        parts: see `page`; with them, findings rest on the cells that the recipe asks for.
        timings: give the records their seconds where they have them.

    Errors:
        ValueError: there are no records.
    """
    import pyarrow.parquet

    if not records:
        raise ValueError(f"sweep {recipe.name!r} has no records yet: powertrain sweep run {recipe.name}")
    records = with_timings(records, timings)
    asked = asked_for(parts)
    used = compared(records, asked) if parts else records
    others = [r for r in records if r.cell not in asked.get(r.place, ())] if parts else []
    standing_in = {r.cell for r in used}
    aside = [r for r in others if r.cell not in standing_in]
    results = [analyse(recipe, used, context, timings, aside) for context in sorted({r.context for r in used})]
    files: dict[str, bytes] = {}
    drawn: list[tuple[int, Figure]] = []
    with style():
        for findings in results:
            for kind in recipe.figures:
                figure = DRAW[kind](recipe, findings)
                if figure is None:
                    continue
                drawn.append((findings.context, kind))
                for suffix, content in render(figure).items():
                    files[f"figures/{kind}-{findings.context}.{suffix}"] = content
    files["README.md"] = page(recipe, results, drawn, parts, others).encode()
    files["summary.json"] = summary(recipe, results).encode()
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table(records), buffer, compression="zstd")
    files["table.parquet"] = buffer.getvalue()
    return files


def write(files: dict[str, bytes], directory: Path) -> None:
    """Write a report, replacing the one before; figures that are no longer drawn are removed."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    for path in (directory / "figures").glob("*"):
        # What begins with a dot may be another report's, half written.
        if f"figures/{path.name}" not in files and not path.name.startswith("."):
            path.unlink()
