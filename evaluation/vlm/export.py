"""Answers laid out for VLMEvalKit, so that its own scorer can be run on them.

    python -m polyalign.evaluation.vlm.export LMUData/POPE.tsv --answers answers.jsonl --model tuned --out outputs

writes ``outputs/tuned/tuned_POPE.tsv``: the table's rows without pictures, with a column ``prediction``. Answers have the
table's ``index`` as id. Move the file into a run's folder (``outputs/tuned/T20260101-000000``) and run VLMEvalKit with
``PRED_FORMAT=tsv``, ``--mode eval --reuse``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm.multiple_choice import table_id
from polyalign.evaluation.vlm.sheets import Policy, Question, add_policy, read_answers
from polyalign.evaluation.vlm.tables import FORMATS, read_table, write_predictions


def export(benchmark: Path, answers: Path, out: Path, model: str, *, form: str = "tsv", policy: Policy | None = None) -> Path:
    """The file of predictions; it is named after the table.

    Raises:
        UserError: a table or answers that cannot be read, or ids that do not fit.
    """
    rows = read_table(benchmark)
    questions = [Question(row["index"], None, cluster=row["index"]) for row in rows]
    given = read_answers(answers, questions, table_id, policy=policy)
    return write_predictions(out, model, benchmark.stem, rows, given.said, form=form)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.evaluation.vlm.export", description="A model's answers laid out for VLMEvalKit."
    )
    parser.add_argument("table", type=Path, help="the benchmark's table as VLMEvalKit has it, such as POPE.tsv")
    parser.add_argument("--answers", type=Path, required=True, help="JSON lines (or a list) of index and response")
    parser.add_argument("--model", required=True, help="the name that the model has in VLMEvalKit")
    parser.add_argument("--out", type=Path, required=True, help="VLMEvalKit's folder of outputs")
    parser.add_argument("--format", choices=FORMATS, default="tsv", help="VLMEvalKit's PRED_FORMAT (default tsv)")
    add_policy(parser)
    asked = parser.parse_args(arguments)
    try:
        policy = Policy(asked.missing, asked.doubled, asked.unknown)
        print(export(asked.table, asked.answers, asked.out, asked.model, form=asked.format, policy=policy))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
