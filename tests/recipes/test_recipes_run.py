"""The published recipes run from pairs to report, in small: on a base with random weights, for two steps, with a picture
statistic in the place of judges that would be fetched. Format, objective, optimiser, reference and precision stay their own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyalign.core.cli import main
from polyalign.core.config import load
from polyalign.modalities.image.config import ImageRecipe

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "image")]

from image_runs import save_base  # noqa: E402  # pyright: ignore[reportMissingImports]
from recipe_data import PAIRS, provide  # noqa: E402  # pyright: ignore[reportMissingImports]

UNET = "unet/diffusion_pytorch_model.safetensors"
SMALLER = (
    "model.family=null",
    "model.device=cpu",
    "prepare.resolution=null",
    "sampler={scheduler: ddim, steps: 1, guidance: 1.0, batch_size: 4, vae_batch_size: 4}",
    "train.steps=2",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.schedule.warmup_steps=0",
    "train.threads=1",
    "evaluate.held_out=0.4",
    "evaluate.judges=[{name: saturation}]",
)
OWN = {"ai_feedback": ("pairs.judges=[{name: saturation}]",), "mapo": ("train.optimizer.name=adamw",)}
"""What else cannot be had here: PickScore's weights, and an optimiser that needs a GPU."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("stem", ["diffusion_dpo_sd15", "diffusion_dpo_sdxl", "sft_sd15", "ai_feedback", "mapo", "sdpo"])
def test_a_published_recipe_runs(stem: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, _ = load(f"image/{stem}", [], ImageRecipe)
    provide(recipe)
    assert main(["align", f"image/{stem}", *SMALLER, f"model.base={base}", *OWN.get(stem, ()), "--run", "run"]) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "pairs" / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(math.isfinite(line["loss"]) for line in lines)
    before, after = load_file(base / UNET), load_file(run / "adapter" / UNET)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((run / "evaluation.json").read_text())["items"]
    assert summary["pairs"] == PAIRS
    if recipe.pairs.source == "relabel":
        assert summary["disagreed"] == PAIRS / 3  # saturation prefers the red picture
        assert f"{PAIRS // 3} of {PAIRS} pairs turned round" in (run / "report.html").read_text()
    else:
        assert summary["ties_dropped"] == 1
    if stem.startswith("diffusion_dpo"):
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # a policy equal to its reference, in bf16 too
        assert lines[1]["loss"] != lines[0]["loss"]


LOOPS = {
    "kto": ("train.optimizer.name=adamw", "train.micro_batch_size=4"),
    "online": (
        "model.text_tokens=null",
        "pairs.judges=[{name: saturation}]",
        "online={rounds: 2, prompts_per_round: 3, samples_per_prompt: 3, mode: best_worst}",
    ),
}


@pytest.mark.parametrize("stem", LOOPS)
def test_a_recipe_without_pairs_runs(stem: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels in the place of pairs, and rounds that make their own."""
    monkeypatch.chdir(tmp_path)
    recipe, _ = load(f"image/{stem}", [], ImageRecipe)
    provide(recipe)
    assert main(["align", f"image/{stem}", *SMALLER, f"model.base={base}", *LOOPS[stem], "--run", "run"]) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(math.isfinite(line["loss"]) for line in lines)
    assert json.loads((run / "evaluation.json").read_text())["items"]
    if stem == "kto":
        summary = json.loads((run / "pairs" / "summary.json").read_text())
        assert (summary["desirable"], summary["undesirable"]) == (PAIRS, PAIRS)
        assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)  # a policy equal to its reference
    else:
        assert [path.name for path in sorted((run / "rounds").iterdir())] == ["001", "002"]
