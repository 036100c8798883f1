"""CHES of pairs through an adapter of a real language model, and the filter by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from polyalign.core.adapter import Model, Row
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens import TokenSettings, score_tokens
from polyalign.core.pair_ranking import ches_of_pairs, keep_lowest
from polyalign.core.scores import Scores

PAIRS = {"alike": ([4, 5, 6], [4, 5, 7]), "apart": ([4, 5, 6, 8], [9, 10]), "turned": ([9, 10], [4, 5, 6, 8])}


class Adapter:
    """Just what is needed of one; rows are pairs of lists of tokens behind the prompt 1 2 3."""

    def __init__(self, *dense: str, rejected_first: bool = False):
        self.settings, self.rejected_first = TokenSettings(dense=frozenset(dense)), rejected_first

    def load(self) -> Model:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return Model(LlamaForCausalLM(LlamaConfig(vocab_size=16, initializer_range=0.2, **sizes)), {}, "tiny")

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        target = (0.0, 1.0) if self.rejected_first else (1.0, 0.0)
        groups = [Group(row["pair_id"], (Candidate(None, None), Candidate(None, None)), target) for row in rows]
        sides = [(row["chosen"], row["rejected"])[:: -1 if self.rejected_first else 1] for row in rows]
        longest = max(len(side) for both in sides for side in both)
        ids = torch.tensor([[side + [0] * (longest - len(side)) for side in both] for both in sides])
        mask = torch.tensor([[[1] * len(side) + [0] * (longest - len(side)) for side in both] for both in sides])
        prompt = torch.tensor([[1, 2, 3]] * len(rows))
        tensors = {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt)}
        return Batch.of_groups(groups, {**tensors, "completion_ids": ids, "completion_mask": mask})

    def draws(self, model: Model, batch: Batch, *, step: int) -> None:
        return None

    def score(self, model: Model, batch: Batch, draws: None) -> Scores:
        return score_tokens(model.network, batch.tensors, self.settings)


def rows() -> list[dict[str, Any]]:
    return [{"pair_id": name, "chosen": chosen, "rejected": rejected} for name, (chosen, rejected) in PAIRS.items()]


def by_hand(model: Model, chosen: list[int], rejected: list[int]) -> float:
    """<mean H_w, mean H_l> - |mean H_w|^2 from the states of transformers itself: from the prompt's last token on."""

    def mean(answer: list[int]) -> torch.Tensor:
        with torch.no_grad():
            found = model.network(torch.tensor([[1, 2, 3, *answer]]), output_hidden_states=True)
        return found.hidden_states[-1][0, 2:-1].double().mean(0)

    winner, loser = mean(chosen), mean(rejected)
    return float(winner @ loser - winner @ winner)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("rejected_first", [False, True])
def test_scores_are_those_of_the_models_own_states(batch_size: int, rejected_first: bool) -> None:
    adapter = Adapter("hidden", rejected_first=rejected_first)
    model = adapter.load()
    model.network.train()
    found = ches_of_pairs(adapter, model, rows(), batch_size=batch_size)  # pyright: ignore[reportArgumentType]
    assert found == pytest.approx(
        [by_hand(model.with_network(model.network.eval()), *pair) for pair in PAIRS.values()], abs=1e-4
    )
    assert found[0] == pytest.approx(0.0, abs=1e-5) and found[1] != found[2]  # one prefix has one state; not symmetric


def test_the_mode_of_the_network_is_put_back() -> None:
    adapter = Adapter("hidden")
    model = adapter.load()
    model.network.train()
    ches_of_pairs(adapter, model, rows())  # pyright: ignore[reportArgumentType]
    assert model.network.training


def test_an_adapter_without_states_is_refused_in_words() -> None:
    adapter = Adapter()
    with pytest.raises(UserError, match="CHES compares the hidden states.*dense: \\[hidden\\]"):
        ches_of_pairs(adapter, adapter.load(), rows())  # pyright: ignore[reportArgumentType]


def test_states_that_are_not_finite_are_refused_by_pair() -> None:
    adapter = Adapter("hidden")
    model = adapter.load()
    with torch.no_grad():
        next(model.network.parameters())[6] = float("nan")  # the embedding of a token that two pairs have
    with pytest.raises(UserError, match="not finite for 2 pairs, the first is apart"):
        ches_of_pairs(adapter, model, rows())  # pyright: ignore[reportArgumentType]


def test_the_lowest_share_is_kept_in_the_order_of_the_data() -> None:
    scores = [0.5, -1.0, 2.0, -1.0, -3.0]
    assert keep_lowest(scores, 0.4) == [1, 4]
    assert keep_lowest(scores, 1.0) == [0, 1, 2, 3, 4]
    assert keep_lowest(scores, 0.01) == [4] and keep_lowest([], 0.5) == []


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="above 0 and at most 1"):
        keep_lowest([1.0], share)
    with pytest.raises(UserError, match="pair 1 is not finite"):
        keep_lowest([1.0, float("nan")], 0.5)
