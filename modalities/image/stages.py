"""The stages of an image run: pairs, training, evaluation, report. The command line calls these, one function a verb."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.environment import snapshot
from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, disk_full_explained, sha256_of
from polyalign.core.progress import ProgressLine
from polyalign.core.randomness import seed_of
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.prompts import load_prompts
from polyalign.modalities.image.config import ImageRecipe, PromptsConfig

if TYPE_CHECKING:
    from PIL import Image

    from polyalign.core.adapter import Model
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.core.trainer import Trainer
    from polyalign.modalities.image.adapter import ImageAdapter
    from polyalign.modalities.image.settings import ImageModelSettings

SCHEMA = ImageRecipe
STAGES = ("generate", "train", "evaluate", "report")

BOOKKEEPING = {"log_every", "save_every", "keep_checkpoints"}
"""Training settings that change no weight, so that a finished training stays finished when they change."""

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
        return open_model(recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(trained)})}), run)
    adapter, model = open_model(recipe, run)
    return adapter, model if trained is None else adapter.load_lora(model, trained)


def conditions_of(prompts: PromptsConfig, seed: int) -> list[dict[str, Any]]:
    """The conditions that a recipe asks for."""
    if prompts.file is not None:
        return load_prompts(prompts.file, limit=prompts.count)
    from polyalign.datasets.worlds import shapes

    assert prompts.count is not None  # the schema asks for it with a world
    return shapes.prompts(prompts.split, prompts.count, seed)


def fingerprint(path: str | None) -> str | None:
    """Content hash of a file or of all files in a folder; None stays None."""
    if path is None:
        return None
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or folder (relative to the working directory {Path.cwd().name}/)")
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    return sha256_of("\n".join(f"{file.relative_to(place)} {sha256_of(file)}" for file in files).encode())


# --- pairs -------------------------------------------------------------------------------------------------------------------


def refuse_early(recipe: ImageRecipe) -> None:
    """What later stages would refuse, refused before hours have gone into earlier ones.

    Raises:
        UserError: no such judge; no such file of prompts to evaluate on; a reference that full training cannot have.
    """
    from polyalign.evaluation import judges

    for judge in (*recipe.pairs.judges, *recipe.evaluate.judges):
        if judge.name not in judges.names():
            judges.build(judge)  # raises, and says which names there are
    fingerprint(recipe.evaluate.prompts.file if recipe.evaluate.prompts else None)
    if recipe.model.train == "full" and recipe.train.reference.seat == "adapter_off":
        raise UserError(
            "train.reference.seat: adapter_off needs a LoRA, and model.train is full. Set train.reference.seat to frozen (a "
            "second copy of the network), cached or none, or model.train to lora"
        )


def _base_of(recipe: ImageRecipe) -> dict[str, Any]:
    """What samples of the base depend on: the model without what is trained of it (full training loads it in float32)."""
    base = recipe.model.model_dump(mode="json", exclude={"train", "lora"})
    return base | ({"dtype": "float32"} if recipe.model.train == "full" else {})


def generate(recipe: ImageRecipe, run: RunFolder) -> None:
    """Prompts to pairs, or the user's own folders to pairs: writes ``pairs/``."""
    refuse_early(recipe)
    pairs = recipe.pairs
    source = pairs.folder if pairs.source == "folders" else (pairs.prompts.file if pairs.prompts else None)
    inputs: dict[str, Any] = {"pairs": pairs, "seed": recipe.seed, "source": fingerprint(source)}
    if pairs.source == "generate":
        inputs |= {"model": _base_of(recipe), "sampler": recipe.sampler, "resolution": recipe.prepare.resolution}
    with run.stage("generate", inputs, products=("pairs",)) as stage:
        if not stage.todo:
            return
        if pairs.source == "folders":
            from polyalign.datasets.formats.folders import import_folders

            assert pairs.folder is not None  # the schema asks for it
            import_folders(Path(pairs.folder), PairStore(run / "pairs"))
            return
        from polyalign.evaluation.judges import panel
        from polyalign.modalities.image.pairs import GenerationSettings, generate_pairs

        assert pairs.prompts is not None
        adapter, model = open_model(recipe, run)
        generate_pairs(
            adapter,
            model,
            conditions_of(pairs.prompts, recipe.seed),
            panel(pairs.judges),
            settings=GenerationSettings(
                samples_per_prompt=pairs.samples_per_prompt,
                prompts_per_shard=pairs.prompts_per_shard,
                sampler=recipe.sampler.model_dump(mode="json"),
                **pairs.pairing.model_dump(),
            ),
            folder=run / "pairs",
            seed=recipe.seed,
        )


# --- training ----------------------------------------------------------------------------------------------------------------


class TrainingPairs:
    """The trainer's view of the pair store: without the pairs whose prompts are kept for evaluation."""

    def __init__(self, store: PairStore, indices: Sequence[int]):
        self.store, self.indices = store, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.store.rows([self.indices[index] for index in indices])


def split_pairs(recipe: ImageRecipe, store: PairStore) -> tuple[list[int], list[int]]:
    """Indices to train on and indices kept aside. Pairs with one prompt stay on one side: the prompt's hash decides."""
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
    digest = hashlib.sha256(f"{recipe.seed} {condition['prompt']}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < recipe.evaluate.held_out


def train(recipe: ImageRecipe, run: RunFolder) -> None:
    """Pairs to an adapter, for the recipe's objective and for every arm: writes ``adapter/`` and ``arms/NAME/adapter/``."""
    train_arm(recipe, run, "train", recipe.objective, "")
    for name, objective in recipe.arms.items():
        train_arm(recipe, run, f"train {name}", objective, f"arms/{name}/")


def train_arm(recipe: ImageRecipe, run: RunFolder, stage_name: str, objective: ObjectiveSpec, place: str) -> None:
    """One objective: writes ``PLACEadapter/``, ``PLACEmetrics.jsonl`` and ``PLACEcheckpoints/``."""
    inputs = {
        "model": recipe.model,
        "prepare": recipe.prepare,
        "likelihood": recipe.likelihood,
        "objective": objective,
        "train": recipe.train.model_dump(mode="json", exclude=BOOKKEEPING),
        "seed": recipe.seed,
        "held_out": None if recipe.evaluate.prompts else recipe.evaluate.held_out,
    }
    scratch = (f"{place}checkpoints", f"{place}metrics.jsonl")
    with run.stage(stage_name, inputs, after=("generate",), products=(f"{place}adapter",), scratch=scratch) as stage:
        if stage.todo:
            _train(recipe, run, objective, run / place if place else run.path)


def _train(recipe: ImageRecipe, run: RunFolder, objective: ObjectiveSpec, folder: Path) -> None:
    from polyalign.core.algorithm import DirectPreference
    from polyalign.core.objectives.beta import AutoBeta, Beta
    from polyalign.core.objectives.table import build
    from polyalign.core.references import build_seat
    from polyalign.core.trainer import Trainer

    adapter, model = open_model(recipe, run, objective)
    model = adapter.trainable(model)
    store = PairStore(run / "pairs")
    store.validate()
    training, _ = split_pairs(recipe, store)
    made_with = {"model": model.identity, "pairs": store.content_hash(), "objective": objective.model_dump(mode="json")}
    reference = recipe.train.reference
    cached_for = json.dumps(
        [made_with["model"], made_with["pairs"], recipe.prepare.model_dump(), recipe.likelihood.model_dump()]
    )
    algorithm = DirectPreference(
        adapter,
        model,
        build(objective),
        Beta.of(objective.beta) if objective.beta.auto is None else AutoBeta(objective.beta),
        {
            "reference": build_seat(
                reference, model.network, folder=run / "cache" / "reference", identity=f"{recipe.seed} {cached_for}"
            )
        },
        draw_bank=reference.draws_per_pair if reference.seat == "cached" else None,
        seed=recipe.seed,
    )
    trainer = Trainer(
        algorithm,
        TrainingPairs(store, training),
        recipe.train,
        folder,
        seed=recipe.seed,
        identity=made_with,
        tracking=recipe.tracking,
    )
    if trainer.accelerator.is_main_process:
        _note_environment(run, {"base": model.identity, "pairs_sha256": made_with["pairs"]})
        if "reference" in algorithm.objective.seats:
            _tell_beta(adapter, model, objective, store.rows(training[:1]))
    trainer.run()
    if trainer.accelerator.is_main_process:
        adapter.export(
            whole_model(recipe, run, trainer, model),
            folder / "adapter",
            card=_card(recipe, model, objective, len(training)),
        )
    trainer.accelerator.wait_for_everyone()


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


def _note_environment(run: RunFolder, hashes: Mapping[str, str]) -> None:
    """``environment.json``: what the training ran on, and the hashes of what went into it."""
    atomic_write(run / "environment.json", json.dumps({**snapshot(), "hashes": dict(hashes)}, indent=1) + "\n")


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


def _card(recipe: ImageRecipe, model: Model, objective: ObjectiveSpec, pairs: int) -> dict[str, Any]:
    return {
        "base": model.identity,
        "objective": objective.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json"),
        "pairs": pairs,
        "seed": recipe.seed,
    }


# --- evaluation --------------------------------------------------------------------------------------------------------------


def evaluation_conditions(recipe: ImageRecipe, run: RunFolder) -> list[dict[str, Any]]:
    """Prompts that took no part in training; each prompt as often as it gets seeds."""
    if recipe.evaluate.prompts is not None:
        conditions = conditions_of(recipe.evaluate.prompts, recipe.seed)
    else:
        store = PairStore(run / "pairs")
        _, kept = split_pairs(recipe, store)
        conditions = list({row["condition"]["prompt"]: row["condition"] for row in store.rows(kept)}.values())
    return [condition for condition in conditions for _ in range(recipe.evaluate.seeds_per_prompt)]


def evaluate(recipe: ImageRecipe, run: RunFolder) -> None:
    """Base and aligned on the same prompts and seeds: writes ``samples/`` and ``evaluation.json``."""
    prompts = recipe.evaluate.prompts
    inputs = {
        "sampler": recipe.sampler,
        "evaluate": recipe.evaluate,
        "seed": recipe.seed,
        "prompts": fingerprint(prompts.file if prompts else None),
    }
    after = ("generate", "train", *(f"train {name}" for name in recipe.arms))
    with run.stage("evaluate", inputs, after=after, products=("samples", "evaluation.json")) as stage:
        if stage.todo:
            _evaluate(recipe, run)


def _evaluate(recipe: ImageRecipe, run: RunFolder) -> None:
    from polyalign.evaluation.judges import panel
    from polyalign.evaluation.paired import evaluate_paired

    conditions = evaluation_conditions(recipe, run)
    seeds = [seed_of(recipe.seed, "evaluate", index) for index in range(len(conditions))]
    base, base_files = sampled(recipe, run, "base", None, conditions, seeds)
    aligned, aligned_files = sampled(recipe, run, "aligned", run / "adapter", conditions, seeds)
    arms = {name: sampled(recipe, run, name, run / "arms" / name / "adapter", conditions, seeds)[0] for name in recipe.arms}
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
    """Whatever the run folder holds, in one page: writes ``report.html`` and ``report.json``."""
    from polyalign.evaluation.report import write_report

    write_report(run.path)


def export(recipe: ImageRecipe, run: RunFolder, destination: Path) -> None:
    """The trained weights, where the user wants them: what diffusers opens directly."""
    source = run / "adapter"
    if not source.is_dir():
        raise UserError(f"{source}: nothing was trained yet. Run 'polyalign train CONFIG' first")
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


def _copy(source: Path, destination: Path) -> None:
    """A folder's files. ``shutil.copytree`` would hide a full disk in an error of its own."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target = destination / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as given, open(target, "wb") as copied:
            shutil.copyfileobj(given, copied)
