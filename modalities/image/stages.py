"""The stages of an image run: pairs, training, evaluation, report. The command line calls these, one function a verb."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, disk_full_explained, sha256_of
from polyalign.core.progress import ProgressLine
from polyalign.core.randomness import seed_of
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.image.config import ImageRecipe
from polyalign.modalities.image.training import (
    conditions_of,
    evaluation_conditions,
    fingerprint,
    model_files,
    open_model,
    open_trained,
    train_arm,
)

if TYPE_CHECKING:
    from PIL import Image

    from polyalign.core.recipe import JudgeConfig

SCHEMA = ImageRecipe
STAGES = ("generate", "train", "evaluate", "report")

Condition = Mapping[str, Any]


# --- pairs -------------------------------------------------------------------------------------------------------------------


def refuse_early(recipe: ImageRecipe) -> None:
    """What later stages would refuse, refused before hours have gone into earlier ones.

    Raises:
        UserError: no such judge; no such file of prompts to evaluate on; a reference that full training cannot have, or that
            no recipe can load; an objective that needs more than pairs.
    """
    from polyalign.evaluation import judges

    for judge in (*recipe.pairs.judges, *recipe.evaluate.judges):
        if judge.name in judges.JUDGES or judge.name not in judges.names():
            judges.build(judge)  # ours read no weights yet; an unknown name raises, and says which there are
    judges.refuse_unfit([judges.panel([judge]) for judge in recipe.evaluate.judges if judge.name in judges.JUDGES])
    fingerprint(recipe.evaluate.prompts.file if recipe.evaluate.prompts else None)
    if recipe.model.train == "full" and recipe.train.reference.seat == "adapter_off":
        raise UserError(
            "train.reference.seat: adapter_off needs a LoRA, and model.train is full. Set train.reference.seat to frozen (a "
            "second copy of the network), cached or none, or model.train to lora"
        )
    if recipe.train.reference.seat == "adapter":
        raise UserError(
            "train.reference.seat: adapter compares with a second LoRA on the network, and an image recipe cannot load one. "
            "Set it to adapter_off (the base), frozen, ema, cached or none; from Python, ImageAdapter.load_lora(model, file, "
            f"name={recipe.train.reference.adapter_name!r}) puts one there"
        )
    _refuse_objectives(recipe)


def _refuse_objectives(recipe: ImageRecipe) -> None:
    """Raises UserError if one of the objectives asks for more than pairs of pictures and a denoising model can give."""
    from polyalign.core.objectives.serves import Offer, Plan, refuse_unless_served
    from polyalign.core.objectives.table import build

    train = recipe.train
    offer = Offer("an image recipe", "timestep", frozenset({"value", "output_gradient"}))
    plan = Plan(train.reference.seat, cut=train.micro_batch_size < train.batch_size)
    for key, spec in {"objective": recipe.objective, **{f"arms.{name}": arm for name, arm in recipe.arms.items()}}.items():
        refuse_unless_served(build(spec), offer, plan, key=key)


def refuse_several_processes(verb: str, run: RunFolder) -> None:
    """Raises UserError under a launcher of several processes, each of which would do all of the work in the same files."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1" or run.planning:
        return
    raise UserError(
        f"{verb} works in one process, and WORLD_SIZE says {processes}. Only training works in several. Run 'polyalign "
        "generate CONFIG' without a launcher, then\n"
        f"  torchrun --nproc_per_node {processes} -m polyalign.modalities.image.train CONFIG run={run.path}\n"
        "and then 'polyalign align CONFIG', which does what is left"
    )


def _base_of(recipe: ImageRecipe) -> dict[str, Any]:
    """What samples of the base depend on: the model without what is trained of it (full training loads it in float32)."""
    base = recipe.model.model_dump(mode="json", exclude={"train", "lora"})
    return base | ({"dtype": "float32"} if recipe.model.train == "full" else {})


def _judge_files(specs: Sequence[JudgeConfig]) -> dict[str, Any]:
    """Hashes of the files on this machine that judges are read from, as an input of stages: other weights under the same name
    are another judge. Empty for judges without any, or from a model hub, which a revision pins."""
    from polyalign.evaluation import judges

    ours = [judges.build(spec) for spec in specs if spec.name in judges.JUDGES]
    paths = sorted({str(path) for judge in ours for path in getattr(judge, "local_files", list)()})
    return {"judges": {path: fingerprint(path) for path in paths}} if paths else {}


def _listed(recipe: ImageRecipe) -> dict[str, Any]:
    """The hash of the pictures that the data's file only names, as an input of the stage."""
    from polyalign.datasets.formats.table import listed_files

    pairs = recipe.pairs
    if pairs.source == "generate" or pairs.location is None:
        return {}
    files, beside = listed_files(pairs.source, pairs.location), Path(pairs.location).parent
    hashes = "\n".join(f"{os.path.relpath(file, beside)} {fingerprint(str(file))}" for file in files)
    return {"listed": sha256_of(hashes.encode())} if files else {}


def generate(recipe: ImageRecipe, run: RunFolder) -> None:
    """Prompts to pairs, or preferences in any format to pairs: writes ``pairs/``."""
    refuse_several_processes("generate", run)
    refuse_early(recipe)
    pairs = recipe.pairs
    inputs: dict[str, Any] = {"pairs": pairs.inputs(), "seed": recipe.seed, "source": fingerprint(pairs.location)}
    inputs |= _judge_files(pairs.judges) | _listed(recipe)
    if pairs.sampled:
        inputs |= model_files(recipe)
        inputs |= {"model": _base_of(recipe), "sampler": recipe.sampler, "resolution": recipe.prepare.resolution}
    with run.stage("generate", inputs, products=("pairs",)) as stage:
        if not stage.todo:
            return
        from polyalign.datasets.formats.own_samples import Drawing
        from polyalign.evaluation.judges import panel
        from polyalign.modalities.image.pairs import GenerationSettings, generate_pairs, read_pairs

        sampler = recipe.sampler.model_dump(mode="json")
        if not pairs.sampled:
            read_pairs(pairs, run / "pairs")
            return
        adapter, model = open_model(recipe, run)
        if pairs.source != "generate":
            drawing = Drawing(partial(adapter.sample, model), model.identity, recipe.seed, sampler)
            read_pairs(pairs, run / "pairs", drawing)
            return
        assert pairs.prompts is not None
        generate_pairs(
            adapter,
            model,
            conditions_of(pairs.prompts, recipe.seed),
            panel(pairs.judges),
            settings=GenerationSettings(
                samples_per_prompt=pairs.samples_per_prompt,
                prompts_per_shard=pairs.prompts_per_shard,
                sampler=sampler,
                **pairs.pairing.model_dump(),
            ),
            folder=run / "pairs",
            seed=recipe.seed,
        )


# --- training ----------------------------------------------------------------------------------------------------------------


def train(recipe: ImageRecipe, run: RunFolder) -> None:
    """Pairs to an adapter, for the recipe's objective and for every arm: writes ``adapter/`` and ``arms/NAME/adapter/``."""
    train_arm(recipe, run, "train", recipe.objective, "")
    for name, objective in recipe.arms.items():
        train_arm(recipe, run, f"train {name}", objective, f"arms/{name}/")


# --- evaluation --------------------------------------------------------------------------------------------------------------


def evaluate(recipe: ImageRecipe, run: RunFolder) -> None:
    """Base and aligned on the same prompts and seeds: writes ``samples/`` and ``evaluation.json``."""
    refuse_several_processes("evaluate", run)
    prompts = recipe.evaluate.prompts
    inputs = {
        **model_files(recipe),
        "sampler": recipe.sampler,
        "evaluate": recipe.evaluate,
        "seed": recipe.seed,
        "prompts": fingerprint(prompts.file if prompts else None),
        **_judge_files(recipe.evaluate.judges),
    }
    after = ("generate", "train", *(f"train {name}" for name in recipe.arms))
    with run.stage("evaluate", inputs, after=after, products=("samples", "evaluation.json")) as stage:
        if stage.todo:
            _evaluate(recipe, run)


def _evaluate(recipe: ImageRecipe, run: RunFolder) -> None:
    from polyalign.evaluation.judges import panel
    from polyalign.evaluation.paired import evaluate_paired

    conditions = evaluation_conditions(recipe, PairStore(run / "pairs"))
    seeds = [seed_of(recipe.seed, "evaluate", index) for index in range(len(conditions))]
    base, base_files = sampled(recipe, run, "base", None, conditions, seeds)
    aligned, aligned_files = sampled(recipe, run, "aligned", run / "adapter", conditions, seeds)
    arms = {
        name: sampled(recipe, run, f"arms/{name}", run / "arms" / name / "adapter", conditions, seeds)[0]
        for name in recipe.arms
    }
    report = evaluate_paired(
        base,
        aligned,
        conditions,
        seeds,
        [panel([config]) for config in recipe.evaluate.judges],
        seed=recipe.seed,
        base_images=base_files,
        aligned_images=aligned_files,
        arms=arms,
    )
    atomic_write(run / "evaluation.json", json.dumps(report, indent=1))


def sampled(
    recipe: ImageRecipe, run: RunFolder, name: str, trained: Path | None, conditions: Sequence[Condition], seeds: Sequence[int]
) -> tuple[list[Image.Image], list[str]]:
    """Pictures of one model, written to ``samples/NAME`` batch by batch; those already there are read again, not made again."""
    from PIL import Image

    from polyalign.datasets.pictures import encode_png

    adapter, model = open_trained(recipe, run, trained)
    files = [f"samples/{name}/{index:05d}.png" for index in range(len(conditions))]
    (run / "samples" / name).mkdir(parents=True, exist_ok=True)
    size = recipe.sampler.batch_size
    with ProgressLine(f"sampling, {name}", total=len(files)) as line:
        for part in (slice(start, start + size) for start in range(0, len(files), size)):
            if not all((run / file).exists() for file in files[part]):
                for file, picture in zip(files[part], adapter.sample(model, conditions[part], seeds[part]), strict=True):
                    atomic_write(run / file, encode_png(picture))
            line.advance(count=len(files[part]))
    return [Image.open(run / file).convert("RGB") for file in files], files


# --- report and export -------------------------------------------------------------------------------------------------------


def report(recipe: ImageRecipe, run: RunFolder) -> None:
    """Whatever the run folder holds, in one page: writes ``report.html`` and ``report.json``, and says the verdict."""
    from polyalign.evaluation.report import write_report

    page = write_report(run.path)
    verdict = json.loads((run / "report.json").read_text(encoding="utf-8"))["verdict"]
    print(f"{verdict['state']}: {verdict['sentence']}\nreport: {page}")


def export(recipe: ImageRecipe, run: RunFolder, destination: Path) -> None:
    """The trained weights, where the user wants them: what diffusers opens directly.

    Raises:
        UserError: there are none, they are unfinished or of another recipe; something is at the destination; a full disk.
    """
    refuse_unless_trained(recipe, run)
    source = run / "adapter"
    if destination.exists():
        raise UserError(f"{destination}: exists already; nothing was written. Give another folder, or move this one away")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        with disk_full_explained(f"the export {destination}"):
            _copy(source, partial / "export")
        (partial / "export").rename(destination)
    finally:
        shutil.rmtree(partial)


def refuse_unless_trained(recipe: ImageRecipe, run: RunFolder) -> None:
    """Raises UserError unless the training of this recipe is finished: ``adapter/`` may be of other settings, or half there."""
    plan = RunFolder(run.path, planning=True)
    train_arm(recipe, plan, "train", recipe.objective, "")
    stage, source = plan.planned["train"], run / "adapter"
    reasons = "; ".join(stage.reasons)
    if stage.status == "todo":
        raise UserError(f"{source}: nothing was trained yet. Run 'polyalign train CONFIG' first")
    if stage.status == "started":
        raise UserError(f"{source}: the training is not complete ({reasons}). Run 'polyalign train CONFIG' to finish it")
    if stage.status == "stale":
        raise UserError(
            f"{source}: was not trained with this recipe ({reasons}). Put the old values back (config.yaml in the run folder "
            "is the last recipe that was run), or run 'polyalign align CONFIG' to train anew"
        )


def _copy(source: Path, destination: Path) -> None:
    """A folder's files. ``shutil.copytree`` would hide a full disk in an error of its own."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target = destination / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as given, open(target, "wb") as copied:
            shutil.copyfileobj(given, copied)
