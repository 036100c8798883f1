"""The contract between the core and a modality. The core calls these; it never looks inside a batch's tensors or a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from polyalign.core.candidates import Batch
from polyalign.core.scores import Scores

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A loaded model. ``network`` is the part that preferences train (a UNet, a language model); ``parts`` are the frozen rest
    (VAE, text encoders, tokenizers, schedulers). ``identity`` names the base and its content hash, for provenance.
    """

    network: nn.Module
    parts: Mapping[str, Any]
    identity: str

    def with_network(self, network: nn.Module) -> Model:
        """The same model around another network: a wrapped one (DDP), a frozen copy, an averaged one."""
        return replace(self, network=network)


class Adapter(Protocol):
    """One per modality. Draws are whatever randomness a score needs (noise, timesteps, masks): made once for a batch, keyed by
    group id and step, shared by all candidates of a group and by policy and reference."""

    def load(self) -> Model: ...

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch: ...

    def draws(self, model: Model, batch: Batch, *, step: int) -> Any: ...

    def score(self, model: Model, batch: Batch, draws: Any) -> Scores: ...

    def sample(self, model: Model, conditions: Sequence[Any], seeds: Sequence[int]) -> list[Any]: ...

    def trainable(self, model: Model) -> Model: ...

    def export(self, model: Model, folder: Path) -> None: ...


class Judge(Protocol):
    """Scores outputs; higher is better. ``name`` and ``version`` go into the provenance of every pair it decides."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def score(self, conditions: Sequence[Any], outputs: Sequence[Any]) -> list[float]: ...
