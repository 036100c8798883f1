"""mia_dpo.json: attention ratios of the three formats, perplexity, the geometry of the composed pictures, and the loss.

The original sums attention in float32. Of composed pictures the pixels outside the strips of names are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_adapters.cases import Case, agree, tensor
from golden_adapters.sequences import FLOAT32, agree_pairs, columns, evaluate
from PIL import Image
from torch import Tensor

from polyalign.core.objectives import build
from polyalign.core.objectives.table import DPO
from polyalign.datasets.multi_image import grid, picture_in_picture
from polyalign.modalities.vlm.attention_ratio import block_ratios, centre_ratio, image_attention, sequence_shares
from polyalign.modalities.vlm.filters import path_perplexity

PLACEHOLDER, TOKENS, SIDE = -200, 576, 24


def method_of(content: Mapping[str, Any]) -> str:
    return content["params"]["fn"]


def _attention(case: Case) -> tuple[Tensor, list[range]]:
    """The rows (queries, keys) of the generated tokens by the file's formula, and where the images are."""
    ids, formula = case.inputs["input_ids"][0], case.inputs["attn_formula"]
    spans, prompt = [], 0
    for token in ids:
        size = TOKENS if token == PLACEHOLDER else 1
        if token == PLACEHOLDER:
            spans.append(range(prompt, prompt + size))
        prompt += size
    generated = case.inputs["n_generated"]
    rows = torch.zeros(generated - 1, prompt + generated - 1, dtype=torch.float64)
    heads = torch.arange(1, case.inputs["n_heads"] + 1, dtype=torch.float64).unsqueeze(1)
    for step in range(1, generated):
        keys = torch.arange(prompt + step, dtype=torch.float64)
        weights = 1.2 + torch.sin(formula["a"] * heads + formula["b"] * step + formula["c"] * keys)
        rows[step - 1, : prompt + step] = (weights / weights.sum(dim=1, keepdim=True)).mean(dim=0)
    return rows, spans


def _sequence(case: Case) -> None:
    attention = image_attention(*_attention(case))
    agree("means", torch.stack([tokens.mean() for tokens in attention]), case.outputs["means"], **FLOAT32)
    agree("ratio", sequence_shares(attention)[case.params["target"] - 1], case.outputs["ratio"], **FLOAT32)
    for place, row in enumerate(case.outputs["map_row0"]):
        agree(f"first row of map {place}", attention[place][:SIDE], row, **FLOAT32)


def _one_map(case: Case) -> None:
    (attention,) = image_attention(*_attention(case))
    found = attention.reshape(SIDE, SIDE)
    target = case.params["target"] - 1
    ratio = block_ratios(found, *case.params["rows_cols"])[target]
    agree("map", found, case.outputs["map"], **FLOAT32)
    agree("ratio", ratio, case.outputs["ratio"], **FLOAT32)
    agree("block_sum", ratio * found.sum(), case.outputs["block_sum"], **FLOAT32)
    agree("center16_ratio", centre_ratio(found), case.outputs["center16_ratio"], **FLOAT32)


def _blocks(case: Case) -> None:
    ratios = block_ratios(tensor(case.inputs["map"]), *case.params["rows_cols"])
    agree("ratios", ratios, case.outputs["ratios"], **FLOAT32)


def _perplexity(case: Case) -> None:
    logits = tensor(case.inputs["scores"])
    agree("max_probs", logits.softmax(dim=-1).amax(dim=-1), case.outputs["max_probs"], **FLOAT32)
    agree("ppl", path_perplexity(logits), case.outputs["ppl"], **FLOAT32)


def _solid(case: Case) -> list[Image.Image]:
    pairs = zip(case.inputs["sizes_wh"], case.inputs["colors"], strict=True)
    return [Image.new("RGB", tuple(size), tuple(colour)) for size, colour in pairs]


def _collage(case: Case) -> None:
    arrangement = grid.arranged(_solid(case))
    (sheet,) = arrangement.images
    assert list(sheet.size) == case.outputs["size_wh"]
    width, height = sheet.size
    across = [int(x) for x in torch.linspace(3, width - 4, 8, dtype=torch.float64).tolist()]
    down = [int(y) for y in torch.linspace(60, height - 4, 8, dtype=torch.float64).tolist()]
    cells = [place.cell for place in arrangement.places if place.cell is not None]
    compared = 0
    for y, row in zip(down, case.outputs["pixels"], strict=True):
        for x, expected in zip(across, row, strict=True):
            if any(cell[0] <= x < cell[2] and cell[1] - grid.MARGIN <= y < cell[1] for cell in cells):
                continue
            assert list(sheet.getpixel((x, y))) == expected, (x, y)  # pyright: ignore[reportArgumentType]
            compared += 1
    assert compared >= 48


def _inset(case: Case) -> None:
    box = picture_in_picture.inset_box(tuple(case.inputs["inner_wh"]), tuple(case.inputs["outer_wh"]))
    assert list(box) == case.outputs["inner_box_xyxy"]
    assert case.inputs["outer_wh"] == case.outputs["size_wh"]


def _loss(case: Case) -> None:
    policy = columns(case.inputs, ("policy_chosen", "policy_rejected"))
    reference = columns(case.inputs, ("ref_chosen", "ref_rejected"))
    agree_pairs(case.outputs, evaluate(build(DPO()), policy, reference, beta=case.params["beta"]))


METHODS: dict[str, Callable[[Case], None]] = {
    "make_data_duotu.calculation_attention + ratio": _sequence,
    "make_data_ping.calculation_attention + split_and_calculate_ratio; make_data_pip.calculate_center_ratio": _one_map,
    "split_and_calculate_ratio": _blocks,
    "compute_softmax_max_and_ppl": _perplexity,
    "combine_images_with_labels": _collage,
    "resize_and_paste_image": _inset,
    "LLaVA-Hound trl dpo_loss": _loss,
}
NOT_IN_PLACE: dict[str, str] = {}
