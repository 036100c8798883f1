"""The stages of a LiDAR run: scans, training, evaluation, report. The command line calls these, one function a verb."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.run import RunFolder
from polyalign.modalities import verbs
from polyalign.modalities.arms import refuse_unfinished
from polyalign.modalities.exporting import written_beside
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.lidar import data
from polyalign.modalities.lidar.config import DiffusionDPO, Distillation, LidarRecipe, LiDiff
from polyalign.modalities.lidar.training import (
    OUTPUTS,
    SETTINGS,
    WEIGHTS,
    base_identity,
    completion_use,
    distance_mix,
    model_files,
    open_adapter,
    stage_name,
    train_arm,
)

if TYPE_CHECKING:
    import numpy as np

    from polyalign.core.adapter import Model
    from polyalign.modalities.lidar.adapter import LidarAdapter
    from polyalign.modalities.lidar.preference import DistanceMix

__all__ = ["SCHEMA", "STAGES", "evaluate", "export", "generate", "report", "train"]

SCHEMA = LidarRecipe
STAGES = ("generate", "train", "evaluate", "report")
PUBLISHED = "completion.ckpt"
SCANS_PER_SHARD = 8


def refuse_early(recipe: LidarRecipe) -> None:
    """What later stages would refuse, refused before hours have gone into earlier ones.

    Raises:
        UserError: no such base; data or settings that do not go together; an objective that cannot be served.
    """
    base_identity(recipe)
    data.splits_of(recipe)
    fingerprint(recipe.evaluate.refinement)
    if recipe.train.stop is not None:
        raise UserError("train.stop watches the likeliest next tokens of a language model, and a LiDAR recipe has none")
    if max(recipe.evaluate.steps) > recipe.sampler.start:
        raise UserError(f"evaluate.steps: {max(recipe.evaluate.steps)} steps do not fit below level {recipe.sampler.start}")
    for place, objective in recipe.objectives().items():
        key = f"arms.{place.split('/')[1]}" if place else "objective"
        _refuse(recipe, objective, key)


def _refuse(recipe: LidarRecipe, objective: Any, key: str) -> None:
    model, train = recipe.model, recipe.train
    cut = train.micro_batch_size < train.batch_size
    if isinstance(objective, LiDiff):
        if model.train == "lora":
            raise UserError(f"{key}: lidiff trains all weights of denoiser and encoder; set model.train to full")
        if cut and (objective.statistics == "moving" or objective.regularisation):
            raise UserError(
                f"{key}: lidiff couples the scans of a batch, by batch normalisation and its regularisation: set "
                "train.micro_batch_size to train.batch_size"
            )
        return
    if model.base == "new":
        raise UserError(f"{key}: {objective.name} begins from a trained base, and model.base is new. Train one with lidiff")
    if isinstance(objective, Distillation) and recipe.sampler.coarser:
        raise UserError(f"{key}: distillation works with one voxel size; leave out sampler.coarser")
    if isinstance(objective, Distillation) and max(objective.courses) > recipe.sampler.start:
        raise UserError(f"{key}: courses of {max(objective.courses)} steps do not fit below level {recipe.sampler.start}")
    if isinstance(objective, DiffusionDPO):
        _refuse_preference(recipe, objective, key)


def _refuse_preference(recipe: LidarRecipe, objective: DiffusionDPO, key: str) -> None:
    from polyalign.core.objectives.serves import Offer, Plan, refuse_unless_served
    from polyalign.core.objectives.table import build

    seat, train = recipe.train.reference.seat, recipe.train
    if seat in ("adapter_off", "adapter"):
        raise UserError(
            f"train.reference.seat: {seat} needs a LoRA of peft, which knows no sparse convolution. Set it to frozen (a second "
            "copy; low-rank changes share the base's weights), ema, cached or none"
        )
    offer = Offer("a LiDAR recipe", "timestep", frozenset({"value"}), frozenset({"pairs"}))
    plan = Plan(seat, cut=train.micro_batch_size < train.batch_size)
    refuse_unless_served(build(objective.preference), offer, plan, key=f"{key}.preference")


# --- scans and pairs ---------------------------------------------------------------------------------------------------------


def generate(recipe: LidarRecipe, run: RunFolder) -> None:
    """Scans and ground truth, and pairs for diffusion_dpo: writes ``scenes/`` and ``pairs/``."""
    verbs.refuse_several_processes("generate", run, modality="lidar")
    refuse_early(recipe)
    places = [place for place, one in recipe.objectives().items() if isinstance(one, DiffusionDPO)]
    inputs = {
        "data": recipe.data.model_dump(mode="json", exclude={"folder", "maps", "labels", "versions"}),
        **data.data_files(recipe),
        "held_out": recipe.evaluate.model_dump(mode="json", include={"streets", "sequences", "every"}),
        "copies": recipe.sampler.copies,
        "seed": recipe.seed,
    }
    if "" in places:
        inputs |= _pair_inputs(recipe, recipe.objective)
    products = (data.SCENES, "pairs") if "" in places else (data.SCENES,)
    with run.stage("generate", inputs, products=products) as stage:
        if stage.todo:
            data.make(recipe, run / data.SCENES)
            if "" in places:
                _make_pairs(recipe, run, "", recipe.objective)
    for place in filter(None, places):
        objective, name = recipe.objectives()[place], stage_name("generate", place)
        arm = {**_pair_inputs(recipe, objective), "seed": recipe.seed}
        with run.stage(name, arm, after=("generate",), products=(f"{place}pairs",)) as stage:
            if stage.todo:
                _make_pairs(recipe, run, place, objective)


def _pair_inputs(recipe: LidarRecipe, objective: Any) -> dict[str, Any]:
    """What pairs depend on besides scans."""
    asked = objective.model_dump(mode="json", include={"samples_per_scan", "steps", "pairing"})
    base = recipe.model.model_dump(mode="json", include={"base", "layout"})
    sampler = recipe.sampler.model_dump(mode="json", exclude={"student_guidance", "postprocess"})
    return {"pairs": asked, "model": base, **model_files(recipe), "sampler": sampler, "preference": recipe.preference}


@dataclass(frozen=True)
class _NamedScans:
    """The adapter, for conditions that name their scan: {"prompt": name}."""

    adapter: LidarAdapter
    given: data.Scans
    places: Mapping[str, int]

    def sample(self, model: Model, conditions: Sequence[Any], seeds: Sequence[int]) -> list[np.ndarray]:
        scans = [{"scan": self.given.scan(self.places[one["prompt"]])} for one in conditions]
        return self.adapter.sample(model, scans, seeds)


@dataclass(frozen=True)
class _NearestToTruth:
    """The judge: minus the distance to the ground truth of the scan that a condition names."""

    mix: DistanceMix
    given: data.Scans
    places: Mapping[str, int]
    points: int
    seed: int
    name: str = "distance"

    @property
    def version(self) -> str:
        return json.dumps({"weights": dict(self.mix.weights)}, sort_keys=True)

    def score(self, conditions: Sequence[Any], outputs: Sequence[Any]) -> list[float]:
        return [-self._distance(self.places[one["prompt"]], made) for one, made in zip(conditions, outputs, strict=True)]

    def _distance(self, place: int, made: np.ndarray) -> float:
        truth = self.given.sample(place, self.points, seed=self.seed, version=0)[1]
        return self.mix.distance(made.astype("float64"), truth.astype("float64"))


def _make_pairs(recipe: LidarRecipe, run: RunFolder, place: str, objective: Any) -> None:
    from polyalign.modalities.generation import GenerationSettings, generate_pairs

    adapter = open_adapter(recipe, objective)
    model, scans = adapter.load(), data.opened(recipe, run / data.SCENES, data.splits_of(recipe)[0])
    places = {name: number for number, name in enumerate(scans.names)}
    points = recipe.data.scan_points * recipe.sampler.copies
    pairing = objective.pairing
    settings = GenerationSettings(
        samples_per_prompt=objective.samples_per_scan,
        prompts_per_shard=SCANS_PER_SHARD,
        mode=pairing.mode,
        margin=max(pairing.margin, recipe.preference.margin),
        max_pairs_per_prompt=pairing.max_pairs_per_prompt,
        sampler=recipe.sampler.model_dump(mode="json") | {"steps": objective.steps},
    )
    generate_pairs(
        _NamedScans(adapter, scans, places),
        model,
        [{"prompt": name} for name in scans.names],
        _NearestToTruth(distance_mix(recipe), scans, places, points, recipe.seed),
        settings=settings,
        folder=run / f"{place}pairs",
        seed=recipe.seed,
        outputs=OUTPUTS,
    )


# --- training, evaluation, report, export ------------------------------------------------------------------------------------


def train(recipe: LidarRecipe, run: RunFolder) -> None:
    """The recipe's objective and every arm: writes ``adapter/`` and ``arms/NAME/adapter/``."""
    for place, objective in recipe.objectives().items():
        train_arm(recipe, run, place, objective)


def evaluate(recipe: LidarRecipe, run: RunFolder) -> None:
    """Teacher, student and arms on held-out scans: writes ``samples/`` and ``evaluation.json``."""
    verbs.refuse_several_processes("evaluate", run, modality="lidar")
    inputs = {
        "model": recipe.model.model_dump(mode="json", include={"base", "layout", "width"}),
        **model_files(recipe),
        "data": recipe.data.model_dump(mode="json", include={"source", "scan_points", "max_range"}),
        **data.data_files(recipe),
        "sampler": recipe.sampler,
        "evaluate": recipe.evaluate,
        "refinement": fingerprint(recipe.evaluate.refinement),
        "seed": recipe.seed,
    }
    after = ("generate", *(stage_name("train", place) for place in recipe.objectives()))
    with run.stage("evaluate", inputs, after=after, products=("samples", "evaluation.json")) as stage:
        if stage.todo:
            from polyalign.modalities.lidar.evaluation import evaluate as measure

            atomic_write(run / "evaluation.json", json.dumps(measure(recipe, run.path), indent=1) + "\n")


def report(recipe: LidarRecipe, run: RunFolder) -> None:
    """Whatever the run folder holds, in one page: writes ``report.html`` and ``report.json``, and says the verdict."""
    verbs.report(run)


def export(recipe: LidarRecipe, run: RunFolder, destination: Path) -> None:
    """The trained weights, where the user wants them: ``completion.safetensors`` in LiDiff's names, and ``completion.ckpt`` as
    the published projects write and read them. How they complete is said as the recipe says it now: guidance, evaluated steps
    and the like are no matter of the training, and may have changed since.

    Raises:
        UserError: there are none, they are unfinished or of another recipe; something is at the destination; a full disk.
    """
    plan = RunFolder(run.path, planning=True)
    train_arm(recipe, plan, "", recipe.objective)
    refuse_unfinished(plan.planned["train"], run / "adapter")

    def say_how(folder: Path) -> None:
        atomic_write(folder / SETTINGS, completion_use(recipe, recipe.objective))

    verbs.copied_whole(run / "adapter", destination, finish=say_how)
    layouts = {"distillation_dpo": "distilled", "score_distillation": "distilled", "diffusion_dpo": "diffusion_dpo"}
    with written_beside(destination) as partial:
        _write_published(run / "adapter" / WEIGHTS, partial / PUBLISHED, layouts.get(recipe.objective.name, "lidiff"))


def _write_published(weights: Path, path: Path, layout: str) -> None:
    """The tensors as a project's own code names them, under ``state_dict``."""
    import torch

    from polyalign.modalities.lidar.checkpoints import LAYOUTS, read_tensors

    ours, theirs = LAYOUTS["lidiff"], LAYOUTS[layout]
    renamed = {}
    for name, tensor in read_tensors(weights).items():
        old, new = (ours.denoiser, theirs.denoiser) if name.startswith(ours.denoiser) else (ours.encoder, theirs.encoder)
        renamed[new + name.removeprefix(old)] = tensor
    content = io.BytesIO()
    torch.save({"state_dict": renamed}, content)
    path.write_bytes(content.getvalue())
