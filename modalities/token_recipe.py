"""Sections that the recipes of text and of vision-language models share. Nothing here imports transformers or torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from polyalign.core.config import Section
from polyalign.core.objectives.table import DPO, TABLE, ObjectiveSpec
from polyalign.core.recipe import (
    BetaConfig,
    Fraction,
    JudgeConfig,
    ReportConfig,
    TrackingConfig,
    TrainSettings,
    named_as_folders,
)

BETA = {"value": 0.1, "convention": "nats"}
"""Beta of an objective whose own default is for squared errors: the usual value for language models."""


class LoraConfig(Section):
    """The adapter that is trained beside the frozen base."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""

    alpha: float | None = Field(default=None, gt=0.0)
    """Scale of the update is alpha / rank; null means alpha = rank."""

    dropout: Fraction = 0.0
    """Share of the update's inputs that is dropped in training."""

    targets: tuple[str, ...] = ("all-linear",)
    """Layers that get an update, by the end of their name; `all-linear` is every linear layer but the LM head."""

    start: str | None = None
    """The adapter to go on from, such as an SFT run's `runs/sft/adapter`; base, samples and reference are then the model with
    it. Its rank and layers are its own. The reference has to be `frozen`, a copy of it, or `ema` or `none`. Null: a fresh
    one."""


class ModelConfig(Section):
    """Which model, and what of it is trained."""

    base: str = "tiny"
    """`tiny` (the base that comes with the package), a hub id, or a transformers folder."""

    revision: str | None = None
    """Revision of a hub repository."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the frozen weights; full training keeps float32 and casts the forward pass."""

    device: str = "auto"
    """`auto` is the GPU if there is one."""

    train: Literal["lora", "full", "qlora"] = "lora"
    """A low-rank adapter; all weights; or an adapter on weights of 4 bits, which needs a GPU and bitsandbytes."""

    lora: LoraConfig = LoraConfig()
    """The adapter."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """`flash_attention_2` needs a GPU and its package."""

    chat_template: str | None = None
    """A jinja file that takes the place of the tokenizer's own template, relative to the working directory."""


class PrepareConfig(Section):
    """How pairs become tokens. Nothing is ever cut."""

    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """A pair with a longer prompt is too long."""

    max_completion_tokens: int | None = Field(default=None, ge=1)
    """A pair with a longer answer is too long."""

    max_length: int | None = Field(default=None, ge=1)
    """A pair whose prompt and longer answer together are longer is too long; the model's own limit holds besides."""

    on_long: Literal["error", "drop"] = "error"
    """A pair that is too long stops the run before it trains, or is left out, counted and said in the data card. So is one kept
    aside for the evaluation whose prompt leaves no room for an answer; it is counted in evaluation.json (`left_out`)."""

    append_eos: bool = True
    """End answers with the end-of-sequence token, so that the model learns where to stop."""


class LikelihoodConfig(Section):
    """How the log-probabilities of an answer's tokens are computed; the values are the same, to rounding."""

    prefix_sharing: Literal["auto", "on", "off"] = "auto"
    """Compute the prompt once for both answers. `auto`: where the model's layers allow it, and it says so where they do not."""

    head_chunk: int = Field(default=1024, ge=1)
    """Positions that go through the LM head together: fewer need less memory."""

    top_k: bool = False
    """Log the mass and the entropy of the ten most probable tokens, which tell when a training begins to over-optimise;
    `train.stop` does so by itself."""


class SamplerConfig(Section):
    """How answers are sampled, for pairs and for evaluation."""

    max_new_tokens: int = Field(default=64, ge=1)
    """An answer ends here at the latest."""

    temperature: float = Field(default=1.0, ge=0.0)
    """1 is the model's own distribution, 0 takes the likeliest token each time."""

    top_k: int | None = Field(default=None, ge=1)
    """Draw from so many of the likeliest tokens only."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the fewest of the likeliest tokens whose probabilities add up to this."""

    batch_size: int = Field(default=16, ge=1)
    """Answers sampled together."""


class EvaluateConfig(Section):
    """Base against aligned, on the same prompts and seeds."""

    prompts: Section | None = None
    """Prompts that did not take part in training. Null: a share of the prompts of the pairs is kept aside (see `held_out`)."""

    held_out: Fraction = 0.1
    """For pairs that are read, without prompts here: the share of pairs whose prompts are kept out of training for this. A
    hash decides of each prompt by itself, so of few pairs the share may be far from this; training says how many they are."""

    seeds_per_prompt: int = Field(default=1, ge=1)
    """Answers to each prompt, each with its own seed."""

    temperature: float | None = Field(default=None, ge=0.0)
    """In the place of `sampler.temperature`; 0 is greedy, where a prompt's seeds all give the same answer."""

    judges: tuple[JudgeConfig, ...] = Field(default=(), min_length=1)
    """The first gives the verdict, the others are shown beside it."""

    @model_validator(mode="after")
    def _seeds_differ(self) -> EvaluateConfig:
        if self.temperature == 0.0 and self.seeds_per_prompt > 1:
            raise ValueError("'temperature: 0' is greedy and gives every seed the same answer: set 'seeds_per_prompt: 1'")
        return self


class TokenRecipe(Section):
    """What the recipes of language models have, of text alone or with pictures."""

    modality: str
    """This recipe's modality."""

    seed: int = Field(default=0, ge=0)
    """Every random choice of the run follows from it."""

    run: str
    """The run folder; `{seed}` in it becomes the seed."""

    model: ModelConfig = ModelConfig()
    """Which model, and what of it is trained."""

    prepare: PrepareConfig = PrepareConfig()
    """How pairs become tokens."""

    likelihood: LikelihoodConfig = LikelihoodConfig()
    """How the likelihood of an answer is computed."""

    sampler: SamplerConfig = SamplerConfig()
    """How answers are sampled."""

    pairs: Section
    """Where preference pairs come from."""

    objective: ObjectiveSpec = DPO(beta=BetaConfig(value=0.1, convention="nats"))
    """What is minimised; `polyalign explain objective` lists all. Without a beta of their own for tokens, objectives take 0.1
    nats here."""

    train: TrainSettings = TrainSettings()
    """The training loop."""

    arms: dict[str, ObjectiveSpec] = {}
    """Further objectives trained on the same pairs at the same cost and evaluated beside, such as `sft: {name: sft}`. An arm's
    name is also its folder's: small letters, digits, - and _."""

    evaluate: EvaluateConfig
    """Base against aligned."""

    report: ReportConfig = ReportConfig()
    """What the report shows."""

    tracking: TrackingConfig = TrackingConfig()
    """Where the figures go besides metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _beta_of_tokens(cls, given: Any) -> Any:
        return objectives_with_beta(given)

    @field_validator("arms")
    @classmethod
    def _named_as_folders(cls, arms: dict[str, ObjectiveSpec]) -> dict[str, ObjectiveSpec]:
        return named_as_folders(arms)

    @staticmethod
    def objective_defaults(given: Mapping[str, Any]) -> Any:
        """The mapping of an objective as these recipes take it; ``polyalign explain`` asks."""
        return with_beta(given)


def objectives_with_beta(given: Any) -> Any:
    """A recipe as it was given, its objective and arms with a beta that has a meaning for tokens unless it says otherwise."""
    if not isinstance(given, Mapping):
        return given
    changed = dict(given)
    if isinstance(given.get("objective"), Mapping):
        changed["objective"] = with_beta(given["objective"])
    if isinstance(given.get("arms"), Mapping):
        changed["arms"] = {name: with_beta(arm) for name, arm in given["arms"].items()}
    return changed


def with_beta(objective: Any) -> Any:
    """The mapping of an objective with a beta that has a meaning for tokens."""
    row = TABLE.get(str(objective.get("name"))) if isinstance(objective, Mapping) else None
    beta = objective.get("beta", {}) if row else None
    if row is None or not isinstance(beta, Mapping):
        return objective
    own = row.parameters.model_fields["beta"].get_default(call_default_factory=True)
    return objective if own.convention in ("nats", "sum") else {**objective, "beta": {**BETA, **beta}}
