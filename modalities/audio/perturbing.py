"""Who writes perturbed captions: the rules of :mod:`polyalign.datasets.audio.perturb`, or a model behind an endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from polyalign.datasets.audio.perturb import Perturbed, is_temporal, perturbations, phrases_of
from polyalign.evaluation.chat import ChatEndpoint, Unusable
from polyalign.modalities.audio.config import EndpointConfig, PairsConfig

Writer = Callable[[str, str, int], list[Perturbed]]
"""``writer(prompt, strategy, count)``: at most ``count`` captions that are partly wrong."""

WRITTEN = "endpoint"
"""The kind of a perturbation that a model wrote."""

QUESTION = (
    "This caption describes a sound: {prompt}\n"
    "Write {count} captions of other sounds, of about the same length. Each should share some of what is heard with this one "
    "and differ in the rest, so that the caption above would be partly wrong for it. {more}"
    "Answer with a JSON list of {count} texts, and nothing else."
)
OF_TIME = "Change what comes when: another order, one event more, or one less. "


def writer_of(pairs: PairsConfig, conditions: Sequence[Mapping[str, Any]], folder: Path, seed: int) -> Writer:
    """The writer that a recipe asks for. Rules take events in from the world's, or from the other prompts; an endpoint's
    answers are kept in ``folder``.

    Raises:
        UserError: the endpoint's address or key is none.
    """
    if pairs.strategies.endpoint is not None:
        return _asking(pairs.strategies.endpoint, folder / "answers.jsonl")
    if pairs.prompts is not None and pairs.prompts.world is not None:
        from polyalign.datasets.worlds.sounds import PHRASES

        others = list(PHRASES.values())
    else:
        others = phrases_of([condition["prompt"] for condition in conditions])
    return partial(_by_rules, others=others, seed=seed)


def _by_rules(prompt: str, strategy: str, count: int, *, others: Sequence[str], seed: int) -> list[Perturbed]:
    return perturbations(prompt, strategy, count, others=others, seed=seed)


def _asking(given: EndpointConfig, answers: Path) -> Writer:
    endpoint = ChatEndpoint("perturbed captions", given.url, given.model, given.key_variable, {}, answers=str(answers))

    def write(prompt: str, strategy: str, count: int) -> list[Perturbed]:
        if strategy == "3" and not is_temporal(prompt):
            return []
        more = OF_TIME if strategy == "3" else ""
        question = QUESTION.format(prompt=json.dumps(prompt, ensure_ascii=False), count=count, more=more)
        found = endpoint.ask(question, lambda answer: captions_in(answer, prompt))
        return [Perturbed(text, WRITTEN) for text in found[:count]]

    return write


def captions_in(answer: str, prompt: str) -> list[str]:
    """The captions of an answer, each once, without the prompt itself.

    Raises:
        Unusable: it is no list of texts.
    """
    found = re.search(r"\[.*\]", answer, re.DOTALL)
    try:
        given = json.loads(found[0]) if found else None
    except (ValueError, RecursionError) as error:
        raise Unusable("a JSON list of texts was asked for") from error
    if not isinstance(given, list) or not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise Unusable("a JSON list of texts was asked for")
    texts = [" ".join(text.split()) for text in given]
    return [text for text in dict.fromkeys(texts) if text.casefold() != prompt.casefold()]
