"""NLVR2, BLINK, Mantis-Eval, MMMU and VLMEvalKit's tables, from small files in their own formats."""

from __future__ import annotations

import json

import pytest

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm import choice_files, multiple_choice


def _values(scores, group="all"):
    return {name: one.value for name, one in scores.groups[group].items()}


def _nlvr2(folder, rows):
    lines = [json.dumps({"identifier": name, "sentence": "Both are red.", "label": label}) + "\n" for name, label in rows]
    (folder / "test1.json").write_text("".join(lines))


def test_nlvr2(tmp_path):
    _nlvr2(tmp_path, [("test1-0-0-0", "True"), ("test1-0-1-0", "False"), ("test1-0-1-1", "True"), ("test1-3-0-0", "False")])
    sheet = choice_files.read_nlvr2(tmp_path)
    assert sheet.questions[1].images == ("test1-0-1-img0.png", "test1-0-1-img1.png")
    said = dict(zip((one.id for one in sheet.questions), ["True", "true.", "Yes", "B"], strict=True))
    scores = multiple_choice.score(sheet, said)
    # sentence test1-0-0 is wrong for one of its pairs; the other two sentences are right
    assert _values(scores) == pytest.approx({"accuracy": 3 / 4, "consistency": 2 / 3})
    assert scores.groups["all"]["accuracy"].clusters == 2
    unread = multiple_choice.score(sheet, said | {"test1-3-0-0": "they are red"})
    assert list(unread.unread) == ["test1-3-0-0"] and _values(unread)["accuracy"] == 0.5


def test_blink_weighs_its_tasks_alike(tmp_path):
    answers = {"val_Counting_1": "(A)", "val_Counting_2": "(B)", "val_Counting_3": "(B)", "val_IQ_Test_1": "(C)"}
    (tmp_path / "val_answers.json").write_text(json.dumps(answers))
    sheet = choice_files.read_blink(tmp_path)
    said = {"val_Counting_1": "(A)", "val_Counting_2": "B", "val_Counting_3": "(A)", "val_IQ_Test_1": "The answer is C"}
    scores = multiple_choice.score(sheet, said, parts_weigh_alike=True)
    assert _values(scores) == pytest.approx({"accuracy": 3 / 4, "mean_of_parts": (2 / 3 + 1) / 2})
    assert scores.counts == {
        "Counting": {"questions": 3, "right": 2},
        "IQ_Test": {"questions": 1, "right": 1},
        "all": {"questions": 4, "right": 3},
    }


def test_blink_rows_with_choices(tmp_path):
    row = {
        "idx": "val_Jigsaw_1",
        "sub_task": "Jigsaw",
        "question": "Which?",
        "choices": ["the first", "the second"],
        "answer": "(B)",
    }
    (tmp_path / "blink_val.jsonl").write_text(json.dumps(row))
    sheet = choice_files.read_blink(tmp_path)
    assert _values(multiple_choice.score(sheet, {"val_Jigsaw_1": "the second one"}))["accuracy"] == 1.0
    (tmp_path / "blink_val.jsonl").write_text(json.dumps(row | {"answer": "(C)"}))
    with pytest.raises(UserError, match=r"the answer '\(C\)' is none of A, B"):
        choice_files.read_blink(tmp_path)


def test_mantis(tmp_path):
    rows = [
        {
            "id": "1",
            "question_type": "multi-choice",
            "question": "?",
            "options": ["(A) one", "(B) two"],
            "answer": "(B)",
            "images": ["a.jpg"],
        },
        {"id": "2", "question_type": "multi-choice", "question": "?", "options": ["one", "two"], "answer": "A"},
        {"id": "3", "question_type": "short-answer", "question": "?", "options": [], "answer": "Two"},
    ]
    (tmp_path / "mantis_eval.json").write_text(json.dumps(rows))
    sheet = choice_files.read_mantis(tmp_path)
    said = {"1": "The answer is B", "2": "B", "3": "Final answer: two."}
    scores = multiple_choice.score(sheet, said)
    assert _values(scores) == {"accuracy": pytest.approx(2 / 3)}
    assert _values(scores, "short-answer") == {"accuracy": 1.0} and _values(scores, "multi-choice") == {"accuracy": 0.5}
    published = multiple_choice.score(sheet, said, reader="mantis")
    assert list(published.unread) == ["1"]  # its first letter is T
    (tmp_path / "mantis_eval.json").write_text(json.dumps([rows[0] | {"question_type": "essay"}]))
    with pytest.raises(UserError, match="question_type is 'essay'; allowed: multi-choice, short-answer"):
        choice_files.read_mantis(tmp_path)


def test_mmmu_from_the_published_answers(tmp_path):
    answers = {
        "validation_Accounting_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Accounting_2": {"question_type": "open", "ground_truth": ["12", "twelve"]},
        "validation_Art_1": {"question_type": "multiple-choice", "ground_truth": "D"},
    }
    (tmp_path / "answer_dict_val.json").write_text(json.dumps(answers))
    sheet = choice_files.read_mmmu(tmp_path)
    said = {"validation_Accounting_1": "(B)", "validation_Accounting_2": "So it is 12.0", "validation_Art_1": ""}
    scores = multiple_choice.score(sheet, said, reader="mmmu")
    assert _values(scores) == {"accuracy": pytest.approx(2 / 3)} and list(scores.unread) == ["validation_Art_1"]
    assert _values(scores, "Accounting") == {"accuracy": 1.0} and _values(scores, "Art") == {"accuracy": 0.0}


def test_mmmu_rows_have_their_options_as_text(tmp_path):
    row = {"id": "dev_Art_1", "question_type": "multiple-choice", "answer": "B", "options": "['oil', 'ink']", "question": "?"}
    (tmp_path / "mmmu.jsonl").write_text(json.dumps(row))
    sheet = choice_files.read_mmmu(tmp_path)
    assert _values(multiple_choice.score(sheet, {"dev_Art_1": "It is drawn with ink"}))["accuracy"] == 1.0
    for options, said in (("['oil'", "the options are no list"), ("3", "a list of 1 to 26 options")):
        (tmp_path / "mmmu.jsonl").write_text(json.dumps(row | {"options": options}))
        with pytest.raises(UserError, match=said):
            choice_files.read_mmmu(tmp_path)
    (tmp_path / "mmmu.jsonl").unlink()
    (tmp_path / "answer_dict_val.json").write_text('{"validation_Art_1": "B"}')
    with pytest.raises(UserError, match="question_type and ground_truth are expected"):
        choice_files.read_mmmu(tmp_path)


def test_tables_of_vlmevalkit(tmp_path):
    picture = "x" * 200_000  # longer than the csv module takes by itself
    rows = [
        ("index", "image", "question", "A", "B", "C", "answer", "category"),
        ("0", picture, "Which?", "one", "two", "", "B", "count"),
        ("1", "0", "Which?", "red", "blue", "green", "C", "colour"),
    ]
    (tmp_path / "BLINK.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    sheet = choice_files.read_tsv(tmp_path)
    assert dict(sheet.questions[0].truth.options) == {"A": "one", "B": "two"}
    scores = multiple_choice.score(sheet, {"0": "two", "1": "(A)"})
    assert _values(scores, "count") == {"accuracy": 1.0} and _values(scores) == {"accuracy": 0.5}
    (tmp_path / "BLINK.tsv").write_text("index\tquestion\tanswer\n0\tIs it?\tYes\n")
    with pytest.raises(UserError, match="line 2: has no options in columns A, B"):
        choice_files.read_tsv(tmp_path)
    (tmp_path / "BLINK.tsv").write_text("number\tquestion\n0\tIs it?\n")
    with pytest.raises(UserError, match="a column 'index'"):
        choice_files.read_tsv(tmp_path)


def test_nlvr2_refuses_other_rows(tmp_path):
    _nlvr2(tmp_path, [("test1-0-0", "True")])
    with pytest.raises(UserError, match="identifier 'test1-0-0' is not split-set-pair-sentence"):
        choice_files.read_nlvr2(tmp_path)
    _nlvr2(tmp_path, [("test1-0-0-0", "maybe")])
    with pytest.raises(UserError, match="label is 'maybe'; allowed: True, False"):
        choice_files.read_nlvr2(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        choice_files.read_nlvr2(tmp_path / "nothing")


def test_unknown_reader(tmp_path):
    _nlvr2(tmp_path, [("test1-0-0-0", "True")])
    with pytest.raises(UserError, match="reader is 'pope'; allowed for letters: words, mmmu, mantis"):
        multiple_choice.score(choice_files.read_nlvr2(tmp_path), {"test1-0-0-0": "True"}, reader="pope")
