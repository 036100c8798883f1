"""Small pieces of HTML, and numbers as people read them. Every text that was not written here passes through :func:`text`."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

LONGEST_TEXT = 300
"""Characters of a foreign text that are shown; prompts and configuration values have no upper limit of their own."""

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def text(value: object, longest: int = LONGEST_TEXT) -> str:
    """Escaped for element content and for quoted attributes, cut to ``longest`` characters; control characters are replaced."""
    content = _UNPRINTABLE.sub("\ufffd", str(value))
    if len(content) > longest:
        content = content[: longest - 1] + "\u2026"
    return html.escape(content, quote=True)


def foreign(value: object, longest: int = LONGEST_TEXT) -> str:
    """A user's text in its own writing direction, so that its marks cannot turn the words around it."""
    return f"<bdi>{text(value, longest)}</bdi>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = (), caption: str = "", fixed: bool = False
) -> str:
    """A table of ready-made HTML cells; ``numeric`` names the columns set flush right, ``fixed`` keeps hashes in code type."""
    kind = ["num" if column in numeric else "" for column in range(len(head))]
    top = "".join(f'<th scope="col" class="{k}">{cell}</th>' for k, cell in zip(kind, head, strict=True))
    body = "".join(
        "<tr>"
        + f'<th scope="row">{row[0]}</th>'
        + "".join(f'<td class="{k}">{cell}</td>' for k, cell in zip(kind[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    label = f"<caption>{caption}</caption>" if caption else ""
    style = ' class="fixed"' if fixed else ""
    content = f"{label}<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table{style}>{content}</table></div>'


def figures(pairs: Iterable[tuple[str, str, str]]) -> str:
    """A row of key figures: (label, value, remark)."""
    cells = "".join(
        f'<div><dt>{label}</dt><dd>{value}</dd><dd class="remark">{remark}</dd></div>' for label, value, remark in pairs
    )
    return f'<dl class="figures">{cells}</dl>'


def note(content: str) -> str:
    return f'<p class="note">{content}</p>'


def number(value: float, digits: int = 3) -> str:
    """Three significant digits in the shortest form a reader expects: 0, 0.693, 12.5, 4,200, 3e-5, 1.2e+7."""
    if not math.isfinite(value):
        return {math.inf: "\u221e", -math.inf: "\u2212\u221e"}.get(value, "not a number")
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "\u2212", 1 if value < 0 else 0)
    if size >= 100:
        shown = f"{value:,.0f}"
    else:
        decimals = digits - 1 - math.floor(math.log10(size))
        shown = f"{value:.{decimals}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return shown.replace("-", "\u2212")


def signed(value: float, digits: int = 3) -> str:
    """:func:`number` with a plus in front of what is above zero."""
    return f"+{number(value, digits)}" if value > 0 else number(value, digits)


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes in powers of 1,000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
