"""Exports that stock peft and transformers open to the same logits, and LoRA that come back."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_adapter_score import disturb
from tiny_texts import FAMILIES

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.references import NamedAdapter, adapter_chosen
from polyalign.modalities import injected_lora
from polyalign.modalities.text import lora
from polyalign.modalities.text.adapter import TextAdapter

Make = Callable[..., TextAdapter]

STOCK = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
*jobs, out = sys.argv[1:]
found = {}
for place, job in enumerate(jobs):
    base, adapter = job.split("|")
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    ids = AutoTokenizer.from_pretrained(adapter or base)("The patient was given", return_tensors="pt").input_ids
    with torch.no_grad():
        found[str(place)] = model.eval()(input_ids=ids).logits.contiguous()
save_file(found, out)
assert "polyalign" not in sys.modules
"""


def trained(adapter: TextAdapter) -> Model:
    model = adapter.trainable(adapter.load())
    disturb(model)
    return model


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    model.network.eval()
    return model.network(input_ids=model.parts["tokenizer"]("The patient was given", return_tensors="pt").input_ids).logits


def test_stock_peft_and_transformers_give_the_same_logits(
    make_adapter: Make, tiny_texts: dict[str, Path], tmp_path: Path
) -> None:
    """LoRA and full training of all three families, alpha unlike rank; one other process without polyalign."""
    jobs, expected = [], []
    for family in FAMILIES:
        for train in ("lora", "full"):
            adapter = make_adapter(family, train=train, alpha=6.0)
            model = trained(adapter)
            assert not torch.allclose(logits(model), logits(adapter.load()), atol=0.01)
            expected.append(logits(model))
            folder = tmp_path / f"{family}-{train}"
            adapter.export(model, folder)
            jobs.append(f"{tiny_texts[family]}|{folder}" if train == "lora" else f"{folder}|")
    out = tmp_path / "logits.safetensors"
    hidden = "import sys\nsys.modules['torchvision'] = sys.modules['torchaudio'] = None\n"
    subprocess.run([sys.executable, "-c", hidden + STOCK, *jobs, str(out)], check=True, timeout=300)
    found = load_file(out)
    for place, value in enumerate(expected):
        assert torch.allclose(found[str(place)], value, atol=1e-5), jobs[place]


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gpt2", "bfloat16")])
def test_a_lora_comes_back(family: str, dtype: str, make_adapter: Make, tmp_path: Path) -> None:
    """To the last bit, on a base of low precision too, and ready to be trained on."""
    adapter = make_adapter(family, dtype=dtype, alpha=6.0, dropout=0.1)
    model = trained(adapter)
    adapter.export(model, tmp_path / "out")
    again = adapter.load_lora(adapter.load(), tmp_path / "out")
    found, expected = lora.state_dict(again.network), lora.state_dict(model.network)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(tensor.dtype == torch.float32 for tensor in found.values()) and torch.equal(logits(again), logits(model))
    names = ({name for name, value in part.network.named_parameters() if value.requires_grad} for part in (model, again))
    assert next(names) == next(names)


@pytest.mark.parametrize("first", ["trained", "reference"])
def test_a_reference_adapter_lies_beside_the_trained_one(
    first: str, make_adapter: Make, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Frozen and inactive, in whichever order they come; the policy starts at the base, the reference is what was saved."""
    adapter = make_adapter("llama")
    saved = trained(adapter)
    adapter.export(saved, tmp_path / "out")
    model = adapter.load()
    if first == "trained":
        adapter.load_lora(adapter.trainable(model), tmp_path / "out", name="reference")
    else:
        adapter.trainable(adapter.load_lora(model, tmp_path / "out", name="reference"))
    assert torch.equal(logits(model), logits(adapter.load()))
    moving = {name for name, value in model.network.named_parameters() if value.requires_grad}
    assert moving and all(".default." in name for name in moving)
    with adapter_chosen(model.network, "reference"):
        assert torch.equal(logits(model), logits(saved))
    seat, batch = NamedAdapter(model.network, "reference"), adapter.prepare(model, rows, step=0)
    assert torch.equal(seat.scores(adapter, model, batch, None, index=0).values, adapter.score(saved, batch, None).values)
    adapter.score(model, batch, None).values.sum().backward()
    assert {name for name, value in model.network.named_parameters() if value.grad is not None} == moving


def test_a_fully_trained_model_comes_back_with_its_dropout(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("gpt2", train="full")
    model = trained(adapter)
    adapter.export(model, tmp_path / "out")
    again = make_adapter(str(tmp_path / "out"), train="full").load()
    assert torch.equal(logits(again), logits(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attn_pdrop"] == config["resid_pdrop"] == 0.1 and again.parts["config_noise"] == model.parts["config_noise"]


def test_equal_models_are_equal_files(make_adapter: Make, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}

    adapter = make_adapter("qwen2")
    for name in ("one", "two"):
        adapter.export(trained(adapter), tmp_path / name, {"objective": "dpo"})
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_card_says_what_it_was_made_with(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("llama", chat_template=None)
    model = trained(adapter)
    adapter.export(model, tmp_path / "out", {"title": "Mine", "objective": "dpo, beta 0.1", "data": "sha256:ab|cd"})
    text = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "peft" and "lora" in header["tags"] and "base_model" not in header
    assert "# Mine" in text and "| objective | dpo, beta 0.1 |" in text and "sha256:ab/cd" in text and model.identity in text
    assert str(tmp_path) not in (tmp_path / "out" / "adapter_config.json").read_text()  # no path of this machine
    full = make_adapter("llama", train="full")
    full.export(full.load(), tmp_path / "full")
    assert "PeftModel" not in (tmp_path / "full" / "README.md").read_text()


def test_a_full_disk_leaves_the_earlier_export(make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter("llama")
    model = trained(adapter)
    adapter.export(model, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    disturb(model)

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(injected_lora, "save_file", no_space)
    with pytest.raises(UserError, match="as it was before"):
        adapter.export(model, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_loaded(make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("llama")
    adapter.export(trained(adapter), tmp_path / "out")
    with pytest.raises(UserError, match="there is no LoRA in"):
        adapter.load_lora(adapter.load(), tmp_path)
    for other in (make_adapter("gpt2"), make_adapter("qwen2", targets=("q_proj",))):
        model = other.load()
        if other.settings.targets == ("q_proj",):
            other.export(trained(other), tmp_path / "narrow")
            file = tmp_path / "narrow" / lora.WEIGHTS_FILE
            tensors = load_file(file)
            tensors.pop(next(iter(tensors)))
            save_file(tensors, file)
            with pytest.raises(UserError, match="does not fit this base: 1 tensors have no place or are not there"):
                other.load_lora(model, tmp_path / "narrow")
        else:
            with pytest.raises(UserError, match="does not fit this base"):
                other.load_lora(model, tmp_path / "out")
    model = trained(adapter)
    with pytest.raises(UserError, match="a LoRA named 'default' already"):
        adapter.load_lora(model, tmp_path / "out")
    weights = tmp_path / "out" / lora.WEIGHTS_FILE
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(UserError, match="cannot be read"):
        adapter.load_lora(adapter.load(), tmp_path / "out")
    weights.rename(tmp_path / "out" / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle, which can run code"):
        adapter.load_lora(adapter.load(), tmp_path / "out")
    config = tmp_path / "out" / lora.CONFIG_FILE
    weights.write_bytes(content)
    config.write_text(json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM"}))
    with pytest.raises(UserError, match="only LoRA"):
        adapter.load_lora(adapter.load(), tmp_path / "out")
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match="init_lora_weights is 'pissa', which changes the base's own weights"):
        adapter.load_lora(adapter.load(), tmp_path / "out")
