"""Train the embedded base: ``python -m polyalign.modalities.image.pretrain FOLDER``.

The base has to have learnt its skill before anything can be aligned, and has to err in a way that leaves something to prefer.
So it is trained for long, on pictures of the world `shapes` whose captions are wrong as often as `shapes.CAPTION_NOISE` says,
and is gated at the end: clean pictures above 0.9, mini-GenEval between 0.45 and 0.85.

Two stages. The autoencoder learns to draw clean shapes (L1 + squared error + 1e-5 KL). Then the UNet and both text encoders
learn together, from scratch, to predict v on its latents, with 10 % empty captions for guidance and an exponential moving
average of the weights, which is what is kept. Half of the timesteps come from the noisiest two fifths, where it is decided what
is drawn where. Every draw is keyed by its step, so that a killed run continues to the same weights.

With ``--drawings`` it learns a user's drawings, and with ``--sentences minilm`` the UNet learns alone, told the states of a
frozen sentence encoder; such bases are the user's own and are not embedded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyalign.core.randomness import rng
from polyalign.evaluation.weight_files import identity, weight_files
from polyalign.modalities.image import tiny_architecture as tiny
from polyalign.modalities.image.pretrain_data import Captioned, Drawings, Shapes, Source
from polyalign.modalities.image.pretrain_text import Frozen, Learnt, Text, sentence_encoder
from polyalign.modalities.pretraining import Pace, Stage, Work, digest, run_command, timesteps, unfit_in_words, write_record

MODULE = "polyalign.modalities.image.pretrain"


@dataclass(frozen=True)
class Settings:
    """What the shipped weights were trained with; the command line changes the lengths only, for trials."""

    seed: int = 20261121
    pictures: int = 40_000
    autoencoder_steps: int = 2_400
    autoencoder_batch: int = 32
    autoencoder_rate: float = 2e-3
    kl_weight: float = 1e-5  # Stable Diffusion: 1e-6; ten times that keeps small errors of the latents out of the picture
    denoiser_steps: int = 20_000
    denoiser_batch: int = 32
    denoiser_rate: float = 2e-3
    warmup: int = 200
    ema: float = 0.999
    empty_captions: float = 0.1
    noisy_share: float = 0.5  # of the timesteps, drawn from the noisiest
    noisy_from: float = 0.6  # of the schedule's length
    guidance: float = 1.5
    sampling_steps: int = 20
    save_every: int = 1000


def stage_of(name: str, network: nn.Module, steps: int, peak: float, settings: Settings, work: Work) -> Stage:
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    return Stage(name, network, optimizer, Pace(steps, peak, settings.warmup, settings.ema, settings.save_every), work)


def indices_of(step: int, batch: int, settings: Settings, purpose: str) -> Tensor:
    return torch.randint(settings.pictures, (batch,), generator=rng(settings.seed, purpose, step))


def train_autoencoder(pipeline: Any, pictures: Tensor, settings: Settings, work: Work) -> None:
    vae = pipeline.vae
    stage = stage_of("autoencoder", vae, settings.autoencoder_steps, settings.autoencoder_rate, settings, work)

    def loss_of(step: int) -> Tensor:
        picture = pictures[indices_of(step, settings.autoencoder_batch, settings, "autoencoder")]
        posterior = vae.encode(picture).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng(settings.seed, "posterior", step))
        again = vae.decode(posterior.mean + posterior.std * noise).sample
        return F.l1_loss(again, picture) + F.mse_loss(again, picture) + settings.kl_weight * posterior.kl().mean()

    @torch.no_grad()
    def watch() -> str:
        again = vae.decode(vae.encode(pictures[:200]).latent_dist.mean).sample
        return f"mean squared error {F.mse_loss(again, pictures[:200]):.5f}"

    stage.run(loss_of, watch)


@torch.no_grad()
def encode(pipeline: Any, pictures: Tensor) -> Tensor:
    """Posterior means scaled to unit deviation; the scale becomes the autoencoder's ``scaling_factor``."""
    means = torch.cat([pipeline.vae.encode(part).latent_dist.mean for part in pictures.split(256)])
    pipeline.vae.register_to_config(scaling_factor=float(f"{1 / means.std().item():.5f}"))
    return means * pipeline.vae.config.scaling_factor


def train_denoiser(pipeline: Any, latents: Tensor, text: Text, source: Source, settings: Settings, work: Work) -> None:
    together = nn.ModuleDict({"unet": pipeline.unet, **text.trained})
    signal = pipeline.scheduler.alphas_cumprod
    stage = stage_of("denoiser", together, settings.denoiser_steps, settings.denoiser_rate, settings, work)

    def loss_of(step: int) -> Tensor:
        draws = rng(settings.seed, "denoiser", step)
        rows = torch.randint(settings.pictures, (settings.denoiser_batch,), generator=draws)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=draws)
        noisy_ones = {"noisy_share": settings.noisy_share, "noisy_from": settings.noisy_from}
        times = timesteps(len(rows), len(signal), draws, **noisy_ones)
        told = text.told(rows, torch.rand(len(rows), generator=draws) < settings.empty_captions)
        alpha, sigma = signal[times].sqrt().view(-1, 1, 1, 1), (1 - signal[times]).sqrt().view(-1, 1, 1, 1)
        noisy = alpha * clean + sigma * noise
        predicted = pipeline.unet(noisy, times, told.states, added_cond_kwargs=told.added).sample
        return F.mse_loss(predicted, alpha * noise - sigma * clean)

    stage.run(loss_of, lambda: measure(pipeline, source, settings, count=120))


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def measure(pipeline: Any, source: Source, settings: Settings, count: int) -> dict[str, float]:
    """The source's figures of pictures sampled from the pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    conditions, pictures = source.conditions(count), []
    for number, part in enumerate(batches(conditions, 60)):
        drawn: Any = pipeline(
            [condition["prompt"] for condition in part],
            height=tiny.PIXELS,
            width=tiny.PIXELS,
            guidance_scale=settings.guidance,
            num_inference_steps=settings.sampling_steps,
            generator=rng(settings.seed, "measure", number),
        )
        pictures += drawn.images
    return source.figures(conditions, pictures)


def learnt_from(source: Source, pictures: Tensor, captions: Sequence[str]) -> dict[str, str]:
    """The source's name, and the hash of the pictures, captions and words that are learnt from it."""
    sha = hashlib.sha256(json.dumps([list(pictures.shape), source.words(), list(captions)]).encode())
    sha.update(pictures.contiguous().numpy())
    return {"source": type(source).__name__, "source_sha256": sha.hexdigest()}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the base goes; the states of a run that goes on lie in FOLDER.work")
    parser.add_argument(
        "--drawings",
        type=Path,
        help="learn from this folder, not from the world: chosen/ and rejected/ with captions, or NAME.png with NAME.txt",
    )
    parser.add_argument(
        "--sentences",
        metavar="ENCODER",
        help="take a frozen sentence encoder for the text: minilm (the package's) or a folder; default: learn two small CLIPs",
    )
    parser.add_argument(
        "--wrong-captions",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of --drawings: learn this share of them with another one's caption, so that the base errs (default 0)",
    )
    for name in ("seed", "autoencoder_steps", "kl_weight", "denoiser_steps", "pictures"):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--threads", type=int, default=1)
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options.pop("threads"))
    folder, drawings, sentences, wrong = (options.pop(name) for name in ("folder", "drawings", "sentences", "wrong_captions"))

    def train() -> tuple[dict[str, Any], str | None]:
        source = Shapes() if drawings is None else (Drawings if (drawings / "chosen").is_dir() else Captioned)(drawings, wrong)
        encoder = None if sentences is None else sentence_encoder(sentences)
        record = pretrain(folder, source, Settings(**options), arguments, sentences=encoder)
        return record, unfit_in_words(source.unfit(record["figures"]))

    run_command(train)


def pretrain(
    folder: Path,
    source: Source,
    settings: Settings,
    options: Sequence[str] = ("FOLDER",),
    *,
    sentences: Path | None = None,
) -> dict[str, Any]:
    """Train a base and write it to ``folder`` with ``base.json``, its record, which is returned. ``options`` are the words of
    the command line, for the record; ``sentences`` is the folder of a frozen sentence encoder, None learns two small CLIPs.

    Raises:
        UserError: the states in ``FOLDER.work`` are of a run with other settings or another source.
    """
    started = time.time()
    pipeline: Any = tiny.build(source.words(), settings.seed) if sentences is None else tiny.build_on(sentences, settings.seed)
    pictures, captions = source.pictures(settings.pictures, settings.seed)
    encoder = {} if sentences is None else {"sentences": identity(sentences.name, weight_files(sentences))}
    work = Work(folder.with_suffix(".work"), {**asdict(settings), **learnt_from(source, pictures, captions), **encoder})
    work.folder.mkdir(parents=True, exist_ok=True)
    train_autoencoder(pipeline, pictures, settings, work)
    text = Learnt(pipeline, captions) if sentences is None else Frozen(pipeline, captions)
    train_denoiser(pipeline, encode(pipeline, pictures), text, source, settings, work)
    pipeline.to(torch.float16).save_pretrained(folder)
    kept = type(pipeline).from_pretrained(folder, dtype=torch.float32)  # measured as it is shipped: rounded to float16
    found = {
        "source": type(source).__name__,
        **encoder,
        "settings": asdict(settings),
        "sha256": digest(folder),
        "figures": measure(kept, source, settings, count=600),
    }
    return write_record(folder, found, started=started, module=MODULE, options=options)


if __name__ == "__main__":
    main()
