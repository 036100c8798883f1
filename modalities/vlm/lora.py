"""LoRA on parts of a vision-language model (:mod:`polyalign.modalities.injected_lora`), never on its head."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from polyalign.core.errors import UserError
from polyalign.modalities import injected_lora
from polyalign.modalities.vlm.families import prefixes
from polyalign.modalities.vlm.settings import VlmModelSettings


def add(network: Any, settings: VlmModelSettings) -> None:
    """As :func:`polyalign.modalities.injected_lora.add`, on the linear layers of ``settings.parts``.

    Raises:
        UserError: besides that function's, a part has no layer of the target names.
    """
    injected_lora.add_beside_head(network, settings, pattern_of(network, settings))


load = injected_lora.load_beside_head


def pattern_of(network: Any, settings: VlmModelSettings) -> str:
    """A regular expression of the whole names of the layers that get a LoRA, as peft takes it: "all-linear" would also take
    those of the vision tower."""
    parts = prefixes(network)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    chosen: list[str] = []
    for part in settings.parts:
        inside = [name for name in linear if _within(name, parts[part])]
        wanted = inside if settings.targets == ("all-linear",) else [n for n in inside if n.split(".")[-1] in settings.targets]
        if not wanted:
            names = sorted({name.split(".")[-1] for name in inside})
            raise UserError(
                f"the LoRA targets {list(settings.targets)} are not in the {part} of {type(network).__name__}. Its linear "
                f"layers: {', '.join(names) or 'none (train it as a whole, train: full, or leave it out of parts)'}"
            )
        chosen += wanted
    return "|".join(sorted({_of_every_layer(name) for name in chosen}))


def _of_every_layer(name: str) -> str:
    """A module's name with the numbers of layers around it as any number; a number of its own (in a Sequential) stays."""
    *around, last = name.split(".")
    return r"\.".join([*(r"\d+" if part.isdigit() else re.escape(part) for part in around), re.escape(last)])


def train_whole(network: Any, settings: VlmModelSettings) -> None:
    """All weights of ``settings.parts`` are trained, with the language tower its head too; the rest stands still."""
    parts = prefixes(network)
    head = {id(parameter) for parameter in network.get_output_embeddings().parameters()}
    for name, parameter in network.named_parameters():
        chosen = any(_within(name, parts[part]) for part in settings.parts)
        parameter.requires_grad_(chosen or ("language" in settings.parts and id(parameter) in head))


def _within(name: str, stems: list[str]) -> bool:
    return any(name == stem or name.startswith(stem + ".") for stem in stems)
