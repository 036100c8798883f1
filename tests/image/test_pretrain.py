"""Training the embedded base: a killed run goes on from states of the same run only, and the record says how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer

from polyalign.core.errors import UserError
from polyalign.modalities.image import pretrain
from polyalign.modalities.image.adapter import ImageAdapter
from polyalign.modalities.image.pretrain import Settings
from polyalign.modalities.image.pretrain_data import Captioned, Drawings, Shapes
from polyalign.modalities.image.settings import ImageModelSettings
from polyalign.modalities.pretraining import Pace, Stage, Work


class FewMeasured(Shapes):
    """The world, measured on six pictures, one of each task."""

    def conditions(self, count: int) -> list[dict[str, Any]]:
        return super().conditions(6)


def settings(**changes: Any) -> Settings:
    few = {"pictures": 8, "autoencoder_steps": 1, "autoencoder_batch": 2, "denoiser_steps": 1, "denoiser_batch": 2}
    return Settings(**{**few, "sampling_steps": 1, **changes})


def test_a_base_says_how_it_was_made_and_its_states_belong_to_it(tmp_path: Path) -> None:
    words = ["/somewhere/else/base", "--pictures", "8", "--denoiser-steps=1"]
    record = pretrain.pretrain(tmp_path / "base", FewMeasured(), settings(), words)
    assert json.loads((tmp_path / "base" / "base.json").read_text()) == record
    assert record["command"] == "python -m polyalign.modalities.image.pretrain base --pictures 8 --denoiser-steps=1"
    state = torch.load(tmp_path / "base.work" / "denoiser.state.pt", weights_only=True)
    assert state["step"] == 1 and asdict(settings()).items() < state["made_with"].items()
    with pytest.raises(UserError, match=r"autoencoder.state.pt: .*denoiser_steps was 1, now 2. Move the folder .*base.work"):
        pretrain.pretrain(tmp_path / "base", FewMeasured(), settings(denoiser_steps=2))
    with pytest.raises(UserError, match="source was FewMeasured, now Shapes"):
        pretrain.pretrain(tmp_path / "base", Shapes(), settings())
    state.pop("made_with")
    for name in ("autoencoder", "denoiser"):
        torch.save(state, tmp_path / "base.work" / f"{name}.state.pt")
    with pytest.raises(UserError, match="does not say what it was made with"):
        pretrain.pretrain(tmp_path / "base", FewMeasured(), settings())


def made(source: Any, captions: Sequence[str] | None = None) -> dict[str, str]:
    pictures, own = source.pictures(8, 0)
    return pretrain.learnt_from(source, pictures, captions or own)


def test_drawings_are_told_apart_by_pictures_and_captions(tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        for number in range(2):
            Image.new("RGB", (40, 40), (100 * number, 20 if side == "chosen" else 200, 7)).save(
                tmp_path / side / f"{number}.png"
            )
            (tmp_path / "chosen" / f"{number}.txt").write_text(f"a thing {number}")
    before = made(Drawings(tmp_path))
    assert before == made(Drawings(tmp_path)) and before["source"] == "Drawings"
    (tmp_path / "chosen" / "1.txt").write_text("a thing 2")
    renamed = made(Drawings(tmp_path))
    Image.new("RGB", (40, 40), (101, 20, 7)).save(tmp_path / "chosen" / "1.png")
    repainted = made(Drawings(tmp_path))
    assert len({found["source_sha256"] for found in (before, renamed, repainted)}) == 3


def trained(folder: Path, steps: int, stop: int | None = None) -> torch.Tensor:
    """A small regression's averaged weights, after so many steps or as many as it got to."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1)
    folder.mkdir(exist_ok=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    stage = Stage("small", network, optimizer, Pace(steps, 1e-2, warmup=2, ema=0.9, save_every=2), Work(folder, {"seed": 1}))

    def loss_of(step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        return network(torch.full((1, 3), float(step + 1))).square().sum()

    try:
        stage.run(loss_of)
    except KeyboardInterrupt:
        pass
    return stage.average["weight"]


def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 6)
    trained(tmp_path / "killed", 6, stop=5)
    assert torch.equal(trained(tmp_path / "killed", 6), whole)


def test_the_command_explains_itself_and_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "drawings").mkdir()
    with pytest.raises(SystemExit) as ended:
        pretrain.main([str(tmp_path / "base"), "--drawings", str(tmp_path / "drawings")])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("pretrain: ")


def sentence_encoder(folder: Path) -> Path:
    """A BERT of two layers with random weights, and its tokenizer."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "thing", "naïve"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def test_a_base_on_a_frozen_sentence_encoder_is_opened_as_any_other(tmp_path: Path) -> None:
    """Captions may have any letters; the encoder stays as it was; what was trained on is what the adapter encodes."""
    drawings = tmp_path / "drawings"
    drawings.mkdir()
    for name, colour in (("red thing", (250, 0, 0)), ("naïve thing", (0, 0, 250))):
        Image.new("RGB", (40, 40), colour).save(drawings / f"{name}.png")
        (drawings / f"{name}.txt").write_text(name, encoding="utf-8")
    encoder = sentence_encoder(tmp_path / "encoder")
    record = pretrain.pretrain(tmp_path / "base", Captioned(drawings), settings(), sentences=encoder)
    assert record["source"] == "Captioned" and record["sentences"].startswith("encoder@sha256:")
    kept = load_file(tmp_path / "base" / "text_encoder" / "model.safetensors")
    before = load_file(encoder / "model.safetensors")
    assert all(torch.equal(kept[name].float(), before[name].half().float()) for name in before)
    adapter = ImageAdapter(ImageModelSettings(base=str(tmp_path / "base"), sampling_steps=2, guidance=2.0))
    model = adapter.load()
    assert model.parts["family"] == "sd" and type(model.parts["text_encoder"]).__name__ == "BertModel"
    first, second = adapter.sample(adapter.trainable(model), [{"prompt": "red thing"}, {"prompt": "naïve thing"}], [1, 1])
    assert first.size == (32, 32) and first.tobytes() != second.tobytes()
    (clean, names), (same, mixed) = (Captioned(drawings, wrong).pictures(60, 0) for wrong in (0.0, 0.5))
    swapped = sum(before != after for before, after in zip(names, mixed, strict=True))
    assert torch.equal(clean, same) and 5 <= swapped <= 30  # half of the half whose new caption is the other one
    with pytest.raises(UserError, match="ASCII letters only"):
        pretrain.pretrain(tmp_path / "other", Captioned(drawings), settings())
    with pytest.raises(UserError, match="autoencoder.state.pt: .*sentences was encoder@sha256"):
        pretrain.pretrain(tmp_path / "base", FewMeasured(), settings())
