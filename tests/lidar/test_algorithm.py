"""Distillation-DPO in training: the student moves, the right way; assistants, low-rank ones too; resume; divergence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.core.objectives import Outcome
from polyalign.core.recipe import OptimizerConfig, TrainSettings
from polyalign.core.trainer import Trainer
from polyalign.modalities.lidar.algorithm import (
    DistillationPreference,
    DistillationSettings,
    distillation_optimizers,
)
from polyalign.modalities.lidar.assistants import low_rank_copy, merged, whole_copy
from polyalign.modalities.lidar.completion import CompletionSettings, GuidedDenoiser, complete
from polyalign.modalities.lidar.diffusion import SolverSettings, noise_schedule
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff
from polyalign.modalities.lidar.preference import DistanceMix
from polyalign.modalities.lidar.student import Prefix, drawn_prefix, student_samples

torch.set_num_threads(1)
NARROW = (4, 4, 5, 6, 7, 6, 5, 4, 4)
COMPLETION = CompletionSettings(SolverSettings(1), guidance=1.0, copies=2, voxel=0.3)
SETTINGS = DistillationSettings(completion=COMPLETION)


def networks(seed: int = 0) -> tuple[MinkUNetDiff, MinkGlobalEnc]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MinkUNetDiff(NARROW).eval(), MinkGlobalEnc(NARROW).eval()


class Clouds:
    """Four scans of 24 points in a room of 6 m, and their ground truth."""

    def __len__(self) -> int:
        return 4

    def rows(self, indices: Any) -> list[dict[str, Any]]:
        return [self._row(index) for index in indices]

    def _row(self, index: int) -> dict[str, Any]:
        draws = np.random.default_rng(index)
        scan, full = (draws.uniform(-3, 3, (count, 3)).astype(np.float32) for count in (24, 60))
        return {"pair_id": f"scan-{index}", "scan": scan, "full": full}


def algorithm(settings: DistillationSettings = SETTINGS, **options: Any) -> DistillationPreference:
    return DistillationPreference(*networks(), settings, **options)


def outcomes(made: DistillationPreference, step: int, rows: tuple[int, ...] = (0, 1)) -> dict[str, Outcome]:
    return made.step(made.prepare(Clouds().rows(rows), step=step), step=step)


def shifted(made: DistillationPreference, name: str, by: tuple[float, float, float]) -> None:
    """Let an assistant predict so much more noise everywhere."""
    with torch.no_grad():
        made.networks[name].last[2].bias += torch.tensor(by)  # type: ignore[index,union-attr]


def samples(made: DistillationPreference) -> torch.Tensor:
    scans = made.prepare(Clouds().rows([0, 1]), step=2).tensors["scan"]
    with torch.no_grad():
        return complete(made.networks["student"], made.encoder, scans, [1, 2], COMPLETION)  # type: ignore[arg-type]


class TestStudent:
    def test_its_gradient_is_not_zero_and_no_other_network_has_any(self) -> None:
        made = algorithm()
        shifted(made, "assistant_chosen", (0.5, 0, 0))
        found = outcomes(made, 2)
        assert list(found) == ["student"]
        found["student"].loss.sum().backward()
        gradients = [weight.grad for weight in made.networks["student"].parameters()]
        assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients)
        others = [made.teacher, made.encoder, *(made.networks[name] for name in made.networks if name != "student")]
        assert all(weight.grad is None for network in others for weight in network.parameters())

    def test_later_places_of_a_course_reach_every_weight_too(self) -> None:
        made = algorithm(replace(SETTINGS, courses=(3,)))
        step = next(step for step in range(2, 60, 2) if drawn_prefix((3,), 0, step).place > 1)
        shifted(made, "assistant_chosen", (0.5, 0, 0))
        outcomes(made, step)["student"].loss.sum().backward()
        assert all(float(weight.grad.abs().max()) > 0 for weight in made.networks["student"].parameters())  # type: ignore[union-attr]

    @pytest.mark.parametrize(("loser", "sign"), [(False, 1.0), (True, -1.0)])
    def test_one_step_moves_the_samples_towards_the_teacher_and_away_for_the_loser(self, loser: bool, sign: float) -> None:
        """An assistant that says c more noise than the teacher puts clean points sigma c behind the teacher's."""
        made = algorithm(replace(SETTINGS, loser_weight=1.0))
        shifted(made, "assistant_rejected" if loser else "assistant_chosen", (0.4, 0.0, 0.0))
        before = samples(made)
        outcomes(made, 2)["student"].loss.sum().backward()
        with torch.no_grad():
            for weight in made.networks["student"].parameters():
                weight -= 1e-4 * weight.grad  # type: ignore[operator]
        moved = (samples(made) - before).mean(dim=(0, 1))
        assert sign * moved[0] > 0 and abs(moved[0]) > 3 * moved[1:].abs().max()

    def test_an_assistant_like_the_teacher_leaves_it_alone(self) -> None:
        made = algorithm()
        outcomes(made, 2)["student"].loss.sum().backward()
        assert all(float(weight.grad.abs().max()) == 0 for weight in made.networks["student"].parameters())  # type: ignore[union-attr]

    def test_its_figures(self) -> None:
        made = algorithm()
        shifted(made, "assistant_chosen", (0.5, 0, 0))
        figures = outcomes(made, 2)["student"].statistics
        assert float(figures["official_value"].abs().max()) > 0 and not figures["official_value"].requires_grad
        torch.testing.assert_close(figures["score_gap_chosen"], torch.full((2,), 0.5 / 3))
        assert set(figures["first_preferred"].tolist()) <= {0.0, 1.0}

    def test_a_prefix_of_one_step_is_the_sampler(self) -> None:
        denoiser, encoder = networks()
        scans = torch.tensor(np.stack([row["scan"] for row in Clouds().rows([0, 1])]))
        for steps in (1, 3):
            how = replace(COMPLETION, solver=SolverSettings(steps))
            guided = GuidedDenoiser(denoiser, encoder, scans, how)
            found = student_samples(guided, scans, [5, 6], how, noise_schedule(), Prefix(steps, steps))
            torch.testing.assert_close(found, complete(denoiser, encoder, scans, [5, 6], how))


class TestAssistants:
    def test_each_learns_from_its_side_alone(self) -> None:
        made = algorithm()
        found = outcomes(made, 1)
        assert list(found) == ["assistant_chosen", "assistant_rejected"]
        found["assistant_chosen"].loss.sum().backward()
        assert all(weight.grad is not None for weight in made.networks["assistant_chosen"].parameters())
        assert all(
            weight.grad is None for name in ("student", "assistant_rejected") for weight in made.networks[name].parameters()
        )

    def test_pairs_below_the_margin_train_nothing(self) -> None:
        made = algorithm(replace(SETTINGS, margin=1e6))
        for step in (1, 2):
            for outcome in outcomes(made, step).values():
                assert outcome.loss.tolist() == [0.0, 0.0] and outcome.statistics["counted"].tolist() == [0.0, 0.0]

    def test_score_distillation_has_one_assistant_and_no_pairs(self) -> None:
        made = algorithm(replace(SETTINGS, preference=False))
        assert list(made.networks) == ["student", "assistant_chosen"]
        shifted(made, "assistant_chosen", (0.5, 0, 0))
        found = outcomes(made, 2)["student"]
        assert "official_value" not in found.statistics and float(found.loss.abs().max()) > 0

    def test_turns(self) -> None:
        made = algorithm(replace(SETTINGS, assistant_steps=3))
        assert [made.student_turn(step) for step in range(1, 9)] == [False, False, False, True] * 2

    def test_groups_do_not_depend_on_those_beside_them(self) -> None:
        made = algorithm()
        shifted(made, "assistant_chosen", (0.5, 0, 0))
        for step in (1, 2):
            together, alone = outcomes(made, step, (0, 1)), outcomes(made, step, (1,))
            for name in together:
                torch.testing.assert_close(together[name].loss[1:], alone[name].loss)

    def test_independent_pairs_differ_by_more_than_scale(self) -> None:
        gaps = [outcomes(algorithm(replace(SETTINGS, pairs=kind)), 1) for kind in ("scaled", "independent")]  # type: ignore[arg-type]
        first, second = (found["assistant_chosen"].statistics["distance_gap"] for found in gaps)
        assert not torch.equal(first, second)


class TestLowRank:
    def test_it_begins_as_the_teacher_and_trains_little(self) -> None:
        teacher, encoder = networks()
        teacher.requires_grad_(False)
        copied = low_rank_copy(teacher, 2)
        scans = torch.tensor(np.stack([row["scan"] for row in Clouds().rows([0])]))
        found = [complete(network, encoder, scans, [1], COMPLETION) for network in (teacher, copied)]
        assert torch.equal(found[0], found[1])
        trained = [name for name, weight in copied.named_parameters() if weight.requires_grad]
        assert trained and all(name.endswith((".down", ".up")) for name in trained)
        shared = {weight.data_ptr() for weight in teacher.parameters()}
        kept = [weight for weight in copied.parameters() if not weight.requires_grad]
        assert all(weight.data_ptr() in shared for weight in kept)

    def test_assistants_begin_otherwise_by_name_and_by_seed(self) -> None:
        def begun(seed: int) -> list[torch.Tensor]:
            made = algorithm(replace(SETTINGS, assistant_rank=2), seed=seed)
            found = [dict(made.networks[name].named_parameters()) for name in ("assistant_chosen", "assistant_rejected")]
            return [torch.cat([one[key].flatten() for key in sorted(one) if key.endswith(".down")]) for one in found]

        first, again, other = begun(3), begun(3), begun(4)
        assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
        assert not torch.equal(first[0], first[1]) and not any(
            torch.equal(one, changed) for one, changed in zip(first, other, strict=True)
        )

    def test_changes_become_part_of_the_weights(self) -> None:
        teacher, encoder = networks()
        copied = low_rank_copy(teacher.requires_grad_(False), 2)
        with torch.no_grad():
            for name, weight in copied.named_parameters():
                if name.endswith(".up"):
                    weight += 0.01
        plain = merged(copied, teacher)
        assert set(plain.state_dict()) == set(teacher.state_dict())
        scans = torch.tensor(np.stack([row["scan"] for row in Clouds().rows([0])]))
        with torch.no_grad():
            found = [complete(network, encoder, scans, [1], COMPLETION) for network in (copied, plain, teacher)]
        torch.testing.assert_close(found[0], found[1])
        assert not torch.allclose(found[0], found[2], atol=1e-4)

    def test_what_cannot_be_shared_is_refused(self) -> None:
        teacher, _ = networks()
        with pytest.raises(UserError, match="frozen first"):
            low_rank_copy(teacher, 2)
        with pytest.raises(UserError, match="rank of 1"):
            low_rank_copy(teacher.requires_grad_(False), 0)

    def test_batch_statistics_stand_still(self) -> None:
        copied = whole_copy(networks()[0]).train()
        before = {key: value.clone() for key, value in copied.state_dict().items()}
        scans = torch.tensor(np.stack([row["scan"] for row in Clouds().rows([0])]))
        complete(copied, networks()[1], scans, [1], COMPLETION)
        assert all(torch.equal(before[key], value) for key, value in copied.state_dict().items())


class TestTraining:
    @pytest.mark.parametrize("rank", [None, 2])
    def test_a_resumed_run_ends_in_the_same_weights(self, tmp_path: Path, rank: int | None) -> None:
        def trained(folder: Path, steps: int) -> dict[str, torch.Tensor]:
            made = algorithm(replace(SETTINGS, assistant_rank=rank), seed=3)
            start = {key: value.clone() for key, value in made.networks["student"].state_dict().items()}
            train = TrainSettings(
                steps=steps, batch_size=2, micro_batch_size=1, save_every=2, optimizer=OptimizerConfig(learning_rate=1e-3)
            )
            rates = distillation_optimizers(train.optimizer, 5.0)
            Trainer(made, Clouds(), train, folder, seed=3, optimizers=rates).run()
            assert any(not torch.equal(start[key], value) for key, value in made.networks["student"].state_dict().items())
            return made.networks["student"].state_dict() | made.networks["assistant_chosen"].state_dict(prefix="own.")

        whole = trained(tmp_path / "whole", 4)
        trained(tmp_path / "parts", 2)
        resumed = trained(tmp_path / "parts", 4)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    def test_divergence_is_refused_and_the_guard_is_part_of_the_checkpoint(self) -> None:
        made = algorithm(replace(SETTINGS, courses=(1,)))
        for step in range(1, 6):
            made.after_step(step, {"student": {"distance": torch.tensor([1.0])}})
        again = algorithm(replace(SETTINGS, courses=(1,)))
        again.load_state_dict(made.state_dict())
        assert again.figures() == {"distance/1/1": 1.0}
        with pytest.raises(UserError, match="diverged at step 6: .*loser_weight"):
            again.after_step(6, {"student": {"distance": torch.tensor([9.0])}})

    def test_clouds_of_unlike_sizes_are_refused(self) -> None:
        rows = Clouds().rows([0, 1])
        rows[1]["full"] = rows[1]["full"][:-1]
        with pytest.raises(UserError, match="one size"):
            algorithm().prepare(rows, step=1)

    def test_settings_are_checked(self) -> None:
        for change in ({"courses": ()}, {"assistant_steps": 0}, {"completion": replace(COMPLETION, coarser=((500, 0.4),))}):
            with pytest.raises(UserError):
                replace(SETTINGS, **change)


class TestPreference:
    def test_metrics_and_their_mix(self) -> None:
        draws = np.random.default_rng(0)
        truth = draws.uniform(-3, 3, (300, 3))
        near, far = truth + draws.normal(0, 0.05, truth.shape), truth + draws.normal(0, 0.8, truth.shape)
        total = 0.0
        for name in ("cd", "jsd", "jsd_3d", "f1", "iou"):
            mix = DistanceMix({name: 1.0}, f1_threshold=0.2)
            assert mix.distance(near, truth) < mix.distance(far, truth), name
            total += 2 * mix.distance(near, truth)
        every = DistanceMix(dict.fromkeys(("cd", "jsd", "jsd_3d", "f1", "iou"), 2.0), f1_threshold=0.2)
        assert every.distance(near, truth) == pytest.approx(total)

    def test_points_count_as_far_out_as_it_is_told(self) -> None:
        near = np.random.default_rng(0).uniform(-3, 3, (300, 3))
        truth, pred = (np.concatenate([near, near + [away, 0, 0]]) for away in (60, 70))
        for name in ("jsd", "jsd_3d"):
            assert DistanceMix({name: 1.0}).distance(pred, truth) == 0.0
            assert DistanceMix({name: 1.0}, max_range=80.0).distance(pred, truth) > 0.4

    def test_what_is_no_metric_is_refused(self) -> None:
        for weights in ({}, {"emd": 1.0}, {"cd": 0.0}):
            with pytest.raises(UserError):
                DistanceMix(weights)
