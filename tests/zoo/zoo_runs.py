"""Runs of the zoo: pairs made as the case says, the real trainer, held-out evaluation, all in a run folder as a user has it.

Each case changes one thing of the healthy run. The judge of the evaluation is right in all of them; the judge that made the
pairs is another one in the case of size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from zoo_world import Prompt, prompts  # pyright: ignore[reportMissingImports]

from polyalign.core.adapter import Model
from polyalign.core.algorithm import DirectPreference
from polyalign.core.objectives import Beta
from polyalign.core.objectives.table import SPEC, build
from polyalign.core.randomness import seed_of
from polyalign.core.recipe import TrainSettings
from polyalign.core.references import FrozenCopy
from polyalign.core.trainer import Trainer
from polyalign.evaluation.statistics import bootstrap_mean, paired_win_rate

SAMPLES = 4
PROMPTS = 480
EVALUATED = 600

HEALTHY = ("healthy", "healthy, other seed", "healthy, smoothed")
BAD = {
    "labels flipped": ("flipped labels",),
    "beta x100": ("beta too large",),
    "learning rate x10": ("learning rate too high",),
    "identical pairs": ("identical pairs",),
    "size bias": ("size bias", "length bias"),
    "off-policy negatives": ("off-policy rejected answers",),
    "failures only": ("pairs from failures only",),
}
"""Case -> the causes that name it rightly."""


@dataclass(frozen=True)
class Kind:
    """One modality of the zoo: its module, its adapter with a trained base, its judge and what counts as an output's size."""

    module: ModuleType
    adapter: Any
    judge: Any
    size: Callable[[Any], float]
    drawn: dict[Any, list[Any]] = field(default_factory=dict)
    """What the untrained base has drawn, which all cases of one seed share."""

    def base_draws(self, asked: Sequence[Prompt], seeds: Sequence[int]) -> list[Any]:
        key = (tuple(asked), tuple(seeds))
        if key not in self.drawn:
            model = self.adapter.load()
            model.network.eval()
            self.drawn[key] = self.adapter.sample(model, asked, seeds)
        return self.drawn[key]


class ListedRows:
    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.listed = rows

    def __len__(self) -> int:
        return len(self.listed)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self.listed[index] for index in indices]


def run_case(kind: Kind, case: str, folder: Path, *, seed: int = 0) -> Path:
    """Make the pairs of ``case``, train on them, evaluate; returns the run folder."""
    seed += {"healthy, other seed": 1, "healthy, smoothed": 2}.get(case, 0)
    beta, train_settings = kind.module.BETA, dict(kind.module.TRAIN)
    if case == "beta x100":
        beta = {**beta, "value": 100 * beta["value"]}
    if case == "learning rate x10":
        train_settings["optimizer"] = {"learning_rate": 10 * train_settings["optimizer"]["learning_rate"]}
    objective = {"name": "cdpo" if case == "healthy, smoothed" else "dpo"}
    spec = SPEC.validate_python({**objective, **kind.module.OBJECTIVE, "beta": beta})
    folder.mkdir(parents=True, exist_ok=True)
    model = kind.adapter.load()
    write_pairs(pairs_of(kind, case, folder, seed), folder)
    train(kind, model, read_rows(folder), spec, TrainSettings.model_validate(train_settings), folder, seed)
    evaluate(kind, model, folder, seed)
    return folder


def pairs_of(kind: Kind, case: str, folder: Path, seed: int) -> list[dict[str, Any]]:
    """The rows that the case trains on; the samples they come from are written beside them, as ``generate`` does."""
    asked = prompts(PROMPTS, seed=seed_of(seed, "training prompts"))
    seeds = [[seed_of(seed, "sample", place, number) for number in range(SAMPLES)] for place in range(PROMPTS)]
    flat = kind.base_draws([prompt for prompt in asked for _ in range(SAMPLES)], [one for row in seeds for one in row])
    outputs = [flat[place * SAMPLES : (place + 1) * SAMPLES] for place in range(PROMPTS)]
    by_size = case == "size bias"
    scores = [
        [kind.size(output) for output in row] if by_size else kind.judge.score([prompt] * SAMPLES, row)
        for prompt, row in zip(asked, outputs, strict=True)
    ]
    write_samples(asked, seeds, scores, folder)
    rows = []
    for place, prompt in enumerate(asked):
        chosen, rejected = _two(kind, case, prompt, place, outputs[place], scores[place], seeds[place])
        if chosen is not None and rejected is not None:
            rows.append(_row(prompt, place, chosen, rejected, "size" if by_size else kind.judge.name))
    return rows


Side = tuple[Any, float, int | None]
"""Output, score, and the seed it was sampled with (None: not sampled here)."""


def _two(
    kind: Kind, case: str, prompt: Prompt, place: int, outputs: Sequence[Any], scores: Sequence[float], seeds: Sequence[int]
) -> tuple[Side | None, Side | None]:
    best, worst = max(range(SAMPLES), key=scores.__getitem__), min(range(SAMPLES), key=scores.__getitem__)
    if case == "failures only":
        if scores[best] >= 1.0:
            return None, None
        return (kind.module.right_answer(prompt, place), 1.0, None), (outputs[worst], scores[worst], seeds[worst])
    if case == "off-policy negatives":
        return (outputs[0], scores[0], seeds[0]), (kind.module.garbage(prompt, place), -1.0, None)
    if scores[best] == scores[worst]:
        return None, None
    chosen, rejected = (outputs[best], scores[best], seeds[best]), (outputs[worst], scores[worst], seeds[worst])
    if case == "identical pairs":
        return chosen, (chosen[0], *rejected[1:])
    return (rejected, chosen) if case == "labels flipped" else (chosen, rejected)


def _row(prompt: Prompt, place: int, chosen: Side, rejected: Side, judge: str) -> dict[str, Any]:
    own = {"model": "tiny", "model_hash": "sha256:tiny", "sampler": "{}", "judges": json.dumps({judge: {"version": "1"}})}
    return {
        "pair_id": f"{place:06d}",
        "condition": {"prompt": prompt.text, "task": None, "metadata": json.dumps([prompt.first, prompt.second, prompt.asked])},
        "chosen": chosen[0],
        "rejected": rejected[0],
        "chosen_scores": {judge: chosen[1]},
        "rejected_scores": {judge: rejected[1]},
        "provenance": {**own, "chosen_seed": chosen[2], "rejected_seed": rejected[2]},
    }


def write_samples(asked: Sequence[Prompt], seeds: list[list[int]], scores: list[list[float]], folder: Path) -> None:
    (folder / "pairs").mkdir(exist_ok=True)
    rows = [
        {
            "prompt_index": place,
            "sample_index": number,
            "prompt": prompt.text,
            "seed": seeds[place][number],
            "score": float(scores[place][number]),
            "output_hash": "",
        }
        for place, prompt in enumerate(asked)
        for number in range(SAMPLES)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs" / "samples-00000.parquet")


def write_pairs(rows: list[dict[str, Any]], folder: Path) -> None:
    """A shard as the pair store writes it: pictures as structs, texts as strings."""
    stored = [
        {key: {"bytes": value, "path": None} if isinstance(value, bytes) else value for key, value in row.items()}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(stored), folder / "pairs" / "pairs-00000.parquet", row_group_size=8)
    summary = {"prompts": PROMPTS, "samples": PROMPTS * SAMPLES, "pairs": len(rows)}
    (folder / "pairs" / "summary.json").write_text(json.dumps(summary))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "pairs" / "pairs-00000.parquet").to_pylist()
    for row in rows:
        row["asked"] = Prompt(*json.loads(row["condition"]["metadata"]))
        for side in ("chosen", "rejected"):
            row[side] = row[side]["bytes"] if isinstance(row[side], dict) else row[side]
    return rows


def train(
    kind: Kind, model: Model, rows: list[dict[str, Any]], spec: Any, settings: TrainSettings, folder: Path, seed: int
) -> None:
    """The trainer's own loop on all weights, against a frozen copy."""
    reference = FrozenCopy(model.network)
    algorithm = DirectPreference(kind.adapter, model, build(spec), Beta.of(spec.beta), {"reference": reference}, seed=seed)
    Trainer(algorithm, ListedRows(rows), settings, folder, seed=seed).run()
    config = {
        "modality": kind.adapter.modality,
        "seed": seed,
        "objective": spec.model_dump(mode="json"),
        "train": settings.model_dump(mode="json"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def evaluate(kind: Kind, model: Model, folder: Path, seed: int) -> None:
    """The base and the trained model on the same held-out prompts with the same seeds, in evaluation.json's layout."""
    asked = prompts(EVALUATED, seed=seed_of(seed, "evaluation prompts"))
    seeds = [seed_of(seed, "evaluation", place) for place in range(EVALUATED)]
    texts = [prompt.text for prompt in asked]
    model.network.eval()
    outputs = {"base": kind.base_draws(asked, seeds), "aligned": kind.adapter.sample(model, asked, seeds)}
    scores = {name: kind.judge.score(asked, found) for name, found in outputs.items()}
    rate = paired_win_rate(scores["base"], scores["aligned"], seed=seed, prompts=texts)
    means = {name: bootstrap_mean(values, seed=seed, clusters=texts) for name, values in scores.items()}
    judge = kind.judge
    found = {
        "judge": {"name": judge.name, "version": judge.version, "broken_below": judge.broken_below, "right_from": 1.0},
        "prompts": len(set(texts)),
        "win_rate": rate.as_json(),
        "scores": {name: {"mean": mean, "interval": list(interval)} for name, (mean, interval) in means.items()},
        "tasks": {},
        "other_judges": {},
        "items": [
            {"prompt": text, "seed": seed, "base_score": before, "aligned_score": after}
            for text, seed, before, after in zip(texts, seeds, scores["base"], scores["aligned"], strict=True)
        ],
    }
    (folder / "evaluation.json").write_text(json.dumps(found))
