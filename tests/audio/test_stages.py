"""A whole run of the audio modality from the command line, on an untrained base."""

import json
import re

import pytest
import torch
from audio_runs import recipe, run, save_base, save_pairs
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from polyalign.core.run import RunFolder
from polyalign.datasets.audio.waves import read
from polyalign.modalities.audio import stages
from polyalign.modalities.audio.config import AudioRecipe

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


def save_encoder(folder, seed):
    """A tiny sentence encoder with random weights."""
    words = {"[PAD]": 0, "[UNK]": 1, **{word: place for place, word in enumerate(("a", "bell", "drum", "then"), start=2)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(seed)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)
    return folder


class Asked(RunFolder):
    """A run folder that keeps what each stage depends on."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.inputs = {}

    def stage(self, name, inputs, **options):
        self.inputs[name] = inputs
        return super().stage(name, inputs, **options)


@pytest.mark.parametrize("online", [False, True])
def test_another_encoder_in_the_same_folder_selects_anew(made, tmp_path, online):
    """Pairs (or the prompts that rounds ask) and evaluation of a recipe that selects; the inputs of one that does not stay."""
    encoder, asked = save_encoder(tmp_path / "encoder", 0), recipe(*made)
    prompts = {"world": "sounds", "split": "train", "count": 8}
    chosen = {"embedder": str(encoder), "clusters": 2, "per_cluster": 1}
    asked["pairs"] = {"prompts": {**prompts, "select": chosen}, "samples_per_prompt": 2, "judges": [{"name": "sounds"}]}
    asked["evaluate"]["prompts"]["select"] = {**chosen, "clusters": 1}
    asked |= {"online": {"rounds": 1, "prompts_per_round": 2}} if online else {}

    def inputs(content):
        place, loaded = Asked(tmp_path / "run", planning=True), AudioRecipe.model_validate(content)
        stages.generate(loaded, place)
        stages.evaluate(loaded, place)
        return place.inputs

    first = inputs(asked)
    save_encoder(encoder, 1)
    other = inputs(asked)
    assert first.keys() == {"generate", "evaluate"}
    assert all(first[name]["embedder"] != other[name]["embedder"] for name in first)
    for section in ("pairs", "evaluate"):
        del asked[section]["prompts"]["select"]
    assert all("embedder" not in found for found in inputs(asked).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sft_first": {"steps": 1}, "model": {"train": "full"}}, "sft_first|adapter_off needs a LoRA"),
        ({"evaluate": {"judges": [{"name": "shapes"}]}}, "judges pictures, and these outputs are sounds"),
        ({"train": {"stop": {}}}, "an audio recipe has none"),
        ({"pairs": {"source": "strategies"}}, "needs 'prompts' and at least one of 'judges'"),
        ({"pairs": {"source": "folders"}}, "needs 'folder'"),
        ({"objective": {"name": "simpo"}}, "simpo"),
        ({"sampler": {"guidance": 0.5}}, "guidance.*greater than or equal to 1"),
        ({"sampler": {"guidance": 1.0, "negative_prompt": "noise"}}, "'negative_prompt' does nothing at guidance 1"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(made, tmp_path, capsys, changes, words):
    asked = recipe(*made)
    for key, value in changes.items():
        asked[key] = {**asked[key], **value} if key in ("model", "evaluate", "train") else value
    assert run(tmp_path, "align", asked) != 0
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "run" / "pairs").exists()
