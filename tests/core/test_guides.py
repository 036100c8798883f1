"""Seats besides the reference, on a tiny Llama with a LoRA: guides, completions of other prompts, recorded scores, and
references that follow the policy now and then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from polyalign.core.adapter import Model
from polyalign.core.adapter_files import save_adapter
from polyalign.core.algorithm import DirectPreference, of_length
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens import TokenSettings, score_tokens
from polyalign.core.objectives import Beta
from polyalign.core.objectives.table import SPEC, build
from polyalign.core.objectives.view import View
from polyalign.core.recipe import OptimizerConfig, ReferenceConfig, TrainSettings
from polyalign.core.references import EMA, AdapterOff, Cached, FrozenCopy, NoReference, StartingWeights, build_seat
from polyalign.core.scores import Scores, Unit
from polyalign.core.seats import (
    Mismatched,
    OtherNetwork,
    Recorded,
    behaviour_of,
    guide_adapter,
    mismatched,
    mismatched_seats,
)
from polyalign.core.trainer import Trainer

LENGTHS = ((4, 2), (3, 3), (1, 5), (2, 4))


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=13, **sizes))


def lora(seed: int, *, random: bool = False) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"init_lora_weights": not random, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        return get_peft_model(base(), LoraConfig(r=4, **options))  # type: ignore[arg-type]


class Tokens:
    """The adapter contract for rows of token ids: ``prompt`` (P,), ``candidates`` K lists."""

    def load(self) -> Model:
        return Model(base(), {}, "tiny")

    def trainable(self, model: Model) -> Model:
        return model.with_network(lora(1))

    def prepare(self, model: Model, rows: Sequence[Any], *, step: int) -> Batch:
        groups = [
            Group(
                row["pair_id"],
                tuple(Candidate(row["prompt"], ids) for ids in row["candidates"]),
                **{name: row[name] for name in ("target", "margins", "desirable") if name in row},
            )
            for row in rows
        ]
        longest = max(len(ids) for row in rows for ids in row["candidates"])
        ids = torch.zeros(len(rows), len(rows[0]["candidates"]), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            for candidate, answer in enumerate(row["candidates"]):
                ids[place, candidate, : len(answer)] = torch.tensor(answer)
                mask[place, candidate, : len(answer)] = 1
        prompts = torch.tensor([row["prompt"] for row in rows])
        tensors = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts)}
        return Batch.of_groups(groups, {**tensors, "completion_ids": ids, "completion_mask": mask})

    def draws(self, model: Model, batch: Batch, *, step: int) -> None:
        return None

    def score(self, model: Model, batch: Batch, draws: None) -> Scores:
        return score_tokens(model.network, batch.tensors, TokenSettings(prefix_sharing="off"))

    def sample(self, model: Model, conditions: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        raise NotImplementedError

    def export(self, model: Model, folder: Path) -> None:
        save_adapter(model.network, "default", folder)


def pairs(**further: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)

    def answer(length: int) -> list[int]:
        return torch.randint(1, 13, (length,), generator=generator).tolist()

    return [
        {"pair_id": f"pair-{k}", "prompt": answer(3), "candidates": [answer(a), answer(b)], **further}
        for k, (a, b) in enumerate(LENGTHS)
    ]


class Listed:
    def __init__(self, rows: list[dict[str, Any]]):
        self.all = rows

    def __len__(self) -> int:
        return len(self.all)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self.all[index] for index in indices]


def method(seats: Any, objective: dict[str, Any], network: Any = None) -> DirectPreference:
    kind = Tokens()
    model = kind.load().with_network(network or lora(1, random=True))
    spec = SPEC.validate_python({"beta": {"value": 0.5, "convention": "nats"}, **objective})
    return DirectPreference(kind, model, build(spec), Beta.of(spec.beta), seats(model.network))


def logps(network: nn.Module, batch: Batch) -> Tensor:
    """(G, K) sums, one answer at a time, by the plain road."""
    found = torch.zeros(batch.target.shape, dtype=torch.float64)
    for g in range(len(batch)):
        for k in range(found.shape[1]):
            answer = batch.tensors["completion_ids"][g, k][batch.tensors["completion_mask"][g, k].bool()]
            whole = torch.cat([batch.tensors["prompt_ids"][g], answer])
            with torch.no_grad():
                logits = network(input_ids=whole[None]).logits[0].log_softmax(-1)
            start = len(whole) - len(answer)
            found[g, k] = logits[start - 1 : -1].gather(1, answer[:, None]).double().sum()
    return found


# --- guides -------------------------------------------------------------------------------------------------------------------


def guided(tmp_path: Path, **objective: Any) -> DirectPreference:
    save_adapter(lora(7, random=True), "default", tmp_path / "guide")

    def seats(network: Any) -> Any:
        return {"guide": guide_adapter(network, tmp_path / "guide"), "reference": AdapterOff(network)}

    return method(seats, {"name": "tgdpo", **objective})


def test_a_guide_weighs_tokens_as_the_formula_says(tmp_path: Path) -> None:
    algorithm = guided(tmp_path, alpha=2.0)
    batch = algorithm.prepare(pairs(), step=1)
    outcome = algorithm.step(batch, step=1)["policy"]
    kind = algorithm.adapter
    values = {
        "policy": kind.score(algorithm.model, batch, None).values.detach(),
        "reference": kind.score(kind.load(), batch, None).values.detach(),
        "guide": kind.score(kind.load().with_network(lora(7, random=True)), batch, None).values.detach(),
    }
    reward = 0.5 * (values["guide"] - values["reference"])
    sign = torch.tensor([1.0, -1.0]).view(1, 2, 1)
    scores = (0.5 * (1 + sign * 2.0 * reward) * (values["policy"] - values["reference"])).sum(-1)
    torch.testing.assert_close(outcome.loss.detach(), -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]))
    assert float((reward.abs() > 0.01).float().mean()) > 0.3


def test_a_whole_model_guides_as_its_adapter_does(tmp_path: Path) -> None:
    algorithm = guided(tmp_path)
    batch = algorithm.prepare(pairs(), step=1)
    beside = algorithm.seats["guide"].scores(algorithm.adapter, algorithm.model, batch, None, index=1)
    alone = OtherNetwork(lora(7, random=True)).scores(algorithm.adapter, algorithm.model, batch, None, index=1)
    assert beside is not None
    torch.testing.assert_close(beside.values, alone.values)
    assert not alone.values.requires_grad


def test_a_guided_training_moves_the_policy_and_not_the_guide(tmp_path: Path) -> None:
    algorithm = guided(tmp_path)
    before = {name: value.detach().clone() for name, value in algorithm.model.network.named_parameters()}
    settings = TrainSettings(steps=3, batch_size=4, micro_batch_size=4, optimizer=OptimizerConfig(learning_rate=1e-2))
    Trainer(algorithm, Listed(pairs()), settings, tmp_path / "run").run()
    moved = {name for name, value in algorithm.model.network.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(".default." in name for name in moved)


# --- completions of other prompts ---------------------------------------------------------------------------------------------


def kto(network: Any = None, **objective: Any) -> DirectPreference:
    def seats(own: Any) -> Any:
        reference = AdapterOff(own)
        return {"reference": reference, **mismatched_seats(reference)}

    return method(seats, {"name": "kto", "baseline": "mismatched", **objective}, network)


def test_the_baseline_is_the_mean_log_ratio_of_answers_to_other_prompts() -> None:
    algorithm = kto(lora(7, random=True))  # one whose mean is above 0, where the baseline would end
    batch = algorithm.prepare(pairs(), step=1)
    outcome = algorithm.step(batch, step=1)["policy"]
    rolled = [
        {**row, "candidates": other["candidates"]} for row, other in zip(pairs(), [pairs()[-1], *pairs()[:-1]], strict=True)
    ]
    other = algorithm.prepare(rolled, step=1)
    network = algorithm.model.network
    z = (logps(network, other) - logps(base(), other)).mean().clamp(min=0.0)
    reward = 0.5 * (logps(network, batch) - logps(base(), batch) - z)
    wanted = 2.0 - torch.sigmoid(reward[:, 0]) - torch.sigmoid(-reward[:, 1])
    torch.testing.assert_close(outcome.loss.detach().double(), 0.5 * wanted, rtol=1e-4, atol=1e-5)
    assert float(z) > 0.05 and not algorithm.group_separable


def test_labels_of_single_answers_are_mismatched_too() -> None:
    rows = [
        {**row, "candidates": row["candidates"][:1], "target": (1.0,), "desirable": (k % 2 == 0,)}
        for k, row in enumerate(pairs())
    ]
    algorithm = kto()
    outcome = algorithm.step(algorithm.prepare(rows, step=1), step=1)["policy"]
    assert outcome.loss.shape == (4,) and bool(outcome.loss.isfinite().all())


def test_mismatching_moves_answers_alone() -> None:
    batch = Tokens().prepare(Tokens().load(), pairs(), step=1)
    other = mismatched(batch)
    assert torch.equal(other.tensors["prompt_ids"], batch.tensors["prompt_ids"])
    assert torch.equal(other.tensors["completion_ids"][1:], batch.tensors["completion_ids"][:-1])
    assert torch.equal(other.tensors["completion_mask"][0], batch.tensors["completion_mask"][-1])
    assert other.group_ids[1] == "pair-0 to pair-1" and not set(other.group_ids) & set(batch.group_ids)
    with pytest.raises(UserError, match="this batch has one prompt"):
        mismatched(batch[:1])
    with pytest.raises(UserError, match="no answers apart from what was asked"):
        mismatched(Batch(("a", "b"), torch.ones(2, 2), {"latents": torch.ones(2, 2, 3)}))


def test_a_reference_that_cannot_score_other_pairs_is_refused(tmp_path: Path) -> None:
    network = lora(1)
    for seat in (NoReference(), StartingWeights(), Recorded({}, Unit("token"))):
        with pytest.raises(UserError, match="adapter_off, frozen or ema, or objective.baseline to batch"):
            mismatched_seats(seat)
    cached = build_seat(ReferenceConfig(seat="cached"), network, folder=tmp_path, identity="a")
    assert isinstance(cached, Cached)
    seat = mismatched_seats(cached)["mismatched_reference"]
    assert isinstance(seat, Mismatched) and isinstance(seat.seat, AdapterOff)


# --- recorded scores ----------------------------------------------------------------------------------------------------------


def test_recorded_scores_stand_in_for_the_policy_that_gave_them(tmp_path: Path) -> None:
    behaviour = lora(9, random=True)
    kind = Tokens()
    batch = kind.prepare(kind.load(), pairs(), step=1)
    found = kind.score(kind.load().with_network(behaviour), batch, None)
    rows = pairs()
    for g, row in enumerate(rows):
        row["behaviour"] = [found.values[g, k][found.mask[g, k]].tolist() for k in range(2)]
    live = method(lambda _: {"reference": OtherNetwork(behaviour)}, {"name": "adpo"})
    wanted = live.step(batch, step=1)["policy"]
    sums = [{**row, "behaviour": [sum(values) for values in row["behaviour"]]} for row in rows]
    for given in (rows, sums):
        recorded = method(lambda _, given=given: {"reference": Recorded(behaviour_of(given), Unit("token"))}, {"name": "adpo"})
        outcome = recorded.step(batch, step=1)["policy"]
        torch.testing.assert_close(outcome.loss, wanted.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outcome.statistics["logratio"], wanted.statistics["logratio"], rtol=1e-4, atol=1e-5)


def test_recorded_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="'pair-0' has no 'behaviour'"):
        behaviour_of(pairs())
    kind = Tokens()
    batch = kind.prepare(kind.load(), pairs()[:1], step=1)
    for values, said in (
        ({}, "'pair-0' .1 of its batch. has no recorded behaviour scores"),
        ({"pair-0": [-1.0]}, "recorded scores of 1 candidates, and it has 2"),
        (
            {"pair-0": [[-1.0] * 4, [-1.0] * 3]},
            "candidate 1 of the pair 'pair-0' has recorded scores of 3 tokens, and it has 2",
        ),
    ):
        with pytest.raises(UserError, match=said):
            Recorded(values, Unit("token")).scores(kind, kind.load(), batch, None, index=1)


def test_recorded_scores_of_more_units_than_there_are_are_not_cut() -> None:
    longer = Scores(torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool), Unit("token"))
    assert of_length(longer, 2) is longer and of_length(longer, 5).values.shape == (1, 2, 5)
    batch = Batch(("a",), torch.tensor([[1.0, 0.0]]))
    policy = Scores(torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), Unit("token"))
    with pytest.raises(ValueError, match="both must be taken on the same units"):
        View(policy, of_length(longer, 2), batch, {}, 0.1)


# --- references that follow the policy (TR-DPO) -------------------------------------------------------------------------------


def moved(network: nn.Module, by: float) -> None:
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.add_(by)


@pytest.mark.parametrize(("decay", "wanted"), [(0.0, 0.5), (0.4, 0.3)])
def test_a_reference_is_synchronised_every_few_steps(decay: float, wanted: float) -> None:
    """Steps of +0.25 on the policy: after every second one the reference takes 1 - decay of the way."""
    network = lora(1)
    seat = EMA(network, decay, every=2)
    start = {name: value.detach().clone() for name, value in network.named_parameters()}

    def way(own: EMA) -> float:
        mean = dict(own.network.named_parameters())
        found = {round((mean[name].detach() - start[name]).mean().item(), 4) for name in own.followed}
        assert len(found) == 1
        return found.pop()

    moved(network, 0.25)
    seat.after_step(network)
    assert way(seat) == 0.0
    kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in seat.state_dict().items()}
    moved(network, 0.25)
    seat.after_step(network)
    assert way(seat) == pytest.approx(wanted, abs=1e-4)
    resumed = EMA(network, decay, every=2)
    resumed.load_state_dict(kept)
    resumed.after_step(network)
    assert way(resumed) == pytest.approx(way(seat), abs=1e-4) and resumed.state_dict()["steps"] == 2


def test_a_synchronised_reference_comes_back_after_a_kill(tmp_path: Path) -> None:
    def run(folder: Path, steps: int) -> DirectPreference:
        config = ReferenceConfig(seat="ema", ema_decay=0.0, ema_every=2)
        algorithm = method(lambda network: {"reference": build_seat(config, network)}, {"name": "tr_dpo"})
        settings = TrainSettings(
            steps=steps, batch_size=2, micro_batch_size=2, save_every=1, optimizer=OptimizerConfig(learning_rate=1e-2)
        )
        Trainer(algorithm, Listed(pairs()), settings, folder).run()
        return algorithm

    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "killed", 3)  # a constant learning rate: the same run, ended between two synchronisations
    again = run(tmp_path / "killed", 5)
    for name, value in whole.model.network.named_parameters():
        assert torch.equal(value, dict(again.model.network.named_parameters())[name])
    seat, other = whole.seats["reference"], again.seats["reference"]
    assert isinstance(seat, EMA) and isinstance(other, EMA)
    assert all(
        torch.equal(value, dict(other.network.named_parameters())[name]) for name, value in seat.network.named_parameters()
    )
    frozen = FrozenCopy(whole.model.network)
    assert any(
        not torch.equal(value, dict(frozen.network.named_parameters())[name]) for name, value in seat.network.named_parameters()
    )
