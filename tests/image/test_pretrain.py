"""Training the embedded base: a killed run goes on from states of the same run only, and the record says how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.modalities.image import pretrain
from polyalign.modalities.image.pretrain import Settings, Stage, Work
from polyalign.modalities.image.pretrain_data import Drawings, Shapes


class FewMeasured(Shapes):
    """The world, measured on six pictures, one of each task."""

    def conditions(self, count: int) -> list[dict[str, Any]]:
        return super().conditions(6)


def settings(**changes: Any) -> Settings:
    few = {"pictures": 8, "autoencoder_steps": 1, "autoencoder_batch": 2, "denoiser_steps": 1, "denoiser_batch": 2}
    return Settings(**{**few, "sampling_steps": 1, **changes})


def test_a_base_says_how_it_was_made_and_its_states_belong_to_it(tmp_path: Path) -> None:
    words = ["/somewhere/else/base", "--pictures", "8", "--denoiser-steps=1"]
    record = pretrain.pretrain(tmp_path / "base", FewMeasured(), settings(), words)
    assert json.loads((tmp_path / "base" / "base.json").read_text()) == record
    assert record["command"] == "python -m polyalign.modalities.image.pretrain base --pictures 8 --denoiser-steps=1"
    state = torch.load(tmp_path / "base.work" / "denoiser.state.pt", weights_only=True)
    assert state["step"] == 1 and asdict(settings()).items() < state["made_with"].items()
    with pytest.raises(UserError, match=r"autoencoder.state.pt: .*denoiser_steps was 1, now 2. Move the folder .*base.work"):
        pretrain.pretrain(tmp_path / "base", FewMeasured(), settings(denoiser_steps=2))
    with pytest.raises(UserError, match="source was FewMeasured, now Shapes"):
        pretrain.pretrain(tmp_path / "base", Shapes(), settings())
    state.pop("made_with")
    for name in ("autoencoder", "denoiser"):
        torch.save(state, tmp_path / "base.work" / f"{name}.state.pt")
    with pytest.raises(UserError, match="does not say what it was made with"):
        pretrain.pretrain(tmp_path / "base", FewMeasured(), settings())


def made(source: Any, captions: Sequence[str] | None = None) -> dict[str, str]:
    pictures, own = source.pictures(8, 0)
    return pretrain.learnt_from(source, pictures, captions or own)


def test_drawings_are_told_apart_by_pictures_and_captions(tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        for number in range(2):
            Image.new("RGB", (40, 40), (100 * number, 20 if side == "chosen" else 200, 7)).save(
                tmp_path / side / f"{number}.png"
            )
            (tmp_path / "chosen" / f"{number}.txt").write_text(f"a thing {number}")
    before = made(Drawings(tmp_path))
    assert before == made(Drawings(tmp_path)) and before["source"] == "Drawings"
    (tmp_path / "chosen" / "1.txt").write_text("a thing 2")
    renamed = made(Drawings(tmp_path))
    Image.new("RGB", (40, 40), (101, 20, 7)).save(tmp_path / "chosen" / "1.png")
    repainted = made(Drawings(tmp_path))
    assert len({found["source_sha256"] for found in (before, renamed, repainted)}) == 3


def trained(folder: Path, steps: int, stop: int | None = None) -> torch.Tensor:
    """A small regression's averaged weights, after so many steps or as many as it got to."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1)
    folder.mkdir(exist_ok=True)
    stage = Stage("small", network, steps=steps, peak=1e-2, settings=settings(save_every=2), work=Work(folder, {"seed": 1}))

    def loss_of(step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        return network(torch.full((1, 3), float(step + 1))).square().sum()

    try:
        stage.run(loss_of)
    except KeyboardInterrupt:
        pass
    return stage.average["weight"]


def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 6)
    trained(tmp_path / "killed", 6, stop=5)
    assert torch.equal(trained(tmp_path / "killed", 6), whole)


def test_the_command_explains_itself_and_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "drawings").mkdir()
    with pytest.raises(SystemExit) as ended:
        pretrain.main([str(tmp_path / "base"), "--drawings", str(tmp_path / "drawings")])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("pretrain: ")
