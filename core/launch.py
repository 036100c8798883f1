"""Starting on one process or several, and noticing when fewer were started than was meant."""

from __future__ import annotations

import os
from collections.abc import Iterable

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from polyalign.core.errors import UserError
from polyalign.core.recipe import TrainSettings


def start_accelerator(settings: TrainSettings, *, cpu: bool | None = None) -> Accelerator:
    """An accelerator for the processes that torchrun or ``accelerate launch`` started, or for this one alone.

    The recipe's precision counts, whatever the launcher's file says. ``cpu`` None uses a GPU where there is one.

    Raises:
        UserError: fp16 without a GPU; fewer processes than asked for; a batch that does not divide among them; FSDP version 1.
    """
    if cpu is None:
        cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if settings.mixed_precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise UserError("train.mixed_precision: fp16 needs a GPU. On this machine use bf16 or no.")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    precision = settings.mixed_precision
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        if precision == "fp16":
            raise UserError("train.mixed_precision: fp16 does not work under DeepSpeed here; use bf16 or no")
        precision = "no"  # DeepSpeed would cast the weights themselves; the trainer's autocast does what bf16 means elsewhere
    if AcceleratorState._shared_state:  # an earlier training in this process, perhaps with another precision or device
        earlier = AcceleratorState()
        moved = (earlier.device.type == "cpu") != cpu
        if moved or earlier.mixed_precision != precision:
            AcceleratorState._reset_state(reset_partial_state=moved)
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    refuse_lost_processes(accelerator.num_processes)
    if settings.batch_size % accelerator.num_processes:
        raise UserError(
            f"train.batch_size: {settings.batch_size} pairs do not divide among {accelerator.num_processes} processes; "
            f"take a multiple of {accelerator.num_processes}"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP version 1 is not supported; use version 2 (configs/accelerate/fsdp2.yaml)")
    return accelerator


def accelerator_beside(networks: Iterable[nn.Module], settings: TrainSettings, given: Accelerator | None) -> Accelerator:
    """``given``, or a new accelerator, on the kind of device that the networks are on: whoever loaded them chose it
    (``model.device``), and the rest of the model stays there.

    Raises:
        UserError: the networks are on several kinds, or ``given`` is on another; what :func:`start_accelerator` refuses.
    """
    kinds = {parameter.device.type for network in networks for parameter in network.parameters()}
    if len(kinds) != 1:
        raise UserError(f"model.device: the weights are on {' and '.join(sorted(kinds)) or 'no device'}; put them on one")
    accelerator = given or start_accelerator(settings, cpu=kinds == {"cpu"})
    if kinds != {accelerator.device.type}:
        raise UserError(
            f"model.device: the network is on {kinds.pop()}, and training would run on {accelerator.device.type}. Set "
            "model.device to auto, or start the training for the network's device."
        )
    return accelerator


def refuse_lost_processes(running: int) -> None:
    """Raises UserError if more processes were asked for than run together.

    ``accelerate launch --cpu --num_processes 2`` starts one process without a word where no MPI is installed, and torchrun's
    processes each train alone if no process group is made. Both would look like a training with twice the batch.
    """
    wanted, by = int(os.environ.get("WORLD_SIZE", "1")), "WORLD_SIZE"
    if "WORLD_SIZE" not in os.environ:
        wanted, by = _asked_of_accelerate(), "accelerate launch --num_processes"
    if wanted != running:
        raise UserError(
            f"{by} says {wanted} processes, but {running} run together. accelerate starts a single one on a CPU: "
            f"use torchrun --nproc_per_node {wanted} -m polyalign... instead, or ask for one process."
        )


def _asked_of_accelerate() -> int:
    """``--num_processes`` of the ``accelerate launch`` that started this process; 1 if it was started otherwise."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return 1
    if not any("accelerate" in word for word in words[:3]) or "launch" not in words[:5]:
        return 1
    for place, word in enumerate(words):
        for flag in ("--num_processes", "--num-processes"):
            value = word.removeprefix(f"{flag}=") if word.startswith(f"{flag}=") else None
            if word == flag and place + 1 < len(words):
                value = words[place + 1]
            if value is not None and value.isdigit():
                return int(value)
    return 1
