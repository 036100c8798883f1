"""MIA-DPO's attention-aware selection: how much of the attention to images an answer paid to the image it was asked about.

From rows of attention (queries: the answer's tokens; keys: the whole sequence; averaged over the heads of one layer) to one
number per answer. Sources: arXiv 2410.17637, and the released selection scripts, whose numbers the golden vectors hold.

- Sequence: r = d_target / sum_i d_i, with d_i the mean attention to a token of image i.
- Collage: the same, d_i being the mean over the part of each token that lies in image i's cell.
- Picture in picture: r = attention inside the inner picture over attention inside the whole.

Where this differs from the released code: cells are found through the processor's real geometry
(:mod:`polyalign.modalities.vlm.token_geometry`). The original cuts the 24 x 24 map of LLaVA-1.5 into rows x columns, though the
padding above and below a wide collage takes half of it and more, and takes the middle 16 x 16 for any inner picture;
``compat=True`` does so too. With one token in the answer the original averages over every row of the prompt; here the row that
predicts it is taken (:func:`answer_rows`).

Letters: Q queries, L keys, N image tokens of a picture, K named images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.modalities.vlm.mia_dpo_config import THRESHOLDS, Rule, Thresholds
from polyalign.modalities.vlm.token_geometry import Geometry, check_tokens


def middle_layer(layers: int) -> int:
    """The layer that is recorded, counted from 0: 16 of 32, as published."""
    return layers // 2


def answer_rows(prompt: int, answer: int) -> range:
    """The queries that are averaged, as positions in the sequence: the answer's tokens that were fed back, all but the last;
    of an answer of one token the position that predicts it.

    Args:
        prompt, answer: numbers of tokens, images expanded.

    Raises:
        UserError: an empty answer.
    """
    if answer < 1:
        raise UserError("an answer without tokens has no attention; drop it before the selection")
    return range(prompt, prompt + answer - 1) if answer > 1 else range(prompt - 1, prompt)


def image_attention(rows: Tensor, positions: Sequence[Tensor | Sequence[int] | range]) -> list[Tensor]:
    """(N,) for each picture: the mean over the queries of the attention to each of its tokens.

    Args:
        rows: (Q, L) attention of the answer's tokens, averaged over the heads of one layer.
        positions: of each picture's tokens in the sequence.

    Raises:
        UserError: no row, or a picture without tokens.
    """
    if rows.ndim != 2 or not len(rows):
        raise UserError(f"attention rows of shape {tuple(rows.shape)}; expected (queries, keys) with at least one query")
    mean = rows.mean(dim=0)
    found = []
    for number, places in enumerate(positions, start=1):
        index = torch.as_tensor(list(places) if isinstance(places, range) else places, device=rows.device)
        if not index.numel() or int(index.max()) >= len(mean):
            raise UserError(f"image {number} has {index.numel()} token(s) in a sequence of {len(mean)}; were they cut off?")
        found.append(mean[index])
    return found


@dataclass(frozen=True)
class Looked:
    """Where an answer looked: ``shares`` (K,) float64 over the named images, sum 1; ``ratio`` of the target or targets."""

    shares: Tensor
    ratio: float
    targets: tuple[int, ...]
    format: str

    @property
    def target_is_first(self) -> bool:
        """Whether a target is the image that was looked at most."""
        return int(self.shares.argmax()) in self.targets


def looked(
    layout: Mapping[str, Any], attention: Sequence[Tensor], geometries: Sequence[Geometry], *, compat: bool = False
) -> Looked:
    """The ratio of a row of :mod:`polyalign.datasets.multi_image`.

    Args:
        layout: the row's.
        attention: of each picture's tokens (:func:`image_attention`).
        geometries: of each picture's tokens. ``compat`` needs none, and sequences only have their lengths checked by them.
        compat: cells as the released code cuts them; only a picture whose tokens are one square map has such.

    Raises:
        UserError: tokens that do not fit the geometry, or a named image that the processor has cut away.
    """
    if layout["format"] == "picture_in_picture":
        inner = centre_ratio(_square(attention[0])) if compat else _inset(layout, attention[0], geometries[0])
        shares = torch.tensor([inner, 1 - inner], dtype=torch.float64)
    elif layout["format"] == "grid":
        shares = _cells_compat(attention[0], layout) if compat else _cells(layout, attention[0], geometries[0])
    else:
        if len(attention) != len(layout["places"]):
            raise UserError(f"a sequence of {len(layout['places'])} images, and attention to {len(attention)}")
        for number, (tokens, geometry) in enumerate(zip(attention, geometries, strict=False), start=1):
            check_tokens(geometry, len(tokens), f"Image{number}")
        shares = sequence_shares(attention)
    targets = tuple(layout["targets"])
    return Looked(shares, float(shares[list(targets)].sum()), targets, layout["format"])


def sequence_shares(attention: Sequence[Tensor]) -> Tensor:
    """(K,) each picture's mean attention over the sum of these."""
    means = torch.stack([tokens.double().mean() for tokens in attention])
    return means / means.sum()


def box_densities(attention: Tensor, shares: Tensor) -> Tensor:
    """(K,) mean attention of the tokens in each box, tokens counted by the part of them that lies in it: sum_n a_n s_nk /
    sum_n s_nk. Uniform attention gives equal densities, however much of a cell the processor shows.

    Args:
        attention: (N,) of a picture's tokens.
        shares: (N, K) of :meth:`Geometry.shares`.

    Raises:
        UserError: no token shows a box.
    """
    area = shares.sum(dim=0)
    if bool((area <= 0).any()):
        gone = ", ".join(f"Image{int(place) + 1}" for place in torch.nonzero(area <= 0).flatten())
        raise UserError(f"the processor cuts {gone} away: no image token shows any of it. Take one that pads or tiles")
    return attention.double() @ shares.to(attention.device) / area


def _cells(layout: Mapping[str, Any], attention: Tensor, geometry: Geometry) -> Tensor:
    check_tokens(geometry, len(attention), "the collage")
    density = box_densities(attention, geometry.shares([place["cell"] for place in layout["places"]]))
    return density / density.sum()


def _inset(layout: Mapping[str, Any], attention: Tensor, geometry: Geometry) -> float:
    check_tokens(geometry, len(attention), "the picture")
    inner, whole = geometry.shares([layout["places"][0]["box"], geometry.whole]).unbind(dim=1)
    return float((attention.double() * inner).sum() / (attention.double() * whole).sum())


def block_ratios(attention_map: Tensor, rows: int, columns: int) -> Tensor:
    """(rows * columns,) the released code's collage: the map (H, W) cut into blocks, remainders to the first, each block's sum
    over the whole."""
    blocks = [block.sum() for band in attention_map.tensor_split(rows, dim=0) for block in band.tensor_split(columns, dim=1)]
    return torch.stack(blocks) / attention_map.sum()


def centre_ratio(attention_map: Tensor) -> float:
    """The released code's picture in picture: the middle two thirds of the map (H, W) each way, 16 of 24, over the whole."""
    height, width = attention_map.shape
    top, left = (height - height * 2 // 3) // 2, (width - width * 2 // 3) // 2
    middle = attention_map[top : top + height * 2 // 3, left : left + width * 2 // 3]
    return float(middle.sum() / attention_map.sum())


def _square(attention: Tensor) -> Tensor:
    side = int(len(attention) ** 0.5)
    if side * side != len(attention):
        raise UserError(
            f"compat: {len(attention)} image tokens are no square map; the released selection is for LLaVA-1.5 alone"
        )
    return attention.double().reshape(side, side)


def _cells_compat(attention: Tensor, layout: Mapping[str, Any]) -> Tensor:
    cells = [place["cell"] for place in layout["places"]]
    rows, columns = len({cell[1] for cell in cells}), len({cell[0] for cell in cells})
    return block_ratios(_square(attention), rows, columns)


def looked_elsewhere(found: Looked, rule: Rule = "threshold", thresholds: Thresholds = THRESHOLDS) -> bool:
    """Whether a wrong answer is kept as rejected: it did not look where it should have.

    Args:
        rule: ``threshold``, as published; ``not_first``: the image that was looked at most is no target. With few or small
            images attention is nearly even and lies below every published threshold, so the first keeps all.
        thresholds: by format and number of images.

    Raises:
        UserError: no threshold for this format, number of images or number of targets.
    """
    if rule == "not_first":
        return not found.target_is_first
    limits = thresholds.get(found.format, {})
    number = len(found.shares)
    if number not in limits or len(found.targets) > 1:
        known = "; ".join(f"{name}: {', '.join(map(str, given))}" for name, given in thresholds.items())
        raise UserError(
            f"no threshold for {len(found.targets)} target(s) among {number} images in format {found.format!r} (there are: "
            f"{known}, one target each). Give one, or take the rule not_first"
        )
    return found.ratio <= limits[number] if found.format == "sequence" else found.ratio < limits[number]


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """The probability that a right answer's ratio is above a wrong one's, ties by half: 0.5 says that the ratio tells nothing.

    Raises:
        UserError: one of the two is empty.
    """
    if not len(right) or not len(wrong):
        raise UserError(f"{len(right)} right and {len(wrong)} wrong answers; the ratio's AUC needs both")
    ordered = np.sort(np.asarray(wrong, dtype=np.float64))
    below = np.searchsorted(ordered, right, side="left") + np.searchsorted(ordered, right, side="right")
    return float(below.mean() / (2 * len(ordered)))
