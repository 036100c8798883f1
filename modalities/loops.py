"""What a training may have besides pairs, an objective and one reference, in every modality: rounds of fresh samples, a second
adapter, a guide, margins. The sections of a recipe are those of :mod:`polyalign.core.recipe_loops`; a recipe that has no such
key has none of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, sha256_of
from polyalign.core.run import RunFolder
from polyalign.modalities.fingerprints import fingerprint, judge_files

if TYPE_CHECKING:
    from polyalign.core.adapter import Model
    from polyalign.core.algorithm import Algorithm, Rows
    from polyalign.core.objectives.serves import Offer
    from polyalign.core.objectives.table import ObjectiveSpec
    from polyalign.core.recipe import OptimizerConfig
    from polyalign.core.recipe_loops import FastSlowConfig
    from polyalign.core.references import Seat
    from polyalign.modalities.online import OnlineTraining, Round

PROMPTS = "prompts.jsonl"
"""What the rounds of an online training ask: a condition a line."""
ROUNDS = "rounds"
FIRST, FIRST_FOLDER = "train sft_first", "sft_first"
"""The stage and the folder of a fine-tuning that the objectives go on from."""
MARGINS = "cache/margins"
ABSENT = object()
"""For a key that the modality's recipes do not have: what needs it is refused as nothing that they can serve."""

Condition = Mapping[str, Any]


class AskedPrompts:
    """The prompts of an online training where others have pairs: what is asked in training, and what is kept for evaluation,
    is decided on them."""

    def __init__(self, file: Path):
        self.file = file

    def __len__(self) -> int:
        return len(self.conditions())

    def conditions(self) -> list[dict[str, Any]]:
        """All of them, in order.

        Raises:
            UserError: there is no such file yet.
        """
        if not self.file.is_file():
            raise UserError(f"{self.file}: the prompts are not there yet. Run 'generate' first")
        # Only line feeds end a line: a prompt may hold other characters that Python would cut at.
        lines = self.file.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines if line]

    def validate(self) -> int:
        """How many there are; reading them checks them."""
        return len(self)

    def content_hash(self) -> str:
        """SHA-256 of the file."""
        return sha256_of(self.file)

    @staticmethod
    def write(file: Path, conditions: Sequence[Condition]) -> None:
        atomic_write(file, "".join(json.dumps(dict(one), ensure_ascii=False) + "\n" for one in conditions))


def section(recipe: Any, name: str) -> Any:
    """A section of the recipe, or None where it is not given, or the modality has none."""
    return getattr(recipe, name, None)


def is_online(recipe: Any) -> bool:
    return section(recipe, "online") is not None


def stages_before(recipe: Any) -> tuple[str, ...]:
    """Stages whose weights the recipe's trainings go on from."""
    return () if section(recipe, "sft_first") is None else (FIRST,)


def specs_of(recipe: Any) -> dict[str, ObjectiveSpec]:
    """The objective and the arms, by the recipe's key."""
    return {"objective": recipe.objective, **{f"arms.{name}": arm for name, arm in recipe.arms.items()}}


# --- refused early -----------------------------------------------------------------------------------------------------------


def widened(offer: Offer, recipe: Any) -> Offer:
    """``offer`` with what the recipe's sections add: data and seats that objectives may then ask for."""
    lora, reference = recipe.model.train != "full", recipe.train.reference.seat
    seats, data = set(offer.seats), set(offer.data)
    if section(recipe, "guide") is not None:
        seats.add("guide")
    if lora and hasattr(recipe, "fast_slow"):
        seats.add("partner")
    if offer.likelihood == "token" and reference not in ("none", "adapter") and not (reference == "cached" and not lora):
        seats |= {"mismatched", "mismatched_reference"}
    if section(recipe, "margins") is not None:
        data.add("pairs with margins")
    if is_online(recipe) and recipe.online.lists:
        data = {"lists"}
    return replace(offer, seats=frozenset(seats), data=frozenset(data))


def refuse(recipe: Any) -> None:
    """What is wrong among the objectives and the sections that they need.

    Raises:
        UserError: a section that is missing, or that nothing uses; rounds that cannot be.
    """
    from polyalign.core.objectives.table import build

    needs: dict[str, set[str]] = {"guide": set(), "fast_slow": set(), "margins": set()}
    for key, spec in specs_of(recipe).items():
        objective = build(spec)
        if "guide" in objective.seats:
            needs["guide"].add(f"{key}: {objective.name}")
        if "partner" in objective.seats:
            needs["fast_slow"].add(f"{key}: {objective.name}")
        if objective.data == ("pairs with margins",):
            needs["margins"].add(f"{key}: {objective.name}")
        if "mismatched" in objective.seats:
            _refuse_mismatched(key, recipe)
    for name, user in (("guide", "tgdpo"), ("fast_slow", "ofs_dpo"), ("margins", "modpo")):
        if section(recipe, name) is not None and not needs[name]:
            raise UserError(
                f"{name}: no objective of this recipe uses it; {user} does. Take that objective, or leave {name} out"
            )
    _refuse_without(needs, recipe)
    if needs["guide"] and section(recipe, "guide") is not None:
        fingerprint(recipe.guide.folder)
    if section(recipe, "sft_first") is not None:
        _refuse_first(recipe)
    if is_online(recipe):
        _refuse_online(recipe)


def _refuse_first(recipe: Any) -> None:
    if recipe.model.train == "full":
        raise UserError(
            "sft_first: the objective goes on from the LoRA that fine-tuning wrote, with the base under it as the reference, "
            "and model.train is full. Set model.train to lora, or run two recipes"
        )
    if is_online(recipe):
        raise UserError("sft_first learns from pairs that are there, and with 'online' rounds make theirs. Leave one out")


def _refuse_without(needs: Mapping[str, set[str]], recipe: Any) -> None:
    for key in sorted(needs["guide"]):
        if getattr(recipe, "guide", ABSENT) is None:
            raise UserError(
                f"{key} needs a guide, a model that DPO trained before on the same base. Write\n"
                "  guide: {folder: runs/dpo/adapter}\nwith the exported adapter of a run with objective dpo"
            )
    for key in sorted(needs["margins"]):
        if getattr(recipe, "margins", ABSENT) is None:
            raise UserError(
                f"{key} needs margins, the weighted rewards of the other objectives for both answers of every pair. Write\n"
                "  margins: {judges: [{name: JUDGE, weight: 0.5}]}\nwith one judge for each of them"
            )
    for key in sorted([*needs["guide"], *needs["fast_slow"]]):
        if recipe.model.train == "full":
            raise UserError(f"{key} has a second adapter on the network, and model.train is full. Set model.train to lora")


def _refuse_mismatched(key: str, recipe: Any) -> None:
    seat, smallest = recipe.train.reference.seat, min(recipe.train.micro_batch_size, recipe.train.batch_size)
    if seat == "none" or (seat == "cached" and recipe.model.train == "full"):
        raise UserError(
            f"{key}.baseline: mismatched scores other combinations of prompt and answer in every step, under the reference "
            f"too, and train.reference.seat: {seat} cannot. Set it to adapter_off, frozen or ema, or take baseline: batch"
        )
    if smallest < 2:
        raise UserError(f"{key}.baseline: mismatched needs two prompts in a batch: set train.micro_batch_size to 2 or more")


def _refuse_online(recipe: Any) -> None:
    from polyalign.core.objectives.table import build
    from polyalign.modalities.online import steps_of_round

    online, pairs, train = recipe.online, recipe.pairs, recipe.train
    steps_of_round(settings_of(recipe), train)
    if pairs.source != "generate":
        raise UserError(
            f"online: every round samples answers to pairs.prompts, and pairs.source is {pairs.source}. Set it to generate, "
            "with prompts and judges"
        )
    if section(pairs, "filter") is not None:
        raise UserError("pairs.filter ranks pairs before the training, and with 'online' rounds make theirs. Leave one out")
    if section(recipe, "margins") is not None:
        raise UserError("margins are judged before the training, and with 'online' rounds make their pairs. Leave one out")
    if train.reference.seat == "cached" and online.reference == "kept":
        raise UserError(
            "train.reference.seat: cached keeps the scores of pairs that come again, and with 'online' every round has new "
            "ones. Set it to adapter_off, frozen or ema"
        )
    if online.mixture > 0.0 and recipe.model.train == "full":
        raise UserError(
            "online.mixture samples from the policy and from the base under its LoRA, and model.train is full. Set model.train "
            "to lora, or online.mixture to 0"
        )
    for key, spec in specs_of(recipe).items():
        name = build(spec).name
        if online.lists and name != "adpo":
            raise UserError(f"online.lists trains on all samples of a prompt, which {key}: {name} cannot. Take adpo")


# --- inputs of the stage -----------------------------------------------------------------------------------------------------


def inputs_of(recipe: Any, spec: ObjectiveSpec) -> dict[str, Any]:
    """What the weights depend on of these sections; nothing where there are none, so that runs without them stay finished."""
    from polyalign.core.objectives.table import build

    objective, found = build(spec), dict[str, Any]()
    if is_online(recipe):
        found["online"] = recipe.online
        found["rounds"] = {"sampler": recipe.sampler, "judges": recipe.pairs.judges, **judge_files(recipe.pairs.judges)}
    if "guide" in objective.seats:
        found["guide"] = fingerprint(recipe.guide.folder)
    if "partner" in objective.seats:
        found["fast_slow"] = fast_slow_of(recipe)
    if objective.data == ("pairs with margins",):
        found["margins"] = {"judges": recipe.margins.judges, **judge_files(recipe.margins.judges)}
    if section(recipe.pairs, "filter") is not None:
        found["filter"] = recipe.pairs.filter
    return found


def scratch_of(recipe: Any, place: str) -> tuple[str, ...]:
    """What a training leaves besides what every one does."""
    return (f"{place}{ROUNDS}",) if is_online(recipe) else ()


# --- seats, the algorithm, the data ------------------------------------------------------------------------------------------


def fast_slow_of(recipe: Any) -> FastSlowConfig:
    """The recipe's section, or its defaults."""
    from polyalign.core.recipe_loops import FastSlowConfig

    return section(recipe, "fast_slow") or FastSlowConfig()


def settings_of(recipe: Any) -> Any:
    """The section ``online`` as the loop takes it."""
    from polyalign.modalities.online import OnlineSettings

    return OnlineSettings(**recipe.online.model_dump(exclude={"reference", "mixture"}))


def reference_of(recipe: Any) -> Any:
    """What the recipe says of the reference, which rounds may refresh."""
    from polyalign.modalities.online import refreshed

    if is_online(recipe) and recipe.online.reference == "refreshed":
        return refreshed(settings_of(recipe), recipe.train)
    return recipe.train.reference


def further_seats(recipe: Any, seats: Sequence[str], adapter: Any, model: Model, reference: Seat) -> dict[str, Seat]:
    """The seats besides the reference that an objective asks for by ``seats``."""
    from polyalign.core.references import NamedAdapter
    from polyalign.core.seats import GUIDE, mismatched_seats

    found: dict[str, Seat] = {}
    if "guide" in seats:
        adapter.load_lora(model, Path(recipe.guide.folder), name=GUIDE)
        found["guide"] = NamedAdapter(model.network, GUIDE, seat="guide", key="guide.folder")
    if "mismatched" in seats:
        found |= mismatched_seats(reference)
    return found


def fast_and_slow(recipe: Any, spec: Any, adapter: Any, model: Model, seats: Mapping[str, Seat], bank: int | None) -> Algorithm:
    """OFS-DPO: a twin beside the LoRA, and both trained."""
    from polyalign.core.fast_slow import FastSlow, add_twin

    add_twin(model.network)
    given = fast_slow_of(recipe)
    return FastSlow(adapter, model, spec, seats, interval=given.interval, limit=given.limit, draw_bank=bank, seed=recipe.seed)


def optimizers_of(recipe: Any, algorithm: Algorithm) -> dict[str, OptimizerConfig] | None:
    """Optimisers of networks that have one of their own."""
    from polyalign.core.fast_slow import slow_optimizer

    if "slow" not in algorithm.networks:
        return None
    return slow_optimizer(recipe.train.optimizer, fast_slow_of(recipe).learning_rate_ratio)


def with_margins(recipe: Any, run: RunFolder, spec: ObjectiveSpec, store: Any, data: Rows) -> Rows:
    """``data`` with margins, where the objective is about them; every pair is judged once for all arms."""
    from polyalign.core.objectives.table import build

    if build(spec).data != ("pairs with margins",):
        return data
    from polyalign.evaluation.judges import build as build_judge
    from polyalign.modalities.margins import WithMargins, judge_margins

    judges = [build_judge(judge) for judge in recipe.margins.judges]
    asked = json.dumps([store.content_hash(), [[judge.name, judge.version] for judge in judges]])
    scores = judge_margins(store, judges, run / MARGINS / sha256_of(asked.encode())[:16])
    weights = {judge.name: config.weight for judge, config in zip(judges, recipe.margins.judges, strict=True)}
    return WithMargins(data, scores, weights)


# --- rounds ------------------------------------------------------------------------------------------------------------------


def online_training(
    recipe: Any,
    folder: Path,
    adapter: Any,
    model: Model,
    algorithm: Algorithm,
    conditions: Sequence[Condition],
    *,
    outputs: str,
    select: Any,
    identity: Mapping[str, Any],
) -> OnlineTraining:
    """The training in rounds that the recipe describes."""
    from polyalign.evaluation.judges import panel
    from polyalign.modalities.online import MixtureSampler, OnlineTraining

    share = recipe.online.mixture
    return OnlineTraining(
        adapter,
        model,
        algorithm,
        panel(recipe.pairs.judges),
        conditions,
        settings_of(recipe),
        recipe.train,
        folder,
        recipe.seed,
        outputs,
        sampler=MixtureSampler(adapter, share) if share > 0.0 else None,
        sampler_settings=recipe.sampler.model_dump(mode="json") | ({"mixture": share} if share > 0.0 else {}),
        select=select,
        identity=identity,
        optimizers=optimizers_of(recipe, algorithm),
        tracking=recipe.tracking,
    )


def card_of(rounds: Sequence[Round]) -> dict[str, Any]:
    """What the model card says of the rounds."""
    trained = [one for one in rounds if one.groups]
    last = rounds[-1]
    return {
        "rounds": len(trained),
        "samples_judged": last.samples_so_far,
        "mean_score_by_round": json.dumps([round(one.mean_score, 4) for one in rounds]),
    }


def judges_of(recipe: Any) -> Iterator[tuple[str, Any]]:
    """Every judge that the recipe names, with its key."""
    for judge in recipe.pairs.judges:
        yield "pairs.judges", judge
    for judge in recipe.evaluate.judges:
        yield "evaluate.judges", judge
    if section(recipe, "margins") is not None:
        for judge in recipe.margins.judges:
            yield "margins.judges", judge
    rewards = section(recipe.evaluate, "rewards")
    for judge in rewards.judges if rewards is not None else ():
        yield "evaluate.rewards.judges", judge
