"""What the verbs do: find the recipe and its modality, open the run folder, call the modality's function.

A modality is a module with ``SCHEMA`` (the pydantic class of its recipe, with the keys ``modality``, ``seed`` and ``run``), the
functions ``generate``, ``train``, ``evaluate``, ``report`` of ``(recipe, run)``, ``export(recipe, run, destination)`` (with
``arm=None`` where recipes have arms), and
``STAGES``, the names of those functions that ``align`` calls, in order. See ``core/run.py`` for how such a function is written;
``report`` alone needs no stage. In the key ``run``, ``{seed}`` stands for the seed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from polyalign.core.cli import existing_run
from polyalign.core.config import dump, open_draft, validate
from polyalign.core.config_errors import short
from polyalign.core.config_source import Draft, Place, shown
from polyalign.core.errors import UserError
from polyalign.core.run import RunFolder, Stage

MODALITIES = {
    "image": "polyalign.modalities.image.stages",
    "text": "polyalign.modalities.text.stages",
    "audio": "polyalign.modalities.audio.stages",
    "lidar": "polyalign.modalities.lidar.stages",
    "vlm": "polyalign.modalities.vlm.stages",
}
"""The modalities that come with polyalign: name -> module, imported when a recipe asks for it."""

ENTRY_POINTS = "polyalign.modalities"
"""Entry-point group by which other packages add modalities."""

DIAGNOSIS = "polyalign.evaluation.diagnose"
"""What the verb ``diagnose`` asks; it knows no modality, and is imported when the verb is called."""

ALWAYS = ("report",)
"""Verbs without a stage of their own: cheap, and made each time of whatever the run folder holds."""


@dataclass(frozen=True)
class Job:
    """A command understood: the recipe, its modality, the run folder."""

    recipe: Any
    module: ModuleType
    folder: Path
    files: tuple[Path, ...]


def modality_names() -> list[str]:
    """All modalities there are, our own first."""
    return list(dict.fromkeys([*MODALITIES, *(point.name for point in entry_points(group=ENTRY_POINTS))]))


def modality_module(name: str) -> ModuleType:
    """Import a modality.

    Raises:
        UserError: there is none of this name.
    """
    if name in MODALITIES:
        return importlib.import_module(MODALITIES[name])
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return importlib.import_module(point.value)
    raise UserError(f"no modality {name!r}; there are: {', '.join(modality_names())}.")


def _module_of(draft: Draft) -> ModuleType:
    name = draft.data.get("modality")
    names = modality_names()
    if isinstance(name, str) and name in names:
        return modality_module(name)
    if "modality" not in draft.data:
        raise UserError(f"{shown(draft.files[0])}: modality: missing; say which of {', '.join(names)} the recipe is for.")
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f", did you mean {near[0]}" if near else ""
    place = draft.place(("modality",))
    raise UserError(
        f"{shown(draft.files[0])}: modality: must be one of {', '.join(names)} (found {short(name)}){hint}; {place}"
    )


def job_of(options: argparse.Namespace) -> Job:
    """Read the recipe of a command.

    Raises:
        UserError: all that is wrong with it.
    """
    earlier = existing_run(options.config)
    draft = open_draft(earlier / "config.yaml" if earlier else options.config, options.overrides)
    folder = options.run or (str(earlier) if earlier and "run" not in _overridden(draft) else None)
    if folder is not None:
        _set_run(draft, folder)
    module = _module_of(draft)
    recipe, provenance = validate(draft, module.SCHEMA)
    folder = recipe.run.replace("{seed}", str(recipe.seed))
    if folder != recipe.run:
        _set_run(draft, folder)
        recipe, provenance = validate(draft, module.SCHEMA)
    path = Path(recipe.run).expanduser()
    if path.is_dir() and any(path.iterdir()) and not _is_run(path):
        raise UserError(f"run folder {path}: is not empty and not the folder of a run. Give a new or empty one with --run.")
    return Job(recipe, module, path, provenance.files)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "stages.json").is_file()


def _overridden(draft: Draft) -> set[str]:
    return {str(path[0]) for path, place in draft.places.items() if place.file is None}


def _set_run(draft: Draft, folder: str) -> None:
    draft.data["run"] = folder
    draft.places[("run",)] = Place()


def plan(job: Job, names: list[str]) -> dict[str, dict[str, Stage]]:
    """How the stages of each of the verbs ``names`` stand; nothing is run or written. A verb may have several stages."""
    run = RunFolder(job.folder, planning=True)
    stages: dict[str, dict[str, Stage]] = {}
    for name in names:
        if name in ALWAYS:
            stages[name] = {name: Stage(name, "todo", reasons=("made each time, of what the run folder holds",))}
            continue
        before = set(run.planned)
        getattr(job.module, name)(job.recipe, run)
        stages[name] = {stage: found for stage, found in run.planned.items() if stage not in before}
        if not stages[name]:
            raise RuntimeError(f"{job.module.__name__}.{name} did its work outside of run.stage(...)")
    return stages


def align(_verb: str, options: argparse.Namespace) -> int:
    """All stages of the modality, in order."""
    job = job_of(options)
    names = list(job.module.STAGES)
    if options.dry_run:
        return _show_plan(job, names)

    return _execute(job, names)


def one_stage(verb: str, options: argparse.Namespace) -> int:
    """One stage of the modality, after a check that what it builds on is still as the recipe says."""
    job = job_of(options)
    names = list(job.module.STAGES)
    known = [*names[: names.index(verb)], verb] if verb in names else [verb]
    if options.dry_run:
        return _show_plan(job, known)
    if verb in ALWAYS:
        return _of_what_is_there(job, verb)
    _refuse_stale_inputs(job, verb, plan(job, known))
    return _execute(job, [verb])


def export(_verb: str, options: argparse.Namespace) -> int:
    """The modality's export."""
    job = job_of(options)
    aside = job.folder / ("export" if options.arm is None else f"export-{options.arm}")
    destination = Path(options.to).expanduser() if options.to else aside
    if options.dry_run:
        print(f"would write {destination}")
        return _show_plan(job, list(job.module.STAGES))
    if not job.folder.is_dir():
        raise UserError(f"run folder {job.folder}: does not exist, so there is nothing to export. Run 'polyalign align' first.")
    which = {} if options.arm is None else {"arm": options.arm}
    if which and "arm" not in inspect.signature(job.module.export).parameters:
        raise UserError("--arm: recipes of this modality have no arms to export. Leave it out")
    with RunFolder(job.folder).lock() as run:
        job.module.export(job.recipe, run, destination, **which)
    print(f"exported to {destination}")
    return 0


def _refuse_stale_inputs(job: Job, verb: str, stages: dict[str, dict[str, Stage]]) -> None:
    """A stage must not quietly build on products that were made with other settings than the recipe's."""
    earlier = {name: stage for other, group in stages.items() if other != verb for name, stage in group.items()}
    waiting = [name for stage in stages[verb].values() for name in stage.after]
    for name in waiting:
        stage = earlier.get(name)
        if stage is None:
            continue
        if stage.status == "stale":
            raise UserError(
                f"{verb} builds on {name}, but the products of {name} in {job.folder} were made otherwise: "
                f"{'; '.join(stage.reasons)}. Put the old values back, or run 'polyalign align' to make them anew "
                "(the old ones are kept beside), or take another folder with --run."
            )
        waiting += [other for other in stage.after if other not in waiting]


def _of_what_is_there(job: Job, verb: str) -> int:
    """A verb that does no work of a run: what the folder says about how that was done stays as it is."""
    if not _is_run(job.folder):
        raise UserError(f"run folder {job.folder}: holds no run, so there is nothing to {verb}. Run 'polyalign align' first.")
    with RunFolder(job.folder).lock() as run:
        getattr(job.module, verb)(job.recipe, run)
    print(f"run folder: {job.folder}")
    return 0


def _execute(job: Job, names: list[str]) -> int:
    """Do the work of the verbs ``names``. A run that is there keeps its ``config.yaml`` until one of them begins work, or all
    have found theirs done: what is refused before that leaves the run as it was. A new folder has it at once, and is a run."""
    run = RunFolder(job.folder, recipe=job.recipe)
    with run.lock():
        if not (job.folder / "config.yaml").is_file():
            run.write_config(job.recipe)
        for name in names:
            if name in ALWAYS:
                run.write_config(job.recipe)
            getattr(job.module, name)(job.recipe, run)
        run.write_config(job.recipe)
    print(f"run folder: {job.folder}")
    return 0


def _show_plan(job: Job, names: list[str]) -> int:
    print(f"# recipe: {', extends '.join(shown(file) for file in job.files)}")
    print(dump(job.recipe))
    print(f"# run folder: {job.folder}{'' if job.folder.is_dir() else ' (new)'}")
    for stage in [stage for group in plan(job, names).values() for stage in group.values()]:
        print(f"# {stage.name + ' ':12}{stage.status:9}{'; '.join(stage.reasons)}".rstrip())
    return 0


def explain(_verb: str, options: argparse.Namespace) -> int:
    """See ``core/explain.py``."""
    from polyalign.core.explain import explanation

    names = modality_names() if options.modality is None else [options.modality]
    print(explanation(options.topic, {name: partial(_schema_of, name) for name in names}))
    return 0


def _schema_of(modality: str) -> type[BaseModel]:
    return modality_module(modality).SCHEMA


def diagnose(_verb: str, options: argparse.Namespace) -> int:
    """See ``evaluation/diagnose``."""
    found = importlib.import_module(DIAGNOSIS)
    diagnosis = found.write_diagnosis(Path(options.run).expanduser())
    print(json.dumps(diagnosis.as_json(), indent=2, ensure_ascii=False) if options.json else found.as_text(diagnosis))
    return 0


def doctor(_verb: str, options: argparse.Namespace) -> int:
    """See ``core/doctor.py``."""
    from polyalign.core.doctor import doctor as examine

    return examine(["--json"] if options.json else [])
