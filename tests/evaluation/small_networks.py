"""Tiny random weights in the layouts of EfficientNet-Lite0 and MiniLM."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

KERNELS = (3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3)
WIDTHS = (4, 6, 6, 8, 8, 10, 10, 10, 12, 12, 12, 14, 14, 14, 14, 16)
HEAD, CLASSES = 20, 7


def lite_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """EfficientNet-Lite0's names and kernels, an eighth of its widths."""
    torch.manual_seed(seed)
    found: dict[str, torch.Tensor] = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int) -> None:
        found[name] = torch.randn(outputs, inputs, kernel, kernel) * (2 / (inputs * kernel * kernel)) ** 0.5

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = torch.rand(width) + 0.5, torch.randn(width) * 0.2
        found[f"{name}.running_mean"], found[f"{name}.running_var"] = torch.randn(width) * 0.1, torch.rand(width) + 0.5
        found[f"{name}.num_batches_tracked"] = torch.tensor(1)

    conv("_conv_stem.weight", 4, 3, 3)
    norm("_bn0", 4)
    before = 4
    for place, (kernel, width) in enumerate(zip(KERNELS, WIDTHS, strict=True)):
        block, inner = f"_blocks.{place}", before if place == 0 else 3 * before
        if place:
            conv(f"{block}._expand_conv.weight", inner, before, 1)
            norm(f"{block}._bn0", inner)
        conv(f"{block}._depthwise_conv.weight", inner, 1, kernel)
        norm(f"{block}._bn1", inner)
        conv(f"{block}._project_conv.weight", width, inner, 1)
        norm(f"{block}._bn2", width)
        before = width
    conv("_conv_head.weight", HEAD, before, 1)
    norm("_bn1", HEAD)
    found["_fc.weight"], found["_fc.bias"] = torch.randn(CLASSES, HEAD), torch.randn(CLASSES)
    return found


def save_lite(path: Path, seed: int = 0) -> Path:
    torch.save(lite_weights(seed), path)
    return path


def save_minilm(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "green", "circle", "square", "cross"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    return folder
