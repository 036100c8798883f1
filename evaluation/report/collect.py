"""Reads a run folder into a :class:`ReportData`. What is absent or unreadable is noted in ``missing`` and never hidden."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from polyalign.core.errors import UserError
from polyalign.core.files import sha256_of
from polyalign.evaluation.report.recipe import RecipeDifference, compare_with_recipe
from polyalign.evaluation.report.shape import malformed
from polyalign.evaluation.report.sounds import looks_like_sound

HASHED_AT_MOST = 512 * 2**20
"""Files above this size in bytes are listed by size only; hashing them would cost longer than the report."""

PAIR_EXAMPLES = 8


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl by column. ``columns[name]`` and ``steps`` are (S,) float64, NaN where a line had no such figure.

    ``not_finite`` lists the steps and names that held NaN or infinity, which ``columns`` alone could not tell from absence.
    """

    steps: np.ndarray
    columns: Mapping[str, np.ndarray]
    margins_by_timestep: Sequence[tuple[int, Sequence[tuple[float, float]]]]
    not_finite: Sequence[tuple[int, str]]

    def has(self, *names: str) -> bool:
        return all(name in self.columns for name in names)

    @property
    def telling_loss(self) -> str:
        """The column to judge the loss by: its preference part where that is logged, since regularisers can drown it."""
        return "loss/preference" if self.has("loss/preference") else "loss"

    @property
    def pairs(self) -> int | None:
        """How many pairs were trained on: those seen, by the epochs they made up."""
        if not self.has("pairs_seen", "epoch"):
            return None
        seen, epochs = (self.series(name)[1] for name in ("pairs_seen", "epoch"))
        return round(float(seen[-1] / epochs[-1])) if len(seen) and len(epochs) and epochs[-1] > 0 else None

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values where the figure was logged and finite."""
        values = self.columns[name]
        kept = np.isfinite(values)
        return self.steps[kept], values[kept]

    def last_tenth(self, name: str) -> float | None:
        """Mean over the last tenth of the logged steps (at least one)."""
        if name not in self.columns:
            return None
        values = self.series(name)[1]
        return float(values[-max(1, len(values) // 10) :].mean()) if len(values) else None

    def first_tenth(self, name: str) -> float | None:
        """Mean over the first tenth of the logged steps (at least one)."""
        if name not in self.columns:
            return None
        values = self.series(name)[1]
        return float(values[: max(1, len(values) // 10)].mean()) if len(values) else None


@dataclass(frozen=True)
class PairExample:
    """One training pair as it lies in the store; pictures and sounds as the encoded bytes, texts as text."""

    prompt: str
    chosen: bytes | str
    rejected: bytes | str
    chosen_score: float | None
    rejected_score: float | None
    images: Sequence[bytes] = ()
    """What the prompt is about, in order, as encoded bytes."""
    losing_images: Sequence[bytes] = ()
    """Other images, under which the chosen answer is to be less likely."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    """How several pictures are laid out."""


@dataclass(frozen=True)
class ReportData:
    """Everything the report says, before any wording. None or empty means absent, with a line in ``missing``."""

    folder: Path
    config: Mapping[str, Any]
    metrics: Metrics | None
    evaluation: Mapping[str, Any] | None
    pairs: Mapping[str, Any] | None
    pair_examples: Sequence[PairExample]
    stages: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, Any]
    recipe: RecipeDifference | None
    files: Mapping[str, str]
    missing: Sequence[str]
    left_out: Mapping[str, Any] = field(default_factory=dict)
    """What was left out of the pairs before training, by reason (``left_out.json``)."""
    scans: Mapping[str, Any] = field(default_factory=dict)
    """What ``scenes/summary.json`` says of scans and ground truth."""

    @property
    def title(self) -> str:
        settings = self.config.get("report")
        title = settings.get("title") if isinstance(settings, Mapping) else None
        return str(title or self.folder.resolve().name)

    @property
    def outputs(self) -> str:
        """What the models make: "picture", or what the recipe, the evaluation or the pairs say: "text", "sound", "cloud"."""
        if self.config.get("modality") == "lidar" or "completions" in (self.evaluation or {}):
            return "cloud"
        items = (self.evaluation or {}).get("items") or [{}]
        shown = [example.chosen for example in self.pair_examples[:1]]
        texts = "base_text" in items[0] or any(isinstance(one, str) for one in shown)
        if texts or self.config.get("modality") in ("text", "vlm"):
            return "text"
        sounds = "base_sound" in items[0] or any(isinstance(one, bytes) and looks_like_sound(one) for one in shown)
        return "sound" if sounds or self.config.get("modality") == "audio" else "picture"

    @property
    def grid(self) -> int | None:
        """How many before-and-after samples the recipe asks for; None if it does not say."""
        settings = self.config.get("report")
        grid = settings.get("grid") if isinstance(settings, Mapping) else None
        return grid if isinstance(grid, int) else None

    @property
    def embed_images(self) -> bool:
        settings = self.config.get("report")
        return bool(settings.get("embed_images", True)) if isinstance(settings, Mapping) else True


def collect(folder: Path) -> ReportData:
    """Read the run folder.

    Raises:
        UserError: there is no such folder, or nothing of a run lies in it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    missing: list[str] = []
    config = _mapping(folder / "config.yaml", missing, "the resolved configuration")
    metrics = read_metrics(folder / "metrics.jsonl", missing)
    evaluation = _mapping(folder / "evaluation.json", missing, "the evaluation: no win rate, no grid, no verdict on quality")
    if evaluation and (problem := malformed(evaluation)) is not None:
        missing.append(f"evaluation.json: is not what the evaluation writes ({problem}); run the stage evaluate again")
        evaluation = {}
    scans = _mapping(folder / "scenes" / "summary.json", [], "")
    of_scans = bool(scans) and not (folder / "pairs").exists()  # pairs are made while training, and not kept
    pairs = {} if of_scans else _mapping(folder / "pairs" / "summary.json", missing, "the data card's figures")
    stages = _mapping(folder / "stages.json", missing, "time and memory by stage")
    environment = _mapping(folder / "environment.json", missing, "versions and hashes of the environment")
    if not (config or metrics or evaluation or pairs or stages or environment):
        raise UserError(
            f"{folder} holds nothing of a run (looked for config.yaml, metrics.jsonl, evaluation.json, pairs/summary.json, "
            "stages.json, environment.json); name the folder that a run wrote"
        )
    return ReportData(
        folder=folder,
        config=config,
        metrics=metrics,
        evaluation=evaluation or None,
        pairs=pairs or None,
        pair_examples=[] if scans else read_pair_examples(folder / "pairs", missing),
        stages={name: block for name, block in stages.items() if isinstance(block, Mapping)},
        environment=environment,
        recipe=compare_with_recipe(folder, config, environment) if config else None,
        files=hash_files(folder),
        missing=missing,
        left_out=_mapping(folder / "left_out.json", [], ""),
        scans=scans,
    )


def read_metrics(path: Path, missing: list[str]) -> Metrics | None:
    """One row for each step; a step written twice (after a resume) counts as written last, a half-written line is left out."""
    if not path.is_file():
        missing.append("metrics.jsonl: the training curves")
        return None
    rows: dict[int, dict[str, Any]] = {}
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _json_object(line)
        if row is None or not isinstance(row.get("step"), int):
            broken += bool(line.strip())
            continue
        rows[row["step"]] = row
    if broken:
        missing.append(f"metrics.jsonl: {broken} line(s) could not be read and are left out")
    if not rows:
        missing.append("metrics.jsonl: it holds no step")
        return None
    return _by_column([rows[step] for step in sorted(rows)])


def read_pair_examples(folder: Path, missing: list[str]) -> list[PairExample]:
    """The first pairs of the first shard, straight from the parquet file."""
    shards = sorted(folder.glob("pairs-*.parquet")) if folder.is_dir() else []
    if not shards:
        missing.append("pairs/: no shard to take examples from")
        return []
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(shards[0]).iter_batches(batch_size=PAIR_EXAMPLES)
        rows = next(iter(batches), None)
    except (OSError, pyarrow.ArrowException) as error:
        missing.append(f"pairs/{shards[0].name}: unreadable ({error})")
        return []
    return [example for row in (rows.to_pylist() if rows is not None else []) if (example := _pair_example(row))]


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of what went in and what came out, by path in the run folder."""
    found = [folder / name for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "pairs/summary.json")]
    found += sorted((folder / "adapter").rglob("*.safetensors")) if (folder / "adapter").is_dir() else []
    hashes: dict[str, str] = {}
    for path in found:
        if not path.is_file():
            continue
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        if size > HASHED_AT_MOST:
            hashes[name] = f"{size} bytes, too large to hash here"
            continue
        hashes[name] = sha256_of(path)
    return hashes


def _by_column(rows: Sequence[Mapping[str, Any]]) -> Metrics:
    names = {name: None for row in rows for name, value in row.items() if _is_number(value) and name != "step"}
    columns = {name: np.full(len(rows), np.nan) for name in names}
    not_finite: list[tuple[int, str]] = []
    margins: list[tuple[int, list[tuple[float, float]]]] = []
    for index, row in enumerate(rows):
        for name, value in row.items():
            if name in columns and _is_number(value):
                columns[name][index] = value
                if not np.isfinite(value):
                    not_finite.append((row["step"], name))
        points = row.get("margins_by_timestep")
        if isinstance(points, list):
            margins.append((row["step"], [(float(t), float(margin)) for t, margin in points]))
    steps = np.array([row["step"] for row in rows], dtype=np.float64)
    return Metrics(steps=steps, columns=columns, margins_by_timestep=margins, not_finite=not_finite)


def _pair_example(row: Mapping[str, Any]) -> PairExample | None:
    chosen, rejected = (_content(row.get(side)) for side in ("chosen", "rejected"))
    if not chosen or not rejected:
        return None
    condition = row.get("condition")
    prompt = condition.get("prompt", "") if isinstance(condition, Mapping) else ""
    return PairExample(
        prompt=str(prompt),
        chosen=chosen,
        rejected=rejected,
        chosen_score=_first_score(row.get("chosen_scores")),
        rejected_score=_first_score(row.get("rejected_scores")),
        images=_pictures(row.get("images")),
        losing_images=_pictures(row.get("rejected_images")),
        layout=_layout(condition),
    )


def _pictures(stored: Any) -> list[bytes]:
    """The bytes of a list of pictures; nothing for what is none."""
    cells = stored if isinstance(stored, list) else []
    return [cell["bytes"] for cell in cells if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes)]


def _layout(condition: Any) -> dict[str, Any]:
    """``layout`` among what a stored condition holds as JSON text."""
    stored = condition.get("metadata") if isinstance(condition, Mapping) else None
    try:
        found = json.loads(stored or "{}") if isinstance(stored, str) else {}
    except json.JSONDecodeError:
        return {}
    layout = found.get("layout") if isinstance(found, Mapping) else None
    return dict(layout) if isinstance(layout, Mapping) else {}


def _content(stored: Any) -> bytes | str | None:
    """An output as the store has it: a text, or the bytes of a file."""
    return stored.get("bytes") if isinstance(stored, Mapping) else stored if isinstance(stored, str) else None


def _first_score(scores: Any) -> float | None:
    values = [value for value in scores.values() if _is_number(value)] if isinstance(scores, Mapping) else []
    return float(values[0]) if values else None


def _mapping(path: Path, missing: list[str], what: str) -> dict[str, Any]:
    """A JSON or YAML object; an empty one, and a line in ``missing``, where the file is absent or is something else."""
    name = path.name if path.parent.name != "pairs" else f"pairs/{path.name}"
    if not path.is_file():
        missing.append(f"{name}: {what}")
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        missing.append(f"{name}: unreadable ({' '.join(str(error).split())[:120]})")
        return {}
    if not isinstance(content, dict):
        missing.append(f"{name}: holds a {type(content).__name__} where an object belongs")
        return {}
    return content


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
