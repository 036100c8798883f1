"""Loading a causal language model of transformers from a hub id or a folder, or the embedded base. How weights are read and
dropout switched off stands in :mod:`polyalign.modalities.transformers_folders`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.base_folders import refuse_what_is_no_base
from polyalign.modalities.text.config import TINY_BASE
from polyalign.modalities.text.settings import TextModelSettings
from polyalign.modalities.transformers_folders import (
    autocast,
    checkpoint_activations,
    config_without_noise,
    device_of,
    first_line,
    has_tokenizer,
    model_hash,
    place_of,
    plain,
    quiet,
    read_network,
    read_template,
    refuse_larger_tokenizer,
    tokenizer_parts,
)

__all__ = ["TINY_BASE", "Base", "autocast", "checkpoint_activations", "device_of", "load", "open_base", "plain", "quiet"]


def load(settings: TextModelSettings) -> Model:
    """The model of ``settings.base``, frozen, in evaluation mode, on its device.

    ``parts``: ``tokenizer``; ``begin``, what it puts before a text; ``eos_ids``, what ends an answer; ``special_ids``, these
    and all other special tokens; ``pad_id``; ``positions``, how many the model has, or None; ``config_noise``, the dropout
    values that the base's configuration had.

    Raises:
        UserError: nothing there, no tokenizer, weights in pickles or damaged, code of its own, another kind of model, or 4 bits
        without CUDA.
    """
    base = open_base(settings)
    with quiet():
        network = read_network(AutoModelForCausalLM, base.folder, base.config, settings)
    refuse_larger_tokenizer(network, base.tokenizer, base.folder)
    positions = getattr(network.config, "max_position_embeddings", None)
    parts = {**tokenizer_parts(network, base.tokenizer), "positions": positions, "config_noise": base.noise}
    return Model(network, parts, base.identity)


@dataclass(frozen=True)
class Base:
    """A base before its weights are read: where it lies, its configuration without dropout, the dropout values that this had,
    its tokenizer with the chat template of the settings, and its name with the hash of its content."""

    folder: Path
    config: PretrainedConfig
    noise: dict[str, float]
    tokenizer: Any
    identity: str


def open_base(settings: TextModelSettings) -> Base:
    """The base of ``settings`` without its weights.

    Raises:
        UserError: as ``load``.
    """
    folder, name, version = place_of(settings, TINY_BASE, "polyalign-tiny")
    refuse_what_is_no_base(folder)
    identity = f"{name}@{version or f'sha256:{model_hash(folder)}'}"
    with quiet():
        config, noise = config_without_noise(folder)
        tokenizer = _tokenizer(folder)
    if settings.chat_template is not None:
        tokenizer.chat_template, digest = read_template(Path(settings.chat_template).expanduser())
        identity += f"+template@sha256:{digest}"
    return Base(folder, config, noise, tokenizer, identity)


def _tokenizer(folder: Path) -> Any:
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer: tokenizer.json (or tokenizer_config.json, or a .model file) is expected there. "
            "Copy the files of the model it was made from."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
