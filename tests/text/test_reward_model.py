"""Explicit reward models: the loss, a modality-free head, and models of texts that transformers opens."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from polyalign.core.errors import UserError
from polyalign.core.objectives import build
from polyalign.core.objectives.table_free import BradleyTerry
from polyalign.core.recipe import OptimizerConfig, TrainSettings
from polyalign.core.reward_model import FeatureReward, RewardTraining
from polyalign.core.trainer import Trainer
from polyalign.datasets.pairs import PairStore
from polyalign.evaluation import judges
from polyalign.evaluation.reward_accuracy import pair_accuracy
from polyalign.evaluation.text_judges.reward_model import RewardModelJudge
from polyalign.modalities.text import reward_model
from polyalign.modalities.text.reward_model import load_reward_model, save_reward_model, train_reward_model
from polyalign.modalities.text.settings import TextModelSettings

torch.set_num_threads(1)
WORDS = "patient drug home news good was given went".split()


def pairs(count: int, seed: int = 0, **extra: Any) -> list[dict[str, Any]]:
    """Answers that end in "yes" are preferred to those that end in "no"."""
    draws = random.Random(seed)

    def text(end: str) -> str:
        return f"{' '.join(draws.choices(WORDS, k=draws.randint(1, 4)))} {end}"

    return [
        {
            "pair_id": f"{seed}-{place}",
            "condition": {"prompt": f"the {draws.choice(WORDS)} {place}:"},
            "chosen": text("yes"),
            "rejected": text("no"),
            **extra,
        }
        for place in range(count)
    ]


def settings(base: Path, **options: Any) -> TextModelSettings:
    return TextModelSettings(**{"base": str(base), "device": "cpu", "rank": 4, **options})


def loop(steps: int, **options: Any) -> TrainSettings:
    given = {"batch_size": 8, "micro_batch_size": 8, "optimizer": OptimizerConfig(learning_rate=1e-2), **options}
    return TrainSettings(steps=steps, save_every=100, **given)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Rows(list):
    def rows(self, indices: Any) -> list[Any]:
        return [self[index] for index in indices]


def features_of(tensors: Any) -> torch.Tensor:
    return tensors["x"]


def collate(conditions: Any, outputs: Any) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(outputs) + torch.tensor(conditions).unsqueeze(1)}


def test_the_loss_is_the_bradley_terry_loss_by_hand() -> None:
    network = FeatureReward(features_of, 2)
    objective = build(BradleyTerry(margin=0.5, centre=0.01))
    training = RewardTraining(network, collate, objective)
    rows = [
        {"pair_id": "a", "condition": 0.0, "chosen": [1.0, 2.0], "rejected": [0.0, 1.0]},
        {"pair_id": "b", "condition": 1.0, "chosen": [0.0, 0.0], "rejected": [2.0, 0.0], "weight": 2.0},
    ]
    batch = training.prepare(rows, step=1)
    outcome = training.step(batch, step=1)["reward"]
    assert outcome.loss.tolist() == pytest.approx([math.log1p(math.exp(0.5)), 2 * math.log1p(math.exp(0.5))])  # a head of zeros
    with torch.no_grad():
        network.head.weight.copy_(torch.tensor([[0.5, -0.25]]))
    outcome = training.step(batch, step=1)["reward"]
    rewards = [(0.0, -0.25), (0.25, 1.25)]
    expected = [math.log1p(math.exp(-(w - r - 0.5))) + 0.01 * (w + r) ** 2 for w, r in rewards]
    assert outcome.loss.tolist() == pytest.approx([expected[0], 2 * expected[1]])
    assert outcome.statistics["margin"].tolist() == pytest.approx([w - r - 0.5 for w, r in rewards])
    assert not any(name.startswith(("logps", "error")) for name in outcome.statistics)


def test_a_head_on_any_features_learns_what_is_preferred(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 16), torch.nn.Tanh())
    tower.requires_grad_(False)  # a frozen backbone; only the head is trained
    network = FeatureReward(lambda tensors: tower(tensors["pictures"]), 16)

    def picture(bright: float) -> torch.Tensor:
        return bright + 0.1 * torch.randn(3, 2, 2, generator=draws)

    rows = Rows(
        {"pair_id": str(place), "condition": None, "chosen": picture(0.6), "rejected": picture(0.4)} for place in range(32)
    )
    training = RewardTraining(network, lambda _, outputs: {"pictures": torch.stack(list(outputs))}, build(BradleyTerry()))
    Trainer(training, rows, loop(60, optimizer=OptimizerConfig(learning_rate=0.1)), tmp_path).run()
    lines = metrics(tmp_path)
    assert lines[0]["loss"] == pytest.approx(math.log(2)) and lines[-1]["loss"] < 0.3
    assert lines[0]["rewards/accuracies"] == 0.5 and lines[-1]["rewards/accuracies"] == 1.0


@pytest.mark.parametrize(("family", "train"), [("llama", "lora"), ("gpt2", "full"), ("qwen2", "lora")])
def test_a_trained_model_is_what_transformers_and_the_judge_open(
    family: str, train: str, tiny_texts: dict[str, Path], tmp_path: Path
) -> None:
    result = train_reward_model(
        pairs(64), tmp_path, model=settings(tiny_texts[family], train=train), train=loop(40), held_out=pairs(40, seed=1)
    )
    lines = metrics(tmp_path)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["margins/ties"] == 1.0
    assert result.accuracy is not None and result.accuracy["accuracy"] > 0.85 and result.accuracy["interval"][0] > 0.5
    saved = json.loads((tmp_path / "reward_model.json").read_text())
    assert saved["trained_pairs"] == 64 and saved["left_out"] == {} and saved["held_out"] == result.accuracy
    assert not [path for path in tmp_path.rglob("*.bin")] and (result.folder / "model.safetensors").is_file()

    stock = AutoModelForSequenceClassification.from_pretrained(result.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    assert stock.config.num_labels == 1 and stock.config.pad_token_id is not None
    judge = judges.build(_Spec("reward_model", {"model": str(result.folder), "device": "cpu"}))
    assert isinstance(judge, RewardModelJudge)
    row = pairs(1, seed=2)[0]
    (score,) = judge.score([row["condition"]], [row["chosen"]])
    if family == "qwen2":  # its chat template is applied to what is only a prompt, too
        turns = [{"role": "user", "content": row["condition"]["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False).input_ids
    else:
        ids = tokenizer(row["condition"]["prompt"]).input_ids + tokenizer(row["chosen"], add_special_tokens=False).input_ids
        ids = [*ids, tokenizer.eos_token_id]
    with torch.inference_mode():
        expected = stock(input_ids=torch.tensor([ids])).logits.item()
    assert score == pytest.approx(expected, abs=1e-5)
    assert judge.version.startswith("1 reward_model@sha256:")


class _Spec:
    def __init__(self, name: str, options: dict[str, Any]):
        self.name, self.weight, self.options = name, 1.0, options


def test_batches_and_padding_change_no_reward(tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    reward = load_reward_model(settings(tiny_texts["llama"], train="full"))
    with torch.no_grad():
        for name, parameter in reward.network.named_parameters():
            if name.startswith("score"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_reward_model(reward, tmp_path / "model")
    rows = pairs(7)
    asked = [row["condition"] for row in rows], [row["chosen"] for row in rows]
    together = RewardModelJudge(model=str(tmp_path / "model"), device="cpu").score(*asked)
    alone = RewardModelJudge(model=str(tmp_path / "model"), device="cpu", batch_size=1).score(*asked)
    assert together == pytest.approx(alone, abs=1e-5) and len({round(score, 4) for score in together}) > 1


def test_the_same_seed_gives_the_same_weights_and_an_interrupted_training_goes_on(
    tiny_texts: dict[str, Path], tmp_path: Path
) -> None:
    rows, model = pairs(16), settings(tiny_texts["llama"])
    weights = []
    for name, stops in (("a", (6,)), ("b", (2, 6))):
        results = [train_reward_model(rows, tmp_path / name, model=model, train=loop(steps)) for steps in stops]
        weights.append((results[-1].folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match="pairs: "):
        train_reward_model(pairs(16, seed=9), tmp_path / "a", model=model, train=loop(6))


def test_an_encoder_gets_a_head_too(tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(tiny_texts["llama"])
    tokens.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>", "pad_token": "</s>"})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=1
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    tokens.save_pretrained(tmp_path / "bert")
    result = train_reward_model(pairs(32), tmp_path / "run", model=settings(tmp_path / "bert", train="full"), train=loop(30))
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[-1]["loss"] < 0.3
    judge = RewardModelJudge(model=str(result.folder), device="cpu")
    assert pair_accuracy(judge, pairs(20, seed=3)).accuracy > 0.85
    saved = json.loads((result.folder / "config.json").read_text())
    assert saved["hidden_dropout_prob"] == 0.1 and saved["architectures"] == ["BertForSequenceClassification"]


def test_a_reward_model_can_be_trained_further(tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    first = train_reward_model(pairs(16), tmp_path / "a", model=settings(tiny_texts["llama"]), train=loop(10))
    train_reward_model(pairs(16), tmp_path / "b", model=settings(first.folder), train=loop(1))
    assert metrics(tmp_path / "b")[0]["loss"] < 0.9 * math.log(2)  # its head was kept


def test_pairs_that_are_too_long_are_left_out_and_counted(tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    rows = pairs(8)
    rows[3]["rejected"] = "no " * 300
    result = train_reward_model(rows, tmp_path, model=settings(tiny_texts["llama"]), train=loop(1))
    assert (result.pairs, result.left_out) == (7, 1)
    assert json.loads((tmp_path / "reward_model.json").read_text())["left_out"] == {"the model's positions, 192": 1}
    with pytest.raises(UserError, match="none of 8 pairs fits: the last has .* more than max_length, 3"):
        train_reward_model(rows, tmp_path / "b", model=settings(tiny_texts["llama"], max_length=3), train=loop(1))


def test_what_cannot_be_a_reward_model_is_refused(tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qlora.*Take lora or full"):
        load_reward_model(settings(tiny_texts["llama"], train="qlora"))
    with pytest.raises(UserError, match="give max_length"):
        load_reward_model(settings(tiny_texts["llama"], max_prompt_tokens=9))
    with pytest.raises(UserError, match="do not fit this network"):
        load_reward_model(settings(tiny_texts["llama"], targets=("nonsense",)))
    rows = pairs(2)
    rows[1]["chosen"] = None
    with pytest.raises(UserError, match="pair 0-1: chosen is None"):
        train_reward_model(rows, tmp_path, model=settings(tiny_texts["llama"]), train=loop(1))
    with pytest.raises(UserError, match="has 2 labels"):
        RewardModelJudge(model=str(tiny_texts["llama"])).score([{"prompt": "a"}], ["b"])


def test_the_command_line(tiny_texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"chosen_scores": {"rule": 1.0}, "rejected_scores": {"rule": 0.0}, "provenance": {}}
    for name, seed in (("train", 0), ("held", 1)):
        PairStore(tmp_path / name, "text").write_shard(0, pairs(16, seed=seed, **shape))
    run = [str(tmp_path / "run"), "--base", str(tiny_texts["llama"]), "--pairs", str(tmp_path / "train"), "--epochs", "2"]
    assert reward_model.main([*run, "--held-out", str(tmp_path / "held"), "--learning-rate", "0.01", "--centre", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "trained on 16 pairs, 0 left out" in said and "accuracy on held-out pairs: " in said
    assert len(metrics(tmp_path / "run")) == 4
    assert reward_model.main([str(tmp_path / "x"), "--pairs", str(tmp_path / "nowhere")]) == 2
    assert "no pair store here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "train": "full"}, {"gradient_checkpointing": True}]
)
def test_rewards_keep_the_heads_precision_and_other_ways_of_training_run(
    options: dict[str, Any], tiny_texts: dict[str, Path], tmp_path: Path
) -> None:
    result = train_reward_model(pairs(16), tmp_path, model=settings(tiny_texts["llama"], **options), train=loop(8))
    lines = metrics(tmp_path)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[-1]["loss"] < 0.6
    reward = load_reward_model(settings(tiny_texts["llama"], **options))
    tensors = reward.collate([{"prompt": "a"}], ["b"])
    heads = {value.dtype for name, value in reward.network.named_parameters() if "score" in name and value.requires_grad}
    assert heads == {torch.float32}
    if options.get("train") != "full":
        assert reward.rewards(reward.network, tensors).dtype == torch.float32
    assert all(math.isfinite(score) for score in RewardModelJudge(model=str(result.folder)).score([{"prompt": "a"}], ["b"]))
