"""The page's sections on training and data: curves, margins by timestep, data card, recipe, cost, environment."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from polyalign.evaluation.report import answers, charts, pictures, questions, sounds
from polyalign.evaluation.report.charts import Line, Points
from polyalign.evaluation.report.collect import Metrics, PairExample, ReportData
from polyalign.evaluation.report.markup import duration, figures, foreign, note, number, signed, size, table, text
from polyalign.evaluation.report.readings import (
    LEAST_VALUES,
    accuracy_reading,
    displacement,
    loss_reading,
    measure_of,
    moved,
    regulariser_reading,
    weight_reading,
)
from polyalign.evaluation.report.recipe import flatten
from polyalign.evaluation.report.tables import tables

NO_SCORES = {"edges": [], "counts": []}
"""The histogram of pairs whose preferences came without scores."""

LABELS = {"error": "error against the reference, %", "log-probability": "log-probability against the reference, nats"}
EXPLAINED = {
    "error": (
        "%",
        "Mean of (policy \u2212 reference) / reference over the last fifth of training, \u00b1 two standard errors. Both see "
        "the same noise and timesteps; lower error means likelier.",
    ),
    "log-probability": (
        "nats",
        "Mean of policy \u2212 reference, each summed over an answer's tokens, over the last fifth of training, \u00b1 two "
        "standard errors. Higher means likelier: 0.7 nats more is twice as likely.",
    ),
}
"""Unit and explanation of the two sides, by measure."""

TIMESTEP_BINS = 10
ENVIRONMENT_ROWS = 80
CHANGES_SHOWN = 80


STRATEGY_DROPS = ("ties", "reversed", "below_margin", "filtered", "duplicates", "silent", "over_limit")
"""Why comparisons of a strategy became no pair."""


def curves(metrics: Metrics, objective: object = None) -> str:
    """Errors or log-probabilities of both sides first, with their reading, then a chart for each figure of the objective.

    ``objective`` is the recipe's section, which says what the loss is made of.
    """
    parts = [_errors(metrics)]
    cells = [*_losses(metrics, objective)]
    cells += [
        _single(metrics, "rewards/accuracies", "Accuracy", "share of pairs", accuracy_reading(metrics), (0.5, "coin")),
        _single(metrics, "rewards/margins", "Margin", "reward difference", _margin_reading(metrics), (0.0, "")),
        _single(
            metrics,
            "gradient_weight",
            "Gradient weight",
            "\u03c3(\u2212margin)",
            weight_reading(metrics),
            (0.5, "at the start"),
        ),
        _single(metrics, "learning_rate", "Learning rate", "learning rate", _rate_reading(metrics), None, smooth=False),
        _single(
            metrics, "gradient_norm", "Gradient norm", "norm before clipping", "Spikes here come before a run diverges.", None
        ),
    ]
    absent = [name for name, cell in cells if not cell]
    parts.append(f'<div class="charts">{"".join(cell for _, cell in cells)}</div>')
    if absent:
        parts.append(note(f"Not logged: {', '.join(absent)}."))
    parts.append(
        note("Thick: running mean over about a twelfth of the steps. Faint: the raw figures. Point at a chart for values.")
    )
    return "".join(parts)


def _losses(metrics: Metrics, objective: object) -> list[tuple[str, str]]:
    """The loss with what its level is worth, and before it the preference part where that was logged."""
    said = f"{loss_reading(metrics)} {regulariser_reading(objective, metrics)}".strip()
    cells = [_single(metrics, "loss", "Loss", "loss", said, None)]
    if metrics.has("loss/preference"):
        words = loss_reading(metrics, "loss/preference")
        cells.insert(0, _single(metrics, "loss/preference", "Preference part of the loss", "loss", words, None))
    return cells


def _single(
    metrics: Metrics, name: str, title: str, y_label: str, says: str, level: tuple[float, str] | None, *, smooth: bool = True
) -> tuple[str, str]:
    """(title, chart), the chart empty if the figure was not logged."""
    if name not in metrics.columns or not len(metrics.series(name)[0]):
        return title.lower(), ""
    line = Line(title.lower(), "policy", *metrics.series(name))
    drawing = charts.line_chart(
        name.replace("/", "-"), [line], x_label="optimiser step", y_label=y_label, level=level, smooth=smooth
    )
    return title.lower(), f'<figure class="panel"><h3>{title}</h3>{drawing}<figcaption>{text(says, 600)}</figcaption></figure>'


def _errors(metrics: Metrics) -> str:
    """Chosen and rejected, each against the reference; where nothing of the reference was logged, the two rewards."""
    sides = [(side, moved(metrics, side)) for side in ("chosen", "rejected")]
    lines = [Line(side, side, *series) for side, series in sides if series]
    if lines:
        label = LABELS[measure_of(metrics) or "error"]
        return _two_sides("errors", lines, label, _displacement_words(metrics))
    lines = [
        Line(side, side, *metrics.series(name))
        for side in ("chosen", "rejected")
        if (name := f"rewards/{side}") in metrics.columns and len(metrics.series(name)[0])
    ]
    if not lines:
        return note("Neither errors nor rewards of the two sides were logged, so displacement cannot be seen.")
    words = (
        "<p>Reward is beta times the log-ratio to the reference: above zero the output became likelier than it was for the "
        "reference, below zero less likely. A falling chosen side is displacement.</p>"
    )
    return _two_sides("rewards", lines, "reward", words)


def _two_sides(name: str, lines: Sequence[Line], y_label: str, words: str) -> str:
    def draw(width: int) -> str:
        return charts.line_chart(
            f"{name}-{width}", lines, x_label="optimiser step", y_label=y_label, level=(0.0, "reference"), width=width
        )

    return _wide("Chosen and rejected, separately", draw, words)


def _displacement_words(metrics: Metrics) -> str:
    reading = displacement(metrics)
    if reading is None:
        return "<p>Only one of the two sides was logged.</p>"
    unit, explained = EXPLAINED[reading.measure]
    rows = "".join(
        f'<li><span class="key {side}"></span>{side}: <b>{signed(change.mean)} {unit}</b> '
        f'<span class="quiet">\u00b1 {number(2 * change.standard_error, 2)}</span></li>'
        for side, change in (("chosen", reading.chosen), ("rejected", reading.rejected))
    )
    return (
        f'<p class="reading"><b>{text(_sentence(reading.title))}.</b> {text(_sentence(reading.text))}</p>'
        f'<ul class="sides-list">{rows}</ul><p class="quiet">{explained} One curve of the margin would hide which side '
        "moved.</p>"
    )


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _wide(title: str, draw: Callable[[int], str], words: str) -> str:
    """A chart beside its reading. It is drawn twice, for wide and for narrow screens, and the style sheet shows one."""
    drawings = "".join(
        f'<div class="{kind}">{draw(width)}</div>' for kind, width in (("broad", charts.WIDE), ("slim", charts.NARROW))
    )
    return f'<figure class="panel wide"><div><h3>{title}</h3>{drawings}</div><figcaption>{words}</figcaption></figure>'


def _margin_reading(metrics: Metrics) -> str:
    last = metrics.last_tenth("rewards/margins")
    return "No margin was logged." if last is None else f"It ends at {number(last)}; zero is the reference."


def _rate_reading(metrics: Metrics) -> str:
    if "learning_rate" not in metrics.columns:
        return ""
    return f"At most {number(float(np.nanmax(metrics.columns['learning_rate'])))}."


def timesteps(metrics: Metrics) -> str:
    """Margin against diffusion timestep, first against last third of training."""
    rows = metrics.margins_by_timestep
    if not any(points for _, points in rows):
        return note("No margins by timestep were logged.")
    top = max(t for _, points in rows for t, _ in points) + 1e-9
    third = max(1, len(rows) // 3)
    groups = [
        _binned("first third of training", "plain", rows[:third], top),
        _binned("last third of training", "policy", rows[-third:], top),
    ]
    groups = [group for group in groups if len(group.x)]
    if not groups:
        return note(f"Too few margins were logged: no range of the timestep has {LEAST_VALUES}.")

    def draw(width: int) -> str:
        label = "timestep (0 clean, high noisy)"
        return charts.point_chart(f"timesteps-{width}", groups, x_label=label, y_label="margin", level=(0.0, ""), width=width)

    return _wide("Where the margin comes from", draw, f"<p>{text(_timestep_reading(groups[-1]))}</p>")


def _binned(label: str, colour: str, rows: Sequence[tuple[int, Sequence[tuple[float, float]]]], top: float) -> Points:
    """Mean and two standard errors of the margin in equal bins of the timestep; bins of too few values are left out."""
    t = np.array([t for _, points in rows for t, _ in points])
    margin = np.array([margin for _, points in rows for _, margin in points])
    bins = np.minimum((t / top * TIMESTEP_BINS).astype(int), TIMESTEP_BINS - 1)
    kept = [b for b in range(TIMESTEP_BINS) if (bins == b).sum() >= LEAST_VALUES]
    spreads = [2 * margin[bins == b].std(ddof=1) / (bins == b).sum() ** 0.5 for b in kept]
    return Points(
        label,
        colour,
        np.array([(b + 0.5) * top / TIMESTEP_BINS for b in kept]),
        np.array([margin[bins == b].mean() for b in kept]),
        np.array(spreads),
    )


def _timestep_reading(group: Points) -> str:
    clear = group.y > group.spread
    if not clear.any():
        return "At no timestep is the margin clearly above zero."
    best = int(np.argmax(group.y))
    share = f"clearly above zero in {int(clear.sum())} of {len(group.x)} ranges of the timestep"
    return (
        f"By the end the margin is {share} and largest around timestep {group.x[best]:.0f}. Low timesteps decide detail, "
        "high ones composition. Bars are two standard errors."
    )


def data_card(data: ReportData) -> str:
    """Where the pairs came from, what was dropped, how the scores lie, and a few pairs."""
    summary = data.pairs or {}
    cells = _counted(summary, data.outputs) + _left_out(data.left_out)
    parts = [figures(cells)] if cells else [note("No summary of the pairs was found.")]
    judge = summary.get("judge")
    if isinstance(judge, Mapping) and judge:
        known_keys = [f"version {foreign(judge['version'], 40)}"] if "version" in judge else []
        rest = [f"{text(key, 40)} {foreign(value, 80)}" for key, value in flatten(judge) if key not in ("name", "version")]
        name = foreign(judge.get("name", "not named"), 80)
        parts.append(f"<p>Decided by the judge {', '.join([name, *known_keys, *rest])}.</p>")
    parts.append(_strategies(summary.get("strategies")))
    parts.append(tables(summary.get("tables")))
    if judge:  # pairs that nobody judged have no scores
        parts.append(_histogram(summary.get("score_histogram")))
    parts.append(_examples(data.pair_examples))
    return "".join(parts)


def _left_out(counts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What of the pairs was not trained on."""
    words = {
        "too_long": ("pairs too long", "left out of training, never cut"),
        "above_ches": ("pairs above the CHES kept", "left out of training"),
        "undesirable": ("disliked answers", "left out: fine-tuning takes the liked ones"),
    }
    told = {key: words.get(key, (text(key, 40), "left out of training")) for key in counts}
    return [(told[key][0], f"{count:,}", told[key][1]) for key, count in counts.items() if isinstance(count, int)]


def _counted(summary: Mapping[str, Any], outputs: str) -> list[tuple[str, str, str]]:
    """The counts of pairs/summary.json as figures. What became no pair is told apart by its reason."""
    known = (
        ("prompts", "prompts", ""),
        ("rows", "rows read", ""),
        ("samples", f"{outputs}s" if "source" in summary else "samples drawn", ""),
        ("pairs", "pairs kept", ""),
        ("ties_dropped", "ties dropped", ""),
        ("unlabelled_dropped", "unlabelled dropped", "nobody chose"),
        ("rows_dropped", "rows dropped", "unusable; pairs/summary.json lists them"),
        ("below_margin", "below the margin", ""),
        ("over_limit", "over the limit per prompt", ""),
        ("reversed_dropped", "reversed", "the sound of the perturbed prompt scored higher"),
        ("filtered_dropped", "outside the judges' filter", ""),
        ("silent_dropped", "silent", "in no pair"),
        ("empty_dropped", "empty answers", "in no pair"),
        ("duplicates_dropped", "duplicates dropped", ""),
        ("no_pair_prompts", "prompts without a pair", ""),
    )
    cells = [
        (label, f"{summary[key]:,}", remark if summary[key] else "")
        for key, label, remark in known
        if isinstance(summary.get(key), int)
    ]
    if isinstance(share := summary.get("disagreement"), int | float):
        remark = f"{summary['disagreed']:,} of {summary['disagreed'] + summary['agreed']:,} pairs turned round"
        cells.append(("judge against the labels", f"{100 * share:.1f} %", remark))
    return cells


def _strategies(rows: Any) -> str:
    """Audio-alpaca's table: for each strategy its pairs and, by judge, the mean scores of winners and losers."""
    if not isinstance(rows, list) or not rows:
        return ""
    cells = []
    for row in rows:
        dropped = [f"{row[name]:,} {name.replace('_', ' ')}" for name in STRATEGY_DROPS if row.get(name)]
        for place, (judge, mean) in enumerate(row["scores"].items() or [("", {})]):
            named = [text(row["strategy"], 8), f"{row['pairs']:,} of {row['compared']:,}", ", ".join(dropped) or "none"]
            scores = [f"{mean[key]:.3f}" if key in mean else "" for key in ("chosen", "rejected", "difference")]
            cells.append([*(named if place == 0 else ["", "", ""]), foreign(judge, 40), *scores])
    head = ("strategy", "pairs of comparisons", "dropped", "judge", "mean chosen", "mean rejected", "difference")
    return table(head, cells, numeric=(4, 5, 6), caption="Pairs by strategy, with mean scores as in Tango 2's table.")


def _histogram(block: Any) -> str:
    if block == NO_SCORES:
        return ""
    if not isinstance(block, Mapping) or not block.get("counts") or len(block["edges"]) != len(block["counts"]) + 1:
        return note("No histogram of scores was recorded.")
    drawing = charts.histogram(block["edges"], block["counts"], what="the judge's scores of all samples")
    words = "The judge's score; the bars count samples."
    return f'<figure class="panel"><h3>Scores of all samples</h3>{drawing}<figcaption>{words}</figcaption></figure>'


def _examples(examples: Sequence[PairExample]) -> str:
    cards = []
    texts = any(isinstance(example.chosen, str) for example in examples)
    for example in examples:
        sides = []
        for side, shown, score in zip(
            ("chosen", "rejected"), _shown(example), (example.chosen_score, example.rejected_score), strict=True
        ):
            figure = f" <b>{number(score)}</b>" if score is not None else ""
            sides.append(f"<figure>{shown}<figcaption>{side}{figure}</figcaption></figure>")
        both = f'<div class="sides">{"".join(sides)}</div>'
        prompt = questions.of_pair(example) + (
            answers.block(answers.plain(example.prompt), "asked")
            if texts
            else f'<p class="prompt">{foreign(example.prompt)}</p>'
        )
        cards.append(f'<li class="card">{prompt + both if texts else both + prompt}</li>')
    if not cards:
        return note("No examples of pairs can be shown: the pair store holds none that can be read.")
    styles = "cards texts" if texts else "cards sounds" if _is_sound(examples[0]) else "cards"
    styles += " pictured" if examples[0].images else ""
    return f'<h3>The first {len(cards)} pairs</h3><ul class="{styles}">{"".join(cards)}</ul>'


def _is_sound(example: PairExample) -> bool:
    return isinstance(example.chosen, bytes) and sounds.looks_like_sound(example.chosen)


def _shown(example: PairExample) -> list[str]:
    """The chosen and the rejected output as HTML."""
    if isinstance(example.chosen, str) and isinstance(example.rejected, str):
        return [answers.block(content) for content in answers.marked(example.chosen, example.rejected)]
    contents = {"chosen": example.chosen, "rejected": example.rejected}
    if _is_sound(example):
        heard = {side: sounds.decode(content) if isinstance(content, bytes) else None for side, content in contents.items()}
        return [
            player.tag(f"{side}: {example.prompt}") if player else '<div class="absent">unreadable</div>'
            for side, player in heard.items()
        ]
    images = {side: pictures.decode(content) if isinstance(content, bytes) else None for side, content in contents.items()}
    return [
        pictures.picture(image, 128).tag(f"{side}: {example.prompt}") if image else '<div class="absent">unreadable</div>'
        for side, image in images.items()
    ]


def recipe(data: ReportData) -> str:
    """The changed keys, and how sure it is which recipe they are counted from."""
    found = data.recipe
    if found is None:
        return note("No recipe to compare with was found: the run does not name one and none is packaged for its modality.")
    how = {
        "stored": f"Compared with {text(found.name)}, stored by the run.",
        "named": f"Compared with the packaged recipe {text(found.name)}, which the run's command names.",
        "nearest": f"The run does not name its recipe; compared with the nearest packaged one, {text(found.name)}.",
    }[found.how]
    rest = f" {found.unstated} further keys are not stated in the recipe (its defaults are)." if found.unstated else ""
    if not found.changes:
        return f"<p>{how} Nothing that the recipe states was changed.{rest}</p>"
    rows = [
        [f"<code>{foreign(key, 120)}</code>", foreign(theirs, 160), foreign(ours, 160)]
        for key, theirs, ours in found.changes[:CHANGES_SHOWN]
    ]
    more = (
        note(f"{len(found.changes) - CHANGES_SHOWN} more changes are in report.json.")
        if len(found.changes) > CHANGES_SHOWN
        else ""
    )
    return f"<p>{how}{rest}</p>{table(['key', 'recipe', 'this run'], rows)}{more}"


def cost(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Time and peak memory of each stage."""
    if not stages:
        return note("No stages were recorded.")
    spent = {name: float(block.get("seconds") or 0) for name, block in stages.items()}
    total = sum(spent.values())
    rows = []
    for name, block in stages.items():
        share = spent[name] / total if total else 0.0
        peak = block.get("peak_memory_bytes")
        state = "" if block.get("finished", True) else ' <span class="badge bad">not finished</span>'
        bar = charts.share_bar(share, f"{100 * share:.0f} % of the time")
        rows.append(
            [foreign(name, 60) + state, duration(spent[name]), bar, size(peak) if isinstance(peak, int | float) else "\u2013"]
        )
    rows.append(["<b>all</b>", f"<b>{duration(total)}</b>", "", ""])
    return table(["stage", "time", "share", "peak memory"], rows, numeric=(1, 3))


def environment(data: ReportData) -> str:
    """Versions, devices and hashes: what a difference between two runs may come from."""
    leaves = [(key, value) for key, value in flatten(data.environment) if key != "argv"][:ENVIRONMENT_ROWS]
    parts = []
    if leaves:
        rows = [
            [f"<code>{foreign(key, 100)}</code>", foreign("\u2013" if value is None else value, 200)] for key, value in leaves
        ]
        parts.append(
            f"<details><summary>Environment, {len(leaves)} entries</summary>{table(['what', 'value'], rows)}</details>"
        )
    else:
        parts.append(note("No environment was recorded."))
    hashes = [[f"<code>{text(name)}</code>", f"<code>{text(value)}</code>"] for name, value in data.files.items()]
    for name, block in data.stages.items():
        if block.get("inputs_hash"):
            hashes.append([f"inputs of the stage {foreign(name, 60)}", f"<code>{text(block['inputs_hash'])}</code>"])
    if hashes:
        parts.append(f"<h3>SHA-256</h3>{table(['file', 'hash'], hashes, fixed=True)}")
    return "".join(parts)


def command(data: ReportData) -> str:
    """How to get this run again."""
    parts = []
    if (words := command_words(data.environment)) is not None:
        parts.append(f"<p>The command that made this run:</p><pre><code>{text(words, 1000)}</code></pre>")
    else:
        parts.append(note("The command was not recorded."))
    if data.config:
        parts.append(
            "<p>Or, with every value as it was resolved, from the run's own folder:</p>"
            "<pre><code>polyalign align config.yaml</code></pre>"
        )
    return "".join(parts)


def command_words(recorded: Mapping[str, Any]) -> str | None:
    """The recorded command as one would type it."""
    argv = recorded.get("argv")
    if not isinstance(argv, list) or len(argv) < 2:
        return None
    return f"polyalign {shlex.join(str(word) for word in argv[1:])}"
