"""Optimisers and the learning-rate schedule. The schedule is a function of the step, so there is no scheduler state to save."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import Parameter

from polyalign.core.errors import UserError
from polyalign.core.optional import require
from polyalign.core.recipe import OptimizerConfig, ScheduleConfig


def build_optimizer(parameters: Iterable[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of one network over its trainable parameters.

    ``adafactor`` is set as the Diffusion-DPO code sets it (SalesforceAIResearch/DiffusionDPO@5233e75): no parameter scaling and
    no relative step, so that ``learning_rate`` means what it says.

    Raises:
        UserError: nothing is trainable, or bitsandbytes is missing for ``adamw8bit``.
    """
    trainable = list(parameters)
    if not trainable:
        raise UserError("the network has no trainable parameter: add a LoRA (model.lora) or set model.train to full")
    if config.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            trainable,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
    kind = torch.optim.AdamW
    if config.name == "adamw8bit":
        kind = require("bitsandbytes", extra="cuda", purpose="the optimiser adamw8bit").optim.AdamW8bit
    return kind(trainable, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, weight_decay=config.weight_decay)


def schedule_factor(step: int, *, steps: int, schedule: ScheduleConfig) -> float:
    """What the learning rate is multiplied with at ``step`` = 1 .. ``steps``.

    Warm-up is step / warmup_steps, so step 0, which does not exist, would be the zero and no step is wasted on it (the usual
    schedulers start at 0). After it the factor is 1, or falls so that the zero lies one past the last step.
    """
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    progress = (step - 1 - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    if schedule.name == "linear":
        return 1.0 - progress
    if schedule.name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
