"""Export: a LoRA in peft's format, or the whole model in its family's own layout, with a model card."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.references import adapter_layers
from polyalign.modalities import injected_lora
from polyalign.modalities.audio.loading import parts_of
from polyalign.modalities.exporting import model_card, written_beside

LORA_CARD = """from diffusers import {kind}
from peft import PeftModel

denoiser = ...  # the base's {kind}
denoiser = PeftModel.from_pretrained(denoiser, "THIS_FOLDER")"""


def export(model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
    """Write the trained model into ``folder``, with README.md, the card.

    Where there is a LoRA: ``adapter_config.json`` and ``adapter_model.safetensors``. Else the whole model in its family's
    layout (Tango's own files, or a diffusers folder).

    Everything is written beside the folder first and then renamed into place, file by file, so that an interruption or a full
    disk leaves the earlier export as it was.
    """
    network: Any = getattr(model.network, "module", model.network)  # DDP's wrapper
    is_lora = injected_lora.NAME in injected_lora.names(network)
    with written_beside(folder) as partial:
        if is_lora:
            injected_lora.save(network, partial, base=model.identity.split("@")[0])
        else:
            parts_of(model).write(network, partial)
        (partial / "README.md").write_text(card_of(model, network, is_lora=is_lora, card=card or {}), encoding="utf-8")


def export_merged(model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
    """As :func:`export`, the whole model with its LoRA added into the weights: B A alpha / rank, in float32.

    Raises:
        UserError: there is no LoRA.
    """
    network: Any = getattr(model.network, "module", model.network)
    if injected_lora.NAME not in injected_lora.names(network):
        raise UserError("the network has no LoRA to merge; export the model as it is")
    merged = copy.deepcopy(network).float()
    for layer in adapter_layers(merged):
        layer.merge(adapter_names=[injected_lora.NAME])
    for name, layer in [(name, layer) for name, layer in merged.named_modules() if layer in set(adapter_layers(merged))]:
        merged.set_submodule(name, layer.get_base_layer())
    del merged.peft_config
    export(model.with_network(merged), folder, card)


def card_of(model: Model, network: Any, *, is_lora: bool, card: Mapping[str, Any]) -> str:
    """The README.md of an export (:func:`polyalign.modalities.exporting.model_card`)."""
    code = LORA_CARD.format(kind=type(network).__name__) if is_lora else parts_of(model).card
    library = "peft" if is_lora else "diffusers"
    return model_card(model.identity, library=library, tags=["text-to-audio"], is_lora=is_lora, code=code, card=card)
