"""Puts the page together: one HTML file that asks the network for nothing, and the same facts as ``report.json``."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyalign import __version__
from polyalign.evaluation.report import comparison, completions, pictures, questions, sounds, training
from polyalign.evaluation.report.charts import interval_row, interval_scale
from polyalign.evaluation.report.clouds import CLOUD_STYLE
from polyalign.evaluation.report.clouds import SCRIPT as CLOUD_SCRIPT
from polyalign.evaluation.report.collect import ReportData, collect
from polyalign.evaluation.report.markup import duration, figures, foreign, note, number, signed, text
from polyalign.evaluation.report.readings import cautions, displacement
from polyalign.evaluation.report.tallies import tallies
from polyalign.evaluation.report.verdict import THRESHOLDS, Verdict, decide, deciding_statistics, describe

FURTHER_LOOKS = 12
"""Questions that are shown for the attention alone."""

HERE = Path(__file__).parent

KIND = {
    "improved": "good",
    "no change": "even",
    "over-optimised": "warn",
    "diverged": "bad",
    "not evaluated": "even",
}
"""Class of the style sheet for each verdict."""


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` and ``report.json`` into the run folder, whole or not at all, and return the former's path.

    Raises:
        UserError: there is no such folder, or nothing of a run lies in it.
    """
    data = collect(run_folder)
    verdict = decide(data)
    _replace(run_folder / "report.json", json.dumps(facts(data, verdict), indent=2, ensure_ascii=False) + "\n")
    page = run_folder / "report.html"
    _replace(page, html_page(data, verdict))
    return page


def html_page(data: ReportData, verdict: Verdict) -> str:
    """The whole document. Its policy allows only what the file itself holds: data URIs, and this very style and script."""
    style, script = (HERE / "style.css").read_text(encoding="utf-8"), (HERE / "script.js").read_text(encoding="utf-8")
    scripts = [script]
    if data.outputs == "cloud":
        style, scripts = style + CLOUD_STYLE, [script, CLOUD_SCRIPT.read_text(encoding="utf-8")]
    allowed = " ".join(f"'{_source_hash(one)}'" for one in scripts)
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src '{_source_hash(style)}'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = sections(data)
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in parts)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{content}</section>'
        for key, title, content in parts
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n<meta name="referrer" content="no-referrer"/>\n'
        f"<title>{text(verdict.state.capitalize())}: {text(data.title, 120)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<header class="top"><p class="brand">polyalign <span>alignment report</span></p>'
        f'<p class="run">{foreign(data.title, 120)}</p></header>\n'
        f'<main>{_head(data, verdict)}<nav aria-label="Sections"><ul>{links}</ul></nav>{body}</main>\n'
        f"<footer><p>Written by polyalign {text(__version__)}. One file, no connections: send it as it is.</p></footer>\n"
        f"{''.join(f'<script>{one}</script>' for one in scripts)}\n</body>\n</html>\n"
    )


def sections(data: ReportData) -> list[tuple[str, str, str]]:
    """(anchor, title, content) in the order of the page; a part with nothing to show says so."""
    evaluation, metrics = data.evaluation, data.metrics
    parts: list[tuple[str, str, str]] = []
    if evaluation and data.outputs == "cloud":
        parts += _of_clouds(data, evaluation)
    elif evaluation:
        items = evaluation.get("items") or []
        limit = comparison.GRID_AT_MOST if data.grid is None else min(data.grid, comparison.GRID_AT_MOST)
        shown = comparison.select(items, limit)
        looked = [item for item in questions.kept(data.folder, items) if item not in shown][:FURTHER_LOOKS]
        drawn = [*comparison.regressions(items), *shown, *looked]
        names = [*pictures.names_of(drawn), *questions.names_of(data.folder, drawn)] if data.embed_images else []
        album = (sounds if data.outputs == "sound" else pictures).album(data.folder, names)
        grid = (
            comparison.grid(shown, len(items), album, embedded=data.embed_images) if shown else note("No comparisons to show.")
        )
        told = tallies(evaluation)
        parts += [
            ("wins", "Win rates", comparison.win_rates(evaluation)),
            *([("groups", "Right answers by group", told)] if told else []),
            ("grid", "Before and after", grid),
            *_looks(data, items, looked, album),
            ("worst", "Worst regressions", comparison.worst(evaluation, album)),
            ("tasks", "By task", comparison.tasks(evaluation)),
            ("alarms", "Scores and alarms", comparison.scores_and_alarms(data)),
        ]
    else:
        parts.append(
            ("wins", "Win rates", note("The run has no evaluation: no win rate, no before and after, no regressions."))
        )
    absent = note("The run has no metrics.jsonl: no curves.")
    by_timestep = ("timesteps", "Margins by timestep", training.timesteps(metrics) if metrics else absent)
    timesteps = [] if data.outputs == "text" or distilled(data) else [by_timestep]  # tokens and distillation have none
    parts += [
        ("curves", "Training", _curves(data) if metrics else absent),
        ("diagnosis", "Diagnosis", diagnosis(data)),
        *timesteps,
        ("data", "Data card", _data_card(data)),
        ("recipe", "Changed from the recipe", training.recipe(data)),
        ("cost", "Time and memory", training.cost(data.stages)),
        ("environment", "Environment and hashes", training.environment(data)),
        ("again", "Run it again", training.command(data)),
    ]
    return parts


def _looks(data: ReportData, items: Any, further: list[Any], album: pictures.Album[Any]) -> list[tuple[str, str, str]]:
    """The section on attention; none where it was not kept. ``further`` are questions that no other section shows."""
    words = questions.where_they_look(data.folder, items)
    cards = comparison.plain_cards(further, album)
    return [("looks", "Where the models look", words + cards)] if words or cards else []


def _of_clouds(data: ReportData, evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The sections on completed scans."""
    block = evaluation.get("completions")
    shown = completions.by_steps(block) if block else note("Distances by number of steps were not recorded.")
    return [
        ("steps", "Distances by steps", shown),
        ("clouds", "Before and after", completions.clouds(data)),
        ("wins", "Scan by scan", comparison.win_rates(evaluation)),
    ]


def distilled(data: ReportData) -> bool:
    """Whether the run trained several networks in turns, so that its loss is no likelihood's."""
    return data.metrics is not None and any(name.startswith("student/") for name in data.metrics.columns)


def _curves(data: ReportData) -> str:
    assert data.metrics is not None
    if distilled(data):
        return completions.curves(data.metrics)
    return training.curves(data.metrics, data.config.get("objective"))


def _data_card(data: ReportData) -> str:
    if data.outputs != "cloud":
        return training.data_card(data)
    return completions.data_card(data) + (training.data_card(data) if data.pairs else "")


def diagnosis(data: ReportData) -> str:
    """What ``polyalign diagnose`` finds in the run folder. Imported here, since its verdict is the report's own."""
    from polyalign.evaluation.diagnose import as_markup, diagnose

    return as_markup(diagnose(data.folder))


def facts(data: ReportData, verdict: Verdict) -> dict[str, Any]:
    """The content of report.json: what the page says, without the pictures."""
    evaluation = {key: value for key, value in (data.evaluation or {}).items() if key != "items"}
    items = (data.evaluation or {}).get("items") or []
    reading = displacement(data.metrics)
    summary = {
        "title": data.title,
        "verdict": {
            "state": verdict.state,
            "sentence": verdict.sentence,
            "rule": verdict.rule.name,
            "says": verdict.rule.says,
            "found": verdict.rule.found,
        },
        "rules": [asdict(rule) for rule in verdict.rules],
        "thresholds": asdict(THRESHOLDS),
        "cautions": cautions(data),
        "evaluation": evaluation or None,
        "worst_regressions": [{**item, "gain": comparison.gain(item)} for item in comparison.regressions(items)],
        "displacement": asdict(reading) if reading else None,
        "training": _ends(data),
        "pairs": {key: value for key, value in (data.pairs or {}).items() if key != "examples"} or None,
        "recipe": asdict(data.recipe) if data.recipe else None,
        "stages": data.stages,
        "environment": data.environment,
        "files": data.files,
        "command": training.command_words(data.environment),
        "missing": list(data.missing),
        "polyalign": __version__,
    }
    return _finite(summary)


def _ends(data: ReportData) -> dict[str, Any] | None:
    """Steps, and each figure's mean over the first and last tenth of training."""
    metrics = data.metrics
    if metrics is None:
        return None
    ends = {name: [metrics.first_tenth(name), metrics.last_tenth(name)] for name in metrics.columns}
    return {"steps": int(metrics.steps[-1]), "first_and_last_tenth": ends}


def _head(data: ReportData, verdict: Verdict) -> str:
    kind = KIND[verdict.state]
    said = cautions(data)
    notes = "".join(f"<li>{foreign(caution, 600)}</li>" for caution in said)
    missing = "".join(f"<li>{foreign(line)}</li>" for line in data.missing)
    return (
        f'<section class="verdict {kind}" aria-labelledby="verdict-title">'
        f'<h1 id="verdict-title">{text(verdict.state.capitalize())}</h1>'
        f'<p class="sentence">{foreign(verdict.sentence, 600)}</p>{_head_bar(data.evaluation)}{figures(_key_figures(data))}'
        f'<p class="rule"><b>The rule that fired: {text(verdict.rule.name)}.</b> It fires when {text(verdict.rule.says, 600)}. '
        f"Found: {foreign(verdict.rule.found, 600)}.</p>{_all_rules(verdict)}</section>"
        + (f'<aside class="cautions"><h2>Keep in mind</h2><ul>{notes}</ul></aside>' if notes else "")
        + (f'<aside class="missing"><h2>Not found in this run</h2><ul>{missing}</ul></aside>' if missing else "")
    )


def _head_bar(evaluation: Mapping[str, Any] | None) -> str:
    if not evaluation:
        return ""
    rate = evaluation["win_rate"]
    low, high = rate["wilson"]
    bar = interval_row("win rate over the base", low, rate["rate"], high, colour="head", says=describe(rate))
    said = "scores more" if deciding_statistics(evaluation) else "better"
    words = f'<p class="scale-words"><span>base {said}</span><span>aligned {said}</span></p>'
    return f'<div class="head-bar">{bar}{interval_scale()}{words}</div>'


def _key_figures(data: ReportData) -> list[tuple[str, str, str]]:
    cells: list[tuple[str, str, str]] = []
    if data.evaluation:
        rate, scores = data.evaluation["win_rate"], data.evaluation.get("scores") or {}
        low, high = rate["wilson"]
        decided = rate["wins"] + rate["losses"]
        remark = f"of {decided} decided, 95 % interval {100 * low:.1f} to {100 * high:.1f}"
        cells.append(("win rate", f"{100 * rate['rate']:.1f} %", remark))
        tally = f"{rate['wins']} / {rate['losses']} / {rate['ties']}"
        cells.append(("won / lost / tied", tally, f"of {decided + rate['ties']} comparisons"))
        if "base" in scores and "aligned" in scores:
            before, after = scores["base"]["mean"], scores["aligned"]["mean"]
            cells.append(("mean score", f"{number(before)} \u2192 {number(after)}", signed(after - before)))
    if data.pairs and isinstance(data.pairs.get("pairs"), int):
        trained = data.metrics.pairs if data.metrics else None
        kept = "" if trained in (None, data.pairs["pairs"]) else f", {trained:,} of them trained on"
        cells.append(("pairs", f"{data.pairs['pairs']:,}", f"from {data.pairs.get('prompts', '?')} prompts{kept}"))
    if data.metrics:
        cells.append(("steps", f"{int(data.metrics.steps[-1]):,}", _loss_words(data)))
    spent = sum(float(block.get("seconds") or 0) for block in data.stages.values())
    if spent:
        cells.append(("time", duration(spent), f"{len(data.stages)} stages"))
    return cells


def _loss_words(data: ReportData) -> str:
    name = data.metrics.telling_loss if data.metrics else "loss"
    last = data.metrics.last_tenth(name) if data.metrics else None
    return "no finite loss" if last is None else f"{name} at the end {number(last)}"


def _all_rules(verdict: Verdict) -> str:
    state = {True: "fired", False: "no", None: "cannot be asked"}
    rows = []
    for rule in verdict.rules:
        decides = rule is verdict.rule
        rows.append(
            f'<li class="{"fired" if decides else ""}"><p><b>{text(rule.name)}</b> \u2192 {text(rule.state)} '
            f'<span class="badge {"even" if decides else "tie"}">{_rule_state(decides, state[rule.fired])}</span></p>'
            f'<p class="quiet">If {text(rule.says, 600)}.<br/>Found: {foreign(rule.found, 600)}.</p></li>'
        )
    return (
        '<details><summary>All rules, in the order they are asked</summary><p class="quiet">Thresholds were fixed in the '
        f'code before any run; the first rule that holds decides.</p><ol class="rules">{"".join(rows)}</ol></details>'
    )


def _rule_state(decides: bool, state: str) -> str:
    """'holds' marks a rule that would have fired, had none before it."""
    return "decides" if decides else "holds too" if state == "fired" else state


def _finite(value: Any) -> Any:
    """JSON knows no NaN: such numbers become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _source_hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(content, encoding="utf-8", errors="replace", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
