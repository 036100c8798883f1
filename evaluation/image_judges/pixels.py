"""Pictures to a network's input, exactly as each judge was published, with Pillow and torch alone.

The image processors of transformers are not used: with torchvision they resize tensors, without it Pillow pictures, and the two
differ by up to 0.03 in normalised pixels, so a score would depend on what else is installed. Letters: B pictures, S the side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Preparation(Protocol):
    """Turns pictures of any size into (B, 3, S, S) float32."""

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor: ...


@dataclass(frozen=True)
class CentreCrop:
    """Bicubic resize (Pillow's, with its antialiasing) of the shorter side to ``resize``, the longer to
    floor(resize * long / short); the middle ``side`` x ``side``; values in [0, 1] less ``mean``, over ``std``.

    ``rounding`` says where the middle is when the margin is odd: ``floor`` as transformers' CLIPImageProcessor, ``round`` (half
    to even) as torchvision's CenterCrop, which OpenAI's and ImageReward's own preprocessing use.
    """

    resize: int = 224
    side: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rounding: Literal["floor", "round"] = "floor"

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return normalised(torch.stack([self._cropped(picture.convert("RGB")) for picture in pictures]), self.mean, self.std)

    def _cropped(self, picture: Image.Image) -> torch.Tensor:
        short = min(picture.size)
        width, height = (self.resize if side == short else int(self.resize * side / short) for side in picture.size)
        left, top = (self._margin(side) for side in (width, height))
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        return unit(resized.crop((left, top, left + self.side, top + self.side)))

    def _margin(self, side: int) -> int:
        spare = side - self.side
        return round(spare / 2) if self.rounding == "round" else spare // 2


@dataclass(frozen=True)
class LongestSide:
    """The picture as a tensor in [0, 1], its longer side resized to ``side`` by torch's bicubic interpolation, the rest filled
    with zeros evenly on both sides, then ``mean`` and ``std``: what HPSv2 does.

    torchvision's resize of tensors, which the published code calls, began to antialias by default with version 0.17, so
    published figures differ with the version of torchvision; ``antialias`` says it here.
    """

    side: int = 224
    antialias: bool = True
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return normalised(
            torch.stack([self._padded(unit(picture.convert("RGB"))) for picture in pictures]), self.mean, self.std
        )

    def _padded(self, pixels: torch.Tensor) -> torch.Tensor:
        sides = pixels.shape[-2:]
        scale = self.side / max(sides)
        if scale == 1.0 and sides[0] == sides[1]:
            return pixels
        height, width = (max(1, round(side * scale)) for side in sides)
        resized = torch.nn.functional.interpolate(
            pixels[None], size=(height, width), mode="bicubic", align_corners=False, antialias=self.antialias
        )[0]
        down, right = self.side - height, self.side - width
        return torch.nn.functional.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2))


def unit(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [0, 1] of an RGB picture."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)


def normalised(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pixels - mean) / std, channel by channel; (B, 3, S, S)."""
    centre, spread = (torch.tensor(values, dtype=pixels.dtype)[:, None, None] for values in (mean, std))
    return (pixels - centre) / spread


def of_folder(folder: Path, *, rounding: Literal["floor", "round"] = "floor") -> CentreCrop:
    """The preparation that a folder's ``preprocessor_config.json`` describes (a CLIP image processor's).

    Raises:
        UserError: the file is absent, or it describes another kind of preparation.
    """
    path = folder / "preprocessor_config.json"
    said = files.settings(path)
    steps = ("do_resize", "do_center_crop", "do_normalize", "do_rescale")
    skipped = [step for step in steps if said.get(step, True) is not True]
    size, crop = said.get("size", 224), said.get("crop_size", 224)
    resize = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = {crop["height"], crop["width"]} if isinstance(crop, dict) else {crop}
    if skipped or resize is None or len(sides) != 1 or said.get("resample", 3) != Image.Resampling.BICUBIC:
        raise UserError(
            f"{path} does not describe CLIP's preparation (bicubic resize of the shortest edge, square centre crop, rescale, "
            f"normalise): size {size}, crop_size {crop}, resample {said.get('resample', 3)}, "
            f"left out: {', '.join(skipped) or 'nothing'}"
        )
    return CentreCrop(
        resize=int(resize),
        side=int(sides.pop()),
        mean=tuple(said.get("image_mean", CLIP_MEAN)),
        std=tuple(said.get("image_std", CLIP_STD)),
        rounding=rounding,
    )
