"""Scores a file of a model's answers on a benchmark that lies in a local folder; nothing is downloaded.

    python -m polyalign.evaluation.vlm.score pope --files POPE --answers answers.jsonl --out pope.json
    python -m polyalign.evaluation.vlm.score pope --files POPE --questions questions.jsonl

The second form writes the questions with their ids, to be answered. Answers are JSON lines of ``id`` and ``response`` (or
``answer``, ``prediction``, ``caption``, ``text``). Every figure has a 95 % interval over images (HallusionBench: over its
sets); the JSON also has the files' hashes, what was counted, and what was not answered.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polyalign
from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, sha256_of
from polyalign.evaluation.vlm import amber, captioning, chair, choice_files, hallusion_bench, mme, multiple_choice, pope
from polyalign.evaluation.vlm.answers import LETTERS, YES_NO
from polyalign.evaluation.vlm.figures import Scores
from polyalign.evaluation.vlm.sheets import POLICIES, Policy, Sheet, add_policy, read_answers


@dataclass(frozen=True)
class Benchmark:
    """``options``: what ``score`` takes besides answers and seed."""

    read: Callable[[Path], Sheet]
    score: Callable[..., Scores]
    answer_id: Callable[[Mapping[str, Any]], str | None]
    options: tuple[str, ...] = ("reader",)


BENCHMARKS: Mapping[str, Benchmark] = {
    "pope": Benchmark(pope.read, pope.score, pope.answer_id),
    "chair": Benchmark(chair.read, chair.score, chair.answer_id, ()),
    "amber": Benchmark(amber.read, amber.score, amber.answer_id, ("reader", "vectors")),
    "hallusion_bench": Benchmark(
        hallusion_bench.read, hallusion_bench.score, hallusion_bench.answer_id, ("reader", "without_picture")
    ),
    "mme": Benchmark(mme.read, mme.score, mme.answer_id),
    "nlvr2": Benchmark(choice_files.read_nlvr2, multiple_choice.score, multiple_choice.answer_id),
    "blink": Benchmark(
        choice_files.read_blink, partial(multiple_choice.score, parts_weigh_alike=True), multiple_choice.blink_id
    ),
    "mantis": Benchmark(choice_files.read_mantis, multiple_choice.score, multiple_choice.answer_id),
    "mmmu": Benchmark(choice_files.read_mmmu, multiple_choice.score, multiple_choice.answer_id),
    "choice_table": Benchmark(choice_files.read_tsv, multiple_choice.score, multiple_choice.table_id),
    "captions": Benchmark(captioning.read, captioning.score, captioning.answer_id, ("java",)),
}


def evaluate(
    name: str,
    files: Path,
    answers: Path,
    *,
    seed: int = 0,
    policy: Policy | None = None,
    answer_key: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The figures of one file of answers with the record of how they came about.

    Raises:
        UserError: no such benchmark or option, or files that do not fit.
    """
    benchmark = _benchmark(name)
    strange = [option for option in options if option not in benchmark.options]
    if strange:
        allowed = ", ".join(f"--{option.replace('_', '-')}" for option in benchmark.options) or "none"
        raise UserError(f"{name} does not take --{strange[0].replace('_', '-')}; its options: {allowed}")
    sheet = benchmark.read(files)
    policy = policy or Policy()
    given = read_answers(answers, sheet.questions, benchmark.answer_id, policy=policy, answer_key=answer_key)
    found = benchmark.score(sheet, given.said, seed=seed, **options)
    given_files = {option: value for option, value in options.items() if isinstance(value, Path)}
    return {
        "benchmark": name,
        **found.as_json(),
        "answers": dict(given.record),
        "options": {option: value.name if option in given_files else value for option, value in options.items()},
        "seed": seed,
        "files": {path.name: sha256_of(path) for path in (*sheet.files, *given_files.values())},
        "answers_file": {answers.name: sha256_of(answers)},
        "polyalign": polyalign.__version__,
    }


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise UserError(f"{name!r} is no benchmark; allowed: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def write_questions(name: str, files: Path, out: Path) -> int:
    """The benchmark's questions as JSON lines: id, question, images, and options by letter. Returns how many.

    Raises:
        UserError: no such benchmark, or files that do not fit.
    """
    lines = []
    for question in _benchmark(name).read(files).questions:
        row: dict[str, Any] = {"id": question.id, "question": question.text, "images": list(question.images)}
        if getattr(question.truth, "options", None):
            row["options"] = dict(question.truth.options)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    atomic_write(out, "".join(lines))
    return len(lines)


def table(found: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    rows = [("part", "figure", "value", "95 % interval", "rows")]
    for group, named in found["figures"].items():
        for name, one in named.items():
            value = "not defined" if one["value"] is None else f"{one['value']:.4f}"
            interval = "-" if one["interval"] is None else "{:.4f} to {:.4f}".format(*one["interval"])
            rows.append((group, name, value, interval, str(one["rows"])))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    answers = found["answers"]
    told = [f"{answers['answered']} of {answers['questions']} questions answered, {answers['empty']} answers empty"]
    told += [
        f"{answers[trouble]['count']} {trouble} ({answers[trouble]['rule']})"
        for trouble in POLICIES
        if answers[trouble]["count"]
    ]
    if found["unread"]["count"]:
        told.append(f"nothing found in {found['unread']['count']} answers, which count as wrong")
    return "\n".join([*lines, "", "; ".join(told), *found["notes"]])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    asked = _parser().parse_args(arguments)
    try:
        if (asked.answers is None) == (asked.questions is None):
            raise UserError("one of --answers (to score them) and --questions (to write them) is needed")
        if asked.questions is not None:
            count = write_questions(asked.benchmark, asked.files, asked.questions)
            print(f"{asked.questions}: {count} questions")
            return 0
        chosen = {
            "reader": asked.reader,
            "vectors": asked.vectors,
            "java": asked.java,
            "without_picture": asked.without_picture,
        }
        found = evaluate(
            asked.benchmark,
            asked.files,
            asked.answers,
            seed=asked.seed,
            policy=Policy(asked.missing, asked.doubled, asked.unknown),
            answer_key=asked.answer_key,
            **{option: value for option, value in chosen.items() if value is not None},
        )
        if asked.out is not None:
            atomic_write(asked.out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.evaluation.vlm.score",
        description="A model's answers scored on a benchmark in a local folder, every figure with a 95 % interval.",
    )
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--files", type=Path, required=True, help="folder of the benchmark's own files")
    parser.add_argument("--answers", type=Path, help="JSON lines (or a list) of id and response")
    parser.add_argument("--questions", type=Path, help="write the questions with their ids to this file instead of scoring")
    parser.add_argument("--answer-key", help="key of the answer's text, if it is not one of the usual")
    add_policy(parser)
    parser.add_argument(
        "--reader",
        choices=sorted({*YES_NO, *LETTERS}),
        help="how answers are read (default words); the published ones have names",
    )
    parser.add_argument("--vectors", type=Path, help="amber: word vectors as text, to join words that mean the same")
    parser.add_argument("--java", nargs="+", choices=captioning.JAVA_METRICS, help="captions: these too, with pycocoevalcap")
    parser.add_argument("--without-picture", choices=hallusion_bench.RULES, help="hallusion_bench: questions without a picture")
    parser.add_argument("--seed", type=int, default=0, help="keys the bootstrap of the intervals (default 0)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
