"""What must always hold of a training on tokens, to the bit where it says so, on a tiny Llama with a real LoRA."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from polyalign.core.adapter import Model, Row
from polyalign.core.algorithm import DirectPreference
from polyalign.core.candidates import Batch, Candidate, Group
from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens import TokenSettings, score_tokens
from polyalign.core.objectives import Beta, build
from polyalign.core.objectives.table_pairs import DPO
from polyalign.core.objectives.table_tokens import TDPO1, TDPO2
from polyalign.core.randomness import rng
from polyalign.core.recipe import OptimizerConfig, TrainSettings
from polyalign.core.reference_cache import ScoreCache
from polyalign.core.references import AdapterOff, Cached, FrozenCopy, StartingWeights, adapters_off
from polyalign.core.scores import Scores
from polyalign.core.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

from token_models import VOCABULARY, by_the_book, farthest, gradients, model_of  # noqa: E402  # pyright: ignore[reportMissingImports]

BETA = Beta(0.3, "nats")
SHARED, SEPARATE = (TokenSettings(prefix_sharing=sharing) for sharing in ("on", "off"))


class TokenAdapter:
    """The adapter contract for pairs that are tokens already."""

    def __init__(self, settings: TokenSettings, *, lora: bool = True, dtype: torch.dtype = torch.float32):
        self.settings, self.lora, self.dtype, self.scored = settings, lora, dtype, 0

    def load(self) -> Model:
        return Model(model_of("Llama", dtype=self.dtype), {}, "tiny")

    def trainable(self, model: Model) -> Model:
        if not self.lora:
            return model
        torch.manual_seed(2)
        return model.with_network(get_peft_model(model.network, LoraConfig(r=4, target_modules="all-linear")).to(self.dtype))

    def prepare(self, model: Model, rows: Sequence[Row], *, step: int) -> Batch:
        widest = {name: max(len(ids) for row in rows for ids in row[name]) for name in ("prompt", "completions")}
        tensors: dict[str, list[Tensor]] = {"prompt_ids": [], "completion_ids": []}
        for row in rows:
            missing = widest["prompt"] - len(row["prompt"][0])
            tensors["prompt_ids"].append(pad(row["prompt"][0], (missing, 0), value=-1))
            padded = [pad(ids, (0, widest["completions"] - len(ids)), value=-1) for ids in row["completions"]]
            tensors["completion_ids"].append(torch.stack(padded))
        made = {name: torch.stack(parts) for name, parts in tensors.items()}
        masks = {name.replace("ids", "mask"): (ids >= 0).long() for name, ids in made.items()}
        groups = [Group(row["pair_id"], (Candidate(None, None), Candidate(None, None))) for row in rows]
        return Batch.of_groups(groups, {name: ids.clamp(min=0) for name, ids in made.items()} | masks)

    def draws(self, model: Model, batch: Batch, *, step: int) -> None: ...

    def score(self, model: Model, batch: Batch, draws: None) -> Scores:
        self.scored += 1
        return score_tokens(model.network, batch.tensors, self.settings)

    def sample(self, model: Model, conditions: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        raise NotImplementedError

    def export(self, model: Model, folder: Path) -> None:
        raise NotImplementedError


class TokenPairs:
    """Pairs of random tokens; lengths differ, and one answer is empty."""

    def __len__(self) -> int:
        return 6

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._row(index) for index in indices]

    def _row(self, index: int) -> dict[str, Any]:
        draw = rng(0, "pair", index)

        def tokens(longest: int) -> Tensor:
            length = int(torch.randint(1, longest + 1, (), generator=draw))
            return torch.randint(0, VOCABULARY, (length,), generator=draw)

        prompt, chosen, rejected = tokens(9), tokens(6), tokens(6)
        return {"pair_id": f"pair-{index}", "prompt": [prompt], "completions": [chosen, rejected[: 0 if index == 3 else None]]}


def method(
    settings: TokenSettings, seat: Any, *, objective: Any = None, bank: int | None = None, **adapter: Any
) -> DirectPreference:
    """A training of the tiny Llama; ``seat`` makes a reference seat of the network."""
    kind = TokenAdapter(settings, **adapter)
    model = kind.trainable(kind.load())
    return DirectPreference(kind, model, build(objective or DPO()), BETA, {"reference": seat(model.network)}, draw_bank=bank)


def move(algorithm: DirectPreference) -> None:
    """Give the LoRA weights that matter."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in algorithm.networks["policy"].parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("settings", [SHARED, SEPARATE], ids=["shared", "separate"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_first_margins_are_exactly_zero(settings: TokenSettings, lora: bool, dtype: torch.dtype) -> None:
    algorithm = method(settings, AdapterOff if lora else FrozenCopy, lora=lora, dtype=dtype)
    outcome = algorithm.step(algorithm.prepare(TokenPairs().rows(range(6)), step=1), step=1)["policy"]
    assert torch.equal(outcome.statistics["logratio"], torch.zeros(6, 2))
    assert torch.equal(outcome.statistics["margin"], torch.zeros(6))
    torch.testing.assert_close(outcome.loss, torch.full((6,), math.log(2.0)))
    found = gradients(algorithm.networks["policy"], outcome.loss.sum())
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    assert any(bool(gradient.any()) for gradient in found.values())


@pytest.mark.parametrize("settings", [SHARED, SEPARATE], ids=["shared", "separate"])
def test_a_cached_reference_is_the_live_one_to_the_bit(settings: TokenSettings, tmp_path: Path) -> None:
    live = method(settings, AdapterOff)
    cached = method(settings, lambda network: Cached(AdapterOff(network), ScoreCache(tmp_path, "tiny")), bank=1)
    batches = [TokenPairs().rows(part) for part in (range(0, 3), range(3, 6))]
    for algorithm in (live, cached):
        move(algorithm)
    for round_ in range(3):
        if round_ == 2:  # from the disk
            seat = cached.seats["reference"]
            assert isinstance(seat, Cached)
            seat.cache.flush()
            seat.cache = ScoreCache(tmp_path, "tiny")
        for rows in batches:
            first, second = (a.step(a.prepare(rows, step=1), step=1)["policy"] for a in (live, cached))
            assert torch.equal(first.loss, second.loss)
            assert first.statistics.keys() == second.statistics.keys()
            assert all(torch.equal(first.statistics[name], second.statistics[name]) for name in first.statistics)
            own, other = (gradients(a.networks["policy"], o.loss.sum()) for a, o in ((live, first), (cached, second)))
            assert all(torch.equal(own[name], other[name]) for name in own)
    assert isinstance(cached.adapter, TokenAdapter) and cached.adapter.scored == 3 * 2 + 2  # the reference once for each batch


def test_cached_scores_know_nothing_of_padding(tmp_path: Path) -> None:
    """Scored among other pairs than they are asked for with."""
    cached = method(SHARED, lambda network: Cached(AdapterOff(network), ScoreCache(tmp_path, "tiny")), bank=1)
    live = method(SHARED, AdapterOff)
    for algorithm in (live, cached):
        move(algorithm)
    for parts in ([(0, 1, 2), (3, 4, 5)], [(0, 3), (1, 4), (5, 2), (3,)]):
        for part in parts:
            rows = TokenPairs().rows(part)
            first, second = (a.step(a.prepare(rows, step=1), step=1)["policy"] for a in (live, cached))
            torch.testing.assert_close(first.statistics["logratio"], second.statistics["logratio"], rtol=1e-4, atol=2e-5)
    assert isinstance(cached.adapter, TokenAdapter) and cached.adapter.scored == 6 + 2


def test_a_training_with_a_cache_of_the_starting_weights_is_that_with_a_frozen_copy(tmp_path: Path) -> None:
    """Pairs one by one, so that the cache is filled in the shapes of the training."""
    found = []
    for name in ("frozen", "cached"):
        folder = tmp_path / name

        def seat(network: Any, name: str = name, folder: Path = folder) -> Any:
            return FrozenCopy(network) if name == "frozen" else Cached(StartingWeights(), ScoreCache(folder, "tiny"))

        algorithm = method(SHARED, seat, lora=False, bank=1 if name == "cached" else None)
        optimizer = OptimizerConfig(learning_rate=1e-3)
        settings = TrainSettings(steps=5, batch_size=3, micro_batch_size=1, optimizer=optimizer)
        Trainer(algorithm, TokenPairs(), settings, folder).run()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([(line["loss"], line["rewards/margins"], line["gradient_norm"]) for line in lines])
    assert found[0] == found[1] and len(found[0]) == 5
    assert found[0][0][:2] == (pytest.approx(math.log(2.0)), 0.0) and found[0][-1][0] < 0.9 * math.log(2.0)


class TestDivergence:
    """TDPO, whose offset is the KL of whole distributions."""

    @pytest.mark.parametrize("objective", [TDPO1(), TDPO2(alpha=0.7)], ids=["tdpo1", "tdpo2"])
    @pytest.mark.parametrize("sharing", ["on", "off"])
    def test_value_and_gradient_are_those_of_the_formula(self, objective: Any, sharing: Any) -> None:
        dense = TokenSettings(prefix_sharing=sharing, dense=frozenset({"kl"}), head_chunk=7)
        algorithm = method(dense, AdapterOff, objective=objective, dtype=torch.float64)
        move(algorithm)
        batch = algorithm.prepare(TokenPairs().rows(range(6)), step=1)
        outcome = algorithm.step(batch, step=1)["policy"]
        network, tensors = algorithm.networks["policy"], dict(batch.tensors)
        values, own = by_the_book(network, tensors)
        with torch.no_grad(), adapters_off(network):
            fixed, theirs = by_the_book(network, tensors)
        kl = (theirs.exp() * (theirs - own)).sum((2, 3))
        logratio = (values - fixed).sum(2)
        winner, alpha = (kl[:, 0], 1.0) if isinstance(objective, TDPO1) else (kl[:, 0].detach(), objective.alpha)
        margin = logratio[:, 0] - logratio[:, 1] - alpha * (kl[:, 1] - winner)
        loss = -logsigmoid(BETA.value * margin)
        torch.testing.assert_close(outcome.loss, loss, rtol=0, atol=1e-11)
        assert farthest(gradients(network, outcome.loss.sum()), gradients(network, loss.sum())) < 2e-6

    def test_it_begins_at_zero(self) -> None:
        settings = replace(SHARED, dense=frozenset({"kl"}))
        algorithm = method(settings, AdapterOff, objective=TDPO2())
        outcome = algorithm.step(algorithm.prepare(TokenPairs().rows(range(6)), step=1), step=1)["policy"]
        assert torch.equal(outcome.statistics["margin"], torch.zeros(6))

    def test_without_its_statistics_it_is_refused(self) -> None:
        algorithm = method(SHARED, AdapterOff, objective=TDPO2())
        with pytest.raises(UserError, match="needs dense_kl"):
            algorithm.step(algorithm.prepare(TokenPairs().rows(range(2)), step=1), step=1)

    def test_a_cached_reference_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="dense_kl .* of the reference"):
            method(SHARED, lambda network: Cached(AdapterOff(network), ScoreCache(tmp_path, "a")), objective=TDPO2(), bank=1)


def test_the_indicators_reach_the_figures_of_a_step(tmp_path: Path) -> None:
    settings = TokenSettings(dense=frozenset({"top_k", "confidence"}))
    algorithm = method(settings, lambda network: Cached(AdapterOff(network), ScoreCache(tmp_path, "tiny")), bank=1)
    for _ in range(2):
        statistics = algorithm.step(algorithm.prepare(TokenPairs().rows((0, 3)), step=1), step=1)["policy"].statistics
        assert {name: tuple(statistics[f"top_k/{name}"].shape) for name in ("mass", "entropy", "renormalised")} == {
            name: (2, 2) for name in ("mass", "entropy", "renormalised")
        }
        mass = statistics["top_k/mass"]
        assert float(mass[1, 1]) == 0.0 and bool((mass[0] > 0.1).all()) and bool((mass < 1.0).all())


def test_a_network_cut_up_over_two_processes_gives_what_a_whole_one_does() -> None:
    script = Path(__file__).resolve().parent / "token_sharded.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same") == 2
