"""Prompts of many kinds out of many: sentence embeddings from a local encoder, clustered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyalign.core.errors import UserError
from polyalign.datasets.audio.clusters import spread
from polyalign.modalities.audio.config import SelectConfig

TOGETHER = 64
LONGEST = 512  # tokens; captions are far shorter


def embeddings(prompts: Sequence[str], folder: str) -> np.ndarray:
    """(N, D) unit vectors: the mean of the encoder's last states over a prompt's tokens, as gte, e5 and most sentence encoders
    are used. Only a folder is read, never a hub, and no code of it is run.

    Raises:
        UserError: no such folder, or no encoder in it.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"prompts.select.embedder: there is no folder {folder}; give one with a sentence encoder's files")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
        encoder: Any = AutoModel.from_pretrained(
            place, local_files_only=True, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"prompts.select.embedder: {folder} does not open as an encoder: {str(error).splitlines()[0]}"
        ) from error
    longest = min(LONGEST, getattr(encoder.config, "max_position_embeddings", LONGEST))
    found = []
    with torch.no_grad():
        for start in range(0, len(prompts), TOGETHER):
            part = list(prompts[start : start + TOGETHER])
            tokens = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            mask = tokens["attention_mask"].unsqueeze(-1)
            states = encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
            found.append(torch.nn.functional.normalize(mean, dim=-1).numpy())
    return np.concatenate(found)


def selected(conditions: Sequence[dict[str, Any]], select: SelectConfig, seed: int) -> list[dict[str, Any]]:
    """At most ``per_cluster`` conditions of each of ``clusters`` clusters, in their order.

    Raises:
        UserError: fewer prompts than clusters, or no encoder.
    """
    if len(conditions) < select.clusters:
        raise UserError(
            f"prompts.select.clusters is {select.clusters}, and there are {len(conditions)} prompts. Take fewer clusters"
        )
    found = embeddings([condition["prompt"] for condition in conditions], select.embedder)
    return [conditions[place] for place in spread(found, select.clusters, select.per_cluster, seed=seed)]
