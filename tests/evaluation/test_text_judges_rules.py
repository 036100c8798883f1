"""Declared rules on texts: what each counts, worked out by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.evaluation import judges
from polyalign.evaluation.paired import evaluate_paired
from polyalign.evaluation.text_judges.rules import RulesJudge, words


def scores(rule: dict[str, Any], *texts: str) -> list[float]:
    made = judges.build(JudgeConfig(name="text_rules", options={"rules": [rule]}))
    return made.score([{"prompt": "p"}] * len(texts), list(texts))


def test_words_are_counted_as_a_reader_would() -> None:
    assert words("On 2134-03-05, don't give 12.5 mg (twice)!") == ["On", "2134-03-05", "don't", "give", "12.5", "mg", "twice"]
    assert words("Größe 5 µg, 日本") == ["Größe", "5", "µg", "日本"]


def test_patterns() -> None:
    texts = ["Dose: 5 mg", "first\ndose: 5 mg", "none"]
    assert scores({"rule": "present", "pattern": "^Dose: \\d+"}, *texts) == [1, 0, 0]
    assert scores({"rule": "present", "pattern": "^Dose: \\d+", "ignore_case": True}, *texts) == [1, 1, 0]
    assert scores({"rule": "absent", "pattern": "dose", "weight": 2}, *texts) == [2, 0, 2]


def test_lengths_fall_off_on_both_sides() -> None:
    rule = {"rule": "length", "least": 4, "most": 5}
    assert scores(rule, "", "a b", "a b c d", "a b c d e", "a b c d e f g h i j") == [0, 0.5, 1, 1, 0.5]
    assert scores({"rule": "length", "unit": "characters", "most": 4}, "", "abcd", "abcdefgh") == [1, 1, 0.5]


def test_json() -> None:
    texts = ['{"a": 1, "b": [2]}', "[1]", "{a: 1}", '```json\n{"a": NaN}\n```', '```json\n{"a": 1}\n```', "[" * 100_000]
    assert scores({"rule": "json"}, *texts) == [1, 1, 0, 0, 0, 0]
    assert scores({"rule": "json", "fenced": True, "keys": ["a", "c"]}, *texts) == [0.5, 0, 0, 0, 0.5, 0]


def test_keywords_are_whole_words_and_phrases() -> None:
    texts = ["Sepsis and heart\n failure.", "septic heartfailure", "SEPSIS"]
    rule = {"rule": "keywords", "words": ["sepsis", "heart failure"]}
    assert scores(rule, *texts) == [1, 0, 0.5]
    assert scores({**rule, "count": "all"}, *texts) == [1, 0, 0]
    assert scores({**rule, "count": "any", "ignore_case": False}, *texts) == [1, 0, 0]
    assert scores({"rule": "keywords", "words": ["c++", "(x)"]}, "c++ and (x)", "c+++", "") == [
        1,
        0.5,
        0,
    ]  # c++ ends at no letter


def test_repetition() -> None:
    rule = {"rule": "repetition", "n": 2}
    assert scores(rule, "a b c d", "a b A B a b", "a a a a a", "a", "") == [1, 2 / 5, 1 / 4, 1, 1]


def test_the_score_is_the_weighted_sum_and_the_version_changes_with_the_rules() -> None:
    rules = [{"rule": "length", "most": 3, "weight": 0.5}, {"rule": "keywords", "words": ["bad"], "weight": -2}]
    judge = RulesJudge(rules=rules)
    assert judge.score([{}, {}], ["a good one", "a bad one too many words"]) == [0.5, 0.25 - 2]
    assert judge.name == "text_rules" and RulesJudge(rules=rules, label="manners").name == "manners"
    assert RulesJudge(rules=rules).version == judge.version != RulesJudge(rules=rules[:1]).version
    with pytest.raises(ValueError, match="1 texts for 2 conditions"):
        judge.score([{}, {}], ["a"])


def test_it_evaluates_texts() -> None:
    judge = RulesJudge(rules=[{"rule": "present", "pattern": "yes"}])
    report = evaluate_paired(["no", "no"], ["yes", "no"], [{"prompt": "a"}, {"prompt": "b"}], [0, 1], [judge], seed=0)
    assert (report["win_rate"]["wins"], report["win_rate"]["ties"]) == (1, 1) and "artefacts" not in report


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([], "rules: List should have at least 1 item"),
        ("present", "rules: Input should be a valid list"),
        (
            [{"rule": "presnt", "pattern": "a"}],
            r"rules\[0\].rule: there is no such rule, did you mean 'present', found 'presnt'. A rule is one of present, "
            "absent, length, json, keywords, repetition, and",
        ),
        ([{"rule": ["a"]}], r"rules\[0\].rule: there is no such rule, found \['a'\]"),
        (
            [{"pattern": "a"}],
            r"rules\[0\].rule: missing, which says what kind of rule it is, found {'pattern': 'a'}\. A ",
        ),
        ([{"rule": "present", "pattern": "("}], r"rules\[0\].pattern: '\(' is no regular expression: missing \)"),
        ([{"rule": "json"}, {"rule": "length"}], r"rules\[1\]: a length needs least, or most, or both"),
        ([{"rule": "length", "least": 9, "most": 3}], r"rules\[0\]: least 9 is above most 3"),
        ([{"rule": "length", "least": -1}], r"rules\[0\].least: .*greater than or equal to 0, found -1"),
        ([{"rule": "json", "wieght": 2}], r"rules\[0\].wieght: Extra inputs are not permitted"),
        ([{"rule": "json", "weight": float("nan")}], r"rules\[0\].weight: .*finite number"),
        ([{"rule": "keywords", "words": ["a", " "]}], r"rules\[0\].words: one of the words is empty"),
        ([{"rule": "keywords", "words": []}], r"rules\[0\].words: .*at least 1 item"),
    ],
)
def test_wrong_rules_are_explained(rules: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        judges.build(JudgeConfig(name="text_rules", options={"rules": rules}))
    assert str(raised.value).startswith("the judge 'text_rules': rules")
