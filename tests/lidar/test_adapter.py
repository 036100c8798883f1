"""Diffusion-DPO of a denoiser of scans through the core: margins, gradient, sampling, export, refused input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyalign.core.adapter import Model
from polyalign.core.algorithm import DirectPreference
from polyalign.core.errors import UserError
from polyalign.core.objectives import Beta
from polyalign.core.objectives.table import build
from polyalign.core.objectives.table_pairs import DPO
from polyalign.core.references import FrozenCopy
from polyalign.modalities.lidar.adapter import LidarAdapter, LidarModelSettings
from polyalign.modalities.lidar.checkpoints import save_completion
from polyalign.modalities.lidar.completion import CompletionSettings
from polyalign.modalities.lidar.diffusion import SolverSettings, noise_schedule
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNetDiff

torch.set_num_threads(1)
NARROW = (4, 4, 5, 6, 7, 6, 5, 4, 4)
COMPLETION = CompletionSettings(SolverSettings(2), guidance=1.0, copies=2, voxel=0.3)


@pytest.fixture
def settings(tmp_path: Path) -> LidarModelSettings:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser, encoder = MinkUNetDiff(NARROW), MinkGlobalEnc(NARROW)
    save_completion(tmp_path / "base.safetensors", denoiser, encoder)
    return LidarModelSettings(base=str(tmp_path / "base.safetensors"), completion=COMPLETION, timesteps_per_pair=2)


class Pairs:
    def __len__(self) -> int:
        return 4

    def rows(self, indices: Any) -> list[dict[str, Any]]:
        return [self._row(index) for index in indices]

    def _row(self, index: int) -> dict[str, Any]:
        draws = np.random.default_rng(index)
        clouds = [draws.uniform(-3, 3, (count, 3)).astype(np.float32) for count in (24, 48, 48)]
        return {"pair_id": f"p{index}", "condition": {"scan": clouds[0]}, "chosen": clouds[1], "rejected": clouds[2]}


def opened(settings: LidarModelSettings) -> tuple[LidarAdapter, Model]:
    adapter = LidarAdapter(settings)
    return adapter, adapter.trainable(adapter.load())


def preference(settings: LidarModelSettings) -> DirectPreference:
    adapter, model = opened(settings)
    model.network.train()
    return DirectPreference(adapter, model, build(DPO(name="dpo")), Beta(2000.0), {"reference": FrozenCopy(model.network)})


@pytest.mark.parametrize("train", ["full", "lora"])
def test_an_untouched_policy_has_margin_zero_and_a_gradient(settings: LidarModelSettings, train: Any) -> None:
    made = preference(replace(settings, train=train))
    outcome = made.step(made.prepare(Pairs().rows([0, 1]), step=1), step=1)["policy"]
    assert outcome.statistics["margin"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(outcome.loss, torch.full((2,), float(np.log(2))), check_dtype=False)
    outcome.loss.sum().backward()
    trained = [weight for weight in made.networks["policy"].parameters() if weight.requires_grad]
    assert trained and max(float(weight.grad.abs().max()) for weight in trained if weight.grad is not None) > 0


def test_scores_are_the_errors_of_the_local_formulation(settings: LidarModelSettings) -> None:
    adapter, model = opened(settings)
    batch = adapter.prepare(model, Pairs().rows([0, 1]), step=1)
    draws = adapter.draws(model, batch, step=1)
    scores = adapter.score(model, batch, draws)
    assert scores.values.shape == (2, 2, 2) and scores.unit.elements == 48 * 3
    from polyalign.modalities.lidar.sparse import voxelise

    with torch.no_grad():
        condition = model.network.condition(model.parts["encoder"](voxelise(batch.tensors["scan"][1:], 0.3)[0]))  # type: ignore[operator]
        level, noise = draws.timesteps[1, 1], draws.noise[1, 1]
        noisy = batch.tensors["points"][1, 0] + float(noise_schedule().noise[level]) * noise
        voxels, inverse = voxelise(noisy.unsqueeze(0), 0.3)
        error = (model.network(voxels, condition, level.reshape(1))[inverse] - noise).pow(2).mean()
    torch.testing.assert_close(-scores.values[1, 0, 1], error, rtol=1e-4, atol=1e-5)


def test_steps_on_the_same_draws_raise_the_margin(settings: LidarModelSettings) -> None:
    made = preference(settings)
    optimizer = torch.optim.Adam([weight for weight in made.networks["policy"].parameters() if weight.requires_grad], lr=1e-4)
    margins = []
    for _ in range(6):
        outcome = made.step(made.prepare(Pairs().rows([0, 1]), step=3), step=3)["policy"]
        margins.append(float(outcome.statistics["margin"].mean()))
        optimizer.zero_grad()
        outcome.loss.sum().backward()
        optimizer.step()
    assert margins[0] == 0 and margins[-1] > margins[2] > 0


def test_samples_depend_on_their_scan_and_seed_alone(settings: LidarModelSettings) -> None:
    adapter, model = opened(settings)
    conditions = [row["condition"] for row in Pairs().rows([0, 1, 2])]
    together = adapter.sample(model, conditions, [5, 6, 7])
    alone = adapter.sample(model, conditions[1:2], [6])[0]
    assert together[0].shape == (48, 3) and together[0].dtype == np.float32
    np.testing.assert_allclose(together[1], alone, atol=1e-3)
    assert not np.allclose(alone, adapter.sample(model, conditions[1:2], [7])[0], atol=1e-2)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_what_is_exported_opens_as_a_base(settings: LidarModelSettings, tmp_path: Path, train: Any) -> None:
    adapter, model = opened(replace(settings, train=train))
    with torch.no_grad():
        for weight in model.network.parameters():
            if weight.requires_grad:
                weight += 0.01
    adapter.export(model, tmp_path / "out")
    again = LidarAdapter(replace(settings, base=str(tmp_path / "out" / "completion.safetensors")))
    condition = Pairs().rows([0])[0]["condition"]
    found = [one.sample(loaded, [condition], [1])[0] for one, loaded in ((adapter, model), (again, again.load()))]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_refused_input(settings: LidarModelSettings) -> None:
    adapter, model = opened(settings)

    def refused(match: str, **change: Any) -> None:
        rows = Pairs().rows([0, 1])
        rows[1] |= change
        with pytest.raises(UserError, match=match):
            adapter.prepare(model, rows, step=1)

    refused("'p1': condition.scan .* found none", condition={})
    refused("'p1': chosen has points that are NaN", chosen=np.full((48, 3), np.nan))
    refused("'p1': rejected has to be points", rejected=np.zeros((48, 2)))
    refused(r"as many points, found \[40, 48\]", chosen=np.zeros((40, 3)))
    refused("'p1': chosen is no table of numbers", chosen="points")
    with pytest.raises(UserError, match="rank is 0"):
        LidarModelSettings(rank=0)
