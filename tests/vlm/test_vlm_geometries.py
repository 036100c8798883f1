"""The geometry of prompts' pictures by every family's own processor: as many tokens, and the right way round. That the
constructors agree with the processors' pixels is tested in test_token_geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_vlms import BUILDERS, picture

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.geometries import geometries_of
from polyalign.modalities.vlm.settings import VlmModelSettings

SIZES = [(40, 30), (30, 60), (64, 64), (150, 50)]


@pytest.mark.parametrize("family", BUILDERS)
def test_every_token_has_its_place(family: str, tiny_vlms: Callable[[str], Path]) -> None:
    adapter = VlmAdapter(VlmModelSettings(str(tiny_vlms(family)), device="cpu"))
    model = adapter.load()
    alone = [[picture(place, size)] for place, size in enumerate(SIZES)]
    for images in (*alone, [one for [one] in alone]):
        prompt = adapter.prompt(model, {"prompt": "what", "images": images}, where="here")
        for own, geometry in zip(prompt.pictures, geometries_of(model, prompt), strict=True):
            width, height = own.size
            assert len(geometry) == own.tokens and geometry.size == own.size
            halves = [(0, 0, width / 2, height), (width / 2, 0, width, height), (0, 0, width, height / 2)]
            left, right, upper = geometry.shares([*halves]).sum(0).tolist()
            assert left == pytest.approx(right, rel=0.1) and upper > 0  # a crop begins at a whole pixel
            if family != "llava":  # which cuts the long side off
                shown = torch.cat([view.boxes() for view in geometry.views])
                assert float(shown[:, 2].max()) >= width - 1e-6 and float(shown[:, 3].max()) >= height - 1e-6
    wide = geometries_of(model, adapter.prompt(model, {"prompt": "", "images": alone[3]}, where="here"))[0]
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        assert wide.views[0].columns > wide.views[0].rows
    if family in ("internvl", "idefics3", "smolvlm"):
        assert wide.views[0].box[2] < 150 and wide.views[-1].box == (0.0, 0.0, 150.0, 50.0)


def test_families_without_a_geometry(tiny_vlms: Callable[[str], Path]) -> None:
    adapter = VlmAdapter(VlmModelSettings(str(tiny_vlms("llava")), device="cpu"))
    model = adapter.load()
    other = Model(model.network, {**model.parts, "family": replace(model.parts["family"], name="another")}, model.identity)
    with pytest.raises(UserError, match="not known for another.*Known: llava"):
        geometries_of(other, adapter.prompt(model, {"prompt": "", "images": [picture(1)]}, where="here"))
