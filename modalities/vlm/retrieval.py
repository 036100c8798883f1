"""Pictures that are similar to a picture: an index over those of a data set (Re-Align, arXiv 2502.13146).

The paper compares pictures by the vision encoder of the model itself; here that is the mean of its last states (``tower``) or
of what the language model gets to see (``projector``), or any network of :mod:`polyalign.evaluation.feature_spaces`. Vectors
are brought to unit length, so that their products are cosines. A picture never finds itself, nor one of the same pixels.

Letters: N different pictures, D width of a vector, k neighbours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.optional import require
from polyalign.core.progress import ProgressLine
from polyalign.datasets.pictures import fingerprint
from polyalign.modalities.content_cache import ContentCache
from polyalign.modalities.picture_contents import content_of, decode
from polyalign.modalities.transformers_folders import autocast, plain
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.features import as_pixels
from polyalign.modalities.vlm.re_align_config import OWN_ENCODERS, ReAlignConfig

TOGETHER = 16
"""Pictures that are open at once while they are embedded."""

Kind = Literal["exact", "faiss", "ivf"]


@dataclass(frozen=True)
class Encoder:
    """What sees pictures: ``identity`` says by which weights and in which way, ``embed`` gives (B, D) of B pictures."""

    identity: str
    embed: Callable[[Sequence[Image.Image]], np.ndarray]


def encoder_of(adapter: VlmAdapter, model: Model, config: ReAlignConfig) -> Encoder:
    """The encoder of a configuration.

    Raises:
        UserError: weights that cannot be read, or a model whose vision encoder does not show its states.
    """
    if config.encoder in OWN_ENCODERS:
        return own_encoder(adapter, model, config.encoder)
    from polyalign.evaluation.feature_spaces import open_space

    space = open_space(
        config.encoder, model=config.encoder_model, architecture=config.encoder_architecture, device=adapter.settings.device
    )
    told = space.as_json()
    return Encoder(" | ".join(told[name] for name in sorted(told)), space.of_pictures)


def own_encoder(adapter: VlmAdapter, model: Model, part: str = "tower") -> Encoder:
    """The model's own vision encoder: the mean over places of its last states, or of what its projector makes of them."""
    network = plain(model.network)
    parameter = next(network.parameters())

    def one(picture: Image.Image) -> Tensor:
        seen = adapter.prompt(model, {"prompt": "", "images": [picture]}, where="a picture of the index").pictures
        inputs = as_pixels([[seen[0].inputs]], parameter)
        with autocast(adapter.settings, parameter.device):
            found = network.get_image_features(**inputs, return_dict=True)
        states = found.pooler_output if part == "projector" else getattr(found, "last_hidden_state", None)
        if states is None:
            raise UserError(
                f"{type(network).__name__} does not show the states of its vision encoder; set encoder: projector, or another"
            )
        parts = states if isinstance(states, list | tuple) else [states]
        return torch.cat([part.flatten(0, -2) for part in parts]).float().mean(0)

    @torch.no_grad()
    def embed(pictures: Sequence[Image.Image]) -> np.ndarray:
        return torch.stack([one(picture) for picture in pictures]).cpu().numpy()

    options = dict(sorted(adapter.settings.picture_options.items()))
    return Encoder(f"{model.identity} {part} {parameter.dtype} {adapter.settings.dtype} {options}", embed)


@dataclass(frozen=True)
class Found:
    """A picture of an index: its place among those the index was made from, and its cosine to what was looked for."""

    place: int
    cosine: float


class PictureIndex:
    """Unit vectors (N, D) of pictures, those of the same pixels once, and the search in them.

    Args:
        vectors: (N, D) float32 of unit length.
        member: of each picture that was given, its row in ``vectors``.
        kind: ``exact`` by NumPy; ``faiss`` (the same figures) and ``ivf`` (approximate) by FAISS.
        lists, probes: of ``ivf``: how many clusters there are (None: the square root of N), and how many are searched.

    Raises:
        UserError: FAISS is asked for and not there.
    """

    def __init__(
        self, vectors: np.ndarray, member: Sequence[int], *, kind: Kind = "exact", lists: int | None = None, probes: int = 8
    ):
        self.vectors, self.member = np.ascontiguousarray(vectors, dtype=np.float32), list(member)
        self.first = self._firsts()
        self._faiss = None if kind == "exact" else _faiss_index(self.vectors, kind, lists, probes)

    def __len__(self) -> int:
        return len(self.vectors)

    def _firsts(self) -> list[int]:
        """The first of the given pictures that each row belongs to."""
        found: dict[int, int] = {}
        for place, row in enumerate(self.member):
            found.setdefault(row, place)
        return [found[row] for row in range(len(self.vectors))]

    def similar(self, place: int, k: int, *, besides: Collection[int] = ()) -> list[Found]:
        """At most ``k`` pictures, the most similar first (of equals the earlier one), other than the given picture ``place``,
        those ``besides``, and any of the same pixels."""
        own, out = self.member[place], {self.member[place], *(self.member[other] for other in besides)}
        if self._faiss is None:
            cosines = self.vectors @ self.vectors[own]
            some = min(k + len(out), len(cosines))
            least = np.partition(cosines, -some)[-some]
            rows = np.flatnonzero(cosines >= least)
            values = cosines[rows]
        else:
            scores, ids = self._faiss.search(self.vectors[own : own + 1], min(k + len(out), len(self)))
            there = ids[0] >= 0
            rows, values = ids[0][there], scores[0][there]
        order = np.lexsort((rows, -values))
        found = [Found(self.first[int(rows[at])], float(values[at])) for at in order if int(rows[at]) not in out]
        return found[:k]


def index_of(
    pictures: Sequence[Any], encoder: Encoder, *, cache: ContentCache | None = None, where: str = "picture", **options: Any
) -> PictureIndex:
    """The index of pictures in any form that a row may have them in (PIL, bytes, paths, the store's struct), opened a few at a
    time. With a ``cache`` that has a folder its vectors are kept there under their content, and computed once.

    Args:
        options: of :class:`PictureIndex`.

    Raises:
        UserError: no picture, or a damaged one, with its place.
    """
    if not pictures:
        raise UserError("there are no pictures to make an index of")
    hashes = [fingerprint(content_of(picture, where=f"{where} {place}")) for place, picture in enumerate(pictures)]

    def make() -> dict[str, Tensor]:
        vectors, member = _embedded(pictures, hashes, encoder, where)
        return {"vectors": torch.from_numpy(vectors), "member": torch.tensor(member)}

    entry = make() if cache is None else cache.get(("picture index", encoder.identity, *hashes), make)
    return PictureIndex(entry["vectors"].numpy(), entry["member"].tolist(), **options)


def _embedded(pictures: Sequence[Any], hashes: Sequence[str], encoder: Encoder, where: str) -> tuple[np.ndarray, list[int]]:
    """Unit vectors (N, D) of the pictures that differ in pixels, and for each given picture which of them it is."""
    rows: dict[str, int] = {}  # by pixels
    known: dict[str, int] = {}  # by content, so that a file that comes again is not opened again
    parts, waiting = [], []
    plain_lines = Console(file=sys.stderr, force_terminal=False)  # another bar may be on the screen
    with ProgressLine("index of pictures", total=len(pictures), console=plain_lines) as line:
        for place, (picture, key) in enumerate(zip(pictures, hashes, strict=True)):
            if key not in known:
                named = f"{where} {place}"
                opened = decode(content_of(picture, where=named), where=named)
                pixels = fingerprint(opened)
                if pixels not in rows:
                    rows[pixels] = len(rows)
                    waiting.append(opened)
                known[key] = rows[pixels]
            if len(waiting) == TOGETHER or (waiting and place == len(pictures) - 1):
                parts.append(_unit(encoder.embed(waiting), encoder))
                waiting = []
            line.advance()
    return np.concatenate(parts), [known[key] for key in hashes]


def _unit(vectors: np.ndarray, encoder: Encoder) -> np.ndarray:
    wide = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not np.isfinite(wide).all() or not (lengths > 0).all():
        raise UserError(
            f"the encoder ({encoder.identity}) gives a picture no vector that has a direction; take another encoder"
        )
    return (wide / lengths).astype(np.float32)


def _faiss_index(vectors: np.ndarray, kind: Kind, lists: int | None, probes: int) -> Any:
    """FAISS's index of inner products: flat, or with inverted lists."""
    faiss = require("faiss", extra="retrieval", purpose=f"index: {kind}")
    flat = faiss.IndexFlatIP(vectors.shape[1])
    if kind == "faiss":
        flat.add(vectors)
        return flat
    number = max(1, min(len(vectors), lists or round(len(vectors) ** 0.5)))
    index = faiss.IndexIVFFlat(flat, vectors.shape[1], number, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # fewer are as many clusters as were asked for, and nothing to warn of
    index.train(vectors)
    index.add(vectors)
    index.nprobe = min(number, probes)
    return index
