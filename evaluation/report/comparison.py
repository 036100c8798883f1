"""The page's sections on the outputs: win rates, before and after, regressions, tasks, statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polyalign.core.randomness import seed_of
from polyalign.evaluation.diversity import THUMBNAIL
from polyalign.evaluation.report import answers, charts, pictures, questions
from polyalign.evaluation.report.collect import ReportData
from polyalign.evaluation.report.markup import foreign, note, number, signed, table, text
from polyalign.evaluation.report.verdict import (
    broken_counts,
    counts,
    deciding_statistics,
    describe,
    is_better,
    is_worse,
    only_statistics,
    p_value,
    statistic_alarm,
)

GRID_AT_MOST = 120
FIRST_SHOWN = 12
"""Cards before the button that shows the rest; the style sheet hides from the next one on."""

WORST_SHOWN = 8

DISTANCES = {
    "rms": f"Root mean square difference of {THUMBNAIL} x {THUMBNAIL} thumbnails (0 to 1), which sees colours and layout; mean",
    "cosine": "One less the cosine of the outputs' features; mean",
}
"""What the figures of :func:`diversity` are, by metric."""

Item = Mapping[str, Any]


def gain(item: Item) -> float:
    return float(item["aligned_score"]) - float(item["base_score"])


def _lot(item: Item) -> int:
    """A fixed lot for each item, so that among equal gains no prompt comes first by its letters."""
    return seed_of(0, "grid", str(item["prompt"]), int(item["seed"]))


def select(items: Sequence[Item], limit: int) -> list[Item]:
    """All items if they are few; else a third biggest gains, a third worst regressions, the rest a keyed choice of the others.

    Sorted by gain, biggest first.
    """
    ranked = sorted(items, key=lambda item: (-gain(item), _lot(item)))
    if len(ranked) <= limit:
        return ranked
    third = limit // 3
    ends = ranked[:third] + (ranked[-third:] if third else [])
    inner = ranked[third : len(ranked) - third]
    keyed = sorted(inner, key=_lot)
    return sorted(ends + keyed[: limit - len(ends)], key=lambda item: (-gain(item), _lot(item)))


def regressions(items: Sequence[Item]) -> list[Item]:
    """The items that lost most, worst first."""
    lost = [item for item in items if gain(item) < 0]
    return sorted(lost, key=lambda item: (gain(item), _lot(item)))[:WORST_SHOWN]


def win_rates(evaluation: Mapping[str, Any]) -> str:
    """The deciding judge first, then the others and the arms, each with its interval and the line at one half."""
    judge = evaluation.get("judge") or {}
    statistics = bool(deciding_statistics(evaluation))
    role = "a picture statistic" if statistics else "the deciding judge"
    rows = [_win_row(f"{foreign(judge.get('name', 'judge'))}, {role}", evaluation["win_rate"], even=statistics)]
    for name, block in (evaluation.get("other_judges") or {}).items():
        statistic = bool(only_statistics(name, block))
        role = "a picture statistic" if statistic else "another judge"
        rows.append(_win_row(f"{foreign(name)}, {role}", block, even=statistic))
    for name, arm in (evaluation.get("arms") or {}).items():
        rows.append(_win_row(f"arm {foreign(name)} over the base", arm.get("win_rate", arm), even=statistics))
        if "aligned_over_this" in arm:
            rows.append(_win_row(f"aligned over arm {foreign(name)}", arm["aligned_over_this"], even=statistics))
    scale = (
        '<div class="win scale-row"><div></div><div class="win-bar">'
        f"{charts.interval_scale()}</div><div></div></div>"
        '<p class="scale-words"><span>the other is better</span><span>the first is better</span></p>'
    )
    rate = evaluation["win_rate"]
    low, high = rate["bootstrap"]
    with_ties = (
        f"With ties counted as half a win: {rate['rate_with_ties']:.3f}, bootstrap interval {low:.3f} to {high:.3f} "
        f"(over {text(evaluation.get('prompts', '?'))} prompts)."
    )
    items = evaluation.get("items") or []
    made = "answered" if answers.are_texts(items) else "sounded" if pictures.are_sounds(items) else "drew"
    made = f"{made} the same prompts"
    if "completions" in evaluation:
        made = "completed the same scans"
    return (
        f"<p>Both models {made} with the same seeds. A dot is the share of decided comparisons that were won, "
        "its bar the 95 % Wilson interval; a bar that stays right of the line at 0.5 is a win beyond chance.</p>"
        f'<div class="wins">{"".join(rows)}{scale}</div>{_split_bar(rate)}{note(with_ties)}{arms(evaluation)}'
    )


def arms(evaluation: Mapping[str, Any]) -> str:
    """The aligned model and each further arm on the same prompts and seeds; empty if the run trained no arm."""
    blocks = evaluation.get("arms") or {}
    if not blocks:
        return ""
    scores = evaluation.get("scores") or {}
    rows = [["aligned", *_tally(evaluation["win_rate"]), _mean(scores.get("aligned")), "\u2013"]]
    for name, arm in blocks.items():
        against = arm.get("aligned_over_this")
        shown = f"{_tally(against)[0]}<br/>{counts(against)}" if against else "\u2013"
        rows.append([foreign(name, 60), *_tally(arm.get("win_rate", arm)), _mean(arm.get("scores")), shown])
    head = ["model", "win rate over the base", "comparisons", "mean score", "aligned against it"]
    words = "Trained on the same pairs at the same cost, judged on the same prompts and seeds."
    return f"<h3>Aligned and its arms</h3><p>{words}</p>{table(head, rows, numeric=(3,))}"


def _tally(block: Mapping[str, Any]) -> list[str]:
    low, high = block["wilson"]
    return [f"<b>{block['rate']:.3f}</b> [{low:.3f}, {high:.3f}]", counts(block)]


def _mean(block: Mapping[str, Any] | None) -> str:
    return f"{block['mean']:.3f}" if block else "\u2013"


def _win_row(label: str, block: Mapping[str, Any], *, even: bool) -> str:
    """``even`` takes the colours of better and worse away, for what is no judge of quality."""
    low, high = block["wilson"]
    kind = "even" if even else "good" if is_better(block) else "bad" if is_worse(block) else "even"
    bar = charts.interval_row("win rate", low, block["rate"], high, colour=kind, says=describe(block))
    return (
        f'<div class="win"><div class="win-name">{label}</div><div class="win-bar">{bar}</div>'
        f'<div class="win-figures"><b>{block["rate"]:.3f}</b> <span>[{low:.3f}, {high:.3f}]</span> '
        f"<span>{counts(block)}, p = {p_value(block['sign_test_p'])}</span>"
        "</div></div>"
    )


def _split_bar(rate: Mapping[str, Any]) -> str:
    """Won, tied and lost as one bar: how much of the whole the win rate speaks of."""
    total = rate["wins"] + rate["losses"] + rate["ties"]
    if not total:
        return ""
    parts, left = [], 0.0
    for key, kind, name in (("wins", "good", "won"), ("ties", "tie", "tied"), ("losses", "bad", "lost")):
        width = 100 * rate[key] / total
        parts.append(
            f'<rect class="part {kind}" x="{left:.2f}%" width="{width:.2f}%" height="14">'
            f"<title>{rate[key]} {name}</title></rect>"
        )
        left += width
    says = f"{rate['wins']} won, {rate['ties']} tied, {rate['losses']} lost of {total}"
    keys = "".join(
        f'<li><span class="key {kind}"></span>{rate[key]} {name} ({100 * rate[key] / total:.0f} %)</li>'
        for key, kind, name in (("wins", "good", "won"), ("ties", "tie", "tied"), ("losses", "bad", "lost"))
    )
    return (
        f'<div class="split"><svg width="100%" height="14" role="img" aria-label="{says}">{"".join(parts)}</svg>'
        f'<ul class="legend">{keys}</ul></div>'
    )


def grid(items: Sequence[Item], total: int, shown: pictures.Album, *, embedded: bool) -> str:
    """Before and after on the same seeds, with buttons that sort."""
    which = (
        f"All {total} comparisons"
        if len(items) == total
        else (f"{len(items)} of {total} comparisons: the biggest gains, the worst regressions and a fixed choice of the rest")
    )
    texts, kind = answers.are_texts(items), "sounds" if pictures.are_sounds(items) else "pictures"
    said = [f"{which}. Left the base, right the aligned model; below, the judge's score of each."]
    pictured = questions.are_pictured(items)
    if pictured:
        said = [f"{which}. Each with its pictures, the answers of every model and the judge's verdict."]
        looked = (
            "Colours over pictures: where an answer's attention to pictures went, and its share that went to the right place."
        )
        said += [looked] if questions.any_looks(items, shown) else []
    elif texts:
        said.append("Words that the other answer does not have are marked; all answers lie in samples/outputs.jsonl.")
    if not embedded and (pictured or not texts):
        said.append(f"The recipe asks for no {kind} in this file (report.embed_images); they lie in samples/.")
    if shown.left_out:
        said.append(f"{shown.left_out} {kind} are left out to keep this file small.")
    if shown.unreadable:
        said.append(f"{shown.unreadable} {kind} are missing or unreadable.")
    if len(items) > 1:
        buttons = "".join(
            f'<button type="button" data-sort="{key}" aria-pressed="{"true" if key == "gain" else "false"}">{label}</button>'
            for key, label in (("gain", "Biggest gains"), ("loss", "Worst regressions"), ("prompt", "By prompt"))
        )
        controls = f'<div class="controls" role="group" aria-label="Sort the comparisons">{buttons}</div>'
    else:
        controls = ""
    cards = "".join(card(item, shown, place) for place, item in enumerate(items))
    many = len(items) > FIRST_SHOWN
    more = f'<p class="more"><button type="button" id="more">Show all {len(items)}</button></p>' if many else ""
    styles = f"{_cards(items)}{' short' if many else ''}"
    return (
        f'<p>{" ".join(said)}</p>{controls}<ul class="{styles}" id="cards">{cards}</ul>{more}'
        '<p id="sorted" class="unseen" role="status"></p>'
    )


def _cards(items: Sequence[Item]) -> str:
    """Classes of a list of cards: those of texts and of sounds are wider."""
    if questions.are_pictured(items):
        return "cards texts pictured"
    return "cards texts" if answers.are_texts(items) else "cards sounds" if pictures.are_sounds(items) else "cards"


def card(item: Item, shown: pictures.Album, place: int) -> str:
    """One comparison: two pictures or two texts, the prompt, the scores, the gain."""
    change = gain(item)
    kind, word = ("good", "better") if change > 0 else ("bad", "worse") if change < 0 else ("tie", "same")
    task = f'<span class="task">{foreign(str(item["task"]).replace("_", " "), 40)}</span>' if item.get("task") else ""
    texts = answers.are_texts([item])
    shown_gain = signed(change) if change else "0"
    foot = (
        f'<p class="foot"><span class="badge {kind}"><span class="unseen">{word}, </span>{shown_gain}</span>'
        f'{task}<span class="seed">seed {text(item["seed"], 24)}</span></p>'
    )
    opening = f'<li class="card {kind}" data-gain="{change:.6g}" data-prompt="{text(item["prompt"])}" data-place="{place}">'
    if texts and questions.are_pictured([item]):
        return f"{opening}{questions.card(item, shown)}{foot}</li>"
    outputs = _answers(item) if texts else [_picture(item, side, shown) for side in ("base", "aligned")]
    sides = "".join(
        f"<figure>{output}<figcaption>{side} <b>{number(item[f'{side}_score'])}</b></figcaption></figure>"
        for side, output in zip(("base", "aligned"), outputs, strict=True)
    )
    both = f'<div class="sides">{sides}</div>'
    asked = (
        answers.block(answers.plain(item["prompt"]), "asked") if texts else f'<p class="prompt">{foreign(item["prompt"])}</p>'
    )
    return f"{opening}{asked + both if texts else both + asked}{foot}</li>"


def _answers(item: Item) -> list[str]:
    """The two texts, with what differs marked."""
    return [answers.block(content) for content in answers.marked(str(item["base_text"]), str(item["aligned_text"]))]


def _picture(item: Item, side: str, shown: pictures.Album) -> str:
    sound = pictures.are_sounds([item])
    found = shown.pictures.get(str(item.get(f"{side}_{'sound' if sound else 'image'}")))
    if found is None:
        return f'<div class="absent">no {"sound" if sound else "picture"}</div>'
    return found.tag(f"{side}: {text_of(item)}, score {number(item[f'{side}_score'])}")


def text_of(item: Item) -> str:
    """Prompt and seed, for alternative texts (not yet escaped)."""
    return f"{item['prompt']}, seed {item['seed']}"


def worst(evaluation: Mapping[str, Any], shown: pictures.Album) -> str:
    """The worst regressions, whatever the verdict says."""
    lost = regressions(evaluation.get("items") or [])
    if not lost:
        return "<p>No comparison was lost.</p>"
    count = sum(gain(item) < 0 for item in evaluation["items"])
    which = f"The {len(lost)} worst of {count} comparisons" if count > len(lost) else f"Every comparison ({count})"
    return f"<p>{which} that the aligned model lost.</p>{plain_cards(lost, shown)}"


def plain_cards(items: Sequence[Item], shown: pictures.Album) -> str:
    """Comparisons in the order given; empty without any."""
    cards = "".join(card(item, shown, place) for place, item in enumerate(items))
    return f'<ul class="{_cards(items)}">{cards}</ul>' if items else ""


def tasks(evaluation: Mapping[str, Any]) -> str:
    """Mean score by task, with what was won and lost."""
    blocks = evaluation.get("tasks") or {}
    if not blocks:
        return note("The prompts name no tasks.")
    items = evaluation.get("items") or []
    rows = []
    for name, block in blocks.items():
        own = [gain(item) for item in items if item.get("task") == name]
        change = block["aligned"] - block["base"]
        kind = "good" if change > 0 else "bad" if change < 0 else "tie"
        won = f"{sum(g > 0 for g in own)} / {sum(g < 0 for g in own)}" if own else "\u2013"
        rows.append(
            [foreign(str(name).replace("_", " "), 60), str(block["n"]), f"{block['base']:.3f}", f"{block['aligned']:.3f}"]
            + [f'<span class="badge {kind}">{change:+.3f}</span>', won]
        )
    head = ["task", "n", "base", "aligned", "change", "won / lost"]
    return f"<p>Mean score of the deciding judge over n samples of each task.</p>{table(head, rows, numeric=(1, 2, 3, 4, 5))}"


def scores_and_alarms(data: ReportData) -> str:
    """Mean scores with intervals, and the statistics that give alarms."""
    evaluation = data.evaluation or {}
    scores = evaluation.get("scores") or {}
    rows = []
    for side, block in scores.items():
        low, high = block["interval"]
        rows.append([foreign(side, 40), f"{block['mean']:.3f}", f"{low:.3f} to {high:.3f}"])
    parts = [table(["mean score", "mean", "95 % bootstrap interval"], rows, numeric=(1, 2))] if rows else []
    broken = broken_counts(evaluation)
    if broken is not None:
        base, aligned, became, mended, total = broken
        word = text((evaluation.get("judge") or {}).get("broken_word") or "broken", 40)
        parts.append(
            f"<p>Outputs that the judge calls {word}: {base} of {total} before, {aligned} after "
            f"({became} became so, {mended} were mended).</p>"
        )
    parts.append(_lengths(evaluation["lengths"]) if data.outputs == "text" and evaluation.get("lengths") else "")
    parts.append(temporal(evaluation.get("temporal") or {}))
    parts.append(_statistics(evaluation.get("artefacts") or {}, data.outputs) if data.outputs != "text" else "")
    parts.append(diversity(evaluation.get("diversity") or {}))
    parts.append(implicit_reward(evaluation.get("implicit_reward") or {}))
    return "".join(parts)


def implicit_reward(block: Mapping[str, Any]) -> str:
    """How often the aligned model's own reward agrees with preferences it was not trained on; empty where it was not measured.

    ``block`` is what :func:`polyalign.evaluation.implicit_reward.implicit_reward_accuracy` returns.
    """
    if not block:
        return ""
    low, high = block["interval"]
    if low > 0.5:
        says = "it learnt something of the preference that holds for pairs it has not seen"
    elif high < 0.5:
        says = "it is wrong more often than chance: look whether chosen and rejected were exchanged"
    else:
        says = "the interval holds one half, which is chance"
    ties = f"; {text(block['ties_left_out'])} ties were left out" if block.get("ties_left_out") else ""
    return (
        f"<p><b>The model's own reward</b> prefers the chosen side in {100 * block['accuracy']:.1f} % of "
        f"{text(block['pairs'])} pairs that were kept aside (95 % interval {100 * low:.1f} to {100 * high:.1f} %): {says}.</p>"
        + note(f"The log-likelihood ratio to the reference, the mean of {text(block['draws'])} draw(s) for each pair{ties}.")
    )


def diversity(block: Mapping[str, Any]) -> str:
    """How different the outputs of one prompt are, base against aligned; empty where no prompt has two.

    ``block`` is what :func:`polyalign.evaluation.diversity.compare_diversity` returns.
    """
    if not block:
        return ""
    low, high = block["interval"]
    if high < 0:
        title, says = "It fell", "the aligned model's outputs of one prompt are more alike, which over-optimisation does first"
    elif low > 0:
        title, says = "It rose", "the aligned model's outputs of one prompt differ more from each other"
    else:
        title, says = "It did not change beyond chance", "the interval of the change holds zero"
    return (
        f"<p><b>Diversity within a prompt.</b> Base {number(block['base'])}, aligned {number(block['aligned'])}: "
        f"{signed(block['change'])}, 95 % interval {signed(low)} to {signed(high)}, over {text(block['prompts'])} prompts. "
        f"<b>{title}:</b> {says}.</p>" + note(f"{DISTANCES[block['metric']]} over every two outputs of a prompt.")
    )


def _lengths(blocks: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether answers became longer, which judges like without being asked and objectives teach without being told."""
    rows = []
    for name, block in blocks.items():
        low, high = block["interval"]
        rows.append(
            [foreign(name, 60), f"{block['base']:.1f}", f"{block['aligned']:.1f}", f"{block['change']:+.1f}"]
            + [f"{low:+.1f} to {high:+.1f}"]
        )
    head = ["length", "base", "aligned", "change", "95 % interval"]
    words = "Where answers grew, part of a win may be length alone: judges like long answers, and DPO's sums reward them."
    return f"<p>{words}</p>{table(head, rows, numeric=(1, 2, 3, 4))}"


TEMPORAL = {
    "presence_recall": "events asked for that are there",
    "order": "pairs of events there and in order",
    "order_given_present": "in order, of pairs that are there",
    "strict_match": "exactly what was asked for",
    "with_extra_events": "sounds with events nobody asked for",
}
"""What the shares of :func:`polyalign.evaluation.audio.temporal.summary` are called here."""


def temporal(block: Mapping[str, Any]) -> str:
    """What happens when in the sounds of each model; empty where no judge found events.

    ``block`` has the judge's name and version, and a :func:`polyalign.evaluation.audio.temporal.summary` of each model.
    """
    models = [name for name, found in block.items() if isinstance(found, Mapping)]
    rows = [
        [words, *(_share(block[name].get(key)) for name in models)]
        for key, words in TEMPORAL.items()
        if any(key in block[name] for name in models)
    ]
    if not rows:
        return ""
    head = ["events in time", *(foreign(name, 40) for name in models)]
    words = note(f"Found by the judge {foreign(block.get('judge', ''), 80)}; brackets are 95 % Wilson intervals.")
    return f"<h3>What sounds when</h3>{table(head, rows)}{words}"


def _share(block: Mapping[str, Any] | None) -> str:
    if not block:
        return "\u2013"
    low, high = block["interval"]
    return f"<b>{block['value']:.3f}</b> [{low:.3f}, {high:.3f}] of {block['of']:,}"


def _statistics(blocks: Mapping[str, Mapping[str, Any]], outputs: str) -> str:
    if not blocks:
        return note(f"No {outputs} statistics were recorded.")
    rows = []
    for name, block in blocks.items():
        low, high = block["interval"]
        alarm = statistic_alarm(block)
        rows.append(
            [
                foreign(str(name).replace("_", " "), 60),
                f"{block['base']:.4f}",
                f"{block['aligned']:.4f}",
                f"{block['change']:+.4f}",
            ]
            + [f"{low:+.4f} to {high:+.4f}", f"{block['base_spread']:.4f}"]
            + [f'<span class="badge {"bad" if alarm else "tie"}">{"alarm" if alarm else "quiet"}</span>']
        )
    head = ["statistic", "base", "aligned", "change", "95 % interval", "spread of the base", ""]
    shows = "sounds clip, hiss or fall silent" if outputs == "sound" else "pictures glare and grow grids"
    return (
        f"<p>Over-optimised {shows}. These statistics need no model; the verdict's rules say how far each may rise.</p>"
        + table(head, rows, numeric=(1, 2, 3, 4, 5))
    )
