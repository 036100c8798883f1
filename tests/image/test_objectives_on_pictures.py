"""Every objective that an image recipe can have, trained as an arm beside dpo on a tiny SDXL with random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from polyalign.core.errors import UserError
from polyalign.core.objectives import TABLE, build
from polyalign.core.objectives.table import SPEC
from polyalign.modalities.image.config import ImageRecipe
from polyalign.modalities.image.stages import refuse_early

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_runs import LORA, polyalign, recipe, write_recipe  # noqa: E402

FILLED: dict[str, dict[str, Any]] = {"ipo": {"reduction": "mean"}}


def content_with(base: Path, **arms: dict[str, Any]) -> dict[str, Any]:
    content = recipe(base, arms=arms)
    content["train"] |= {"steps": 1}
    return content


def served(base: Path) -> dict[str, dict[str, Any]]:
    """The rows that are not refused."""
    found = {}
    for name in TABLE:
        arm = {"name": name, **FILLED.get(name, {})}
        try:
            refuse_early(ImageRecipe.model_validate(content_with(base, arm=arm)))
        except UserError as error:
            assert str(error).startswith(f"arms.arm: {name} ")
        else:
            found[name] = arm
    return found


def test_all_that_are_not_refused_are_trained(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = served(base)
    assert {"mapo", "dspo", "dmpo", "diffusion_kto", "kto", "sdpo", "crpo", "nca", "exo", "adpo"} <= set(arms)
    assert not {"modpo", "orpo", "tdpo2", "ofs_dpo", "mcm_dpo", "tr_dpo"} & set(arms)
    config = write_recipe(tmp_path, content_with(base, **arms))
    assert polyalign("generate", config, tmp_path / "run") == 0
    assert polyalign("train", config, tmp_path / "run") == 0, capsys.readouterr().err
    for name, arm in arms.items():
        folder = tmp_path / "run" / "arms" / name
        assert (folder / LORA).is_file(), f"{name}: an adapter was written"
        (line,) = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        if name in ("dpo", "cdpo", "f_dpo", "sdpo", "sigmoid_norm", "aot", "online_dpo"):
            assert line["loss"] == pytest.approx(0.6931472, rel=1e-6), name
        assert build(SPEC.validate_python(arm)).name == name
