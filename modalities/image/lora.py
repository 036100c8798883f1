"""LoRA on the network: adding one, saving it and loading it back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.modalities.image.families import FAMILIES, family_named, network_of
from polyalign.modalities.image.loading import quiet
from polyalign.modalities.image.settings import ImageModelSettings

NAME = "default"
FILE = "pytorch_lora_weights.safetensors"


def add(network: Any, settings: ImageModelSettings, targets: Sequence[str]) -> None:
    """Freeze the network and add a fresh float32 LoRA to its layers named like ``targets``: A gaussian, B zero, so its function
    is unchanged, bit for bit.

    Raises:
        UserError: no module of the network has one of the target names, or it has a LoRA already.
    """
    if NAME in names(network):
        raise UserError("the network has a LoRA already; load the base anew, or continue with the one that is there")
    network.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale,  # type: ignore[arg-type]  (peft says int and takes any number)
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws A from torch's global generator, on the CPU
        torch.manual_seed(seed_of(settings.seed, "lora"))
        try:
            network.add_adapter(config, adapter_name=NAME)
        except ValueError as error:
            raise UserError(
                f"no module of the network is named like the LoRA targets {list(targets)} ({error}). "
                "Usual targets: to_q, to_k, to_v, to_out.0, proj_in, proj_out, ff.net.0.proj, ff.net.2, and for SD3 and FLUX "
                "add_q_proj, add_k_proj, add_v_proj, to_add_out"
            ) from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def names(network: Any) -> set[str]:
    """Names of the adapters on a network."""
    return set(getattr(network, "peft_config", {}))


def state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The LoRA's tensors under peft's names without the adapter's name, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in get_peft_model_state_dict(network, adapter_name=NAME).items()}


def _prefix(pipeline: Any) -> str:
    """What the names of a LoRA's tensors begin with in a file: ``unet`` or ``transformer``."""
    return FAMILIES[family_named(type(pipeline).__name__) or ""].network


def save(pipeline: Any, network: Any, folder: Path) -> None:
    """Write ``pytorch_lora_weights.safetensors`` as diffusers does. The metadata carries rank and alpha, so that
    ``load_lora_weights`` scales it as it was trained; programs that ignore metadata are right where alpha is rank."""
    metadata = network.peft_config[NAME].to_dict()
    # peft keeps the targets as a set, whose order changes from process to process and with it the file's hash.
    metadata = {name: sorted(value) if isinstance(value, set) else value for name, value in metadata.items()}
    prefix = _prefix(pipeline)
    layers = {f"{prefix}_lora_layers": state_dict(network), f"{prefix}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(folder, **layers, safe_serialization=True)
    _settle_header(folder / FILE)


def _settle_header(file: Path) -> None:
    """Rewrite a safetensors file's header with its metadata in order: safetensors writes it in an order that changes from run
    to run, and equal weights would not be equal files."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def load(pipeline: Any, file: Path, name: str = NAME) -> None:
    """Put the LoRA in ``file`` (or in the folder that holds it) onto the pipeline's network, in float32.

    Beside another one (``name``: a reference adapter) it is inactive and frozen, and the other stays as it was.

    Raises:
        UserError: no such file, not safetensors, not a LoRA of this kind of network, or one for a network of other sizes.
    """
    path = file / FILE if file.is_dir() else file
    tensors = _tensors(path)
    network, prefix = network_of(pipeline), _prefix(pipeline)
    before = names(network)
    if name in before:
        raise UserError(f"the network has a LoRA named {name!r} already; load the base anew before loading another")
    with quiet(), torch.random.fork_rng(devices=[]):  # peft fills the new matrices at random before it reads the file
        try:
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{path} does not fit this base: {str(error).splitlines()[0]}") from error
    if name not in names(network):
        raise UserError(f"{path} holds nothing for a {type(network).__name__}; its tensors are named like {list(tensors)[:3]}")
    if before:
        network.set_adapter(NAME)
    for key, parameter in network.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.float()
            exact = tensors.get(f"{prefix}." + key.replace(f".{name}.", "."))
            if exact is not None:  # diffusers rounds to the base's precision; what was trained in float32 is not to be rounded
                parameter.data.copy_(exact)
            if before:
                parameter.requires_grad_(False)


def _tensors(path: Path) -> dict[str, Tensor]:
    """What a LoRA file holds."""
    if not path.is_file():
        raise UserError(f"there is no LoRA file {path}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: LoRA weights are read from .safetensors files only; pickles (.bin, .pt) can run code")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); it may be cut short") from error
    if not any("lora" in name for name in found):
        raise UserError(f"{path} holds no LoRA: its tensors are named like {list(found)[:3]}")
    return found
