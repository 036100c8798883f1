"""The adapter's contract: margins of exactly zero at the start, LoRA where it belongs, files that stock libraries open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_vlm_exactness import ROWS, counted
from tiny_vlms import BUILDERS, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from polyalign.core.adapter import Model
from polyalign.core.algorithm import DirectPreference
from polyalign.core.errors import UserError
from polyalign.core.objectives import Beta
from polyalign.core.objectives.table import SPEC, build
from polyalign.core.recipe import ReferenceConfig
from polyalign.core.references import AdapterOff, build_seat
from polyalign.core.seats import mismatched
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.settings import VlmModelSettings

Folder = Callable[[str], Path]


def adapter_of(folder: Path, **settings: Any) -> VlmAdapter:
    return VlmAdapter(VlmModelSettings(**{"base": str(folder), "device": "cpu", "rank": 4, **settings}))


def disturb(model: Model, size: float = 0.1) -> None:
    """What training would do: every trainable number moves."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def scores(adapter: VlmAdapter, model: Model) -> torch.Tensor:
    with torch.no_grad():
        return adapter.score(model, adapter.prepare(model, ROWS, step=0), None).values


@pytest.mark.parametrize("family", BUILDERS)
def test_the_first_margin_is_exactly_zero(family: str, tiny_vlms: Folder) -> None:
    """In training mode, with a LoRA on all that can have one; then training moves the policy and not the reference."""
    parts = ("language",) if family == "gemma3" else ("language", "projector", "vision")
    adapter = adapter_of(tiny_vlms(family), dropout=0.3, parts=parts)
    model = adapter.trainable(adapter.load())
    batch = adapter.prepare(model, ROWS, step=0)
    policy = adapter.score(model, batch, None)
    seat = AdapterOff(model.network)
    reference = seat.scores(adapter, model, batch, None, index=0)
    assert model.network.training and policy.values.requires_grad and policy.values.dtype == torch.float32
    assert torch.equal(policy.values, reference.values) and not reference.values.requires_grad
    disturb(model)
    model.network.eval()
    assert torch.equal(seat.scores(adapter, model, batch, None, index=0).values, reference.values)
    assert not torch.allclose(adapter.score(model, batch, None).values, reference.values, atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize(("train", "dtype"), [("full", "float32"), ("lora", "bfloat16")])
def test_the_first_margin_to_a_copy(family: str, train: str, dtype: str, tiny_vlms: Folder) -> None:
    adapter = adapter_of(tiny_vlms(family), train=train, dtype=dtype)
    model = adapter.trainable(adapter.load())
    batch = adapter.prepare(model, ROWS, step=0)
    other = build_seat(ReferenceConfig(seat="frozen"), model.network).scores(adapter, model, batch, None, index=0)
    policy = adapter.score(model, batch, None)
    assert other is not None and torch.equal(policy.values, other.values) and policy.values.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "parts", "within"),
    [
        ("llava", ("language",), ["model.language_model."]),
        ("smolvlm", ("language",), ["model.text_model."]),
        ("qwen2_5_vl", ("language",), ["model.language_model."]),
        ("llava", ("projector",), ["model.multi_modal_projector."]),
        ("idefics3", ("projector", "vision"), ["model.connector.", "model.vision_model."]),
        ("qwen3_vl", ("projector",), ["model.visual.merger.", "model.visual.deepstack_merger_list."]),
        ("qwen2_vl", ("vision",), ["model.visual.blocks."]),
    ],
)
def test_a_lora_is_on_its_parts_alone(family: str, parts: Any, within: list[str], tiny_vlms: Folder) -> None:
    adapter = adapter_of(tiny_vlms(family), parts=parts)
    model = adapter.trainable(adapter.load())
    trained = {name for name, weight in model.network.named_parameters() if weight.requires_grad}
    assert trained and all(".default." in name and any(name.startswith(stem) for stem in within) for name in trained)
    assert all(any(name.startswith(stem) for name in trained) for stem in within)
    adapter.score(model, adapter.prepare(model, ROWS, step=0), None).values.sum().backward()
    assert {name for name, weight in model.network.named_parameters() if weight.grad is not None} == trained
    network: Any = model.network
    targets = json.dumps(network.peft_config["default"].target_modules)
    assert "layers.0" not in targets and "blocks.0" not in targets  # one pattern for all layers, not a name for each


def test_training_prefers_the_chosen_answers(tiny_vlms: Folder) -> None:
    """The DPO loss of the first step is ln 2, and it falls."""
    adapter = adapter_of(tiny_vlms("llava_onevision"), gradient_checkpointing=True)
    model = adapter.trainable(adapter.load())
    objective = build(SPEC.validate_python({"name": "dpo"}))
    algorithm = DirectPreference(adapter, model, objective, Beta(0.5, "nats"), {"reference": AdapterOff(model.network)})
    losses = []
    for _ in range(3):
        outcome = algorithm.step(algorithm.prepare(ROWS, step=0), step=0)["policy"]
        losses.append(float(outcome.loss.detach().mean()))
        outcome.loss.mean().backward()
        with torch.no_grad():
            for parameter in model.network.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.3 * parameter.grad)
                    parameter.grad = None
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6) and losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_exports_open_in_stock_libraries(family: str, tiny_vlms: Folder, tmp_path: Path) -> None:
    """A LoRA onto the base and a whole model, to the same scores; and a LoRA comes back to the last bit."""
    for train in ("lora", "full"):
        adapter = adapter_of(tiny_vlms(family), train=train, alpha=6.0)
        model = adapter.trainable(adapter.load())
        disturb(model, 0.02)
        model.network.eval()
        expected, base = scores(adapter, model), scores(adapter, adapter.load())
        assert not torch.allclose(expected, base, atol=1e-3)
        folder = tmp_path / train
        adapter.export(model, folder, {"objective": "dpo"})
        if train == "lora":
            stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_vlms(family)), str(folder))
            again = adapter.load_lora(adapter.load(), folder)
            assert torch.equal(scores(adapter, again), expected)
        else:
            stock = AutoModelForImageTextToText.from_pretrained(folder)
        condition = {"prompt": "what", "images": [picture(1)]}
        text = AutoProcessor.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = AutoProcessor.from_pretrained(folder)(text=[text], images=[condition["images"]], return_tensors="pt")
        inputs = {name: value for name, value in inputs.items() if name not in ("num_crops", "num_patches")}
        with torch.no_grad():
            assert torch.allclose(stock.eval()(**inputs).logits, model.network(**inputs).logits, atol=1e-5)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "image-text-to-text" in card and "AutoModelForImageTextToText" in card and "| objective | dpo |" in card


def test_answers_of_the_base_under_a_lora(tiny_vlms: Folder) -> None:
    adapter = adapter_of(tiny_vlms("llava"), max_new_tokens=6)
    model = adapter.trainable(adapter.load())
    conditions, seeds = [row["condition"] for row in ROWS], [0, 1, 2, 3]
    before = adapter.sample(model, conditions, seeds)
    disturb(model, 0.5)
    assert adapter.sample_base(model, conditions, seeds) == before != adapter.sample(model, conditions, seeds)
    full = adapter_of(tiny_vlms("llava"), train="full")
    with pytest.raises(UserError, match="load the base anew"):
        full.sample_base(full.load(), ["a"], [0])


def test_features_are_kept_over_steps_and_on_the_disk(tiny_vlms: Folder, tmp_path: Path) -> None:
    """Neither the second step nor another process computes a picture again, and the scores are the same bits."""
    found, counts = [], []
    for _ in range(2):
        adapter = adapter_of(tiny_vlms("qwen2_5_vl"), cache_folder=tmp_path)
        model = adapter.load()
        network: Any = model.network
        runs = counted(network.model.visual)
        found += [scores(adapter, model), scores(adapter, model)]
        counts.append(len(runs))
    assert all(torch.equal(found[0], other) for other in found) and counts == [2, 0]


def test_a_template_and_picture_options_of_ones_own(tiny_vlms: Folder, tmp_path: Path) -> None:
    (tmp_path / "short.jinja").write_text(
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<s>{% endfor %}"
    )
    adapter = adapter_of(tiny_vlms("qwen2_vl"), chat_template=tmp_path / "short.jinja")
    model = adapter.load()
    prompt = adapter.prompt(model, ROWS[2]["condition"], where="here")
    assert model.parts["tokenizer"].decode(prompt.ids).endswith("<|vision_end|>describe<s>") and "+template@" in model.identity
    small, large = (
        adapter_of(tiny_vlms("qwen2_vl"), picture_options={"size": {"shortest_edge": pixels, "longest_edge": pixels}})
        for pixels in (4 * 196, 64 * 196)
    )
    counts = [one.prompt(model, ROWS[2]["condition"], where="here").pictures[0] for one in (small, large)]
    assert counts[0].tokens < counts[1].tokens and counts[0].key != counts[1].key


def test_a_full_model_keeps_its_dropout(tiny_vlms: Folder, tmp_path: Path) -> None:
    base = tmp_path / "base"
    adapter = adapter_of(tiny_vlms("llava"), train="full")
    adapter.export(adapter.load(), base)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.25
    (base / "config.json").write_text(json.dumps(config))
    again = adapter_of(base, train="full")
    model = again.load()
    network: Any = model.network
    assert network.config.text_config.attention_dropout == 0.0
    again.export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["attention_dropout"] == 0.25


def test_a_lora_on_the_vision_tower_is_not_kept_as_the_base(tiny_vlms: Folder, tmp_path: Path) -> None:
    """Though the settings speak of the language tower alone: the LoRA came from elsewhere."""
    elsewhere = adapter_of(tiny_vlms("llava"), parts=("vision",))
    trained = elsewhere.trainable(elsewhere.load())
    disturb(trained, 0.5)
    elsewhere.export(trained, tmp_path / "out")
    adapter = adapter_of(tiny_vlms("llava"))
    model = adapter.load()
    base = scores(adapter, model)
    adapter.load_lora(model, tmp_path / "out")
    assert not torch.allclose(scores(adapter, model), base, atol=1e-3)
    off = AdapterOff(trained.network).scores(elsewhere, trained, elsewhere.prepare(trained, ROWS, step=0), None, index=0)
    assert torch.equal(off.values, base)


def test_a_cached_reference_is_the_live_one(tiny_vlms: Folder, tmp_path: Path) -> None:
    """Of pictures too: written by one seat, read by the next."""
    adapter = adapter_of(tiny_vlms("qwen2_5_vl"))
    model = adapter.trainable(adapter.load())
    batch = adapter.prepare(model, ROWS, step=0)
    live = AdapterOff(model.network).scores(adapter, model, batch, None, index=0)
    seats: list[Any] = [
        build_seat(ReferenceConfig(seat="cached"), model.network, folder=tmp_path, identity=model.identity) for _ in range(2)
    ]
    first = seats[0].scores(adapter, model, batch, None, index=0)
    seats[0].cache.flush()
    seats[1].cache.reload()
    assert torch.equal(first.values, live.values) and batch.group_ids[0] == "two"
    disturb(model)
    assert torch.equal(seats[1].scores(adapter, model, batch, None, index=0).values, live.values)


def test_answers_put_to_other_prompts(tiny_vlms: Folder) -> None:
    """KTO's baseline: each row's answer with the pictures and the question of the next."""
    adapter = adapter_of(tiny_vlms("llava"))
    model = adapter.load()
    batch = adapter.prepare(model, ROWS, step=0)
    found = adapter.score(model, mismatched(batch), None)
    moved = [{**row, "chosen": ROWS[place - 1]["chosen"]} for place, row in enumerate(ROWS)]
    expected = adapter.score(model, adapter.prepare(model, moved, step=0), None)
    assert torch.allclose(found.values[:, 0].sum(-1), expected.values[:, 0].sum(-1), atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_eager_attention_shares_prompts_too(family: str, tiny_vlms: Folder) -> None:
    found = [
        scores(adapter, adapter.load())
        for how in ("on", "off")
        for adapter in (adapter_of(tiny_vlms(family), attention="eager", prefix_sharing=how),)
    ]
    assert torch.allclose(found[0], found[1], atol=1e-4)
