"""The training for one objective, in every modality: the stage with its inputs, the model, the pairs, the reference, the
trainer, the export. A :class:`Room` is what a modality gives to it; :mod:`polyalign.modalities.loops` has what goes beyond."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.run import RunFolder, Stage
from polyalign.datasets.labels import LabelStore
from polyalign.datasets.pairs import PairStore
from polyalign.modalities import loops
from polyalign.modalities.held_out import TrainingPairs, asked_aside, evaluation_conditions, split_pairs, tell_kept_aside

if TYPE_CHECKING:
    from polyalign.core.adapter import Model
    from polyalign.core.algorithm import Algorithm
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.core.recipe import TrainSettings
    from polyalign.core.trainer import Trainer

Named = Callable[[Sequence[int]], list[str]]
"""What conditions are called, by their places."""

LEFT_OUT = "left_out.json"
"""What was left out of the pairs before they were trained on, and how many; only where something was."""


@dataclass(frozen=True)
class Selected:
    """Indices of the pairs that are trained on, and what the data card says of those that are not."""

    indices: Sequence[int]
    card: Mapping[str, Any] = field(default_factory=dict)


def fresh(_recipe: Any, adapter: Any, model: Model) -> Model:
    """The model with what is trained of it: a fresh LoRA, or all of it."""
    return adapter.trainable(model)


def nothing(_recipe: Any, _run: RunFolder, _asked: Any) -> dict[str, Any]:
    """An evaluation of samples alone."""
    return {}


def no_files(_prompts: Any) -> Sequence[Path]:
    """Prompts are all in their own file."""
    return ()


def no_tables(_evaluation: Mapping[str, Any], _conditions: Sequence[Mapping[str, Any]], _seed: int) -> dict[str, Any]:
    """What every evaluation has."""
    return {}


def everything(_recipe: Any, _adapter: Any, _model: Model, _store: Any, indices: Sequence[int]) -> Selected:
    """All pairs."""
    return Selected(indices)


def all_asked(_recipe: Any, _adapter: Any, _model: Model, conditions: Sequence[Any], _named: Named) -> list[int]:
    """All prompts."""
    return list(range(len(conditions)))


def no_places(_prompts: Any) -> Sequence[str]:
    """Nothing says where prompts come from."""
    return ()


@dataclass(frozen=True)
class Room:
    """What a modality gives to the training that all share.

    ``open_model(recipe, run, objective)`` gives adapter and model; ``model_files(recipe)`` the hashes of the files that the
    model is read from; ``conditions_of(prompts, seed)`` the conditions of ``evaluate.prompts``; ``tell_beta(adapter, model,
    objective, rows)`` says what beta means for this model (``rows`` is empty where rounds make them later); ``select`` leaves
    out pairs that the model cannot take; ``trainable(recipe, adapter, model)`` makes the model one that is trained;
    ``measured(recipe, run, asked)`` is what an evaluation says besides its samples' scores, by key of ``evaluation.json``;
    ``pictured``: conditions have pictures; ``tables(evaluation, conditions, seed)`` is what is added up from its items, by key;
    ``named_by(prompts)`` are the files that a file of prompts only names; ``askable(recipe, adapter, model, conditions,
    named)`` the places of the conditions that evaluation asks, ``named(places)`` being what some are called;
    ``places_of(prompts)`` where each of a recipe's prompts stands in its file.
    """

    outputs: str
    open_model: Callable[..., tuple[Any, Model]]
    model_files: Callable[[Any], Mapping[str, Any]]
    conditions_of: Callable[[Any, int], Sequence[dict[str, Any]]]
    tell_beta: Callable[[Any, Model, ObjectiveSpec, Sequence[Mapping[str, Any]]], None]
    select: Callable[[Any, Any, Model, Any, Sequence[int]], Selected] = everything
    trainable: Callable[[Any, Any, Model], Model] = fresh
    measured: Callable[[Any, RunFolder, Any], dict[str, Any]] = nothing
    label_store: Callable[[Path], LabelStore] = LabelStore
    pictured: bool = False
    tables: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]], int], dict[str, Any]] = no_tables
    named_by: Callable[[Any], Sequence[Path]] = no_files
    askable: Callable[[Any, Any, Model, Sequence[Any], Named], list[int]] = all_asked
    places_of: Callable[[Any], Sequence[str]] = no_places

    def pairs_of(self, recipe: Any, run: RunFolder, place: str = "pairs") -> Any:
        """The run's pairs, or single answers with labels where the recipe reads such; in the folder ``place`` of the run."""
        labelled = getattr(recipe.pairs, "labelled", False)
        return self.label_store(run / place) if labelled else PairStore(run / place, self.outputs, pictured=self.pictured)

    def asked_of(self, recipe: Any, run: RunFolder) -> Any:
        """What says which prompts take part in training: the run's pairs, or the prompts that rounds ask."""
        return loops.AskedPrompts(run / loops.PROMPTS) if loops.is_online(recipe) else self.pairs_of(recipe, run)

    def evaluation_conditions(self, recipe: Any, store: Any) -> list[dict[str, Any]]:
        """See :func:`polyalign.modalities.held_out.evaluation_conditions`."""
        return evaluation_conditions(recipe.evaluate, recipe.seed, store, self.conditions_of)

    def asked_in_evaluation(self, recipe: Any, store: Any, adapter: Any, model: Model) -> list[dict[str, Any]]:
        """Of the conditions of the evaluation those that the model can be asked.

        Raises:
            UserError: some cannot be asked, and the recipe does not say that they are to be left out; or all of them.
        """
        conditions, each = self.evaluation_conditions(recipe, store), recipe.evaluate.seeds_per_prompt
        places = self.askable(recipe, adapter, model, conditions[::each], partial(self._named, recipe, store))
        return [conditions[place * each + seed] for place in places for seed in range(each)]

    def _named(self, recipe: Any, store: Any, places: Sequence[int]) -> list[str]:
        """What conditions of the evaluation are called, and where they come from as far as that is known."""
        prompts = recipe.evaluate.prompts
        if prompts is not None:
            known = self.places_of(prompts)
            return [known[place] if known else f"prompt {place}" for place in places]
        aside = asked_aside(recipe.evaluate, recipe.seed, store)
        indices = [aside[place] for place in places]
        if isinstance(store, loops.AskedPrompts):
            return [f"{store.file} line {index + 1}" for index in indices]
        return [_with_origin(row) for row in store.rows(indices, decode=False)]


def _with_origin(row: Mapping[str, Any]) -> str:
    """A pair's id, and the file and place that it was read from."""
    origin = row.get("provenance", {}).get("sampler", {})
    words = [str(origin[name]) for name in ("file", "place") if isinstance(origin.get(name), str)]
    words = words[1:] if len(words) > 1 and words[0] in words[1] else words
    return f"pair {row['pair_id']}" + (f" ({' '.join(words)})" if words else "")


def train_arms(room: Room, recipe: Any, run: RunFolder) -> None:
    """The recipe's objective and every arm: writes ``adapter/`` and ``arms/NAME/adapter/``; with ``sft_first`` before them
    ``sft_first/adapter/``, which they go on from."""
    if loops.section(recipe, "sft_first") is not None:
        _train_first(room, recipe, run)
    train_arm(room, recipe, run, "train", recipe.objective, "")
    for name, objective in recipe.arms.items():
        train_arm(room, recipe, run, f"train {name}", objective, f"arms/{name}/")


def _train_first(room: Room, recipe: Any, run: RunFolder) -> None:
    """Fine-tuning on the chosen outputs, for as many steps as ``sft_first`` says."""
    from polyalign.core.objectives.table import TABLE

    steps = recipe.train.model_copy(update={"steps": recipe.sft_first.steps})
    objective: Any = TABLE["sft"].parameters()
    first = recipe.model_copy(update={"sft_first": None, "online": None, "train": steps, "objective": objective})
    train_arm(room, first, run, loops.FIRST, objective, f"{loops.FIRST_FOLDER}/")
    wait_for_all()  # the first process writes into the ledger that this stage has finished, which the next one asks for


def wait_for_all() -> None:
    """Where training runs in several processes: go on when all have come here."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def train_arm(room: Room, recipe: Any, run: RunFolder, stage_name: str, objective: ObjectiveSpec, place: str) -> None:
    """One objective: writes ``PLACEadapter/``, ``PLACEmetrics.jsonl`` and ``PLACEcheckpoints/``."""
    inputs = {
        "model": _model_inputs(recipe.model),
        **room.model_files(recipe),
        "prepare": _prepare_inputs(recipe.prepare),
        "likelihood": recipe.likelihood,
        "objective": objective,
        "train": _training_inputs(recipe.train),
        "seed": recipe.seed,
        "held_out": None if recipe.evaluate.prompts else recipe.evaluate.held_out,
        **loops.inputs_of(recipe, objective),
    }
    scratch = (f"{place}checkpoints", f"{place}metrics.jsonl", f"{place}{LEFT_OUT}", *loops.scratch_of(recipe, place))
    after = ("generate", *loops.stages_before(recipe))
    with run.stage(stage_name, inputs, after=after, products=(f"{place}adapter",), scratch=scratch) as stage:
        if stage.todo:
            _train(room, recipe, run, objective, run / place if place else run.path)


def _model_inputs(model: Any) -> dict[str, Any]:
    """The section ``model``, without keys that came later where they are at their defaults."""
    inputs = model.model_dump(mode="json")
    if inputs.get("lora", {}).get("start") is None:
        inputs.get("lora", {}).pop("start", None)
    return inputs


def _prepare_inputs(prepare: Any) -> dict[str, Any]:
    """The section ``prepare``, without where its results are kept."""
    return prepare.model_dump(mode="json", exclude={"cache_folder"})


def cache_of(recipe: Any, run: RunFolder) -> Path:
    """Where what can be computed again is kept: the run's own folder, or the one that the recipe's runs share."""
    shared = getattr(recipe.prepare, "cache_folder", None)
    return run / "cache" if shared is None else Path(shared).expanduser()


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
    adapter, model = room.open_model(recipe, run, objective)
    if loops.stages_before(recipe):
        model = adapter.trainable(adapter.load_lora(model, run / loops.FIRST_FOLDER / "adapter"), fresh=False)
    else:
        model = room.trainable(recipe, adapter, model)
    asked = room.asked_of(recipe, run)
    asked.validate()
    room.asked_in_evaluation(recipe, asked, adapter, model)  # refuse now, not after the training, what evaluation would refuse
    made_with = {"model": model.identity, "pairs": asked.content_hash(), "objective": objective.model_dump(mode="json")}
    run.write_environment({"base": model.identity, "pairs_sha256": made_with["pairs"]})
    work = _Work(room, recipe, run, objective, folder, adapter, model, made_with)
    if loops.is_online(recipe):
        work.in_rounds(asked)
    else:
        work.on_pairs(asked)


@dataclass(frozen=True)
class _Work:
    """One training: what it is done with."""

    room: Room
    recipe: Any
    run: RunFolder
    objective: ObjectiveSpec
    folder: Path
    adapter: Any
    model: Model
    made_with: Mapping[str, Any]

    def on_pairs(self, store: Any) -> None:
        """Train on what the run folder has."""
        from polyalign.core.objectives.table import build
        from polyalign.core.trainer import Trainer

        recipe, objective = self.recipe, self.objective
        taken, kept = split_pairs(recipe.evaluate, recipe.seed, store)
        selected = self.room.select(recipe, self.adapter, self.model, store, taken)
        if isinstance(store, LabelStore) and build(objective).name == "sft":
            selected = _desirable(store, selected)
        training = TrainingPairs(store, selected.indices)
        algorithm = self.algorithm()
        trainer = Trainer(
            algorithm,
            loops.with_margins(recipe, self.run, objective, store, training),
            recipe.train,
            self.folder,
            seed=recipe.seed,
            identity=self.made_with,
            optimizers=loops.optimizers_of(recipe, algorithm),
            tracking=recipe.tracking,
        )
        main = trainer.accelerator.is_main_process
        if main and selected.card:
            atomic_write(self.folder / LEFT_OUT, json.dumps(selected.card, indent=1) + "\n")
        if main:
            tell_kept_aside(recipe.evaluate, taken, kept, "answers" if isinstance(store, LabelStore) else "pairs")
            self.tell_beta(training.rows([0]))
        trainer.run()
        if main:
            whole = whole_model(self.room, recipe, self.run, trainer, self.model)
            self.export(whole, {"pairs": len(training), **selected.card})
        trainer.accelerator.wait_for_everyone()

    def in_rounds(self, asked: loops.AskedPrompts) -> None:
        """Train in rounds on samples of the policy."""
        recipe, conditions = self.recipe, asked.conditions()
        taken, kept = split_pairs(recipe.evaluate, recipe.seed, asked)

        def select(store: PairStore) -> Sequence[int]:
            return self.room.select(recipe, self.adapter, self.model, store, list(range(len(store)))).indices

        tell_kept_aside(recipe.evaluate, taken, kept, "prompts")
        self.tell_beta([])
        rounds = loops.online_training(
            recipe,
            self.folder,
            self.adapter,
            self.model,
            self.algorithm(),
            [conditions[index] for index in taken],
            outputs=self.room.outputs,
            select=select,
            identity=self.made_with,
        ).run()
        self.export(self.model, loops.card_of(rounds))

    def export(self, whole: Model, card: Mapping[str, Any]) -> None:
        """Write ``adapter/``; ``card`` is what its card says of the data."""
        self.adapter.export(
            whole,
            self.folder / "adapter",
            card={
                "base": self.model.identity,
                "objective": self.made_with["objective"],
                "train": self.recipe.train.model_dump(mode="json"),
                **card,
                "pairs_sha256": self.made_with["pairs"],
                "seed": self.recipe.seed,
            },
        )

    def tell_beta(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from polyalign.core.objectives.table import build

        if "reference" in build(self.objective).seats:
            self.room.tell_beta(self.adapter, self.model, self.objective, rows)

    def algorithm(self) -> Algorithm:
        from polyalign.core.algorithm import DirectPreference
        from polyalign.core.objectives.beta import AutoBeta, Beta
        from polyalign.core.objectives.table import build
        from polyalign.core.references import build_seat

        recipe, spec, network = self.recipe, self.objective, self.model.network
        objective, reference = build(spec), loops.reference_of(recipe)
        identity = reference_identity(
            recipe,
            base=self.made_with["model"],
            pairs=self.made_with["pairs"],
            branches=getattr(self.adapter.settings, "branches", None),
        )
        seat = build_seat(reference, network, folder=cache_of(recipe, self.run) / "reference", identity=identity)
        bank = reference.draws_per_pair if reference.seat == "cached" else None
        if "partner" in objective.seats:
            return loops.fast_and_slow(recipe, spec, self.adapter, self.model, {"reference": seat}, bank)
        return DirectPreference(
            self.adapter,
            self.model,
            objective,
            Beta.of(spec.beta) if spec.beta.auto is None else AutoBeta(spec.beta),
            {"reference": seat, **loops.further_seats(recipe, objective.seats, self.adapter, self.model, seat)},
            draw_bank=bank,
            seed=recipe.seed,
        )


def _desirable(store: LabelStore, selected: Selected) -> Selected:
    """Fine-tuning learns from what is good; the rest is left out, and counted."""
    labels = store.labels()
    kept = [index for index in selected.indices if labels[index]]
    if not kept:
        raise UserError(f"{store.folder}: no row is desirable, and sft learns from these alone. Take kto or bco")
    left = len(selected.indices) - len(kept)
    return Selected(kept, {**selected.card, **({"undesirable": left} if left else {})})


def reference_identity(recipe: Any, *, base: str, pairs: str, branches: Sequence[str] | None = None) -> str:
    """Everything that the scores of the starting weights depend on, besides a pair's id and its draw: what is read, and how and
    in which precision it is computed. The LoRA is switched off for them. ``branches`` are a pair's candidates, where the
    objective decides which there are: an arm's may be others."""
    parts = {
        "base": base,
        "pairs": pairs,
        "seed": recipe.seed,
        "model": recipe.model.model_dump(mode="json", exclude={"lora"}),
        "prepare": _prepare_inputs(recipe.prepare),
        "likelihood": recipe.likelihood.model_dump(mode="json"),
        "mixed_precision": recipe.train.mixed_precision,
        **({} if branches is None else {"branches": list(branches)}),
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
    whole = room.trainable(recipe, adapter, whole)
    whole.network.load_state_dict(last.weights("policy"), strict=False)
    return whole


def refuse_unless_trained(room: Room, recipe: Any, run: RunFolder, arm: str | None = None) -> Path:
    """The folder of what the recipe's objective, or an arm, was trained to.

    Raises:
        UserError: no such arm, or its training is not finished: the folder may be of other settings, or half there.
    """
    if arm is not None and arm not in recipe.arms:
        raise UserError(f"there is no arm {arm!r} in this recipe; it has {', '.join(recipe.arms) or 'none'}")
    stage, place = ("train", "") if arm is None else (f"train {arm}", f"arms/{arm}/")
    plan = RunFolder(run.path, planning=True)
    train_arm(room, recipe, plan, stage, recipe.objective if arm is None else recipe.arms[arm], place)
    refuse_unfinished(plan.planned[stage], run / f"{place}adapter")
    return run / f"{place}adapter"


def refuse_unfinished(stage: Stage, source: Path) -> None:
    """Raises UserError unless the training whose stage this is has finished; ``source`` is the folder of its weights."""
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
