"""LoRA on a language model (:mod:`polyalign.modalities.injected_lora`), never on its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polyalign.modalities import injected_lora
from polyalign.modalities.injected_lora import CONFIG_FILE, NAME, PREFIX, WEIGHTS_FILE, names, read, save, state_dict
from polyalign.modalities.text.settings import TextModelSettings

__all__ = ["CONFIG_FILE", "NAME", "PREFIX", "WEIGHTS_FILE", "add", "load", "names", "read", "save", "state_dict"]


def add(network: Any, settings: TextModelSettings) -> None:
    """As :func:`polyalign.modalities.injected_lora.add`.

    Raises:
        UserError: besides that function's, one of the targets is the LM head.
    """
    injected_lora.add(
        network,
        rank=settings.rank,
        alpha=settings.scale,
        targets=settings.targets,
        seed=settings.seed,
        dropout=settings.dropout,
        task_type="CAUSAL_LM",
    )
    injected_lora.refuse_head(network)


def load(network: Any, folder: Path, name: str = NAME) -> None:
    """As :func:`polyalign.modalities.injected_lora.load`.

    Raises:
        UserError: besides that function's, the LoRA is also on the LM head.
    """
    injected_lora.load(network, folder, name)
    injected_lora.refuse_head(network)
