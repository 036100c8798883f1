"""HPSv2: a plain torch model with open_clip's tensor names stands for the published one; its checkpoint opens in transformers'
classes and gives the same scores. Where open_clip itself is installed, it is held against ours too."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.evaluation import judges
from polyalign.evaluation.image_judges import clip, pixels
from polyalign.evaluation.image_judges.open_clip_layout import config_of, to_clip

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_judge_models import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    PROMPTS,
    SIDE,
    clip_tokenizer,
    conditions,
    pictures,
)

VOCABULARY, LENGTH, WIDTH, TEXT_WIDTH, SHARED = 74, 16, 128, 64, 24


class Block(nn.Module):
    """A residual block as open_clip names it."""

    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 96), gelu=nn.GELU(), c_proj=nn.Linear(96, width))  # pyright: ignore
        )

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(states)
        states = states + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return states + self.mlp(self.ln_2(states))


class Blocks(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            states = block(states, mask)
        return states


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(1 + (SIDE // 14) ** 2, WIDTH))
        self.proj = nn.Parameter(torch.randn(WIDTH, SHARED))
        self.conv1 = nn.Conv2d(3, WIDTH, 14, 14, bias=False)
        self.ln_pre, self.ln_post, self.transformer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Blocks(WIDTH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(values).flatten(2).transpose(1, 2)
        states = torch.cat([self.class_embedding.expand(len(values), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(states))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP with a vision transformer, in plain torch."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.visual, self.transformer = Visual(), Blocks(TEXT_WIDTH)
        self.token_embedding = nn.Embedding(VOCABULARY, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, TEXT_WIDTH))
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.randn(TEXT_WIDTH, SHARED))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        with torch.no_grad():  # biases and norms as made are zeros and ones, and would hide a wrong name
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.eval().requires_grad_(False)

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        states = self.token_embedding(ids) + self.positional_embedding[:length]
        states = self.ln_final(self.transformer(states, mask))
        return states[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def ids_of(prompt: str) -> torch.Tensor:
    """As open_clip pads: zeros behind the end token, to the full length."""
    ids = clip_tokenizer()(prompt, truncation=True, max_length=LENGTH)["input_ids"]
    return torch.tensor([ids + [0] * (LENGTH - len(ids))])


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder as the hub repository: both checkpoints with `state_dict`, and a tokenizer beside them."""
    folder = tmp_path_factory.mktemp("hps")
    for seed, name in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        torch.save({"epoch": 3, "state_dict": OpenClip(seed).state_dict()}, folder / name)
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def judge(name: str, published: Path, **options):
    given = {"model": str(published), "tokenizer": str(published / "tokenizer"), **options}
    return judges.build(JudgeConfig(name=name, options=given))


@pytest.mark.parametrize(("name", "seed"), [("hpsv2", 0), ("hpsv2.1", 1)])
def test_the_score_is_the_cosine_of_the_published_model(published, name, seed):
    model, images = OpenClip(seed), pictures()
    expected = []
    for prompt, image in zip(PROMPTS, images, strict=True):
        seen, said = model.visual(pixels.LongestSide(SIDE)([image])), model.text(ids_of(prompt))
        expected.append(float(nn.functional.cosine_similarity(seen, said)))
    scorer = judge(name, published)
    assert scorer.name == name
    assert scorer.score(conditions(), images) == pytest.approx(expected, abs=2e-5)
    assert max(expected) - min(expected) > 0.02


def test_the_mapped_towers_equal_the_published_ones_tensor_by_tensor(published):
    theirs = OpenClip(0)
    ours = to_clip(theirs.state_dict(), "tiny").eval()
    values, ids = torch.randn(2, 3, SIDE, SIDE), torch.cat([ids_of("ab c"), ids_of("some more words")])
    with torch.no_grad():
        assert torch.allclose(clip.embedding(ours.get_image_features(pixel_values=values)), theirs.visual(values), atol=1e-4)
        assert torch.allclose(clip.embedding(ours.get_text_features(input_ids=ids)), theirs.text(ids), atol=1e-4)
    config: Any = ours.config
    assert config.vision_config.num_attention_heads == 2 and config.vision_config.image_size == SIDE
    assert torch.equal(ours.logit_scale.detach(), theirs.logit_scale)


def test_published_shapes_give_the_published_architecture():
    """ViT-H/14: 32 blocks of width 1280 with 16 heads of 80, text 24 blocks of width 1024 with 16 heads of 64."""
    with torch.device("meta"):
        block = {"ln_1": (1280,), "attn.in_proj_weight": (3840, 1280), "mlp.c_fc.weight": (5120, 1280)}
        weights = {
            "visual.conv1.weight": torch.empty(1280, 3, 14, 14),
            "visual.positional_embedding": torch.empty(257, 1280),
            "visual.proj": torch.empty(1280, 1024),
            "token_embedding.weight": torch.empty(49408, 1024),
            "positional_embedding": torch.empty(77, 1024),
            **{f"visual.transformer.resblocks.{n}.{k}": torch.empty(s) for n in range(32) for k, s in block.items()},
            **{f"transformer.resblocks.{n}.mlp.c_fc.weight": torch.empty(4096, 1024) for n in range(24)},
        }
        config: Any = config_of(weights)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1280, 32, 16)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size, vision.hidden_act) == (224, 14, 5120, "gelu")
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (1024, 24, 16)
    assert (text.eos_token_id, text.max_position_embeddings, config.projection_dim) == (49407, 77, 1024)


def test_preparation_keeps_proportions_and_is_torchvisions_on_tensors():
    transforms = pytest.importorskip("torchvision.transforms.functional")
    for size in ((SIDE, SIDE), (60, 60), (57, 40), (9, 30), (100, 33)):
        (image,) = pictures([size])
        ours = pixels.LongestSide(SIDE, mean=(0, 0, 0), std=(1, 1, 1))([image])[0]
        scale = SIDE / max(size)
        height, width = (round(side * scale) for side in reversed(size))
        resized = transforms.resize(
            transforms.to_tensor(image), [height, width], transforms.InterpolationMode.BICUBIC, antialias=True
        )
        down, right = SIDE - height, SIDE - width
        theirs = transforms.pad(resized, [right // 2, down // 2, right - right // 2, down - down // 2])
        assert ours.shape == (3, SIDE, SIDE) and torch.allclose(ours, theirs, atol=1e-5), size
    sharp = pixels.LongestSide(SIDE, antialias=False)(pictures([(100, 33)]))
    assert not torch.allclose(sharp, pixels.LongestSide(SIDE)(pictures([(100, 33)])), atol=1e-3)


def test_versions_tell_the_checkpoints_apart(published):
    old, new = judge("hpsv2", published), judge("hpsv2.1", published)
    assert old.version != new.version
    named = judge("hpsv2", published, model=str(published / "HPS_v2_compressed.pt"))
    assert named.version.split("@")[1] == old.version.split("@")[1]  # the same bytes, however they were named
    assert judge("hpsv2", published, antialias=False).version == old.version.replace("1 ", "1 not antialiased ", 1)
    assert judge("hpsv2", published, antialias=False).score(conditions(), pictures()) != old.score(conditions(), pictures())


def test_other_layouts_are_refused(published, tmp_path):
    def save(weights) -> str:
        torch.save({"state_dict": weights}, tmp_path / "other.pt")
        return str(tmp_path / "other.pt")

    whole = OpenClip(0).state_dict()
    data_parallel = {f"module.{name}": value for name, value in whole.items()}
    asked = conditions(), pictures()
    assert judge("hpsv2", published, model=save(data_parallel)).score(*asked) == judge("hpsv2", published).score(*asked)
    for weights, said in (
        ({k: v for k, v in whole.items() if k != "visual.proj"}, "lacks visual.proj"),
        ({k: v for k, v in whole.items() if k != "transformer.resblocks.1.ln_2.bias"}, "lacks text_model.encoder.layers.1"),
        ({**whole, "score_predictor.weight": torch.zeros(2)}, "has besides score_predictor.weight"),
        ({**whole, "ln_final.bias": torch.zeros(3)}, r"another shape of text_model.final_layer_norm.bias \(3,\)"),
    ):
        with pytest.raises(UserError, match=said):
            judge("hpsv2", published, model=save(weights)).score(*asked)
    with pytest.raises(UserError, match="there is no HPS_v2_compressed.pt in it"):
        judge("hpsv2", published, model=str(tmp_path)).score(*asked)
    (tmp_path / "cut.pt").write_bytes((published / "HPS_v2_compressed.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match="cut.pt is refused"):
        judge("hpsv2", published, model=str(tmp_path / "cut.pt")).score(*asked)


def test_equal_to_the_package_open_clip_itself(published, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    tower = {"width": WIDTH, "layers": 2, "mlp_ratio": 0.75}
    described = {
        "embed_dim": SHARED,
        "vision_cfg": {**tower, "image_size": SIDE, "patch_size": 14, "head_width": 64},
        "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": TEXT_WIDTH, "heads": 1, "layers": 2},
    }
    (tmp_path / "tiny-judge.json").write_text(json.dumps(described))
    open_clip.add_model_config(tmp_path / "tiny-judge.json")
    torch.manual_seed(3)
    theirs, _, prepare = open_clip.create_model_and_transforms("tiny-judge", pretrained=None)
    theirs = theirs.eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = to_clip(theirs.state_dict(), "tiny").eval()
    values, ids = torch.randn(2, 3, SIDE, SIDE), open_clip.get_tokenizer("tiny-judge")(["a red circle", "x"])
    with torch.no_grad():
        assert torch.allclose(
            clip.embedding(ours.get_image_features(pixel_values=values)), theirs.encode_image(values), atol=1e-4
        )
        assert torch.allclose(clip.embedding(ours.get_text_features(input_ids=ids)), theirs.encode_text(ids), atol=1e-4)
    torch.save(theirs.state_dict(), tmp_path / "tiny.pt")
    options = {"model": str(tmp_path / "tiny.pt"), "backend": "open_clip", "architecture": "tiny-judge", "formula": "cosine"}
    scored = judges.build(JudgeConfig(name="clip_score", options=options)).score(conditions(), pictures())
    seen = theirs.encode_image(torch.stack([prepare(image) for image in pictures()]))
    said = theirs.encode_text(open_clip.get_tokenizer("tiny-judge")(list(PROMPTS)))
    assert scored == pytest.approx(nn.functional.cosine_similarity(seen, said).tolist(), abs=1e-5)
