"""Train the embedded base: ``python -m polyalign.modalities.audio.pretrain FOLDER``.

The base has to have learnt its skill before anything can be aligned, and has to err in a way that leaves something to prefer.
So it is trained for long, on clips of the world `sounds` whose captions are wrong about time as often as `sounds.CAPTION_NOISE`
says, and is gated at the end, on held-out prompts: presence of the events above 0.9, order of those that are all there between
0.6 and 0.9, right clips between 0.35 and 0.85, clean clips above 0.9.

Text encoder and denoiser learn together, from scratch, to predict v on patched mel latents, with 10 % empty captions for
guidance and an exponential moving average of the weights, which is what is kept. Half of the timesteps come from the noisiest
two fifths, where it is decided what sounds when. Every draw is keyed by its step, so that a killed run continues to the same
weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from polyalign.core.likelihood.schedules import NoiseSchedule
from polyalign.core.randomness import rng, seed_of
from polyalign.datasets.audio.waves import Wave
from polyalign.datasets.worlds import sound_detector, sounds
from polyalign.modalities.audio import tiny_architecture as tiny
from polyalign.modalities.audio.mel_codec import MelCodec, MelSettings, PatchBasis, patches_of
from polyalign.modalities.pretraining import Pace, Stage, Work, command_line, digest, timesteps, unfit_in_words, write_record

MODULE = "polyalign.modalities.audio.pretrain"
# What the base hears of each task. Orders take longest to learn, so they come more often.
LESSONS = (*sounds.TASKS, "order", "order", "order_of_three", "count_in_order")

MEASURING = ("guidance", "sampling_steps", "save_every", "watched", "measured")
"""Settings that leave the weights as they are."""


@dataclass(frozen=True)
class Settings:
    """What the shipped weights were trained with; the command line changes lengths only, for trials."""

    seed: int = 20261121
    clips: int = 20_000
    steps: int = 10_000
    batch: int = 32
    rate: float = 2e-3
    warmup: int = 200
    ema: float = 0.999
    empty_captions: float = 0.1
    noisy_share: float = 0.5  # of the timesteps, drawn from the noisiest
    noisy_from: float = 0.6  # of the schedule's length
    deviation: float = 0.7  # of the latents: below 1, since loud patches amid silence would be found at any noise level
    fitted: int = 4000  # clips that the codec's basis is fitted to
    guidance: float = 2.0
    sampling_steps: int = 20
    save_every: int = 2000
    watched: int = 100
    measured: int = 500


@dataclass(frozen=True)
class Data:
    """Latents (N, C, H, W), the ids and masks of their captions (N, L), and of the empty caption (1, L)."""

    latents: Tensor
    ids: Tensor
    mask: Tensor
    empty: tuple[Tensor, Tensor]


def world(settings: Settings) -> tuple[Tensor, list[str]]:
    """Clips (N, samples) and their captions, some of them wrong. Of every composition: one that were heard under wrong captions
    only would be learnt wrong."""
    draws = random.Random(seed_of(settings.seed, "captions"))
    found = list(sounds.clips(None, settings.clips, settings.seed, LESSONS))
    captions = [sounds.noisy_caption(spec, draws) for spec, _, _ in found]
    return torch.stack([torch.from_numpy(wave.samples) for _, wave, _ in found]), captions


def words() -> list[str]:
    return sorted({word for prompt in sounds.all_prompts() for word in prompt.split()})


def encode(clips: Tensor, settings: Settings, plain: MelSettings) -> tuple[Tensor, MelCodec]:
    """Latents of clips, and the codec, whose basis is fitted to them."""
    parts = clips.split(200)
    patches = torch.cat([patches_of([Wave(row.numpy(), plain.rate) for row in part], plain) for part in parts])
    codec = MelCodec(plain, PatchBasis.fit(patches[: settings.fitted], plain.channels, settings.deviation))
    return torch.cat([codec.basis.encode(part) for part in patches.split(200)]), codec


def stage_of(networks: nn.ModuleDict, settings: Settings, work: Work) -> Stage:
    optimizer = torch.optim.AdamW(networks.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01)
    pace = Pace(settings.steps, settings.rate, settings.warmup, settings.ema, settings.save_every)
    return Stage("base", networks, optimizer, pace, work)


def loss_at(step: int, networks: nn.ModuleDict, data: Data, settings: Settings, schedule: NoiseSchedule) -> Tensor:
    """mean (v - predicted)^2, v = a noise - s clean, at the step's rows, noise and timesteps."""
    draws = rng(settings.seed, "base", step)
    rows = torch.randint(len(data.latents), (settings.batch,), generator=draws)
    clean = data.latents[rows]
    noise = torch.randn(clean.shape, generator=draws)
    noisy_ones = {"noisy_share": settings.noisy_share, "noisy_from": settings.noisy_from}
    times = timesteps(len(rows), len(schedule.signal), draws, **noisy_ones)
    dropped = (torch.rand(len(rows), generator=draws) < settings.empty_captions)[:, None]
    ids = torch.where(dropped, data.empty[0], data.ids[rows])
    mask = torch.where(dropped, data.empty[1], data.mask[rows])
    signal, sigma = (table[times].view(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise))
    states = networks["text_encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
    predicted = tiny.predict(networks["denoiser"], signal * clean + sigma * noise, times, states, mask)
    return F.mse_loss(predicted, signal * noise - sigma * clean)


@torch.no_grad()
def sample(
    networks: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, prompts: list[str], shape: tuple[int, ...], settings: Settings
) -> Tensor:
    """Latents (N, C, H, W) of prompts: DDIM with guidance u + g (c - u)."""
    states, masks = [], []
    for texts in ([""], prompts):
        ids, mask = tiny.tokenise(tokenizer, texts)
        states.append(networks["text_encoder"](input_ids=ids, attention_mask=mask).last_hidden_state)
        masks.append(mask)
    count = len(prompts)
    both = torch.cat([states[0].expand(count, -1, -1), states[1]]), torch.cat([masks[0].expand(count, -1), masks[1]])
    scheduler: Any = DDIMScheduler.from_config(tiny.scheduler_config())
    scheduler.set_timesteps(settings.sampling_steps)
    latents = torch.randn((count, *shape), generator=rng(settings.seed, "measure", prompts[0]))
    for time_ in scheduler.timesteps:
        twice = torch.cat([latents, latents])
        without, given = tiny.predict(networks["denoiser"], twice, time_.expand(2 * count), *both).chunk(2)
        latents = scheduler.step(without + settings.guidance * (given - without), time_, latents).prev_sample
    return latents


def measure(
    networks: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, codec: MelCodec, settings: Settings, count: int
) -> dict[str, float]:
    """`sound_detector.figures` of clips sampled for held-out prompts."""
    networks.eval()
    prompts = [condition["prompt"] for condition in sounds.prompts("heldout", count)]
    waves: list[Wave] = []
    for start in range(0, count, 50):
        part = prompts[start : start + 50]
        waves += codec.decode(sample(networks, tokenizer, part, codec.latent_shape(codec.seconds), settings))
    networks.train()
    return sound_detector.measure((sounds.parse(prompt), wave) for prompt, wave in zip(prompts, waves, strict=True))


def unfit(figures: dict[str, float]) -> str | None:
    """Why a base with these figures is none to align, or None."""
    if figures["presence"] <= 0.9:
        return f"{figures['presence']} of the events are there, which is not above 0.9: it has not learnt what sounds"
    if not 0.6 <= figures["order"] <= 0.9:
        return f"{figures['order']} of the clips with all their events have them in order; 0.6 to 0.9 leaves something to learn"
    if not 0.35 <= figures["strict"] <= 0.85:
        return f"{figures['strict']} of its clips are right; 0.35 to 0.85 leaves something to learn"
    if figures["clean"] <= 0.9:
        return f"{figures['clean']} of its clips are clean, which is not above 0.9"
    return None


def made_with(settings: Settings, codec: MelSettings) -> dict[str, Any]:
    """What a state must have been made with to be gone on from: everything but how the figures are taken."""
    of_training = {name: value for name, value in asdict(settings).items() if name not in MEASURING}
    return {**of_training, "codec": {**asdict(codec), "patch": list(codec.patch)}}


def pretrain(folder: Path, settings: Settings, options: Sequence[str] = ("FOLDER",)) -> dict[str, Any]:
    """Train a base and write it to ``folder`` with ``base.json``, its record, which is returned. ``options`` are the words of
    the command line, for the record.

    Raises:
        UserError: the state in ``FOLDER.work`` is of a run with other settings.
    """
    started = time.time()
    work = folder.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    clips, captions = world(settings)
    latents, codec = encode(clips, settings, MelSettings())
    tokenizer, networks = tiny.build(words(), codec.settings, settings.seed)
    data = Data(latents, *tiny.tokenise(tokenizer, captions), tiny.tokenise(tokenizer, [""]))
    schedule = NoiseSchedule.from_scheduler_config(tiny.scheduler_config())
    stage = stage_of(networks, settings, Work(work, made_with(settings, codec.settings)))
    stage.run(
        lambda step: loss_at(step, networks, data, settings, schedule),
        lambda: measure(networks, tokenizer, codec, settings, settings.watched),
    )
    tiny.save(folder, tiny.Base(tokenizer, networks.half(), codec))
    kept = tiny.read(folder)  # measured as it is shipped: rounded to float16
    found = {
        "world": "sounds",
        "errors_in_its_captions": dict(sounds.CAPTION_NOISE),
        "settings": asdict(settings),
        "sha256": digest(folder),
        "figures": measure(kept.networks, kept.tokenizer, kept.codec, settings, settings.measured),
    }
    return write_record(folder, found, started=started, module=MODULE, options=options)


def main(argv: Sequence[str] | None = None) -> None:
    def train(folder: Path, lengths: dict[str, int], said: Sequence[str]) -> tuple[dict[str, Any], str | None]:
        record = pretrain(folder, Settings(**lengths), said)
        return record, unfit_in_words(unfit(record["figures"]))

    command_line(argv, __doc__, {"steps": Settings.steps, "clips": Settings.clips}, train)


if __name__ == "__main__":
    main()
