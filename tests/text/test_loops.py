"""What a recipe says beyond pairs and one objective, run whole on a Llama in small: rounds, two adapters, a guide, margins."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polyalign.datasets.pairs import PairStore

sys.path.insert(0, str(Path(__file__).resolve().parent))

from text_runs import (  # noqa: E402
    JUDGE,
    LORA,
    digest,
    of_rows,
    polyalign,
    preferences,
    prompts_file,
    read,
    recipe,
    write_recipe,
)

torch.set_num_threads(1)

NATS = {"value": 1.0, "convention": "nats"}
ONLINE = {"rounds": 2, "prompts_per_round": 4, "mode": "first_second"}
SHORT = {"name": "text_rules", "options": {"rules": [{"rule": "length", "most": 8, "unit": "characters"}]}, "weight": 0.5}


@pytest.fixture(scope="module")
def base(tiny_texts: dict[str, Path]) -> Path:
    return tiny_texts["llama"]


@pytest.fixture(scope="module")
def guide(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with objective dpo on preferences, without a report."""
    root = tmp_path_factory.mktemp("guide")
    config = write_recipe(root, of_rows(base, root, preferences(20)))
    assert polyalign("align", config, root / "run") == 0
    return root / "run"


def online(base: Path, folder: Path, section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe of two rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    content = recipe(base, folder, online={**ONLINE, **section}, **changes)
    content["pairs"] = {"prompts": {"file": str(prompts_file(folder, "train", 6))}, "judges": [JUDGE]}
    content["train"] = {**content["train"], "steps": 4}
    return content


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_moved(run: Path, lora: str = LORA) -> bool:
    return any(bool(tensor.abs().max() > 0) for name, tensor in load_file(run / lora).items() if "lora_B" in name)


def refused(capsys: pytest.CaptureFixture[str], config: Path, run: Path, *overrides: str) -> str:
    capsys.readouterr()
    assert polyalign("align", config, run, *overrides) == 2
    return capsys.readouterr().err


# --- rounds -------------------------------------------------------------------------------------------------------------------

ROUNDS = {
    "online dpo": ({}, {"objective": {"name": "online_dpo"}}),
    "ipo-md": (
        {"targets": "soft", "ties": "half", "mixture": 0.25},
        {"objective": {"name": "online_ipo", "tau": 0.1, "beta": NATS}},
    ),
    "iterated dpo": ({"mode": "best_worst", "samples_per_prompt": 4, "reference": "refreshed", "optimizer": "reset"}, {}),
    "listwise adpo": (
        {"mode": "best_rest", "samples_per_prompt": 3, "lists": True, "targets": "soft", "scale": 0.5},
        {"objective": {"name": "adpo", "beta": NATS}},
    ),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_rounds_are_a_matter_of_the_recipe(case: str, base: Path, tmp_path: Path) -> None:
    section, changes = ROUNDS[case]
    config, run = write_recipe(tmp_path, online(base, tmp_path, section, **changes)), tmp_path / "run"
    assert polyalign("align", config, run) == 0
    assert len((run / "prompts.jsonl").read_text().splitlines()) == 6 and not (run / "pairs").exists()
    rounds = [read(run / "rounds" / f"{number:03d}" / "round.json") for number in (1, 2)]
    assert [one["after_steps"] for one in rounds] == [0, 2] and weights_moved(run)
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4]
    items = read(run / "evaluation.json")["items"]
    assert len(items) == 5 and (run / "report.html").is_file()
    card = (run / "adapter" / "README.md").read_text()
    assert "| rounds | 2 |" in card and f"| samples_judged | {rounds[1]['samples_so_far']} |" in card
    first, second = (PairStore(run / "rounds" / f"{number:03d}" / "pairs").rows([0])[0] for number in (1, 2))
    assert first["provenance"]["model"] != second["provenance"]["model"]
    assert ("mixture" in first["provenance"]["sampler"]) == (case == "ipo-md")
    before = digest(run / LORA)
    assert polyalign("align", config, run) == 0 and digest(run / LORA) == before


def test_a_round_begins_at_its_reference(base: Path, tmp_path: Path) -> None:
    """A refreshed reference is the policy at the beginning of the second round; a kept one is not."""
    for name, reference in (("refreshed", "refreshed"), ("kept", "kept")):
        config = write_recipe(tmp_path / name, online(base, tmp_path / name, {"reference": reference}))
        assert polyalign("generate", config, tmp_path / name / "run") == 0
        assert polyalign("train", config, tmp_path / name / "run") == 0
    first, third = ({name: metrics_of(tmp_path / name / "run")[step] for name in ("refreshed", "kept")} for step in (0, 2))
    assert first["refreshed"]["loss"] == first["kept"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert third["refreshed"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(third["kept"]["rewards/margins"]) > 1e-6


def test_prompts_kept_aside_are_not_asked_in_rounds(base: Path, tmp_path: Path) -> None:
    content = online(base, tmp_path, {"prompts_per_round": 8}, evaluate={"held_out": 0.4, "judges": [JUDGE]})
    content["pairs"]["prompts"] = {"file": str(prompts_file(tmp_path, "more", 12))}
    config, run = write_recipe(tmp_path, content), tmp_path / "run"
    assert polyalign("align", config, run) == 0
    asked = {one["prompt"] for number in (1, 2) for one in PairStore(run / "rounds" / f"{number:03d}" / "pairs").conditions()}
    kept = {item["prompt"] for item in read(run / "evaluation.json")["items"]}
    assert kept and asked and asked.isdisjoint(kept)
    assert "implicit_reward" not in read(run / "evaluation.json"), "no pairs were kept aside"


def test_an_arm_has_rounds_of_its_own(base: Path, tmp_path: Path) -> None:
    arms = {"ipo": {"name": "online_ipo", "tau": 0.1, "beta": NATS}}
    config = write_recipe(tmp_path, online(base, tmp_path, {}, objective={"name": "online_dpo"}, arms=arms))
    assert polyalign("align", config, tmp_path / "run") == 0
    assert (tmp_path / "run" / "arms" / "ipo" / "rounds" / "002" / "round.json").is_file()
    assert weights_moved(tmp_path / "run", f"arms/ipo/{LORA}")
    first = [digest(tmp_path / "run" / place / "rounds/001/pairs/pairs-00000.parquet") for place in ("", "arms/ipo")]
    assert first[0] == first[1], "both began with the same policy"


# --- two adapters, a guide, margins, mismatched answers -----------------------------------------------------------------------


def test_fast_and_slow(base: Path, tmp_path: Path) -> None:
    section = {"fast_slow": {"interval": 2, "learning_rate_ratio": 0.5}}
    config = write_recipe(tmp_path, of_rows(base, tmp_path, preferences(20), objective={"name": "ofs_dpo"}, **section))
    run = tmp_path / "run"
    assert polyalign("align", config, run) == 0
    line = metrics_of(run)[-1]
    assert line["slow/learning_rate"] == pytest.approx(0.5 * line["fast/learning_rate"]) and "exchanges" in line
    assert weights_moved(run) and (run / "report.html").is_file()
    assert not any("slow" in name for name in load_file(run / LORA)), "the fast one is what is exported"


def test_fast_and_slow_has_defaults(base: Path, tmp_path: Path) -> None:
    config = write_recipe(tmp_path, of_rows(base, tmp_path, preferences(20), objective={"name": "ofs_dpo", "clamp": 10.0}))
    for verb in ("generate", "train"):
        assert polyalign(verb, config, tmp_path / "run") == 0
    assert metrics_of(tmp_path / "run")[0]["slow/learning_rate"] == pytest.approx(2e-3)


def test_a_guide(base: Path, guide: Path, tmp_path: Path) -> None:
    section = {"guide": {"folder": str(guide / "adapter")}}
    config = write_recipe(tmp_path, of_rows(base, tmp_path, preferences(20), objective={"name": "tgdpo"}, **section))
    run = tmp_path / "run"
    assert polyalign("align", config, run) == 0
    assert weights_moved(run) and set(load_file(run / LORA)) == set(load_file(guide / LORA))
    plain = write_recipe(tmp_path / "plain", of_rows(base, tmp_path / "plain", preferences(20)))
    for verb in ("generate", "train"):
        assert polyalign(verb, plain, tmp_path / "plain" / "run") == 0
    assert digest(run / LORA) != digest(tmp_path / "plain" / "run" / LORA), "the guide has a say"


def test_margins_are_judged_once_for_all_arms(base: Path, tmp_path: Path) -> None:
    content = of_rows(base, tmp_path, preferences(20), objective={"name": "modpo"}, margins={"judges": [SHORT]})
    config, run = write_recipe(tmp_path, {**content, "arms": {"half": {"name": "modpo", "weight": 0.25}}}), tmp_path / "run"
    assert polyalign("align", config, run) == 0
    assert len(list((run / "cache" / "margins").iterdir())) == 1
    assert weights_moved(run) and digest(run / LORA) != digest(run / "arms" / "half" / LORA)
    assert polyalign("align", config, tmp_path / "other", "arms={}", "margins.judges.0.weight=5") == 0
    assert digest(run / LORA) != digest(tmp_path / "other" / LORA), "the weight has a say"


def test_kto_with_mismatched_answers(base: Path, tmp_path: Path) -> None:
    objective = {"name": "kto", "baseline": "mismatched"}
    config = write_recipe(tmp_path, of_rows(base, tmp_path, preferences(20), objective=objective))
    for verb in ("generate", "train"):
        assert polyalign(verb, config, tmp_path / "run") == 0
    assert weights_moved(tmp_path / "run")


# --- refused early ------------------------------------------------------------------------------------------------------------

REFUSED = {
    "no guide": (("objective={name: tgdpo}",), "guide: {folder: runs/dpo/adapter}"),
    "a guide that nobody uses": (("guide={folder: x}",), "guide: no objective of this recipe uses it; tgdpo does"),
    "a guide that is not there": (("objective={name: tgdpo}", "guide={folder: nowhere}"), "nowhere: no such file or folder"),
    "no margins": (("objective={name: modpo}",), "margins: {judges: [{name: JUDGE, weight: 0.5}]}"),
    "margins of no judge": (("objective={name: modpo}", "margins={judges: [{name: nobody}]}"), "there is no judge 'nobody'"),
    "two adapters that nobody trains": (
        ("fast_slow={interval: 5}",),
        "fast_slow: no objective of this recipe uses it; ofs_dpo",
    ),
    "two adapters without a LoRA": (
        ("objective={name: ofs_dpo}", "model.train=full", "train.reference.seat=frozen"),
        "ofs_dpo has a second adapter on the network, and model.train is full",
    ),
    "mismatched alone in a batch": (
        ("objective={name: kto, baseline: mismatched}", "train.batch_size=1", "train.micro_batch_size=1"),
        "needs two prompts in a batch",
    ),
    "mismatched without a reference": (
        ("objective={name: kto, baseline: mismatched}", "train.reference.seat=none"),
        "train.reference.seat: none cannot",
    ),
    "rounds that are not equal": (("online={rounds: 2}",), "train.steps are all steps of the training, in 2 equal rounds"),
    "rounds and a cache": (("online={rounds: 3}", "train.reference.seat=cached"), "every round has new"),
    "rounds and margins": (
        ("online={rounds: 3}", "objective={name: modpo}", "margins={judges: [{name: rouge_l}]}"),
        "Leave one out",
    ),
    "rounds and a filter": (("online={rounds: 3}", "pairs.filter={ches: {keep: 0.5}}"), "Leave one out"),
    "lists for pairs": (("online={rounds: 3, lists: true, mode: best_rest}",), "objective: dpo cannot. Take adpo"),
    "a mixture without a LoRA": (
        ("online={rounds: 3, mixture: 0.2}", "model.train=full", "train.reference.seat=frozen"),
        "samples from the policy and from the base under its LoRA",
    ),
    "an adapter that is not there": (("model.lora.start=nowhere", "train.reference.seat=frozen"), "nowhere: no such file"),
    "rewards without pairs": (("evaluate.rewards={judges: [{name: rouge_l}], splits: {prompt shift: .}}",), "in distribution"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, words = REFUSED[case]
    config = write_recipe(tmp_path, recipe(base, tmp_path))
    assert words in refused(capsys, config, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "pairs").exists()


def test_rounds_read_no_pairs(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_recipe(tmp_path, of_rows(base, tmp_path, preferences(4), online={"rounds": 3}))
    assert "online: every round samples answers to pairs.prompts, and pairs.source is jsonl" in refused(
        capsys, config, tmp_path / "run"
    )
