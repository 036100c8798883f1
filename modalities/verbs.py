"""What the verbs of all modalities share: what is refused early, the frames of generation and evaluation, report and export."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, disk_full_explained
from polyalign.core.progress import ProgressLine
from polyalign.core.randomness import seed_of
from polyalign.core.run import RunFolder
from polyalign.modalities import loops
from polyalign.modalities.arms import Room, refuse_unless_trained
from polyalign.modalities.exporting import add_evaluation
from polyalign.modalities.fingerprints import MODEL_FILES, files_named, fingerprint, judge_files, listed

if TYPE_CHECKING:
    from polyalign.core.objectives.serves import Offer
    from polyalign.core.scores import Kind
    from polyalign.datasets.formats.table import Format

Condition = Mapping[str, Any]
Outputs = tuple[Sequence[Any], Sequence[str] | None]
"""Outputs, and the files of the run folder that hold them, where each has its own."""


# --- refused early -----------------------------------------------------------------------------------------------------------


def refuse_unfit_judges(recipe: Any, outputs: str) -> None:
    """Raises UserError if there is no judge of a name, one is for another kind of outputs or refuses its options, or two cannot
    evaluate together."""
    from polyalign.evaluation import judges

    named = [judge for _, judge in loops.judges_of(recipe)]
    judges.refuse_other_outputs([judge.name for judge in named], outputs)
    for judge in named:
        if judge.name in judges.JUDGES or judge.name not in judges.names():
            judges.build(judge, outputs)  # ours read no weights yet; an unknown name raises, and says which there are
    judges.refuse_unfit([judges.panel([judge]) for judge in recipe.evaluate.judges if judge.name in judges.JUDGES])


def refuse_unknown_prompts(room: Room, recipe: Any) -> None:
    """Raises UserError for a prompt, to make pairs from or to evaluate on, that its judge does not know. Captions of one's own
    that are kept aside for the evaluation are looked at there."""
    from polyalign.evaluation.judges import JUDGES, build, refuse_conditions

    asked = ((recipe.pairs.prompts, recipe.pairs.judges), (recipe.evaluate.prompts, recipe.evaluate.judges))
    for prompts, named in asked:
        judges = [build(judge) for judge in named if judge.name in JUDGES]  # ours read no weights yet
        if prompts is not None and judges:
            refuse_conditions(judges, room.conditions_of(prompts, recipe.seed))


def refuse_seats(recipe: Any, *, who: str, loader: str) -> None:
    """Raises UserError for a reference that full training cannot have, or that no recipe can load. ``loader`` is the beginning
    of the call that loads it from Python."""
    if recipe.model.train == "full" and recipe.train.reference.seat == "adapter_off":
        raise UserError(
            "train.reference.seat: adapter_off needs a LoRA, and model.train is full. Set train.reference.seat to frozen (a "
            "second copy of the network), cached or none, or model.train to lora"
        )
    if recipe.train.reference.seat == "adapter":
        raise UserError(
            f"train.reference.seat: adapter compares with a second LoRA on the network, and {who} cannot load one. "
            f"Set it to adapter_off (the base), frozen, ema, cached or none; from Python, {loader}"
            f"name={recipe.train.reference.adapter_name!r}) puts one there"
        )


def refuse_objectives(recipe: Any, offer: Offer) -> None:
    """Raises UserError if the objective, or one of the arms, asks for more than ``offer`` and the recipe can give."""
    from polyalign.core.objectives.serves import Plan, refuse_unless_served
    from polyalign.core.objectives.table import build

    train = recipe.train
    loops.refuse(recipe)
    plan = Plan(train.reference.seat, cut=train.micro_batch_size < train.batch_size)
    for key, spec in loops.specs_of(recipe).items():
        refuse_unless_served(build(spec), loops.widened(offer, recipe), plan, key=key)


def refuse_labels(recipe: Any, likelihood: Kind, outputs: str) -> None:
    """Raises UserError for an objective that compares two ``outputs`` a prompt ("answers to"), where there are single ones."""
    from polyalign.core.objectives.table import TABLE, build

    if not recipe.pairs.labelled:
        return
    able = [name for name, row in TABLE.items() if "labels" in row.data and likelihood in row.likelihoods]
    for key, spec in loops.specs_of(recipe).items():
        objective = build(spec)
        if "labels" not in objective.data:
            raise UserError(
                f"{key}: {objective.name} compares two {outputs} a prompt, and pairs.source: labels has single ones. Take one "
                f"of {', '.join(able)}, or another source"
            )


def refuse_several_processes(verb: str, run: RunFolder, *, modality: str) -> None:
    """Raises UserError under a launcher of several processes, each of which would do all of the work in the same files."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1" or run.planning:
        return
    raise UserError(
        f"{verb} works in one process, and WORLD_SIZE says {processes}. Only training works in several. Run 'polyalign "
        "generate CONFIG' without a launcher, then\n"
        f"  torchrun --nproc_per_node {processes} -m polyalign.modalities.{modality}.train CONFIG run={run.path}\n"
        "and then 'polyalign align CONFIG', which does what is left"
    )


# --- pairs -------------------------------------------------------------------------------------------------------------------


def generate(
    room: Room,
    recipe: Any,
    run: RunFolder,
    *,
    formats: Mapping[str, Format],
    samples_of: Mapping[str, Any],
    makers: Mapping[str, Callable[[Any, RunFolder, Any, Any], None]] = {},
    place: str = "pairs",
    finish: Callable[[], None] | None = None,
) -> None:
    """Prompts to pairs, or preferences in any format to pairs: writes ``pairs/``.

    ``formats`` is the table of the modality's formats, ``samples_of`` what samples of the base depend on besides its files.
    ``makers`` are further sources that sample and judge, by name: ``maker(recipe, run, adapter, model)`` fills ``pairs/``.
    Pairs that are not done with being made are made in the folder ``place`` of the run, and ``finish()`` fills ``pairs/``.
    """
    pairs = recipe.pairs
    if loops.is_online(recipe):
        _ask(room, recipe, run)
        return
    inputs: dict[str, Any] = {"pairs": pairs.inputs(), "seed": recipe.seed, "source": fingerprint(pairs.location)}
    inputs |= judge_files(pairs.judges) | listed(pairs.source, pairs.location, formats, pairs.options)
    inputs |= _embedder(pairs.prompts) | _named(room, pairs.prompts)
    if pairs.sampled:
        inputs |= {**room.model_files(recipe), **samples_of}
    with run.stage("generate", inputs, products=("pairs",)) as stage:
        if stage.todo:
            refuse_unknown_prompts(room, recipe)
            _generate(room, recipe, run, formats, makers, place)
            if finish is not None:
                finish()


def _ask(room: Room, recipe: Any, run: RunFolder) -> None:
    """Where the training makes its own pairs: writes ``prompts.jsonl``, what its rounds ask."""
    prompts = recipe.pairs.prompts
    inputs = {"prompts": prompts, "seed": recipe.seed, "source": fingerprint(recipe.pairs.location)}
    inputs |= _embedder(prompts)
    with run.stage("generate", inputs, products=(loops.PROMPTS,)) as stage:
        if stage.todo:
            loops.AskedPrompts.write(run / loops.PROMPTS, room.conditions_of(prompts, recipe.seed))


def _embedder(prompts: Any) -> dict[str, Any]:
    """The hash of the encoder by which prompts are selected; empty without one, so that finished runs stay finished."""
    select = getattr(prompts, "select", None)
    return {} if select is None else {"embedder": fingerprint(str(Path(select.embedder).expanduser()), endings=MODEL_FILES)}


def _named(room: Room, prompts: Any) -> dict[str, Any]:
    """The hash of the files that a file of prompts only names; empty without any, so that finished runs stay finished."""
    return {} if prompts is None or not prompts.file else files_named("prompts_name", room.named_by(prompts), prompts.file)


def _generate(
    room: Room, recipe: Any, run: RunFolder, formats: Mapping[str, Format], makers: Mapping[str, Any], place: str
) -> None:
    from polyalign.datasets.formats.own_samples import Drawing
    from polyalign.evaluation.judges import panel
    from polyalign.modalities.generation import GenerationSettings, generate_pairs, read_pairs

    pairs, store, sampler = recipe.pairs, room.pairs_of(recipe, run, place), recipe.sampler.model_dump(mode="json")
    if not pairs.sampled:
        read_pairs(pairs, store, formats)
        return
    adapter, model = room.open_model(recipe, run, None)
    if pairs.source in makers:
        makers[pairs.source](recipe, run, adapter, model)
        return
    if pairs.source != "generate":
        read_pairs(pairs, store, formats, Drawing(partial(adapter.sample, model), model.identity, recipe.seed, sampler))
        return
    generate_pairs(
        adapter,
        model,
        room.conditions_of(pairs.prompts, recipe.seed),
        panel(pairs.judges),
        settings=GenerationSettings(
            samples_per_prompt=pairs.samples_per_prompt,
            prompts_per_shard=pairs.prompts_per_shard,
            sampler=sampler,
            **pairs.pairing.model_dump(),
        ),
        folder=run / place,
        seed=recipe.seed,
        outputs=room.outputs,
        pictured=room.pictured,
    )


# --- evaluation --------------------------------------------------------------------------------------------------------------


def evaluate(
    room: Room,
    recipe: Any,
    run: RunFolder,
    sampled: Callable[[str, Path | None, Sequence[Condition], Sequence[int]], Outputs],
    *,
    finish: Callable[[Mapping[str, Sequence[Any]], Sequence[Condition], Sequence[int]], None] | None = None,
) -> None:
    """Base, aligned and arms on the same prompts and seeds: writes ``samples/`` and ``evaluation.json``.

    ``sampled(name, trained, conditions, seeds)`` gives the outputs of one model and writes them to ``samples/NAME``;
    ``finish(outputs by name, conditions, seeds)`` writes what else belongs into ``samples/``.
    """
    prompts = recipe.evaluate.prompts
    inputs = {
        **room.model_files(recipe),
        "sampler": recipe.sampler,
        "evaluate": _evaluation_inputs(recipe.evaluate),
        "seed": recipe.seed,
        "prompts": fingerprint(prompts.file if prompts else None),
        **judge_files(recipe.evaluate.judges),
        **_reward_inputs(recipe.evaluate),
        **_embedder(prompts),
        **_named(room, prompts),
    }
    after = ("generate", "train", *(f"train {name}" for name in recipe.arms))
    with run.stage("evaluate", inputs, after=after, products=("samples", "evaluation.json")) as stage:
        if stage.todo:
            _evaluate(room, recipe, run, sampled, finish)


def _evaluation_inputs(evaluate: Any) -> dict[str, Any]:
    """What of ``evaluate`` the evaluation depends on. A key that came later is left out at its default, so that finished runs
    stay finished."""
    inputs = evaluate.model_dump(mode="json")
    if inputs.get("rewards") is None:
        inputs.pop("rewards", None)
    return inputs


def _reward_inputs(evaluate: Any) -> dict[str, Any]:
    """Hashes of what rewards are compared on, and of the judges."""
    rewards = loops.section(evaluate, "rewards")
    if rewards is None:
        return {}
    stores = {name: fingerprint(place, endings=frozenset({".parquet"})) for name, place in rewards.splits.items()}
    return {"reward_splits": stores, "reward_judges": judge_files(rewards.judges)}


def _evaluate(room: Room, recipe: Any, run: RunFolder, sampled: Any, finish: Any) -> None:
    from polyalign.evaluation.judges import panel, refuse_conditions
    from polyalign.evaluation.paired import evaluate_paired

    asked = room.asked_of(recipe, run)
    conditions = everything = room.evaluation_conditions(recipe, asked)
    if recipe.evaluate.prompts is None and getattr(recipe.prepare, "on_long", "error") == "drop":
        conditions = room.asked_in_evaluation(recipe, asked, *room.open_model(recipe, run, None))
    judges = [panel([config]) for config in recipe.evaluate.judges]
    refuse_conditions(judges, conditions)
    seeds = [seed_of(recipe.seed, "evaluate", index) for index in range(len(conditions))]
    base, base_files = sampled("base", None, conditions, seeds)
    aligned, aligned_files = sampled("aligned", run / "adapter", conditions, seeds)
    arms = {name: sampled(f"arms/{name}", run / "arms" / name / "adapter", conditions, seeds)[0] for name in recipe.arms}
    if finish is not None:
        finish({"base": base, "aligned": aligned, **arms}, conditions, seeds)
    report = evaluate_paired(
        base,
        aligned,
        conditions,
        seeds,
        judges,
        seed=recipe.seed,
        base_images=base_files,
        aligned_images=aligned_files,
        arms=arms,
    )
    report |= room.tables(report, conditions, recipe.seed)
    report |= room.measured(recipe, run, asked)
    if left := len(everything) - len(conditions):
        report["left_out"] = {"too_long": left // recipe.evaluate.seeds_per_prompt}
    atomic_write(run / "evaluation.json", json.dumps(report, indent=1))


def sampled_files(
    adapter: Any,
    model: Any,
    run: RunFolder,
    name: str,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    *,
    batch_size: int,
    ending: str,
    encode: Callable[[Any], bytes],
) -> list[str]:
    """Outputs of one model, a file each, written to ``samples/NAME`` batch by batch; those already there are not made again.
    Returns the files, relative to the run folder."""
    files = [f"samples/{name}/{index:05d}{ending}" for index in range(len(conditions))]
    (run / "samples" / name).mkdir(parents=True, exist_ok=True)
    with ProgressLine(f"sampling, {name}", total=len(files)) as line:
        for part in (slice(start, start + batch_size) for start in range(0, len(files), batch_size)):
            if not all((run / file).exists() for file in files[part]):
                for file, output in zip(files[part], adapter.sample(model, conditions[part], seeds[part]), strict=True):
                    atomic_write(run / file, encode(output))
            line.advance(count=len(files[part]))
    return files


def sampled_texts(
    adapter: Any,
    model: Any,
    run: RunFolder,
    name: str,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    *,
    batch_size: int,
) -> list[str]:
    """Answers of one model, written to ``samples/NAME``, a file for each batch; those already there are read again."""
    folder = run / "samples" / name
    folder.mkdir(parents=True, exist_ok=True)
    answers: list[str] = []
    with ProgressLine(f"sampling, {name}", total=len(conditions)) as line:
        for start in range(0, len(conditions), batch_size):
            part, file = slice(start, start + batch_size), folder / f"{start // batch_size:05d}.json"
            if not file.is_file():
                made = adapter.sample(model, conditions[part], seeds[part])
                atomic_write(file, json.dumps(made, ensure_ascii=False, indent=1) + "\n")
            answers += json.loads(file.read_text(encoding="utf-8"))
            line.advance(count=len(conditions[part]))
    return answers


# --- report and export -------------------------------------------------------------------------------------------------------


def report(run: RunFolder) -> None:
    """Whatever the run folder holds, in one page: writes ``report.html`` and ``report.json``, and says the verdict."""
    from polyalign.evaluation.report import write_report

    page = write_report(run.path)
    verdict = json.loads((run / "report.json").read_text(encoding="utf-8"))["verdict"]
    print(f"{verdict['state']}: {verdict['sentence']}\nreport: {page}")


def export(room: Room, recipe: Any, run: RunFolder, destination: Path, arm: str | None = None) -> None:
    """The trained weights of the recipe's objective, or of an arm, where the user wants them. Where they are evaluated, the
    card says how, and pictures are shown beside those of the base.

    Raises:
        UserError: there are none, they are unfinished or of another recipe; something is at the destination; a full disk.
    """
    source = refuse_unless_trained(room, recipe, run, arm)
    plan = RunFolder(run.path, planning=True)
    evaluate(room, recipe, plan, _not_in_a_plan)
    evaluated = plan.planned["evaluate"].status == "done"
    copied_whole(source, destination, finish=partial(add_evaluation, run=run.path, arm=arm) if evaluated else None)


def _not_in_a_plan(_name: str, _trained: Path | None, _conditions: Sequence[Condition], _seeds: Sequence[int]) -> Outputs:
    raise RuntimeError("a plan samples nothing")


def copied_whole(source: Path, destination: Path, *, finish: Callable[[Path], None] | None = None) -> None:
    """A folder where the user wants it: all of it or nothing. ``finish`` adds to the copy before it comes into place.

    Raises:
        UserError: something is at the destination; a full disk.
    """
    if destination.exists():
        raise UserError(f"{destination}: exists already; nothing was written. Give another folder, or move this one away")
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        with disk_full_explained(f"the export {destination}"):
            _copy(source, unfinished / "export")
            if finish is not None:
                finish(unfinished / "export")
        (unfinished / "export").rename(destination)
    finally:
        shutil.rmtree(unfinished)


def _copy(source: Path, destination: Path) -> None:
    """A folder's files. ``shutil.copytree`` would hide a full disk in an error of its own."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target = destination / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as given, open(target, "wb") as copied:
            shutil.copyfileobj(given, copied)
