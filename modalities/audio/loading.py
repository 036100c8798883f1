"""Loading a model of :mod:`polyalign.modalities.audio.families` from a folder, the embedded base or a hub id.

Weights come from safetensors, or from pickles read with ``weights_only``. No code from a model's folder is ever run.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.audio.families import FAMILIES, family_of_folder
from polyalign.modalities.audio.parts import Parts
from polyalign.modalities.audio.settings import AudioModelSettings
from polyalign.modalities.checkpoint_files import PICKLES, hash_of

TINY_BASE = Path(__file__).parent / "tiny_base"
WANTED = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"]
"""Files that are fetched from a hub repository."""


def load(settings: AudioModelSettings) -> Model:
    """The model of ``settings.base``, frozen, in evaluation mode, on its device; ``parts["audio"]`` is its
    :class:`~polyalign.modalities.audio.parts.Parts`.

    Raises:
        UserError: nothing there, files or tensors missing, unreadable or dangerous weights, another kind of model, or a setting
            that contradicts the base.
    """
    folder, hub = _folder(settings)
    family = family_of_folder(folder)
    if settings.family not in (None, family):
        raise UserError(
            f"family is {settings.family}, and {settings.base} is of the family {family}; leave it out or correct it"
        )
    for key in ("checkpoint", "tokenizer"):
        if getattr(settings, key) is not None and family != "tango":
            raise UserError(f"{key} is set, and {settings.base} is of the family {family}; it is for Tango's layout only")
    parts = FAMILIES[family].open(folder, settings)
    parts.schedule.check(parts.prediction_type)
    device = device_of(settings)
    denoiser = parts.denoiser.requires_grad_(False).eval()
    nn.Module.to(denoiser, device, settings.weights_dtype)  # diffusers' own warns of layers to be kept in float32, also of none
    parts.codec.to(device)
    parts.text.to(device)
    return Model(network=denoiser, parts={"audio": parts}, identity=_identity(folder, settings, hub))


def parts_of(model: Model) -> Parts:
    """What a loaded model is made of."""
    return model.parts["audio"]


def device_of(settings: AudioModelSettings) -> torch.device:
    """The device of this process."""
    if settings.device != "auto":
        return torch.device(settings.device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _folder(settings: AudioModelSettings) -> tuple[Path, str | None]:
    """The folder of the base, and its identity where the hub gives one."""
    path = TINY_BASE if settings.base == "tiny" else Path(settings.base).expanduser()
    if path.is_dir():
        return path, None
    if path.exists() or settings.base.startswith((".", "/", "~")) or settings.base.count("/") != 1:
        raise UserError(
            f"base is {settings.base!r}: there is no such folder, and it is no hub id (owner/name). Allowed: tiny, a folder in "
            "Tango's layout or a diffusers folder, or a hub id of one"
        )
    try:
        folder = Path(snapshot_download(settings.base, revision=settings.revision, allow_patterns=WANTED))
    except (OSError, ValueError) as error:
        raise UserError(
            f"base {settings.base!r} could not be fetched from the model hub ({str(error).splitlines()[0]}). "
            "Check the name and the network, or give a folder that is on this machine."
        ) from error
    return folder, f"{settings.base}@{folder.name}"


def _identity(folder: Path, settings: AudioModelSettings, hub: str | None) -> str:
    """The base's name with its revision or the hash of its files, and what takes the place of parts of it."""
    name = "polyalign-tiny-audio" if settings.base == "tiny" else folder.resolve().name
    found = hub or f"{name}@sha256:{hash_of(_files(folder))}"
    for key in ("checkpoint", "tokenizer"):
        given = getattr(settings, key)
        if given is not None:
            place = Path(given).expanduser()
            found += f"+{key}:{hash_of(_files(place)) if place.exists() else given}"
    return found


def _files(place: Path) -> list[Path]:
    """What a model is read from: a file, or a folder's files and those of its sub-folders."""
    if place.is_file():
        return [place]
    endings = (".safetensors", ".json", ".model", ".txt", *PICKLES)
    return sorted(file for file in (*place.glob("*"), *place.glob("*/*")) if file.is_file() and file.suffix in endings)
