"""Captions to events in order, what is found held against it, and the judges that do both."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.evaluation.audio import steam
from polyalign.evaluation.audio.endpoint import HttpSoundJudge
from polyalign.evaluation.audio.judges import AstOrderJudge, ClapJudge, ClapOrderJudge, EventOrderJudge
from polyalign.evaluation.audio.locating import Windows, events_of
from polyalign.evaluation.audio.phrases import says_order, split
from polyalign.evaluation.audio.sound import Clip
from polyalign.evaluation.audio.statistics import clipping, flatness, silence
from polyalign.evaluation.audio.temporal import Event, outcome, summary
from polyalign.evaluation.judges import SOUND_JUDGES, build, refuse_other_outputs

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the helpers lie beside the tests, which are no package

from audio_models import LABELS, RATE, save_ast, save_clap, tone  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("caption", "groups"),
    [
        ("A dog barks then a cat meows", (("A dog barks",), ("a cat meows",))),
        ("A drum after a bell", (("a bell",), ("A drum",))),
        ("After a bell, a drum sounds", (("a bell",), ("a drum",))),
        ("Before a bell, a drum", (("a drum",), ("a bell",))),
        ("a bell twice then a drum", (("a bell",), ("a bell",), ("a drum",))),
        ("a bell while a drum sounds", (("a bell", "a drum"),)),
        ("While rain falls, a dog barks and then a car passes", (("rain falls", "a dog barks"), ("a car passes",))),
        ("A yip occurs, followed by a bleat after a short pause.", (("A yip",), ("a bleat",))),
        ("Rain falls. Then thunder.", (("Rain falls",), ("thunder",))),
        ("A bell rings. After that, a drum sounds.", (("A bell rings",), ("a drum",))),
        ("A bell rings. After that a drum sounds.", (("A bell rings",), ("a drum",))),
        ("A bell rings. After a while, a drum and then a horn.", (("A bell rings",), ("a drum",), ("a horn",))),
        ("A bell rings. After a moment, a drum sounds.", (("A bell rings",), ("a drum",))),
        ("A bell rings, and after a while a drum sounds", (("A bell rings",), ("a drum",))),
        ("A bell rings. Before that, a drum sounds.", (("a drum",), ("A bell rings",))),
        ("A bell then a horn. Before this, a drum.", (("A bell",), ("a drum",), ("a horn",))),
        ("A bell, and before that a drum", (("a drum",), ("A bell",))),
        ("Before that, a drum sounds.", (("a drum",),)),
        ("Rain falls. Birds sing.", (("Rain falls", "Birds sing"),)),
        ("a drum before a bell then a horn", (("a drum",), ("a bell",), ("a horn",))),
        ("Birds and a dog", (("Birds and a dog",),)),
        ("", ()),
    ],
)
def test_captions_are_split_at_connectives(caption: str, groups):
    assert split(caption) == groups
    assert says_order(caption) == (len(groups) > 1)


def found(*events: tuple[str, float, float]) -> list[Event]:
    return [Event(*event) for event in events]


def test_outcomes():
    asked = (("bell",), ("drum",))
    right = outcome(asked, found(("bell", 0.1, 0.4), ("drum", 0.6, 0.9)))
    assert right.strict and right.graded == 1.0 and (right.pairs, right.both, right.right) == (1, 1, 1)
    turned = outcome(asked, found(("drum", 0.1, 0.4), ("bell", 0.6, 0.9)))
    assert not turned.strict and (turned.present, turned.both, turned.right) == (2, 1, 0) and turned.graded == 0.5
    lone = outcome(asked, found(("drum", 0.1, 0.4)))
    assert (lone.present, lone.extra, lone.pairs, lone.both) == (1, 0, 1, 0) and lone.order == 0.0
    more = outcome(asked, found(("bell", 0.1, 0.4), ("drum", 0.6, 0.9), ("horn", 1.0, 1.3)))
    assert not more.strict and more.extra == 1 and more.order == 1.0 and more.graded < 1.0
    over = outcome(asked, found(("bell", 0.1, 0.4), ("drum", 0.15, 0.45)))
    assert not over.strict and over.order == 1.0


def test_repeated_and_simultaneous_events():
    twice = (("bell",), ("bell",), ("drum",))
    assert outcome(twice, found(("bell", 0, 0.2), ("bell", 0.4, 0.6), ("drum", 0.8, 1))).strict
    assert not outcome(twice, found(("bell", 0, 0.2), ("drum", 0.4, 0.6), ("bell", 0.8, 1))).strict
    once = outcome(twice, found(("bell", 0, 0.2), ("drum", 0.8, 1)))
    assert (once.present, once.extra, once.strict) == (2, 0, False)
    together = (("bell", "drum"),)
    assert outcome(together, found(("bell", 0, 0.4), ("drum", 0.1, 0.5))).strict
    assert not outcome(together, found(("bell", 0, 0.4), ("drum", 0.6, 0.9))).strict
    assert outcome(together, found(("bell", 0, 0.4), ("drum", 0.6, 0.9)), closed=False).strict  # it may mean only "and"


def test_summary_of_perfect_and_shuffled_sounds():
    asked = (("bell",), ("drum",))
    right, turned = found(("bell", 0, 0.3), ("drum", 0.5, 0.8)), found(("drum", 0, 0.3), ("bell", 0.5, 0.8))
    perfect = summary([outcome(asked, right)] * 20)
    assert all(perfect[name]["value"] == 1.0 for name in ("presence_recall", "order", "order_given_present", "strict_match"))
    assert perfect["with_extra_events"]["value"] == 0.0 and perfect["presence_recall"]["of"] == 40
    half = summary([outcome(asked, one) for one in (right, turned)] * 10)
    assert half["order"]["value"] == 0.5 and half["order"]["interval"][0] < 0.5 < half["order"]["interval"][1]
    alone = summary([outcome((("bell",),), right[:1], closed=False)])
    assert "order" not in alone and "extra_events" not in alone


def test_events_of_a_curve():
    times, asked = np.arange(9) * 0.5, Windows(presence=0.3)
    curve = np.array([0.0, 0.1, 0.5, 0.8, 0.7, 0.1, 0.0, 0.45, 0.1])
    assert [(event.onset, event.offset) for event in events_of(curve, times, "dog", asked)] == [(1.0, 2.5), (3.5, 4.0)]
    assert events_of(curve / 4, times, "dog", asked) == []
    lifted = events_of(curve + 0.2, times, "dog", Windows(presence=0.3, floor=0.2))
    assert [event.onset for event in lifted] == [1.0, 3.5]  # as without the floor's rise
    with pytest.raises(UserError, match="share between 0 and 1"):
        Windows(share=1.0)


def test_steam_errors(tmp_path: Path):
    assert steam.ordering_error("A", "B", found(("A", 0, 1), ("B", 2, 3))) is None
    assert steam.ordering_error("A", "B", found(("A", 0, 1))) == "not found"
    assert steam.ordering_error("A", "B", found(("A", 2, 3), ("B", 0, 1))) == "order"
    assert steam.ordering_error("A", "B", found(("A", 0, 1), ("B", 0, 1))) == "order"
    assert steam.ordering_error("A", "B", found(("A", 0, 1.5), ("B", 1, 2))) == "overlap"
    assert steam.ordering_error("A", "B", found(("A", 0, 1.4), ("B", 1, 2))) is None
    assert steam.ordering_error("A", "B", found(("A", 0, 1), ("A", 2.8, 3), ("B", 2, 3))) == "overlap"  # the whole of A counts
    entry = {"event": {"Late": [[4.3, 5.2], [5.6, 6.6]], "Early": [[0.8, 1.6]]}, "caption": "early, followed by late"}
    (tmp_path / "tests.json").write_text(json.dumps({"syn_1": entry, "syn_2": entry}))
    tests = steam.read_tests(tmp_path / "tests.json")
    assert [(test.former, test.later) for test in tests] == [("Early", "Late")] * 2
    answers = {"syn_1": found(("Early", 0, 1), ("Late", 2, 3)), "syn_2": found(("Late", 2, 3))}
    report = steam.evaluate(tests, lambda test: answers[test.name])
    assert report["ordering_error"]["value"] == 0.5 and report["kinds"] == {"not found": 1}
    assert report["temporal"]["presence_recall"]["value"] == 0.75
    for broken, says in (({"event": {"A": [[0, 1]]}}, "has 1 events"), ({"caption": "x"}, "has no event")):
        (tmp_path / "broken.json").write_text(json.dumps({"syn_1": broken}))
        with pytest.raises(UserError, match=says):
            steam.read_tests(tmp_path / "broken.json")


def test_the_steam_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    entry = {"event": {"Dog": [[0.0, 0.5]], "Bell": [[0.6, 1.0]]}, "caption": "a dog then a bell"}
    (tmp_path / "tests.json").write_text(json.dumps({"syn_1": entry}))
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds" / "syn_1.wav", tone(300).samples, RATE)
    arguments = [str(tmp_path / "sounds"), str(tmp_path / "tests.json"), "--detector", "ast", "--device", "cpu"]
    arguments += [
        "--model",
        str(save_ast(tmp_path / "ast")),
        "--width",
        "0.4",
        "--hop",
        "0.2",
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert steam.main(arguments) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["made_with"]["detector"] == "ast" and "@sha256:" in report["made_with"]["network"]
    (tmp_path / "sounds" / "again").mkdir()
    soundfile.write(tmp_path / "sounds" / "again" / "syn_1.flac", tone(900).samples, RATE)
    assert steam.main(arguments) == 2
    assert "'syn_1' has two sounds" in capsys.readouterr().err
    (tmp_path / "sounds" / "again" / "syn_1.flac").unlink()
    (tmp_path / "sounds" / "syn_1.wav").rename(tmp_path / "sounds" / "other.wav")
    assert steam.main(arguments) == 2
    assert "have no sound" in capsys.readouterr().err


def test_phrases_that_no_label_shares_a_word_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    entry = {"event": {"Violin": [[0.0, 0.5]], "Bell": [[0.6, 1.0]]}, "caption": "a violin then a bell"}
    (tmp_path / "tests.json").write_text(json.dumps({"syn_1": entry}))
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds" / "syn_1.wav", tone(300).samples, RATE)
    model, labels = save_ast(tmp_path / "ast"), tmp_path / "labels.json"
    arguments = [str(tmp_path / "sounds"), str(tmp_path / "tests.json"), "--detector", "ast", "--model", str(model)]
    arguments += ["--device", "cpu", "--width", "0.4", "--hop", "0.2", "--out", str(tmp_path / "out.json")]
    assert steam.main(arguments) == 2
    assert "given as --labels" in capsys.readouterr().err
    labels.write_text(json.dumps({"Violin": LABELS[3]}))
    assert steam.main([*arguments, "--labels", str(labels)]) == 2
    assert "'Violin' is 'Drum'; expected a list of labels" in capsys.readouterr().err
    labels.write_text(json.dumps({"Violin": [LABELS[3]]}))
    assert steam.main([*arguments, "--labels", str(labels)]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["made_with"]["labels"] == '{"Violin": ["Drum"]}'
    with pytest.raises(UserError, match="the detector clap has none"):
        steam.open_locator("clap", str(model), Windows(), labels={"Violin": [LABELS[3]]})


def test_the_clap_judge(tmp_path: Path):
    judge = ClapJudge(model=str(save_clap(tmp_path / "clap")), device="cpu", batch_size=2)
    conditions = [{"prompt": "a bell"}, {"prompt": "a drum"}, {"prompt": "a bell"}]
    scores = judge.score(conditions, [tone(300), tone(900), tone(300)])
    assert all(-1 <= score <= 1 for score in scores) and scores[0] == pytest.approx(scores[2], abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-6)
    assert "@sha256:" in judge.version and "scipy.resample_poly" in judge.version


@pytest.mark.parametrize(("kind", "save"), [(ClapOrderJudge, save_clap), (AstOrderJudge, save_ast)])
def test_judges_of_a_caption_s_order(tmp_path: Path, kind, save):
    options = {
        "model": str(save(tmp_path / "model")),
        "device": "cpu",
        "width": 0.4,
        "hop": 0.2,
        "presence": -1.0,
        "floor": -1.0,
    }
    conditions = [{"prompt": "a bell then a drum"}, {"prompt": "a dog barks"}]
    sounds = [tone(300), tone(900)]
    judge = kind(**options)
    outcomes = judge.outcomes(conditions, sounds)
    assert [(one.asked, one.present, one.extra) for one in outcomes] == [(2, 2, None), (1, 1, None)]
    assert judge.score(conditions, sounds) == pytest.approx([one.graded for one in outcomes])
    assert kind(**options, score="recall").score(conditions, sounds) == [1.0, 1.0]
    assert kind(**{**options, "presence": 2.0}).score(conditions, sounds) == [0.0, 0.0]
    assert judge.version != kind(**{**options, "hop": 0.1}).version
    with pytest.raises(UserError, match="names no event"):
        judge.score([{"prompt": "..."}], sounds[:1])
    with pytest.raises(UserError, match="score is 'best'"):
        kind(**options, score="best")


def test_a_phrase_without_a_label_is_refused(tmp_path: Path):
    folder = str(save_ast(tmp_path / "ast"))
    with pytest.raises(UserError, match="shares a word with 'a violin'"):
        AstOrderJudge(model=folder, device="cpu").score([{"prompt": "a violin"}], [tone(300)])
    judge = AstOrderJudge(model=folder, device="cpu", labels={"a violin": [LABELS[2]]}, presence=0.0, score="recall")
    assert judge.score([{"prompt": "a violin"}], [tone(300)]) == [1.0]


def test_the_world_s_events_in_order():
    sounds = pytest.importorskip("polyalign.datasets.worlds.sounds")
    pytest.importorskip("polyalign.datasets.worlds.sound_detector")
    judge = EventOrderJudge()
    prompts = ["a bell then a drum", "a drum then a bell"]
    waves = [sounds.render(sounds.parse(prompt), seed)[0] for seed, prompt in enumerate(prompts)]
    conditions = [{"prompt": prompt} for prompt in prompts]
    assert judge.score(conditions, waves) == [1.0, 1.0] and judge.right_from == 1.0
    assert judge.score(conditions, waves[::-1]) == [0.5, 0.5]
    assert EventOrderJudge(score="strict").score(conditions, waves[::-1]) == [0.0, 0.0]
    with pytest.raises(UserError, match="does not know the prompt"):
        judge.score([{"prompt": "a violin"}], waves[:1])
    with pytest.raises(UserError, match="allowed: sounds"):
        EventOrderJudge(detector="streets")


def test_judges_of_sounds_are_known_and_for_sounds(tmp_path: Path):
    judge = build(JudgeConfig(name="clap_order", options={"model": str(save_clap(tmp_path / "clap"))}))
    assert judge.name == "clap_order"
    refuse_other_outputs(list(SOUND_JUDGES), "sound")
    with pytest.raises(UserError, match="judges sounds"):
        refuse_other_outputs(["clap"], "picture")


def test_what_an_endpoint_is_sent():
    judge = HttpSoundJudge(url="http://127.0.0.1:9/v1", model="m", key_variable=None)
    text, audio = judge.content("a bell", [tone(300, 0.5, 22_050)])
    assert "a bell" in text["text"] and audio["type"] == "input_audio" and audio["input_audio"]["format"] == "wav"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(audio["input_audio"]["data"])))
    assert rate == 16_000 and len(samples) == 8000
    assert judge.mark(tone(300)) == judge.mark(tone(300)) != judge.mark(tone(301))


def test_statistics_of_sounds():
    quiet, full = Clip(np.zeros(RATE, dtype=np.float32), RATE), Clip(np.ones(RATE, dtype=np.float32), RATE)
    noise = Clip((0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32), RATE)
    assert (clipping(quiet), clipping(full)) == (0.0, 1.0)
    assert silence(quiet) == 1.0 and silence(noise) == 0.0
    assert flatness(quiet) == 0.0 and flatness(tone(440)) < 0.1 and 0.5 < flatness(noise) < 0.62
