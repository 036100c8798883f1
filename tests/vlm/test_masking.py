"""Gaps in answers: by rules over English words, and by what a model gave back."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from polyalign.modalities.vlm.masking import Gap, Masked, aligned, masker_of
from polyalign.modalities.vlm.re_align_config import ReAlignConfig

SHOWN = {
    ("There is a green square and a red triangle.", "What is in the picture?"): "There is a [MASK] and a [MASK].",
    ("The square is red.", "What colour is the square?"): "The square is [MASK].",
    ("The square is red.", "Which shape is red?"): "The [MASK] is red.",
    ("Yes, there is a red square.", "Is there a red square?"): "[MASK], there is [MASK] red square.",
    ("No, there is no red square.", "Is there a red square?"): "[MASK], there is [MASK] red square.",
    ("There are two squares.", "How many squares are there?"): "There [MASK].",
    ("There is one square.", "How many squares are there?"): "There [MASK].",
    ("A man riding a horse next to two large dogs.", "Describe it."): "A [MASK] riding a [MASK] [MASK] [MASK].",
    ("The woman is not wearing a hat.", "Is the woman wearing a hat?"): "The woman is [MASK] wearing a hat.",
    ("In the image, a table covered with glass is behind 3 people.", "Describe it."): (
        "In the image, a [MASK] covered with [MASK] is [MASK] [MASK]."
    ),
    ("She stays because it rains.", "Why?"): "She stays [MASK] it rains.",
    ("Certainly.", "Can you see it?"): "Certainly.",
    ("", "What?"): "",
}


@pytest.mark.parametrize(("answer", "question"), SHOWN)
def test_the_rules_mask_objects_attributes_counts_relations_and_verdicts(answer: str, question: str) -> None:
    found = masker_of(ReAlignConfig())(answer, question)
    assert found.text() == SHOWN[answer, question]
    assert found.filled(found.taken) == answer


def test_kinds_and_words_are_the_recipes() -> None:
    answer, asked = "A red zorp beside a blue bus.", "What is it?"
    attributes = masker_of(ReAlignConfig(mask_kinds=("attributes",), nouns=False))
    assert attributes(answer, asked).text() == "A [MASK] zorp beside a [MASK] bus."
    assert attributes(answer, asked).gaps[0].kinds == ("attributes",)
    own = masker_of(ReAlignConfig(mask_kinds=("objects",), words={"objects": ("zorp",)}, nouns=False))
    assert own("Zorps, a red zorp and a bus", asked).text("___") == "___, a red ___ and a bus"
    phrases = masker_of(ReAlignConfig(mask_kinds=("relations",), words={"relations": ("on top of",)}))
    assert phrases("It is on top of it, on top, of it", asked).text() == "It is [MASK] it, on top, of it"


def test_words_of_the_question_stay_unless_it_is_said_otherwise() -> None:
    answer, asked = "The buses are red.", "What colour is the bus?"
    assert masker_of(ReAlignConfig())(answer, asked).text() == "The buses are [MASK]."
    assert masker_of(ReAlignConfig(keep_asked=False))(answer, asked).text() == "The [MASK] are [MASK]."


def test_a_gap_counts_its_words() -> None:
    found = masker_of(ReAlignConfig())("There is a big brown dog.", "What?")
    assert found.gaps == (Gap(11, 24, 3, ("attributes", "objects")),)
    assert found.pieces == ["There is a ", "."]


ANSWER = "There is a green square and a red triangle."


@pytest.mark.parametrize(
    ("reply", "taken"),
    [
        ("There is a [MASK] and a [MASK] triangle.", ["green square", "red"]),
        ("  [MASK] a [MASK] [MASK] and a red triangle.\n", ["There is", "green", "square"]),
        ("There is a green square and a [MASK]", ["red triangle."]),
        (ANSWER, None),
        ("There is a [MASK] and the [MASK].", None),
        ("There is a green [MASK] square and a red triangle.", None),
        ("There is a green square and a red triangle[MASK]", None),
        ("Here you are: There is a [MASK].", None),
        ("", None),
    ],
)
def test_a_models_masking_is_taken_where_it_is_the_answer_with_gaps(reply: str, taken: list[str] | None) -> None:
    found = aligned(reply, ANSWER)
    assert (None if found is None else found.taken) == taken
    if found is not None:
        assert isinstance(found, Masked) and found.text() == reply.strip()


@pytest.mark.parametrize(
    "given",
    [
        {"similarity": "sentences"},
        {"sentence_encoder": "folder"},
        {"encoder_model": "folder"},
        {"mask_kinds": []},
        {"completion_prompt": "fill it in"},
        {"masking_prompt": "mask {answer}"},
        {"gate": 0.0},
        {"words": {"things": ["a"]}},
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ReAlignConfig.model_validate(given)
