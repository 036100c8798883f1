"""Export: a LoRA in peft's format, or a transformers folder, that stock peft and transformers open, with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyalign.core.adapter import Model
from polyalign.modalities.exporting import hub_name, model_card, written_beside
from polyalign.modalities.text import lora
from polyalign.modalities.text.loading import plain, quiet
from polyalign.modalities.transformers_folders import with_noise


def export(model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
    """Write the trained model into ``folder``, with the tokenizer's files and README.md, the card.

    Where there is a LoRA: ``adapter_config.json`` and ``adapter_model.safetensors``. Else the whole model, with the dropout
    values that the base's configuration had.

    Everything is written beside the folder first and then renamed into place, file by file, so that an interruption or a full
    disk leaves the earlier export as it was.
    """
    with written_beside(folder) as partial:
        _write(model, partial, card or {})


def _write(model: Model, folder: Path, card: Mapping[str, Any]) -> None:
    network = plain(model.network)
    is_lora = lora.NAME in lora.names(network)
    with quiet():
        if is_lora:
            lora.save(network, folder, base=model.identity.split("@")[0])
        else:
            network.save_pretrained(folder)
            _restore_config(folder / "config.json", model.parts["config_noise"])
        model.parts["tokenizer"].save_pretrained(folder)
    (folder / "README.md").write_text(card_of(model, is_lora=is_lora, card=card), encoding="utf-8")


def _restore_config(file: Path, noise: Mapping[str, float]) -> None:
    """Dropout as the base had it: switching it off was a matter of this training."""
    if noise:
        config = with_noise(json.loads(file.read_text(encoding="utf-8")), noise)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def card_of(model: Model, *, is_lora: bool, card: Mapping[str, Any]) -> str:
    """The README.md of an export (:func:`polyalign.modalities.exporting.model_card`)."""
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if is_lora:
        base = hub_name(model.identity) or "BASE"
        imports = "from peft import PeftModel\n" + imports
        usage = f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "THIS_FOLDER")'
    else:
        usage = 'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")'
    code = f'{imports}\n{usage}\ntokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
    library = "peft" if is_lora else "transformers"
    pipeline = {"pipeline_tag": "text-generation"}
    return model_card(model.identity, library=library, tags=[], is_lora=is_lora, code=code, card=card, **pipeline)
