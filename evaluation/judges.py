"""The judges by name. One visible table of ours; others' come through the entry-point group ``polyalign.judges``.

A package adds a judge with, in its own ``pyproject.toml``::

    [project.entry-points."polyalign.judges"]
    mine = "my_package.my_module:MyJudge"

Recipes name judges and never import paths, so that reading a stranger's recipe runs no code that is not installed.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from polyalign.core.adapter import Judge
from polyalign.core.errors import UserError

GROUP = "polyalign.judges"
ABSENT = object()

PICTURE_JUDGES: Mapping[str, str] = {
    "shapes": "polyalign.datasets.worlds.shapes:ShapesJudge",
    "reference_style": "polyalign.datasets.reference_pictures:ReferenceStyleJudge",
    "reference_name": "polyalign.datasets.reference_pictures:ReferenceNameJudge",
    "saturation": "polyalign.evaluation.image_statistics:SaturationJudge",
    "high_frequency": "polyalign.evaluation.image_statistics:HighFrequencyJudge",
    "clipping": "polyalign.evaluation.image_statistics:ClippingJudge",
    "clip_score": "polyalign.evaluation.image_judges.clip_judges:ClipScoreJudge",
    "pickscore": "polyalign.evaluation.image_judges.clip_judges:PickScoreJudge",
    "laion_aesthetics": "polyalign.evaluation.image_judges.clip_judges:AestheticsJudge",
    "hpsv2": "polyalign.evaluation.image_judges.hps:HPSv2Judge",
    "hpsv2.1": "polyalign.evaluation.image_judges.hps:HPSv21Judge",
    "imagereward": "polyalign.evaluation.image_judges.image_reward:ImageRewardJudge",
    "geneval": "polyalign.evaluation.image_judges.geneval_world:geneval_judge",
    "caption_bridge": "polyalign.evaluation.image_judges.bridge:CaptionBridgeJudge",
    "mixture": "polyalign.evaluation.image_judges.mixture:MixtureJudge",
    "http": "polyalign.evaluation.image_judges.endpoint:HttpJudge",
}

TEXT_JUDGES: Mapping[str, str] = {
    "clinical": "polyalign.datasets.worlds.clinical:ClinicalJudge",
    "scenes": "polyalign.datasets.worlds.scenes_questions:ScenesJudge",
    "objects": "polyalign.evaluation.vlm.objects_judge:ObjectsJudge",
    "text_rules": "polyalign.evaluation.text_judges.rules:RulesJudge",
    "reward_model": "polyalign.evaluation.text_judges.reward_model:RewardModelJudge",
    "implicit_reward_text": "polyalign.evaluation.text_judges.implicit_reward:ImplicitRewardTextJudge",
    "clinical_facts": "polyalign.evaluation.text_metrics.facts:ClinicalFactsJudge",
    "rouge_l": "polyalign.evaluation.text_metrics.rouge:RougeLJudge",
    "bert_similarity": "polyalign.evaluation.text_metrics.similarity:BertSimilarityJudge",
    "http_text": "polyalign.evaluation.text_judges.endpoint:HttpTextJudge",
}

SOUND_JUDGES: Mapping[str, str] = {
    "sounds": "polyalign.datasets.worlds.sound_detector:SoundsJudge",
    "clap": "polyalign.evaluation.audio.judges:ClapJudge",
    "clap_order": "polyalign.evaluation.audio.judges:ClapOrderJudge",
    "ast_order": "polyalign.evaluation.audio.judges:AstOrderJudge",
    "event_order": "polyalign.evaluation.audio.judges:EventOrderJudge",
    "http_sound": "polyalign.evaluation.audio.endpoint:HttpSoundJudge",
}

JUDGES: Mapping[str, str] = {**PICTURE_JUDGES, **TEXT_JUDGES, **SOUND_JUDGES}

OF_OUTPUTS: Mapping[str, Mapping[str, str]] = {"picture": PICTURE_JUDGES, "text": TEXT_JUDGES, "sound": SOUND_JUDGES}
"""Our judges by the kind of outputs that they judge."""


class JudgeSpec(Protocol):
    """What a recipe says of a judge (``JudgeConfig`` of the recipe has these)."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def options(self) -> Mapping[str, Any]: ...


class Panel:
    """Several judges as one: the weighted sum of their scores. A single judge of weight 1 scores as itself."""

    def __init__(self, judges: Sequence[Judge], weights: Sequence[float]):
        self.judges = list(judges)
        self.weights = [float(weight) for weight in weights]
        terms = zip(self.judges, self.weights, strict=True)
        self.name = " + ".join(judge.name if weight == 1 else f"{weight:g} {judge.name}" for judge, weight in terms)
        self.relative = any(getattr(judge, "relative", False) for judge in self.judges)
        terms = zip(self.judges, self.weights, strict=True)
        self.parts = [part for judge, weight in terms if weight != 0 for part in parts(judge)]
        """Names of the judges that have a say, without their weights."""

    @property
    def version(self) -> str:
        """Asked for only when it is needed: a version may be a hash of weights."""
        return "+".join(judge.version for judge in self.judges)

    def score(self, conditions: Sequence[Any], outputs: Sequence[Any]) -> list[float]:
        """sum_j weight_j * score_j, a number for each output."""
        totals = [0.0] * len(outputs)
        for judge, weight in zip(self.judges, self.weights, strict=True):
            scores = judge.score(conditions, outputs)
            totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
        return totals


def names() -> list[str]:
    """Every judge that can be built here: ours, then those of installed packages."""
    return [*JUDGES, *sorted(set(_installed()) - set(JUDGES))]


def build(spec: JudgeSpec, outputs: str | None = None) -> Judge:
    """The judge a recipe names, made with its options as keyword arguments. ``weight`` is :func:`panel`'s business.

    A class may have ``EXAMPLE``, options as a recipe writes them, for the message where they do not fit.

    Args:
        outputs: the kind at hand, whose judges are named first where this one is unknown.

    Raises:
        UserError: no judge of that name, it does not import, it refuses the options, or what it makes is no judge.
    """
    maker = _maker(spec.name, outputs)
    try:
        judge = maker(**dict(spec.options))
    except TypeError as error:
        raise UserError(_refused_options(spec, maker, error)) from error
    # Looked for without asking: a version is often a hash of weights, which are read, or fetched, only when they are needed.
    absent = [part for part in ("name", "version", "score") if inspect.getattr_static(judge, part, ABSENT) is ABSENT]
    if absent:
        raise UserError(
            f"the judge '{spec.name}' made a {type(judge).__name__} without {', '.join(absent)}; a judge has a name, a version "
            "and score(conditions, outputs) -> list of floats, higher for better"
        )
    return judge


def panel(specs: Sequence[JudgeSpec]) -> Judge:
    """One judge from the recipe's list: the judge itself if it is alone with weight 1, else the weighted sum of all.

    Raises:
        UserError: the list is empty, or one of them cannot be built (see :func:`build`).
    """
    if not specs:
        raise UserError(f"no judge is named; choose one or more of: {', '.join(names())}")
    judges = [build(spec) for spec in specs]
    if len(judges) == 1 and specs[0].weight == 1:
        return judges[0]
    return Panel(judges, [spec.weight for spec in specs])


def parts(judge: Judge) -> list[str]:
    """The names, without weights, of the judges whose scores make up this one's: its own name unless it is a :class:`Panel`."""
    return list(getattr(judge, "parts", [judge.name]))


def refuse_conditions(judges: Sequence[Judge], conditions: Iterable[Any]) -> None:
    """Raises UserError for a prompt that one of the judges cannot judge, before anything is sampled for it. A judge of a world
    says so by its method ``refuse(condition)``; the others take any prompt."""
    parts = [part for judge in judges for part in getattr(judge, "judges", [judge])]
    refusing = [part for part in parts if hasattr(part, "refuse")]
    for condition in conditions:
        for judge in refusing:
            judge.refuse(condition)


def refuse_unfit(judges: Sequence[Judge]) -> None:
    """Raises UserError where judges cannot evaluate together: two of one name, of which one would hide the other, or one whose
    scores of two calls do not compare (its attribute ``relative``), as base and aligned are scored in two."""
    names = [judge.name for judge in judges]
    for judge in judges:
        if names.count(judge.name) > 1:
            raise UserError(
                f"two judges of the evaluation are called '{judge.name}', and one would hide the other. Leave one out, or give "
                "each a name with its option 'label' where it has one"
            )
        if getattr(judge, "relative", False):
            raise UserError(
                f"the judge '{judge.name}' compares outputs of one prompt with each other, so its scores of the base and of "
                "the aligned model, which are asked for apart, would say nothing. Take its other mode (pointwise) here"
            )


def refuse_other_outputs(names: Sequence[str], outputs: str) -> None:
    """Raises UserError if one of our judges named is for outputs of another kind. Of others' judges nothing is known."""
    able = OF_OUTPUTS[outputs]
    for name in names:
        kind = next((kind for kind, rows in OF_OUTPUTS.items() if name in rows), outputs)
        if kind != outputs:
            raise UserError(
                f"the judge '{name}' judges {kind}s, and these outputs are {outputs}s. Take one of: {', '.join(able)}"
            )


def checked_scores(
    judge: Judge, conditions: Sequence[Any], outputs: Sequence[Any], *, seeds: Sequence[int] | None = None, where: str = ""
) -> list[float]:
    """The judge's scores, one finite number for each output.

    Args:
        conditions: condition i is what output i was made from; its "prompt" is named if the score is no number.
        seeds: what the outputs were drawn with, for the message.
        where: what the reader should know besides, for the end of the message ("finished shards are kept").

    Raises:
        UserError: another number of scores than outputs, or a score that is not finite.
    """
    name, after = f"the judge '{judge.name}' (version {judge.version})", f"; {where}" if where else ""
    scores = [float(score) for score in judge.score(conditions, outputs)]
    if len(scores) != len(outputs):
        raise UserError(f"{name} gave {len(scores)} scores for {len(outputs)} outputs{after}")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            seed = f", seed {seeds[index]}" if seeds is not None else ""
            raise UserError(
                f"{name} gave {score} for output {index}, prompt {conditions[index]['prompt']!r}{seed}; "
                f"scores must be finite numbers{after}"
            )
    return scores


def _refused_options(spec: JudgeSpec, maker: Any, error: TypeError) -> str:
    """Which options a judge lacks, or does not have; of any other ``TypeError`` what it says."""
    parameters = inspect.signature(maker).parameters.values()
    taken = {item.name: item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
    lacking = [name for name, item in taken.items() if item.default is item.empty and name not in spec.options]
    passed_on = any(item.kind is item.VAR_KEYWORD for item in parameters)
    unknown = [] if passed_on else [name for name in spec.options if name not in taken]
    said = [f"it needs {', '.join(lacking)}"] if lacking else []
    said += [f"it has no option {', '.join(unknown)}"] if unknown else []
    said += [f"its options: {', '.join(taken) or 'none'}"] if said else [str(error)]
    example = getattr(maker, "EXAMPLE", None) or f"{{{', '.join(f'{name}: ...' for name in lacking)}}}"
    shown = f". For example: {{name: {spec.name}, options: {example}}}" if lacking else ""
    return f"the judge '{spec.name}' cannot be made with the options {dict(spec.options)}: {'; '.join(said)}{shown}"


def _unknown(name: str, outputs: str | None) -> str:
    """That there is no such judge, and which there are: those for the outputs at hand before those for others."""
    fitting = list(OF_OUTPUTS.get(outputs or "", {}))
    everyone = [*fitting, *(other for other in names() if other not in fitting)]
    close = difflib.get_close_matches(name, fitting, n=1) or difflib.get_close_matches(name, everyone, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    known = f"Known here: {', '.join(everyone)}"
    if fitting:
        foreign = [other for other in JUDGES if other not in fitting]
        of_packages = [other for other in names() if other not in JUDGES]
        known = f"Known here for {outputs}s: {', '.join([*fitting, *of_packages])}; for other outputs: {', '.join(foreign)}"
    return (
        f"there is no judge '{name}'; {hint}{known}. A judge of your own comes from an installed package with an entry point "
        f"in the group '{GROUP}'"
    )


def _maker(name: str, outputs: str | None = None) -> Any:
    installed = _installed()
    if name in JUDGES:
        path = JUDGES[name]
    elif name in installed:
        path = installed[name].value
    else:
        raise UserError(_unknown(name, outputs))
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the judge '{name}' ({path}) does not import here: {error}") from error


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
