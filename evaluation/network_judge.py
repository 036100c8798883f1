"""What the judges that hold a network have in common: options, batches, and the weights' hash in the version."""

from __future__ import annotations

import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class NetworkJudge(ABC):
    """A judge that scores outputs in batches with a network.

    Making one checks its options and reads nothing; the weights are found, hashed and read at the first score, or when
    ``version`` is asked for. Same weights, outputs and batch size on the same machine give the same scores.

    Args:
        batch_size: outputs a batch.
        device: ``auto`` (the GPU if there is one) or a torch device.
        dtype: of the weights; what a score is computed from is brought to float32 first.
        label: the judge's name in scores and reports, to tell two of a kind apart; null is the kind's own.

    Raises:
        UserError: an option is none of the allowed.
    """

    name: str
    formula: str
    """Version of the formula and preprocessing; changes when a score would."""
    sources: Sequence[str | None] = ()
    """What the options name as places of weights, tokenizers and configurations."""

    def __init__(self, *, batch_size: int = 16, device: str = "auto", dtype: str = "float32", label: str | None = None):
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise UserError(f"the judge '{self.name}': batch_size is {batch_size!r}; a whole number from 1 is needed")
        if dtype not in DTYPES:
            raise UserError(f"the judge '{self.name}': dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
        self.batch_size, self.dtype, self.device = batch_size, DTYPES[dtype], device_of(self.name, device)
        self.name = label or self.name

    @cached_property
    def version(self) -> str:
        """The formula's version and the weights' names and hashes: ``1 PickScore_v1@sha256:...``."""
        return f"{self.formula} {self.weights()}"

    def local_files(self) -> list[Path]:
        """The files on this machine that a score depends on; none of what would come from the hub."""
        return [path for where in self.sources if where is not None for path in files.local(where)]

    @abstractmethod
    def weights(self) -> str:
        """Names and hashes of the weight files. They are found, or fetched from the hub, but not opened."""

    @abstractmethod
    def score_batch(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> torch.Tensor:
        """(B,) scores of one batch."""

    def score(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> list[float]:
        """A score for each output; ``conditions[i]["prompt"]`` is what output i was made from."""
        scores: list[float] = []
        for conditions_part, outputs_part in batches(conditions, outputs, self.batch_size):
            with torch.inference_mode():
                scores += self.score_batch(conditions_part, outputs_part).float().tolist()
        return scores


def batches(
    conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Any], size: int
) -> Iterator[tuple[Sequence[Mapping[str, Any]], Sequence[Any]]]:
    """Conditions and outputs, ``size`` at a time.

    Raises:
        ValueError: their numbers differ.
    """
    if len(conditions) != len(outputs):
        raise ValueError(f"{len(outputs)} outputs for {len(conditions)} conditions")
    for start in range(0, len(outputs), size):
        yield conditions[start : start + size], outputs[start : start + size]


def prompts_of(conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The prompt of each condition."""
    return [str(condition["prompt"]) for condition in conditions]


def device_of(judge: str, device: str) -> torch.device:
    """The device an option names.

    Raises:
        UserError: torch knows no such device, or it is a GPU and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"the judge '{judge}': device is {device!r}; give auto, cpu, cuda or cuda:1") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"the judge '{judge}': device is {device!r} and torch sees no GPU here; give auto or cpu")
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and loading tables: what is missing is refused by the caller, with a message; and
    without its warning that peft asks for an attribute by its old name."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def pretrained(kind: Any, folder: Path, *, safetensors: bool = False, **options: Any) -> Any:
    """The model of a folder in transformers' layout, of the class ``kind``, in float32.

    Args:
        safetensors: take weights from safetensors alone.
        options: further arguments of ``from_pretrained``.

    Raises:
        UserError: unreadable, or weights are missing, which transformers would fill with noise.
    """
    files.weight_files(folder, safetensors=safetensors)  # says so if there are none
    if safetensors:
        options["use_safetensors"] = True
    options |= {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    try:
        with quietly():
            model, info = kind.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"the {kind.__name__} in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error
    missing = sorted(name for name in info["missing_keys"] if not name.endswith("position_ids"))
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{folder} is no whole {kind.__name__}: it lacks {', '.join(missing[:3])}{rest}")
    return model
