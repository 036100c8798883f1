"""The stages of a vision-language run: pairs, training, evaluation, report. The command line calls these, a function a verb."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.progress import ProgressLine
from polyalign.core.run import RunFolder
from polyalign.datasets.formats.table import ANSWER_SOURCES
from polyalign.datasets.pictures import content_of
from polyalign.modalities import verbs
from polyalign.modalities.arms import train_arms
from polyalign.modalities.fingerprints import fingerprint
from polyalign.modalities.loops import specs_of
from polyalign.modalities.token_refusals import CAPABILITIES, base_of, refuse_base, refuse_beta, refuse_start
from polyalign.modalities.token_training import for_evaluation
from polyalign.modalities.vlm.config import TINY_BASE, VlmRecipe
from polyalign.modalities.vlm.training import BRANCHES, ROOM, branches_of, open_model, open_trained

__all__ = ["SCHEMA", "STAGES", "evaluate", "export", "generate", "open_model", "open_trained", "report", "train"]

SCHEMA = VlmRecipe
STAGES = ("generate", "train", "evaluate", "report")

MAKES = {"image": "image: {kind: diffused}", "context": "context: true"}
"""Keys of pairs.negatives, by what they make that may lose."""

Condition = Mapping[str, Any]


def refuse_early(recipe: VlmRecipe) -> None:
    """What later stages would refuse, refused before hours have gone into earlier ones.

    Raises:
        UserError: no such base, or no model in it; no such judge; no such file of questions, chat template or adapter; a
            reference that full training cannot have; an objective that needs what the recipe does not give.
    """
    from polyalign.core.objectives.serves import Offer

    opened = {"opened_by": "AutoModelForImageTextToText", "beside": "AutoProcessor"}
    refuse_base(recipe, TINY_BASE, **opened)
    fingerprint(recipe.pairs.location)
    verbs.refuse_unfit_judges(recipe, ROOM.outputs)
    fingerprint(recipe.evaluate.prompts.file if recipe.evaluate.prompts else None)
    fingerprint(recipe.model.chat_template)
    verbs.refuse_seats(recipe, who="a vlm recipe", loader="VlmAdapter.load_lora(model, folder, ")
    refuse_start(recipe)
    _refuse_without_losers(recipe)
    verbs.refuse_objectives(recipe, Offer("a vlm recipe", "token", CAPABILITIES, data_of(recipe)))
    refuse_beta(recipe)


def _refuse_without_losers(recipe: VlmRecipe) -> None:
    """Raises UserError for candidates in which something is to lose that nothing makes, or that is called something else."""
    from polyalign.core.objectives.table import build
    from polyalign.modalities.vlm.settings import LOSING, losing_in

    offered = losing_of(recipe)
    for key, spec in specs_of(recipe).items():
        try:
            branches = branches_of(recipe, spec)
            asked = frozenset().union(*map(losing_in, branches))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        lacking = [name for name in LOSING if name in asked - offered]
        if lacking:
            raise UserError(
                f"{key}: {build(spec).name} compares {', '.join(branches)}, and nothing in this recipe makes the "
                f"{' and the '.join(lacking)} that is to lose in them. Give pairs.negatives, such as "
                f"{{{', '.join(words for name, words in MAKES.items() if name in asked)}}}"
            )


def losing_of(recipe: VlmRecipe) -> frozenset[str]:
    """What may lose in the recipe's pairs. Of pairs that are read nobody knows what else is to lose in them."""
    pairs, negatives = recipe.pairs, recipe.pairs.negatives
    if not pairs.sampled:
        return frozenset({"response", *MAKES})
    images = pairs.source == "re_align" or (negatives is not None and negatives.image is not None)
    there = {"response": True, "image": images, "context": negatives is not None and negatives.context}
    return frozenset(name for name, made in there.items() if made)


def data_of(recipe: VlmRecipe) -> frozenset[Any]:
    """What the recipe's pairs are to an objective."""
    from polyalign.modalities.vlm.settings import losing_in

    offered = losing_of(recipe)
    whole = [name for name, branches in BRANCHES.items() if frozenset().union(*map(losing_in, branches)) <= offered]
    return frozenset({"pairs", "named branches", *whole})


def generate(recipe: VlmRecipe, run: RunFolder) -> None:
    """Questions to pairs, or preferences in any format to pairs: writes ``pairs/``."""
    verbs.refuse_several_processes("generate", run, modality="vlm")
    refuse_early(recipe)
    from polyalign.modalities.vlm.pairs import PLAIN, with_losers

    negatives = recipe.pairs.negatives
    samples_of = {"model": base_of(recipe), "sampler": recipe.sampler, "pictures": recipe.prepare.picture_options}
    if recipe.pairs.source == "multi_image":
        samples_of |= _pictures_of(recipe)
    more: dict[str, Any] = {}
    if negatives is not None:
        finish = partial(with_losers, run / PLAIN, run / "pairs", negatives, seed=recipe.seed)
        more = {"place": PLAIN, "finish": finish}
    makers = {"multi_image": _multi_image, "re_align": _re_align}
    verbs.generate(ROOM, recipe, run, formats=ANSWER_SOURCES, samples_of=samples_of, makers=makers, **more)


def _pictures_of(recipe: VlmRecipe) -> dict[str, Any]:
    """What the questions of a file name: their pictures by name and size, since there may be a hundred thousand."""
    from polyalign.datasets.multi_image.sources import read_questions

    section = recipe.pairs.multi_image
    assert section is not None  # the schema asks for it
    if section.questions is None:
        return {}
    return {"asked_of": read_questions(section.questions, section.pictures, on_bad_row=section.on_bad_row).digest}


def _multi_image(recipe: VlmRecipe, run: RunFolder, adapter: Any, model: Any) -> None:
    from polyalign.modalities.vlm.mia_dpo import MiaDpo

    section = recipe.pairs.multi_image
    assert section is not None  # the schema asks for it
    _made(recipe, run, MiaDpo(adapter, model, None, section, seed=recipe.seed), model, section)


def _re_align(recipe: VlmRecipe, run: RunFolder, adapter: Any, model: Any) -> None:
    from polyalign.modalities.vlm.re_align import ReAlign
    from polyalign.modalities.vlm.re_align_config import ReAlignConfig

    section = recipe.pairs.re_align or ReAlignConfig()
    conditions = ROOM.conditions_of(recipe.pairs.prompts, recipe.seed)
    places = ROOM.places_of(recipe.pairs.prompts)
    given = [
        {
            "pair_id": f"{index:06d}",
            "condition": condition,
            "chosen": condition.get("chosen"),
            "place": places[index] if places else None,
        }
        for index, condition in enumerate(conditions)
    ]
    _made(recipe, run, ReAlign(adapter, model, given, section, seed=recipe.seed), model, section)


def _made(recipe: VlmRecipe, run: RunFolder, maker: Any, model: Any, section: Any) -> None:
    from polyalign.modalities.vlm.pairs import PLAIN, make_pairs

    folder = run / (PLAIN if recipe.pairs.negatives is not None else "pairs")
    settings = {recipe.pairs.source: section.model_dump(mode="json"), "sampler": recipe.sampler.model_dump(mode="json")}
    count = recipe.pairs.prompts_per_shard
    make_pairs(maker, model, folder=folder, seed=recipe.seed, settings=settings, questions_per_shard=count)


def train(recipe: VlmRecipe, run: RunFolder) -> None:
    """Pairs to an adapter, for the recipe's objective and for every arm: writes ``adapter/`` and ``arms/NAME/adapter/``."""
    train_arms(ROOM, recipe, run)


def evaluate(recipe: VlmRecipe, run: RunFolder) -> None:
    """Base and aligned on the same questions and seeds: writes ``samples/`` and ``evaluation.json``."""
    verbs.refuse_several_processes("evaluate", run, modality="vlm")
    verbs.evaluate(ROOM, recipe, run, partial(sampled, recipe, run), finish=partial(write_beside, recipe, run))


def sampled(
    recipe: VlmRecipe, run: RunFolder, name: str, trained: Path | None, conditions: Sequence[Condition], seeds: Sequence[int]
) -> tuple[list[str], None]:
    """Answers of one model, written to ``samples/NAME`` batch by batch; those already there are read again, not made again."""
    adapter, model = open_trained(for_evaluation(recipe), trained)
    return verbs.sampled_texts(adapter, model, run, name, conditions, seeds, batch_size=recipe.sampler.batch_size), None


def write_beside(
    recipe: VlmRecipe,
    run: RunFolder,
    outputs: Mapping[str, Sequence[str]],
    conditions: Sequence[Condition],
    seeds: Sequence[int],
) -> None:
    """What the report shows besides answers: ``samples/outputs.jsonl``, a line for each question and seed with all answers; its
    pictures under ``samples/conditions``; for some of them ``samples/attention``, where base and aligned model look."""
    write_side_by_side(run, outputs, conditions, seeds)
    if recipe.evaluate.attention:
        write_attention(recipe, run, outputs, conditions)


def write_side_by_side(
    run: RunFolder, outputs: Mapping[str, Sequence[str]], conditions: Sequence[Condition], seeds: Sequence[int]
) -> None:
    """``samples/outputs.jsonl`` and the pictures of every question."""
    from polyalign.evaluation.pictured import picture_file

    (run / "samples" / "conditions").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (condition, seed) in enumerate(zip(conditions, seeds, strict=True)):
        files = []
        for place, picture in enumerate(condition.get("images") or ()):
            files.append(picture_file(index, place))
            if not (run / files[-1]).is_file():
                atomic_write(run / files[-1], content_of(picture))
        answers = {name: given[index] for name, given in outputs.items()}
        plain = {key: value for key, value in condition.items() if key != "images"}
        lines.append(json.dumps({**plain, "images": files, "seed": seed, **answers}, ensure_ascii=False) + "\n")
    atomic_write(run / "samples" / "outputs.jsonl", "".join(lines))


def write_attention(
    recipe: VlmRecipe, run: RunFolder, outputs: Mapping[str, Sequence[str]], conditions: Sequence[Condition]
) -> None:
    """``samples/attention``: for some questions, those about several pictures first and of them those whose answer changed, how
    the attention of base and aligned model to the pictures is spread."""
    from polyalign.evaluation.pictured import attention_file
    from polyalign.modalities.vlm.attention_maps import attention_maps

    def pictures(condition: Condition) -> int:
        return len((condition.get("layout") or {}).get("places") or condition.get("images") or ())

    def last(index: int) -> tuple[bool, bool]:
        return pictures(conditions[index]) < 2, outputs["base"][index] == outputs["aligned"][index]

    shown = sorted((index for index, one in enumerate(conditions) if pictures(one)), key=last)[: recipe.evaluate.attention]
    section = recipe.pairs.multi_image
    layer = None if section is None else section.layer
    found: dict[int, dict[str, Any]] = {index: {} for index in shown}
    reasons: dict[str, None] = {}
    with ProgressLine("where the models look", total=2 * len(shown)) as line:
        for name, trained in (("base", None), ("aligned", run / "adapter")):
            adapter, model = open_trained(for_evaluation(recipe), trained)
            for index in list(found):
                try:
                    maps = attention_maps(adapter, model, conditions[index], outputs[name][index], layer)
                    found[index][name] = {"images": [{"map": one.round(6).tolist()} for one in maps]}
                except UserError as error:  # a family that does not say: the answers and their scores stand without it
                    reasons[str(error)] = None
                    del found[index]
                line.advance()
    if reasons:
        said = f"{len(shown) - len(found)} of {len(shown)} questions have no picture of where the models look"
        print(f"{said}: {'; '.join(reasons)}", file=sys.stderr, flush=True)
    (run / "samples" / "attention").mkdir(parents=True, exist_ok=True)
    for index, models in found.items():
        atomic_write(run / attention_file(index), json.dumps({"layer": layer, "models": models}) + "\n")


def report(recipe: VlmRecipe, run: RunFolder) -> None:
    """Whatever the run folder holds, in one page: writes ``report.html`` and ``report.json``, and says the verdict."""
    verbs.report(run)


def export(recipe: VlmRecipe, run: RunFolder, destination: Path, arm: str | None = None) -> None:
    """The trained weights, or those of an arm, where the user wants them: what peft or transformers opens directly.

    Raises:
        UserError: there are none, they are unfinished or of another recipe; something is at the destination; a full disk.
    """
    verbs.export(ROOM, recipe, run, destination, arm)
