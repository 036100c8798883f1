"""Reference scores on the disk, by pair and place in the bank of draws.

Letters: K candidates, U units. An entry is 2 K U numbers, so millions of pairs fit; entries are written together as safetensors
shards, whose metadata lists what they hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.scores import Scores, Unit

Key = tuple[str, int]


@dataclass(frozen=True)
class Entry:
    """Values, mask (K, U) and notes (U,) of one pair under one draw."""

    tensors: dict[str, Tensor]
    unit: Unit
    value_meaningful: bool


class ScoreCache:
    """Scores of one reference.

    Args:
        folder: shared by caches of different identity, each of which has its own sub-folder.
        identity: what the scores depend on besides pair and draw.
        flush_every: entries between two writes; what is not written yet when a process dies is computed again.
    """

    def __init__(self, folder: Path, identity: str, *, flush_every: int = 1024):
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.flush_every = flush_every
        self.entries: dict[Key, Entry] = {}
        self.unwritten: dict[Key, Entry] = {}
        self.reload()

    def reload(self) -> None:
        """Read the shards on the disk, other processes' among them."""
        for path in sorted(self.folder.glob("*.safetensors")):
            self.entries |= read_shard(path)

    def __contains__(self, key: Key) -> bool:
        return key in self.entries

    def get(self, group_ids: Sequence[str], index: int, *, device: torch.device | str = "cpu") -> Scores | None:
        """Scores (G, K, U) if every one of the groups is there, else None."""
        found = [self.entries.get((group_id, index)) for group_id in group_ids]
        if any(entry is None for entry in found):
            return None
        entries = [entry for entry in found if entry is not None]
        units = max(entry.tensors["values"].shape[1] for entry in entries)
        padded = [{name: _pad(tensor, units) for name, tensor in entry.tensors.items()} for entry in entries]
        stacked = {name: torch.stack([tensors[name] for tensors in padded]).to(device) for name in padded[0]}
        return Scores(
            values=stacked.pop("values"),
            mask=stacked.pop("mask"),
            unit=entries[0].unit,
            value_meaningful=entries[0].value_meaningful,
            notes={name.removeprefix("notes."): tensor for name, tensor in stacked.items()},
        )

    def put(self, group_ids: Sequence[str], index: int, scores: Scores) -> None:
        """Keep values, mask and notes of a batch's scores. What is there already stays: its last bits may differ from those of
        another batch, and a resumed run must read the same.

        Raises:
            UserError: scores with whole distributions, or what was made of them, which a value for each unit cannot replace.
        """
        if scores.dense is not None and (scores.dense.kl is not None or scores.dense.distributions is not None):
            raise UserError(
                "train.reference.seat: cached keeps a value for each unit, and this objective needs dense statistics of the "
                "reference (a KL at each token). Use adapter_off or frozen."
            )
        tensors = {"values": scores.values, "mask": scores.mask}
        tensors |= {f"notes.{name}": note for name, note in scores.notes.items()}
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        for place, group_id in enumerate(group_ids):
            if (group_id, index) in self.entries:
                continue
            places = tensors["mask"][place].any(0).nonzero()
            used = int(places.max()) + 1 if len(places) else 0  # without this batch's padding
            own = {name: tensor[place, ..., :used].clone() for name, tensor in tensors.items()}
            self.entries[group_id, index] = self.unwritten[group_id, index] = Entry(own, scores.unit, scores.value_meaningful)
        if len(self.unwritten) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Write what is not on the disk yet as one shard, named by its content, so that processes never collide."""
        if not self.unwritten:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = shard_bytes(self.unwritten)
        atomic_write(self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors", content)
        self.unwritten = {}


def shard_bytes(entries: dict[Key, Entry]) -> bytes:
    tensors = {f"{place}.{name}": t for place, entry in enumerate(entries.values()) for name, t in entry.tensors.items()}
    first = next(iter(entries.values()))
    unit = {"kind": first.unit.kind, "elements": first.unit.elements, "steps": first.unit.steps}
    header = {"keys": list(entries), "unit": unit, "value_meaningful": first.value_meaningful}
    return save(tensors, metadata={"polyalign": json.dumps(header)})


def read_shard(path: Path) -> dict[Key, Entry]:
    with safe_open(path, framework="pt") as shard:
        header = json.loads(shard.metadata()["polyalign"])
        unit, meaningful = Unit(**header["unit"]), bool(header["value_meaningful"])
        tensors: list[dict[str, Tensor]] = [{} for _ in header["keys"]]
        for name in shard.keys():
            place, own = name.split(".", 1)
            tensors[int(place)][own] = shard.get_tensor(name)
    return {(str(g), int(i)): Entry(t, unit, meaningful) for (g, i), t in zip(header["keys"], tensors, strict=True)}


def _pad(tensor: Tensor, units: int) -> Tensor:
    """Zeros (False in a mask) up to ``units`` in the last dimension: batches of texts differ in length."""
    return torch.nn.functional.pad(tensor, (0, units - tensor.shape[-1]))
