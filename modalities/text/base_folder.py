"""What a base says by its name and its files alone, before torch is imported and anything is opened."""

from __future__ import annotations

import json
from pathlib import Path

from polyalign.modalities.base_folders import local_folder, refuse_what_is_no_base

__all__ = ["TINY_BASE", "local_folder", "positions_of", "refuse_what_is_no_base"]

TINY_BASE = Path(__file__).parent / "tiny_base"


def positions_of(folder: Path) -> int | None:
    """How many positions the model in ``folder`` has by its configuration; None where that does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # loading it will say what is wrong
    found = [config.get(name) for name in ("max_position_embeddings", "n_positions")] if isinstance(config, dict) else []
    return next((value for value in found if isinstance(value, int)), None)
