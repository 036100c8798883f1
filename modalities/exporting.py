"""What the exports of all modalities share: files that come into place whole, and the model card."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from polyalign.core.files import disk_full_explained


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``folder``. When the block ends well its files are renamed into ``folder``, one by one,
    over those of the same names; an interruption or a full disk before that leaves the earlier export as it was.

    Raises:
        UserError: the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with disk_full_explained(f"the export {folder}, which is as it was before"):
            yield partial
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(partial)


def hub_name(identity: str) -> str | None:
    """The hub id in a model's identity, or None where the base is a folder."""
    name = identity.split("@")[0]
    return name if name.count("/") == 1 else None


def model_card(
    identity: str, *, library: str, tags: Sequence[str], is_lora: bool, code: str, card: Mapping[str, Any], **header: Any
) -> str:
    """The README.md of an export: the hub's header, how to load it, and what it was made with.

    Args:
        identity: of the base, with its hash.
        library: that opens the export. header: further keys of the hub's header.
        code: Python that opens it.
        card: what it was made with, key by key; ``title`` is the headline.
    """
    name = identity.split("@")[0]
    top: dict[str, Any] = {"library_name": library, **header}
    top["tags"] = [*tags, "polyalign", "preference-alignment", *(["lora"] if is_lora else [])]
    if hub_name(identity) is not None:
        top["base_model"] = name
    lines = [
        f"---\n{yaml.safe_dump(top, sort_keys=False)}---",
        f"# {card.get('title', 'Aligned ' + ('LoRA of ' if is_lora else '') + name)}",
        f"Aligned with preferences by polyalign. Base: `{identity}`.",
        f"```python\n{code}\n```",
    ]
    rows = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in card.items() if key != "title"]
    if rows:
        lines.append("\n".join(["| setting | value |", "|---|---|", *rows]))
    return "\n\n".join(lines) + "\n"
