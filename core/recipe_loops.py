"""The parts of a recipe that not every training has: rounds, two adapters, a guide, margins. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from polyalign.core.config import Section
from polyalign.core.recipe import JudgeConfig


class OnlineConfig(Section):
    """Train in rounds, each on fresh samples of the policy. `pairs.judges` decide, and `pairs.prompts` are asked."""

    rounds: int = Field(default=4, ge=1)
    """How many; `train.steps` are all steps, in equal parts."""

    prompts_per_round: int = Field(default=64, ge=1)
    """Prompts asked in a round, in a keyed order that begins anew when all were asked."""

    samples_per_prompt: int = Field(default=2, ge=2)
    """Samples of each prompt."""

    mode: Literal["best_worst", "first_second", "all_pairs", "best_rest"] = "best_worst"
    """How judged samples become pairs: the best and the worst (CRPO with 5 samples), the first two as drawn (online DPO,
    IPO-MD), all, or the best with each of the others."""

    targets: Literal["hard", "soft"] = "hard"
    """`hard`: the better one is preferred. `soft`: with probability sigmoid(difference of the scores / `scale`), for objectives
    that take a preference probability (online_ipo)."""

    scale: float = Field(default=1.0, gt=0.0)
    """For `soft`: the difference of scores at which a preference has odds of e to 1."""

    ties: Literal["drop", "half"] = "drop"
    """A tie is dropped and counted, or a pair whose target is one half each."""

    margin: float = Field(default=0.0, ge=0.0)
    """A pair is kept when its score difference is greater than this."""

    max_pairs_per_prompt: int | None = Field(default=None, ge=1)
    """At most so many pairs of one prompt, those with the largest difference first."""

    reference: Literal["kept", "refreshed"] = "kept"
    """`kept`: what `train.reference` says. `refreshed`: the policy at the beginning of each round (iterated DPO, CRPO)."""

    optimizer: Literal["keep", "reset"] = "keep"
    """Whether the optimiser's moments go on from round to round."""

    mixture: float = Field(default=0.0, ge=0.0, le=1.0)
    """The reference's share of the mixture that samples are drawn from at each token; 0 is the policy. IPO-MD's publication
    uses 0.125 to 0.25. Language models only."""

    lists: bool = False
    """Train on all samples of a prompt together (objective adpo), with `mode: best_rest`."""

    prompts_per_shard: int = Field(default=32, ge=1)
    """Prompts between two points at which interrupted sampling goes on."""

    @model_validator(mode="after")
    def _lists_are_whole(self) -> OnlineConfig:
        if self.lists and (self.mode != "best_rest" or self.margin or self.max_pairs_per_prompt is not None):
            raise ValueError("'lists' are all samples of a prompt: 'mode: best_rest', no 'margin', no 'max_pairs_per_prompt'")
        return self


class FastSlowConfig(Section):
    """The two adapters of objective ofs_dpo."""

    learning_rate_ratio: float = Field(default=0.2, gt=0.0)
    """The slow adapter's learning rate as a share of `train.optimizer.learning_rate`. Not public; 0.1 to 0.5 is our range."""

    interval: int = Field(default=50, ge=1)
    """Steps between two decisions which adapter is the fast one. Not public; 50 to 100 is our range."""

    limit: float = Field(default=100.0, gt=0.0)
    """The run is refused as diverged where the two reward margins differ by more than this on average."""


class GuideConfig(Section):
    """The model whose token rewards guide objective tgdpo."""

    folder: str = Field(min_length=1)
    """The exported adapter of a run with objective dpo on the same base, such as `runs/dpo/adapter`."""


class MarginsConfig(Section):
    """The other objectives of modpo: their judges, whose `weight` is on the scale of beta times the log-ratio."""

    judges: tuple[JudgeConfig, ...] = Field(min_length=1)
    """Each scores every pair once, before the training."""
