"""LoRA on a language model (:mod:`polyalign.modalities.injected_lora`), never on its head."""

from __future__ import annotations

from typing import Any

from polyalign.modalities import injected_lora
from polyalign.modalities.injected_lora import CONFIG_FILE, NAME, PREFIX, WEIGHTS_FILE, names, read, save, state_dict
from polyalign.modalities.text.settings import TextModelSettings

__all__ = ["CONFIG_FILE", "NAME", "PREFIX", "WEIGHTS_FILE", "add", "load", "names", "read", "save", "state_dict"]


def add(network: Any, settings: TextModelSettings) -> None:
    """See :func:`polyalign.modalities.injected_lora.add_beside_head`."""
    injected_lora.add_beside_head(network, settings, settings.targets)


load = injected_lora.load_beside_head
