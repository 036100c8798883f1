"""COFS-DPO from the command line: the adapters of finished runs, combined on a memory of their pairs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polyalign.modalities.text.combine import main

sys.path.insert(0, str(Path(__file__).resolve().parent))

from text_runs import LORA, of_rows, polyalign, preferences, read, write_recipe  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(tiny_texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on one base: likes and dislikes turned round in the second."""
    root, made = tmp_path_factory.mktemp("domains"), []
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in preferences(12)]
    for name, rows, objective in (("first", preferences(12), "ofs_dpo"), ("second.run", turned, "dpo")):
        config = write_recipe(root / name, of_rows(tiny_texts["llama"], root / name, rows, objective={"name": objective}))
        for verb in ("generate", "train"):
            assert polyalign(verb, config, root / "runs" / name) == 0
        made.append(root / "runs" / name)
    return made


def test_two_runs_become_one_adapter(
    runs: list[Path], tiny_texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "both"), *map(str, runs), "--pairs", "6"]) == 0
    found = read(tmp_path / "both" / "combination.json")
    assert sum(found["coefficients"].values()) == pytest.approx(1.0) and found["rank"] == 4
    mean = {name: sum(losses.values()) / 2 for name, losses in found["loss"].items()}
    assert mean["combined"] <= min(mean["first"], mean["second.run"]) + 1e-6, "none alone is better on the memory"
    assert "coefficient" in capsys.readouterr().out
    one = load_file(tmp_path / "both" / LORA)
    assert set(one) == set(load_file(runs[0] / LORA)), "an ordinary adapter"
    following = of_rows(
        tiny_texts["llama"],
        tmp_path / "third",
        preferences(12),
        model={"base": str(tiny_texts["llama"]), "lora": {"start": str(tmp_path / "both" / "adapter")}},
    )
    following["train"] = {**following["train"], "reference": {"seat": "frozen"}}
    config = write_recipe(tmp_path / "third", following)
    for verb in ("generate", "train"):
        assert polyalign(verb, config, tmp_path / "third" / "run") == 0


def test_a_rank_is_cut_and_its_loss_told(runs: list[Path], tmp_path: Path) -> None:
    arguments = [str(tmp_path / "cut"), *map(str, runs), "--pairs", "4", "--rank", "1", "--space", "coordinates"]
    assert main(arguments) == 0
    found = read(tmp_path / "cut" / "combination.json")
    assert found["rank"] == 1 and 0.0 <= found["lost_by_rank"] < 1.0


def test_what_cannot_be_combined_is_refused(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "one"), str(runs[0])]) == 2
    assert "two or more runs" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), str(runs[0]), str(tmp_path)]) == 2
    assert "is no finished run with a LoRA" in capsys.readouterr().err
    (tmp_path / "there" / "adapter").mkdir(parents=True)
    assert main([str(tmp_path / "there"), *map(str, runs)]) == 2
    assert "exists already" in capsys.readouterr().err
