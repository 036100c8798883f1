"""Adapters of peft on the disk, in its own format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from polyalign.core.errors import UserError
from polyalign.core.references import adapter_layers, adapter_parameters, choose_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What peft's files put before the names of a network's modules, and peft's wrapper in the network itself, too."""

KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to start a LoRA (``init_lora_weights``) that leave the base as it is. Others (pissa, olora, corda, loftq, lora_ga) alter
its weights, and peft does so again whenever such a LoRA is put on."""


def save_adapter(network: Any, name: str, folder: Path) -> None:
    """Write the adapter ``name`` into ``folder``, as peft does. Equal weights give equal files."""
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(network, adapter_name=name, save_embedding_layers=False)
    config = copy.deepcopy(network.peft_config[name])
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # its order changes from process to process
        config.target_modules = sorted(config.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    plain = {PREFIX + key.removeprefix(PREFIX): tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(network: Any, folder: Path, name: str) -> None:
    """Put the LoRA in ``folder`` beside the network's other adapters, frozen and not chosen; everything else stays as it was.

    Raises:
        UserError: the network has no adapter to put it beside, or one of that name; no such files, weights in a pickle, no
            LoRA, one that changes the base, or weights for another base.
    """
    from peft import PeftModel
    from peft.utils import set_peft_model_state_dict

    layers = adapter_layers(network)
    if not layers or name in network.peft_config:
        raise UserError(
            f"{folder} is to be the adapter {name!r} beside another one on the same base, and the network has "
            f"{'one of that name already' if layers else 'none: set model.train to lora, or give a whole model'}"
        )
    tensors, config = _read(folder)
    prefix = PREFIX if isinstance(network, PeftModel) else ""
    tensors = {prefix + key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    chosen = layers[0].active_adapters[0]
    trained = {key: weight.requires_grad for key, weight in network.named_parameters()}
    try:
        with torch.random.fork_rng(devices=[]):  # peft fills the new matrices at random before they are read
            if isinstance(network, PeftModel):
                network.add_adapter(name, config)
            else:
                network.add_adapter(config, adapter_name=name)
        for weight in adapter_parameters(network, name):  # before they are read: a half would round them
            weight.data = weight.data.float()
        found = set_peft_model_state_dict(network, tensors, adapter_name=name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder} does not fit this base: {str(error).splitlines()[0]}") from error
    missing = [key for key in found.missing_keys if f".{name}" in key]
    if missing or found.unexpected_keys:
        odd = [*missing, *found.unexpected_keys]
        raise UserError(
            f"{folder} does not fit this base: {len(odd)} weights are in one of the two only, for instance {odd[0]}"
        )
    choose_adapter(network, chosen)
    for key, weight in network.named_parameters():
        weight.requires_grad_(trained.get(key, False))


def refuse_changed_base(config: Any, folder: Path) -> None:
    """Raises UserError for a LoRA that changes the base as it is put on: the base is the reference, and other adapters'."""
    if config.init_lora_weights not in KEEPS_BASE:
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights is {config.init_lora_weights!r}, which changes the base's own weights, and "
            "these are the reference. Convert it to an ordinary LoRA (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors and the configuration."""
    from peft import LoraConfig, PeftConfig

    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "its weights are in a pickle, which can run code when it is read" if pickled else "there is none"
        raise UserError(f"{folder}: a LoRA is a folder with {CONFIG} and {WEIGHTS}, and {why}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); it may be cut short") from error
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder / CONFIG}: describes a {type(config).__name__}; only LoRAs are loaded")
    refuse_changed_base(config, folder)
    config.inference_mode = True
    return tensors, config
