"""The trainings of a LiDAR run: which network, which algorithm, which rows, and what comes out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.adapter import Row
from polyalign.core.errors import UserError
from polyalign.core.files import sha256_of
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.modalities import fingerprints
from polyalign.modalities.lidar.config import (
    DiffusionDPO,
    Distillation,
    DistillationDPO,
    LidarRecipe,
    LiDiff,
)
from polyalign.modalities.lidar.data import SCENES, Scans, TrainingRows, data_files, opened, splits_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from polyalign.core.algorithm import Algorithm, Rows
    from polyalign.core.recipe import OptimizerConfig
    from polyalign.modalities.lidar.adapter import LidarAdapter
    from polyalign.modalities.lidar.algorithm import DistillationSettings
    from polyalign.modalities.lidar.checkpoints import CompletionNetworks
    from polyalign.modalities.lidar.completion import CompletionSettings
    from polyalign.modalities.lidar.preference import DistanceMix

TINY_BASE = Path(__file__).parent / "tiny_base" / "completion.safetensors"
WEIGHTS, SETTINGS = "completion.safetensors", "completion.json"
OUTPUTS = "cloud"


# --- what a recipe means -----------------------------------------------------------------------------------------------------


def base_path(recipe: LidarRecipe) -> Path | None:
    """The base's file; None for `new`."""
    base = recipe.model.base
    return None if base == "new" else TINY_BASE if base == "tiny" else Path(base).expanduser()


def base_identity(recipe: LidarRecipe) -> str:
    """Name and hash of the base.

    Raises:
        UserError: there is no such file.
    """
    path = base_path(recipe)
    if path is None:
        return f"new@width-{recipe.model.width:g}-seed-{recipe.seed}"
    if not path.is_file():
        raise UserError(f"model.base: there is no checkpoint {path}")
    return f"{'tiny' if recipe.model.base == 'tiny' else path.name}@sha256:{sha256_of(path)[:16]}"


def device_of(recipe: LidarRecipe) -> torch.device:
    """The device of this process."""
    import torch

    if recipe.model.device != "auto":
        return torch.device(recipe.model.device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def open_networks(recipe: LidarRecipe, trained: Path | None = None) -> CompletionNetworks:
    """The base's networks (None), or those of an adapter folder, on the recipe's device, in evaluation mode.

    Raises:
        UserError: no such checkpoint, or one that does not fit.
    """
    import torch

    from polyalign.modalities.lidar.checkpoints import CompletionNetworks, open_completion
    from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff, scaled

    path = base_path(recipe) if trained is None else trained / WEIGHTS
    if path is not None:
        found = open_completion(path, recipe.model.layout if trained is None else None)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            channels = scaled(recipe.model.width)
            found = CompletionNetworks(MinkUNetDiff(channels).eval(), MinkGlobalEnc(channels).eval(), "new", ())
    device = device_of(recipe)
    found.denoiser.to(device)
    found.encoder.to(device)
    return found


def completion_settings(recipe: LidarRecipe, steps: int, guidance: float) -> CompletionSettings:
    """How scans are completed in so many steps."""
    from polyalign.modalities.lidar.completion import CompletionSettings
    from polyalign.modalities.lidar.diffusion import SolverSettings

    sampler = recipe.sampler
    return CompletionSettings(
        SolverSettings(steps, sampler.start, sampler.stochastic, sampler.final),
        sampler.formulation,
        guidance,
        sampler.copies,
        sampler.noise_scale,
        sampler.voxel,
        sampler.coarser,
    )


def distance_mix(recipe: LidarRecipe) -> DistanceMix:
    """What decides a pair, as far out as the evaluation measures."""
    from polyalign.modalities.lidar.preference import MAX_RANGE, DistanceMix

    said = {"weights" if key == "metrics" else key: value for key, value in recipe.preference if key != "margin"}
    return DistanceMix(**said, max_range=max(MAX_RANGE, recipe.data.max_range))


def distillation_settings(recipe: LidarRecipe, objective: Distillation) -> DistillationSettings:
    """Raises UserError for settings that do not go together."""
    from polyalign.modalities.lidar.algorithm import DistillationSettings

    assistants = objective.assistants
    of_pairs = objective.model_dump(include={"pairs", "noise_ratio", "loser_weight"})
    return DistillationSettings(
        preference=isinstance(objective, DistillationDPO),
        completion=completion_settings(recipe, 1, objective.guidance),
        courses=objective.courses,
        mix=distance_mix(recipe),
        margin=recipe.preference.margin,
        teacher_guidance=objective.teacher_guidance,
        assistant_steps=assistants.steps,
        assistant_lead=assistants.lead,
        assistant_rank=assistants.rank if assistants.train == "low_rank" else None,
        diverged=objective.diverged,
        **of_pairs,
    )


def open_adapter(recipe: LidarRecipe, objective: DiffusionDPO) -> LidarAdapter:
    """The core's view of the base, for Diffusion-DPO and its pairs."""
    from polyalign.core.likelihood.denoising import TimestepSampling
    from polyalign.modalities.lidar.adapter import LidarAdapter, LidarModelSettings

    model = recipe.model
    settings = LidarModelSettings(
        base=str(base_path(recipe)),
        layout=model.layout,
        device=str(device_of(recipe)),
        train=model.train,
        rank=model.rank,
        completion=completion_settings(recipe, objective.steps, recipe.sampler.guidance),
        timesteps_per_pair=objective.timesteps_per_pair,
        timesteps=TimestepSampling(low=objective.low, high=objective.high),
        sample_batch=recipe.sampler.batch_size,
        seed=recipe.seed,
    )
    return LidarAdapter(settings)


def student_guidance(recipe: LidarRecipe, objective: Any) -> float:
    """With which guidance what ``objective`` trained completes."""
    own = recipe.sampler.student_guidance
    return own if own is not None and isinstance(objective, Distillation) else recipe.sampler.guidance


def completion_use(recipe: LidarRecipe, objective: Any) -> str:
    """The content of SETTINGS: how what ``objective`` trained completes, for :mod:`polyalign.modalities.lidar.complete`."""
    steps = max(objective.courses if isinstance(objective, Distillation) else recipe.evaluate.steps)
    sampler = recipe.sampler.model_dump(mode="json", exclude={"student_guidance"})
    use = {
        "sampler": sampler | {"guidance": student_guidance(recipe, objective)},
        "data": {"scan_points": recipe.data.scan_points, "max_range": recipe.data.max_range},
        "steps": steps,
    }
    return json.dumps(use, indent=1) + "\n"


class PairRows:
    """The trainer's view of a store of pairs: a pair's prompt is its scan's name, and here it becomes the scan."""

    def __init__(self, store: PairStore, given: Scans):
        self._store, self._given = store, given
        self._places = {name: place for place, name in enumerate(given.names)}

    def __len__(self) -> int:
        return len(self._store)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        return [self._with_scan(row) for row in self._store.rows(indices)]

    def _with_scan(self, row: Mapping[str, Any]) -> Row:
        scan = self._given.scan(self._places[row["condition"]["prompt"]])
        return {"pair_id": row["pair_id"], "condition": {"scan": scan}, "chosen": row["chosen"], "rejected": row["rejected"]}


# --- stages ------------------------------------------------------------------------------------------------------------------


def stage_name(verb: str, place: str) -> str:
    """``train``, or ``train NAME`` for the arm in ``arms/NAME/``."""
    return f"{verb} {place.split('/')[1]}" if place else verb


def model_files(recipe: LidarRecipe) -> dict[str, Any]:
    """The hash of the base's file, as an input of stages."""
    path = base_path(recipe)
    return {} if path is None else fingerprints.model_files({"base": str(path)})


def train_arm(recipe: LidarRecipe, run: RunFolder, place: str, objective: Any) -> None:
    """One objective: writes ``PLACEadapter/``, ``PLACEmetrics.jsonl`` and ``PLACEcheckpoints/``."""
    from polyalign.core.trainer import HARMLESS

    after = ["generate", *([stage_name("generate", place)] if place and isinstance(objective, DiffusionDPO) else [])]
    inputs = {
        "model": recipe.model.model_dump(mode="json", exclude={"device"}),
        **model_files(recipe),
        "data": recipe.data.model_dump(mode="json", exclude={"folder", "maps", "labels"}),
        **data_files(recipe),
        "sampler": _shape_of(recipe),
        "preference": recipe.preference,
        "objective": objective,
        "train": recipe.train.model_dump(mode="json", exclude=HARMLESS),
        "seed": recipe.seed,
    }
    scratch = (f"{place}checkpoints", f"{place}metrics.jsonl")
    with run.stage(stage_name("train", place), inputs, after=after, products=(f"{place}adapter",), scratch=scratch) as stage:
        if stage.todo:
            _Training(recipe, run, place, objective).run()


def _shape_of(recipe: LidarRecipe) -> dict[str, Any]:
    """What of the sampler a training depends on."""
    return recipe.sampler.model_dump(mode="json", exclude={"guidance", "student_guidance", "batch_size", "postprocess"})


@dataclass(frozen=True)
class _Parts:
    """One training: its algorithm, rows and learning rates, the network that comes out, and what it was a change of."""

    algorithm: Algorithm
    rows: Rows
    optimizers: Mapping[str, OptimizerConfig]
    network: nn.Module
    base: nn.Module
    encoder: nn.Module


@dataclass(frozen=True)
class _Training:
    recipe: LidarRecipe
    run_folder: RunFolder
    place: str
    objective: Any

    def run(self) -> None:
        """Train, or go on, and write the adapter's folder."""
        import torch

        from polyalign.core.trainer import Trainer

        recipe, folder = self.recipe, self.run_folder.path / self.place
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        identity = base_identity(recipe)
        self.run_folder.write_environment({"base": identity})
        parts = self._parts(identity)
        made_with = {"model": identity, "objective": self.objective.model_dump(mode="json"), "data": data_files(recipe)}
        trainer = Trainer(
            parts.algorithm,
            parts.rows,
            recipe.train,
            folder,
            seed=recipe.seed,
            identity=made_with,
            optimizers=parts.optimizers,
            tracking=recipe.tracking,
        )
        _refuse_sharded(trainer.accelerator)
        trainer.run()
        if trainer.accelerator.is_main_process:
            self._write(parts, folder / "adapter", identity, len(parts.rows))
        trainer.accelerator.wait_for_everyone()

    def _parts(self, identity: str) -> _Parts:
        scans = opened(self.recipe, self.run_folder / SCENES, splits_of(self.recipe)[0])
        if isinstance(self.objective, DiffusionDPO):
            return self._preference(self.objective, scans, identity)
        versions, points = self.recipe.data.versions, self.recipe.data.scan_points * self.recipe.sampler.copies
        rows = TrainingRows(scans, points, versions=versions, seed=self.recipe.seed)
        found = open_networks(self.recipe)
        if isinstance(self.objective, LiDiff):
            return self._teacher(self.objective, rows, found)
        return self._distillation(self.objective, rows, found)

    def _distillation(self, objective: Distillation, rows: TrainingRows, found: CompletionNetworks) -> _Parts:
        from polyalign.modalities.lidar.algorithm import STUDENT, DistillationPreference, distillation_optimizers
        from polyalign.modalities.lidar.assistants import low_rank_copy

        recipe, student = self.recipe, None
        settings = distillation_settings(recipe, objective)
        if recipe.model.train == "lora":
            student = low_rank_copy(found.denoiser.requires_grad_(False), recipe.model.rank, seed=recipe.seed)
        algorithm = DistillationPreference(found.denoiser, found.encoder, settings, student=student, seed=recipe.seed)
        rates = distillation_optimizers(recipe.train.optimizer, objective.assistants.learning_rate_ratio)
        return _Parts(algorithm, rows, rates, algorithm.networks[STUDENT], found.denoiser, found.encoder)

    def _teacher(self, objective: LiDiff, rows: TrainingRows, found: CompletionNetworks) -> _Parts:
        from polyalign.modalities.lidar.teacher import TeacherTraining

        algorithm = TeacherTraining(
            found.denoiser,
            found.encoder,
            completion_settings(self.recipe, 1, 1.0),
            regularisation=objective.regularisation,
            unconditional=objective.unconditional,
            frozen_statistics=objective.statistics == "frozen",
            seed=self.recipe.seed,
        )
        return _Parts(algorithm, rows, {}, found.denoiser, found.denoiser, found.encoder)

    def _preference(self, objective: DiffusionDPO, scans: Scans, identity: str) -> _Parts:
        from polyalign.core.algorithm import DirectPreference
        from polyalign.core.objectives.beta import AutoBeta, Beta
        from polyalign.core.objectives.table import build
        from polyalign.core.references import build_seat

        adapter, store = open_adapter(self.recipe, objective), pairs_of(self.run_folder, self.place)
        model = adapter.trainable(adapter.load())
        spec, reference = objective.preference, self.recipe.train.reference
        known = {"base": identity, "pairs": store.content_hash(), "seed": self.recipe.seed}
        known |= {"objective": objective.model_dump(mode="json"), "sampler": _shape_of(self.recipe)}
        seat = build_seat(
            reference,
            model.network,
            folder=self.run_folder / "cache" / "reference",
            identity=json.dumps(known, sort_keys=True),
        )
        algorithm = DirectPreference(
            adapter,
            model,
            build(spec),
            Beta.of(spec.beta) if spec.beta.auto is None else AutoBeta(spec.beta),
            {"reference": seat},
            draw_bank=reference.draws_per_pair if reference.seat == "cached" else None,
            seed=self.recipe.seed,
        )
        return _Parts(algorithm, PairRows(store, scans), {}, model.network, model.parts["base"], model.parts["encoder"])

    def _write(self, parts: _Parts, folder: Path, identity: str, rows: int) -> None:
        """The networks in LiDiff's names, how they complete, and the card."""
        from polyalign.modalities.exporting import written_beside
        from polyalign.modalities.lidar.assistants import LowRankChange, merged
        from polyalign.modalities.lidar.checkpoints import save_completion

        network = parts.network
        if any(isinstance(module, LowRankChange) for module in network.modules()):
            network = merged(network, parts.base)
        with written_beside(folder) as partial:
            save_completion(partial / WEIGHTS, network, parts.encoder)
            (partial / SETTINGS).write_text(completion_use(self.recipe, self.objective), encoding="utf-8")
            (partial / "README.md").write_text(self._card(identity, rows), encoding="utf-8")

    def _card(self, identity: str, rows: int) -> str:
        from polyalign.modalities.exporting import model_card

        code = f'from pathlib import Path\n\nfrom polyalign.modalities.lidar.checkpoints import open_completion\n\nnetworks = open_completion(Path("THIS_FOLDER/{WEIGHTS}"))'  # noqa: E501
        told = {
            "base": identity,
            "objective": self.objective.model_dump(mode="json"),
            "train": self.recipe.train.model_dump(mode="json"),
            "rows": rows,
            "seed": self.recipe.seed,
        }
        tags = ["lidar", "point-cloud", "scene-completion"]
        return model_card(identity, library="polyalign", tags=tags, is_lora=False, code=code, card=told)


def pairs_of(run: RunFolder, place: str) -> PairStore:
    """The pairs of the objective at ``place``."""
    return PairStore(run / f"{place}pairs", OUTPUTS)


def _refuse_sharded(accelerator: Any) -> None:
    """Raises UserError where weights are cut up over processes."""
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise UserError(
            f"networks that complete scans are small, and {accelerator.distributed_type.value} would cut them up; take "
            "configs/accelerate/ddp.yaml, or torchrun without a configuration"
        )
