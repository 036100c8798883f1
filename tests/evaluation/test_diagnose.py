"""``polyalign diagnose``: every rule on a run folder written down here, the verb, the file, the section of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyalign.core import cli
from polyalign.core.errors import UserError
from polyalign.evaluation.diagnose import Diagnosis, Finding, as_markup, as_text, diagnose, pair_facts, write_diagnosis
from polyalign.evaluation.diagnose.evidence import judge_weights, read_evidence
from polyalign.evaluation.statistics import paired_win_rate

STEPS = 60

Lines = Callable[[float], dict[str, Any]]


def sound(done: float) -> dict[str, Any]:
    """A line of metrics.jsonl of a sound training of a token model; ``done`` goes from 0 to 1."""
    return {
        "loss": 0.693 - 0.2 * done,
        "learning_rate": 1e-4,
        "gradient_norm": 1.0,
        "rewards/margins": 0.5 * done,
        "rewards/accuracies": 0.5 + 0.35 * done,
        "gradient_weight": 0.5 - 0.11 * done,
        "margins/size": 0.6 * done,
        "margins/ties": 0.0,
        "margins/satisfied": 0.0,
        "margins/reversed": 0.0,
        "logps_per_token/policy_chosen": -0.6 + 0.02 * done,
        "logps_per_token/policy_rejected": -1.0 - 0.5 * done,
        "logps_per_token/reference_chosen": -0.6,
        "logps_per_token/reference_rejected": -1.0,
        "tokens/chosen": 10.0,
        "tokens/rejected": 10.0,
        "beta": 0.1,
    }


def still(done: float) -> dict[str, Any]:
    """Nothing happens."""
    same = {"logps_per_token/policy_chosen": -0.6, "logps_per_token/policy_rejected": -1.0}
    none = {"loss": math.log(2), "rewards/margins": 0.0, "gradient_weight": 0.5, "margins/size": 0.0, "rewards/accuracies": 0.5}
    return {**sound(done), **none, **same}


def errors(done: float, **changes: float) -> dict[str, Any]:
    """The same training of a denoising model."""
    line = {name: value for name, value in sound(done).items() if not name.startswith(("logps", "tokens"))}
    sides = {"error/policy_chosen": 0.2 - 0.01 * done, "error/policy_rejected": 0.21 + 0.02 * done}
    return {**line, **sides, "error/reference_chosen": 0.2, "error/reference_rejected": 0.21, **changes}


def pair(place: int, **changes: Any) -> dict[str, Any]:
    row = {
        "pair_id": f"{place:06d}",
        "condition": {"prompt": f"prompt {place}"},
        "chosen": f"answer {place:03d} good",
        "rejected": f"answer {place:03d} poor",
        "chosen_scores": {"judge": 1.0},
        "rejected_scores": {"judge": 0.0},
        "provenance": {"chosen_seed": 2 * place, "rejected_seed": 2 * place + 1},
    }
    return {**row, **changes}


def evaluation(wins: int, losses: int) -> dict[str, Any]:
    base, aligned = [0.0] * wins + [1.0] * losses + [1.0] * 10, [1.0] * wins + [0.0] * losses + [1.0] * 10
    prompts = [str(place) for place in range(len(base))]
    rate = paired_win_rate(base, aligned, seed=0, prompts=prompts).as_json()
    judge = {"name": "judge", "version": "1"}
    return {"judge": judge, "prompts": len(base), "win_rate": rate, "scores": {}, "tasks": {}, "other_judges": {}, "items": []}


def run_folder(
    folder: Path,
    lines: Lines | None = sound,
    pairs: list[dict[str, Any]] | None = None,
    samples: list[dict[str, Any]] | None = None,
    judged: tuple[int, int] | None = None,
    config: str = "modality: text\n",
    steps: int = STEPS,
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config)
    if lines is not None:
        rows = [{"step": step, "epoch": step / 10, **lines((step - 1) / (steps - 1))} for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs").mkdir(exist_ok=True)
    pairs = [pair(place) for place in range(40)] if pairs is None else pairs
    if pairs:
        pq.write_table(pa.Table.from_pylist(pairs), folder / "pairs" / "pairs-00000.parquet")
    if samples:
        pq.write_table(pa.Table.from_pylist(samples), folder / "pairs" / "samples-00000.parquet")
    if judged is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation(*judged)))
    return folder


def finding(found: Diagnosis, cause: str) -> Finding:
    return next(one for one in found.asked if one.cause == cause)


def test_a_sound_run_is_improved_with_a_judge_and_nothing_found_without(tmp_path: Path) -> None:
    found = diagnose(run_folder(tmp_path))
    assert (found.state, found.cause) == ("nothing found", None)
    found = diagnose(run_folder(tmp_path, judged=(60, 20)))
    assert (found.state, found.cause) == ("improved", None) and "60 won, 20 lost" in found.evidence
    assert diagnose(run_folder(tmp_path, judged=(22, 20))).state == "no change"


def test_a_sound_denoising_run(tmp_path: Path) -> None:
    found = diagnose(run_folder(tmp_path, errors))
    assert (found.state, found.cause) == ("nothing found", None)


def test_missing_data_are_said_to_be_missing_and_nothing_is_guessed(tmp_path: Path) -> None:
    found = diagnose(run_folder(tmp_path, None, pairs=[]))
    assert found.state == "nothing found" and not found.findings
    assert all(one.holds is None for one in found.asked if one.cause != "not a number")
    shown = as_text(found)
    assert "not enough to say:" in shown and "no pairs were found in the run folder" in shown and "metrics.jsonl" in shown


def test_older_runs_without_the_newer_figures_are_read(tmp_path: Path) -> None:
    def older(done: float) -> dict[str, Any]:
        return {name: value for name, value in errors(done).items() if not name.startswith("margins/")}

    found = diagnose(run_folder(tmp_path, older, judged=(60, 20)))
    assert found.state == "improved" and finding(found, "beta too large").holds is None


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"gradient_norm": 0.0}, "frozen parameters"),
        ({"learning_rate": 1e-9}, "learning rate too small"),
        ({"logps_per_token/policy_rejected": -1.2, "rewards/accuracies": 0.9, "rewards/margins": 1e-4}, "beta too small"),
    ],
)
def test_no_signal_has_its_reason(tmp_path: Path, changes: dict[str, float], cause: str) -> None:
    found = diagnose(run_folder(tmp_path, lambda done: {**still(done), **changes}))
    assert (found.state, found.cause) == ("no signal", cause)
    assert len(found.findings) == 1 and found.findings[0].cure


def test_identical_pairs_explain_a_loss_that_stays(tmp_path: Path) -> None:
    alike = [pair(place, rejected=f" answer {place:03d}  good") for place in range(40)]
    found = diagnose(run_folder(tmp_path, still, alike))
    assert (found.state, found.cause) == ("no signal", "identical pairs")
    assert [one.cause for one in found.findings] == ["identical pairs"] and "40 of 40" in found.evidence


def pictured(place: int, right: bytes, losing: bytes | None) -> dict[str, Any]:
    cells = {"images": [{"bytes": right, "path": None}], "rejected_images": losing and [{"bytes": losing, "path": None}]}
    return pair(place, **cells)


def test_losing_pictures_that_are_the_right_ones(tmp_path: Path) -> None:
    mixed = [pictured(place, b"a", b"a" if place < 10 else b"b") for place in range(40)]
    found = diagnose(run_folder(tmp_path, pairs=mixed))
    assert (found.state, found.cause) == ("losing pictures without effect", "identical pictures")
    assert "in 10 of 40 pairs with losing pictures (25%) they are the right ones" in found.evidence and found.findings[0].cure
    few = [pictured(place, b"a", b"a" if place < 2 else b"b" if place < 20 else None) for place in range(40)]
    one = finding(diagnose(run_folder(tmp_path, pairs=few)), "identical pictures")
    assert one.holds is False and one.found.startswith("in 2 of 20 pairs")


def test_right_pictures_are_read_only_beside_losing_ones(tmp_path: Path) -> None:
    none = pa.array([None] * 40, pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})))
    rows = pa.Table.from_pylist([pictured(place, b"a", None) for place in range(40)]).drop_columns("rejected_images")
    folder = run_folder(tmp_path, pairs=[])
    pq.write_table(rows.append_column("rejected_images", none), folder / "pairs" / "pairs-00000.parquet")
    columns = pair_facts.COLUMNS
    assert all("images" not in row for row in pair_facts._rows([folder / "pairs" / "pairs-00000.parquet"], columns, []))
    assert "identical pictures" not in {one.cause for one in diagnose(folder).asked}


@pytest.mark.parametrize(("source", "asked_for"), [("generate", True), ("multi_image", False), ("rows", False), ("", True)])
def test_samples_are_missed_only_where_generate_makes_them(tmp_path: Path, source: str, asked_for: bool) -> None:
    config = f"modality: text\npairs: {{source: {source}}}\n" if source else "modality: text\n"
    found = diagnose(run_folder(tmp_path, config=config))
    assert any("samples-*.parquet" in line for line in found.missing) == asked_for


def test_labels_against_their_own_scores(tmp_path: Path) -> None:
    turned = [pair(place, chosen_scores={"judge": 0.0}, rejected_scores={"judge": 1.0}) for place in range(40)]
    assert diagnose(run_folder(tmp_path, pairs=turned)).cause == "flipped labels"
    found = diagnose(run_folder(tmp_path, pairs=[*turned[:8], *(pair(place) for place in range(8, 40))]))
    assert (found.state, found.cause) == ("noisy or flipped labels", "noisy labels") and "8 of 40 pairs (20%)" in found.evidence
    weighted = "modality: text\npairs:\n  judges: [{name: judge, weight: -1.0}]\n"
    assert diagnose(run_folder(tmp_path, pairs=turned, config=weighted)).cause is None


def test_labels_without_scores_are_not_judged(tmp_path: Path) -> None:
    unknown = [pair(place, chosen_scores={"judge": math.nan}, rejected_scores={"judge": math.nan}) for place in range(40)]
    assert finding(diagnose(run_folder(tmp_path, pairs=unknown)), "flipped labels").holds is None


def failing(count: int = 30) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs of a truth from elsewhere against the base's own failure, among as many prompts that the base gets right."""
    pairs = [pair(place, provenance={"chosen_seed": None, "rejected_seed": place}) for place in range(count)]
    samples = [
        {"prompt_index": place, "prompt": f"prompt {place}", "seed": place, "score": float(place >= count)}
        for place in range(2 * count)
    ]
    return pairs, samples


def test_pairs_from_failures_only_need_the_samples_to_be_seen(tmp_path: Path) -> None:
    pairs, samples = failing()
    found = diagnose(run_folder(tmp_path, pairs=pairs, samples=samples, judged=(20, 60)))
    assert (found.state, found.cause) == ("pairs drawn only from failures", "pairs from failures only")
    assert "on 0% of 30 pairs' prompts, and on 50% of all 60 prompts" in found.evidence and "20 won, 60 lost" in found.evidence
    (tmp_path / "pairs" / "samples-00000.parquet").unlink()
    assert finding(diagnose(tmp_path), "pairs from failures only").holds is None


def test_pairs_that_also_come_from_what_the_base_can_do_are_no_failures_only(tmp_path: Path) -> None:
    pairs, samples = failing()
    balanced = [*pairs, *(pair(place, provenance={"chosen_seed": None, "rejected_seed": place}) for place in range(30, 60))]
    assert finding(diagnose(run_folder(tmp_path, pairs=balanced, samples=samples)), "pairs from failures only").holds is False
    own = [pair(place) for place in range(30)]
    assert finding(diagnose(run_folder(tmp_path, pairs=own, samples=samples)), "pairs from failures only").holds is False


def drawn(folder: Path, **changes: Any) -> Path:
    """What made the pairs says how it drew them: from 400 questions of which the base got 330 right."""
    words = {"pairs": 40, "distance": 0.33, "by_chance": 0.08, "most": [["no", 0.37, 0.09], ["is", 0.04, 0.12]]}
    block = {"questions": 400, "right": 330, "pairs": 40, "pairs_of_right": 0, "words": words, **changes}
    (folder / "pairs" / "summary.json").write_text(json.dumps({"prompts": 400, "pairs": 40, "selection": block}))
    return folder


def test_pairs_from_failures_only_are_known_by_the_makers_count(tmp_path: Path) -> None:
    found = diagnose(drawn(run_folder(tmp_path, judged=(20, 60))))
    assert (found.state, found.cause) == ("pairs drawn only from failures", "pairs from failures only")
    assert "0% of the 40 pairs are of questions that the base got right, and it got 82% of all 400 right" in found.evidence
    assert "'no' in 37% in the place of 9%" in found.evidence and "20 won, 60 lost" in found.evidence
    assert "the margin ends at 0.4" in found.evidence and "balance: true" in found.findings[0].cure
    assert [one.cause for one in found.findings][:2] == ["pairs from failures only", "selected answers"]
    assert diagnose(drawn(tmp_path, right=40)).cause == "selected answers", "a base that masters nothing loses nothing"
    assert diagnose(run_folder(drawn(tmp_path), judged=(60, 20))).state == "improved"


def test_answers_that_are_far_from_the_datas_are_a_selection(tmp_path: Path) -> None:
    found = diagnose(drawn(run_folder(tmp_path), pairs_of_right=10))
    assert (found.state, found.cause) == ("selection bias", "selected answers")
    near = {"pairs": 40, "distance": 0.21, "by_chance": 0.12, "most": [["no", 0.3, 0.2]]}
    for words in (near, {**near, "distance": 0.06, "by_chance": 0.01}):
        asked = diagnose(drawn(tmp_path, pairs_of_right=10, words=words))
        assert asked.cause is None and finding(asked, "selected answers").holds is False
    assert finding(diagnose(drawn(tmp_path, words=None)), "selected answers").holds is None


@pytest.mark.parametrize("wrong", [{"questions": 0}, {"pairs_of_right": "many"}, {"words": 3}])
def test_a_selection_of_another_shape_is_missing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    found = diagnose(drawn(run_folder(tmp_path), **wrong))
    assert finding(found, "selected answers").holds is None and any("selection is not how" in line for line in found.missing)
    few = diagnose(drawn(tmp_path, pairs=19))
    assert finding(few, "selected answers").holds is None and finding(few, "pairs from failures only").holds is False


def test_rejected_sides_out_of_the_bases_reach_unless_it_wrote_them(tmp_path: Path) -> None:
    def far(done: float) -> dict[str, Any]:
        return {**sound(done), "logps_per_token/reference_rejected": -4.0, "logps_per_token/policy_rejected": -4.0 - 0.5 * done}

    foreign = [pair(place, provenance={"chosen_seed": place, "rejected_seed": None}) for place in range(40)]
    assert diagnose(run_folder(tmp_path, far, foreign)).cause == "off-policy rejected answers"
    assert diagnose(run_folder(tmp_path, far)).cause is None
    stripes = {"error/reference_rejected": 0.9, "error/policy_rejected": 0.95}
    assert diagnose(run_folder(tmp_path, lambda done: errors(done, **stripes), foreign)).state == "off-policy rejected answers"


def test_length_that_decides(tmp_path: Path) -> None:
    longer = [pair(place, chosen="many words " * (1 + place % 3), rejected="few") for place in range(40)]
    found = diagnose(run_folder(tmp_path, pairs=longer))
    assert (found.state, found.cause) == ("length or size bias", "length bias") and "larger one in 100%" in found.evidence
    mixed = [*longer[:26], *(pair(place, chosen="few", rejected="many words") for place in range(26, 40))]
    assert diagnose(run_folder(tmp_path, pairs=mixed)).cause is None


def test_steps_that_are_too_large_and_a_beta_that_is(tmp_path: Path) -> None:
    def fast(done: float) -> dict[str, Any]:
        return {**sound(done), "logps_per_token/policy_rejected": -1.0 - 12 * done, "margins/reversed": 0.3}

    found = diagnose(run_folder(tmp_path, fast))
    assert (found.state, found.cause) == ("diverged", "learning rate too high")
    assert finding(found, "beta too large").holds is False  # the steps explain it
    noisy = diagnose(run_folder(tmp_path, lambda done: errors(done, **{"margins/reversed": 0.3 * (1 - done)})))
    assert (noisy.state, noisy.cause) == ("beta too large", "beta too large")
    held = {"margins/satisfied": 0.9, "rewards/margins": 60.0}
    found = diagnose(run_folder(tmp_path, lambda done: {**sound(done), **held}))
    assert found.cause == "beta too large" and "a pair is satisfied after 0.3" in found.evidence


def test_collapse_of_the_chosen_side_without_haste(tmp_path: Path) -> None:
    found = diagnose(run_folder(tmp_path, lambda done: {**sound(done), "logps_per_token/policy_chosen": -0.6 - 1.5 * done}))
    assert (found.state, found.cause) == ("diverged", "policy collapsed")
    assert diagnose(run_folder(tmp_path, lambda done: errors(done, **{"error/policy_chosen": 0.5}))).state == "diverged"


def test_displacement_is_said_when_both_go_down_and_is_only_a_caution_where_outputs_are_better(tmp_path: Path) -> None:
    def down(done: float) -> dict[str, Any]:
        return {**sound(done), "logps_per_token/policy_chosen": -0.6 - 0.3 * done}

    found = diagnose(run_folder(tmp_path, down))
    assert (found.state, found.cause) == ("displacement", "likelihood displacement")
    found = diagnose(run_folder(tmp_path, down, judged=(60, 20)))
    assert (found.state, found.cause) == ("improved", "likelihood displacement")
    assert "improved, with a caution: likelihood displacement" in as_text(found)


def test_labels_that_contradict_one_another(tmp_path: Path) -> None:
    found = diagnose(run_folder(tmp_path, lambda done: {**sound(done), "rewards/accuracies": 0.51}))
    assert (found.state, found.cause) == ("noisy or flipped labels", "noisy labels")
    folder = run_folder(tmp_path, lambda done: {**sound(done), "rewards/accuracies": 0.95}, judged=(22, 20))
    content = json.loads((folder / "evaluation.json").read_text())
    held_out = {"accuracy": 0.52, "interval": [0.44, 0.6]}
    (folder / "evaluation.json").write_text(json.dumps({**content, "implicit_reward": held_out}))
    assert diagnose(folder).cause == "noisy labels"


def test_worse_outputs_and_figures_that_are_no_numbers(tmp_path: Path) -> None:
    found = diagnose(run_folder(tmp_path, judged=(20, 60)))
    assert (found.state, found.cause) == ("over-optimised", "learnt, yet worse")
    found = diagnose(run_folder(tmp_path, lambda done: {**sound(done), "loss": math.nan if done == 1 else 0.6}))
    assert (found.state, found.cause) == ("diverged", "not a number") and "loss at step 60" in found.evidence
    run_folder(tmp_path)
    (tmp_path / "refused.json").write_text("{}")
    assert diagnose(tmp_path).cause == "not a number"


def test_top_k_entropy_that_turns_down(tmp_path: Path) -> None:
    def turning(done: float) -> dict[str, Any]:
        entropy = 1 + min(done, 0.4) - 0.5 * max(0.0, done - 0.4)
        sides = {f"top_k/{name}_{side}": value for side in ("chosen", "rejected") for name, value in (("entropy", entropy),)}
        return {**sound(done), **sides, "top_k/mass_chosen": 0.9, "top_k/mass_rejected": 0.9}

    found = diagnose(run_folder(tmp_path, turning, steps=600))
    assert (found.state, found.cause) == ("over-optimised", "top-k entropy turned down")
    assert finding(diagnose(run_folder(tmp_path)), "top-k entropy turned down").holds is None


def test_the_verb_writes_the_file_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run", pairs=[pair(place, rejected=f"answer {place:03d} good") for place in range(40)])
    assert cli.main(["diagnose", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "no signal: identical pairs" in printed and "cure:" in printed and "rule:" in printed
    assert max(len(line) for line in printed.splitlines()) <= 100
    assert cli.main(["diagnose", str(folder), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((folder / "diagnosis.json").read_text())
    assert content["verdict"] == "no signal" and content["cause"] == "identical pairs" and content["thresholds"]
    assert {"cause", "state", "holds", "rule", "found", "cure"} == set(content["findings"][0])


def test_no_run_is_an_error_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diagnose", str(tmp_path / "none")]) == 2
    assert "there is no run folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds nothing of a run"):
        diagnose(tmp_path)


def test_damaged_files_are_named_and_do_not_end_it(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / "pairs" / "pairs-00001.parquet").write_bytes(b"no parquet")
    (folder / "evaluation.json").write_text("{")
    found = write_diagnosis(folder)
    assert any("pairs-00001.parquet: unreadable" in line for line in found.missing)
    assert any("evaluation.json" in line for line in found.missing)


def test_the_section_of_the_report_escapes_what_others_wrote(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    found = diagnose(run_folder(tmp_path / "run", lambda done: {**sound(done), "<script>x": math.nan}))
    section = as_markup(found)
    assert found.cause == "not a number" and "&lt;script&gt;x" in section and "<script>" not in section
    assert section.count("<li") == 1 + len(found.asked)
    assert "Nothing" in as_markup(diagnose(run_folder(tmp_path / "run2")))


@pytest.mark.parametrize("weight", ["null", "much", "[]", "{}"])
def test_a_weight_that_is_no_number_counts_as_none_given(tmp_path: Path, weight: str) -> None:
    folder = run_folder(tmp_path)
    (folder / "config.yaml").write_text(f"pairs: {{judges: [{{name: clinical, weight: {weight}}}]}}\n")
    assert judge_weights(read_evidence(folder).report.config) == {}
