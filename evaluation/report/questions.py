"""Questions about pictures for the page: the pictures side by side, every model's answer, and where each looked.

A page holds a picture once, and once more under each map of attention. Maps are small pictures of their own, laid over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from polyalign.core.randomness import seed_of
from polyalign.evaluation.groups import BASE
from polyalign.evaluation.report import answers
from polyalign.evaluation.report.collect import PairExample
from polyalign.evaluation.report.markup import foreign, number, table, text
from polyalign.evaluation.report.pictures import Album, Picture, decode, inside, picture
from polyalign.evaluation.statistics import bootstrap_mean

Item = Mapping[str, Any]
ROUNDING = 1e-6
"""A cell this close to being covered is covered."""
LARGEST_FILE = 8 * 2**20
STRONGEST = 99.0
"""The percentile of all cells of a question, of all models, that is drawn in the strongest colour."""
HEAT = np.array([(255, 214, 0), (255, 122, 0), (206, 0, 26)], dtype=float)
OPAQUE = 165
"""Of 255, at the strongest."""
LEVELS = 16
"""Steps of colour, few of which make small files."""
OF_PAIRS = 128
"""The longest side of a pair's pictures."""
COLLAGES = {"grid": "a collage of {} pictures", "picture_in_picture": "a picture in a picture"}
_NAMES = re.compile(r"^Image\d+:[ \t]*$\n?", re.MULTILINE)
OF_VERDICTS = {"right": "good", "wrong": "bad"}
"""Class of the style sheet; anything else is worse than wrong."""


@dataclass(frozen=True)
class Look:
    """How one model looked at a question's pictures: ``shades`` as pictures laid over them, the ``share`` of its attention to
    pictures that lies on the one that is asked about, and the share of the places that it takes (None without a target)."""

    shades: tuple[Picture, ...]
    share: float | None
    even: float | None


def are_pictured(items: Sequence[Item]) -> bool:
    """Whether questions of an evaluation are about pictures."""
    return any(images_of(item) for item in items)


def images_of(item: Item) -> list[str]:
    """The paths of a question's pictures in the run folder."""
    found = item.get("images")
    return [str(one) for one in found] if isinstance(found, list) else []


def names_of(folder: Path, items: Sequence[Item]) -> list[str]:
    """The paths of the pictures, as often as the page will hold them."""
    return [name for item in items for name in images_of(item) * (1 + len(_maps(folder, item)))]


def strip(shown: Sequence[str], labels: Sequence[str]) -> str:
    """Pictures side by side, each with its name below."""
    figures = zip(shown, labels, strict=True)
    cells = "".join(f"<figure>{one}<figcaption>{text(label, 80)}</figcaption></figure>" for one, label in figures)
    return f'<div class="strip">{cells}</div>'


def labels_of(count: int, layout: Mapping[str, Any] | None) -> list[str]:
    """What pictures are called: as questions name them, or what a sheet of several is."""
    layout = layout if isinstance(layout, Mapping) else {}
    form, places = layout.get("format"), layout.get("places")
    if count == 1 and form in COLLAGES:
        return [COLLAGES[form].format(len(places) if isinstance(places, list) else "several")]
    return ["the picture"] if count == 1 else [f"Image{place}" for place in range(1, count + 1)]


def kept(folder: Path, items: Sequence[Item]) -> list[Item]:
    """The items of which it was kept where models looked."""
    return [item for item in items if _maps(folder, item)]


def any_looks(items: Sequence[Item], album: Album[Any]) -> bool:
    """Whether it was kept where models looked."""
    return any(_maps(album.folder, item) for item in items)


def card(item: Item, album: Album[Any]) -> str:
    """What a card shows of a question: pictures, words, answers, attention."""
    return asked(item, album) + said(item) + looked(item, album)


def of_pair(example: PairExample) -> str:
    """The pictures that a training pair is about, and those under which the chosen answer loses; empty without any."""
    if not example.images:
        return ""
    labels = labels_of(len(example.images), example.layout)
    right = strip([_decoded(one, label) for one, label in zip(example.images, labels, strict=True)], labels)
    if not example.losing_images:
        return right
    others = [f"{label}, losing" for label in labels_of(len(example.losing_images), example.layout)]
    wrong = strip([_decoded(one, label) for one, label in zip(example.losing_images, others, strict=True)], others)
    words = "Losing pictures, under which the chosen answer is to be less likely:"
    return f'{right}<p class="quiet">{words}</p>{wrong}'


def _decoded(content: bytes, label: str) -> str:
    image = decode(content)
    return _tag(None if image is None else picture(image, OF_PAIRS), label)


def where_they_look(folder: Path, items: Sequence[Item]) -> str:
    """How much of its attention each model pays to what is asked about, over all questions of which that was kept and that have
    something else to look at; empty without any."""
    found = [looks(folder, item) for item in kept(folder, items)]
    shares = [{model: one.share for model, one in block.items() if one.share is not None} for block in found]
    both = [block for block in shares if block and set(block) == set(shares[0])]
    if not both:
        return ""
    even = float(np.mean([one.even for block in found for one in block.values() if one.even is not None]))
    rows = []
    for model in both[0]:
        change = ""
        if model != BASE and BASE in both[0]:
            gains = [float(block[model]) - float(block[BASE]) for block in both]
            by, (low, high) = bootstrap_mean(gains, seed=seed_of(0, "attention", model))
            kind = "tie" if low <= 0 <= high else "good" if low > 0 else "bad"
            change = f'<span class="badge {kind}">{100 * by:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]</span>'
        mean = float(np.mean([float(block[model]) for block in both]))
        rows.append([foreign(model, 40), f"<b>{100 * mean:.1f} %</b>", change])
    words = (
        f"The share of an answer's attention to pictures that went to what is asked about; the mean over {len(both)} questions "
        f"with more to look at. Spread evenly it would be {100 * even:.1f} %. The difference is in points, paired by question, "
        "with its 95 % bootstrap interval. Attention shows where a model looked, not why it answered so."
    )
    return f"<p>{words}</p>{table(['model', 'on what is asked about', 'difference to the base'], rows, numeric=(1, 2))}"


def words_of(item: Item) -> str:
    """The question without the lines that only name pictures, which stand above it with their names."""
    return _NAMES.sub("", str(item["prompt"])).strip() if len(images_of(item)) > 1 else str(item["prompt"])


def asked(item: Item, album: Album[Any]) -> str:
    """The pictures of a question, and the question."""
    names = images_of(item)
    labels = labels_of(len(names), item.get("layout"))
    shown = [_tag(album.pictures.get(name), label) for name, label in zip(names, labels, strict=True)]
    return strip(shown, labels) + answers.block(answers.plain(words_of(item)), "asked")


def said(item: Item) -> str:
    """What base, aligned and arms answered, side by side, each with its score and verdict."""
    verdicts, arms = item.get("verdicts") or {}, item.get("arms") or {}
    told = [(side, str(item[f"{side}_text"]), item[f"{side}_score"]) for side in ("base", "aligned")]
    told += [(name, str(arm["text"]), arm["score"]) for name, arm in arms.items()]
    cells = []
    for name, content, score in told:
        found = verdicts.get(name)
        badge = f' <span class="badge {OF_VERDICTS.get(found, "broken")}">{text(found, 24)}</span>' if found else ""
        kind = f"answer {OF_VERDICTS.get(found, 'broken')}" if found else "answer"
        cells.append(
            f"<figure>{answers.block(answers.plain(content.strip()), kind)}"
            f"<figcaption>{foreign(name, 40)} <b>{number(float(score))}</b>{badge}</figcaption></figure>"
        )
    return f'<div class="sides told">{"".join(cells)}</div>'


def looked(item: Item, album: Album[Any]) -> str:
    """Where each model looked, over the pictures, with its share in words; empty where that was not kept."""
    found = looks(album.folder, item)
    if not found:
        return ""
    names = images_of(item)
    labels = labels_of(len(names), item.get("layout"))
    rows = []
    for model, look in found.items():
        cells = [
            f'<div class="over">{_tag(album.pictures.get(name), label)}{_shade(shade)}</div>'
            for name, label, shade in zip(names, labels, look.shades, strict=True)
        ]
        rows.append(f'<div class="look"><p class="quiet">{foreign(model, 40)}{_in_words(look)}</p>{strip(cells, labels)}</div>')
    return f'<div class="looks">{"".join(rows)}</div>'


def looks(folder: Path, item: Item) -> dict[str, Look]:
    """How each model looked; nothing where no whole record of it lies in the run folder."""
    maps = _maps(folder, item)
    if not maps:
        return {}
    top = float(np.percentile(np.concatenate([one.ravel() for found in maps.values() for one in found]), STRONGEST))
    target = _target(folder, item, [one.shape for one in next(iter(maps.values()))])
    made = {}
    for model, found in maps.items():
        share = even = None
        whole = sum(float(one.sum()) for one in found)
        if target is not None and whole > 0:
            share = sum(float((one * part).sum()) for one, part in zip(found, target, strict=True)) / whole
            even = sum(float(part.sum()) for part in target) / sum(part.size for part in target)
        made[model] = Look(tuple(_shaded(one, top) for one in found), share, even)
    return made


def _in_words(look: Look) -> str:
    if look.share is None or look.even is None:
        return ""
    return f": {100 * look.share:.0f} % on what is asked about (evenly {100 * look.even:.0f} %)"


def _maps(folder: Path, item: Item) -> dict[str, list[np.ndarray]]:
    """By model, a map (rows, columns) of each picture; models whose record is not that are left out."""
    name = item.get("attention")
    path = inside(folder, name) if isinstance(name, str) else None
    if path is None or path.stat().st_size > LARGEST_FILE:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    models = content.get("models") if isinstance(content, dict) else None
    found = {str(model): _whole(block) for model, block in models.items()} if isinstance(models, dict) else {}
    shapes = next(([one.shape for one in maps] for maps in found.values() if maps), [])
    known = len(shapes) == len(images_of(item))
    return {model: maps for model, maps in found.items() if known and [one.shape for one in maps] == shapes}


def _whole(block: Any) -> list[np.ndarray]:
    """The maps of one model, or nothing."""
    images = block.get("images") if isinstance(block, dict) else None
    try:
        maps = [np.array(image["map"], dtype=np.float64) for image in images or ()]
    except (TypeError, ValueError, KeyError):
        return []
    good = all(one.ndim == 2 and one.size and np.isfinite(one).all() and (one >= 0).all() for one in maps)
    return maps if good else []


def _target(folder: Path, item: Item, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray] | None:
    """How much of every cell belongs to what is asked about, 0 to 1, for each picture; None where that is not told, or is all
    there is."""
    layout = item.get("layout")
    try:
        places = [layout["places"][target] for target in layout["targets"]]  # pyright: ignore[reportOptionalSubscript]
        boxes = [(int(place["image"]), [float(edge) for edge in place["box"]]) for place in places]
        parts = [np.zeros(shape) for shape in shapes]
        for image, (left, top, right, bottom) in boxes:
            width, height = _size(folder, images_of(item)[image])
            rows, columns = parts[image].shape
            down, across = _overlap(rows, top / height, bottom / height), _overlap(columns, left / width, right / width)
            parts[image] = np.maximum(parts[image], down[:, None] * across[None, :])
    except (TypeError, KeyError, IndexError, ValueError, OSError):
        return None
    return parts if parts and min(float(part.min()) for part in parts) < 1.0 - ROUNDING else None


def _overlap(cells: int, start: float, end: float) -> np.ndarray:
    """(cells,) the part of each cell of the unit line that lies between ``start`` and ``end``."""
    edges = np.linspace(0.0, 1.0, cells + 1)
    return np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0.0, None) * cells


def _size(folder: Path, name: str) -> tuple[int, int]:
    path = inside(folder, name)
    if path is None:
        raise OSError(f"no picture {name}")
    with Image.open(path) as opened:
        return opened.size


def _shaded(one: np.ndarray, top: float) -> Picture:
    """Attention as a picture of a cell a pixel: clear where there is none, yellow to red where there is most."""
    strength = np.clip(one / top, 0.0, 1.0) if top > 0 else np.zeros_like(one)
    strength = (strength * LEVELS).round() / LEVELS
    places = np.linspace(0.0, 1.0, len(HEAT))
    channels = [np.interp(strength, places, channel) for channel in HEAT.T] + [strength * OPAQUE]
    return picture(Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8), mode="RGBA"), max(one.shape))


def _shade(shade: Picture) -> str:
    return f'<img class="shade" src="{shade.uri}" alt="" decoding="async"/>'


def _tag(found: Picture | None, label: str) -> str:
    return found.tag(label) if found is not None else '<div class="absent">no picture</div>'
