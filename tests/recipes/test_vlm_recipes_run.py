"""The vision-language recipes run from data to report, in small: on a LLaVA with random weights, for two steps, with rules in
the place of judges that are models. Data, objective, losing pictures, reference and optimiser stay their own."""

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
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.vlm.config import VlmRecipe

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "vlm")]

from recipe_data import PAIRS, provide  # noqa: E402  # pyright: ignore[reportMissingImports]
from tiny_vlms import save_model  # noqa: E402  # pyright: ignore[reportMissingImports]

RULES = "{name: text_rules, options: {rules: [{rule: length, most: 6, unit: characters}]}}"
SMALLER = (
    "model.device=cpu",
    "model.dtype=float32",
    "model.lora={rank: 2}",
    "prepare.max_length=null",
    "sampler={max_new_tokens: 8, temperature: 1.0, batch_size: 8}",
    "train.steps=2",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "train.schedule.warmup_steps=0",
    "train.mixed_precision='no'",
    "train.gradient_checkpointing=false",
    "train.threads=1",
    "evaluate.held_out=0.3",
    f"evaluate.judges=[{RULES}]",
)
OWN = {
    "mia_dpo": (
        "prepare.picture_options.size={height: 28, width: 28}",
        "pairs.multi_image.layer=null",
        "pairs.multi_image.rejected={temperature: 0.0, max_new_tokens: 8}",
        "pairs.multi_image.filter={attention: not_first, perplexity: null, edit_distance: null, length_ratio: null}",
        "pairs.multi_image.balance=true",
    ),
    "mcm_dpo": (),
    "mdpo": (),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_model("llava", tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("stem", ["mia_dpo", "mcm_dpo", "mdpo"])
def test_a_vlm_recipe_runs(stem: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, _ = load(f"vlm/{stem}", [], VlmRecipe)
    provide(recipe)
    assert main(["align", f"vlm/{stem}", f"model.base={base}", *SMALLER, *OWN[stem]]) == 0
    run = Path(recipe.run.replace("{seed}", str(recipe.seed)))
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [1, 2] and all(math.isfinite(line["loss"]) for line in found)
    assert found[0]["rewards/margins"] == 0.0
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(bool(weight.abs().max() > 0) for name, weight in weights.items() if "lora_B" in name)
    assert not any("vision" in name or "projector" in name for name in weights), "the language model alone is trained"
    row = PairStore(run / "pairs").rows([0])[0]
    losing = recipe.pairs.negatives is not None
    assert ("rejected_images" in row) == losing and len(PairStore(run / "pairs")) <= PAIRS
    assert json.loads((run / "evaluation.json").read_text())["items"] and (run / "report.html").is_file()
