"""The report of a run whose outputs are sounds: players and spectrograms, what sounds when, within the page's budget."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from polyalign.core.files import atomic_write
from polyalign.evaluation.audio.sound import Clip
from polyalign.evaluation.audio.temporal import Event, Outcome, outcome
from polyalign.evaluation.paired import evaluate_paired
from polyalign.evaluation.report import write_report
from polyalign.evaluation.report.collect import collect
from polyalign.evaluation.report.sounds import Player, album, decode, looks_like_sound, spectrogram

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the helpers lie beside the tests, which are no package

from audio_models import RATE, tone  # noqa: E402

COUNT = 16
EVIL = "<script>alert(1)</script>"


class Pitch:
    """Calls a sound right whose first half is lower than its second, as all prompts here ask for."""

    name, version, right_from = "pitch", "1", 1.0

    def outcomes(self, conditions, outputs) -> list[Outcome]:
        found = []
        for sound in outputs:
            halves = np.array_split(sound.samples, 2)
            low, high = (np.abs(np.fft.rfft(half)).argmax() for half in halves)
            events = [Event("low", 0.0, 0.5), Event("high", 0.5, 1.0)]
            swapped = [Event("high", 0.0, 0.5), Event("low", 0.5, 1.0)]
            found.append(outcome((("low",), ("high",)), events if low < high else swapped))
        return found

    def score(self, conditions, outputs) -> list[float]:
        return [one.graded for one in self.outcomes(conditions, outputs)]


def mixed(right: bool, seed: int) -> Clip:
    parts = [tone(hertz, 0.5, seed=seed).samples for hertz in ((400, 2500) if right else (2500, 400))]
    return Clip(np.concatenate(parts), RATE)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    conditions = [{"prompt": f"low then high, number {n} {EVIL}", "task": "order"} for n in range(COUNT)]
    outputs = {"base": [mixed(n % 3 == 0, n) for n in range(COUNT)], "aligned": [mixed(n % 8 != 0, n) for n in range(COUNT)]}
    names = {side: [f"samples/{side}/{n:05d}.flac" for n in range(COUNT)] for side in outputs}
    for side, clips in outputs.items():
        (tmp_path / "samples" / side).mkdir(parents=True)
        for name, clip in zip(names[side], clips, strict=True):
            soundfile.write(tmp_path / name, clip.samples, clip.rate)
    report = evaluate_paired(
        outputs["base"],
        outputs["aligned"],
        conditions,
        list(range(COUNT)),
        [Pitch()],
        seed=0,
        base_images=names["base"],
        aligned_images=names["aligned"],
    )
    atomic_write(tmp_path / "evaluation.json", json.dumps(report))
    return tmp_path


def test_the_evaluation_of_sounds(run: Path):
    report = json.loads((run / "evaluation.json").read_text())
    assert report["items"][3]["base_sound"] == "samples/base/00003.flac" and "base_image" not in report["items"][3]
    assert set(report["artefacts"]) == {"clipping", "silence", "flatness"}
    assert report["temporal"]["judge"] == "pitch"
    assert report["temporal"]["base"]["order"]["value"] == 6 / 16
    assert report["temporal"]["aligned"]["strict_match"]["value"] == 14 / 16


def test_the_page_has_players_and_spectrograms(run: Path):
    page = write_report(run).read_text(encoding="utf-8")
    assert collect(run).outputs == "sound"
    assert page.count("<audio ") == page.count('class="sound"') >= 2 * COUNT
    assert "media-src data:" in page and 'src="data:audio/flac;base64,' in page
    assert "Both models sounded the same prompts" in page and "What sounds when" in page and "hiss or fall silent" in page
    assert EVIL not in page and 'class="cards sounds' in page


def test_the_budget_and_what_cannot_be_read(run: Path):
    names = [f"samples/base/{n:05d}.flac" for n in range(COUNT)]
    whole = album(run, names)
    assert len(whole.pictures) == COUNT and whole.left_out == 0
    players = [one for one in whole.pictures.values() if isinstance(one, Player)]
    used = sum(len(one.uri) + len(one.spectrogram.uri) for one in players)
    smaller = album(run, names, budget=used - 1)
    assert smaller.left_out == 0 and "data:audio/ogg" in smaller.pictures[names[0]].tag("x")
    few = album(run, names, budget=40_000)
    assert 0 < len(few.pictures) < COUNT and len(few.pictures) + few.left_out == COUNT and names[0] in few.pictures
    (run / names[0]).write_bytes(b"fLaC and then nothing")
    assert album(run, [names[0], "samples/absent.flac", "../../etc/passwd"]).unreadable == 3


def test_players_of_bytes():
    stream = io.BytesIO()
    soundfile.write(stream, tone(440, 0.5).samples, RATE, format="WAV")
    player = decode(stream.getvalue())
    assert player is not None and player.seconds == 0.5 and player.rate == RATE and looks_like_sound(stream.getvalue())
    assert "&lt;b&gt;" in player.tag("<b>") and "0 to 8 kHz" in player.tag("x")
    assert decode(b"RIFF") is None and not looks_like_sound(b"\x89PNG")


def test_a_spectrogram_shows_a_tone_where_it_is():
    import base64

    from polyalign.evaluation.report.pictures import decode as picture_of

    drawn = spectrogram(tone(2000, 1.0).samples, RATE)
    image = picture_of(base64.b64decode(drawn.uri.partition(",")[2]))
    assert image is not None and image.size == (256, 96)
    light = np.asarray(image.convert("L"), dtype=float).mean(axis=1)
    assert abs(int(light.argmax()) - 0.75 * 96) < 3  # 2 of 8 kHz from the bottom
    silent = spectrogram(np.zeros(RATE, dtype=np.float32), RATE)
    assert (silent.width, silent.height) == (256, 96)
