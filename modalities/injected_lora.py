"""LoRA in a network: adding one, saving it in peft's format and loading it back.

The layers are put into the network itself, without peft's wrapper around it: everything that reads the network (its head, its
configuration) finds it as it was.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyalign.core.adapter_files import refuse_changed_base
from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.core.references import adapter_layers
from polyalign.modalities.token_settings import TokenModelSettings

NAME = "default"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft's files put before the names of the network's modules."""


def add(
    network: Any, *, rank: int, alpha: float, targets: Sequence[str] | str, seed: int, dropout: float = 0.0, **extra: Any
) -> None:
    """Freeze the network and add a fresh float32 LoRA: A as peft draws it (Kaiming uniform), B zero, so its function is
    unchanged, bit for bit. ``targets`` are names of modules, or one regular expression of whole names; ``extra`` is for peft's
    LoraConfig.

    Raises:
        UserError: no module of the network has one of the target names, or there is a LoRA already.
    """
    if NAME in names(network):
        raise UserError("the network has a LoRA already; load the base anew, or continue with the one that is there")
    network.requires_grad_(False)
    named: list[str] | str = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  (peft says int and takes any number)
        lora_dropout=dropout,
        target_modules="all-linear" if named == ["all-linear"] else named,
        **extra,
    )
    linear = sorted({name.rsplit(".", 1)[-1] for name, part in network.named_modules() if isinstance(part, nn.Linear)})
    with _fixed_draws(seed_of(seed, "lora")):  # peft draws A from torch's global generator, on the CPU
        try:
            inject_adapter_in_model(config, network, NAME)
        except ValueError as error:
            raise UserError(
                f"the LoRA targets {named} do not fit this network ({str(error).splitlines()[0][:200]}). "
                f"Allowed: all-linear, or names of its modules; its linear layers are named {linear[:12]}"
            ) from error
    _in_float32(network, NAME)


def load(network: Any, folder: Path, name: str = NAME) -> None:
    """Put the LoRA that ``folder`` holds in peft's format onto the network, in float32 and ready to be trained on.

    Beside another one (``name``: a reference adapter) it is inactive and frozen, and the other stays as it was.

    Raises:
        UserError: no such files, not safetensors, no LoRA, or one for another network.
    """
    before = names(network)
    if name in before:
        raise UserError(f"the network has a LoRA named {name!r} already; load the base anew before loading another")
    config, tensors = read(folder)
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    with _fixed_draws(0):  # peft fills the new matrices at random before they are overwritten
        try:
            inject_adapter_in_model(config, network, name)
            found = set_peft_model_state_dict(network, _without_prefix(tensors), adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"the LoRA in {folder} does not fit this base: {str(error).strip().splitlines()[0]}") from error
    missing = [key for key in found.missing_keys if "lora_" in key and f".{name}." in key]
    if found.unexpected_keys or missing:
        wrong = [*found.unexpected_keys, *missing]
        raise UserError(
            f"the LoRA in {folder} does not fit this base: {len(wrong)} tensors have no place or are not there ({wrong[0]})"
        )
    _in_float32(network, name)
    _restore(network, _without_prefix(tensors), name)
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(key in trained if before else f".{name}." in key)
    if before:
        _activate(network, NAME)


def read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of a LoRA in peft's format.

    Raises:
        UserError: no such files, weights in a pickle, damaged ones, an adapter of another kind, or one that changes the base.
    """
    weights = folder / WEIGHTS_FILE
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"there is no LoRA in {folder}: {CONFIG_FILE} and {WEIGHTS_FILE} are expected there")
    if not weights.is_file():
        pickled = " (its weights are in adapter_model.bin, a pickle, which can run code)"
        there = pickled if (folder / "adapter_model.bin").is_file() else ""
        raise UserError(f"there is no {WEIGHTS_FILE} in {folder}{there}; LoRA weights are read from .safetensors files only")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(weights)
    except (SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"the LoRA in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder / CONFIG_FILE} describes a {type(config).__name__}; only LoRA is trained and loaded here")
    refuse_changed_base(config, folder)
    return config, tensors


def save(network: Any, folder: Path, *, base: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; ``base`` is the base's name in the first."""
    config = copy.copy(network.peft_config[NAME])
    config.base_model_name_or_path, config.inference_mode = base, True
    if not isinstance(config.target_modules, str):  # a set's order changes from process to process, and with it the file
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in state_dict(network).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def refuse_head(network: Any) -> None:
    """Raises UserError for a LoRA on the LM head. The likelihood multiplies with the head's weight itself, piece by piece, so
    that a LoRA beside it would go unseen."""
    head = network.get_output_embeddings()
    if any(layer is head for layer in adapter_layers(network)):
        raise UserError(
            "a LoRA on the LM head is not possible here: the head is applied in pieces of its own weight. Leave it out of the "
            "targets (all-linear leaves it out)."
        )


def add_beside_head(network: Any, settings: TokenModelSettings, targets: Sequence[str] | str) -> None:
    """As :func:`add`, on a language model, and never on its head.

    Raises:
        UserError: besides that function's, one of the targets is the LM head.
    """
    add(
        network,
        rank=settings.rank,
        alpha=settings.scale,
        targets=targets,
        seed=settings.seed,
        dropout=settings.dropout,
        task_type="CAUSAL_LM",
    )
    refuse_head(network)


def load_beside_head(network: Any, folder: Path, name: str = NAME) -> None:
    """As :func:`load`, on a language model.

    Raises:
        UserError: besides that function's, the LoRA is also on the LM head.
    """
    load(network, folder, name)
    refuse_head(network)


def names(network: Any) -> set[str]:
    """Names of the adapters on a network."""
    return set(getattr(network, "peft_config", {}))


def state_dict(network: nn.Module, name: str = NAME) -> dict[str, Tensor]:
    """The LoRA's tensors under peft's names without the adapter's name, on the CPU."""
    found: Any = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.detach().cpu() for key, tensor in found.items()}


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _in_float32(network: nn.Module, name: str) -> None:
    for key, parameter in network.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.float()


@torch.no_grad()
def _restore(network: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """The file's own numbers: peft may round them to the base's precision on the way in."""
    for key, parameter in network.named_parameters():
        exact = tensors.get(key.replace(f".{name}.", "."))
        if f".{name}." in key and exact is not None:
            parameter.copy_(exact)


def _activate(network: nn.Module, name: str) -> None:
    """Make ``name`` the adapter in use, without touching what is trained."""
    for layer in adapter_layers(network):
        layer._active_adapter = [name]


@contextmanager
def _fixed_draws(seed: int) -> Iterator[None]:
    """Torch's global generator at ``seed`` and as before afterwards, and none of peft's warnings of what it sees to by itself:
    layers of GPT-2 that have their weight the other way round, a second adapter, settings of its own for experts."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message=".*Already found a `peft_config`.*")
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*")
        yield
