"""Loading a causal language model of transformers from a hub id or a folder, or the embedded base.

Weights come from safetensors only, and no code from a model's folder is ever run. Dropout is switched off (and other noise of
training with it): policy and reference are compared under the same draws, and a mask drawn anew in each of the two passes
would make their first margin something else than zero. TRL's trainers do the same by default (``disable_dropout``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.optional import require
from polyalign.modalities.text.base_folder import TINY_BASE, local_folder, refuse_what_is_no_base
from polyalign.modalities.text.settings import DTYPES, TextModelSettings

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
NOISE = ("drop", "jitter")
"""Parts of the names of configuration values that make a forward pass in training mode random."""


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
    folder, tokenizer = base.folder, base.tokenizer
    with quiet():
        network = _network(folder, base.config, settings)
    _check(network, tokenizer, folder)
    return Model(network, {**_parts(network, tokenizer), "config_noise": base.noise}, base.identity)


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
    folder, name, version = _place(settings)
    refuse_what_is_no_base(folder)
    identity = f"{name}@{version or f'sha256:{_hash(_files(folder))}'}"
    with quiet():
        config, noise = _config(folder)
        tokenizer = _tokenizer(folder)
    if settings.chat_template is not None:
        tokenizer.chat_template, digest = _template(Path(settings.chat_template).expanduser())
        identity += f"+template@sha256:{digest}"
    return Base(folder, config, noise, tokenizer, identity)


def plain(network: nn.Module) -> Any:
    """The network itself, out of a data-parallel wrapper."""
    return getattr(network, "module", network)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars and remarks."""
    loud, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if loud:
            transformers_logging.enable_progress_bar()


def autocast(settings: TextModelSettings, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision of a float32 network; nothing where the weights already have the asked dtype."""
    if settings.weights_dtype == DTYPES[settings.dtype]:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[settings.dtype])


def device_of(settings: TextModelSettings) -> torch.device:
    """The device of this process."""
    if settings.device != "auto":
        return torch.device(settings.device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _parts(network: Any, tokenizer: Any) -> dict[str, Any]:
    """What ``load`` says of a model's parts."""
    eos_ids = _eos_ids(network, tokenizer)
    pad_id = tokenizer.pad_token_id
    special = [token for token, content in getattr(tokenizer, "added_tokens_decoder", {}).items() if content.special]
    return {
        "tokenizer": tokenizer,
        "begin": _begin(tokenizer),
        "eos_ids": eos_ids,
        "special_ids": frozenset([*tokenizer.all_special_ids, *special, *eos_ids]),
        "pad_id": pad_id if pad_id is not None else (eos_ids or (0,))[0],  # any id will do: what is padding, the masks say
        "positions": getattr(network.config, "max_position_embeddings", None),
    }


def _place(settings: TextModelSettings) -> tuple[Path, str, str | None]:
    """Folder, name and, for a hub repository, the commit."""
    if settings.base == "tiny":
        return TINY_BASE, "polyalign-tiny", None
    path = local_folder(settings.base)
    if path is not None:
        return path, path.resolve().name, None
    folder = _download(settings)
    return folder, settings.base, folder.name


def _download(settings: TextModelSettings) -> Path:
    """A hub repository's folder; its name is the commit."""
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(settings.base, revision=settings.revision, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(
            f"base {settings.base!r}: there is no such folder, and it could not be fetched from the model hub "
            f"({_first_line(error)}). Check the name and the network, or give a folder that is on this machine."
        ) from error


def _files(folder: Path) -> list[Path]:
    """What a model's scores depend on, in a fixed order: weights, configuration, tokenizer."""
    names = ("config.json", *TOKENIZER_FILES)
    return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".model") or file.name in names)


def _hash(files: Iterable[Path]) -> str:
    """First 16 hexadecimal digits of SHA-256 over the files' names and bytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]


def _config(folder: Path) -> tuple[PretrainedConfig, dict[str, float]]:
    """The configuration without dropout, and what it said of dropout."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder / 'config.json'} describes no model that transformers knows ({_first_line(error)}). Models that bring "
            "code of their own are not opened."
        ) from error
    noise = {
        key: value
        for key, value in vars(config).items()
        if any(part in key for part in NOISE) and isinstance(value, float) and value > 0.0
    }
    for key in noise:
        setattr(config, key, 0.0)
    return config, noise


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not any(folder.glob("*.model")):
        raise UserError(
            f"{folder} has no tokenizer: tokenizer.json (or tokenizer_config.json, or a .model file) is expected there. "
            "Copy the files of the model it was made from."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error


def _network(folder: Path, config: PretrainedConfig, settings: TextModelSettings) -> Any:
    device = device_of(settings)
    if settings.revision is not None and Path(settings.base).expanduser().is_dir():
        raise UserError(f"revision is {settings.revision!r}, but base is a folder on this machine; leave it out")
    options: dict[str, Any] = {"dtype": settings.weights_dtype, "attn_implementation": settings.attention}
    if settings.train == "qlora":
        options |= {"quantization_config": _four_bits(settings, device), "device_map": {"": device}}
    try:
        network, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  (with loading info it is a pair)
            folder,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if "attention implementation" in str(error):
            raise UserError(f"the model in {folder} has no attention: {settings.attention}; set attention: eager") from error
        raise UserError(f"the model in {folder} cannot be read: {_first_line(error)}") from error
    if found["missing_keys"]:  # transformers would fill them at random and go on
        names = sorted(found["missing_keys"])
        raise UserError(
            f"{folder} is not a whole {type(network).__name__}: {len(names)} of its weights are missing ({names[0]}). It "
            "may be another kind of model, or a download that is not complete."
        )
    _without_noise(network)
    network.requires_grad_(False).eval()
    return network if settings.train == "qlora" else network.to(device)


def _without_noise(network: nn.Module) -> None:
    """Dropout off where the configuration's values did not reach: constants, and values kept in a part's own configuration."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and value > 0.0 and any(part in key for part in NOISE):
                setattr(module, key, 0.0)


def _four_bits(settings: TextModelSettings, device: torch.device) -> Any:
    """QLoRA's storage: NF4 with double quantisation (arXiv 2305.14314)."""
    if device.type != "cuda":
        raise UserError(
            f"train is qlora, whose weights of 4 bits need a GPU with CUDA, and the device is {device.type}. "
            "Use train: lora, with dtype: bfloat16 if memory is short."
        )
    require("bitsandbytes", extra="cuda", purpose="train: qlora")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[settings.dtype],
    )


def _template(file: Path) -> tuple[str, str]:
    """A chat template and its hash."""
    try:
        content = file.read_bytes()
        return content.decode("utf-8"), hashlib.sha256(content).hexdigest()[:16]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template is {file}, which cannot be read as a text file in UTF-8 ({error})") from error


def _check(network: Any, tokenizer: Any, folder: Path) -> None:
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model has embeddings for {rows}: they do not "
            "belong together"
        )


def _eos_ids(network: Any, tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer: the tokenizer's end-of-sequence token, then those of the model's generation settings."""
    rows = network.get_input_embeddings().weight.shape[0]
    found = [tokenizer.eos_token_id]
    for config in (getattr(network, "generation_config", None), network.config):
        value = getattr(config, "eos_token_id", None)
        found += value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(int(value) for value in found if value is not None and value < rows))


def _begin(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts it before a text by itself."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a").input_ids[:1] == [begin] else []


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
