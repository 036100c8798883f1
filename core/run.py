"""The run folder: what is finished, what has to be done again, and why.

A verb does its work inside one stage::

    def train(recipe, run):
        inputs = {"train": recipe.train, "seed": recipe.seed}
        with run.stage("train", inputs, after=("generate",), products=("adapter",), scratch=("checkpoints",)) as stage:
            if stage.todo:
                ...  # all the work, written below run.path

or several stages one after another, such as one for each arm. A stage is *done* when ``stages.json`` says that it finished with
the same inputs (their SHA-256, and that of the products of the stages it comes after) and its products are still there; it is
then not todo. One that was interrupted with the same inputs is todo and finds its unfinished work where it left it. One whose
inputs have changed is *stale*: its old products and unfinished work are moved aside to ``<name>.stale-1`` (-2, ...), never
deleted, and it starts anew.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from polyalign.core import environment
from polyalign.core.config import dump
from polyalign.core.errors import UserError
from polyalign.core.files import Manifest, atomic_write, disk_full_explained, locked, manifest_of, set_aside, sha256_of
from polyalign.core.memory import peak_memory, reset_peak_memory

Status = Literal["todo", "started", "stale", "done"]

SHOWN_CHANGES = 4
LEDGER = "stages.json"


@dataclass(frozen=True)
class Stage:
    """A stage as it stands before it runs."""

    name: str
    status: Status
    after: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why it is not done: what changed, what is missing."""

    planned: bool = False
    """Whether the run folder only plans."""

    @property
    def todo(self) -> bool:
        """Whether the work has to be done (or finished) now; never when planning."""
        return self.status != "done" and not self.planned


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class RunFolder:
    """The folder of one run.

    Args:
        path: created when it is missing.
        planning: write nothing; no stage is todo, and ``planned`` collects how each of them stands. ``--dry-run`` uses this.
        tell: receives the one-line messages for the user.
        recipe: written as ``config.yaml`` when a stage begins work, so that the file never names settings that nothing was
            made with.

    In a run of several processes only rank 0 writes; the others take the same decisions from what they read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        planning: bool = False,
        tell: Callable[[str], None] = _tell,
        recipe: BaseModel | None = None,
    ):
        self.path = Path(path)
        self.planning = planning
        self.recipe = recipe
        self.planned: dict[str, Stage] = {}
        self._writes = not planning and os.environ.get("RANK", "0") == "0"
        self._tell = tell if self._writes else lambda message: None
        if self._writes:
            self._make()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {self.path}: cannot be made ({error.strerror}). Give another with --run.") from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def lock(self) -> Iterator[RunFolder]:
        """Keep other processes out of the folder. The operating system frees the lock when this process ends, however it ends.

        Raises:
            UserError: another process holds it.
        """
        if not self._writes:
            yield self
            return
        with locked(self.path / ".lock", what=f"run folder {self.path}"):
            yield self

    def write_config(self, recipe: BaseModel) -> None:
        """Write the resolved recipe as ``config.yaml``; running that file reproduces the run."""
        if self._writes:
            atomic_write(self.path / "config.yaml", dump(recipe))

    def write_environment(self, hashes: Mapping[str, str] | None = None) -> None:
        """Write what this run runs on as ``environment.json``: versions, devices, commit, command. Each stage that has work to
        do writes it, and its record in ``stages.json`` keeps its own.

        Args:
            hashes: of what went into the work, for instance the base's; added to those that the file has.
        """
        if not self._writes:
            return
        path = self.path / "environment.json"
        found = {**self._hashes(path), **(hashes or {})}
        content = environment.snapshot() | ({"hashes": found} if found else {})
        atomic_write(path, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def _hashes(path: Path) -> Mapping[str, str]:
        """``hashes`` of the file as it is; a damaged one, which this run will write anew, has none."""
        try:
            return json.loads(path.read_text(encoding="utf-8")).get("hashes", {})
        except (FileNotFoundError, ValueError, AttributeError):
            return {}

    def records(self) -> dict[str, dict[str, Any]]:
        """What ``stages.json`` says: for each stage ``seconds``, ``peak_memory_bytes``, ``inputs_hash``, ``finished``,
        ``environment`` and more.

        Raises:
            UserError: the file is damaged.
        """
        ledger = self.path / LEDGER
        if not ledger.is_file():
            return {}
        try:
            return json.loads(ledger.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{ledger}: is damaged ({error}). Move the file away; finished products are then kept aside and made again."
            ) from error

    @contextmanager
    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        *,
        after: Sequence[str] = (),
        products: Sequence[str] = (),
        scratch: Sequence[str] = (),
    ) -> Iterator[Stage]:
        """A stage; see the top of this module.

        Args:
            inputs: everything that the products depend on: parts of the recipe, hashes of files read. Sections, paths and
                tuples are allowed.
            after: the stages whose products this one reads.
            products: files and folders below the run folder that exist when it is done. They are hashed.
            scratch: further ones that belong to it (checkpoints, logs): moved aside with the products, not hashed.

        Raises:
            UserError: a stage of ``after`` has not finished; the disk is full.
        """
        wanted = _plain(inputs)
        stage, digest, upstream = self._assess(name, wanted, tuple(after), (*products, *scratch))
        if self.planning:
            self.planned[name] = stage
            yield replace(stage, planned=True)
            return
        self._announce(stage, [*products, *scratch])
        if not stage.todo:
            yield stage
            return
        if self.recipe is not None:
            self.write_config(self.recipe)
        self.write_environment()
        before = self.records().get(name, {}) if stage.status == "started" else {}
        record = {"finished": False, "inputs_hash": digest, "inputs": wanted, "after": upstream}
        with self._measured(name, record, before), disk_full_explained(f"stage {name} in {self.path}"):
            yield stage
            record |= self._finished(name, products)

    @contextmanager
    def _measured(self, name: str, record: dict[str, Any], before: Mapping[str, Any]) -> Iterator[None]:
        """Keep ``record`` in the ledger from the beginning; at the end, however it comes, with what it ran on and its time and
        memory, to which those of an interrupted attempt ``before`` are added."""
        seconds = before.get("seconds", 0.0)
        self._record(name, record | {"seconds": seconds, "peak_memory_bytes": before.get("peak_memory_bytes", 0)})
        began = time.monotonic()
        reset_peak_memory()
        try:
            yield
        finally:
            record["seconds"] = round(seconds + time.monotonic() - began, 3)
            record |= {key: max(value, before.get(key, 0)) for key, value in peak_memory().items()}
            record["environment"] = environment.snapshot()
            self._record(name, record)

    def _assess(
        self, name: str, inputs: Any, after: tuple[str, ...], belongings: Sequence[str]
    ) -> tuple[Stage, str, dict[str, str | None]]:
        records = self.records()
        upstream = {other: self._products_hash(other, name, records) for other in after}
        digest = sha256_of(_canonical({"inputs": inputs, "after": upstream}).encode())
        record = records.get(name)
        if record is None:
            strays = [f"{item} was there before, without a record" for item in belongings if (self.path / item).exists()]
            return Stage(name, "stale" if strays else "todo", after, tuple(strays)), digest, upstream
        if record["inputs_hash"] != digest:
            reasons = _changes(record, inputs, upstream)
            return Stage(name, "stale", after, reasons), digest, upstream
        if not record["finished"]:
            return Stage(name, "started", after, ("was interrupted",)), digest, upstream
        damage = Manifest(record["products"]).damage(self.path)
        reasons = tuple(f"{item} {what}" for item, what in damage.items())
        return Stage(name, "started" if reasons else "done", after, reasons), digest, upstream

    def _products_hash(self, other: str, name: str, records: Mapping[str, Mapping[str, Any]]) -> str | None:
        if self.planning:
            planned = self.planned.get(other)
            if planned is not None and planned.status != "done":
                return None
        record = records.get(other)
        if record is not None and record["finished"]:
            return record["products_hash"]
        if self.planning:
            return None
        raise UserError(
            f"{name} needs the products of {other}, which has not finished in {self.path}. "
            f"Run 'polyalign {other.split()[0]} CONFIG' first, or 'polyalign align CONFIG', which does all that is missing."
        )

    def _announce(self, stage: Stage, belongings: Sequence[str]) -> None:
        """Say what happens to the stage, and clear the way for it."""
        why = "; ".join(stage.reasons)
        if stage.status == "done":
            self._tell(f"{stage.name}: done already, kept")
        elif stage.status == "todo":
            self._tell(f"{stage.name}: begins")
        elif stage.status == "started":
            self._tell(f"{stage.name}: continues ({why})")
            changed = [reason.removesuffix(" has changed") for reason in stage.reasons if reason.endswith(" has changed")]
            self._move_aside(changed)
        else:
            moved = self._move_aside(belongings)
            kept = f"; the old products are kept as {', '.join(moved)}" if moved else ""
            self._tell(f"{stage.name}: begins anew, since {why}{kept}")

    def _move_aside(self, belongings: Sequence[str]) -> list[str]:
        return set_aside(self.path, belongings) if self._writes else []

    def _finished(self, name: str, products: Sequence[str]) -> dict[str, Any]:
        missing = [item for item in products if not (self.path / item).exists()]
        if missing and self._writes:
            raise RuntimeError(f"stage {name} ended without writing {missing}")
        manifest = manifest_of(self.path, products) if self._writes else Manifest({})
        return {"finished": True, "products": manifest.entries, "products_hash": manifest.digest()}

    def _record(self, name: str, record: Mapping[str, Any]) -> None:
        if self._writes:
            text = json.dumps(self.records() | {name: dict(record)}, indent=2, ensure_ascii=False)
            atomic_write(self.path / LEDGER, text + "\n")


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it, so that equal inputs have equal text."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(child) for child in value)
    return str(value) if isinstance(value, Path) else value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _changes(record: Mapping[str, Any], inputs: Any, upstream: Mapping[str, str | None]) -> tuple[str, ...]:
    """What differs from the inputs that the recorded products were made with."""
    old, new = _leaves(record["inputs"]), _leaves(inputs)
    changes = [
        f"{key} {_side(old, key)} -> {_side(new, key)}"
        for key in dict.fromkeys([*new, *old])
        if _side(old, key) != _side(new, key)
    ]
    changes += [
        f"{other} {'runs again' if digest is None else 'has other products'}"
        for other, digest in upstream.items()
        if record["after"].get(other) != digest
    ]
    extra = len(changes) - SHOWN_CHANGES
    return tuple(changes[:SHOWN_CHANGES]) + ((f"{extra} more",) if extra > 0 else ())


def _side(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key], ensure_ascii=False) if key in leaves else "nothing"


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {name: leaf for key, child in value.items() for name, leaf in _leaves(child, f"{path}.{key}".lstrip(".")).items()}
