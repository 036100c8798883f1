"""A whole run of the audio modality from the command line, on an untrained base."""

import json
import re

import pytest
from audio_runs import recipe, run, save_base, save_pairs
from safetensors.torch import load_file

from polyalign.datasets.audio.waves import read

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, pairs): both are only read."""
    place = tmp_path_factory.mktemp("audio")
    return save_base(place / "base"), save_pairs(place / "pairs")


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """The folder of a run with a fine-tuning before it and an arm beside it."""
    place = tmp_path_factory.mktemp("run")
    asked = recipe(*made, sft_first={"steps": 2}, arms={"sft": {"name": "sft"}})
    assert run(place, "align", asked) == 0
    return place, asked


def test_a_run_ends_with_an_evaluation_and_a_report(finished):
    place, _ = finished
    found = json.loads((place / "run" / "evaluation.json").read_text())
    assert found["judge"]["name"] == "sounds" and found["prompts"] == 2 and set(found["arms"]) == {"sft"}
    assert set(found["temporal"]) >= {"judge", "base", "aligned", "sft"}
    assert (place / "run" / "report.html").stat().st_size > 1000
    wave = read(place / "run" / "samples" / "aligned" / "00001.flac")
    assert wave.rate == 16000 and 2.0 < wave.seconds < 2.1


def test_the_objective_goes_on_from_the_fine_tuning_against_the_base(finished):
    """Its first step has the fine-tuned LoRA on and the reference without any, so the margin is not zero as it would be for a
    fresh one."""
    place, _ = finished
    assert (place / "run" / "sft_first" / "adapter" / WEIGHTS).is_file()
    first = json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[0])
    drift = [value for key, value in first.items() if "reward" in key and "accura" not in key and isinstance(value, float)]
    assert drift and any(abs(value) > 1e-6 for value in drift)
    ledger = json.loads((place / "run" / "stages.json").read_text())
    assert ledger["train"]["after"].keys() == {"generate", "train sft_first"} == ledger["train sft"]["after"].keys()


def test_running_again_does_nothing_and_other_first_steps_begin_anew(finished, capsys):
    place, asked = finished
    assert run(place, "align", asked) == 0
    said = capsys.readouterr().err
    assert said.count("done already") == 5
    assert run(place, "align", {**asked, "sft_first": {"steps": 1}}, "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "train sft_first" in plan and plan.count("stale") >= 3


def test_the_export_is_the_lora(finished, tmp_path):
    place, asked = finished
    assert run(place, "export", asked, "--to", str(tmp_path / "out")) == 0
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert tensors and all(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert "polyalign" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sft_first": {"steps": 1}, "model": {"train": "full"}}, "sft_first|adapter_off needs a LoRA"),
        ({"evaluate": {"judges": [{"name": "shapes"}]}}, "judges pictures, and these outputs are sounds"),
        ({"train": {"stop": {}}}, "an audio recipe has none"),
        ({"pairs": {"source": "strategies"}}, "needs 'prompts' and at least one of 'judges'"),
        ({"pairs": {"source": "folders"}}, "needs 'folder'"),
        ({"objective": {"name": "simpo"}}, "simpo"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(made, tmp_path, capsys, changes, words):
    asked = recipe(*made)
    for key, value in changes.items():
        asked[key] = {**asked[key], **value} if key in ("model", "evaluate", "train") else value
    assert run(tmp_path, "align", asked) != 0
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "run" / "pairs").exists()
