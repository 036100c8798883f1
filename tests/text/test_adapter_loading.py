"""Loading: what is opened, and what is refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_texts import CHATML, FAMILIES, make_tokenizer

from polyalign.core.errors import UserError
from polyalign.modalities.text.adapter import TextAdapter
from polyalign.modalities.text.settings import TextModelSettings

Make = Callable[..., TextAdapter]


@pytest.fixture
def copied(tiny_texts: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_texts["llama"], tmp_path / "model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_opened_frozen_and_in_evaluation_mode(family: str, make_adapter: Make) -> None:
    model = make_adapter(family).load()
    assert model.identity.startswith(f"{family}@sha256:") and model.identity == make_adapter(family).load().identity
    assert not model.network.training and not any(parameter.requires_grad for parameter in model.network.parameters())
    assert model.parts["positions"] == 192 and model.parts["eos_ids"][0] == model.parts["tokenizer"].eos_token_id


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_of_the_base_is_off(family: str, make_adapter: Make) -> None:
    """Both of these have it in their configuration: twice the same input in training mode gives twice the same logits."""
    model = make_adapter(family).load()
    assert set(model.parts["config_noise"].values()) == {0.1}
    model.network.train()
    ids = torch.arange(5, 25)[None]
    assert torch.equal(*(model.network(input_ids=ids).logits for _ in range(2)))


def test_identity_follows_weights_tokenizer_and_template(make_adapter: Make, copied: Path, tmp_path: Path) -> None:
    before = make_adapter(str(copied)).load().identity
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    model = make_adapter(str(copied), chat_template=template).load()
    assert model.identity.startswith(before + "+template@sha256:") and model.parts["tokenizer"].chat_template == CHATML
    file = copied / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 99}))
    assert make_adapter(str(copied)).load().identity != before


def test_dtype_of_the_weights(make_adapter: Make) -> None:
    assert make_adapter("llama", dtype="bfloat16").load().network.dtype == torch.bfloat16
    assert make_adapter("llama", dtype="bfloat16", train="full").load().network.dtype == torch.float32  # its masters


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def own_code(folder: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('it ran')\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))


def lora_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def larger_tokenizer(folder: Path) -> None:
    tokens = make_tokenizer("llama")
    tokens.add_tokens([f"<word{place}>" for place in range(9)])
    tokens.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("config.json"), "no config.json"),
        (lora_only, "holds a LoRA and not a whole model"),
        (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
        (remove("model.safetensors"), "no .safetensors file"),
        (pickled, r"pytorch_model.bin only, a pickle.*convert it"),
        (cut_short, "cannot be read"),
        (own_code, "code of their own"),
        (larger_tokenizer, "309 tokens and the model has embeddings for 300"),
    ],
)
def test_a_folder_that_cannot_be_opened(change: Callable[[Path], None], words: str, copied: Path, make_adapter: Make) -> None:
    change(copied)
    with pytest.raises(UserError, match=words):
        make_adapter(str(copied)).load()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base": "/no/such/folder"}, "no such folder"),
        ({"base": "a/b/c"}, "no hub id"),
        ({"train": "qlora"}, "need a GPU with CUDA"),
        ({"chat_template": "/no/such.jinja"}, "chat_template"),
        ({"revision": "main"}, "base is a folder"),
    ],
)
def test_settings_that_cannot_be_met(settings: dict[str, Any], words: str, make_adapter: Make) -> None:
    with pytest.raises(UserError, match=words):
        make_adapter(settings.pop("base", "llama"), **settings).load()


def test_a_file_is_no_base_and_a_template_is_utf8(copied: Path, make_adapter: Make) -> None:
    with pytest.raises(UserError, match="is a folder"):
        make_adapter(str(copied / "model.safetensors")).load()
    (copied / "bad.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="UTF-8"):
        make_adapter(str(copied), chat_template=copied / "bad.jinja").load()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"max_new_tokens": 0},
        {"max_length": 0},
        {"top_k": 0},
        {"dropout": 1.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"targets": ()},
    ],
)
def test_settings_outside_their_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        TextModelSettings(**wrong)


def test_a_missing_padding_token_is_no_matter(make_adapter: Make) -> None:
    """The end-of-sequence token stands in, and the masks tell it from a real one."""
    adapter = make_adapter("llama")
    model = adapter.load()
    assert model.parts["tokenizer"].pad_token is None and model.parts["pad_id"] == model.parts["tokenizer"].eos_token_id
    row = {"pair_id": "p", "condition": {"prompt": "a"}, "chosen": "yes", "rejected": "it is good news"}
    batch = adapter.prepare(model, [row], step=0)
    short = batch.tensors["completion_mask"][0, 0]
    ended = batch.tensors["completion_ids"][0, 0] == model.parts["pad_id"]
    assert ended.sum() > 1 and ended[short.bool()].sum() == 1  # one of them is the answer's end, the others are padding
    alone = adapter.prepare(model, [{**row, "rejected": "yes"}], step=0)
    with torch.no_grad():
        together = adapter.score(model, batch, None).values[0, 0].sum()
        assert float(together - adapter.score(model, alone, None).values[0, 0].sum()) == pytest.approx(0.0, abs=1e-5)


def test_missing_weights_are_not_filled_at_random(copied: Path, make_adapter: Make) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 of its weights are missing.*layers.1.mlp.up_proj"):
        make_adapter(str(copied)).load()
