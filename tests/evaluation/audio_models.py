"""Tiny networks with random weights, saved in the layouts of the published ones, and sounds for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    ClapAudioConfig,
    ClapConfig,
    ClapModel,
    ClapTextConfig,
    PreTrainedTokenizerFast,
)

from polyalign.evaluation.audio.cnn14 import BASIS, CNN14, FILTERS, FRONTS
from polyalign.evaluation.audio.sound import Clip
from polyalign.evaluation.audio.vggish import VGGish

RATE = 16_000
WORDS = ["<s>", "<pad>", "</s>", "<unk>", "a", "bell", "drum", "then", "dog", "barks"]
LABELS = ["Dog", "Bark", "Bell", "Drum", "Thump, thud"]
CLAP_FRONT = {"sampling_rate": 16_000, "max_length_s": 1, "fft_window_size": 512, "hop_length": 250, "feature_size": 16}


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE, seed: int = 0) -> Clip:
    time = np.arange(round(seconds * rate)) / rate
    noise = 0.02 * np.random.default_rng(seed).standard_normal(len(time))
    return Clip((0.4 * np.sin(2 * np.pi * hertz * time) + noise).astype(np.float32), rate)


def write_folder(folder: Path, count: int, *, start: float = 200.0, seconds: float = 1.0, rate: int = RATE) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        clip = tone(start + 70 * number, seconds, rate, number)
        soundfile.write(folder / f"sound_{number:02d}.wav", clip.samples, rate)
    return folder


def randomised(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """The network's tensors, random and of a size that keeps signals alive."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            made[name] = value
        elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            made[name] = torch.rand(value.shape, generator=generator) + 0.5
        elif value.ndim > 1:
            made[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        else:
            made[name] = 0.1 * torch.randn(value.shape, generator=generator)
    return made


def save_cnn14(path: Path, rate: int = 16_000, seed: int = 0) -> Path:
    """PANNs' own names: the front end's tensors among them, all under "model" beside an iteration."""
    front = next(front for front in FRONTS if front.rate == rate)
    weights = randomised(CNN14(front, (4, 4, 6, 6, 8, 10), 12, 7), seed)
    mel = CNN14(front, (4, 4, 6, 6, 8, 10), 12, 7).mel
    weights.pop("mel")
    bins = front.window // 2 + 1
    weights |= {name: torch.zeros(bins, 1, front.window) for name in BASIS} | {FILTERS: mel}
    torch.save({"iteration": 3, "model": weights}, path)
    return path


def save_vggish(path: Path, seed: int = 0) -> Path:
    torch.save(randomised(VGGish((2, 3, 4, 4, 5, 6), 10, 8), seed), path)
    return path


def save_ast(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=64, num_mel_bins=32,
        id2label=dict(enumerate(LABELS)), label2id={label: n for n, label in enumerate(LABELS)},
    )  # fmt: skip
    ASTForAudioClassification(config).save_pretrained(folder)
    said = {"sampling_rate": RATE, "max_length": 64, "num_mel_bins": 32, "mean": -4.0, "std": 4.5}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


def save_clap(folder: Path, seed: int = 0, **front: Any) -> Path:
    torch.manual_seed(seed)
    text = ClapTextConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, projection_dim=12,
    )  # fmt: skip
    audio = ClapAudioConfig(
        spec_size=64, num_mel_bins=16, window_size=4, patch_embeds_hidden_size=8, depths=[1, 1], num_attention_heads=[2, 2],
        num_hidden_layers=2, hidden_size=16, projection_dim=12, num_classes=3,
    )  # fmt: skip
    ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=12)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )  # fmt: skip
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    said = {**CLAP_FRONT, "frequency_min": 50, "frequency_max": 7000, "truncation": "rand_trunc", "padding": "repeatpad"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**said, **front}))
    return folder
