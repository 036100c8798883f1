"""What free answers say, by our readers and by the published ones with their quirks."""

from __future__ import annotations

import pytest

from polyalign.evaluation.vlm.answers import LETTERS, YES_NO, letter, unsure, yes_or_no
from polyalign.evaluation.vlm.open_answers import open_answer_right, same_text

OPTIONS = {"A": "a red ball", "B": "dark red", "C": "red", "D": "none of the above"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("yes, there is a dog", "yes"),
        ("NO!", "no"),
        ("There is a dog in the image.", "yes"),
        ("There isn't a dog", "no"),
        ("It\u2019s not there.", "no"),
        ("The statement is False", "no"),
        ("I would say yes", "yes"),
        ("That is not quite correct.", "no"),
        ("This is correct.", "yes"),
        ("It could be yes or no", None),
        ("I cannot determine that", None),
        ("I'm not sure, yes", None),
        ("A dog on a sofa", None),
        ("", None),
    ],
)
def test_yes_or_no(text, said):
    assert yes_or_no(text) == said


def test_published_readers_have_their_quirks():
    read = {
        name: [reader(text) for text in ("NO", "No.", "I know it", "", "yes", "No, not at all")]
        for name, reader in YES_NO.items()
    }
    assert read["pope"] == ["yes", "no", "yes", "yes", "yes", "no"]
    assert read["mme"] == ["no", "no", None, None, "yes", "no"]
    assert read["amber"] == [None, None, None, None, None, None]
    assert read["exact"] == ["no", None, None, None, "yes", None]
    assert read["vlmevalkit"] == ["no", "no", None, None, "yes", "no"]
    assert YES_NO["pope"]("It is a dog. No cat is there") == "yes"  # the first sentence only
    assert YES_NO["mme"]("none of them") == "no"
    assert (YES_NO["amber"]("Yes"), YES_NO["amber"]("No")) == ("yes", "no")


def test_unsure_is_told_from_no():
    assert unsure("It is impossible to say") and unsure("I can\u2019t tell") and unsure("There is not enough information")
    assert not unsure("There is not a dog") and not unsure("I cannot see a dog")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("**D**", "D"),
        ("B. dark red", "B"),
        ("The answer is C.", "C"),
        ("A is wrong, the answer is (c)", "C"),
        ("answer: A ... no, the final answer: B", "B"),
        ("\\boxed{C}", "C"),
        ("A dog sits there, so (C)", "C"),
        ("I would choose B because A is wrong", "B"),
        ("it is dark red", "B"),
        ("the answer is a dark red one", "B"),
        ("A cat", None),
        ("(A) or (B)", None),
        ("E", None),
        ("", None),
    ],
)
def test_letters(text, said):
    assert letter(text, OPTIONS) == said


def test_published_readers_of_letters():
    assert LETTERS["mmmu"]("(A) or (B)", OPTIONS) == "B"
    assert LETTERS["mmmu"]("A cat", OPTIONS) == "A"
    assert LETTERS["mmmu"]("they are all of a dark red", OPTIONS) == "C"  # of two texts at the end the one that begins later
    assert LETTERS["mmmu"]("dark red", OPTIONS) is None  # five words or fewer: texts are not looked for
    assert LETTERS["mantis"]("The answer is B", OPTIONS) is None
    assert LETTERS["mantis"]("Final Answer: b", OPTIONS) == "B"
    assert LETTERS["mantis"]("Answer: B", OPTIONS) == "B"
    assert LETTERS["mantis"]("two", {"A": "A. one", "B": "(B) two"}) == "B"


def test_open_answers_by_the_published_rule():
    assert open_answer_right("First we add. So the result is 1,200.", ["1200"])
    assert open_answer_right("x = 3.004", ["3"])
    assert not open_answer_right("x = 3.006", ["3"])
    assert open_answer_right("it is a brown dog", ["dog", "cat"])
    assert not open_answer_right("it is a brown dog", ["cow"])
    assert not open_answer_right("basic", ["b"])  # one letter needs a blank beside it
    assert open_answer_right("the answer is b", ["b"])


def test_short_answers():
    assert same_text("Final answer: Two.", "two") and same_text(" yes ", "Yes")
    assert not same_text("two dogs", "two")
