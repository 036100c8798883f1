"""Answers a benchmark's questions with a base, or with a base and a LoRA that was trained on it.

    python -m polyalign.evaluation.vlm.score pope --files POPE --questions pope.jsonl
    python -m polyalign.modalities.vlm.answer pope.jsonl --pictures POPE --adapter RUN/adapter --out tuned.jsonl
    python -m polyalign.evaluation.vlm.score pope --files POPE --answers tuned.jsonl

Questions are JSON lines of ``id``, ``question`` and ``images`` (names of files in the pictures' folder), with ``options`` by
letter where one is to be chosen. Pictures come before the words, or where these have ``<image>``. Answers are JSON lines of
``id`` and ``response``, in the order of the questions, written batch after batch: the same command goes on where an interrupted
one ended. What they were made with lies beside them (``tuned.jsonl.made.json``), and answers made otherwise are not added to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, manifest_of, sha256_of
from polyalign.core.progress import ProgressLine
from polyalign.datasets.visual_prompts import inside
from polyalign.evaluation.vlm.sheets import field_of, read_rows
from polyalign.modalities.vlm.lmms_eval import condition_of_text

CAPTION = "What is in the picture?"
"""Asked where a benchmark has no words of its own, as those of captions have none."""
CHOICE = "Answer with the option's letter from the given choices directly."
"""Said after options, as LLaVA's evaluations word it."""
BATCHES = 4
"""Sampled together, so that answers of like lengths are; then they are written."""


@dataclass(frozen=True)
class Asked:
    """A question with the files of its pictures."""

    name: str
    words: str
    pictures: tuple[Path, ...]


def read_questions(
    path: Path, pictures: Path | None = None, *, file_name: str = "{}", prompt: str = CAPTION, suffix: str = ""
) -> list[Asked]:
    """The questions of a file.

    Args:
        pictures: their folder; None is the questions' own.
        file_name: a picture's file by its name, such as ``COCO_val2014_{:0>12}.jpg`` for COCO's numbers.
        prompt: what is asked where a question has no words. suffix: is added to every question.

    Raises:
        UserError: unreadable, an id that comes twice, a ``file_name`` without a place for the name, or a picture that is not
            in the folder.
    """
    folder = path.parent if pictures is None else pictures
    asked: dict[str, Asked] = {}
    for where, row in read_rows(path, "the file of questions"):
        name = str(field_of(row, "id", where, (str, int)))
        if name in asked:
            raise UserError(f"{where}: the id {name!r} comes a second time")
        named = row.get("images", [row["image"]] if "image" in row else [])
        if not isinstance(named, list):
            raise UserError(f"{where}: 'images' is {named!r}; a list of names of files is expected")
        files = tuple(_file(one, folder, file_name, f"{where}, images[{place}]") for place, one in enumerate(named))
        asked[name] = Asked(name, _words(row, where, prompt, suffix), files)
    return list(asked.values())


def _file(name: Any, folder: Path, file_name: str, where: str) -> Path:
    try:
        shown = file_name.format(name)
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"--file-name is {file_name!r}; it needs one place for the name, such as {{}} or {{:0>12}}") from error
    try:
        return inside(shown, folder, where)
    except ValueError as error:
        raise UserError(f"{error} ({folder}); name the folder with --pictures") from error


def _words(row: Mapping[str, Any], where: str, prompt: str, suffix: str) -> str:
    words = str(field_of(row, "question", where)) if "question" in row else ""
    lines = [words.strip() or prompt]
    options = row.get("options")
    if options:
        if not isinstance(options, Mapping):
            raise UserError(f"{where}: 'options' is {options!r}; texts by letter are expected")
        lines += [*(f"{letter}. {text}" for letter, text in options.items()), CHOICE]
    return "\n".join([*lines, *([suffix] if suffix else [])])


def answer(
    questions: Sequence[Asked], out: Path, settings: Mapping[str, Any], adapter: Path | None, made: Mapping[str, Any]
) -> int:
    """Answer what ``out`` does not answer yet; returns how many that were.

    Args:
        settings: of :class:`polyalign.modalities.vlm.settings.VlmModelSettings`.
        made: what the answers depend on besides, written down beside them.

    Raises:
        UserError: ``out`` has answers that were made otherwise, or to other questions; no such base or LoRA; a picture that
            cannot be used, or a prompt that leaves no room.
    """
    from polyalign.modalities.vlm.harness import Harness, Wanted
    from polyalign.modalities.vlm.settings import VlmModelSettings

    harness = Harness(VlmModelSettings(**settings, append_eos=False), adapter, seed=made["seed"])
    record = {"model": harness.model.identity, **made}
    sampler = harness.adapter.settings
    wanted = Wanted(sampler.temperature, sampler.top_p, sampler.top_k, sampler.max_new_tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = _done(out, record, [one.name for one in questions])
    left, size = questions[done:], BATCHES * sampler.sample_batch
    with ProgressLine("answering", total=len(questions), start=done) as line, out.open("a", encoding="utf-8") as file:
        for start in range(0, len(left), size):
            part = left[start : start + size]
            said = harness.answers([_condition(one) for one in part], wanted, [one.name for one in part])
            pairs = zip(part, said, strict=True)
            file.write("".join(json.dumps({"id": one.name, "response": text.strip()}) + "\n" for one, text in pairs))
            file.flush()
            line.advance(count=len(part))
    return len(left)


def _condition(one: Asked) -> dict[str, Any]:
    from polyalign.datasets.pictures import decode

    pictures = []
    for file in one.pictures:
        try:
            pictures.append(decode(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise UserError(f"question {one.name}: {file}: {error}") from error
    return condition_of_text(one.words, pictures)


def _done(out: Path, record: Mapping[str, Any], names: Sequence[str]) -> int:
    """How many questions are answered already; a last line that was not finished is taken away, and the record written."""
    beside, wanted = out.with_name(f"{out.name}.made.json"), json.dumps(record, indent=1) + "\n"
    if not out.exists():
        atomic_write(beside, wanted)
        return 0
    if not beside.is_file() or json.loads(beside.read_text(encoding="utf-8")) != json.loads(wanted):
        raise UserError(f"{out}: has answers that were made with something else ({beside.name}); give another --out")
    *whole, cut = out.read_text(encoding="utf-8").split("\n")
    if cut:
        atomic_write(out, "".join(f"{line}\n" for line in whole))
    answered = [str(json.loads(line)["id"]) for line in whole]
    if answered != list(names[: len(answered)]):
        raise UserError(f"{out}: its answers are to other questions, or in another order; give another --out")
    return len(answered)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    asked = _parser().parse_args(arguments)
    try:
        words = {"file_name": asked.file_name, "prompt": asked.prompt, "suffix": asked.suffix}
        questions = read_questions(asked.questions, asked.pictures, **words)
        sampler = {"max_new_tokens": asked.max_new_tokens, "temperature": asked.temperature, "top_p": asked.top_p}
        settings = {"base": asked.base, "dtype": asked.dtype, **sampler}
        made = {
            "adapter": None if asked.adapter is None else _digest(asked.adapter),
            "questions": sha256_of(asked.questions),
            "pictures": _hash(file for one in questions for file in one.pictures),
            "words": words,
            "settings": settings,
            "seed": asked.seed,
        }
        more = {"device": asked.device, "sample_batch": asked.batch_size}
        count = answer(questions, asked.out, {**settings, **more}, asked.adapter, made)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{asked.out}: {len(questions)} answers, {count} of them new")
    return 0


def _digest(adapter: Path) -> str:
    if not adapter.is_dir():
        raise UserError(f"there is no LoRA folder {adapter}; name the folder 'adapter' of a run")
    return manifest_of(adapter, sorted(file.name for file in adapter.iterdir())).digest()


def _hash(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, each different one once."""
    return sha256_of("\n".join(map(sha256_of, dict.fromkeys(files))).encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.modalities.vlm.answer", description="A benchmark's questions answered by a base and its LoRA."
    )
    parser.add_argument(
        "questions", type=Path, help="JSON lines of id, question, images (see evaluation.vlm.score --questions)"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of id and response to write, or to go on with")
    parser.add_argument("--base", default="tiny", help="tiny (default), a hub id or a transformers folder")
    parser.add_argument("--adapter", type=Path, help="LoRA: the folder 'adapter' of a run; without it the base answers")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures (default the questions' own)")
    parser.add_argument("--file-name", default="{}", help="a picture's file by its name, such as COCO_val2014_{:0>12}.jpg")
    parser.add_argument("--prompt", default=CAPTION, help=f"what is asked where a question has no words (default {CAPTION!r})")
    parser.add_argument("--suffix", default="", help="added to every question, such as 'Answer yes or no.'")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=16, help="answers at once (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="keys sampled answers (default 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
