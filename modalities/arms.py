"""The training for one objective, in every modality: the stage with its inputs, the model, the pairs, the reference, the
trainer, the export. A :class:`Room` is what a modality gives to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.run import RunFolder
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.held_out import TrainingPairs, evaluation_conditions, split_pairs

if TYPE_CHECKING:
    from polyalign.core.adapter import Model
    from polyalign.core.algorithm import DirectPreference
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.core.recipe import TrainSettings
    from polyalign.core.trainer import Trainer

LEFT_OUT = "left_out.json"
"""What was left out of the pairs before they were trained on, and how many; only where something was."""


@dataclass(frozen=True)
class Selected:
    """Indices of the pairs that are trained on, and what the data card says of those that are not."""

    indices: Sequence[int]
    card: Mapping[str, Any] = field(default_factory=dict)


def everything(_recipe: Any, _adapter: Any, _model: Model, _store: PairStore, indices: Sequence[int]) -> Selected:
    """All pairs."""
    return Selected(indices)


@dataclass(frozen=True)
class Room:
    """What a modality gives to the training that all share.

    ``open_model(recipe, run, objective)`` gives adapter and model; ``model_files(recipe)`` the hashes of the files that the
    model is read from; ``conditions_of(prompts, seed)`` the conditions of ``evaluate.prompts``; ``tell_beta(adapter, model,
    objective, rows)`` says what beta means for this model; ``select`` leaves out pairs that the model cannot take.
    """

    outputs: str
    open_model: Callable[..., tuple[Any, Model]]
    model_files: Callable[[Any], Mapping[str, Any]]
    conditions_of: Callable[[Any, int], Sequence[dict[str, Any]]]
    tell_beta: Callable[[Any, Model, ObjectiveSpec, Sequence[Mapping[str, Any]]], None]
    select: Callable[[Any, Any, Model, PairStore, Sequence[int]], Selected] = everything

    def pairs_of(self, run: RunFolder) -> PairStore:
        """The run's pairs."""
        return PairStore(run / "pairs", self.outputs)

    def evaluation_conditions(self, recipe: Any, store: PairStore) -> list[dict[str, Any]]:
        """See :func:`polyalign.modalities.held_out.evaluation_conditions`."""
        return evaluation_conditions(recipe.evaluate, recipe.seed, store, self.conditions_of)


def train_arms(room: Room, recipe: Any, run: RunFolder) -> None:
    """The recipe's objective and every arm: writes ``adapter/`` and ``arms/NAME/adapter/``."""
    train_arm(room, recipe, run, "train", recipe.objective, "")
    for name, objective in recipe.arms.items():
        train_arm(room, recipe, run, f"train {name}", objective, f"arms/{name}/")


def train_arm(room: Room, recipe: Any, run: RunFolder, stage_name: str, objective: ObjectiveSpec, place: str) -> None:
    """One objective: writes ``PLACEadapter/``, ``PLACEmetrics.jsonl`` and ``PLACEcheckpoints/``."""
    inputs = {
        "model": recipe.model,
        **room.model_files(recipe),
        "prepare": recipe.prepare,
        "likelihood": recipe.likelihood,
        "objective": objective,
        "train": _training_inputs(recipe.train),
        "seed": recipe.seed,
        "held_out": None if recipe.evaluate.prompts else recipe.evaluate.held_out,
    }
    scratch = (f"{place}checkpoints", f"{place}metrics.jsonl", f"{place}{LEFT_OUT}")
    with run.stage(stage_name, inputs, after=("generate",), products=(f"{place}adapter",), scratch=scratch) as stage:
        if stage.todo:
            _train(room, recipe, run, objective, run / place if place else run.path)


def _training_inputs(train: TrainSettings) -> dict[str, Any]:
    """What of ``train`` the weights depend on. Keys that came later are left out at their defaults, so that finished runs stay
    finished."""
    from polyalign.core.trainer import HARMLESS

    inputs = train.model_dump(mode="json", exclude=HARMLESS)
    if inputs.get("stop") is None:
        inputs.pop("stop", None)
    if inputs["reference"].get("ema_every") == 1:
        del inputs["reference"]["ema_every"]
    return inputs


def _train(room: Room, recipe: Any, run: RunFolder, objective: ObjectiveSpec, folder: Path) -> None:
    from polyalign.core.trainer import Trainer

    adapter, model = room.open_model(recipe, run, objective)
    model = adapter.trainable(model)
    store = room.pairs_of(run)
    store.validate()
    room.evaluation_conditions(recipe, store)  # refuse now, and not after the training, what evaluation would refuse
    selected = room.select(recipe, adapter, model, store, split_pairs(recipe.evaluate, recipe.seed, store)[0])
    training = TrainingPairs(store, selected.indices)
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
    if trainer.accelerator.is_main_process and selected.card:
        atomic_write(folder / LEFT_OUT, json.dumps(selected.card, indent=1) + "\n")
    if trainer.accelerator.is_main_process and "reference" in algorithm.objective.seats:
        room.tell_beta(adapter, model, objective, training.rows([0]))
    trainer.run()
    if trainer.accelerator.is_main_process:
        adapter.export(
            whole_model(room, recipe, run, trainer, model),
            folder / "adapter",
            card={
                "base": model.identity,
                "objective": made_with["objective"],
                "train": recipe.train.model_dump(mode="json"),
                "pairs": len(training),
                **selected.card,
                "pairs_sha256": made_with["pairs"],
                "seed": recipe.seed,
            },
        )
    trainer.accelerator.wait_for_everyone()


def _algorithm(
    recipe: Any, run: RunFolder, objective: ObjectiveSpec, adapter: Any, model: Model, made_with: Mapping[str, Any]
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


def reference_identity(recipe: Any, *, base: str, pairs: str) -> str:
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


def whole_model(room: Room, recipe: Any, run: RunFolder, trainer: Trainer, model: Model) -> Model:
    """The trained model with all of its weights in this process: where the trainer has sharded them, they come from the last
    checkpoint, onto a base that is loaded anew on the CPU."""
    if not any(hasattr(weight, "full_tensor") or hasattr(weight, "ds_id") for weight in model.network.parameters()):
        return model
    from polyalign.core import checkpoint

    last = checkpoint.latest(trainer.folder / "checkpoints")
    assert last is not None  # the last step is always saved
    on_cpu = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cpu"})})
    adapter, whole = room.open_model(on_cpu, run, None)
    whole = adapter.trainable(whole)
    whole.network.load_state_dict(last.weights("policy"), strict=False)
    return whole


def refuse_unless_trained(room: Room, recipe: Any, run: RunFolder) -> None:
    """Raises UserError unless the training of this recipe is finished: ``adapter/`` may be of other settings, or half there."""
    plan = RunFolder(run.path, planning=True)
    train_arm(room, recipe, plan, "train", recipe.objective, "")
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
