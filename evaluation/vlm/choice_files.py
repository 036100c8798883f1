"""Multiple-choice benchmarks as their files have them: NLVR2, BLINK, Mantis-Eval, MMMU, and VLMEvalKit's tables."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm.sheets import Question, Sheet, field_of, only_file, read_json, read_rows, without_doubles
from polyalign.evaluation.vlm.tables import read_table

BLINK_LETTERS = "ABCDE"
MMMU_LETTERS = "ABCDEFGHI"
_MMMU_ID = re.compile(r"(?:dev|validation|test)_(.+)_\d+")
_BLINK_ID = re.compile(r"(?:val|test)_(.+)_\d+")


@dataclass(frozen=True)
class Choice:
    """What is asked: a letter of ``options``, whether a statement is true (A) or false (B), or a free text. ``right`` are the
    letters, or the texts, that are right; ``sentence`` is what NLVR2's consistency goes by."""

    kind: Literal["letter", "statement", "short", "open"]
    options: Mapping[str, str]
    right: tuple[str, ...]
    sentence: str = ""


def read_nlvr2(folder: Path) -> Sheet:
    """NLVR2's JSON lines: {"identifier": "test1-0-1-2", "sentence", "label": "True"|"False", ...}, where the identifier is
    split, set of images, pair, sentence.

    Raises:
        UserError: absent, or a line that is no example.
    """
    path = only_file(folder, ("*test*.json", "*dev*.json", "*.jsonl"), "NLVR2's examples")
    questions = []
    for where, row in read_rows(path, "NLVR2's examples"):
        name, label = field_of(row, "identifier", where), str(row.get("label"))
        parts = name.split("-")
        if len(parts) != 4:
            raise UserError(f"{where}: identifier {name!r} is not split-set-pair-sentence")
        if label not in ("True", "False"):
            raise UserError(f"{where}: label is {label!r}; allowed: True, False")
        images = tuple(f"{'-'.join(parts[:3])}-img{side}.png" for side in (0, 1))
        choice = Choice(
            "statement", {"A": "True", "B": "False"}, ("A" if label == "True" else "B",), f"{parts[0]}-{parts[1]}-{parts[3]}"
        )
        text = field_of(row, "sentence", where)
        questions.append(Question(name, choice, f"{parts[0]}-{parts[1]}", parts[0], text, images))
    return Sheet(without_doubles(questions, path), (path,))


def read_blink(folder: Path) -> Sheet:
    """BLINK's ``val_answers.json`` ({"val_Counting_1": "(B)"}), or rows with idx, answer and, if there, choices and question.

    Raises:
        UserError: absent, or an answer that is no letter in brackets.
    """
    path = only_file(folder, ("*answers*.json", "*blink*.json*", "*BLINK*.json*"), "BLINK's answers")
    content = read_json(path, "BLINK's answers") if path.suffix == ".json" else None
    if isinstance(content, dict):
        rows = [(f"{path}: {name!r}", {"idx": name, "answer": answer}) for name, answer in content.items()]
    else:
        rows = read_rows(path, "BLINK's answers")
    questions = []
    for where, row in rows:
        name = field_of(row, "idx", where)
        options = lettered(row["choices"], where) if "choices" in row else dict.fromkeys(BLINK_LETTERS, "")
        right = _right_letter(field_of(row, "answer", where), options, where)
        task = _BLINK_ID.fullmatch(name)
        group = str(row.get("sub_task") or (task[1] if task else "other"))
        questions.append(Question(name, Choice("letter", options, (right,)), name, group, str(row.get("question", ""))))
    return Sheet(without_doubles(questions, path), (path,))


def read_mantis(folder: Path) -> Sheet:
    """Mantis-Eval: rows of id, question_type ("multi-choice" or "short-answer"), question, options, answer, images.

    Raises:
        UserError: absent, or a row that is none.
    """
    path = only_file(folder, ("*.json", "*.jsonl"), "Mantis-Eval's questions")
    questions = []
    for where, row in read_rows(path, "Mantis-Eval's questions"):
        name, kind = str(field_of(row, "id", where, (str, int))), field_of(row, "question_type", where)
        answer, text = field_of(row, "answer", where), field_of(row, "question", where)
        if kind == "multi-choice":
            options = lettered(row.get("options"), where)
            choice = Choice("letter", options, (_right_letter(answer, options, where),))
        elif kind == "short-answer":
            choice = Choice("short", {}, (answer,))
        else:
            raise UserError(f"{where}: question_type is {kind!r}; allowed: multi-choice, short-answer")
        images = tuple(str(image) for image in row.get("images", ()) if isinstance(image, str))
        questions.append(Question(name, choice, name, kind, text, images))
    return Sheet(without_doubles(questions, path), (path,))


def read_mmmu(folder: Path) -> Sheet:
    """MMMU's ``answer_dict_val.json`` ({id: {"question_type", "ground_truth"}}), or rows with id, question_type, answer and
    options (a list, or a text of one) or index2ans.

    Raises:
        UserError: absent, or an entry that is no question of it.
    """
    path = only_file(folder, ("answer_dict*.json", "*mmmu*.json*", "*MMMU*.json*"), "MMMU's answers")
    content = read_json(path, "MMMU's answers") if path.suffix == ".json" else None
    if isinstance(content, dict):
        rows = [(f"{path}: {name!r}", {"id": name, **_entry(entry, f"{path}: {name!r}")}) for name, entry in content.items()]
    else:
        rows = read_rows(path, "MMMU's answers")
    questions = []
    for where, row in rows:
        name, kind = field_of(row, "id", where), field_of(row, "question_type", where)
        answer = row.get("ground_truth", row.get("answer"))
        answers = tuple(str(one) for one in answer) if isinstance(answer, list) else (str(answer),)
        if kind == "multiple-choice":
            options = _mmmu_options(row, where)
            choice = Choice("letter", options, tuple(_right_letter(one, options, where) for one in answers))
        elif kind in ("open", "short-answer"):
            choice = Choice("open", {}, answers)
        else:
            raise UserError(f"{where}: question_type is {kind!r}; allowed: multiple-choice, open")
        subject = _MMMU_ID.fullmatch(name)
        questions.append(Question(name, choice, name, subject[1] if subject else "other", str(row.get("question", ""))))
    return Sheet(without_doubles(questions, path), (path,))


def _entry(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: question_type and ground_truth are expected, found {entry!r}")
    return entry


def _mmmu_options(row: Mapping[str, Any], where: str) -> dict[str, str]:
    if isinstance(row.get("index2ans"), dict):
        return {str(name): str(said) for name, said in row["index2ans"].items()}
    return lettered(row["options"], where) if "options" in row else dict.fromkeys(MMMU_LETTERS, "")


def read_tsv(folder: Path) -> Sheet:
    """A table of VLMEvalKit: index, question, A, B, ..., answer, and category if there.

    Raises:
        UserError: absent, no such table, or a row whose answer is none of its options.
    """
    path = only_file(folder, ("*.tsv",), "a table of VLMEvalKit")
    questions = []
    for number, row in enumerate(read_table(path), start=2):
        where = f"{path}: line {number}"
        options = {name: row[name] for name in ascii_uppercase if row.get(name)}
        if not options:
            raise UserError(f"{where}: has no options in columns A, B, ...; this reads tables of multiple choice")
        right = _right_letter(row.get("answer", ""), options, where)
        images = (row["image_path"],) if row.get("image_path") else ()
        cluster = row.get("image_path") or row["index"]
        choice = Choice("letter", options, (right,))
        questions.append(Question(row["index"], choice, cluster, row.get("category", ""), row.get("question", ""), images))
    return Sheet(without_doubles(questions, path), (path,))


def lettered(options: Any, where: str) -> dict[str, str]:
    """Options by letter, from a list or the text of one.

    Raises:
        UserError: something else, or more than the alphabet has.
    """
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{where}: the options are no list ({error})") from error
    if not isinstance(options, Sequence) or not 0 < len(options) <= len(ascii_uppercase):
        raise UserError(f"{where}: a list of 1 to {len(ascii_uppercase)} options is expected, found {options!r}")
    return {name: str(said) for name, said in zip(ascii_uppercase, options, strict=False)}


def _right_letter(answer: str, options: Mapping[str, str], where: str) -> str:
    """ "(B)", "B", or an option's text."""
    bare = answer.strip("() \n")
    if bare.upper() in options:
        return bare.upper()
    same = [name for name, said in options.items() if said and said == answer]
    if len(same) != 1:
        raise UserError(f"{where}: the answer {answer!r} is none of {', '.join(options)}")
    return same[0]
