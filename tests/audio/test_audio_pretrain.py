"""Training of the embedded base of sounds: its going on after a kill, what it ships, and its gate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.datasets.worlds import sounds
from polyalign.modalities.audio import pretrain
from polyalign.modalities.audio import tiny_architecture as tiny
from polyalign.modalities.audio.mel_codec import MelSettings
from polyalign.modalities.audio.pretrain import Settings, unfit
from polyalign.modalities.pretraining import command_line

SMALL = Settings(steps=4, clips=60, batch=2, warmup=2, fitted=60, sampling_steps=2, save_every=2, watched=2, measured=4)
FIT = {"presence": 0.95, "order": 0.7, "strict": 0.6, "clean": 0.95}


def test_captions_are_wrong_about_time_alone() -> None:
    clips, captions = pretrain.world(SMALL)
    found = list(sounds.clips(None, SMALL.clips, SMALL.seed, pretrain.LESSONS))
    assert len(clips) == len(captions) == len(found) == SMALL.clips
    wrong = [spec for (spec, _, _), caption in zip(found, captions, strict=True) if caption not in sounds.captions(spec)]
    assert 0 < len(wrong) < 0.6 * SMALL.clips and "single" not in {spec.task for spec in wrong}
    for (spec, _, _), caption in zip(found, captions, strict=True):
        assert set(sounds.parse(caption).events) == set(spec.events)


def test_half_of_the_timesteps_are_among_the_noisiest() -> None:
    drawn = pretrain.timesteps(4000, 1000, torch.Generator().manual_seed(0), noisy_share=0.5, noisy_from=0.6)
    assert int(drawn.min()) < 10 and int(drawn.max()) > 990
    assert float((drawn >= 600).float().mean()) == pytest.approx(0.5 + 0.5 * 0.4, abs=0.03)


def test_a_base_is_written_with_its_record_and_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain.pretrain(tmp_path / "whole", SMALL)
    assert json.dumps(whole, indent=2) + "\n" == (tmp_path / "whole" / "base.json").read_text()
    assert whole["sha256"] == pretrain.digest(tmp_path / "whole") and 0.0 <= whole["figures"]["strict"] <= 1.0
    opened = tiny.read(tmp_path / "whole")
    assert opened.codec.settings == MelSettings()

    def killed(step: int, *given: object) -> torch.Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return loss_at(step, *given)  # type: ignore[arg-type]

    loss_at = pretrain.loss_at
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "loss_at", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(tmp_path / "parts", SMALL)
    with pytest.raises(UserError, match="batch was 2, now 3"):
        pretrain.pretrain(tmp_path / "parts", replace(SMALL, batch=3))
    again = pretrain.pretrain(tmp_path / "parts", replace(SMALL, measured=6))  # how it is measured may change
    assert again["sha256"] == whole["sha256"]


@pytest.mark.parametrize(
    ("figure", "value", "why"),
    [
        ("presence", 0.9, "has not learnt what sounds"),
        ("order", 0.55, "leaves something to learn"),
        ("order", 0.95, "leaves something to learn"),
        ("strict", 0.3, "leaves something to learn"),
        ("clean", 0.8, "not above 0.9"),
    ],
)
def test_a_base_without_competence_or_without_errors_is_called_unfit(figure: str, value: float, why: str) -> None:
    assert unfit(FIT) is None
    assert why in (unfit({**FIT, figure: value}) or "")


def test_the_shipped_base_is_the_one_of_its_record() -> None:
    folder = Path(pretrain.__file__).parent / "tiny_base"
    record = json.loads((folder / "base.json").read_text())
    assert record["sha256"] == pretrain.digest(folder) and unfit(record["figures"]) is None
    assert record["settings"] == json.loads(json.dumps(vars(Settings())))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6e6


def test_the_command_changes_lengths_and_leaves_with_a_complaint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path / "base"), "--steps", "3", "--threads", "1"]
    asked = []

    def train(folder: Path, lengths: dict[str, int], said: Sequence[str]) -> tuple[dict[str, int], str | None]:
        asked.append((folder, lengths, list(said)))
        return {"steps": lengths["steps"]}, "unfit" if lengths["steps"] == 3 else None

    with pytest.raises(SystemExit, match="unfit"):
        command_line(words, "What it does.", {"steps": 10, "clips": 7}, train)
    assert asked == [(tmp_path / "base", {"steps": 3, "clips": 7}, words)]
    assert json.loads(capsys.readouterr().out) == {"steps": 3}
    command_line(words[:1], "What it does.", {"steps": 10}, train)
    assert asked[1][1] == {"steps": 10}
