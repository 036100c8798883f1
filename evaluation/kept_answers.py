"""Answers that were paid for, kept in a file: a run that failed or was killed asks only what it has not asked yet."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

from polyalign.core.errors import UserError
from polyalign.core.files import disk_full_explained

START = '{"question": "'


class KeptAnswers:
    """A file of lines ``{"question": HASH, "answer": TEXT}``, added to and never rewritten.

    Args:
        path: ends in ``.jsonl``; it may exist if it is such a file.

    Raises:
        UserError: another kind of file, which is left alone. Lines that a kill cut short are passed over.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if self.path.suffix != ".jsonl":
            raise UserError(f"answers is {str(path)!r}; a file whose name ends in .jsonl is needed")
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()
        self._torn = False
        if self.path.exists():
            self._read()

    @staticmethod
    def key(address: str, body: bytes) -> str:
        """What names a question: the address and every byte of the request."""
        return hashlib.sha256(address.encode() + b"\n" + body).hexdigest()

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def put(self, key: str, answer: str) -> None:
        """Keep an answer; it is in the file when this returns.

        Raises:
            UserError: the disk is full.
        """
        line = json.dumps({"question": key, "answer": answer}, ensure_ascii=False) + "\n"
        with self._lock, disk_full_explained(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line, self._torn = ("\n" + line if self._torn else line), True  # until it is whole on the disk
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(line)
            self._torn, self._known[key] = False, answer

    def _read(self) -> None:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")  # a line may be cut short inside a letter
        except OSError as error:
            raise UserError(f"answers: {self.path} cannot be read: {error}") from error
        *lines, last = text.split("\n")
        self._torn = last != ""
        for number, line in enumerate([*lines, last] if self._torn else lines, 1):
            try:
                entry = json.loads(line)
                self._known[str(entry["question"])] = str(entry["answer"])
            except (ValueError, KeyError, TypeError) as error:
                if line.startswith(START) or (line and START.startswith(line)):
                    continue  # a kill cut it short; a later run may have gone on after it
                raise UserError(
                    f"answers: {self.path} line {number} is no kept answer of a judge, so the file is left alone. Name another "
                    "file"
                ) from error
