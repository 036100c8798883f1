import json

import pytest

from polyalign.evaluation.report.collect import collect
from polyalign.evaluation.report.readings import cautions, displacement
from polyalign.evaluation.report.verdict import THRESHOLDS, decide, p_value


def edit(run, **changes):
    """Change top-level keys of evaluation.json."""
    path = run / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_metrics(run, change):
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rate(wins, losses, ties=0):
    from polyalign.evaluation.statistics import paired_win_rate

    base, aligned = [0.0] * wins + [1.0] * losses + [0.0] * ties, [1.0] * wins + [0.0] * (losses + ties)
    return paired_win_rate(base, aligned, seed=0).as_json()


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("improved", "better than the base"),
        ("no change", "no difference beyond chance"),
        ("over-optimised", "statistics ran away"),
        ("diverged", "training ran away"),
    ],
)
def test_four_synthetic_runs_get_the_verdict_they_were_made_for(make_run, kind, rule):
    verdict = decide(collect(make_run(kind)))
    assert verdict.state == kind
    assert verdict.rule.name == rule


def test_not_a_number_comes_before_everything(make_run):
    run = make_run("improved")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 241, "loss": NaN}\n')
    verdict = decide(collect(run))
    assert (verdict.state, verdict.rule.name) == ("diverged", "not a number")
    assert "loss at step 241" in verdict.rule.found


def test_the_judge_outranks_the_curves(make_run):
    run = make_run("improved")
    edit_metrics(run, lambda row: row.update({"error/policy_chosen": 3 * row["error/reference_chosen"]}))
    verdict = decide(collect(run))
    assert verdict.state == "improved"
    runaway = next(rule for rule in verdict.rules if rule.name == "training ran away")
    assert runaway.fired is False and "the judge finds the outputs better" in runaway.found


def test_worse_is_over_optimised_or_diverged_by_what_training_learnt(make_run):
    run = make_run("improved")
    edit(run, win_rate=rate(10, 40, 190))
    verdict = decide(collect(run))
    assert (verdict.state, verdict.rule.name) == ("over-optimised", "learnt, yet worse")
    edit_metrics(run, lambda row: row.update({"rewards/accuracies": 0.5}))
    verdict = decide(collect(run))
    assert (verdict.state, verdict.rule.name) == ("diverged", "worse, and nothing learnt")


def test_a_second_judge_can_spoil_the_verdict_and_a_statistic_as_judge_cannot(make_run):
    run = make_run("improved")
    edit(run, other_judges={"saturation": rate(5, 60)})
    assert decide(collect(run)).state == "improved"
    edit(run, other_judges={"fidelity": rate(5, 60)})
    verdict = decide(collect(run))
    assert (verdict.state, verdict.rule.name) == ("over-optimised", "a second judge disagrees")


@pytest.mark.parametrize(
    "judge",
    [
        {"name": "-1 high_frequency", "version": "1", "parts": ["high_frequency"]},
        {"name": "-1 high_frequency", "version": "1"},  # written before `parts` was
        {"name": "clipping", "version": "1", "parts": ["clipping"]},
        {"name": "-1 saturation + -0.5 clipping", "version": "1+1", "parts": ["saturation", "clipping"]},
        {"name": "-1e-05 saturation + clipping", "version": "1+1"},
    ],
)
def test_a_statistic_that_fell_is_no_improvement(make_run, judge):
    run = make_run("improved")
    edit(run, judge=judge, win_rate=rate(200, 5))
    verdict = decide(collect(run))
    assert (verdict.state, verdict.rule.name) == ("not evaluated", "only statistics")
    assert "is no judge of quality" in verdict.sentence and "won" not in verdict.sentence
    by_name = {rule.name: rule for rule in verdict.rules}
    assert by_name["better than the base"].fired is None and by_name["learnt, yet worse"].fired is None


def test_a_statistic_that_rose_is_no_ground_to_call_the_outputs_worse(make_run):
    run = make_run("improved")
    edit(run, judge={"name": "-1 clipping", "version": "1", "parts": ["clipping"]}, win_rate=rate(5, 200))
    assert decide(collect(run)).state == "not evaluated"


def test_a_judge_with_a_statistic_beside_it_decides(make_run):
    run = make_run("improved")
    edit(run, judge={"name": "shapes + -0.1 clipping", "version": "1+1", "parts": ["shapes", "clipping"]})
    assert decide(collect(run)).state == "improved"
    edit(run, judge={"name": "shapes + -0.1 clipping", "version": "1+1"})
    assert decide(collect(run)).state == "improved"


def test_a_weighted_statistic_is_no_second_judge(make_run):
    run = make_run("improved")
    edit(run, other_judges={"-1 saturation": {**rate(5, 60), "parts": ["saturation"]}})
    assert decide(collect(run)).state == "improved"
    edit(run, other_judges={"-1 saturation": rate(5, 60)})
    assert decide(collect(run)).state == "improved"
    edit(run, other_judges={"0.5 fidelity": {**rate(5, 60), "parts": ["fidelity"]}})
    assert decide(collect(run)).rule.name == "a second judge disagrees"


def test_the_sentence_counts_wins_losses_and_ties(make_run):
    run = make_run("improved")
    edit(run, win_rate=rate(44, 1, 315))
    verdict = decide(collect(run))
    assert verdict.state == "improved" and verdict.sentence.endswith("Against the base: 44 won, 1 lost, 315 tied.")


def test_the_preference_part_of_the_loss_is_asked_where_it_is_logged(make_run):
    run = make_run("no change")
    edit_metrics(run, lambda row: row.update({"loss": 31.0, "loss/preference": 0.69 + 0.01 * row["step"]}))
    verdict = decide(collect(run))
    assert verdict.rule.name == "training ran away" and "loss/preference 0.8" in verdict.rule.found
    edit_metrics(run, lambda row: row.update({"loss/preference": 0.69}))
    assert decide(collect(run)).state == "no change"


def test_more_broken_outputs_are_over_optimisation(make_run):
    run = make_run("improved")
    items = json.loads((run / "evaluation.json").read_text())["items"]
    tied = [item for item in items if item["base_score"] == item["aligned_score"] == 0.0]
    for item in tied[:12]:  # exactly one in twenty of 240
        item["aligned_score"] = -1.0
    edit(run, items=items)
    verdict = decide(collect(run))
    assert (verdict.state, verdict.rule.name) == ("over-optimised", "more broken outputs")
    assert "0 of 240 before, 12 after" in verdict.rule.found
    tied[0]["aligned_score"] = 0.0
    edit(run, items=items)
    assert decide(collect(run)).state == "improved"


def test_few_wins_are_no_improvement(make_run):
    run = make_run("improved")
    edit(run, win_rate=rate(4, 0, 100))
    block = json.loads((run / "evaluation.json").read_text())["win_rate"]
    assert block["wilson"][0] > 0.5 and block["sign_test_p"] == 0.125
    assert decide(collect(run)).state == "no change"


def test_seeds_of_few_prompts_do_not_make_a_verdict(make_run):
    run = make_run("improved")
    edit(run, win_rate={**rate(40, 0), "prompts": 5})
    assert decide(collect(run)).state == "no change"
    edit(run, win_rate={**rate(40, 0), "prompts": 6})
    verdict = decide(collect(run))
    assert verdict.state == "improved"
    assert [rule.name for rule in verdict.rules if rule.fired] == ["better than the base"], "no other rule holds beside it"


def test_seeds_of_one_prompt_do_not_make_an_improvement(make_run):
    run = make_run("improved")
    edit(run, win_rate={**rate(40, 10), "bootstrap": [0.45, 0.95]})
    assert decide(collect(run)).state == "no change"


def test_without_evaluation_only_the_curves_can_speak(make_run):
    calm, wild = make_run("improved"), make_run("diverged")
    for run in (calm, wild):
        (run / "evaluation.json").unlink()
    assert decide(collect(calm)).state == "not evaluated"
    assert decide(collect(wild)).state == "diverged"


def test_every_verdict_shows_all_rules_with_their_numbers(make_run):
    verdict = decide(collect(make_run("improved")))
    assert len(verdict.rules) == 11 and all(rule.says and rule.found for rule in verdict.rules)
    assert f"p < {THRESHOLDS.significance:g}" in verdict.rule.says


@pytest.mark.parametrize(
    ("chosen", "rejected", "title"),
    [
        (0.95, 1.10, "the hoped-for picture"),
        (1.10, 1.20, "both errors rose: displacement"),
        (0.80, 0.90, "both errors fell"),
        (1.30, 1.20, "both errors rose, the chosen one more"),
        (0.95, 0.90, "both errors fell, the rejected one more"),
        (1.10, 0.90, "backwards"),
        (1.00, 1.00, "neither moved"),
    ],
)
def test_displacement_is_read_from_both_errors(make_run, chosen, rejected, title):
    run = make_run("no change")

    def change(row):
        row["error/policy_chosen"] = chosen * row["error/reference_chosen"]
        row["error/policy_rejected"] = rejected * row["error/reference_rejected"]

    edit_metrics(run, change)
    reading = displacement(collect(run).metrics)
    assert reading is not None and reading.title == title
    assert reading.chosen.mean == pytest.approx(100 * (chosen - 1))


def test_cautions_name_ties_few_prompts_and_an_arm_as_good(make_run):
    run = make_run("improved", count=60)
    edit(run, arms={"sft": {**rate(20, 5), "aligned_over_this": rate(10, 9)}}, win_rate=rate(15, 2, 43))
    said = " ".join(cautions(collect(run)))
    assert "Only 60 prompts" in said and "43 of 60 comparisons are ties" in said
    assert "The arm 'sft', trained for comparison, is not measurably behind" in said


def test_p_values_read_well():
    assert [p_value(p) for p in (1.0, 0.125, 0.04, 0.0012, 2e-13, 0.0)] == [
        "1.00",
        "0.12",
        "0.040",
        "0.001",
        "2e-13",
        "below 1e-300",
    ]
