"""Export: a LoRA file or a diffusers folder that stock diffusers opens, with a model card."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from polyalign.core.adapter import Model
from polyalign.core.files import disk_full_explained
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
    pipeline = assemble(model)
    network = network_of(pipeline)
    is_lora = lora.NAME in lora.names(network)
    with quiet():
        if is_lora:
            lora.save(pipeline, network, folder)
        else:
            pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").write_text(model_card(model, is_lora=is_lora, card=card), encoding="utf-8")


def model_card(model: Model, *, is_lora: bool, card: Mapping[str, Any]) -> str:
    """The README.md of an export: the hub's header, how to load it, and what it was made with (``card``, key by key)."""
    kind = model.parts["pipeline_class"].__name__
    name = model.identity.split("@")[0]
    header: dict[str, Any] = {"library_name": "diffusers", "tags": ["text-to-image", "polyalign", "preference-alignment"]}
    if is_lora:
        header["tags"].append("lora")
    if name.count("/") == 1:
        header["base_model"] = name
    base = name if name.count("/") == 1 else "BASE"
    if is_lora:
        usage = f'pipeline = {kind}.from_pretrained("{base}")\npipeline.load_lora_weights("THIS_FOLDER")'
    else:
        usage = f'pipeline = {kind}.from_pretrained("THIS_FOLDER")'
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {card.get('title', 'Aligned ' + ('LoRA of ' if is_lora else '') + name)}",
        f"Aligned with preferences by polyalign. Base: `{model.identity}`.",
        f"```python\nfrom diffusers import {kind}\n\n{usage}\n```",
    ]
    rows = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in card.items() if key != "title"]
    if rows:
        lines.append("\n".join(["| setting | value |", "|---|---|", *rows]))
    return "\n\n".join(lines) + "\n"
