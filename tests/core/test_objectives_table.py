"""The table as a whole: what is refused and when, and every row that a denoising model can have, trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field, TypeAdapter, ValidationError

from polyalign.core.adapter import Model
from polyalign.core.algorithm import DirectPreference
from polyalign.core.candidates import Batch
from polyalign.core.errors import UserError
from polyalign.core.explain import objective_card, objectives_table
from polyalign.core.likelihood.denoising import Draws, denoising_scores, rows_of
from polyalign.core.objectives import TABLE, AutoBeta, Beta, Objective, Row, Term, build, spec_type
from polyalign.core.objectives.links import AlphaDivergence, ErrorOdds, JensenShannon, LogOdds, PowerReward
from polyalign.core.objectives.losses import Logistic
from polyalign.core.objectives.losses_coupled import AOT
from polyalign.core.objectives.losses_pointwise import NCA, APODown, APOZero, BinaryClassifier, ProspectValue, SelfPlay
from polyalign.core.objectives.objective import PolicyConfidence
from polyalign.core.objectives.offsets import ConstantMargin
from polyalign.core.objectives.rows import PreferenceParameters, preference
from polyalign.core.objectives.serves import Offer, Plan, refuse_unless_served
from polyalign.core.objectives.weights import Mean
from polyalign.core.recipe import AutoBetaConfig, BetaConfig
from polyalign.core.references import build_seat
from polyalign.core.scores import Scores
from polyalign.core.trainer import Trainer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "exactness")]

# pyright: reportMissingImports=false
from objective_cases import COUPLED, batch, scores, spec  # noqa: E402
from objective_cases import PICTURES as PICTURE_UNIT  # noqa: E402
from tiny_training import TinyAdapter, TinyPairs, reference, settings  # noqa: E402

torch.set_num_threads(1)
PICTURES = Offer("an image recipe", "timestep", frozenset({"value", "output_gradient"}))
REFUSED_FOR_PICTURES = {
    "modpo": "modpo needs margins, the weighted rewards of the other objectives",
    "slic_hf": "for scores of tokens",
    "simpo": "for scores of tokens",
    "alphapo": "for scores of tokens",
    "cpo": "for scores of tokens",
    "orpo": "for scores of tokens",
    "bradley_terry": "for scores of tokens",
    "ld_dpo": "for scores of tokens",
    "tdpo1": "for scores of tokens",
    "tdpo2": "for scores of tokens",
    "tgdpo": "for scores of tokens",
    "wpo": "for scores of tokens",
    "rdpo": "for scores of tokens",
    "mcm_dpo": "for scores of tokens",
    "mdpo": "for scores of tokens",
    "chip": "for scores of tokens",
    "branches": "for scores of tokens",
    "ofs_dpo": "the seat 'partner' (a second adapter that is trained beside)",
    "tr_dpo": "Set train.reference.seat: ema",
}


class ResidualAdapter(TinyAdapter):
    """The tiny denoiser, with the network's output where an objective asks for it, as an image recipe does."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.keep = "output_gradient" in objective.needs

    def score(self, model: Model, batch: Batch, draws: Draws) -> Scores:
        condition = rows_of(batch.tensors["condition"], 2, draws.timesteps.shape[1], per_candidate=False)
        return denoising_scores(
            lambda noisy, timesteps: model.network(noisy, timesteps, condition),
            batch.tensors["latents"],
            draws,
            model.parts["schedule"],
            keep_residual=self.keep,
        )


def method(objective: Objective, folder: Path, *, beta: Beta | AutoBeta, seat: str = "adapter_off") -> DirectPreference:
    adapter = ResidualAdapter(objective)
    model = adapter.trainable(adapter.load())
    chosen = reference(seat)
    filled = build_seat(chosen, model.network, folder=folder / "reference", identity="tiny")
    bank = chosen.draws_per_pair if seat == "cached" else None
    return DirectPreference(adapter, model, objective, beta, {"reference": filled}, draw_bank=bank)


def trained(
    objective: Objective, folder: Path, *, beta: Beta, steps: int = 2, seat: str = "adapter_off"
) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the policy's weights have moved."""
    algorithm = method(objective, folder, beta=beta, seat=seat)
    before = {name: weight.clone() for name, weight in algorithm.networks["policy"].named_parameters()}
    Trainer(algorithm, TinyPairs(), settings(steps=steps, micro_batch_size=8), folder).run()
    after = dict(algorithm.networks["policy"].named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before), "training moves weights"
    assert all(bool(weight.isfinite().all()) for weight in after.values())
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class TestPictures:
    @pytest.mark.parametrize("name", list(TABLE))
    def test_every_row_is_trained_or_refused_in_words(self, name: str, tmp_path: Path):
        chosen = spec(name)
        objective = build(chosen)
        plan = Plan("adapter_off", cut=False)
        if name in REFUSED_FOR_PICTURES:
            with pytest.raises(UserError, match="objective: ") as refused:
                refuse_unless_served(objective, PICTURES, plan, key="objective")
            assert REFUSED_FOR_PICTURES[name] in str(refused.value)
            return
        refuse_unless_served(objective, PICTURES, plan, key="objective")
        assert chosen.beta.convention in ("mean_half", "mean"), "a default that has a meaning for squared errors"
        assert len(trained(objective, tmp_path, beta=Beta(2.0, chosen.beta.convention))) == 2

    def test_a_moving_reference_makes_tr_dpo(self, tmp_path: Path):
        objective = build(spec("tr_dpo"))
        refuse_unless_served(objective, PICTURES, Plan("ema", cut=False), key="objective")
        assert len(trained(objective, tmp_path, beta=Beta(2.0), seat="ema")) == 2

    def test_mismatched_completions_have_no_seat_here(self):
        with pytest.raises(UserError, match="needs the seat 'mismatched' .the policy on completions of other prompts"):
            plan = Plan("adapter_off", cut=False)
            refuse_unless_served(build(spec("kto", baseline="mismatched")), PICTURES, plan, key="objective")

    def test_without_a_reference_of_its_own_the_one_that_is_scored_is_reported(self):
        policy, reference = torch.tensor([[-0.2, -0.5]]), torch.tensor([[-0.3, -0.4]])
        seats = {"policy": scores(policy, unit=PICTURE_UNIT), "reference": scores(reference, unit=PICTURE_UNIT)}
        statistics = build(spec("mapo"))(seats, batch([[1.0, 0.0]]), beta=1.0).statistics
        torch.testing.assert_close(statistics["reference_value"], reference)
        torch.testing.assert_close(statistics["logratio"], policy - reference)
        assert statistics["reward"].gt(0.0).all() and statistics["margin"].item() > 0, "odds, as they are trained"
        alone = build(spec("mapo"))({"policy": seats["policy"]}, batch([[1.0, 0.0]]), beta=1.0).statistics
        assert torch.equal(alone["logratio"], policy) and torch.equal(alone["reward"], statistics["reward"])

    def test_coupled_batches_are_not_cut(self):
        for name in (*COUPLED, "sdpo"):
            objective = build(spec(name, **({"safeguard_scope": "batch"} if name == "sdpo" else {})))
            refuse_unless_served(objective, PICTURES, Plan("adapter_off", cut=False), key="objective")
            with pytest.raises(UserError, match="couples the pairs of a batch.*micro_batch_size to train.batch_size"):
                refuse_unless_served(objective, PICTURES, Plan("adapter_off", cut=True), key="objective")
        for name, cure in {"kto": "objective.baseline to none", "sdpo": "objective.safeguard_scope to group"}.items():
            objective = build(spec(name, **({"safeguard_scope": "batch"} if name == "sdpo" else {})))
            with pytest.raises(UserError, match=cure):
                refuse_unless_served(objective, PICTURES, Plan("adapter_off", cut=True), key="arms.other")

    @pytest.mark.parametrize("seat", ["cached", "none"])
    def test_the_references_output_is_not_in_a_cache(self, seat: str):
        with pytest.raises(
            UserError, match=rf"dspo needs output_gradient .* of the reference.*{seat}.*adapter_off, frozen or ema"
        ):
            refuse_unless_served(build(spec("dspo")), PICTURES, Plan(seat, cut=False), key="objective")

    def test_a_cached_reference_refuses_dense_needs_when_the_method_is_made(self, tmp_path: Path):
        for name in ("dspo", "tdpo2"):
            with pytest.raises(UserError, match="cached has values only"):
                method(build(spec(name)), tmp_path, beta=Beta(1.0), seat="cached")
        assert len(trained(build(spec("dpo")), tmp_path, beta=Beta(2.0), seat="cached")) == 2

    def test_the_objective_itself_refuses_other_scores(self):
        values = -torch.rand(2, 2, 1)
        picture = scores(values, unit=PICTURE_UNIT)
        pairs = batch([[1.0, 0.0]] * 2)
        with pytest.raises(UserError, match=r"'orpo' has no meaning for scores of denoising models .*it is for tokens"):
            build(spec("orpo"))({"policy": picture}, pairs, beta=1.0)
        with pytest.raises(UserError, match="'mapo' has no meaning for scores of tokens"):
            build(spec("mapo"))({"policy": scores(values)}, pairs, beta=1.0)
        with pytest.raises(UserError, match="'dspo' needs output_gradient .* from the reference as well"):
            build(spec("dspo"))({"policy": picture, "reference": replace(picture, residual=None)}, pairs, beta=1.0)


class TestCombinations:
    POINTWISE = (NCA(), APOZero(), APODown(), SelfPlay(1.0), BinaryClassifier(), ProspectValue())

    @pytest.mark.parametrize("loss", [*POINTWISE, AOT(), AOT(paired=False)], ids=lambda loss: loss.name)
    @pytest.mark.parametrize("link", [JensenShannon(), AlphaDivergence(0.5)], ids=lambda link: link.name)
    def test_a_link_with_an_unknown_constant_needs_a_loss_that_cancels_it(self, loss, link):
        with pytest.raises(UserError, match=r"unknown constant of each prompt.*does not cancel.*identity link"):
            Term(loss, link=link)

    @pytest.mark.parametrize("link", [PowerReward(0.5), LogOdds(), ErrorOdds(0.5)], ids=lambda link: link.name)
    def test_a_link_of_a_likelihood_has_no_reference(self, link):
        Term(link=link, reference=None)
        with pytest.raises(UserError, match="no meaning for a ratio to a reference"):
            Term(link=link)

    def test_beta_does_not_follow_what_is_not_compared_with_a_reference(self, tmp_path: Path):
        auto = AutoBeta(BetaConfig(auto=AutoBetaConfig()))
        with pytest.raises(UserError, match="mapo compares without one"):
            method(build(spec("mapo")), tmp_path, beta=auto)
        method(build(spec("dpo")), tmp_path, beta=auto)

    def test_beta_does_not_follow_single_candidates(self, tmp_path: Path):
        algorithm = method(build(spec("kto")), tmp_path, beta=AutoBeta(BetaConfig(auto=AutoBetaConfig())))
        algorithm.unit = PICTURE_UNIT
        with pytest.raises(UserError, match="these are single candidates"):
            algorithm.after_step(1, {"policy": {"logratio": torch.zeros(3, 1)}})

    def test_a_coupled_loss_has_no_weight_for_each_group(self):
        with pytest.raises(UserError, match="AOT loss couples the groups"):
            Term(AOT(), sample_weight=PolicyConfidence())

    def test_numbers_outside_their_range_are_refused_when_the_recipe_is_read(self):
        wrong: list[dict[str, Any]] = [
            {"name": "exo", "label_smoothing": 0.0},
            {"name": "discopop", "tau": 1.5},
            {"name": "ld_dpo", "alpha": 1.5},
            {"name": "kto", "baseline": "mean"},
            {"name": "dmpo", "alpha": 0.0},
            {"name": "diffusion_kto", "utility": "greedy"},
            {"name": "mcm_dpo", "weights": [1.0, 0.5]},
            {"name": "ld_dpo", "winner_safeguard": 0.5},
        ]
        for content in wrong:
            with pytest.raises(ValidationError):
                spec(**content)
        with pytest.raises(UserError, match="nothing to compare"):
            build(spec("mcm_dpo", weights=[0.0] * 7))
        for name in ("cpo", "modpo"):
            build(spec(name, loss="hinge"))
            with pytest.raises(UserError, match="label_smoothing is for objective.loss: logistic, and 0.2 was given"):
                build(spec(name, loss="hinge", label_smoothing=0.2))

    def test_a_penalty_on_token_probabilities_is_for_tokens(self):
        plan = Plan("adapter_off", cut=False)
        refuse_unless_served(build(spec("adpo")), PICTURES, plan, key="objective")
        with pytest.raises(UserError, match="adpo is for scores of tokens"):
            refuse_unless_served(build(spec("adpo", reference_kl=0.1)), PICTURES, plan, key="objective")

    def test_part_of_beta_keeps_the_rows_own_convention(self):
        assert spec("mapo", beta={"value": 500}).beta.convention == "mean"
        assert spec("mapo", beta={"convention": "mean_half"}).beta.value == 1000.0
        assert spec("tdpo2", beta={"value": 0.3}).beta.convention == "nats"
        assert spec("dpo", beta={"value": 0.3}).beta.convention == "mean_half"


class TestExplained:
    def test_table_and_cards_say_what_a_row_is_for(self):
        lines = " ".join(objectives_table(TABLE).split())
        assert all(f" {name} " in lines for name in TABLE)
        assert "by how likely the policy would give these answers itself. [tokens]" in lines
        card = objective_card(TABLE["mapo"])
        assert "denoising models (image, audio, video, LiDAR)" in card and "default 1000.0" in card and "default 'mean'" in card
        assert "single candidates with a label" in objective_card(TABLE["kto"])
        for name, words in {
            "ipo": "an upper bound",
            "exo": "a heuristic",
            "mapo": "a heuristic",
            "f_dpo": "a heuristic",
        }.items():
            assert words in objective_card(TABLE[name]), name
        assert "over noise levels" not in objective_card(TABLE["tdpo1"])
        assert "dense_kl (the KL of whole next-token distributions)" in objective_card(TABLE["tdpo1"])


def test_a_new_objective_is_one_row_and_is_trained_with(tmp_path: Path):
    class Offset(PreferenceParameters):
        name: Literal["odpo"] = "odpo"

        gap: float = Field(default=0.5, ge=0.0)
        """By how much the winner has to win, on the scale of the reward."""

    row = Row(
        name="odpo",
        summary="DPO in which the winner has to win by a gap.",
        formula="-log sigma(beta (r_w/n_w - r_l/n_l) - gap)",
        source="arXiv 2402.10571, with one gap for all pairs.",
        differences="Means instead of sums.",
        parameters=Offset,
        build=lambda p: preference(p, "odpo", Logistic(), weights=Mean(), offset=ConstantMargin(p.gap)),
    )
    table: Mapping[str, Row] = {**TABLE, row.name: row}
    chosen = TypeAdapter(spec_type(table)).validate_python({"name": "odpo", "gap": 0.2, "beta": {"value": 20.0}})
    objective = build(chosen, table)
    refuse_unless_served(objective, PICTURES, Plan("adapter_off", cut=True), key="objective")
    lines = trained(objective, tmp_path, beta=Beta.of(chosen.beta), steps=6)
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(0.2))), rel=1e-5)
    assert losses[-1] < losses[0]
    assert "winner has to win by a gap" in objective_card(row)
