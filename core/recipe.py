"""The parts that every recipe shares: beta, optimiser, schedule, reference seat, training, pairing, judges, report, tracking.

A modality's recipe is a :class:`~polyalign.core.config.Section` of its own that uses these as fields. Defaults are what the
publications of the field use; a recipe file states only what differs. Nothing here imports torch.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from polyalign.core.config import Section

Named = TypeVar("Named")
BetaConvention = Literal["mean_half", "mean", "sum", "sum_half", "nats"]

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A number in [0, 1)."""


class AutoBetaConfig(Section):
    """Let beta follow the training, so that a typical pair's gradient factor sigmoid(-beta * margin) stays at a target."""

    target_gradient_factor: float = Field(default=0.25, gt=0.0, lt=0.5)
    """The gradient factor to aim at; 0.5 is a policy equal to its reference, 0 a pair that teaches nothing any more."""

    decay: Fraction = 0.99
    """How slowly the running mean of the absolute log-ratio margin forgets; 0 looks at the last step alone."""

    warmup_steps: int = Field(default=10, ge=0)
    """Optimiser steps with a margin during which the given value is kept while the running mean fills. 0: the first margin is
    the mean, as in SimpleTuner, so the small margins of the first steps hold on."""

    minimum: float = Field(default=1.0, gt=0.0)
    """Beta never goes below this, in the convention of `beta.convention`."""

    maximum: float = Field(default=20000.0, gt=0.0)
    """Beta never goes above this, in the convention of `beta.convention`."""

    @model_validator(mode="after")
    def _ordered(self) -> AutoBetaConfig:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")
        return self


class BetaConfig(Section):
    """How strongly a log-ratio counts: the reward is beta times the log-ratio to the reference."""

    value: float = Field(default=5000.0, gt=0.0)
    """Beta as the publication states it, in the convention below. Text recipes take 0.1 nats where nothing is said."""

    convention: BetaConvention = "mean_half"
    """What the value multiplies. Denoising models: `mean_half` (0.5 * beta * mean squared error, the Diffusion-DPO code),
    `mean`, `sum_half`, `sum`, or `nats` (a true log-likelihood). Language models: `nats` or `sum` (summed token
    log-probabilities)."""

    auto: AutoBetaConfig | None = None
    """Adjust beta while training; `value` is then where it starts. Off by default."""


class OptimizerConfig(Section):
    """The optimiser and its numbers."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """`adamw8bit` needs bitsandbytes and a GPU; `adafactor` keeps almost no state."""

    learning_rate: float = Field(default=1e-5, gt=0.0)
    """The highest learning rate, which the schedule starts from or warms up to."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient (AdamW only)."""

    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay."""

    epsilon: float = Field(default=1e-8, gt=0.0)
    """Added to the denominator (AdamW only)."""


class ScheduleConfig(Section):
    """How the learning rate moves with the steps."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall to zero at the last step along a line or half a cosine."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises from zero along a line."""


class ReferenceConfig(Section):
    """What the policy is compared with."""

    seat: Literal["none", "frozen", "adapter_off", "adapter", "ema", "cached"] = "adapter_off"
    """`adapter_off`: the base under the LoRA, no second copy. `frozen`: a second copy of the starting weights (full training).
    `adapter`: another named adapter on the same base. `ema`: a running mean of the policy. `cached`: scores of the starting
    weights computed once with recorded draws. `none`: the log-ratio is the policy's score itself."""

    ema_decay: Fraction = 0.999
    """For `ema`: how slowly the reference follows the policy; 0 makes it the policy itself at each update."""

    ema_every: int = Field(default=1, ge=1)
    """For `ema`: steps between two updates. TR-DPO's soft update is ema_decay 0.4 every 512 steps, its hard one ema_decay 0."""

    adapter_name: str = Field(default="reference", min_length=1)
    """For `adapter`: the name of the adapter that is the reference."""

    draws_per_pair: int = Field(default=1, ge=1)
    """For `cached`: how many draws of noise and timestep are kept for each pair; each step takes one by a keyed choice."""


class StopConfig(Section):
    """End the training of a token model where it begins to over-optimise (arXiv 2410.11677): when the entropy of the ten most
    probable tokens turns down, or their mass falls while it rises."""

    every: int = Field(default=50, ge=1)
    """Steps between checks; each takes the means since the one before. The publication looks every 50 steps."""

    patience: int = Field(default=3, ge=1)
    """Checks in a row in which the smoothed entropy must fall."""

    mass_drop: Fraction = 0.05
    """How far the smoothed mass must fall from its maximum, as a share of it, while the entropy rises."""

    smoothing: Fraction = 0.5
    """Decay of the running mean over checks; 0 takes each check as it is."""

    after: int = Field(default=0, ge=0)
    """No stop before this step."""


class TrainSettings(Section):
    """The training loop."""

    steps: int = Field(default=1000, ge=0)
    """Optimiser steps in all."""

    batch_size: int = Field(default=8, ge=1)
    """Pairs in one optimiser step, over all processes together."""

    micro_batch_size: int = Field(default=1, ge=1)
    """Pairs in one forward and backward pass of one process; smaller needs less memory and gives the same result, to
    rounding; only dropout then draws other masks."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimiser and its numbers."""

    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """How the learning rate moves with the steps."""

    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm when they are longer; null never clips."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward pass. Reductions and log-ratios stay in float32 whatever stands here."""

    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: slower, much less memory."""

    stop: StopConfig | None = None
    """End the run early by the rule of this section; the run then ends as if `steps` had been that step. Null: off."""

    save_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints stay on the disk; the oldest go first."""

    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; null leaves torch's own choice. The number can change the last bits of a result."""

    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    """What the policy is compared with."""


class PairingConfig(Section):
    """How judged samples of one prompt become pairs."""

    mode: Literal["best_worst", "all_pairs"] = "best_worst"
    """One pair from the best and the worst sample of a prompt, or every two samples that differ enough."""

    margin: float = Field(default=0.0, ge=0.0)
    """A pair is kept when its score difference is greater than this; ties are always dropped, and counted."""

    max_pairs_per_prompt: int | None = Field(default=None, ge=1)
    """At most so many pairs of one prompt, those with the largest difference first; null keeps all."""


class JudgeConfig(Section):
    """One judge of outputs."""

    name: str = Field(min_length=1)
    """The judge's name, one of those the modality knows."""

    weight: float = 1.0
    """Weight of this judge's score where several judges are summed; negative for scores where less is better."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of this judge, passed to it by name."""


class ReportConfig(Section):
    """What the report shows."""

    title: str | None = None
    """Headline; null makes one from the run's name."""

    grid: int = Field(default=24, ge=0)
    """Before-and-after samples shown, most gain and worst regressions included."""

    embed_images: bool = True
    """Put the pictures into the HTML file, so that it can be sent as one file."""


class TrackingConfig(Section):
    """Where the figures go besides metrics.jsonl, which is always written."""

    backend: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """A tracker to send the same figures to; each needs its own package."""

    project: str = Field(default="polyalign", min_length=1)
    """The tracker's project name."""


def named_as_folders(arms: dict[str, Named]) -> dict[str, Named]:
    """``arms`` as they are. Their names are also names of folders on every system, and stand beside those of base and aligned
    model.

    Raises:
        ValueError: another name, for pydantic to tell.
    """
    for name in arms:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise ValueError(f"the name {name!r} is no folder's: take a-z, 0-9, - and _, a letter or digit first")
        if name in ("base", "aligned"):
            raise ValueError(f"{name!r} is what evaluations call the {name} model; give the arm another name")
    return arms
