"""Two folders of sounds compared in a named feature space, each figure with an interval and with what it was made with.

    python -m polyalign.evaluation.audio.folders REFERENCE GENERATED --features cnn14 --model Cnn14_16k_mAP=0.438.pth
    python -m polyalign.evaluation.audio.folders REFERENCE GENERATED --features vggish --model vggish-10086976.pth
    python -m polyalign.evaluation.audio.folders REFERENCE GENERATED --features clap --model FOLDER --captions captions.jsonl

VGGish gives FAD; CNN14 and AST give FD, KID, KL and the inception score; CLAP gives FD, KID and the CLAP score. Silence can
score well in all of them, so the silent files are counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.evaluation.audio import metrics
from polyalign.evaluation.audio.sound import read_sound, sound_files
from polyalign.evaluation.audio.spaces import SPACES, Heard, SoundSpace, open_space
from polyalign.evaluation.distribution import HALVES, around, frechet_distance, halves_of, kernel_distance
from polyalign.evaluation.measuring_command import tell
from polyalign.evaluation.statistics import bootstrap_mean

LEAST_FILES = 4
SILENT = 1e-4
"""Largest sample under which a file counts as silent: 80 dB below full scale."""

Pair = Callable[[np.ndarray, np.ndarray], float]


def compare_heard(
    reference: Sequence[Heard],
    generated: Sequence[Heard],
    names: tuple[Sequence[str], Sequence[str]],
    *,
    seed: int,
    halves: int = HALVES,
) -> dict[str, Any]:
    """Every figure that the two sides' features and logits allow, with 95 % intervals.

    Those of distances of whole sets (Frechet, KID, inception score) are value +- 1.96 times the deviation over ``halves``
    random halves of the files (see :func:`~polyalign.evaluation.distribution.compare_distributions`), KID's of all rows of a
    half at once; that of KL resamples files.

    Args:
        names: of the reference's and of the generated files, by which KL pairs them.
    """
    draws = np.random.default_rng(seed_of(seed, "halves of sounds"))
    picked = [halves_of(len(side), halves, draws).T.astype(bool) for side in (reference, generated)]
    rows = [[one.features for one in side] for side in (reference, generated)]
    made: dict[str, Any] = {}
    whole = [np.concatenate(side) for side in rows]
    values = frechet_distance(*whole), metrics.kernel_distance_of_subsets(*whole)[0]
    distances: tuple[tuple[str, Pair, float], ...] = (("frechet", frechet_distance, 0.0), ("kid", kernel_distance, -np.inf))
    for (name, distance, least), value in zip(distances, values, strict=True):
        of_halves = [distance(_of(rows[0], one), _of(rows[1], other)) for one, other in zip(*picked, strict=True)]
        made[name] = {"value": value, "interval": around(value, np.array(of_halves), least=least)}
    made["kid"] |= {"subsets": metrics.SUBSETS, "subset_size": min(metrics.SUBSET_SIZE, *(sum(map(len, one)) for one in rows))}
    logits = [[one.logits for one in side if one.logits is not None] for side in (reference, generated)]
    if len(logits[0]) == len(reference) and len(logits[1]) == len(generated):
        made |= _of_logits(np.stack(logits[0]), np.stack(logits[1]), names, picked[1], seed)
    made["rows"] = {side: sum(map(len, found)) for side, found in zip(("reference", "generated"), rows, strict=True)}
    return made


def _of_logits(
    reference: np.ndarray, generated: np.ndarray, names: tuple[Sequence[str], Sequence[str]], halves: np.ndarray, seed: int
) -> dict[str, Any]:
    """Inception score of the generated side, and KL of the files that share a name; why not, where they do not."""
    splits = min(metrics.SPLITS, len(generated) // 2)
    value, deviation = metrics.inception_score(generated, splits=splits)
    scores = [metrics.inception_score(generated[half], splits=splits)[0] for half in halves]
    inception = {
        "value": value,
        "deviation": deviation,
        "splits": splits,
        "interval": around(value, np.array(scores), least=1.0),
    }
    try:
        pairs, told = metrics.paired_names(*names)
    except UserError as error:
        return {"inception_score": inception, "kl": {"left_out": str(error)}}
    first, second = (np.stack([side[pair[place]] for pair in pairs]) for place, side in enumerate((reference, generated)))
    found: dict[str, Any] = {"paired": told}
    for name, divergence in (("kl_softmax", metrics.kl_softmax), ("kl_sigmoid", metrics.kl_sigmoid)):
        mean, interval = bootstrap_mean(divergence(first, second).tolist(), seed=seed_of(seed, name))
        found[name] = {"value": mean, "interval": list(interval)}
    return {"inception_score": inception, "kl": found}


def _of(rows: Sequence[np.ndarray], picked: np.ndarray) -> np.ndarray:
    return np.concatenate([row for row, taken in zip(rows, picked, strict=True) if taken])


def clap_scores(space: SoundSpace, heard: Sequence[Heard], captions: Sequence[str]) -> np.ndarray:
    """(N,) cosine of each sound with its own caption: the CLAP score is their mean (Tango 2, with 630k-audioset-best).

    Raises:
        UserError: the space has no texts.
    """
    import torch

    if space.texts is None:
        raise UserError(f"captions go with --features clap; {space.kind} has no texts")
    with torch.inference_mode():
        parts = [space.texts(captions[start : start + 64]).cpu().numpy() for start in range(0, len(captions), 64)]
    return (np.concatenate([one.features for one in heard]) * np.concatenate(parts)).sum(axis=1)


def compare_folders(
    reference: Path, generated: Path, space: SoundSpace, *, seed: int, batch_size: int = 8, captions: Path | None = None
) -> dict[str, Any]:
    """:func:`compare_heard` of two folders, with the CLAP scores of both sides where captions are given.

    Raises:
        UserError: a folder is absent or has too few sounds, a sound that cannot be read, or one without its caption.
    """
    files = [sound_files(folder) for folder in (reference, generated)]
    for folder, found in zip((reference, generated), files, strict=True):
        if len(found) < LEAST_FILES:
            raise UserError(f"{folder}: has {len(found)} sounds, and these distances need at least {LEAST_FILES}")
    said = None if captions is None else read_captions(captions)
    sides = zip((reference, generated), files, strict=True)
    names = [[path.relative_to(folder).as_posix() for path in found] for folder, found in sides]
    heard = [space.of_files(found, batch_size=batch_size) for found in files]
    made = compare_heard(heard[0], heard[1], (names[0], names[1]), seed=seed)
    if said is not None:
        sides = zip(("reference", "generated"), names, heard, strict=True)
        made["clap_score"] = {side: _clap_block(space, one, _captions_of(own, said), seed) for side, own, one in sides}
    silent = {side: sum(_silent(path) for path in found) for side, found in zip(("reference", "generated"), files, strict=True)}
    counted = {"reference": len(files[0]), "generated": len(files[1])}
    return {**made, "files": counted, "silent": silent, "halves": HALVES, "notes": _notes(heard, silent)}


def _clap_block(space: SoundSpace, heard: Sequence[Heard], captions: Sequence[str], seed: int) -> dict[str, Any]:
    mean, interval = bootstrap_mean(clap_scores(space, heard, captions).tolist(), seed=seed_of(seed, "clap score"))
    return {"value": mean, "interval": list(interval)}


def read_captions(path: Path) -> dict[str, str]:
    """Captions by file name from JSON lines: {"file_name", "text"}, or {"location", "captions"} as Tango's lists have them.

    Sounds find theirs by the file name without folder and ending.

    Raises:
        UserError: unreadable, a line with neither, or a second, different caption of one name.
    """
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: these captions cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, said = (row.get(one, row.get(other)) for one, other in (("file_name", "location"), ("text", "captions")))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: line {number} is no JSON object ({error})") from error
        if not isinstance(name, str) or not isinstance(said, str) or not said.strip():
            raise UserError(f"{path}: line {number} has no file_name and text (or location and captions)")
        if found.setdefault(Path(name).stem, said) != said:
            raise UserError(
                f"{path}: line {number} has another caption of {Path(name).stem!r}, by which sounds find theirs, whatever "
                "their folder and ending. Keep one caption of each sound, and give sounds of several folders different names"
            )
    return found


def _captions_of(names: Sequence[str], said: Mapping[str, str]) -> list[str]:
    lone = [name for name in names if Path(name).stem not in said]
    if lone:
        raise UserError(f"{len(lone)} of {len(names)} sounds have no caption, such as {lone[0]}")
    return [said[Path(name).stem] for name in names]


def _silent(path: Path) -> bool:
    return float(np.abs(read_sound(path).samples).max()) < SILENT


def _notes(heard: Sequence[Sequence[Heard]], silent: Mapping[str, int]) -> list[str]:
    notes = []
    rows, width = [sum(len(one.features) for one in side) for side in heard], heard[0][0].features.shape[1]
    if min(rows) <= width:
        notes.append(
            f"{min(rows)} rows have no full covariance of {width} features: the Frechet distance is far above its value "
            "for many. Compare it only at equal counts, or take KID"
        )
    if any(silent.values()):
        notes.append(
            f"{silent['reference']} reference and {silent['generated']} generated files are silent; silence can score well"
        )
    return notes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.evaluation.audio.folders",
        description="FAD or FD, KID, KL, inception score and CLAP score of two folders of sounds, in a space that is named.",
    )
    parser.add_argument("reference", type=Path, help="folder of the sounds to compare with, such as real ones")
    parser.add_argument("generated", type=Path, help="folder of the generated sounds; KL pairs files of the same name")
    parser.add_argument("--features", required=True, choices=list(SPACES), help="the kind of network that hears the sounds")
    parser.add_argument("--model", required=True, help="its weights: a local file (vggish, cnn14) or folder (ast, clap)")
    parser.add_argument("--captions", type=Path, help="JSON lines of file_name and text, for the CLAP score")
    parser.add_argument("--batch-size", type=int, default=8, help="sounds heard together (default 8)")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda")
    parser.add_argument("--seed", type=int, default=0, help="keys the half-samples and the bootstrap of the intervals")
    parser.add_argument("--out", type=Path, help="JSON file to write; without it the JSON is printed")
    asked = parser.parse_args(arguments)

    def measure() -> dict[str, Any]:
        space = open_space(asked.features, asked.model, device=asked.device)
        if asked.captions is not None and space.texts is None:
            raise UserError(f"--captions goes with --features clap; {asked.features} has no texts")
        found = compare_folders(
            asked.reference, asked.generated, space, seed=asked.seed, batch_size=asked.batch_size, captions=asked.captions
        )
        folders = {"reference": str(asked.reference), "generated": str(asked.generated)}
        return {**found, "features": space.as_json(), "folders": folders, "seed": asked.seed}

    return tell(measure, asked.out)


if __name__ == "__main__":
    sys.exit(main())
