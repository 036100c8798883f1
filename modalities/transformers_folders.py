"""Models of transformers from a hub id or a folder: what the modalities that train language models share.

Weights come from safetensors only, and no code from a model's folder is ever run. Dropout is switched off (and other noise of
training with it): policy and reference are compared under the same draws, and a mask drawn anew in each of the two passes
would make their first margin something else than zero. TRL's trainers do the same by default (``disable_dropout``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from polyalign.core.errors import UserError
from polyalign.core.optional import require
from polyalign.modalities.base_folders import local_folder

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


class Weights(Protocol):
    """What settings say of a model's weights: where they lie, in which precision, and how they are trained."""

    @property
    def base(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def weights_dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> str: ...
    @property
    def attention(self) -> str: ...
    @property
    def train(self) -> str: ...


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


def autocast(settings: Weights, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision of a float32 network; nothing where the weights already have the asked dtype."""
    dtype = getattr(torch, settings.dtype)
    return contextlib.nullcontext() if settings.weights_dtype == dtype else torch.autocast(device.type, dtype=dtype)


def device_of(settings: Weights) -> torch.device:
    """The device of this process."""
    if settings.device != "auto":
        return torch.device(settings.device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def place_of(settings: Weights, tiny_base: Path, tiny_name: str) -> tuple[Path, str, str | None]:
    """The folder of ``settings.base``, its name and, for a hub repository, the commit. ``tiny_base`` is the folder of the
    embedded base, which is called ``tiny_name``.

    Raises:
        UserError: there is no such folder, or it could not be fetched.
    """
    if settings.base == "tiny":
        return tiny_base, tiny_name, None
    path = local_folder(settings.base)
    if path is not None:
        return path, path.resolve().name, None
    folder = download(settings)
    return folder, settings.base, folder.name


def download(settings: Weights) -> Path:
    """A hub repository's folder; its name is the commit.

    Raises:
        UserError: it could not be fetched.
    """
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(settings.base, revision=settings.revision, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(
            f"base {settings.base!r}: there is no such folder, and it could not be fetched from the model hub "
            f"({first_line(error)}). Check the name and the network, or give a folder that is on this machine."
        ) from error


def model_hash(folder: Path, *more: str) -> str:
    """First 16 hexadecimal digits of SHA-256 over what a model's scores depend on, names and bytes: weights, configuration,
    tokenizer, and the files of the names ``more``."""
    names = ("config.json", *TOKENIZER_FILES, *more)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".model") or file.name in names)
    return _hash(files)


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]


def config_without_noise(folder: Path) -> tuple[PretrainedConfig, dict[str, float]]:
    """The configuration without dropout, and what it said of dropout, by dotted key.

    Raises:
        UserError: it is none, or one of a model that brings its own code.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder / 'config.json'} describes no model that transformers knows ({first_line(error)}). Models that bring "
            "code of their own are not opened."
        ) from error
    return config, _silenced(config)


def _silenced(config: PretrainedConfig, prefix: str = "") -> dict[str, float]:
    """Switch off the dropout of a configuration and of those inside it; what it was."""
    noise: dict[str, float] = {}
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            noise |= _silenced(value, f"{prefix}{key}.")
        elif any(part in key for part in NOISE) and isinstance(value, float) and value > 0.0:
            noise[prefix + key] = value
            setattr(config, key, 0.0)
    return noise


def with_noise(config: dict[str, Any], noise: Mapping[str, float]) -> dict[str, Any]:
    """A configuration's JSON with the dropout that :func:`config_without_noise` took away."""
    for key, value in noise.items():
        *parts, name = key.split(".")
        inner = config
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return config


def read_network(auto: Any, folder: Path, config: PretrainedConfig, settings: Weights) -> Any:
    """The network in ``folder``, frozen, in evaluation mode, on its device.

    Args:
        auto: transformers' class that opens it, ``AutoModelForCausalLM`` or another.

    Raises:
        UserError: damaged or missing weights, a revision of a folder, another kind of model, 4 bits without CUDA, or an
            attention that the model does not have.
    """
    device = device_of(settings)
    if settings.revision is not None and Path(settings.base).expanduser().is_dir():
        raise UserError(f"revision is {settings.revision!r}, but base is a folder on this machine; leave it out")
    options: dict[str, Any] = {"dtype": settings.weights_dtype, "attn_implementation": settings.attention}
    if settings.train == "qlora":
        options |= {"quantization_config": _four_bits(settings, device), "device_map": {"": device}}
    try:
        network, found = auto.from_pretrained(
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
        raise UserError(f"the model in {folder} cannot be read: {first_line(error)}") from error
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


def _four_bits(settings: Weights, device: torch.device) -> Any:
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
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )


def read_template(file: Path) -> tuple[str, str]:
    """A chat template and its hash.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = file.read_bytes()
        return content.decode("utf-8"), hashlib.sha256(content).hexdigest()[:16]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template is {file}, which cannot be read as a text file in UTF-8 ({error})") from error


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES) or any(folder.glob("*.model"))


def refuse_larger_tokenizer(network: Any, tokenizer: Any, folder: Path) -> None:
    """Raises UserError where the tokenizer has tokens that the model has no embedding for."""
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model has embeddings for {rows}: they do not "
            "belong together"
        )


def tokenizer_parts(network: Any, tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer puts before a text (``begin``), what ends an answer (``eos_ids``), all special tokens
    (``special_ids``), and an id for padding (``pad_id``)."""
    ends = eos_ids(network, tokenizer)
    pad_id = tokenizer.pad_token_id
    special = [token for token, content in getattr(tokenizer, "added_tokens_decoder", {}).items() if content.special]
    return {
        "tokenizer": tokenizer,
        "begin": _begin(tokenizer),
        "eos_ids": ends,
        "special_ids": frozenset([*tokenizer.all_special_ids, *special, *ends]),
        "pad_id": pad_id if pad_id is not None else (ends or (0,))[0],  # any id will do: what is padding, the masks say
    }


def eos_ids(network: Any, tokenizer: Any) -> tuple[int, ...]:
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


def checkpoint_activations(network: Any) -> None:
    """By the name that transformers has for it since 5.x, or by the older one.

    Raises:
        UserError: the model cannot.
    """
    try:
        if hasattr(network, "activation_checkpointing_enable"):
            network.activation_checkpointing_enable()
        else:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing is not possible with this model ({error}); leave it out") from error


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
