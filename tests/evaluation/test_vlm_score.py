"""The commands: a benchmark's folder and a file of answers to a table and a record, and answers laid out for VLMEvalKit."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from polyalign.core.errors import UserError
from polyalign.evaluation.statistics import resampled_means, resampled_sums
from polyalign.evaluation.vlm import export, score
from polyalign.evaluation.vlm.figures import Share, combined, estimates, figures, ratio
from polyalign.evaluation.vlm.sheets import Policy


@pytest.fixture
def pope(tmp_path):
    folder = tmp_path / "pope"
    folder.mkdir()
    rows = [
        {
            "question_id": number,
            "image": f"{number // 2}.jpg",
            "text": "Is there a dog?",
            "label": "yes" if number % 2 else "no",
        }
        for number in range(6)
    ]
    (folder / "coco_pope_random.json").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def _answers(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _all_right():
    return [{"id": f"random/{number}", "answer": "Yes" if number % 2 else "No"} for number in range(6)]


def test_the_command_prints_a_table_and_writes_a_record(pope, tmp_path, capsys):
    answers = _answers(tmp_path / "answers.jsonl", _all_right())
    out = tmp_path / "scores.json"
    assert score.main(["pope", "--files", str(pope), "--answers", str(answers), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        "random  accuracy   1.0000  0.4385 to 1.0000  6" in printed and "6 of 6 questions answered, 0 answers empty" in printed
    )
    found = json.loads(out.read_text())
    assert found["figures"]["random"]["f1"]["value"] == 1.0 and found["counts"]["random"]["tp"] == 3
    file = pope / "coco_pope_random.json"
    assert found["files"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert found["answers"]["missing"] == {"count": 0, "rule": "error", "such_as": []}
    assert str(tmp_path) not in out.read_text()
    again = tmp_path / "again.json"
    score.main(["pope", "--files", str(pope), "--answers", str(answers), "--out", str(again)])
    assert again.read_bytes() == out.read_bytes()


def test_questions_can_be_written_and_answered(pope, tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    assert score.main(["pope", "--files", str(pope), "--questions", str(questions)]) == 0
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert rows[1] == {"id": "random/1", "question": "Is there a dog?", "images": ["0.jpg"]}
    answers = _answers(tmp_path / "answers.json", [{"id": row["id"], "response": "Yes"} for row in rows])
    assert score.evaluate("pope", pope, answers)["figures"]["random"]["yes_ratio"]["value"] == 1.0
    assert score.main(["pope", "--files", str(pope)]) == 2
    assert "one of --answers (to score them) and --questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (_all_right()[1:], "1 of 6 questions have no answer, such as 'random/0'.*--missing drop or --missing empty"),
        (_all_right() + [{"id": "random/0", "answer": "Yes"}], "1 answers are to a question that has one already"),
        (_all_right() + [{"id": "popular/0", "answer": "Yes"}], "1 answers have an id that the benchmark does not know"),
        ([{"answer": "Yes"}], "the question's id is missing; it is id .such as"),
        ([{"id": "random/0"}], "line 1: has no 'response'; found 'id'"),
        ([{"id": "random/0", "answer": None}], "line 1: 'answer' is None .NoneType.; str is expected"),
        ([{"id": "random/0", "answer": 1}], "line 1: 'answer' is 1 .int.; str is expected"),
        ([], "the file of answers is empty"),
    ],
)
def test_answers_that_do_not_fit_are_refused(pope, tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        score.evaluate("pope", pope, _answers(tmp_path / "answers.jsonl", rows))


def test_answers_that_do_not_fit_are_counted_where_the_user_wants_it(pope, tmp_path):
    rows = [*_all_right()[1:], {"id": "random/1", "answer": "No"}, {"id": "popular/0", "answer": "Yes"}]
    answers = _answers(tmp_path / "answers.jsonl", rows)
    dropped = score.evaluate("pope", pope, answers, policy=Policy("drop", "first", "drop"))
    assert dropped["figures"]["random"]["accuracy"]["value"] == 1.0 and dropped["figures"]["random"]["accuracy"]["rows"] == 5
    assert dropped["answers"]["missing"] == {"count": 1, "rule": "drop", "such_as": ["random/0"]}
    assert dropped["answers"]["unknown"]["count"] == dropped["answers"]["doubled"]["count"] == 1
    empty = score.evaluate("pope", pope, answers, policy=Policy("empty", "last", "drop"))
    assert empty["figures"]["random"]["accuracy"]["value"] == pytest.approx(4 / 6)  # one missing, one doubled and wrong
    assert empty["unread"] == {"count": 1, "such_as": ["random/0"]} and empty["answers"]["empty"] == 1
    table = score.table(empty)
    assert "5 of 6 questions answered, 1 answers empty; 1 missing (empty); 1 doubled (last); 1 unknown (drop)" in table
    assert "nothing found in 1 answers" in table
    with pytest.raises(UserError, match="answers none of the benchmark's 6 questions, whose ids are like 'random/0'"):
        lost = _answers(tmp_path / "lost.jsonl", [{"id": "0", "answer": "Yes"}])
        score.evaluate("pope", pope, lost, policy=Policy("drop", "error", "drop"))
    with pytest.raises(UserError, match="missing is 'guess'; allowed: error, drop, empty"):
        Policy("guess")


def test_the_answers_key_can_be_named(pope, tmp_path):
    rows = [{"id": row["id"], "answer": "Yes", "mine": row["answer"]} for row in _all_right()]
    answers = _answers(tmp_path / "answers.jsonl", rows)
    assert score.evaluate("pope", pope, answers, answer_key="mine")["figures"]["random"]["accuracy"]["value"] == 1.0
    assert score.evaluate("pope", pope, answers)["figures"]["random"]["accuracy"]["value"] == 0.5


def test_options_belong_to_benchmarks(pope, tmp_path, capsys):
    answers = _answers(tmp_path / "answers.jsonl", _all_right())
    command = ["pope", "--files", str(pope), "--answers", str(answers)]
    assert score.main([*command, "--java", "meteor"]) == 2
    assert "pope does not take --java; its options: --reader" in capsys.readouterr().err
    assert score.main([*command, "--reader", "mmmu"]) == 2
    assert "allowed for yes and no" in capsys.readouterr().err
    with pytest.raises(UserError, match="'pop' is no benchmark; allowed: pope, chair"):
        score.evaluate("pop", pope, answers)


def test_export_for_vlmevalkit(tmp_path, capsys):
    table = tmp_path / "POPE.tsv"
    table.write_text('index\timage\tquestion\tanswer\n0\tAAAA\t"Is it ""red""?"\tYes\n1\tBBBB\tIs it?\tNo\n')
    answers = _answers(
        tmp_path / "answers.jsonl", [{"index": 0, "response": "Yes,\tit is\nred"}, {"index": 1, "response": "No"}]
    )
    arguments = [str(table), "--answers", str(answers), "--model", "tuned", "--out", str(tmp_path / "outputs")]
    assert export.main(arguments) == 0
    path = tmp_path / "outputs" / "tuned" / "tuned_POPE.tsv"
    assert capsys.readouterr().out.strip() == str(path)
    pandas = pytest.importorskip("pandas")  # what VLMEvalKit reads it with
    frame = pandas.read_csv(path, sep="\t")
    assert list(frame.columns) == ["index", "question", "answer", "prediction"]
    assert list(frame["prediction"]) == ["Yes,\tit is\nred", "No"] and frame["question"][0] == 'Is it "red"?'
    assert export.main([*arguments, "--format", "json"]) == 0
    rows = json.loads(path.with_suffix(".json").read_text())
    assert [row["index"] for row in rows] == ["0", "1"] and "image" not in rows[0]


def test_export_refuses_what_does_not_fit(tmp_path, capsys):
    table = tmp_path / "POPE.tsv"
    table.write_text("index\tquestion\n0\tIs it?\n1\tIs it?\n")
    answers = _answers(tmp_path / "answers.jsonl", [{"index": 0, "response": "Yes"}])
    arguments = [str(table), "--answers", str(answers), "--out", str(tmp_path)]
    assert export.main([*arguments, "--model", "a"]) == 2
    assert "1 of 2 questions have no answer, such as '1'" in capsys.readouterr().err
    assert export.main([*arguments, "--model", "../a", "--missing", "drop"]) == 2
    assert "'../a' is no name for a file" in capsys.readouterr().err
    assert export.main([*arguments, "--model", "a", "--missing", "drop"]) == 0
    assert "Failed to obtain answer" in (tmp_path / "a" / "a_POPE.tsv").read_text()


def test_sums_are_resampled_together_as_means_are():
    values, clusters = [0.0, 1.0, 1.0, 0.0, 1.0], ["a", "a", "b", "c", "c"]
    sums = resampled_sums([values, [1.0] * 5], seed=3, clusters=clusters)
    assert sums.shape == (2, 2000)
    np.testing.assert_array_equal(sums[0] / sums[1], resampled_means(values, seed=3, clusters=clusters))
    with pytest.raises(ValueError, match=r"columns of one length above 0 are needed, found lengths \[5, 4\]"):
        resampled_sums([values, values[1:]], seed=3)


def test_figures_where_nothing_varies_or_nothing_is_defined():
    columns = {"part": [1.0, 1.0, 0.0], "whole": [1.0, 1.0, 0.0], "none": [0.0, 0.0, 0.0], "lone": [0.0, 1.0, 0.0]}
    shares = {"all": Share("part", "whole"), "never": Share("part", "none"), "once": Share("lone", "lone")}
    made = figures(columns, shares, seed=0)
    assert made["never"].value is None and made["never"].interval is None
    # Wilson's for the two rows that the whole has something of, not [1, 1]; one row alone has no spread
    assert made["all"].rows == 2 and made["all"].interval == pytest.approx((0.3424, 1.0), abs=1e-4)
    assert made["once"].value == 1.0 and made["once"].interval is None
    assert ratio(np.array([1.0, 2.0]), np.array([0.0, 4.0])).tolist()[1] == 0.5
    found = estimates(columns, {"mean": Share("part", "part")}, seed=0)["mean"]
    assert combined([found, found], 0.5).value == 1.0 and combined([found, found]).clusters == 4


def test_files_given_as_options_are_in_the_record(tmp_path):
    (tmp_path / "annotations.json").write_text('[{"id": 1, "type": "generative", "truth": ["tree"], "hallu": []}]')
    (tmp_path / "relation.json").write_text('{"tree": [], "bush": []}')
    (tmp_path / "safe_words.txt").write_text("")
    (tmp_path / "vectors.txt").write_text("tree 1 0\nbush 1 0\n")
    answers = _answers(tmp_path / "answers.jsonl", [{"id": 1, "response": "A bush."}])
    found = score.evaluate("amber", tmp_path, answers, vectors=tmp_path / "vectors.txt")
    assert found["figures"]["generative"]["cover"]["value"] == 1.0
    assert found["options"] == {"vectors": "vectors.txt"}
    assert found["files"]["vectors.txt"] == hashlib.sha256(b"tree 1 0\nbush 1 0\n").hexdigest()
