"""Judges of texts that hold a network: explicit and implicit rewards, from folders with random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.evaluation import judges
from polyalign.evaluation.judges import checked_scores
from polyalign.evaluation.reward_accuracy import as_text, compare_rewards
from polyalign.evaluation.text_judges.conversation import prompt_and_answer_ids, sequence_ids
from polyalign.evaluation.text_judges.implicit_reward import ImplicitRewardTextJudge
from polyalign.evaluation.text_judges.reward_model import RewardModelJudge
from polyalign.modalities.text.adapter import TextAdapter
from polyalign.modalities.text.settings import TextModelSettings
from polyalign.modalities.text.tokenise import tokens_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text"))

from tiny_texts import FAMILIES, save_model  # noqa: E402  # pyright: ignore[reportMissingImports]

torch.set_num_threads(1)
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
CONDITIONS: list[dict[str, Any]] = [{"prompt": "The patient was"}, {"prompt": "it is"}, {"prompt": ""}]
ANSWERS = [" given a drug", " good news, yes it is", "no"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text_bases")
    return {family: save_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def head(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a random head, as any trainer would save it."""
    folder = tmp_path_factory.mktemp("reward") / "head"
    torch.manual_seed(0)
    network = AutoModelForSequenceClassification.from_pretrained(bases["qwen2"], num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(bases["qwen2"])
    network.config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def moved(base: Path, folder: Path, seed: int = 0) -> Path:
    """A policy: the base, moved a little."""
    network = AutoModelForCausalLM.from_pretrained(base)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path) -> Path:
    torch.manual_seed(1)
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    network.save_pretrained(str(folder))
    return folder


def log_likelihood(network: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) + place - 1, token].item() for place, token in enumerate(answer))


def implicit(policy: Path, base: Path, **options: Any) -> ImplicitRewardTextJudge:
    given = {"policy": str(policy), "base": str(base), "device": "cpu", **options}
    made = judges.build(JudgeConfig(name="implicit_reward_text", options=given))
    assert isinstance(made, ImplicitRewardTextJudge)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_are_those_of_training(family: str, bases: dict[str, Path]) -> None:
    """The judge and the text modality must ask a model for the same tokens."""
    settings = TextModelSettings(base=str(bases[family]), device="cpu")
    model = TextAdapter(settings).load()
    conditions = [*CONDITIONS, {"prompt": "Größe 5 µg\n"}]
    if family == "qwen2":
        conditions.append({"prompt": "What is it?", "messages": TURNS})
    for condition in conditions:
        for answer in (*ANSWERS, "", " naïve 🙂"):
            row = {"pair_id": "p", "condition": condition, "completion": answer}
            expected = tokens_of(model, row, settings)
            found = prompt_and_answer_ids(model.parts["tokenizer"], model.parts["eos_ids"], condition, answer)
            assert found == (expected.prompt, expected.completions[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_implicit_reward_is_the_log_ratio_times_beta(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, policy = bases[family], moved(bases[family], tmp_path / "policy")
    judge = implicit(policy, base, beta=0.5, batch_size=2)
    scores = judge.score(CONDITIONS, ANSWERS)
    networks = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (policy, base)]
    lengths = []
    for condition, answer, score in zip(CONDITIONS, ANSWERS, scores, strict=True):
        ids = prompt_and_answer_ids(judge.tokenizer, judge.ends, condition, answer)
        ours, theirs = (log_likelihood(network, *ids) for network in networks)
        lengths.append(len(ids[1]))
        assert score == pytest.approx(0.5 * (ours - theirs), abs=1e-4)
    means = implicit(policy, base, beta=0.5, reduction="mean").score(CONDITIONS, ANSWERS)
    assert means == pytest.approx([score / length for score, length in zip(scores, lengths, strict=True)], abs=1e-4)
    assert implicit(base, base).score(CONDITIONS, ANSWERS) == [0.0, 0.0, 0.0]  # policy equal to reference


def test_an_adapter_is_compared_with_the_base_under_it(bases: dict[str, Path], tmp_path: Path) -> None:
    base, lora = bases["llama"], adapter(bases["llama"], tmp_path / "lora")
    scores = implicit(lora, base).score(CONDITIONS, ANSWERS)
    merged = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    tensors = load_file(lora / "adapter_model.safetensors")
    missing = merged.load_state_dict(
        {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}, strict=False
    )
    assert not missing.unexpected_keys
    whole: Any = merged.merge_and_unload()  # pyright: ignore[reportCallIssue]
    whole.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "whole")
    assert scores == pytest.approx(implicit(tmp_path / "whole", base).score(CONDITIONS, ANSWERS), abs=1e-4)
    assert any(abs(score) > 1e-3 for score in scores)


def test_the_adapter_that_the_text_modality_exports_is_read(bases: dict[str, Path], tmp_path: Path) -> None:
    text = TextAdapter(TextModelSettings(base=str(bases["qwen2"]), device="cpu", rank=4))
    model = text.trainable(text.load())
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    text.export(model, tmp_path / "lora")
    conditions = [{"prompt": "What is it?", "messages": TURNS}, CONDITIONS[0]]
    rows = [{"pair_id": str(place), "condition": condition, "completion": "no"} for place, condition in enumerate(conditions)]
    batch = [text.prepare(model, [row], step=0) for row in rows]
    with torch.no_grad():
        policy = [text.score(model, part, None).values.sum().item() for part in batch]
        base = [text.score(text.load(), part, None).values.sum().item() for part in batch]
    found = implicit(tmp_path / "lora", bases["qwen2"], beta=1.0).score(conditions, ["no", "no"])
    assert found == pytest.approx([a - b for a, b in zip(policy, base, strict=True)], abs=1e-4)


def test_a_reward_model_reads_its_chat_template(head: Path) -> None:
    judge = judges.build(JudgeConfig(name="reward_model", options={"model": str(head), "device": "cpu", "batch_size": 2}))
    conditions = [{"prompt": "What is it?", "messages": TURNS}, {"prompt": "What is it?"}, {"prompt": "it is"}]
    scores = judge.score(conditions, ANSWERS)
    network, tokenizer = AutoModelForSequenceClassification.from_pretrained(head).eval(), AutoTokenizer.from_pretrained(head)
    for condition, answer, score in zip(conditions, ANSWERS, scores, strict=True):
        turns = condition.get("messages") or [{"role": "user", "content": condition["prompt"]}]
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        assert sequence_ids(tokenizer, condition, answer) == ids[0].tolist()
        with torch.inference_mode():
            assert score == pytest.approx(network(ids).logits.item(), abs=1e-5)


def test_versions_name_what_a_score_depends_on(head: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    version = RewardModelJudge(model=str(head)).version
    assert version.startswith("1 head@sha256:") and str(head.parent) not in version
    other = tmp_path / "head"
    other.mkdir()
    for file in head.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert RewardModelJudge(model=str(other)).version == version
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    assert RewardModelJudge(model=str(other)).version != version
    assert template in RewardModelJudge(model=str(other)).local_files()
    judge = implicit(moved(bases["llama"], tmp_path / "policy"), bases["llama"], beta=0.25)
    assert judge.version.startswith("1 beta 0.25, sum, policy@sha256:") and " over llama@sha256:" in judge.version


def test_a_reward_that_is_no_number_is_refused(head: Path, tmp_path: Path) -> None:
    network = AutoModelForSequenceClassification.from_pretrained(head)
    with torch.no_grad():
        network.score.weight.fill_(float("nan"))
    network.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(head).save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"'reward_model' \(version 1 nan@sha256:\w+\) gave nan for output 0, prompt 'it is'"):
        checked_scores(RewardModelJudge(model=str(tmp_path / "nan"), device="cpu"), [{"prompt": "it is"}], ["yes"])


def test_explicit_against_implicit_with_real_models(head: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    policy = moved(bases["qwen2"], tmp_path / "policy")
    rows = [
        {"pair_id": str(place), "condition": {"prompt": f"{prompt} {place}?"}, "chosen": "yes, it is", "rejected": "no"}
        for prompt in ("What is it", "Is the patient at home")
        for place in range(6)
    ]
    report = compare_rewards(
        {"EXRM": RewardModelJudge(model=str(head), device="cpu"), "DPORM": implicit(policy, bases["qwen2"])},
        {
            "in distribution": rows[:6],
            "prompt shift": rows[6:],
            "response shift": [{**row, "rejected": "it"} for row in rows[:6]],
        },
    )
    assert report["scorers"]["DPORM"]["name"] == "implicit_reward_text"
    assert len(as_text(report).splitlines()) == 6 and json.loads(json.dumps(report)) == report


def spoilt(change: Callable[[Path], object]) -> Callable[[Path, Path], Path]:
    def make(source: Path, folder: Path) -> Path:
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
        return folder

    return make


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (as_pickle, r"has no weights: model\*.safetensors is expected there"),
        (lambda folder: (folder / "config.json").unlink(), "describes no model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 64), "cannot be read"),
        (
            lambda folder: [file.unlink() for file in folder.glob("token*")],
            "has no tokenizer: one of tokenizer.json, vocab.json",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer in .* cannot be read"),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
            "chat template refuses .* user",
        ),
    ],
)
def test_damaged_reward_models_are_explained(change: Any, said: str, head: Path, tmp_path: Path) -> None:
    folder = spoilt(change)(head, tmp_path / "spoilt")
    with pytest.raises(UserError, match=said):
        RewardModelJudge(model=str(folder), device="cpu").score([{"prompt": "it is"}], ["yes"])


def test_what_does_not_fit_is_explained(head: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    with pytest.raises(UserError, match="'reward_model': model is 'owner/name'; a folder on this machine"):
        judges.build(JudgeConfig(name="reward_model", options={"model": "owner/name"}))
    with pytest.raises(UserError, match="prompt and answer have .* tokens and its model reads 192 .*prompt 'it is'"):
        RewardModelJudge(model=str(head), device="cpu").score([{"prompt": "it is"}], ["no " * 200])
    with pytest.raises(UserError, match="prompt and answer have .* tokens and its model reads 192"):
        implicit(base, base).score([{"prompt": "it is"}], ["no " * 200])
    with pytest.raises(UserError, match="has 2 labels, and a reward model has one"):
        RewardModelJudge(model=str(base), device="cpu").score([{"prompt": "a"}], ["b"])
    headless = spoilt(
        lambda folder: (folder / "config.json").write_text(
            json.dumps(
                {**json.loads((folder / "config.json").read_text()), "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
            )
        )
    )(base, tmp_path / "headless")
    with pytest.raises(UserError, match="no whole AutoModelForSequenceClassification: it lacks score.weight"):
        RewardModelJudge(model=str(headless), device="cpu").score([{"prompt": "a"}], ["b"])
    for options, said in (
        ({"beta": 0}, "beta is 0; a number above 0"),
        ({"reduction": "max"}, "allowed: sum, mean"),
        ({"base": "nowhere"}, "base is 'nowhere'; a folder on this machine"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(UserError, match=said):
            judges.build(JudgeConfig(name="implicit_reward_text", options={"policy": str(base), "base": str(base), **options}))
    with pytest.raises(UserError, match="no chat template to write them down with"):
        implicit(base, base).score([{"prompt": "What is it?", "messages": TURNS}], ["no"])
    lora = adapter(base, tmp_path / "lora")
    with pytest.raises(UserError, match="does not go onto"):
        implicit(lora, bases["gpt2"]).score(CONDITIONS, ANSWERS)
    config = lora / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"PROMPT_TUNING"'))
    with pytest.raises(UserError, match="an adapter of the kind 'PROMPT_TUNING'; only LORA"):
        implicit(lora, base).score(CONDITIONS, ANSWERS)
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors"):
        implicit(lora, base).score(CONDITIONS, ANSWERS)
