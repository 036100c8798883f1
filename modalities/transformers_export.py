"""Export: a LoRA in peft's format, or a transformers folder, that stock peft and transformers open, with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyalign.core.adapter import Model
from polyalign.modalities import injected_lora
from polyalign.modalities.exporting import hub_name, model_card, written_beside
from polyalign.modalities.transformers_folders import plain, quiet, with_noise


@dataclass(frozen=True)
class Opening:
    """How transformers opens what is exported: the automatic class of the model, the part of ``Model.parts`` that is saved
    beside it (tokenizer or processor) with its automatic class, and the hub's name of the task."""

    model: str
    part: str
    part_class: str
    pipeline_tag: str


def export(model: Model, folder: Path, opening: Opening, card: Mapping[str, Any] | None = None) -> None:
    """Write the trained model into ``folder``, with its tokenizer's or processor's files and README.md, the card.

    Where there is a LoRA: ``adapter_config.json`` and ``adapter_model.safetensors``. Else the whole model, with the dropout
    values that the base's configuration had.

    Everything is written beside the folder first and then renamed into place, file by file, so that an interruption or a full
    disk leaves the earlier export as it was.
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
            model.parts[opening.part].save_pretrained(partial)
        said = _card_of(model, opening, is_lora=is_lora, card=card or {})
        (partial / "README.md").write_text(said, encoding="utf-8")


def _restore_config(file: Path, noise: Mapping[str, float]) -> None:
    """Dropout as the base had it: switching it off was a matter of this training."""
    if noise:
        config = with_noise(json.loads(file.read_text(encoding="utf-8")), noise)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card_of(model: Model, opening: Opening, *, is_lora: bool, card: Mapping[str, Any]) -> str:
    """The README.md of an export (:func:`polyalign.modalities.exporting.model_card`)."""
    imports = f"from transformers import {opening.model}, {opening.part_class}\n"
    if is_lora:
        base = hub_name(model.identity) or "BASE"
        imports = "from peft import PeftModel\n" + imports
        usage = f'model = PeftModel.from_pretrained({opening.model}.from_pretrained("{base}"), "THIS_FOLDER")'
    else:
        usage = f'model = {opening.model}.from_pretrained("THIS_FOLDER")'
    code = f'{imports}\n{usage}\n{opening.part} = {opening.part_class}.from_pretrained("THIS_FOLDER")'
    library = "peft" if is_lora else "transformers"
    tag = {"pipeline_tag": opening.pipeline_tag}
    return model_card(model.identity, library=library, tags=[], is_lora=is_lora, code=code, card=card, **tag)
