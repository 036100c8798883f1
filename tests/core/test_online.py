"""Training in rounds, with a tiny Llama of six letters and a judge that counts one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polyalign.core.adapter import Model
from polyalign.core.algorithm import Algorithm, DirectPreference
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.early_stop import ENTROPY, MASS, SIDES
from polyalign.core.errors import UserError
from polyalign.core.fast_slow import FastSlow, add_twin
from polyalign.core.likelihood.mixture import geometric_mixture
from polyalign.core.likelihood.tokens import TokenSettings, score_tokens
from polyalign.core.objectives import Beta
from polyalign.core.objectives.table import SPEC, build
from polyalign.core.recipe import OptimizerConfig, ReferenceConfig, ScheduleConfig, StopConfig, TrainSettings
from polyalign.core.recipe_loops import OnlineConfig
from polyalign.core.references import AdapterOff, adapters_off, build_seat
from polyalign.core.scores import Scores
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.generation import read_samples
from polyalign.modalities.online import (
    MixtureSampler,
    OnlineSettings,
    OnlineTraining,
    Round,
    RoundData,
    refreshed,
    targets_of,
)

LETTERS = "abcdef"
LENGTH = 5


class Letters:
    """An adapter for texts of five letters. ``prompt`` is some letters too."""

    def __init__(self) -> None:
        self.sampled = 0

    def load(self) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            return Model(
                LlamaForCausalLM(LlamaConfig(vocab_size=len(LETTERS), initializer_range=0.5, **sizes)), {}, "letters@hash"
            )

    def trainable(self, model: Model) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
            return model.with_network(get_peft_model(model.network, config))  # type: ignore[arg-type]

    def prepare(self, model: Model, rows: Sequence[Any], *, step: int) -> Batch:
        answers = [row["candidates"] if "candidates" in row else [row["chosen"], row["rejected"]] for row in rows]
        groups = [
            Group(row["pair_id"], tuple(Candidate(row["condition"], text) for text in texts), target=row["target"])
            for row, texts in zip(rows, answers, strict=True)
        ]
        ids = torch.tensor([[ids_of(text) for text in texts] for texts in answers])
        prompts = torch.tensor([ids_of(row["condition"]["prompt"]) for row in rows])
        masks = {"prompt_mask": torch.ones_like(prompts), "completion_mask": torch.ones_like(ids)}
        return Batch.of_groups(groups, {"prompt_ids": prompts, "completion_ids": ids, **masks})

    def draws(self, model: Model, batch: Batch, *, step: int) -> None:
        return None

    def score(self, model: Model, batch: Batch, draws: None) -> Scores:
        return score_tokens(model.network, batch.tensors, TokenSettings(prefix_sharing="off"))

    def sample(self, model: Model, conditions: Sequence[Any], seeds: Sequence[int]) -> list[str]:
        return self.sample_mixture(model, conditions, seeds, share=0.0)

    def sample_mixture(
        self, model: Model, conditions: Sequence[Any], seeds: Sequence[int], *, share: float, reference: Model | None = None
    ) -> list[str]:
        assert not model.network.training and not torch.is_grad_enabled()
        self.sampled += len(seeds)
        ids = torch.tensor([ids_of(condition["prompt"]) for condition in conditions])
        draws = torch.stack([torch.rand(LENGTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        for place in range(LENGTH):
            logits = model.network(input_ids=ids).logits[:, -1]
            if share:
                with adapters_off(model.network):
                    base = model.network(input_ids=ids).logits[:, -1]
                logits = geometric_mixture(logits, base, reference_share=share)
            chosen = (logits.softmax(-1).cumsum(-1) < draws[:, place, None]).sum(-1).clamp(max=len(LETTERS) - 1)
            ids = torch.cat([ids, chosen[:, None]], 1)
        return ["".join(LETTERS[token] for token in row) for row in ids[:, -LENGTH:].tolist()]

    def export(self, model: Model, folder: Path) -> None:
        raise NotImplementedError


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


class CountA:
    """The share of the letter a. ``broken_after`` answers it is interrupted, as a user would."""

    name, version = "count-a", "1"

    def __init__(self, broken_after: float = float("inf")):
        self.left = broken_after

    def score(self, conditions: Sequence[Any], outputs: Sequence[str]) -> list[float]:
        if self.left < len(outputs):
            raise KeyboardInterrupt
        self.left -= len(outputs)
        return [text.count("a") / LENGTH for text in outputs]


class Indifferent(CountA):
    def score(self, conditions: Sequence[Any], outputs: Sequence[str]) -> list[float]:
        return [0.5] * len(outputs)


CONDITIONS = [{"prompt": first + second} for first in LETTERS for second in LETTERS[:2]]
ONLINE = OnlineSettings(rounds=4, prompts_per_round=16, samples_per_prompt=4, prompts_per_shard=4)


def train_settings(**changes: Any) -> TrainSettings:
    base: dict[str, Any] = {
        "steps": 24,
        "batch_size": 8,
        "micro_batch_size": 8,
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "schedule": ScheduleConfig(name="cosine", warmup_steps=2),
        "save_every": 4,
    }
    return TrainSettings(**{**base, **changes})


def run(
    folder: Path,
    settings: OnlineSettings = ONLINE,
    *,
    objective: dict[str, Any] | None = None,
    reference: ReferenceConfig | None = None,
    judge: Any = None,
    share: float = 0.0,
    train: TrainSettings | None = None,
    kill_at: int | None = None,
    entropies: Sequence[float] = (),
) -> tuple[Letters, Any, list[Round]]:
    kind, train = Letters(), train or train_settings()
    model = kind.trainable(kind.load())
    spec = SPEC.validate_python({"name": "online_dpo", "beta": {"value": 0.3, "convention": "nats"}} | (objective or {}))
    seat = AdapterOff(model.network) if reference is None else build_seat(reference, model.network)
    algorithm: Any
    if spec.name == "ofs_dpo":
        add_twin(model.network)
        algorithm = FastSlow(kind, model, spec, {"reference": seat}, interval=4)
    else:
        algorithm = DirectPreference(kind, model, build(spec), Beta.of(spec.beta), {"reference": seat})
    if kill_at is not None:
        kill(algorithm, kill_at)
    if entropies:
        figures = iter([{f"{ENTROPY}_{side}": entropy for side in SIDES} for entropy in entropies])
        algorithm.figures = lambda: next(figures) | {f"{MASS}_{side}": 0.9 for side in SIDES}
    sampler = MixtureSampler(kind, share) if share else None
    rounds = OnlineTraining(
        kind,
        model,
        algorithm,
        judge or CountA(),
        CONDITIONS,
        settings=settings,
        train=train,
        folder=folder,
        seed=5,
        outputs="text",
        sampler=sampler,
    ).run()
    return kind, model.network, rounds


def kill(algorithm: Algorithm, step: int) -> None:
    """Interrupt the training in this step."""
    after_step = algorithm.after_step

    def killed(now: int, statistics: Any) -> None:
        if now == step:
            raise KeyboardInterrupt
        after_step(now, statistics)

    algorithm.after_step = killed  # type: ignore[method-assign]


def weights(network: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters() if value.requires_grad}


def stored(folder: Path) -> dict[str, bytes]:
    """All that rounds have written."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "rounds").rglob("*.*"))}


def scores(rounds: list[Round]) -> list[float]:
    return [one.mean_score for one in rounds]


def test_the_judged_reward_rises_over_the_rounds(tmp_path: Path) -> None:
    kind, _, rounds = run(tmp_path)
    found = scores(rounds)
    assert found[0] < 0.3 and found[-1] > found[0] + 0.25, found
    assert all(later > earlier for earlier, later in zip(found, found[1:], strict=False)), found
    assert [one.after_steps for one in rounds] == [0, 6, 12, 18]
    assert kind.sampled == 4 * 16 * 4 == rounds[-1].samples_so_far and rounds[0].samples == 64
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))
    rates = [line["learning_rate"] for line in lines]
    assert rates[1] == 1e-2 and rates[6] > rates[12] > rates[23] > 0.0  # one schedule over all rounds
    for number in range(1, 5):
        assert PairStore(tmp_path / "rounds" / f"{number:03d}" / "pairs", "text").validate() == rounds[number - 1].groups


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"mode": "first_second", "samples_per_prompt": 2, "targets": "soft", "scale": 0.1, "ties": "half"}, {}),
        ({"mode": "all_pairs", "max_pairs_per_prompt": 3, "optimizer": "reset"}, {}),
        (
            {"mode": "first_second", "targets": "soft", "scale": 0.1, "ties": "half"},
            {"objective": {"name": "online_ipo", "tau": 0.3, "beta": {"value": 1.0, "convention": "nats"}}, "share": 0.125},
        ),
        ({"mode": "best_worst"}, {"reference": "refreshed"}),
        ({"mode": "best_rest", "lists": True, "targets": "soft", "scale": 0.2}, {"objective": {"name": "adpo"}}),
        ({}, {"objective": {"name": "ofs_dpo"}}),
    ],
    ids=["online DPO", "all pairs", "IPO-MD", "iterated, refreshed", "ADPO on lists", "OFS-DPO"],
)
def test_every_loop_learns(tmp_path: Path, settings: dict[str, Any], options: dict[str, Any]) -> None:
    online = OnlineSettings(**{**vars(ONLINE), "prompts_per_round": 24, **settings})
    if options.get("reference") == "refreshed":
        options = {"reference": refreshed(online, train_settings())}
    _, network, rounds = run(tmp_path, online, **options)
    assert scores(rounds)[-1] > scores(rounds)[0] + 0.08, scores(rounds)
    assert all(bool(value.isfinite().all()) for value in weights(network).values())


@pytest.mark.parametrize("judged", [40, 64 + 37], ids=["first round", "second round"])
def test_a_kill_while_sampling_loses_nothing(tmp_path: Path, judged: int) -> None:
    _, whole, rounds = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", judge=CountA(broken_after=judged))
    kind, again, resumed = run(tmp_path / "killed")
    assert kind.sampled < 256 and resumed == rounds
    assert stored(tmp_path / "killed") == stored(tmp_path / "whole")
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("step", [3, 6, 7, 11], ids=str)
@pytest.mark.parametrize("loop", ["refreshed", "reset", "ofs"])
def test_a_kill_while_training_loses_nothing(tmp_path: Path, step: int, loop: str) -> None:
    """Before the first checkpoint, at a round's last step, at a round's first and in the middle of one. (A refreshed reference
    and the optimiser's state have to come back too.)"""
    online = OnlineSettings(**{**vars(ONLINE), "rounds": 2, "optimizer": "reset" if loop == "reset" else "keep"})
    train = train_settings(steps=12)
    options: dict[str, Any] = {"train": train}
    if loop == "refreshed":
        options["reference"] = refreshed(online, train)
    if loop == "ofs":
        options["objective"] = {"name": "ofs_dpo"}
    _, whole, rounds = run(tmp_path / "whole", online, **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", online, kill_at=step, **options)
    _, again, resumed = run(tmp_path / "killed", online, **options)
    assert resumed == rounds and stored(tmp_path / "killed") == stored(tmp_path / "whole")
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


def test_a_finished_run_is_not_done_again_and_gives_its_weights(tmp_path: Path) -> None:
    _, first, rounds = run(tmp_path, train=train_settings(steps=8))
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    kind, second, again = run(tmp_path, train=train_settings(steps=8))
    assert kind.sampled == 0 and again == rounds and (tmp_path / "metrics.jsonl").read_bytes() == lines
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_a_run_that_was_stopped_at_the_end_of_a_round_stays_stopped(tmp_path: Path) -> None:
    stop = StopConfig(every=1, patience=1, smoothing=0.0)
    options: dict[str, Any] = {"train": train_settings(steps=8, stop=stop), "entropies": [1.0, 2.0, 3.0, 2.5]}
    _, first, rounds = run(tmp_path, **options)
    kind, second, again = run(tmp_path, **options)
    assert len(rounds) == 2 and again == rounds and kind.sampled == 0
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_an_optimiser_that_is_reset_gives_other_weights(tmp_path: Path) -> None:
    kept = OnlineSettings(**{**vars(ONLINE), "rounds": 2})
    reset = OnlineSettings(**{**vars(kept), "optimizer": "reset"})
    train = train_settings(steps=8)
    found = {name: weights(run(tmp_path / name, one, train=train)[1]) for name, one in (("kept", kept), ("reset", reset))}
    assert stored(tmp_path / "kept") == stored(tmp_path / "reset")  # both begin the second round alike
    assert any(not torch.equal(value, found["reset"][name]) for name, value in found["kept"].items())


def test_targets() -> None:
    assert targets_of([0.8, 0.2], soft=False, scale=1.0) == (1.0, 0.0)
    assert targets_of([0.5, 0.5], soft=False, scale=1.0) == (0.5, 0.5) == targets_of([0.5, 0.5], soft=True, scale=0.1)
    found = targets_of([0.8, 0.2], soft=True, scale=0.3)
    assert found == pytest.approx((torch.sigmoid(torch.tensor(2.0)).item(), torch.sigmoid(torch.tensor(-2.0)).item()))
    assert targets_of([900.0, 0.0], soft=True, scale=1e-3) == (1.0, 0.0)
    assert targets_of([3.0, 1.0, 3.0], soft=False, scale=1.0) == (0.5, 0.0, 0.5)
    listed = targets_of([3.0, 1.0, 2.0], soft=True, scale=2.0)
    torch.testing.assert_close(torch.tensor(listed), torch.tensor([1.5, 0.5, 1.0]).softmax(0))


def test_pairs_of_a_round_have_ids_and_targets_of_their_own(tmp_path: Path) -> None:
    settings = OnlineSettings(**{**vars(ONLINE), "rounds": 1, "ties": "half", "mode": "all_pairs"})
    run(tmp_path, settings, train=train_settings(steps=1))
    data = RoundData(PairStore(tmp_path / "rounds/001/pairs", "text"), 7, settings, "count-a")
    rows = data.rows(range(len(data)))
    assert all(row["pair_id"].startswith("007-") for row in rows)
    ties = [row for row in rows if row["chosen_scores"] == row["rejected_scores"]]
    assert ties and all(row["target"] == (0.5, 0.5) for row in ties)
    assert all(row["target"] == (1.0, 0.0) for row in rows if row not in ties)
    some = RoundData(PairStore(tmp_path / "rounds/001/pairs", "text"), 7, settings, "count-a", [2, 4])
    assert some.rows([0, 1]) == [rows[2], rows[4]]


def test_lists_hold_all_samples_of_a_prompt_once(tmp_path: Path) -> None:
    settings = OnlineSettings(**{**vars(ONLINE), "rounds": 1, "mode": "best_rest", "lists": True})
    _, _, rounds = run(tmp_path, settings, objective={"name": "adpo"}, train=train_settings(steps=1))
    data = RoundData(PairStore(tmp_path / "rounds/001/pairs", "text"), 1, settings, "count-a")
    rows = data.rows(range(len(data)))
    assert len(rows) == rounds[0].groups and 8 <= len(rows) <= 16
    for row in rows:
        counts = [text.count("a") for text in row["candidates"]]
        assert len(set(row["candidates"])) == 4 and counts[0] == max(counts)
        assert row["target"] == targets_of(counts, soft=False, scale=1.0) and "chosen" not in row


def test_every_prompt_is_asked_before_one_is_asked_again(tmp_path: Path) -> None:
    run(tmp_path, OnlineSettings(**{**vars(ONLINE), "rounds": 3, "prompts_per_round": 4}), train=train_settings(steps=3))
    asked = []
    for number in range(1, 4):
        samples = read_samples(PairStore(tmp_path / "rounds" / f"{number:03d}" / "pairs", "text"))
        asked += [sample.prompt for sample in samples if sample.sample_index == 0]
    assert sorted(asked) == sorted(condition["prompt"] for condition in CONDITIONS)


def test_a_judge_that_prefers_nothing_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="round 1 has nothing to train on: of 64 samples of 16 prompts none is preferred"):
        run(tmp_path / "first", judge=Indifferent())
    run(
        tmp_path / "later",
        OnlineSettings(**{**vars(ONLINE), "rounds": 1}),
        train=train_settings(steps=6, schedule=ScheduleConfig()),
    )
    longer = train_settings(steps=12, schedule=ScheduleConfig())
    _, _, rounds = run(tmp_path / "later", OnlineSettings(**{**vars(ONLINE), "rounds": 2}), train=longer, judge=Indifferent())
    assert len(rounds) == 2 and rounds[1].groups == 0 and "ended before round 2" in capsys.readouterr().err


def test_a_recipe_says_the_same_as_the_settings() -> None:
    config = OnlineConfig()
    assert OnlineSettings(**config.model_dump(exclude={"reference", "mixture"})) == OnlineSettings()
    with pytest.raises(ValueError, match="'lists' are all samples of a prompt"):
        OnlineConfig(lists=True)


def test_what_cannot_be_done_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="train.steps are all steps.*and 25 do not divide so. Take a multiple of 4"):
        run(tmp_path, train=train_settings(steps=25))
    with pytest.raises(UserError, match="online.lists.*best_rest"):
        OnlineSettings(lists=True)
    with pytest.raises(UserError, match="online.scale"):
        OnlineSettings(scale=0.0)
    with pytest.raises(UserError, match="token by token"):
        MixtureSampler(object(), 0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process, and WORLD_SIZE says 2"):
        run(tmp_path)


def test_lost_pairs_of_a_half_trained_round_are_told(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, kill_at=11)
    (tmp_path / "rounds/002/round.json").unlink()
    (tmp_path / "rounds/002/pairs/summary.json").unlink()
    with pytest.raises(UserError, match="its pairs are not complete; they cannot be made again"):
        run(tmp_path)
