"""The report of a run whose outputs are texts: answers side by side, log-probabilities in place of errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polyalign.core.files import atomic_write
from polyalign.datasets.pairs import PairStore
from polyalign.evaluation.paired import evaluate_paired
from polyalign.evaluation.report import write_report
from polyalign.evaluation.report.answers import LONGEST, are_texts, block, marked
from polyalign.evaluation.report.collect import collect
from polyalign.evaluation.report.readings import cautions, displacement, moved
from polyalign.evaluation.report.training import data_card
from polyalign.evaluation.report.verdict import OF_PICTURES, ask

COUNT = 30
EVIL = "<script>alert(1)</script>"


class Figures:
    """Counts the digits of an answer."""

    name, version = "figures", "1"

    def score(self, conditions: Any, outputs: Any) -> list[float]:
        return [float(sum(letter.isdigit() for letter in output)) for output in outputs]


def answer(index: int, given: str) -> str:
    return f"The dose was {given} mg on day {index}.\nIt was tolerated well."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that won 20, lost 5 and tied 5 of 30, whose chosen answers lost 2 nats and whose rejected ones lost 8."""
    base = [answer(index, "5") for index in range(COUNT)]
    aligned = [answer(index, "500" if index < 20 else "5" if index < 25 else "no") for index in range(COUNT)]
    aligned[3] += EVIL + " 1"
    conditions = [{"prompt": f"Stay {index} {EVIL}:\n  a drug", "task": "doses"} for index in range(COUNT)]
    report = evaluate_paired(base, aligned, conditions, list(range(COUNT)), [Figures()], seed=0)
    atomic_write(tmp_path / "evaluation.json", json.dumps(report))
    store = PairStore(tmp_path / "pairs", "text")
    rows = [
        {
            "pair_id": str(index),
            "condition": {"prompt": conditions[index]["prompt"]},
            "chosen": aligned[index],
            "rejected": base[index],
            "chosen_scores": {"figures": 3.0},
            "rejected_scores": {"figures": 1.0},
            "provenance": {},
        }
        for index in range(10)
    ]
    store.write_shard(0, rows)
    summary = {"prompts": 10, "samples": 20, "pairs": 10, "source": "rows", "duplicates_dropped": 5, "empty_dropped": 3}
    atomic_write(store.folder / "summary.json", json.dumps(summary))
    atomic_write(tmp_path / "left_out.json", json.dumps({"too_long": 1234}))
    atomic_write(tmp_path / "config.yaml", "modality: text\nobjective: {name: dpo, sft: 0.1}\n")
    atomic_write(tmp_path / "metrics.jsonl", metrics(chosen=-2.0, rejected=-8.0))
    return tmp_path


def metrics(*, chosen: float, rejected: float) -> str:
    lines = []
    for step in range(50):
        noise = 0.01 * (-1) ** step
        sides = {"chosen": chosen, "rejected": rejected}
        figures = {f"logps/policy_{side}": -80.0 + change + noise for side, change in sides.items()}
        figures |= {f"logps/reference_{side}": -80.0 for side in sides}
        lines.append(json.dumps({"step": step + 1, "loss": 0.5, "rewards/accuracies": 0.8, **figures}))
    return "\n".join(lines) + "\n"


def test_answers_stand_side_by_side_and_nothing_of_them_is_markup(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert EVIL not in page and "&lt;script&gt;alert(1)" in page
    assert page.count('class="cards texts') == 3, "before and after, regressions, pairs"
    assert "<mark>500</mark>" in page and "<mark>no</mark>" in page
    assert "Both models answered the same prompts" in page and "samples/outputs.jsonl" in page
    assert "no picture" not in page and "Margins by timestep" not in page


def test_lengths_are_shown_and_picture_statistics_are_not(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert "part of a win may be length alone" in page and "picture statistic" not in page
    assert not {rule.name for rule in ask(collect(run))} & set(OF_PICTURES)
    facts = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert facts["evaluation"]["lengths"]["words"]["change"] == pytest.approx(1 / COUNT)
    assert facts["verdict"]["state"] == "improved"
    assert facts["worst_regressions"][0]["aligned_text"].startswith("The dose was no mg")


def test_the_data_card_counts_answers_and_what_was_too_long(run: Path) -> None:
    card = data_card(collect(run))
    assert "<dt>texts</dt><dd>20</dd>" in card and "<dt>empty answers</dt><dd>3</dd>" in card
    assert '<dt>pairs too long</dt><dd>1,234</dd><dd class="remark">left out of training, never cut</dd>' in card
    assert "The first 8 pairs" in card and "<mark>500</mark>" in card


def test_log_probabilities_are_read_the_right_way_round(run: Path) -> None:
    reading = displacement(collect(run).metrics)
    assert reading is not None and reading.measure == "log-probability"
    assert reading.chosen.mean == pytest.approx(-2.0, abs=0.02) and reading.rejected.mean == pytest.approx(-8.0, abs=0.02)
    assert reading.title == "both log-probabilities fell: displacement"
    said = " ".join(cautions(collect(run)))
    assert "the chosen answers' log-probability fell by 2.0 nats: both log-probabilities fell: displacement." in said
    assert "5 duplicate texts were dropped" in said
    page = write_report(run).read_text(encoding="utf-8")
    assert "log-probability against the reference, nats" in page and "error against the reference" not in page
    assert "Higher means likelier" in page and "a multiple of the chosen outputs&#x27; negative log-probability" in page


@pytest.mark.parametrize(
    ("chosen", "rejected", "title"),
    [
        (3.0, -5.0, "the hoped-for picture"),
        (-3.0, 5.0, "backwards"),
        (4.0, 2.0, "both log-probabilities rose"),
        (2.0, 4.0, "both log-probabilities rose, the rejected one more"),
        (-8.0, -2.0, "both log-probabilities fell, the chosen one more"),
        (0.0, -5.0, "pushed away from the rejected"),
        (3.0, 0.0, "pulled towards the chosen"),
        (-3.0, 0.0, "drift from the chosen"),
        (0.0, 0.0, "neither moved"),
    ],
)
def test_every_movement_has_its_words(run: Path, chosen: float, rejected: float, title: str) -> None:
    atomic_write(run / "metrics.jsonl", metrics(chosen=chosen, rejected=rejected))
    reading = displacement(collect(run).metrics)
    assert reading is not None and reading.title == title


def test_one_side_alone_is_no_displacement(run: Path) -> None:
    rows = [{"step": step, "logps/policy_chosen": -1.0, "logps/reference_chosen": -2.0} for step in range(1, 9)]
    atomic_write(run / "metrics.jsonl", "\n".join(map(json.dumps, rows)))
    found = collect(run).metrics
    assert found is not None and displacement(found) is None
    assert moved(found, "chosen") is not None and moved(found, "rejected") is None
    assert "Only one of the two sides was logged" in write_report(run).read_text(encoding="utf-8")


def test_what_differs_is_marked() -> None:
    assert marked("a b c", "a x c") == ("a <mark>b</mark> c", "a <mark>x</mark> c")
    assert marked("one & two", "one & two") == ("one &amp; two",) * 2, "equal texts have no marks"
    assert marked("a b c d", "w x y z <") == ("a b c d", "w x y z &lt;"), "nor have texts with nothing in common"
    assert "<mark>" not in marked("a b", "a  b")[0], "white space alone is not marked"


def test_a_very_long_answer_is_cut_on_the_page_and_says_so() -> None:
    long, other = "word " * LONGEST, "word " * LONGEST + "end"
    assert all(len(one) <= LONGEST + 1 and one.endswith("\u2026") for one in marked(long, other))
    shorter = " ".join(f"{place:040}" for place in range(200))
    cut = marked(shorter, "x " + shorter)
    assert cut[1].startswith("<mark>x") and all(one.endswith("\u2026") for one in cut)


def test_an_empty_answer_is_said() -> None:
    assert "nothing" in block(" \n") and "nothing" not in block("a")
    assert are_texts([{"base_text": ""}]) and not are_texts([{"base_image": None}]) and not are_texts([])


@pytest.mark.parametrize(
    ("interval", "said"),
    [((0.6, 0.8), "that holds for pairs it has not seen"), ((0.2, 0.4), "were exchanged"), ((0.4, 0.6), "which is chance")],
)
def test_the_implicit_reward_is_put_into_words(interval, said):
    from polyalign.evaluation.report.comparison import implicit_reward

    block = {"accuracy": sum(interval) / 2, "interval": list(interval), "pairs": 40, "draws": 10, "ties_left_out": 2}
    shown = implicit_reward(block)
    assert said in shown and "40 pairs" in shown and "10 draw" in shown and "2 ties" in shown
    assert implicit_reward({}) == ""


def test_answers_that_say_the_same_over_and_over_are_not_compared() -> None:
    """Every step of the comparison would look at all pairs of equal words: seconds to minutes for each card."""
    first, second = "the cat sat on " * 185, "cat the on sat " * 185
    assert marked(first, second) == (first, second)
    few = "the cat sat on " * 20
    assert "<mark>" in marked(few, few + "it")[1]
