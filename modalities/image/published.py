"""A trained network published alone: ``unet/`` (or ``transformer/``) of a diffusers folder and nothing else, as Diffusion-DPO's
are (mhdang/dpo-sd1.5-text2image-v1, mhdang/dpo-sdxl-text2image-v1). It takes the place of a base's own network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from polyalign.core.errors import UserError
from polyalign.modalities.checkpoint_files import PICKLES, hash_of, refuse_code
from polyalign.modalities.image.families import Family
from polyalign.modalities.image.settings import ImageModelSettings

FREE = ("sample_size", "dropout", "upcast_attention", "attention_type")
"""Keys of a configuration that two networks of one kind may differ in, besides those that only one of them has."""


def place(pipeline: Any, family: Family, settings: ImageModelSettings) -> str:
    """Put the network that ``settings.network`` names into the pipeline; returns its identity.

    Raises:
        UserError: there is none, it is not readable or dangerous, or it is one for another kind of base.
    """
    assert settings.network is not None  # the caller asked
    folder, name = _found(settings.network, family)
    own = getattr(pipeline, family.network)
    _refuse_other_kind(folder, own, settings)
    weights = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", *PICKLES))
    if not any(file.suffix == ".safetensors" for file in weights):
        for file in weights:
            refuse_code(file)
    try:
        network = type(own).from_pretrained(folder, torch_dtype=settings.weights_dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the network in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error
    pipeline.register_modules(**{family.network: network.to(own.device)})
    return name if name.count("@") else f"{name}@sha256:{hash_of(weights)}"


def _found(given: str, family: Family) -> tuple[Path, str]:
    """The folder with config.json and weights, and what to call it."""
    path = Path(given).expanduser()
    if path.is_dir():
        inner = path / family.network
        if (inner / "config.json").is_file():
            return inner, path.resolve().name
        if (path / "config.json").is_file():
            return path, path.resolve().name
        raise UserError(f"network is {given}: neither {family.network}/config.json nor config.json is in that folder")
    if given.startswith((".", "/", "~")) or given.count("/") != 1:
        raise UserError(
            f"network is {given!r}: there is no such folder, and it is no hub id (owner/name). Allowed: a folder or hub id "
            f"with {family.network}/ in it"
        )
    wanted = [f"{family.network}/{name}" for name in ("config.json", "*.safetensors", "*.safetensors.index.json")]
    try:
        folder = Path(snapshot_download(given, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise UserError(
            f"network {given!r} could not be fetched from the model hub ({str(error).splitlines()[0]}). "
            "Check the name and the connection, or give a folder that is on this machine."
        ) from error
    if not (folder / family.network / "config.json").is_file():
        raise UserError(f"the hub repository {given} has no {family.network}/config.json, so no network for this base")
    return folder / family.network, f"{given}@{folder.name}"


def _refuse_other_kind(folder: Path, own: torch.nn.Module, settings: ImageModelSettings) -> None:
    """Compare configurations, since networks of other sizes could load and only fail, or answer nonsense, later."""
    try:
        given = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is no configuration of a network ({error})") from error
    expected: dict[str, Any] = dict(own.config)  # type: ignore[arg-type]  (diffusers' ConfigMixin)
    kind = type(own).__name__
    if given.get("_class_name", kind) != kind:
        raise UserError(f"network: {folder} is a {given['_class_name']}, and {settings.base} has a {kind}")
    for key in sorted(given.keys() & expected.keys()):
        if not key.startswith("_") and key not in FREE and _plain(given[key]) != _plain(expected[key]):
            raise UserError(
                f"network: {folder} was made for another kind of base: its {key} is {given[key]}, that of {settings.base} is "
                f"{expected[key]}"
            )


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON has it, without tuples; older files write null where newer ones write false."""
    return json.loads(json.dumps(value)) or None
