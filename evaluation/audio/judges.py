"""Judges of sounds: how well a sound fits its caption (CLAP score), and whether its events come in the caption's order."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.audio import clap, tagger
from polyalign.evaluation.audio.locating import ClapLocator, Locator, TaggerLocator, Windows
from polyalign.evaluation.audio.phrases import Groups, split
from polyalign.evaluation.audio.sound import RESAMPLER, Sound
from polyalign.evaluation.audio.temporal import Found, Outcome, outcome
from polyalign.evaluation.network_judge import NetworkJudge, batches, prompts_of

SCORES = ("graded", "strict", "order", "recall")
WORLDS: Mapping[str, tuple[str, str]] = {
    "sounds": ("polyalign.datasets.worlds.sounds", "polyalign.datasets.worlds.sound_detector"),
}
"""Worlds by name: a module with ``parse(prompt)``, whose result has ``groups``, and one with ``detect(sound)``."""


class _FolderJudge(NetworkJudge):
    """A judge on one network in transformers' layout."""

    def __init__(self, *, model: str, **options: Any):
        super().__init__(**options)
        files.check(model, f"the judge '{self.name}': model")
        self.model, self.sources = model, (model,)

    @cached_property
    def folder(self) -> Path:
        """Where the network is on this machine; fetched from the hub if it is not."""
        return files.folder(self.model, f"the judge '{self.name}': model", weights=True)

    def weights(self) -> str:
        return f"{files.identity(self.model, files.weight_files(self.folder))}, resampled by {RESAMPLER}"


class ClapJudge(_FolderJudge):
    """CLAP score: cosine of sound and caption in [-1, 1]. Tango 2 reports its mean (0.43 to 0.57) with 630k-audioset-best.

    It hardly sees the order of events: "a bell then a drum" and "a drum then a bell" score alike. Pairs that were chosen by one
    checkpoint are better judged by another one. Only the first ten seconds are heard.

    Args:
        model: folder or hub id of a ClapModel without fusion.
        options: see :class:`~polyalign.evaluation.network_judge.NetworkJudge`.
    """

    name = "clap"
    formula = "1"

    def __init__(self, *, model: str = "laion/clap-htsat-unfused", **options: Any):
        super().__init__(model=model, **options)

    @cached_property
    def clap(self) -> clap.Clap:
        """Both towers, read when they are first needed."""
        return clap.read(self.folder, device=self.device, dtype=self.dtype)

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Sound]) -> torch.Tensor:
        return self.clap.cosine(prompts_of(conditions), outputs)


class _Graded:
    """What the judges of order share: an :class:`~polyalign.evaluation.audio.temporal.Outcome` of each sound, and its score."""

    right_from = 1.0

    def _choose(self, judge: str, score: str) -> None:
        if score not in SCORES:
            raise UserError(f"the judge '{judge}': score is {score!r}; allowed: {', '.join(SCORES)}")
        self.kind = score

    @abstractmethod
    def outcomes(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Sound]) -> list[Outcome]:
        """What is there of what was asked for, and in which order, sound by sound."""

    def _scores(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Sound]) -> list[float]:
        return [float(getattr(one, self.kind)) for one in self.outcomes(conditions, outputs)]


class CaptionOrderJudge(_Graded, _FolderJudge):
    """Finds the events of a caption in the sound and holds their order against the caption's.

    The caption is split at its connectives (:func:`~polyalign.evaluation.audio.phrases.split`), each phrase is looked for in
    sliding windows, and an event starts where its curve first passes half of its maximum. Nothing is said of extra events, for
    only the caption's own are looked for. Measure it on mixes of known order before you trust it
    (:func:`~polyalign.evaluation.audio.temporal.summary` of their outcomes).

    Args:
        model: folder or hub id of the network.
        score: ``graded`` ((recall + order) / 2, and 1 for a strict match), ``strict`` (0 or 1), ``order``, ``recall``.
        width, hop: of the windows, in seconds.
        presence: the curve's value from which a phrase counts as heard.
        share: of the maximum from which a window belongs to an event.
        floor: of the curve, see :class:`~polyalign.evaluation.audio.locating.Windows`.
        options: see :class:`~polyalign.evaluation.network_judge.NetworkJudge`; ``batch_size`` counts windows.

    Raises:
        UserError: an option is none of the allowed.
    """

    formula = "1"
    presence = 0.2

    def __init__(
        self,
        *,
        model: str,
        score: str = "graded",
        width: float = 2.0,
        hop: float = 0.5,
        presence: float | None = None,
        share: float = 0.5,
        floor: float = 0.0,
        **options: Any,
    ):
        super().__init__(model=model, **options)
        self._choose(self.name, score)
        least = self.presence if presence is None else presence
        self.windows = Windows(width=width, hop=hop, presence=least, share=share, floor=floor, batch=self.batch_size)

    @cached_property
    def version(self) -> str:
        """Score and windows besides the weights, since each changes the score."""
        return f"{self.formula} {self.kind}, {self.windows} {self.weights()}"

    @property
    @abstractmethod
    def locator(self) -> Locator:
        """What finds phrases; its network is read when it is first needed."""

    def outcomes(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Sound]) -> list[Outcome]:
        found = []
        for condition, sound in zip(conditions, outputs, strict=True):
            asked = asked_of(condition)
            names = [phrase for group in asked for phrase in group]
            found.append(outcome(asked, self.locator(sound, names), closed=False))
        return found

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Sound]) -> torch.Tensor:
        return torch.tensor(self._scores(conditions, outputs))


class ClapOrderJudge(CaptionOrderJudge):
    """:class:`CaptionOrderJudge` by the cosine of CLAP in each window."""

    name = "clap_order"

    def __init__(self, *, model: str = "laion/clap-htsat-unfused", **options: Any):
        super().__init__(model=model, **options)

    @cached_property
    def locator(self) -> Locator:
        return ClapLocator(clap.read(self.folder, device=self.device, dtype=self.dtype), self.windows)


class AstOrderJudge(CaptionOrderJudge):
    """:class:`CaptionOrderJudge` by the probabilities of an AudioSet tagger in each window.

    Args:
        labels: the tagger's labels that a phrase means, by phrase; other phrases take the labels that share most words with
            them. A phrase that shares none is refused.
    """

    name = "ast_order"

    def __init__(
        self,
        *,
        model: str = "MIT/ast-finetuned-audioset-10-10-0.4593",
        labels: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ):
        super().__init__(model=model, **options)
        self.labels = dict(labels or {})

    @cached_property
    def locator(self) -> Locator:
        return TaggerLocator(tagger.read(self.folder, device=self.device), self.windows, self.labels)


class EventOrderJudge(_Graded):
    """Order by the exact detector of a world of synthesised events: presence, extra events, order, strict match.

    Args:
        detector: the world's name.
        score: as of :class:`CaptionOrderJudge`.
        label: the judge's name in scores and reports; null is ``event_order``.
    """

    name = "event_order"

    def __init__(self, *, detector: str = "sounds", score: str = "graded", label: str | None = None):
        if detector not in WORLDS:
            raise UserError(f"the judge 'event_order': detector is {detector!r}; allowed: {', '.join(WORLDS)}")
        self._choose(self.name, score)
        self.name, self.version, self.detector = label or self.name, f"1 {score}, {detector}", detector
        self.world, self.finder = (importlib.import_module(name) for name in WORLDS[detector])

    def refuse(self, condition: Mapping[str, Any]) -> None:
        """Raises UserError for a prompt that the world does not know."""
        self._asked(str(condition["prompt"]))

    def outcomes(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Sound]) -> list[Outcome]:
        """Raises UserError for a prompt that the world does not know."""
        pairs = zip(conditions, outputs, strict=True)
        return [outcome(self._asked(str(condition["prompt"])), self._found(sound)) for condition, sound in pairs]

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Sound]) -> list[float]:
        """A score for each sound."""
        return [score for part in batches(conditions, outputs, 64) for score in self._scores(*part)]

    def _asked(self, prompt: str) -> Groups:
        try:
            return self.world.parse(prompt).groups
        except ValueError as error:
            raise UserError(f"the judge '{self.name}' with detector: {self.detector}: {error}") from error

    def _found(self, sound: Sound) -> Sequence[Found]:
        return self.finder.detect(sound)


def asked_of(condition: Mapping[str, Any]) -> Groups:
    """What a condition asks for, from its prompt.

    Raises:
        UserError: the prompt is empty.
    """
    asked = split(str(condition["prompt"]))
    if not asked:
        raise UserError(f"the prompt {condition['prompt']!r} names no event")
    return asked
