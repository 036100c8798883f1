"""Language models and tokenizers from folders on this machine: safetensors only, no code of a folder's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files
from polyalign.evaluation.network_judge import quietly

READ = frozenset({".json", ".jinja", ".txt", ".model"})
"""Of a folder, besides its weights: configuration, tokenizer, chat template."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
"""Without any of these transformers would make an empty tokenizer of the model's kind."""
NOT_READ = frozenset({"generation_config.json", "trainer_state.json"})


def local_folder(where: Any, option: str) -> Path:
    """A folder that is on this machine.

    Raises:
        UserError: there is none of that name.
    """
    if not isinstance(where, str | Path) or not Path(where).expanduser().is_dir():
        raise UserError(f"{option} is {where!r}; a folder on this machine is needed, with config.json and .safetensors")
    return Path(where).expanduser()


def read_files(folder: Path, weights: Sequence[Path]) -> list[Path]:
    """All files of a folder that a score depends on, in a fixed order."""
    others = (path for path in folder.iterdir() if path.suffix in READ and path.is_file() and path.name not in NOT_READ)
    return [*sorted(others), *weights]


def identity(folder: Path, files: Sequence[Path]) -> str:
    """The folder's name, without those above it, and the hash of its files."""
    return weight_files.identity(str(folder), files)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not any(found for pattern in VOCABULARIES for found in folder.glob(pattern)):
        raise UserError(f"{folder} has no tokenizer: one of {', '.join(VOCABULARIES)} is expected there")
    try:
        with quietly():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def padded(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L) of rows of different length, padded on the right or on the left."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad_id), torch.zeros((len(rows), longest), dtype=torch.long)
    for place, row in enumerate(rows):
        part = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[place, part] = torch.tensor(row, dtype=torch.long)
        mask[place, part] = 1
    return ids, mask


def refuse_too_long(judge: str, length: int, positions: int | None, prompt: Any) -> None:
    """Raises UserError for a text of more tokens than a model has positions: nothing is cut."""
    if positions is not None and length > positions:
        raise UserError(
            f"the judge '{judge}': prompt and answer have {length} tokens and its model reads {positions} (prompt {prompt!r}). "
            "Nothing is cut: leave such prompts out, make answers shorter, or take a model that reads more"
        )
