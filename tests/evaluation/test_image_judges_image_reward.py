"""ImageReward: a plain torch model with the published tensor names stands for the published one; its checkpoint opens in
transformers' BLIP classes and gives the same rewards."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertTokenizer

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.evaluation import judges
from polyalign.evaluation.image_judges import pixels

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_judge_models import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    PROMPTS,
    conditions,
    head_weights,
    pictures,
)

SIDE, PATCH, WIDTH, TEXT = 32, 16, 128, 48
MED = {  # the published file's keys
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 64,
    "encoder_width": TEXT,
    "add_cross_attention": True,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "squares", "and", "more", "x"]


class Published:
    """ImageReward's formula written out on a dictionary of tensors with the published names."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, torch.Tensor] = {}

        def linear(name: str, rows: int, columns: int) -> None:
            self.weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
            self.weights[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=generator)

        def norm(name: str, width: int) -> None:
            self.weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
            self.weights[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

        see, read = "blip.visual_encoder", "blip.text_encoder"
        self.weights[f"{see}.cls_token"] = torch.randn(1, 1, WIDTH, generator=generator)
        self.weights[f"{see}.pos_embed"] = torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH, generator=generator)
        self.weights[f"{see}.patch_embed.proj.weight"] = torch.randn(WIDTH, 3, PATCH, PATCH, generator=generator) / 28
        self.weights[f"{see}.patch_embed.proj.bias"] = torch.randn(WIDTH, generator=generator)
        norm(f"{see}.norm", WIDTH)
        for block in (f"{see}.blocks.{index}" for index in range(2)):
            norm(f"{block}.norm1", WIDTH)
            norm(f"{block}.norm2", WIDTH)
            linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
            linear(f"{block}.attn.proj", WIDTH, WIDTH)
            linear(f"{block}.mlp.fc1", 96, WIDTH)
            linear(f"{block}.mlp.fc2", WIDTH, 96)
        for name, rows in (("word_embeddings", MED["vocab_size"]), ("position_embeddings", MED["max_position_embeddings"])):
            self.weights[f"{read}.embeddings.{name}.weight"] = torch.randn(rows, TEXT, generator=generator)
        self.weights[f"{read}.embeddings.position_ids"] = torch.arange(MED["max_position_embeddings"])[None]
        norm(f"{read}.embeddings.LayerNorm", TEXT)
        for layer in (f"{read}.encoder.layer.{index}" for index in range(2)):
            for attention, width in (("attention", TEXT), ("crossattention", WIDTH)):
                linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
                linear(f"{layer}.{attention}.self.key", TEXT, width)
                linear(f"{layer}.{attention}.self.value", TEXT, width)
                linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
                norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
            linear(f"{layer}.intermediate.dense", 80, TEXT)
            linear(f"{layer}.output.dense", TEXT, 80)
            norm(f"{layer}.output.LayerNorm", TEXT)
        for name, value in head_weights(TEXT).items():
            self.weights[f"mlp.{name}"] = value
        linear("blip.vision_proj", 16, WIDTH)
        linear("blip.text_proj", 16, TEXT)

    def _linear(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, states: torch.Tensor, eps: float) -> torch.Tensor:
        return nn.functional.layer_norm(
            states, states.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps
        )

    def patches(self, values: torch.Tensor) -> torch.Tensor:
        """(3, S, S) to (1 + P, W); ViT-L's heads are 64 wide."""
        see = "blip.visual_encoder"
        cut = nn.functional.conv2d(
            values[None], self.weights[f"{see}.patch_embed.proj.weight"], self.weights[f"{see}.patch_embed.proj.bias"], PATCH
        )
        states = torch.cat([self.weights[f"{see}.cls_token"][0], cut[0].flatten(1).T]) + self.weights[f"{see}.pos_embed"][0]
        for block in (f"{see}.blocks.{index}" for index in range(2)):
            q, k, v = self._linear(f"{block}.attn.qkv", self._norm(f"{block}.norm1", states, 1e-6)).chunk(3, -1)
            states = states + self._linear(f"{block}.attn.proj", attend(q, k, v, WIDTH // 64))
            inner = self._linear(f"{block}.mlp.fc1", self._norm(f"{block}.norm2", states, 1e-6))
            states = states + self._linear(f"{block}.mlp.fc2", nn.functional.gelu(inner))
        return self._norm(f"{see}.norm", states, 1e-6)

    def reward(self, values: torch.Tensor, ids: list[int]) -> float:
        """Without padding: a token that is masked has no say."""
        patches, read = self.patches(values), "blip.text_encoder"
        states = self.weights[f"{read}.embeddings.word_embeddings.weight"][ids]
        states = states + self.weights[f"{read}.embeddings.position_embeddings.weight"][: len(ids)]
        states = self._norm(f"{read}.embeddings.LayerNorm", states, 1e-12)
        for layer in (f"{read}.encoder.layer.{index}" for index in range(2)):
            for name, source in (("attention", None), ("crossattention", patches)):
                source = states if source is None else source
                q, k, v = (
                    self._linear(f"{layer}.{name}.self.{part}", given)
                    for part, given in (("query", states), ("key", source), ("value", source))
                )
                mixed = self._linear(f"{layer}.{name}.output.dense", attend(q, k, v, 3))
                states = self._norm(f"{layer}.{name}.output.LayerNorm", mixed + states, 1e-12)
            inner = nn.functional.gelu(self._linear(f"{layer}.intermediate.dense", states))
            states = self._norm(f"{layer}.output.LayerNorm", self._linear(f"{layer}.output.dense", inner) + states, 1e-12)
        features = states[0]
        for place in (0, 2, 4, 6, 7):
            features = self._linear(f"mlp.layers.{place}", features)
        return (float(features) - 0.16717362830052426) / 1.0333394966054072


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = (states.unflatten(-1, (heads, -1)).transpose(0, 1) for states in (q, k, v))
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(Published().weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def judge(published: Path, **options):
    given = {"model": str(published), "tokenizer": str(published / "tokenizer"), **options}
    return judges.build(JudgeConfig(name="imagereward", options=given))


def test_the_reward_is_the_published_formula(published):
    images, model = pictures(((SIDE, SIDE), (70, 40), (33, 32))), Published()
    prompts = (*PROMPTS[:2], "A RED circle unheard-of")
    ids = [[2, 5, 6, 7, 3], [2, 8, 9, 10, 11, 12, 3], [2, 5, 6, 7, 1, 1, 1, 3]]  # [CLS] words [SEP]; "un-heard" is three
    values = pixels.CentreCrop(SIDE, SIDE, rounding="round")(images)
    expected = [model.reward(value, tokens) for value, tokens in zip(values, ids, strict=True)]
    scored = judge(published).score(conditions(prompts), images)
    assert scored == pytest.approx(expected, rel=1e-4)
    assert max(expected) - min(expected) > 0.05
    assert judge(published, batch_size=1).score(conditions(prompts), images) == pytest.approx(scored, rel=1e-4)


def test_prompts_are_cut_at_35_tokens(published):
    image = pictures(((SIDE, SIDE),)) * 3
    long, longer, other = "a " * 33 + "red", "a " * 33 + "blue circle", "a " * 32 + "red"
    scores = judge(published).score(conditions([long, longer, other]), image)
    assert scores[0] == pytest.approx(scores[1], rel=1e-5) and scores[0] != pytest.approx(scores[2], rel=1e-5)


def test_the_file_or_the_folder_and_low_precision(published, tmp_path):
    asked = conditions(), pictures()
    scored = judge(published).score(*asked)
    assert judge(published, model=str(published / "ImageReward.pt")).score(*asked) == scored
    assert judge(published, dtype="bfloat16").score(*asked) == pytest.approx(scored, abs=0.3)
    assert (
        judge(published).version.split("@")[1]
        == judge(published, model=str(published / "ImageReward.pt")).version.split("@")[1]
    )
    moved = tmp_path / "ImageReward.pt"
    moved.write_bytes((published / "ImageReward.pt").read_bytes())
    with pytest.raises(UserError, match="med_config.json"):
        judge(published, model=str(moved)).score(*asked)
    assert judge(published, model=str(moved), config=str(published / "med_config.json")).score(*asked) == scored


def test_other_layouts_are_refused(published, tmp_path):
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    whole = Published().weights
    for weights, said in (
        (
            {name: value for name, value in whole.items() if "crossattention.self.key" not in name},
            "it lacks encoder.layer.0.cross",
        ),
        ({name: value for name, value in whole.items() if not name.startswith("mlp.")}, "mlp, is not in the published layout"),
        ({name.removeprefix("blip."): value for name, value in whole.items()}, "blip.visual_encoder lacks"),
        ({name: value for name, value in whole.items() if "visual" not in name}, "blip.visual_encoder lacks"),
    ):
        torch.save(weights, tmp_path / "ImageReward.pt")
        with pytest.raises(UserError, match=said):
            judge(published, model=str(tmp_path)).score(conditions(), pictures())
    torch.save({**whole, "queue": torch.zeros(2)}, tmp_path / "ImageReward.pt")  # what is not used is passed over
    assert judge(published, model=str(tmp_path)).score(conditions(), pictures()) == judge(published).score(
        conditions(), pictures()
    )
    (tmp_path / "med_config.json").write_text(json.dumps({key: value for key, value in MED.items() if key != "hidden_size"}))
    with pytest.raises(UserError, match="med_config.json lacks hidden_size"):
        judge(published, model=str(tmp_path)).score(conditions(), pictures())
    with pytest.raises(UserError, match="has no BERT tokenizer"):
        judge(published, tokenizer=str(tmp_path)).score(conditions(), pictures())


def test_the_tokenizer_is_berts_lower_case_one(published):
    tokens = BertTokenizer.from_pretrained(published / "tokenizer")
    assert tokens("A RED circle")["input_ids"] == [2, 5, 6, 7, 3]
