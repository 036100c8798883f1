"""Export: a LoRA in peft's format, or a transformers folder, that stock peft and transformers open, with a model card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from polyalign.core.adapter import Model
from polyalign.core.files import disk_full_explained
from polyalign.modalities.text import lora
from polyalign.modalities.text.loading import plain, quiet


def export(model: Model, folder: Path, card: Mapping[str, Any] | None = None) -> None:
    """Write the trained model into ``folder``, with the tokenizer's files and README.md, the card.

    Where there is a LoRA: ``adapter_config.json`` and ``adapter_model.safetensors``. Else the whole model, with the dropout
    values that the base's configuration had.

    Everything is written beside the folder first and then renamed into place, file by file, so that an interruption or a full
    disk leaves the earlier export as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with disk_full_explained(f"the export {folder}, which is as it was before"):
            _write(model, partial, card or {})
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(partial)


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
    (folder / "README.md").write_text(model_card(model, is_lora=is_lora, card=card), encoding="utf-8")


def _restore_config(file: Path, noise: Mapping[str, float]) -> None:
    """Dropout as the base had it: switching it off was a matter of this training."""
    if noise:
        config = json.loads(file.read_text(encoding="utf-8")) | dict(noise)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_card(model: Model, *, is_lora: bool, card: Mapping[str, Any]) -> str:
    """The README.md of an export: the hub's header, how to load it, and what it was made with (``card``, key by key)."""
    name = model.identity.split("@")[0]
    header: dict[str, Any] = {
        "library_name": "peft" if is_lora else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["polyalign", "preference-alignment"],
    }
    if is_lora:
        header["tags"].append("lora")
    if name.count("/") == 1:
        header["base_model"] = name
    base = name if name.count("/") == 1 else "BASE"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if is_lora:
        imports = "from peft import PeftModel\n" + imports
        usage = f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "THIS_FOLDER")'
    else:
        usage = 'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")'
    usage += '\ntokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {card.get('title', 'Aligned ' + ('LoRA of ' if is_lora else '') + name)}",
        f"Aligned with preferences by polyalign. Base: `{model.identity}`.",
        f"```python\n{imports}\n{usage}\n```",
    ]
    rows = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in card.items() if key != "title"]
    if rows:
        lines.append("\n".join(["| setting | value |", "|---|---|", *rows]))
    return "\n\n".join(lines) + "\n"
