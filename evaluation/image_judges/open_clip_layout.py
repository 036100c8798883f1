"""Checkpoints in open_clip's layout as transformers' CLIPModel, so that they open without the package open_clip.

The architecture is read off the tensors' shapes; only the number of heads is in no shape, and comes from the published widths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from transformers import CLIPConfig, CLIPModel

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files

HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}
"""Widths of an attention head in the picture towers ViT-H, ViT-g and ViT-bigG; in all other towers it is 64."""
IGNORED = ("attn_mask", "text.attn_mask")
"""Constants that some checkpoints carry."""
RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TOWERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
"""Matrices that open_clip multiplies from the right and transformers' linear layers from the left."""


def to_clip(weights: Mapping[str, torch.Tensor], what: str, *, quick_gelu: bool = False) -> CLIPModel:
    """The CLIPModel with an open_clip checkpoint's weights, in float32. ``quick_gelu`` is for OpenAI's own checkpoints; those
    of LAION, and HPSv2, use the exact GELU.

    Raises:
        UserError: the tensors are not those of an open_clip with two transformer towers.
    """
    weights = {name.removeprefix("text."): value.float() for name, value in weights.items() if name not in IGNORED}
    absent = sorted((TOWERS.keys() | PROJECTIONS.keys()) - weights.keys())
    if absent:
        raise UserError(
            f"{what} is not in open_clip's layout of a CLIP with a vision transformer: it lacks {', '.join(absent[:3])}"
        )
    model = CLIPModel(config_of(weights, quick_gelu=quick_gelu))
    files.fill(model, renamed(weights), what)
    return model


def renamed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors under transformers' names: fused query-key-value matrices split, projections transposed."""
    result: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if name in TOWERS:
            result[TOWERS[name]] = value
        elif name in PROJECTIONS:
            result[PROJECTIONS[name]] = value.T.contiguous()
        else:
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            block = RESBLOCK.fullmatch(name.removeprefix("visual."))
            result.update(_of_block(f"{tower}.encoder.layers.{block[1]}", block[2], value) if block else {name: value})
    return result


def _of_block(prefix: str, rest: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    part, _, kind = rest.rpartition(".")
    if part in PARTS:
        return {f"{prefix}.{PARTS[part]}.{kind}": value}
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.removeprefix("attn.in_proj_")
        names = [f"{prefix}.self_attn.{which}_proj.{kind}" for which in "qkv"]
        return dict(zip(names, (piece.clone() for piece in value.chunk(3)), strict=True))
    return {f"{prefix}.{rest}": value}


def config_of(weights: Mapping[str, torch.Tensor], *, quick_gelu: bool = False) -> CLIPConfig:
    """The architecture that the shapes of an open_clip checkpoint's tensors tell."""
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    positions = weights["visual.positional_embedding"].shape[0]
    vocabulary, text_width = weights["token_embedding.weight"].shape
    activation = "quick_gelu" if quick_gelu else "gelu"
    return CLIPConfig(
        projection_dim=weights["visual.proj"].shape[1],
        vision_config={
            **_tower(weights, "visual.", width, HEAD_WIDTH.get(width, 64)),
            "hidden_act": activation,
            "patch_size": patch,
            "image_size": patch * round((positions - 1) ** 0.5),
        },
        text_config={
            **_tower(weights, "", text_width, 64),
            "hidden_act": activation,
            "vocab_size": vocabulary,
            "max_position_embeddings": weights["positional_embedding"].shape[0],
            # The end token is the last of open_clip's vocabulary, the one before it starts a text.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
    )


def _tower(weights: Mapping[str, torch.Tensor], prefix: str, width: int, head: int) -> dict[str, int]:
    blocks = [RESBLOCK.fullmatch(name.removeprefix(prefix)) for name in weights if name.startswith(prefix)]
    inner = weights[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1 + max(int(block[1]) for block in blocks if block),
        "num_attention_heads": max(1, width // head),
    }
