"""How MIA-DPO's pairs are made (arXiv 2410.17637): questions of several images, rejected answers, and what is selected.

Nothing here imports torch, so that a recipe is explained at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from polyalign.core.config import Section

FormatName = Literal["sequence", "grid", "picture_in_picture"]
Level = Literal["compare", "search"]
Rule = Literal["threshold", "not_first"]
Thresholds = Mapping[str, Mapping[int, float]]
Shares = Mapping[str, Mapping[int, float]]

THRESHOLDS: Thresholds = {
    "sequence": {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6},
    "grid": {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3},
    "picture_in_picture": {2: 0.8},
}
"""The released code's, by format and number of images: a wrong answer whose ratio is below (in sequences: at most) this looked
elsewhere."""

PUBLISHED: Shares = {
    "sequence": {2: 1200, 3: 350, 4: 350, 5: 295},
    "grid": {2: 3800, 3: 1100, 4: 1100, 6: 1100, 9: 900},
    "picture_in_picture": {2: 1},
}
"""Shares of the numbers of images within a format, as in :mod:`polyalign.datasets.multi_image`."""

PUBLISHED_PAIRS: Mapping[str, float] = {"sequence": 15.1, "grid": 9.3, "picture_in_picture": 4.5}
"""Thousands of pairs by format, of LLaVA-1.5 (table 8)."""

NUMBERS: Mapping[str, tuple[int, ...]] = {
    "sequence": tuple(range(2, 17)),
    "grid": (2, 3, 4, 6, 9),
    "picture_in_picture": (2,),
}
"""Numbers of images that a format has."""

OF_THE_WORLD: Mapping[str, tuple[int, ...]] = {"sequence": (2, 3, 4), "grid": (2, 3, 4)}
"""What the world `scenes` has of it."""


class FilterConfig(Section):
    """What a pair has to fulfil; null turns a filter off."""

    chosen_below: int | None = Field(default=512, ge=1)
    """Characters that a right answer stays below. Released code."""

    perplexity: float | None = Field(default=1.1, ge=1.0)
    """The wrong answer's perplexity is above this: below it the model only repeats what it is sure of. Released code."""

    attention: Rule | None = "threshold"
    """The wrong answer did not look at its image: by the thresholds, or because another image was looked at most."""

    thresholds: dict[str, dict[int, float]] | None = None
    """Of the attention ratio, by format and number of images: `{sequence: {2: 0.8}}`. Null is the released ones."""

    length_ratio: tuple[float, float] | None = (0.1, 10.0)
    """Least and largest length of the wrong answer over that of the right one, in characters. Ours."""

    edit_distance: float | None = Field(default=0.1, ge=0.0, le=1.0)
    """Least edit distance of the two, in characters, over the longer length. Ours."""

    @property
    def limits(self) -> Thresholds:
        """The thresholds that count."""
        return THRESHOLDS if self.thresholds is None else self.thresholds


class RejectedConfig(Section):
    """How the model gives the answer that may become the rejected one: one answer a question."""

    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy, as published. Higher ones cut the distribution as the recipe's sampling says."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Null is what the recipe's sampling says; published: 512."""


class MultiImageConfig(Section):
    """MIA-DPO's pairs: single-image questions asked of one of several images, the model's own wrong answers rejected.

    Questions come from the world `scenes` (`world` and `count`), or from single-image data of yours (`questions`).
    """

    world: Literal["scenes"] | None = None
    """Questions of a world whose pictures are drawn here and whose answers are known exactly."""

    count: int | None = Field(default=None, ge=1)
    """How many questions: needed for a world; null is as many as the data have entries. Formats, levels and single images draw
    theirs each for itself: a question is asked at most once in each of them, and may be asked in several or in none. Of a
    LLaVA conversation the first turn is asked, as published (for `levels` any turn)."""

    tasks: tuple[str, ...] | None = None
    """Tasks of the world, each as often; null is all that may be asked of one of several pictures."""

    questions: str | None = None
    """A LLaVA `.json`, a `.jsonl` of {image, question, answer}, or a folder with `questions.jsonl`."""

    pictures: str | None = None
    """The folder below which `questions` names its pictures; null is its own."""

    on_bad_row: Literal["error", "drop"] = "error"
    """An entry or picture that cannot be used ends the run, or is left out and counted."""

    across_sources: bool = False
    """Other images from all sources of the data, not only from the question's own (as published)."""

    formats: dict[FormatName, dict[int, float]] | None = None
    """Shares by format and number of images, such as `{sequence: {2: 3, 3: 1}, grid: {2: 1}}`. Null is the paper's proportions,
    of the world as far as it has them (sequences and collages of 2 to 4)."""

    levels: dict[Level, float] = {}
    """Shares of two harder kinds of question (arXiv 2604.18512): `compare` names two images, `search` none. They need data that
    ask the same of several pictures, and are laid out as `formats` says of sequences and collages."""

    single: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of questions that are asked of their single image, so that this skill stays. Ours."""

    rejected: RejectedConfig = RejectedConfig()
    """How the model's answer is drawn."""

    balance: bool = True
    """Where the model is right, the answer that is right of another image becomes the rejected one. False: pairs from mistakes
    only, as published. Pairs from mistakes only have made small models worse, though every training curve looked perfect."""

    noise: bool = False
    """Show the model noised collages and pictures in pictures when it answers, as the released code does and the paper does not
    say. Pairs have the clean pictures."""

    filter: FilterConfig = FilterConfig()
    """Which pairs are kept."""

    layer: int | None = Field(default=None, ge=0)
    """The layer whose attention is recorded, counted from 0; null is the middle one, 16 of 32, as published."""

    every_layer: bool = False
    """Record all layers and tell of each how well its ratio parts right from wrong answers. The filter takes `layer`."""

    compat: bool = False
    """Cells of collages as the released code cuts them, which the padding of a wide collage makes wrong. LLaVA-1.5 alone."""

    @property
    def shares(self) -> Shares:
        """The share of each format and number of images among the multi-image questions; not normalised."""
        if self.formats is not None:
            return {name: given for name, given in self.formats.items()}
        numbers = NUMBERS if self.world is None else OF_THE_WORLD
        return {
            name: {n: PUBLISHED_PAIRS[name] * share / sum(PUBLISHED[name].values()) for n, share in given.items() if n in known}
            for name, given in PUBLISHED.items()
            if (known := numbers.get(name))
        }

    @model_validator(mode="after")
    def _whole(self) -> MultiImageConfig:
        self._check_source()
        self._check_formats()
        if self.filter.attention == "threshold":
            self._check_thresholds()
        return self

    def _check_source(self) -> None:
        if (self.world is None) == (self.questions is None):
            raise ValueError("questions come from either 'world' (scenes) or 'questions' (a file or folder); give one of them")
        if self.world is not None and self.count is None:
            raise ValueError("'world' needs 'count', how many questions")
        given: dict[str, Any] = {"pictures": self.pictures, "across_sources": self.across_sources, "levels": self.levels}
        if self.world is not None and (unused := [name for name, value in given.items() if value]):
            raise ValueError(
                f"'{unused[0]}' belongs to 'questions'. The world's questions can be written into a folder and read from there "
                "(polyalign.datasets.worlds.scenes_rows.write_questions)"
            )
        if self.world is None and self.tasks is not None:
            raise ValueError("'tasks' belongs to 'world'")

    def _check_formats(self) -> None:
        known = NUMBERS if self.world is None else OF_THE_WORLD
        for name, given in self.shares.items():
            if wrong := sorted(set(given) - set(known.get(name, ()))):
                allowed = "; ".join(f"{one}: {', '.join(map(str, numbers))}" for one, numbers in known.items())
                raise ValueError(f"formats: there is no {name} of {wrong[0]} images here. Allowed: {allowed}")
        shares = [share for given in self.shares.values() for share in given.values()]
        if any(share < 0 for share in [*shares, *self.levels.values()]) or not sum(shares) > 0:
            raise ValueError("formats and levels: shares are 0 or more, and at least one of formats is more")
        if sum(self.levels.values()) + self.single > 1:
            raise ValueError("the shares of 'levels' and 'single' together are at most 1")
        named = sum(sum(self.shares.get(name, {}).values()) for name in ("sequence", "grid"))
        if sum(self.levels.values()) > 0 and not named > 0:
            raise ValueError("'levels' are laid out as sequences or collages; give 'formats' one of these")

    def _check_thresholds(self) -> None:
        for name, given in self.shares.items():
            lacking = sorted(
                number for number, share in given.items() if share > 0 and number not in self.filter.limits.get(name, {})
            )
            if lacking:
                raise ValueError(
                    f"no threshold is known for {name} of {lacking[0]} images: give filter.thresholds, take filter.attention: "
                    "not_first, or leave that number out of formats"
                )
