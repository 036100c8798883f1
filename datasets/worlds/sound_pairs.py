"""Preference pairs about time, composed of the user's own recordings.

    python -m polyalign.datasets.worlds.sound_pairs RECORDINGS FOLDER

RECORDINGS has a folder for each event (:mod:`polyalign.datasets.worlds.sound_clips`). Two clips of every caption are composed
of the same recordings: chosen as the caption says, rejected with the events in another order, in another number, or one after
the other in the place of together. No network decides which is right. A recipe reads them as ``pairs: {source: folders,
folder: FOLDER}``:

    FOLDER/chosen/00000.flac, 00000.txt (the caption);  FOLDER/rejected/00000.flac;  FOLDER/events.jsonl (what sounds when)
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.randomness import seed_of
from polyalign.datasets.audio.waves import Wave, encode_flac
from polyalign.datasets.worlds.sound_clips import Composer
from polyalign.datasets.worlds.sounds import GAIN, TASKS, Event, Spec, captions, groups_of, mix, wrong

Clip = tuple[Wave, list[Event]]
ABOUT_TIME = TASKS[1:]
"""Tasks of several events: one alone can not be at the wrong time."""


@dataclass(frozen=True)
class Preferred:
    """A caption, the clip that it describes, and one of the same recordings that it does not."""

    caption: str
    chosen: Clip
    rejected: Clip


def compose(composer: Composer, split: str, count: int, seed: int = 0) -> Iterator[Preferred]:
    """``count`` pairs of the recordings of a split (``train`` or ``heldout``)."""
    draws = random.Random(f"sound-pairs-{seed}-{split}")
    files = {event: composer.recordings(event, split) for event in composer.files}
    every = {task: list(groups_of(task, list(files))) for task in ABOUT_TIME}
    for index in range(count):
        task = draws.choice(ABOUT_TIME)
        spec = Spec(task, draws.choice(every[task]))
        places = np.random.default_rng(seed_of(seed, "sound-pairs", split, index))
        once = dict.fromkeys(spec.events)  # in their order: a set's differs from process to process
        heard = {event: composer.sound(draws.choice(files[event]), float(places.uniform(*GAIN))) for event in once}
        right, other = (
            mix([[(event, heard[event]) for event in group] for group in one.groups], places)
            for one in (spec, wrong(spec, draws))
        )
        yield Preferred(draws.choice(captions(spec, composer.phrases)), right, other)


def write(pairs: Iterator[Preferred], folder: Path, count: int) -> None:
    """Write pairs in the layout above.

    Raises:
        UserError: ``folder`` is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; give another folder, or move it away")
    for side in ("chosen", "rejected"):
        (folder / side).mkdir(parents=True)
    lines = []
    for index, pair in enumerate(track(pairs, "composing", total=count)):
        clips = {"chosen": pair.chosen, "rejected": pair.rejected}
        for side, (wave, _) in clips.items():
            (folder / side / f"{index:05d}.flac").write_bytes(encode_flac(wave))
        (folder / "chosen" / f"{index:05d}.txt").write_text(pair.caption + "\n", encoding="utf-8")
        events = {side: [asdict(event) for event in clip[1]] for side, clip in clips.items()}
        lines.append(json.dumps({"name": f"{index:05d}", "caption": pair.caption, **events}, ensure_ascii=False) + "\n")
    atomic_write(folder / "events.jsonl", "".join(lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recordings", type=Path, help="holds a folder for each event, named as in captions, two sounds or more")
    parser.add_argument("folder", type=Path, help="where the pairs go; must not be there yet")
    parser.add_argument("--count", type=int, default=200, help="how many pairs (default 200)")
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="of the recordings; a third is held out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        write(compose(Composer(options.recordings), options.split, options.count, options.seed), options.folder, options.count)
    except UserError as error:
        print(f"sound_pairs: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
