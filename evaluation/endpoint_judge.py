"""A judge behind an OpenAI-compatible endpoint: a model that is asked about outputs, of whatever kind.

Answers are read as numbers only: whatever else an endpoint says is an error that quotes it. How a question is put (pictures,
texts) is the business of the judges of each kind.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.evaluation.chat import ChatEndpoint, Content, Unusable

LOWEST, HIGHEST = 0.0, 10.0
MODES, ORDERS = ("pointwise", "pairwise"), ("shuffled", "both")
T = TypeVar("T")
A = TypeVar("A")
Output = TypeVar("Output")


class EndpointJudge(ABC, Generic[Output]):
    """Scores from a model that is asked.

    ``pointwise``: each output alone, the model's number from 0 to 10. ``pairwise``: every two outputs of a prompt that are
    scored together, and an output's score is the share of its comparisons that it won (a tie counts half), from 0 to 1. Which
    of the two is shown first is drawn by ``seed``, the prompt and the outputs, because models favour a place; ``orders: both``
    asks twice, in both orders, and takes the mean. Pairwise scores compare outputs of one prompt with each other and nothing
    else, so they make pairs and do not evaluate: base and aligned are scored apart there.

    What the endpoint runs cannot be hashed from here: ``version`` names its host and model. It need not answer the same twice.

    Args:
        url: of the API, such as ``http://127.0.0.1:8000/v1``; ``/chat/completions`` is added.
        model: the endpoint's name of it.
        mode: ``pointwise`` or ``pairwise``.
        question: in place of the built-in one; ``{prompt}`` becomes the prompt. It must ask for the same form of answer.
        key_variable: the environment variable that holds the API key; null sends none. Keys do not belong in recipes.
        orders: of a pairwise question: ``shuffled`` or ``both``.
        seed: of the order.
        workers: questions asked at the same time.
        request: further fields of the request, over ``temperature: 0``; null takes a field away.
        options: ``retries``, ``backoff``, ``timeout`` and ``answers``, see :class:`~polyalign.evaluation.chat.ChatEndpoint`.
        label: the name in scores and reports; null is the judge's own.

    Raises:
        UserError: an option is none of the allowed, or the environment variable is not set.
    """

    name: str
    one: str
    many: str
    """What an output is called in messages."""
    pointwise: str
    pairwise: str
    """The built-in questions."""

    def __init__(
        self,
        *,
        url: str,
        model: str,
        mode: str = "pointwise",
        question: str | None = None,
        key_variable: str | None = None,
        orders: str = "shuffled",
        seed: int = 0,
        workers: int = 4,
        request: Mapping[str, Any] | None = None,
        label: str | None = None,
        **options: Any,
    ):
        judge = f"the judge '{self.name}'"
        for option, value, allowed in (("mode", mode, MODES), ("orders", orders, ORDERS)):
            if value not in allowed:
                raise UserError(f"{judge}: {option} is {value!r}; allowed: {', '.join(allowed)}")
        if not isinstance(workers, int) or workers < 1:
            raise UserError(f"{judge}: workers is {workers!r}; a whole number from 1 is needed")
        self.mode, self.orders, self.seed, self.workers = mode, orders, seed, workers
        self.question = question or (self.pointwise if mode == "pointwise" else self.pairwise)
        for place, what in self.places().items():
            if place not in self.question:
                raise UserError(f"{judge}: question is {self.question!r}; it needs {place}, where {what} goes")
        self.name = label or self.name
        self.relative = mode == "pairwise"
        """Whether scores compare outputs of one call with each other, and say nothing of another call's."""
        self.endpoint = ChatEndpoint(self.name, url, model, key_variable, request or {}, **options)
        asked = hashlib.sha256(self.question.encode()).hexdigest()[:8]
        self.version = f"1 {model} at {self.endpoint.host}, {mode}, question {asked}"
        if self.relative:
            self.version += f", orders {orders}" + (f" {seed}" if orders == "shuffled" else "")

    @abstractmethod
    def places(self) -> Mapping[str, str]:
        """What a question has to have for the mode, such as ``{prompt}``, and what goes there."""

    @abstractmethod
    def prompt(self, condition: Mapping[str, Any]) -> str:
        """The condition in words. Outputs are compared where this is the same."""

    @abstractmethod
    def content(self, prompt: str, outputs: Sequence[Output]) -> Content:
        """The question about one output, or about two in the order in which they are shown, as the content of a message."""

    @abstractmethod
    def mark(self, output: Output) -> str:
        """A hash: equal for outputs that are equal to the eye, and the order of a comparison is drawn by it."""

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Output]) -> list[float]:
        """A score for each output.

        Raises:
            UserError: the endpoint cannot be reached, or answers what is no answer, after all retries; in pairwise mode a
                prompt with a single output.
        """
        if len(conditions) != len(outputs):
            raise ValueError(f"{len(outputs)} {self.many} for {len(conditions)} conditions")
        prompts = [self.prompt(condition) for condition in conditions]
        before = self.endpoint.failures.copy()
        scores = self._pairwise(prompts, outputs) if self.relative else self._pointwise(prompts, outputs)
        again = self.endpoint.failures - before
        if again:
            counted = ", ".join(f"{count} {kind}" for kind, count in sorted(again.items()))
            logging.getLogger(__name__).warning("the judge '%s': questions asked again: %s", self.name, counted)
        return scores

    def _pointwise(self, prompts: Sequence[str], outputs: Sequence[Output]) -> list[float]:
        return self._all(lambda pair: self._ask(pair[0], [pair[1]], _score), list(zip(prompts, outputs, strict=True)))

    def _pairwise(self, prompts: Sequence[str], outputs: Sequence[Output]) -> list[float]:
        of_prompt: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            of_prompt.setdefault(prompt, []).append(index)
        alone = [prompt for prompt, places in of_prompt.items() if len(places) < 2]
        if alone:
            raise UserError(
                f"the judge '{self.name}' compares {self.many} of one prompt with each other, and {len(alone)} prompts have "
                f"one {self.one}, such as {alone[0]!r}. Take mode: pointwise there"
            )
        pairs = [pair for places in of_prompt.values() for pair in itertools.combinations(places, 2)]
        shares = self._all(self._compare, [(prompts[left], outputs[left], outputs[right]) for left, right in pairs])
        points, games = [0.0] * len(outputs), [0] * len(outputs)
        for (left, right), share in zip(pairs, shares, strict=True):
            points[left], points[right] = points[left] + share, points[right] + 1 - share
            games[left], games[right] = games[left] + 1, games[right] + 1
        return [won / played for won, played in zip(points, games, strict=True)]

    def _compare(self, question: tuple[str, Output, Output]) -> float:
        """The left output's share of a comparison: 1 won, 0 lost, 1/2 tie. Equal outputs tie without being shown."""
        prompt, left, right = question
        marks = [self.mark(output) for output in (left, right)]
        if marks[0] == marks[1]:
            return 0.5
        shares = []
        if self.orders == "both" or not self.swapped(prompt, marks):
            shares.append(self._ask(prompt, [left, right], _first_better))
        if self.orders == "both" or self.swapped(prompt, marks):
            shares.append(1 - self._ask(prompt, [right, left], _first_better))
        return sum(shares) / len(shares)

    def swapped(self, prompt: str, marks: Sequence[str]) -> bool:
        """Whether the second of two outputs (by their marks) is shown first; the same for either way round."""
        draw = seed_of(self.seed, "order of a comparison", prompt, *sorted(marks)) % 2
        return bool(draw) != (marks[0] > marks[1])

    def _ask(self, prompt: str, outputs: Sequence[Output], read: Callable[[str], float]) -> float:
        return self.endpoint.ask(self.content(prompt, outputs), read)

    def _all(self, ask: Callable[[T], A], questions: Sequence[T]) -> list[A]:
        """Answers in the order of the questions; the first that fails ends those that have not begun."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            return list(pool.map(ask, questions))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def filled(question: str, values: Mapping[str, str]) -> str:
    """``question`` with every place (a key of ``values``, such as ``{prompt}``) filled, in one pass: what a prompt or an output
    says about places is left as it is."""
    places = "|".join(re.escape(place) for place in values)
    return re.sub(places, lambda found: values[found[0]], question)


def _score(answer: str) -> float:
    score = _number(answer, "score")
    if not LOWEST <= score <= HIGHEST:
        raise Unusable(f"a score from {LOWEST:g} to {HIGHEST:g} was asked for")
    return score


def _first_better(answer: str) -> float:
    shares = {1.0: 1.0, 2.0: 0.0, 0.0: 0.5}
    better = _number(answer, "better")
    if better not in shares:
        raise Unusable("1, 2 or 0 was asked for")
    return shares[better]


def _number(answer: str, key: str) -> float:
    """The number under ``key`` of the last JSON object in an answer, or an answer that is only a number."""
    for found in reversed(re.findall(r"\{[^{}]*\}", answer)):
        try:
            value = json.loads(found).get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        except (ValueError, OverflowError):  # no JSON, or an integer that no float can hold
            continue
    if re.fullmatch(r"\s*\d{1,3}(\.\d{1,6})?\s*", answer):
        return float(answer)
    raise Unusable(f'{{"{key}": N}} was asked for')
