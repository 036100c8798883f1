"""ImageReward (Xu et al., arXiv 2304.05977), natively on transformers' BLIP classes: its own package does not run with
transformers 5.

The checkpoint's tensors are BLIP's own: ``blip.visual_encoder.*`` (a ViT as in timm), ``blip.text_encoder.*`` (BERT with
cross-attention), ``mlp.layers.*``. Letters: B pictures, P patches and one class token, W the picture tower's width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.image_judges import pixels
from polyalign.evaluation.image_judges.heads import LinearHead
from polyalign.evaluation.network_judge import NetworkJudge, prompts_of

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Of the raw rewards on the paper's validation set; published with the weights."""
TOKENS = 35
"""Every prompt is cut or padded to this."""
HEAD = 64
"""Width of an attention head of the picture tower (ViT-L: 1024 in 16 heads)."""
PICTURE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection"}


class ImageRewardNetwork(nn.Module):
    """r = (MLP(h) - 0.16717...) / 1.03334...: h the first text state of a BERT that attends to the picture's patches."""

    def __init__(self, picture: BlipVisionModel, text: BlipTextModel, head: LinearHead):
        super().__init__()
        self.picture, self.text, self.head = picture, text, head

    @classmethod
    def read(cls, weights: Mapping[str, torch.Tensor], bert: Mapping[str, Any], what: str) -> ImageRewardNetwork:
        """From the published tensors and ``med_config.json``, in float32. Tensors that the formula does not use (projections of
        BLIP's pretraining) are passed over, as in the published code.

        Raises:
            UserError: tensors are absent or of another shape.
        """
        by_part: dict[str, dict[str, torch.Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
        for name, value in weights.items():
            part = next((part for part in by_part if name.startswith(part)), None)
            if part is not None:
                by_part[part][name.removeprefix(part)] = value.float()
        vision = {_picture_name(name): value for name, value in by_part["blip.visual_encoder."].items()}
        picture = BlipVisionModel(_picture_config(vision, what))
        files.fill(picture, vision, f"{what}, blip.visual_encoder,", extras=True)
        text = BlipTextModel(_text_config(bert, picture.config.hidden_size), add_pooling_layer=False)
        files.fill(text, by_part["blip.text_encoder."], f"{what}, blip.text_encoder,", extras=True)
        return cls(picture, text, LinearHead.read(by_part["mlp."], f"{what}, mlp,")).eval().requires_grad_(False)

    def forward(self, values: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S), (B, 35) and (B, 35) to (B,) rewards in float32; the head always works in float32."""
        patches = self.picture(pixel_values=values).last_hidden_state  # (B, 1 + P, W), after the last norm
        seen = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        states = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=patches, encoder_attention_mask=seen, is_decoder=False
        ).last_hidden_state
        return (self.head(states[:, 0].float()) - MEAN) / DEVIATION


def _picture_name(name: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block:
        return f"encoder.layers.{block[1]}.{BLOCK.get(block[2], block[2])}.{block[3]}"
    return PICTURE.get(name, name)


def _picture_config(weights: Mapping[str, torch.Tensor], what: str) -> BlipVisionConfig:
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1.weight")
    absent = [name for name in needed if name not in weights]
    if absent:
        raise UserError(f"{what} is not in ImageReward's layout: blip.visual_encoder lacks what becomes {', '.join(absent)}")
    width, _, patch, _ = weights[needed[0]].shape
    numbers = [int(found[1]) for name in weights if (found := re.match(r"encoder\.layers\.(\d+)\.", name))]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights[needed[2]].shape[0],
        num_hidden_layers=1 + max(numbers),
        num_attention_heads=max(1, width // HEAD),
        patch_size=patch,
        image_size=patch * round((weights[needed[1]].shape[1] - 1) ** 0.5),
        layer_norm_eps=1e-6,  # BLIP's own; transformers' default is another
        hidden_act="gelu",
    )


def _text_config(bert: Mapping[str, Any], picture_width: int) -> BlipTextConfig:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = (*sizes, "max_position_embeddings", "layer_norm_eps", "hidden_act", "pad_token_id")
    absent = [key for key in sizes if key not in bert]
    if absent:
        raise UserError(f"med_config.json lacks {', '.join(absent)}")
    # is_decoder brings the cross-attention layers; forward() says is_decoder=False, so that attention is not causal.
    return BlipTextConfig(
        **{key: bert[key] for key in given if key in bert},
        encoder_hidden_size=picture_width,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class ImageRewardJudge(NetworkJudge):
    """ImageReward: how well a picture fits its prompt and pleases, learned from rankings; about normal with mean 0.

    The picture's shorter side is resized to 224 and the middle kept; the prompt is cut or padded to 35 tokens.

    Args:
        model: ``ImageReward.pt``, a folder with it, or a hub id, in the layout of the published ``THUDM/ImageReward``.
        config: ``med_config.json`` (the text encoder's sizes); null takes it from beside the model.
        tokenizer: folder or hub id with BERT's tokenizer.
        revision: of the model's hub repository.
        options: see :class:`NetworkJudge`.
    """

    name = "imagereward"
    formula = "1"

    def __init__(
        self,
        *,
        model: str = "THUDM/ImageReward",
        config: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        revision: str | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        for option, where in (("model", model), ("config", config), ("tokenizer", tokenizer)):
            if where is not None:
                files.check(where, f"the judge 'imagereward': {option}")
        self.model, self.config, self.tokenizer, self.revision = model, config, tokenizer, revision
        self.sources = (model, config, tokenizer)

    @cached_property
    def file(self) -> Path:
        """The checkpoint on this machine."""
        return files.file(self.model, "the judge 'imagereward': model", published="ImageReward.pt", revision=self.revision)

    def weights(self) -> str:
        return files.identity(self.model, [self.file])

    @cached_property
    def network(self) -> ImageRewardNetwork:
        """Read when it is first needed."""
        where = self.config or (str(self.file.parent) if Path(self.model).expanduser().exists() else self.model)
        config = files.file(where, "the judge 'imagereward': config", published="med_config.json", revision=self.revision)
        network = ImageRewardNetwork.read(files.tensors(self.file), files.settings(config), str(self.file))
        for tower in (network.picture, network.text):
            nn.Module.to(tower, dtype=self.dtype)
        return network.to(self.device)

    @cached_property
    def _tokenizer(self) -> BertTokenizer:
        folder = files.folder(self.tokenizer, "the judge 'imagereward': tokenizer", weights=False)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
            raise UserError(f"the judge 'imagereward': {folder} has no BERT tokenizer (tokenizer.json or vocab.txt)")
        try:
            return BertTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"the tokenizer in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image]) -> torch.Tensor:
        config: Any = self.network.picture.config
        side = config.image_size
        values = pixels.CentreCrop(side, side, rounding="round")(pictures).to(self.device, self.dtype)
        tokens = self._tokenizer(
            prompts_of(conditions), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return self.network(values, tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device))
