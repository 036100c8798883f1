"""The world of sounds, its exact detector, and its composer of recordings."""

import json
import os
import random
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.datasets.audio.waves import Wave, read, resampled, write
from polyalign.datasets.worlds import sound_detector, sound_pairs, sounds
from polyalign.datasets.worlds.sound_clips import Composer
from polyalign.datasets.worlds.sound_events import EVENTS, LOUDNESS, PITCH, RATE, render_event
from polyalign.datasets.worlds.sounds import Event, Spec
from polyalign.evaluation import judges


def test_every_prompt_is_one_that_its_specification_is_told_by() -> None:
    prompts = sounds.all_prompts()
    assert len(prompts) == len(set(prompts)) == 1264
    for prompt in prompts:
        assert prompt in sounds.captions(sounds.parse(prompt))
    with pytest.raises(ValueError, match="does not know the prompt 'a dog barks'"):
        sounds.parse("a dog barks")


def test_wordings_of_order_name_the_same_order() -> None:
    told = {sounds.parse(prompt).groups for prompt in ("a bell then a drum", "a bell before a drum", "a drum after a bell")}
    assert told == {(("bell",), ("drum",))}
    assert sounds.parse("a drum twice then a bell").groups == (("drum",), ("drum",), ("bell",))
    assert sounds.parse("a drum followed by a bell twice").groups == (("drum",), ("bell",), ("bell",))
    assert sounds.parse("a bell while a drum sounds").groups == (("bell", "drum"),)


def test_splits_share_no_composition() -> None:
    train = {prompt["prompt"] for prompt in sounds.prompts("train", 3000)}
    held_out = {prompt["prompt"] for prompt in sounds.prompts("heldout", 1500)}
    assert len(held_out) > 400
    assert not {sounds._composition(sounds.parse(prompt)) for prompt in train} & {
        sounds._composition(sounds.parse(prompt)) for prompt in held_out
    }
    assert sounds.held_out("a bell while a drum sounds") == sounds.held_out("a drum and a bell together")
    with pytest.raises(ValueError, match="'train' and 'heldout'"):
        sounds.prompts("test", 1)


@pytest.mark.parametrize("task", sounds.TASKS[1:])
def test_a_wrong_caption_is_about_the_same_events(task: str) -> None:
    draws = random.Random(0)
    for _ in range(20):
        spec = sounds.random_spec(draws, (task,))
        wrong = sounds.wrong(spec, draws)
        assert wrong.groups != spec.groups
        assert set(wrong.events) == set(spec.events)
        assert all(sounds.parse(caption) == wrong for caption in sounds.captions(wrong))


def test_a_clip_follows_from_its_seed_and_holds_its_events() -> None:
    spec = sounds.parse("a bell then a drum then a horn")
    (clip, events), (again, _), (other, _) = (sounds.render(spec, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(clip.samples, again.samples)
    assert not np.array_equal(clip.samples, other.samples)
    assert clip.samples.shape == (sounds.SAMPLES,) and clip.samples.dtype == np.float32 and clip.rate == RATE
    assert [event.event for event in events] == ["bell", "drum", "horn"]
    assert all(first.offset < second.onset for first, second in pairwise(events))
    first, last = int(events[0].onset * RATE), int(events[-1].offset * RATE)
    assert not clip.samples[:first].any() and not clip.samples[last + 1 :].any()
    assert clip.samples[first:last].any()


def test_events_are_equally_loud_and_none_is_clipped() -> None:
    for name in EVENTS:
        samples = render_event(name, np.random.default_rng(3))
        power = np.convolve(samples.astype(float) ** 2, np.full(RATE // 10, 10 / RATE), mode="valid")
        assert np.sqrt(power.max()) == pytest.approx(LOUDNESS, rel=1e-3)
        assert abs(samples).max() < 0.7
    assert PITCH < 0.06  # a semitone: no event becomes another


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit into a clip of 2.05 s"):
        sounds.place([[0.6]] * 4, np.random.default_rng(0))


def event(name: str, onset: float, length: float = 0.3) -> Event:
    return Event(name, onset, onset + length)


@pytest.mark.parametrize(
    ("prompt", "events", "right"),
    [
        ("a bell then a drum", [event("bell", 0.2), event("drum", 0.9)], True),
        ("a bell then a drum", [event("drum", 0.2), event("bell", 0.9)], False),
        ("a bell then a drum", [event("bell", 0.2), event("drum", 0.3)], False),  # together
        ("a bell then a drum", [event("bell", 0.2)], False),
        ("a bell then a drum", [event("bell", 0.2), event("drum", 0.9), event("drum", 1.4)], False),
        ("a bell while a drum sounds", [event("drum", 0.2), event("bell", 0.3)], True),
        ("a bell while a drum sounds", [event("drum", 0.2), event("bell", 0.9)], False),
        ("a bell twice", [event("bell", 0.2), event("bell", 0.9)], True),
        ("a bell three times", [event("bell", 0.2), event("bell", 0.9)], False),
        ("a bell twice then a drum", [event("bell", 0.1), event("drum", 0.9), event("bell", 1.4)], False),
    ],
)
def test_what_is_right(prompt: str, events: list[Event], right: bool) -> None:
    assert sounds.satisfies(events, sounds.parse(prompt)) is right


def test_order_kept_forgives_what_nobody_asked_for() -> None:
    spec = sounds.parse("a bell then a drum")
    bell, drum, horn = event("bell", 0.2), event("drum", 0.9), event("horn", 1.5)
    assert sound_detector.order_kept([bell, drum, horn], spec) is True
    assert sound_detector.order_kept([event("drum", 0.1), event("bell", 0.9), horn], spec) is False
    assert sound_detector.order_kept([bell, horn], spec) is None
    assert sound_detector.order_kept([bell, event("bell", 1)], sounds.parse("a bell twice")) is None


def noisy(wave: Wave, decibels: float, draws: np.random.Generator) -> Wave:
    noise = draws.standard_normal(len(wave.samples)) * np.sqrt(np.mean(wave.samples**2)) * 10 ** (-decibels / 20)
    return Wave((wave.samples + noise).clip(-1, 1).astype(np.float32), wave.rate)


def test_the_detector_on_held_out_mixes() -> None:
    clips = list(sounds.clips("heldout", 150, seed=11, tasks=sounds.TASKS[1:]))
    found = sound_detector.measure((spec, wave) for spec, wave, _ in clips)
    assert found["strict"] >= 0.99 and found["presence"] >= 0.995 and found["extra"] <= 0.005 and found["clean"] >= 0.99
    draws = np.random.default_rng(0)
    in_noise = sound_detector.measure((spec, noisy(wave, 10, draws)) for spec, wave, _ in clips)
    assert in_noise["presence"] >= 0.99 and in_noise["order"] >= 0.99
    for _, wave, events in clips[:20]:
        onsets = sorted((one.event, one.onset) for one in sound_detector.detect(wave))
        for (name, onset), (known, start) in zip(onsets, sorted((one.event, one.onset) for one in events), strict=True):
            assert name == known and onset == pytest.approx(start, abs=0.04)


def test_a_wrong_caption_is_found_out() -> None:
    clips = list(sounds.clips("heldout", 40, seed=12, tasks=("order", "order_of_three", "count_in_order")))
    draws = random.Random(5)
    wrong = sound_detector.measure((sounds.wrong(spec, draws), wave) for spec, wave, _ in clips)
    assert wrong["strict"] == 0 and wrong["clean"] == 1


def test_another_rate_and_loudness_are_heard_too() -> None:
    spec = sounds.parse("a whistle then a chirp")
    wave = sounds.render(spec, 4)[0]
    assert sounds.satisfies(sound_detector.detect(resampled(wave, 22_050)), spec)
    assert sounds.satisfies(sound_detector.detect(Wave(0.7 * wave.samples, RATE)), spec)


def test_noise_and_silence_are_not_clean() -> None:
    draws = np.random.default_rng(0)
    for samples in (np.zeros(sounds.SAMPLES), 0.1 * draws.standard_normal(sounds.SAMPLES), np.zeros(1), np.zeros(0)):
        assert not sound_detector.explain(Wave(samples.astype(np.float32), RATE)).clean


def test_the_judge_by_its_name() -> None:
    judge = judges.build(judges_spec("sounds"))
    right, wrong = (sounds.render(sounds.parse(prompt), 7)[0] for prompt in ("a bell then a drum", "a drum then a bell"))
    broken = Wave(np.random.default_rng(0).normal(0, 0.1, sounds.SAMPLES).astype(np.float32), RATE)
    conditions = [{"prompt": "a drum after a bell"}] * 3
    assert judge.score(conditions, [right, wrong, broken]) == [1.0, 0.0, -1.0]
    with pytest.raises(UserError, match="does not know the prompt"):
        judge.score([{"prompt": "rain"}], [right])
    with pytest.raises(UserError, match=r"hears clips of 2.048 s, found one of 4.10 s"):
        judge.score(conditions[:1], [Wave(np.zeros(2 * sounds.SAMPLES, dtype=np.float32), RATE)])


def judges_spec(name: str) -> judges.JudgeSpec:
    return JudgeConfig(name=name)


def test_figures_count_as_they_say() -> None:
    order = sounds.parse("a bell then a drum")
    bell, drum, horn = event("bell", 0.2), event("drum", 0.9), event("horn", 1.5)
    verdicts = [
        sound_detector.Verdict((bell, drum), 0.1, True, True),
        sound_detector.Verdict((event("drum", 0.1), bell, horn), 0.1, True, False),
        sound_detector.Verdict((bell,), 0.9, False, False),
    ]
    found = sound_detector.figures([order] * 3, verdicts)
    assert found["presence"] == pytest.approx(5 / 6, abs=1e-4)
    assert found["extra"] == pytest.approx(1 / 6, abs=1e-4)
    assert found["order"] == 0.5
    assert found["strict"] == found["strict_order"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["clean"] == pytest.approx(2 / 3, abs=1e-4)


# --- real recordings ---------------------------------------------------------------------------------------------------------


def save_recordings(folder, names=("anvil", "bird_call", "drum"), each: int = 3):
    draws = np.random.default_rng(1)
    for kind, name in zip(("bell", "chirp", "drum"), names, strict=True):
        for number in range(each):
            samples = np.concatenate([np.zeros(800), render_event(kind, draws), np.zeros(3000)]).astype(np.float32)
            write(folder / name / f"{number}.flac", Wave(samples, RATE))
    return folder


def test_recordings_are_split_and_composed(tmp_path) -> None:
    composer = Composer(save_recordings(tmp_path))
    assert composer.phrases == {"anvil": "an anvil", "bird_call": "a bird call", "drum": "a drum"}
    for name in composer.phrases:
        train, held_out = composer.recordings(name, "train"), composer.recordings(name, "heldout")
        assert len(train) == 2 and len(held_out) == 1 and not set(train) & set(held_out)
    found = list(composer.clips("heldout", 12, seed=2))
    for caption, spec, wave, events in found:
        assert len(wave.samples) == sounds.SAMPLES
        assert sounds.satisfies(events, spec)
        assert caption in sounds.captions(spec, composer.phrases)
    again = list(composer.clips("heldout", 12, seed=2))
    assert [caption for caption, *_ in found] == [caption for caption, *_ in again]
    np.testing.assert_array_equal(found[3][2].samples, again[3][2].samples)


def test_a_recording_loses_its_silence_and_takes_the_worlds_loudness(tmp_path) -> None:
    composer = Composer(save_recordings(tmp_path))
    samples = composer.sound(composer.recordings("anvil", "train")[0], gain=0.5)
    assert abs(samples[:80]).max() > 0
    assert len(samples) < 0.45 * RATE
    power = np.convolve(samples.astype(float) ** 2, np.full(RATE // 10, 10 / RATE), mode="valid")
    assert np.sqrt(power.max()) == pytest.approx(0.5 * LOUDNESS, rel=1e-3)


def test_folders_that_cannot_be_composed_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="recordings of 0 event"):
        Composer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="only one recording of anvil, bird_call, drum"):
        Composer(save_recordings(tmp_path / "lone", each=1))
    composer = Composer(save_recordings(tmp_path / "whole"))
    with pytest.raises(ValueError, match="'train' and 'heldout'"):
        composer.recordings("drum", "test")
    silent = tmp_path / "whole" / "drum" / "0.flac"
    write(silent, Wave(np.zeros(4000, dtype=np.float32), RATE))
    with pytest.raises(UserError, match="is silent"):
        composer.sound(silent)
    assert isinstance(Spec("single", (("drum",),)).events, tuple)


def test_pairs_of_recordings_differ_in_time_alone(tmp_path) -> None:
    recordings = save_recordings(tmp_path / "recordings")
    composer = Composer(recordings)
    pairs = list(sound_pairs.compose(composer, "train", 40, seed=1))
    for pair in pairs:
        (_, right), (_, other) = pair.chosen, pair.rejected
        assert {event.event for event in right} == {event.event for event in other}
        names, others = ([event.event for event in found] for found in (right, other))
        at_once = [any(sounds.together(a, b) for a, b in pairwise(found)) for found in (right, other)]
        assert names != others or at_once == [True, False], pair.caption
        assert at_once[0] == ("while" in pair.caption or "together" in pair.caption or "same time" in pair.caption)
    sound_pairs.main([str(recordings), str(tmp_path / "pairs"), "--count", "5", "--seed", "1"])
    lines = [json.loads(line) for line in (tmp_path / "pairs" / "events.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == [pair.caption for pair in pairs[:5]]
    assert [event["event"] for event in lines[3]["chosen"]] == [event.event for event in pairs[3].chosen[1]]
    written = read(tmp_path / "pairs" / "rejected" / "00002.flac", RATE)
    np.testing.assert_allclose(written.samples, pairs[2].rejected[0].samples, atol=1e-4)
    with pytest.raises(SystemExit):
        sound_pairs.main([str(recordings), str(tmp_path / "pairs")])


def test_pairs_do_not_depend_on_pythons_hashes(tmp_path) -> None:
    save_recordings(tmp_path / "recordings")
    command = [sys.executable, "-m", "polyalign.datasets.worlds.sound_pairs", str(tmp_path / "recordings")]
    for number in ("1", "3"):
        subprocess.run(
            [*command, str(tmp_path / number), "--count", "8"], check=True, env={**os.environ, "PYTHONHASHSEED": number}
        )
    for file in (tmp_path / "1").rglob("*.flac"):
        assert file.read_bytes() == (tmp_path / "3" / file.relative_to(tmp_path / "1")).read_bytes()


def test_copies_of_a_recording_are_one(tmp_path) -> None:
    save_recordings(tmp_path)
    for number in range(3):
        shutil.copyfile(tmp_path / "drum" / "1.flac", tmp_path / "drum" / f"copy_{number}.flac")
    assert [file.name for file in Composer(tmp_path).files["drum"]] == ["0.flac", "1.flac", "2.flac"]
    for number in (0, 2):
        shutil.copyfile(tmp_path / "drum" / "1.flac", tmp_path / "drum" / f"{number}.flac")
    with pytest.raises(UserError, match=r"only one recording of drum \(copies"):
        Composer(tmp_path)


def test_tasks_without_held_out_compositions_are_passed_over() -> None:
    specs = [spec for spec, _, _ in sounds.clips("heldout", 12)]
    assert "single" not in {spec.task for spec in specs} and len(specs) == 12
    with pytest.raises(ValueError, match="'heldout' has nothing of single"):
        sounds.random_spec(random.Random(0), ("single",), split="heldout")
