"""Opening the published checkpoints of LiDiff, ScoreLiDAR and Distillation-DPO by name, and saving ours in the same names.

A checkpoint is a Lightning file (``state_dict`` among other things), a plain file of tensors, or safetensors. The widths of the
networks are read off the tensors, so a narrow network opens like a full one.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyalign.core.errors import UserError, reason_of
from polyalign.modalities.lidar.minkunet import MinkGlobalEnc, MinkUNet, MinkUNetDiff

REFINEMENT_PREFIX = "model_refine."
_SHOWN = 5
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Layout:
    """Under which prefixes a project's files have the denoiser and the encoder of the scan."""

    denoiser: str
    encoder: str


LAYOUTS: Mapping[str, Layout] = {
    "distilled": Layout("generator.", "partial_enc."),
    "diffusion_dpo": Layout("DiffModel.", "DM_encoder."),
    "lidiff": Layout("model.", "partial_enc."),
}
"""``distilled``: the students of ScoreLiDAR and Distillation-DPO. ``diffusion_dpo``: LiDiff after Diffusion-DPO, from which
Distillation-DPO starts. ``lidiff``: LiDiff itself, and what :func:`save_completion` writes. Of several that a file has, the
first of this table is taken, as the projects' own code does."""


@dataclass(frozen=True)
class CompletionNetworks:
    """A denoiser and its encoder, in evaluation mode. ``unused`` are the names in the file that belong to neither: the teacher
    and assistants of a training run, say."""

    denoiser: MinkUNetDiff
    encoder: MinkGlobalEnc
    layout: str
    unused: tuple[str, ...]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name, on the CPU. Nothing in the file is run.

    Raises:
        UserError: no such file, a file cut short or of another kind, or one that holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}); it may be cut short") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, or is no checkpoint, and is not opened: {reason_of(error)}. If "
            "you trust it, load it elsewhere with torch.load(..., weights_only=False) and save its 'state_dict' as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({reason_of(error)}); it may be cut short") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} has no table of tensors: neither itself nor its 'state_dict' is one")
    return dict(tensors)


def open_completion(path: Path, layout: str | None = None) -> CompletionNetworks:
    """The denoiser and encoder in a checkpoint. Every tensor under their prefixes is used, and every one they need is there.

    Args:
        layout: one of :data:`LAYOUTS`; by default the first whose prefixes the file has.

    Raises:
        UserError: no such layout in the file, or tensors that are missing, unknown or of another shape, each by name.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"there is no checkpoint layout {layout!r}; there are {', '.join(LAYOUTS)}")
    tensors = read_tensors(path)
    present = [
        name for name, prefixes in LAYOUTS.items() if _has(tensors, prefixes.denoiser) and _has(tensors, prefixes.encoder)
    ]
    chosen = layout or (present[0] if present else None)
    if chosen not in present or chosen is None:
        known = "; ".join(f"{name}: {each.denoiser}* and {each.encoder}*" for name, each in LAYOUTS.items())
        raise UserError(
            f"{path} has not the tensors of {layout or 'any layout'} ({known}); its prefixes are {_prefixes(tensors)}"
        )
    prefixes = LAYOUTS[chosen]
    channels = _channels(path, tensors, prefixes.denoiser, up=True)
    encoder_channels = _channels(path, tensors, prefixes.encoder, up=False)
    denoiser = _fill(MinkUNetDiff(channels), path, tensors, prefixes.denoiser)
    encoder = _fill(MinkGlobalEnc(encoder_channels), path, tensors, prefixes.encoder)
    used = (prefixes.denoiser, prefixes.encoder)
    return CompletionNetworks(denoiser, encoder, chosen, tuple(name for name in tensors if not name.startswith(used)))


def open_refinement(path: Path) -> MinkUNet:
    """The refinement network in a checkpoint, in evaluation mode.

    Raises:
        UserError: as :func:`open_completion`.
    """
    tensors = read_tensors(path)
    if not _has(tensors, REFINEMENT_PREFIX):
        raise UserError(f"{path} has no refinement network ({REFINEMENT_PREFIX}*); its prefixes are {_prefixes(tensors)}")
    channels = _channels(path, tensors, REFINEMENT_PREFIX, up=True)
    outputs = _sized(path, tensors, f"{REFINEMENT_PREFIX}last.2.weight").shape[0]
    return _fill(MinkUNet(channels, channels_out=outputs), path, tensors, REFINEMENT_PREFIX)


def save_completion(path: Path, denoiser: nn.Module, encoder: nn.Module) -> None:
    """Write both as safetensors in LiDiff's names."""
    prefixes = LAYOUTS["lidiff"]
    save_file({**_named(denoiser, prefixes.denoiser), **_named(encoder, prefixes.encoder)}, path)


def save_refinement(path: Path, network: nn.Module) -> None:
    """Write a refinement network as safetensors in LiDiff's names."""
    save_file(_named(network, REFINEMENT_PREFIX), path)


def _named(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def _has(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _prefixes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({name.split(".", 1)[0] for name in tensors})) or "none, it is empty"


def _channels(path: Path, tensors: Mapping[str, Tensor], prefix: str, *, up: bool) -> tuple[int, ...]:
    """Channels of stem, stages and, with ``up``, the way up; without, as many zeros, which the encoder does not look at."""
    names = ["stem.0.kernel", *(f"stage{stage}.1.net.0.kernel" for stage in range(1, 5))]
    names += [f"up{stage}.0.net.0.kernel" for stage in range(1, 5)] if up else []
    found = [_sized(path, tensors, prefix + name).shape[-1] for name in names]
    return (*found, *[0] * (9 - len(found)))


def _sized(path: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors or tensors[name].ndim == 0:
        raise UserError(f"{path} lacks {name!r}, off which the width of the network is read")
    return tensors[name]


def _fill(network: Network, path: Path, tensors: Mapping[str, Tensor], prefix: str) -> Network:
    """The tensors under ``prefix`` put into the network, all of them."""
    given = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    wanted = network.state_dict()
    missing = [prefix + name for name in wanted if name not in given]
    unknown = [prefix + name for name in given if name not in wanted]
    misshapen = [
        f"{prefix}{name} is {tuple(given[name].shape)} and should be {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    complaints = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    told = [f"{len(names)} {what}: {_some(names)}" for what, names in complaints.items() if names]
    if told:
        raise UserError(f"{path} does not fit {type(network).__name__}; tensors {'; '.join(told)}")
    network.load_state_dict(given)
    return network.eval()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
