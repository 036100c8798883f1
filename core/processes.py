"""How many processes a launcher really started: ``torchrun --nproc_per_node 2 -m polyalign.core.processes``.

Worth asking, since ``accelerate launch --cpu --num_processes 2`` starts one process and says nothing.
"""

from __future__ import annotations

import json
import os
from typing import Any

import datasets
import torch
from accelerate import Accelerator


def gathered_ranks(accelerator: Accelerator) -> list[int]:
    """The rank of every process that takes part, collected by a real gather over all of them."""
    rank = torch.tensor([accelerator.process_index], device=accelerator.device)
    gathered: Any = accelerator.gather(rank)  # a tensor, as what went in
    return gathered.tolist()


def describe(accelerator: Accelerator) -> dict[str, Any]:
    return {
        "processes": accelerator.num_processes,
        "ranks": gathered_ranks(accelerator),
        "device": accelerator.device.type,
        "distributed_type": accelerator.distributed_type.value,
        # From the repository's root a folder datasets/ lies in the way; this is Hugging Face's all the same.
        "hugging_face_datasets": datasets.__version__,
    }


def main() -> int:
    """Print what ``describe`` finds, once; returns 1 if the launcher's count and the real one differ."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    found = describe(accelerator)
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    asked_for = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0 if found["ranks"] == list(range(asked_for)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
