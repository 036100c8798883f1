"""STEAM's ordering error (AudioTime, Xie et al., arXiv 2407.02857) of generated sounds on AudioTime's test files.

    python -m polyalign.evaluation.audio.steam SOUNDS ordering_caption.json --detector clap --model FOLDER

A test file is {id: {"event": {name: [[onset, offset], ...]}, "caption": ...}} with two events an entry; SOUNDS has ID.wav (or
.flac, .ogg). STEAM's own grounding model is not used: events are found by CLAP or by a tagger in sliding windows, so figures
compare with each other and not with published ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyalign.core.errors import UserError
from polyalign.core.progress import ProgressLine
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.audio import clap, tagger
from polyalign.evaluation.audio.locating import ClapLocator, Locator, TaggerLocator, Windows
from polyalign.evaluation.audio.sound import RESAMPLER, read_sound, sound_files
from polyalign.evaluation.audio.temporal import OVERLAP, Found, outcome, summary
from polyalign.evaluation.measuring_command import tell
from polyalign.evaluation.network_judge import device_of
from polyalign.evaluation.statistics import wilson_interval

Error = Literal["not found", "order", "overlap"]


@dataclass(frozen=True)
class Test:
    """An entry: which of two events comes first."""

    name: str
    caption: str
    former: str
    later: str

    __test__ = False  # no test of pytest


def read_tests(path: Path) -> list[Test]:
    """The entries of an AudioTime test file on order; the event whose first onset is earlier comes first.

    Raises:
        UserError: unreadable, or an entry without exactly two events with their times.
    """
    tests = []
    for name, entry in files.settings(path).items():
        try:
            events = {str(event): min(float(start) for start, _ in spans) for event, spans in entry["event"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: the entry {name!r} has no event: {{NAME: [[onset, offset], ...]}} ({error!r})") from error
        if len(events) != 2:
            raise UserError(f"{path}: the entry {name!r} has {len(events)} events; the ordering error is of two")
        former, later = sorted(events, key=lambda event: events[event])
        tests.append(Test(str(name), str(entry.get("caption", "")), former, later))
    if not tests:
        raise UserError(f"{path}: has no entries")
    return tests


def ordering_error(former: str, later: str, found: Sequence[Found]) -> Error | None:
    """What is wrong with the order of two events, or None.

    Each event reaches from its first onset to its last offset. ``not found``: one of them is not there; ``order``: the former
    does not start first; ``overlap``: they share half of the shorter one or more (former's offset less later's onset).
    """
    spans = {}
    for name in (former, later):
        own = [event for event in found if event.event == name]
        if own:
            spans[name] = min(event.onset for event in own), max(event.offset for event in own)
    if any(name not in spans or spans[name][0] >= spans[name][1] for name in (former, later)):
        return "not found"
    first, second = spans[former], spans[later]
    if first[0] >= second[0]:
        return "order"
    shorter = min(end - start for start, end in (first, second))
    return "overlap" if first[1] - second[0] >= OVERLAP * shorter else None


def evaluate(tests: Sequence[Test], locate: Callable[[Test], Sequence[Found]]) -> dict[str, Any]:
    """The ordering error rate with its Wilson interval and its kinds, and the shares of
    :func:`~polyalign.evaluation.audio.temporal.summary` of the same events."""
    kinds: Counter[str] = Counter()
    outcomes, items = [], []
    with ProgressLine("ordering of sounds", total=len(tests)) as line:
        for test in tests:
            found = locate(test)
            wrong = ordering_error(test.former, test.later, found)
            kinds.update([wrong] if wrong else [])
            outcomes.append(outcome(((test.former,), (test.later,)), found, closed=False))
            items.append({"id": test.name, "error": wrong})
            line.advance()
    errors = sum(kinds.values())
    rate = {"value": errors / len(tests), "interval": list(wilson_interval(errors, len(tests))), "of": len(tests)}
    return {"ordering_error": rate, "kinds": dict(kinds), "temporal": summary(outcomes), "items": items}


def open_locator(
    detector: str, model: str, asked: Windows, *, device: str = "auto", labels: Mapping[str, Sequence[str]] | None = None
) -> tuple[Locator, dict[str, str]]:
    """A locator by name (``clap`` or ``ast``) from a folder, and what a score made with it records.

    Args:
        labels: for ``ast``: which labels a phrase means, where it shares no word with them.

    Raises:
        UserError: another name, weights that cannot be read, or labels for ``clap``, which needs none.
    """
    if detector == "clap" and labels is not None:
        raise UserError("labels say which of a tagger's labels a phrase means; the detector clap has none. Leave them out")
    if detector not in ("clap", "ast"):
        raise UserError(f"there is no detector {detector!r}; allowed: clap, ast")
    where = device_of(detector, device)
    folder = files.folder(model, f"the detector '{detector}': model", weights=True)
    told = {"detector": detector, "network": files.identity(model, files.weight_files(folder)), "windows": str(asked)}
    told["resampler"] = RESAMPLER
    if detector == "clap":
        return ClapLocator(clap.read(folder, device=where), asked), told
    if labels:
        told["labels"] = json.dumps(labels, sort_keys=True)
    return TaggerLocator(tagger.read(folder, device=where), asked, labels or {}), told


def sounds_of(folder: Path, tests: Sequence[Test]) -> dict[str, Path]:
    """The file of each entry, by its id.

    Raises:
        UserError: there is none, or more than one.
    """
    found: dict[str, Path] = {}
    wanted = {test.name for test in tests}
    for path in sound_files(folder):
        if path.stem in wanted and found.setdefault(path.stem, path) is not path:
            raise UserError(
                f"{folder}: the entry {path.stem!r} has two sounds, {found[path.stem]} and {path}. Keep one of them"
            )
    lone = [test.name for test in tests if test.name not in found]
    if lone:
        raise UserError(f"{folder}: {len(lone)} of {len(tests)} entries have no sound, such as {lone[0]}.wav")
    return found


def read_labels(path: Path) -> dict[str, list[str]]:
    """Which labels of a tagger a phrase means, from a JSON file.

    Raises:
        UserError: unreadable, or not of the form {phrase: [label, ...]}.
    """
    content = files.settings(path)
    for phrase, labels in content.items():
        if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
            raise UserError(f"{path}: {phrase!r} is {labels!r}; expected a list of labels, as in {{{phrase!r}: [LABEL, ...]}}")
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.evaluation.audio.steam", description="Ordering error of sounds on AudioTime's test files."
    )
    parser.add_argument("sounds", type=Path, help="folder with a sound for each entry, named by its id")
    parser.add_argument("tests", type=Path, help="AudioTime's ordering_caption.json, or one of its form")
    parser.add_argument("--detector", required=True, choices=("clap", "ast"), help="what finds the events")
    parser.add_argument("--model", required=True, help="its folder in transformers' layout")
    parser.add_argument("--labels", type=Path, help="for ast: a JSON file of {phrase: [label, ...]}, where words do not do")
    parser.add_argument("--width", type=float, default=Windows.width, help="seconds of a window (default 2)")
    parser.add_argument("--hop", type=float, default=Windows.hop, help="seconds from one window to the next (default 0.5)")
    parser.add_argument("--presence", type=float, default=Windows.presence, help="an event is there from this (default 0.2)")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write; without it the JSON is printed")
    asked = parser.parse_args(arguments)

    def measure() -> dict[str, Any]:
        tests = read_tests(asked.tests)
        sounds = sounds_of(asked.sounds, tests)
        looked = Windows(width=asked.width, hop=asked.hop, presence=asked.presence)
        labels = None if asked.labels is None else read_labels(asked.labels)
        locator, told = open_locator(asked.detector, asked.model, looked, device=asked.device, labels=labels)
        found = evaluate(tests, lambda test: locator(read_sound(sounds[test.name]), [test.former, test.later]))
        return {**found, "made_with": told, "tests": files.digest([asked.tests])}

    return tell(measure, asked.out)


if __name__ == "__main__":
    sys.exit(main())
