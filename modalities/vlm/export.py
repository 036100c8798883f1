"""Export: a LoRA in peft's format, or a transformers folder, that stock peft and transformers open, with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyalign.core.adapter import Model
from polyalign.modalities import injected_lora
from polyalign.modalities.exporting import hub_name, model_card, written_beside
from polyalign.modalities.transformers_folders import plain, quiet, with_noise


def export(model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
    """Write the trained model into ``folder``, with the processor's files and README.md, the card.

    Where there is a LoRA: ``adapter_config.json`` and ``adapter_model.safetensors``. Else the whole model, with the dropout
    values that the base's configuration had. An interruption or a full disk leaves an earlier export as it was.
    """
    with written_beside(folder) as partial:
        network = plain(model.network)
        is_lora = injected_lora.NAME in injected_lora.names(network)
        with quiet():
            if is_lora:
                injected_lora.save(network, partial, base=model.identity.split("@")[0])
            else:
                network.save_pretrained(partial)
                _restore_config(partial / "config.json", model.parts["config_noise"])
            model.parts["processor"].save_pretrained(partial)
        (partial / "README.md").write_text(card_of(model, is_lora=is_lora, card=card or {}), encoding="utf-8")


def _restore_config(file: Path, noise: Mapping[str, float]) -> None:
    """Dropout as the base had it: switching it off was a matter of this training."""
    if noise:
        config = with_noise(json.loads(file.read_text(encoding="utf-8")), noise)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def card_of(model: Model, *, is_lora: bool, card: Mapping[str, Any]) -> str:
    """The README.md of an export (:func:`polyalign.modalities.exporting.model_card`)."""
    imports = "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
    if is_lora:
        base = hub_name(model.identity) or "BASE"
        imports = "from peft import PeftModel\n" + imports
        usage = f'model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{base}"), "THIS_FOLDER")'
    else:
        usage = 'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")'
    code = f'{imports}\n{usage}\nprocessor = AutoProcessor.from_pretrained("THIS_FOLDER")'
    library = "peft" if is_lora else "transformers"
    header = {"pipeline_tag": "image-text-to-text"}
    return model_card(model.identity, library=library, tags=[], is_lora=is_lora, code=code, card=card, **header)
