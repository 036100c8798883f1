"""Export: a LoRA file or a diffusers folder that stock diffusers opens, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyalign.core.adapter import Model
from polyalign.modalities.exporting import hub_name, model_card, written_beside
from polyalign.modalities.image import lora
from polyalign.modalities.image.families import network_of
from polyalign.modalities.image.loading import assemble, quiet


def export(model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
    """Write the trained model into ``folder``, with README.md, the card.

    Where there is a LoRA: ``pytorch_lora_weights.safetensors``. Else the whole pipeline, the network in ``unet/`` or
    ``transformer/``.

    Everything is written beside the folder first and then renamed into place, file by file, so that an interruption or a full
    disk leaves the earlier export as it was.
    """
    with written_beside(folder) as partial:
        _write(model, partial, card or {})


def _write(model: Model, folder: Path, card: Mapping[str, Any]) -> None:
    pipeline = assemble(model)
    network = network_of(pipeline)
    is_lora = lora.NAME in lora.names(network)
    with quiet():
        if is_lora:
            lora.save(pipeline, network, folder)
        else:
            pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").write_text(card_of(model, is_lora=is_lora, card=card), encoding="utf-8")


def card_of(model: Model, *, is_lora: bool, card: Mapping[str, Any]) -> str:
    """The README.md of an export (:func:`polyalign.modalities.exporting.model_card`)."""
    kind = model.parts["pipeline_class"].__name__
    if is_lora:
        base = hub_name(model.identity) or "BASE"
        usage = f'pipeline = {kind}.from_pretrained("{base}")\npipeline.load_lora_weights("THIS_FOLDER")'
    else:
        usage = f'pipeline = {kind}.from_pretrained("THIS_FOLDER")'
    code = f"from diffusers import {kind}\n\n{usage}"
    return model_card(model.identity, library="diffusers", tags=["text-to-image"], is_lora=is_lora, code=code, card=card)
