"""The world `clinical`: stays, their prompts and back, summaries, and the judge that counts every fact."""

from __future__ import annotations

import random
from datetime import date

import pytest

from polyalign.core.errors import UserError
from polyalign.datasets.clinical.stay import Event, Stay, day_of, in_order, prompt_of, stay_of
from polyalign.datasets.worlds import clinical

STAY = Stay(
    sex="woman",
    age=67,
    admitted=date(2134, 3, 5),
    discharged=date(2134, 3, 9),
    destination="discharged home",
    events=(
        Event(1, "diagnosis", "pneumonia"),
        Event(1, "lab", "sodium", "128", "mmol/L", "low"),
        Event(2, "drug", "warfarin", "2.5", "mg"),
        Event(3, "procedure", "lumbar puncture"),
    ),
)
PROMPT = """woman, 67 years, admitted 2134-03-05, discharged home 2134-03-09.
day 1: diagnosis pneumonia.
day 1: sodium 128 mmol/L, low.
day 2: warfarin 2.5 mg.
day 3: procedure lumbar puncture.
summary:"""
SUMMARY = (
    "A 67-year-old woman was admitted on 2134-03-05 with pneumonia. On day 1, sodium was low at 128 mmol/L. On day 2, warfarin "
    "2.5 mg was given. On day 3, lumbar puncture was done. Discharged home on 2134-03-09."
)
FACTS = 7  # the patient, the admission, the end, and four events


def test_prompt_and_summary_of_a_stay():
    assert prompt_of(STAY) == PROMPT
    assert clinical.summary_of(STAY) == SUMMARY
    assert stay_of(PROMPT) == STAY
    assert STAY.days == 5 and day_of(STAY, STAY.events[2]) == date(2134, 3, 6)


def test_every_stay_of_the_world_reads_back_and_its_summary_is_right():
    judge = clinical.ClinicalJudge()
    for stay in clinical.stays("train", 300, seed=3):
        assert stay_of(prompt_of(stay)) == stay
        assert stay.events == in_order(stay.events)
        assert judge.score([{"prompt": prompt_of(stay)}], [clinical.summary_of(stay)]) == [1.0]


@pytest.mark.parametrize(
    ("old", "new", "altered", "omitted", "invented"),
    [
        ("128 mmol/L", "126 mmol/L", 1, 0, 0),
        ("was low at", "was high at", 1, 0, 0),
        ("On day 2,", "On day 3,", 1, 0, 0),
        ("2.5 mg", "5 mg", 1, 0, 0),
        ("67-year-old", "76-year-old", 1, 0, 0),
        ("on 2134-03-09", "on 2134-03-19", 1, 0, 0),
        ("Discharged home", "Died", 1, 0, 0),
        (" with pneumonia", "", 0, 1, 0),
        (" with pneumonia", " with pneumonia and gout", 0, 0, 1),
        ("with pneumonia", "with gout", 0, 1, 1),
        (" On day 3, lumbar puncture was done.", "", 0, 1, 0),
        ("lumbar puncture", "biopsy", 0, 1, 1),
        (" On day 3,", " On day 3, lumbar puncture was done. On day 3,", 0, 0, 1),
        (" On day 3,", " The patient was happy. On day 3,", 0, 0, 1),
    ],
)
def test_each_error_is_counted_as_what_it_is(old: str, new: str, altered: int, omitted: int, invented: int):
    assert old in SUMMARY
    verdict = clinical.compare(STAY, SUMMARY.replace(old, new))
    assert (verdict.altered, verdict.omitted, verdict.invented) == (altered, omitted, invented)
    assert verdict.facts == FACTS and verdict.right == FACTS - altered - omitted
    assert verdict.score == verdict.right / (FACTS + invented) < 1


def test_an_empty_summary_and_a_babbled_one_have_no_right_fact():
    assert clinical.compare(STAY, "").omitted == FACTS
    babble = clinical.compare(STAY, "the the. 12. on day.")
    assert babble.right == 0 and babble.unreadable == babble.invented == 3


def test_hurried_doctors_err_as_often_as_declared():
    rng = random.Random(0)
    found = [clinical.compare(stay, clinical.noisy_summary(stay, rng)) for stay in clinical.stays("train", 3000)]
    right = 1.0
    for chance in clinical.ERRORS.values():
        right *= 1 - chance
    assert sum(verdict.score == 1 for verdict in found) / len(found) == pytest.approx(right, abs=0.03)
    assert all(verdict.unreadable == 0 and verdict.altered <= 1 and verdict.omitted <= 1 for verdict in found)


def test_splits_are_disjoint_and_follow_from_the_seed():
    train, held = clinical.prompts("train", 200, seed=1), clinical.prompts("heldout", 200, seed=1)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert train == clinical.prompts("train", 200, seed=1) != clinical.prompts("train", 200, seed=2)
    assert train[0]["reference"] == clinical.summary_of(stay_of(train[0]["prompt"]))
    with pytest.raises(ValueError, match="'train' and 'heldout', not 'test'"):
        clinical.prompts("test", 1)


def test_what_is_no_stay_is_refused():
    with pytest.raises(UserError, match="first line of a stay"):
        clinical.ClinicalJudge().score([{"prompt": "a red circle"}], ["A red circle."])
    with pytest.raises(ValueError, match="last line"):
        stay_of(PROMPT.replace("summary:", "answer:"))
    with pytest.raises(ValueError, match="an event of a stay"):
        stay_of(PROMPT.replace("day 2: warfarin 2.5 mg.", "then warfarin"))
    with pytest.raises(ValueError, match="no diagnosis, procedure"):
        stay_of(PROMPT.replace("warfarin 2.5 mg", "something else"))
