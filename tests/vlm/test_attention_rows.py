"""Recorded rows against eager attention of the stock models, on every family; and the maps made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_vlms import BUILDERS, picture
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.attention_maps import attention_maps, raster
from polyalign.modalities.vlm.attention_ratio import answer_rows, image_attention
from polyalign.modalities.vlm.attention_rows import NoAttention, layers_of, record
from polyalign.modalities.vlm.geometries import geometries_of
from polyalign.modalities.vlm.mia_dpo import MiaDpo
from polyalign.modalities.vlm.mia_dpo_config import MultiImageConfig
from polyalign.modalities.vlm.processing import Prompt
from polyalign.modalities.vlm.settings import VlmModelSettings
from polyalign.modalities.vlm.token_geometry import Geometry, View, padded

Folder = Callable[[str], Path]

CONDITIONS: list[dict[str, Any]] = [
    {"prompt": "what colour is it?", "images": [picture(1), picture(2, (30, 60))]},
    {"prompt": "describe", "images": [picture(3)]},
    {"prompt": "describe both", "images": [picture(1), picture(3)]},
]
ANSWERS = [[20, 21, 22, 23, 2], [40], [31, 2]]


def opened(folder: Path, **settings: Any) -> tuple[VlmAdapter, Model]:
    adapter = VlmAdapter(VlmModelSettings(str(folder), device="cpu", **settings))
    return adapter, adapter.load()


def asked(adapter: VlmAdapter, model: Model) -> list[tuple[Prompt, list[int]]]:
    return [(adapter.prompt(model, given, where="x"), ids) for given, ids in zip(CONDITIONS, ANSWERS, strict=True)]


@torch.no_grad()
def eager(model: Model, condition: dict[str, Any], answer: list[int]) -> tuple[list[Tensor], Tensor]:
    """The attention of every layer (H, L, L), and the answer's log-probabilities, of the stock model in eager mode."""
    processor, images = model.parts["processor"], condition["images"]
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": condition["prompt"]}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)
    made = processor(text=[text], images=[images], return_tensors="pt")
    inputs = {name: value for name, value in made.items() if name not in ("num_crops", "num_patches")}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in {"token_type_ids", "mm_token_type_ids"} & set(inputs):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(answer)))
    network: Any = model.network
    before = network.config._attn_implementation
    network.set_attn_implementation("eager")
    found = network(**inputs, output_attentions=True, use_cache=False)
    network.set_attn_implementation(before)
    logps = found.logits[0, -len(answer) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return [layer[0] for layer in found.attentions], logps


def attention_of(model: Model) -> tuple[str, str]:
    """Of the whole and of the language model."""
    network: Any = model.network
    return network.config._attn_implementation, network.config.get_text_config()._attn_implementation


def check(model: Model, adapter: VlmAdapter) -> None:
    answers = asked(adapter, model)
    for one, (prompt, ids), condition in zip(record(adapter, model, answers, (0, 1)), answers, CONDITIONS, strict=True):
        attentions, logps = eager(model, condition, ids)
        length = len(prompt.ids) + len(ids) - 1
        for layer in (0, 1):
            expected = attentions[layer].mean(0)[list(answer_rows(len(prompt.ids), len(ids))), :length]
            assert one.rows[layer].shape == expected.shape and one.rows[layer].dtype == torch.float32
            assert torch.allclose(one.rows[layer], expected, rtol=0.0, atol=2e-6)
            assert torch.allclose(one.rows[layer].sum(-1), torch.ones(len(expected)))
        assert torch.allclose(one.logps.float(), logps, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("family", BUILDERS)
def test_rows_are_those_of_eager_attention(family: str, tiny_vlms: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Batched, of answers of several lengths, one of a single token."""
    adapter, model = opened(tiny_vlms(family))
    check(model, adapter)
    assert attention_of(model) == ("sdpa", "sdpa")
    assert "eager" not in capsys.readouterr().err


def test_beside_shared_prompts_and_a_lora(tiny_vlms: Folder) -> None:
    """The attention that shares prompts is there again afterwards, and training goes on."""
    adapter, model = opened(tiny_vlms("llava"), prefix_sharing="on", rank=2)
    adapter.trainable(model)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.3)
    row = {"pair_id": "a", "condition": CONDITIONS[0], "chosen": "it is red", "rejected": "no"}
    batch = adapter.prepare(model, [row], step=0)
    before = adapter.score(model, batch, None).values
    implementation = attention_of(model)
    assert "sdpa" not in implementation
    check(model, adapter)
    assert model.network.training and attention_of(model) == implementation
    assert torch.equal(adapter.score(model, batch, None).values, before)


class Sinking(LlamaAttention):
    """An attention that has more in it than a softmax here knows of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs, s_aux=torch.zeros(4))


def test_what_cannot_be_recorded_comes_from_eager_attention(tiny_vlms: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, model = opened(tiny_vlms("llava"))
    network: Any = model.network
    for layer in network.model.language_model.layers:
        layer.self_attn.__class__ = Sinking
    check(model, adapter)
    assert "in eager mode: its attention has s_aux" in capsys.readouterr().err
    assert attention_of(model) == ("sdpa", "sdpa")


class Silent(Sinking):
    """One that does not say what it attended to either."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)[0], None


def test_a_model_without_attention(tiny_vlms: Folder) -> None:
    adapter, model = opened(tiny_vlms("llava"))
    network: Any = model.network
    network.model.language_model.layers[1].self_attn.__class__ = Silent
    assert len(record(adapter, model, asked(adapter, model), [0])) == 3
    assert [len(one.logps) for one in record(adapter, model, asked(adapter, model), [])] == [5, 1, 2]
    with pytest.raises(NoAttention, match="gives the attention of . of its 2 layers, also in eager mode"):
        record(adapter, model, asked(adapter, model), [1])
    assert attention_of(model) == ("sdpa", "sdpa")
    config = MultiImageConfig.model_validate(
        {"world": "scenes", "count": 3, "formats": {"sequence": {2: 1}}, "filter": {"attention": None, "perplexity": None}}
    )
    rows, note = MiaDpo(adapter, model, None, config).make(range(3))
    assert note["questions"] == 3 and note["kinds"]["sequence 2"]["ratios"] == {}
    assert all(row["provenance"]["sampler"]["ratio"] is None for row in rows)
    needing = config.model_copy(update={"filter": config.filter.model_copy(update={"attention": "not_first"})})
    with pytest.raises(NoAttention):
        MiaDpo(adapter, model, None, needing).make(range(3))


def test_wrong_input(tiny_vlms: Folder) -> None:
    adapter, model = opened(tiny_vlms("llava"))
    assert layers_of(model) == 2 and record(adapter, model, [], [0]) == []
    answers = asked(adapter, model)
    with pytest.raises(UserError, match="layer 2: the language model has the layers 0 to 1"):
        record(adapter, model, answers, [0, 2])
    with pytest.raises(UserError, match="without tokens"):
        record(adapter, model, [(answers[0][0], [])], [0])
    with pytest.raises(UserError, match="image token in it"):
        record(adapter, model, [(answers[0][0], [model.parts["image_token"], 2])], [0])
    assert attention_of(model) == ("sdpa", "sdpa")


class TestMaps:
    @pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "idefics3"])
    def test_sums_are_what_each_picture_gets(self, family: str, tiny_vlms: Folder) -> None:
        adapter, model = opened(tiny_vlms(family))
        maps = attention_maps(adapter, model, CONDITIONS[0], "it is red", 1, cells=20)
        assert [one.shape for one in maps] == [(15, 20), (20, 10)]
        prompt = adapter.prompt(model, CONDITIONS[0], where="x")
        row = {"pair_id": "a", "condition": CONDITIONS[0], "chosen": "it is red", "rejected": "no"}
        batch = adapter.prepare(model, [row], step=0)
        ids = batch.tensors["completion_ids"][0, 0][batch.tensors["completion_mask"][0, 0].bool()].tolist()
        (found,) = record(adapter, model, [(prompt, ids)], [1])
        attention = image_attention(found.rows[1], prompt.spans(model.parts["image_token"]))
        for one, tokens, geometry in zip(maps, attention, geometries_of(model, prompt), strict=True):
            expected = float(tokens.double() @ geometry.shares([geometry.whole])[:, 0])
            assert one.sum() == pytest.approx(expected) and one.min() >= 0 and 0 < expected < 1

    def test_by_hand(self) -> None:
        even = raster(Geometry((40, 20), (View(1, 2, (0, 0, 40, 20)),)), torch.tensor([0.8, 0.4]), 4)
        assert np.allclose(even, [[0.2, 0.2, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]])
        beside = raster(padded((40, 20), 2, 2), torch.tensor([0.8, 0.4, 0.8, 0.4]), 4)  # half of each token is padding
        assert np.allclose(beside, even)
        ended = Geometry((20, 20), (View(1, 1, (0, 0, 20, 20), newline=True), View(1, 1, (0, 0, 0, 0))))
        assert np.allclose(raster(ended, torch.tensor([0.4, 0.3, 0.2]), 2), 0.1)

    def test_wrong_number_of_tokens(self) -> None:
        with pytest.raises(UserError, match="3 image tokens"):
            raster(padded((40, 20), 2, 2), torch.ones(3), 4)
