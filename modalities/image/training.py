"""The training of an image run: the model that a recipe describes, what is trained on and what is kept for evaluation, and the
training for one objective."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import sha256_of
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.prompts import load_prompts
from polyalign.modalities.image.config import ImageRecipe, PromptsConfig

if TYPE_CHECKING:
    from polyalign.core.adapter import Model
    from polyalign.core.algorithm import DirectPreference
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.core.trainer import Trainer
    from polyalign.modalities.image.adapter import ImageAdapter
    from polyalign.modalities.image.settings import ImageModelSettings

MODEL_FILES = frozenset({".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".json", ".txt", ".model"})
"""Endings of the files that a model is read from: weights, configurations, vocabularies."""

TINY_BASE = Path(__file__).parent / "tiny_base"
SHOWN_OVERLAPS = 5

Condition = Mapping[str, Any]


# --- the recipe, in the terms of the parts -----------------------------------------------------------------------------------


def settings_of(recipe: ImageRecipe, run: RunFolder, objective: ObjectiveSpec | None = None) -> ImageModelSettings:
    """The adapter's settings: the one place where recipe keys are mapped onto them."""
    from polyalign.core.likelihood.denoising import TimestepSampling
    from polyalign.core.objectives.table import build
    from polyalign.modalities.image.settings import ImageModelSettings

    model, prepare, sampler = recipe.model, recipe.prepare, recipe.sampler
    return ImageModelSettings(
        **model.model_dump(exclude={"lora"}),
        **model.lora.model_dump(),
        **prepare.model_dump(exclude={"cache"}),
        cache_folder=run / "cache" if prepare.cache else None,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        weighting=recipe.likelihood.weighting,
        gamma=recipe.likelihood.gamma,
        timesteps_per_pair=recipe.likelihood.timesteps_per_pair,
        timesteps=TimestepSampling(**recipe.likelihood.timesteps.model_dump()),
        keep_residual="output_gradient" in build(objective or recipe.objective).needs,
        guidance=sampler.guidance,
        sampling_steps=sampler.steps,
        sampler=sampler.scheduler,
        negative_prompt=sampler.negative_prompt,
        sample_batch=sampler.batch_size,
        vae_batch=sampler.vae_batch_size,
        seed=recipe.seed,
    )


def open_model(recipe: ImageRecipe, run: RunFolder, objective: ObjectiveSpec | None = None) -> tuple[ImageAdapter, Model]:
    import torch

    from polyalign.modalities.image.adapter import ImageAdapter

    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    adapter = ImageAdapter(settings_of(recipe, run, objective))
    return adapter, adapter.load()


def open_trained(recipe: ImageRecipe, run: RunFolder, trained: Path | None) -> tuple[ImageAdapter, Model]:
    """The base (None), or what an export folder holds: a LoRA on the base, or a whole model."""
    if trained is not None and recipe.model.train == "full":
        # what says where in a repository, or how a single file is read, is of the base and not of the folder that was written
        own = {"base": str(trained), "variant": None, "revision": None, "single_file_config": None}
        return open_model(recipe.model_copy(update={"model": recipe.model.model_copy(update=own)}), run)
    adapter, model = open_model(recipe, run)
    return adapter, model if trained is None else adapter.load_lora(model, trained)


def conditions_of(prompts: PromptsConfig, seed: int) -> list[dict[str, Any]]:
    """The conditions that a recipe asks for."""
    if prompts.file is not None:
        return load_prompts(prompts.file, limit=prompts.count)
    from polyalign.datasets.worlds import shapes

    assert prompts.count is not None  # the schema asks for it with a world
    return shapes.prompts(prompts.split, prompts.count, seed)


def fingerprint(path: str | None, *, endings: frozenset[str] | None = None) -> str | None:
    """Content hash of a file or of all files in a folder (those with certain ``endings``); None stays None."""
    if path is None:
        return None
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or folder (relative to the working directory {Path.cwd().name}/)")
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    kept = [file for file in files if file == place or endings is None or file.suffix in endings]
    return sha256_of("\n".join(f"{file.relative_to(place)} {_content(file)}" for file in kept).encode())


def _content(file: Path) -> str:
    status = file.stat()
    return _content_once(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _content_once(file: Path, size: int, changed_ns: int) -> str:
    """A file's hash, computed once a process as long as its size and time stay: several stages ask for gigabytes of weights."""
    return sha256_of(file)


def model_files(recipe: ImageRecipe) -> dict[str, Any]:
    """Hashes of the files that the model is read from, as an input of stages: another base under the same name is another base.
    Empty for a base on a model hub, which a revision pins."""
    model = recipe.model
    places = {"base": str(TINY_BASE) if model.base == "tiny" else model.base, "single_file_config": model.single_file_config}
    here = {name: Path(place).expanduser() for name, place in places.items() if place is not None}
    hashes = {name: fingerprint(str(place), endings=MODEL_FILES) for name, place in here.items() if place.exists()}
    return {"model_files": hashes} if hashes else {}


# --- what is trained on, and what is kept for evaluation ----------------------------------------------------------------------


class TrainingPairs:
    """The trainer's view of the pair store: without the pairs whose prompts are kept for evaluation, and with pictures as the
    bytes of their files, which the adapter decodes only if it does not have their latents."""

    def __init__(self, store: PairStore, indices: Sequence[int]):
        self.store, self.indices = store, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.store.rows([self.indices[index] for index in indices], decode=False)


def split_pairs(recipe: ImageRecipe, store: PairStore) -> tuple[list[int], list[int]]:
    """Indices to train on and indices kept aside. Pairs with one prompt stay on one side, however it is spaced or
    capitalised: the hash of its words decides."""
    if recipe.evaluate.prompts is not None:
        return list(range(len(store))), []
    conditions = store.conditions()
    everything = list(range(len(conditions)))
    kept = [index for index in everything if _kept_aside(conditions[index], recipe)]
    if not kept:
        raise UserError(
            f"evaluate.held_out = {recipe.evaluate.held_out} keeps none of the {len(everything)} pairs aside, so there is "
            "nothing to evaluate on. Raise it, or give evaluate.prompts"
        )
    if len(kept) == len(everything):
        raise UserError(
            f"evaluate.held_out = {recipe.evaluate.held_out} keeps all of the {len(everything)} pairs aside, so there is "
            "nothing to train on. Lower it, or give evaluate.prompts"
        )
    aside = set(kept)
    return [index for index in everything if index not in aside], kept


def _kept_aside(condition: Condition, recipe: ImageRecipe) -> bool:
    digest = hashlib.sha256(f"{recipe.seed} {_words(condition['prompt'])}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < recipe.evaluate.held_out


def evaluation_conditions(recipe: ImageRecipe, store: PairStore) -> list[dict[str, Any]]:
    """Prompts that took no part in training; each prompt as often as it gets seeds.

    Raises:
        UserError: ``evaluate.prompts`` asks for prompts of pairs that are trained on.
    """
    known = store.conditions()
    if recipe.evaluate.prompts is not None:
        conditions = conditions_of(recipe.evaluate.prompts, recipe.seed)
        _refuse_overlap(conditions, known)
    else:
        _, kept = split_pairs(recipe, store)
        conditions = list({known[index]["prompt"]: known[index] for index in kept}.values())
    return [condition for condition in conditions for _ in range(recipe.evaluate.seeds_per_prompt)]


def _refuse_overlap(conditions: Sequence[Condition], trained: Sequence[Condition]) -> None:
    """Case and spacing make no other prompt."""
    seen = {_words(condition["prompt"]) for condition in trained}
    shared = list(dict.fromkeys(condition["prompt"] for condition in conditions if _words(condition["prompt"]) in seen))
    if not shared:
        return
    shown = ", ".join(repr(prompt) for prompt in shared[:SHOWN_OVERLAPS])
    more = f" and {len(shared) - SHOWN_OVERLAPS} more" if len(shared) > SHOWN_OVERLAPS else ""
    raise UserError(
        f"evaluate.prompts: {len(shared)} of these prompts are also prompts of the pairs that are trained on, so they would "
        f"be no test: {shown}{more}. Take them out of evaluate.prompts, or give others; without evaluate.prompts a share of "
        "the pairs is kept aside (evaluate.held_out)"
    )


def _words(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()


# --- the training for one objective -------------------------------------------------------------------------------------------


def train_arm(recipe: ImageRecipe, run: RunFolder, stage_name: str, objective: ObjectiveSpec, place: str) -> None:
    """One objective: writes ``PLACEadapter/``, ``PLACEmetrics.jsonl`` and ``PLACEcheckpoints/``."""
    from polyalign.core.trainer import HARMLESS

    inputs = {
        "model": recipe.model,
        **model_files(recipe),
        "prepare": recipe.prepare,
        "likelihood": recipe.likelihood,
        "objective": objective,
        "train": recipe.train.model_dump(mode="json", exclude=HARMLESS),
        "seed": recipe.seed,
        "held_out": None if recipe.evaluate.prompts else recipe.evaluate.held_out,
    }
    scratch = (f"{place}checkpoints", f"{place}metrics.jsonl")
    with run.stage(stage_name, inputs, after=("generate",), products=(f"{place}adapter",), scratch=scratch) as stage:
        if stage.todo:
            _train(recipe, run, objective, run / place if place else run.path)


def _train(recipe: ImageRecipe, run: RunFolder, objective: ObjectiveSpec, folder: Path) -> None:
    from polyalign.core.trainer import Trainer

    adapter, model = open_model(recipe, run, objective)
    model = adapter.trainable(model)
    store = PairStore(run / "pairs")
    store.validate()
    evaluation_conditions(recipe, store)  # refuse now, and not after the training, what evaluation would refuse
    training = TrainingPairs(store, split_pairs(recipe, store)[0])
    made_with = {"model": model.identity, "pairs": store.content_hash(), "objective": objective.model_dump(mode="json")}
    run.write_environment({"base": model.identity, "pairs_sha256": made_with["pairs"]})
    algorithm = _algorithm(recipe, run, objective, adapter, model, made_with)
    trainer = Trainer(
        algorithm,
        training,
        recipe.train,
        folder,
        seed=recipe.seed,
        identity=made_with,
        tracking=recipe.tracking,
    )
    if trainer.accelerator.is_main_process and "reference" in algorithm.objective.seats:
        _tell_beta(adapter, model, objective, training.rows([0]))
    trainer.run()
    if trainer.accelerator.is_main_process:
        adapter.export(
            whole_model(recipe, run, trainer, model),
            folder / "adapter",
            card={
                "base": model.identity,
                "objective": made_with["objective"],
                "train": recipe.train.model_dump(mode="json"),
                "pairs": len(training),
                "pairs_sha256": made_with["pairs"],
                "seed": recipe.seed,
            },
        )
    trainer.accelerator.wait_for_everyone()


def _algorithm(
    recipe: ImageRecipe,
    run: RunFolder,
    objective: ObjectiveSpec,
    adapter: ImageAdapter,
    model: Model,
    made_with: Mapping[str, Any],
) -> DirectPreference:
    from polyalign.core.algorithm import DirectPreference
    from polyalign.core.objectives.beta import AutoBeta, Beta
    from polyalign.core.objectives.table import build
    from polyalign.core.references import build_seat

    reference = recipe.train.reference
    identity = reference_identity(recipe, base=made_with["model"], pairs=made_with["pairs"])
    seat = build_seat(reference, model.network, folder=run / "cache" / "reference", identity=identity)
    return DirectPreference(
        adapter,
        model,
        build(objective),
        Beta.of(objective.beta) if objective.beta.auto is None else AutoBeta(objective.beta),
        {"reference": seat},
        draw_bank=reference.draws_per_pair if reference.seat == "cached" else None,
        seed=recipe.seed,
    )


def reference_identity(recipe: ImageRecipe, *, base: str, pairs: str) -> str:
    """Everything that the scores of the starting weights depend on, besides a pair's id and its draw: what is read, and how and
    in which precision it is computed. The LoRA is switched off for them."""
    parts = {
        "base": base,
        "pairs": pairs,
        "seed": recipe.seed,
        "model": recipe.model.model_dump(mode="json", exclude={"lora"}),
        "prepare": recipe.prepare.model_dump(mode="json"),
        "likelihood": recipe.likelihood.model_dump(mode="json"),
        "mixed_precision": recipe.train.mixed_precision,
    }
    return json.dumps(parts, sort_keys=True)


def whole_model(recipe: ImageRecipe, run: RunFolder, trainer: Trainer, model: Model) -> Model:
    """The trained model with all of its weights in this process: where the trainer has sharded them, they come from the last
    checkpoint, onto a base that is loaded anew on the CPU."""
    if not any(hasattr(weight, "full_tensor") or hasattr(weight, "ds_id") for weight in model.network.parameters()):
        return model
    from polyalign.core import checkpoint

    last = checkpoint.latest(trainer.folder / "checkpoints")
    assert last is not None  # the last step is always saved
    on_cpu = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cpu"})})
    adapter, whole = open_model(on_cpu, run)
    whole = adapter.trainable(whole)
    whole.network.load_state_dict(last.weights("policy"), strict=False)
    return whole


def _tell_beta(adapter: ImageAdapter, model: Model, objective: ObjectiveSpec, rows: Sequence[Mapping[str, Any]]) -> None:
    """Say what beta is in every convention, for latents of this model's size."""
    from polyalign.core.objectives.beta import Beta
    from polyalign.core.scores import Unit

    latents = adapter.prepare(model, rows, step=0).tensors["latents"]
    unit = Unit("timestep", elements=latents[0, 0].numel(), steps=model.parts["schedule"].steps)
    beta = Beta.of(objective.beta)
    others = [f"{name} {value:.6g}" for name, value in beta.equivalents(unit).items() if name != beta.convention]
    size = f"{unit.elements} latent elements, {unit.steps} noise levels"
    print(f"beta {beta.value:g} ({beta.convention}) is {', '.join(others)} ({size})", file=sys.stderr, flush=True)
