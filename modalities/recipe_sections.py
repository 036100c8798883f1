"""Sections that recipes of several modalities have, and what all of them ask of where pairs come from. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from polyalign.core.config import Section
from polyalign.datasets.formats.table import Format, checked_options


class TimestepsConfig(Section):
    """From which noise levels an error is estimated."""

    kind: Literal["uniform", "logit_normal"] = "uniform"
    """Evenly, or logit-normal as for SD3 and TangoFlux."""

    low: int = Field(default=0, ge=0)
    """The lowest level that is drawn."""

    high: int | None = Field(default=None, ge=1)
    """One above the highest level that is drawn; null is all of them (SDXL refiner: 200)."""

    choices: tuple[int, ...] = ()
    """Draw from these only (SDXL-Turbo: 249, 499, 749, 999)."""

    mean: float = 0.0
    """Of the logit-normal's normal."""

    std: float = Field(default=1.0, gt=0.0)
    """Of the logit-normal's normal."""


class LikelihoodConfig(Section):
    """How the likelihood of an output is estimated."""

    weighting: Literal["constant", "elbo", "snr", "min_snr"] = "constant"
    """Weight of a noise level. `constant` is 1 on the model's own target, as in every published code."""

    gamma: float = Field(default=5.0, gt=0.0)
    """For `min_snr`."""

    timesteps_per_pair: int = Field(default=1, ge=1)
    """Noise levels drawn for a pair in a step; more cost more and vary less."""

    timesteps: TimestepsConfig = TimestepsConfig()
    """From which noise levels."""


class ImplicitRewardConfig(Section):
    """How often the aligned model's own reward agrees with the preferences that were kept aside (arXiv 2311.12908, Table 2)."""

    draws: int = Field(default=10, ge=1)
    """Draws of noise level and noise for each pair, the same for both outputs and both models; the publication takes 10. Each
    costs two forward passes over both outputs."""

    pairs: int | None = Field(default=None, ge=1)
    """At most so many of the pairs kept aside, by a keyed choice; null is all."""


class SftFirstConfig(Section):
    """Fine-tune on the chosen outputs alone before the objective takes over, as Tango 2 does for its first epoch."""

    steps: int = Field(ge=1)
    """Optimiser steps of it, before the `train.steps` of the objective; everything else is as `train` says. The learning rate's
    schedule and the optimiser begin anew with the objective."""


def check_pairs(
    pairs: Any,
    sources: Mapping[str, Format],
    made: tuple[str, ...] = ("generate",),
    *,
    judged: tuple[str, ...] | None = None,
) -> None:
    """Refuse a section ``pairs`` that lacks what its source needs. ``made`` are the sources that sample here; of them those
    that are ``judged`` need judges, all if it is None.

    Raises:
        ValueError: for pydantic to tell.
    """
    if pairs.source in made:
        needs_judge = judged is None or pairs.source in judged
        if pairs.prompts is None or (needs_judge and not pairs.judges):
            named = "'prompts' and at least one of 'judges'" if needs_judge else "'prompts'"
            raise ValueError(f"source '{pairs.source}' needs {named}")
        if pairs.options:
            raise ValueError(f"source '{pairs.source}' has no options")
        return
    row = sources[pairs.source]
    if pairs.location is None:
        raise ValueError(f"source '{pairs.source}' needs '{row.place}', {row.what}")
    if row.needs == "judge" and not pairs.judges:
        raise ValueError(f"source '{pairs.source}' needs at least one of 'judges'")
    checked_options(pairs.source, pairs.options, sources)


def location_of(pairs: Any, sources: Mapping[str, Format]) -> str | None:
    """The file or folder that pairs, or the prompts to make them from, are read from."""
    if pairs.source not in sources:
        return pairs.prompts.file if pairs.prompts else None
    return getattr(pairs, sources[pairs.source].place)
