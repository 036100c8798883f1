"""Whole runs of the audio modality on an untrained base of the embedded architecture: what tests of stages share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from polyalign.core.cli import main
from polyalign.datasets.audio.waves import write
from polyalign.datasets.worlds import sounds
from polyalign.modalities.audio import tiny_architecture
from polyalign.modalities.audio.mel_codec import MelCodec, MelSettings, PatchBasis, patches_of

ORDERS = ("a bell then a drum", "a drum then a bell", "a clap then a horn", "a horn before a clap")


def save_base(folder: Path) -> Path:
    """The embedded base's folder with random weights."""
    words = sorted({word for prompt in sounds.all_prompts() for word in prompt.split()})
    settings = MelSettings()
    clips = [wave for _, wave, _ in sounds.clips("train", 12)]
    fitted = PatchBasis.fit(patches_of(clips, settings), settings.channels, 1.0)
    codec = MelCodec(settings, PatchBasis(fitted.mean, fitted.down.contiguous(), fitted.up))
    tokenizer, networks = tiny_architecture.build(words, settings, seed=7)
    torch.manual_seed(0)
    torch.nn.init.normal_(
        networks["denoiser"].get_submodule("proj_out").weight, std=0.05
    )  # starts at nothing, and hides the rest
    tiny_architecture.save(folder, tiny_architecture.Base(tokenizer, networks, codec))
    return folder


def save_pairs(folder: Path, prompts: tuple[str, ...] = ORDERS) -> Path:
    """``chosen/`` and ``rejected/``: each prompt's right clip, and that of the same events in the other order."""
    for number, prompt in enumerate(prompts):
        spec = sounds.parse(prompt)
        turned = sounds.Spec(spec.task, spec.groups[::-1])
        for side, one in (("chosen", spec), ("rejected", turned)):
            write(folder / side / f"{number}.flac", sounds.render(one, 10 + number)[0])
        (folder / "chosen" / f"{number}.txt").write_text(prompt)
    return folder


def recipe(base: Path, pairs: Path, **changes: Any) -> dict[str, Any]:
    """Four pairs of a folder, three steps."""
    return {
        "modality": "audio",
        "seed": 3,
        "model": {"base": str(base), "lora": {"rank": 2}},
        "sampler": {"steps": 2, "guidance": 1.5, "batch_size": 4, "codec_batch_size": 4},
        "pairs": {"source": "folders", "folder": str(pairs)},
        "objective": {"name": "dpo", "beta": {"value": 2000}},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "micro_batch_size": 4,
            "optimizer": {"learning_rate": 1e-3},
            "save_every": 2,
            "threads": 1,
        },
        "evaluate": {
            "prompts": {"world": "sounds", "split": "heldout", "count": 2},
            "judges": [{"name": "sounds"}, {"name": "event_order"}],
        },
        **changes,
    }


def run(folder: Path, verb: str, content: dict[str, Any], *more: str) -> int:
    """The command line on a recipe; returns its exit code. The run folder is ``folder/run``."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"run": str(folder / "run"), **content}))
    return main([verb, str(file), *more])
