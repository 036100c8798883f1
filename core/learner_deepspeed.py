"""A network inside a DeepSpeed engine (ZeRO 1, 2, 3).

Weights stay in the network's own precision (float32 for what is trained) and the recipe's bf16 is autocast, as everywhere
else; ZeRO shards what the optimiser keeps, at stage 2 the gradients, at stage 3 the weights. Checkpoints have the same files
as those of plain torch, put together from all processes, so a run may move between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from polyalign.core.errors import UserError
from polyalign.core.learner import refuse_other_names, trained
from polyalign.core.optimisers import build_optimizer
from polyalign.core.optional import require
from polyalign.core.recipe import OptimizerConfig, TrainSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedLearner:
    """A :class:`~polyalign.core.learner.Learner` whose gradient, norm and update are the engine's.

    Raises:
        UserError: more than one network, another optimiser than AdamW, or DeepSpeed missing.
    """

    def __init__(self, network: nn.Module, config: OptimizerConfig, accelerator: Accelerator, settings: TrainSettings):
        self.api = require("deepspeed.utils", extra="cuda", purpose="a DeepSpeed configuration")
        if config.name != "adamw":
            raise UserError(f"train.optimizer.name: {config.name} does not work under DeepSpeed here; use adamw")
        if accelerator._models:
            raise UserError("DeepSpeed holds one network, and this method trains several; use ddp.yaml or fsdp2.yaml")
        share = settings.batch_size // accelerator.num_processes
        self.cuts = math.ceil(share / settings.micro_batch_size)
        self.processes, self.rank = accelerator.num_processes, accelerator.process_index
        plugin: Any = accelerator.state.deepspeed_plugin
        accelerator.gradient_accumulation_steps = self.cuts
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.micro_batch_size,
            "gradient_accumulation_steps": self.cuts,
            "gradient_clipping": settings.clip_norm or 0.0,
        }
        optimizer = build_optimizer(trained(network).values(), config)
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.parameters = trained(self.network.module)

    def backward(self, loss: Tensor, *, alone: bool, last: bool) -> None:
        self.network.set_gradient_accumulation_boundary(is_boundary=last)
        self.network.backward(loss * (self.cuts * self.processes))  # the engine takes the mean over both

    def gradient_norm(self) -> None:
        """Only the engine's step tells it."""
        return None

    def update(self, *, learning_rate: float, clip_norm: float | None) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.network.step()
        norm = float(self.network.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            raise UserError(
                f"DeepSpeed took a step with a gradient of norm {norm}. The weights in memory are spoilt; those of the last "
                "checkpoint are not. Lower train.optimizer.learning_rate or train.clip_norm and start anew."
            )
        return norm

    def discard(self) -> None:
        self.network.zero_grad()
        self.network.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return {name: self.api.safe_get_full_fp32_param(value).cpu().clone() for name, value in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Any]:
        step = self._steps()[0].clone()
        states: dict[int, dict[str, Tensor]] = {}
        for place, parameter in enumerate(self.parameters.values()):
            moments = {key: self.api.safe_get_full_optimizer_state(parameter, key).cpu().clone() for key in MOMENTS}
            states[place] = {"step": step.cpu(), **moments}
        group = {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}
        return {"state": states, "param_groups": [{**group, "params": list(states)}]}

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]) -> None:
        shapes = {name: torch.empty(getattr(value, "ds_shape", value.shape), device="meta") for name, value in self._named()}
        refuse_other_names(shapes, weights)
        self._make_moments()
        for place, (name, parameter) in enumerate(self._named()):
            self._set_weight(parameter, weights[name])
            for key in MOMENTS:
                self._set_moment(parameter, optimizer_state["state"][place][key], key)
        for step in self._steps():
            step.fill_(float(optimizer_state["state"][0]["step"]))

    @torch.no_grad()
    def _set_weight(self, parameter: Any, value: Tensor) -> None:
        """Set what the optimiser holds and what the network computes with, which are two."""
        if hasattr(parameter, "ds_tensor"):
            part = self._own_part(parameter, value)
            self.api.safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)
        else:
            self.api.safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        if hasattr(parameter, "ds_tensor"):
            self.api.safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)
        else:
            self.api.safe_set_full_optimizer_state(parameter, value, key)

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """This process's part at stage 3, which shares a parameter out evenly and fills the last part up. (DeepSpeed's own
        way to set a whole parameter fails where it does not divide.)"""
        size = parameter.ds_tensor.numel()
        start = size * self.rank
        part = value.flatten()[start : start + size]
        return torch.nn.functional.pad(part, (0, size - part.numel())).to(parameter.ds_tensor.device)

    def _make_moments(self) -> None:
        """Give the optimiser inside the engine its moments, which it would make in its first step, so that they can be set."""
        zero = self.network.optimizer
        flat_parts = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
        for flat in flat_parts:
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(0.0), **zeros}
        link = getattr(zero, "_lazy_init_hp_params_optimizer_state", None)  # stages 1 and 2: from parameters to their parts
        if link is not None:
            link()

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.parameters.items())

    def _steps(self) -> list[Tensor]:
        """The step counters of the optimiser inside the engine, one for each flat part."""
        inner = self.network.optimizer.optimizer
        return [state["step"] for state in inner.state.values()]
