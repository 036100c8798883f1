"""A diagnosis for people: on the terminal, and as a section of the report."""

from __future__ import annotations

import textwrap

from polyalign.evaluation.diagnose.diagnosis import Diagnosis
from polyalign.evaluation.diagnose.findings import Finding
from polyalign.evaluation.report.markup import foreign, text

WIDTH = 100


def as_text(found: Diagnosis) -> str:
    """The verdict, then each finding with its numbers, its rule and its cure, then what could not be asked."""
    head = found.state if found.cause is None or found.cause == found.state else f"{found.state}: {found.cause}"
    if found.state == "improved":
        head = "improved" if found.cause is None else f"improved, with a caution: {found.cause}"
    lines = [f"{found.folder}: {head}", found.sentence]
    lines += [] if found.findings and found.evidence == found.findings[0].found else _labelled("found", found.evidence)
    for finding in found.findings:
        lines += ["", f"* {finding.cause}", *_labelled("found", finding.found), *_labelled("rule", finding.rule)]
        lines += _labelled("cure", finding.cure) if finding.cure else []
    if found.unanswered:
        lines += ["", "not enough to say:"]
        for finding in found.unanswered:
            lines += _wrapped(f"- {finding.cause}: {finding.found.removeprefix('not enough to say: ')}", "    ")
    clear = [finding.cause for finding in found.asked if finding.holds is False]
    if clear:
        lines += ["", *_wrapped(f"asked, and not so: {', '.join(dict.fromkeys(clear))}", "  ")]
    if found.missing:
        lines += ["", "not found in this run:", *(line for item in found.missing for line in _wrapped(f"- {item}", "    "))]
    return "\n".join(lines)


def _labelled(label: str, content: str) -> list[str]:
    return _wrapped(f"  {label + ':':7}{content}", " " * 9)


def _wrapped(content: str, indent: str) -> list[str]:
    return textwrap.wrap(content, WIDTH, subsequent_indent=indent, break_long_words=False)


def as_markup(found: Diagnosis) -> str:
    """The section of the report: HTML of the report's own classes, every foreign word escaped."""
    head = f"<p><b>{text(found.state.capitalize())}.</b> {text(found.sentence)} Found: {foreign(found.evidence, 600)}.</p>"
    if not found.findings:
        return head + _all_rules(found)
    items = "".join(
        f'<li class="fired"><p><b>{text(finding.cause)}</b> <span class="badge tie">{text(finding.state)}</span></p>'
        f'<p>Found: {foreign(finding.found, 600)}.</p><p class="quiet">Rule: {text(finding.rule, 800)}.</p>'
        f"<p>{text(finding.cure, 600)}</p></li>"
        for finding in found.findings
    )
    return f'{head}<ol class="rules">{items}</ol>{_all_rules(found)}'


def _all_rules(found: Diagnosis) -> str:
    rows = "".join(
        f"<li><p><b>{text(finding.cause)}</b> {_answer(finding)}</p>"
        f'<p class="quiet">{text(finding.rule, 800)}.<br/>{foreign(finding.found, 600)}.</p></li>'
        for finding in found.asked
    )
    return f'<details><summary>All questions asked</summary><ol class="rules">{rows}</ol></details>'


def _answer(finding: Finding) -> str:
    words = {True: "holds", False: "no", None: "not enough to say"}
    return f'<span class="badge {"tie" if finding.holds else "even"}">{words[finding.holds]}</span>'
