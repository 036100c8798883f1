"""Tango's own layout: the files of declare-lab/tango, tango-full, tango-full-ft-audiocaps and tango2, read into stock classes
and written back.

=========================  ==========================================================================================
main_config.json           names of the text encoder and of the scheduler on the hub, and a path to the UNet's configuration
                           inside a clone of the code
vae_config.json            AudioLDM's first stage
stft_config.json           the mel front end
pytorch_model_main.bin     ``unet.*`` and ``text_encoder.*``
pytorch_model_vae.bin      ``encoder.*``, ``decoder.*``, ``quant_conv.*``, ``post_quant_conv.*``, ``vocoder.*``
pytorch_model_stft.bin     the front end's tables; never needed here, compared if it is there, and written
=========================  ==========================================================================================

Everything that these files leave to the hub is embedded (:mod:`polyalign.modalities.audio.tango_names`), except the tokenizer.
Pickles are read with ``weights_only``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel

from polyalign.core.errors import UserError
from polyalign.modalities.audio import tango_names as names
from polyalign.modalities.audio.mel import FrontEnd, filter_bank
from polyalign.modalities.checkpoint_files import read_tensors

MAIN, VAE, STFT = "pytorch_model_main.bin", "pytorch_model_vae.bin", "pytorch_model_stft.bin"
CONFIGS = ("main_config.json", "vae_config.json", "stft_config.json")
UNET_CONFIG_FILE = "configs/diffusion_model_config.json"
CHECKPOINT_FILES = (MAIN, "pytorch_model_2.bin", "model_2.safetensors")
"""In which a folder may hold ``unet.*``: an export, or a training folder of accelerate, which counts VAE, STFT and model."""


@dataclass(frozen=True)
class TangoModules:
    """What the layout holds, as stock classes. ``text_name`` is the text encoder's hub id."""

    unet: Any
    text_encoder: Any
    vae: Any
    vocoder: Any
    mel: FrontEnd
    scheduler_config: Mapping[str, Any]
    text_name: str


def is_tango(folder: Path) -> bool:
    """Whether a folder has any of the layout's files, so that what else is missing can be said."""
    return any((folder / name).is_file() for name in ("main_config.json", "stft_config.json", MAIN))


def read(folder: Path, checkpoint: Path | None = None) -> TangoModules:
    """The models of a folder, in float32 on the CPU; ``checkpoint``, a file or folder with ``unet.*`` and ``text_encoder.*``,
    takes the place of ``pytorch_model_main.bin``.

    Raises:
        UserError: a file, a key of a configuration or a tensor is missing, superfluous or of another shape; a scheduler or UNet
            is only named, and its configuration is not known; a pickle is dangerous or damaged.
    """
    _refuse_missing(folder, without_main=checkpoint is not None)
    main, described_vae, stft = (_json(folder / name) for name in CONFIGS)
    mel = _mel(stft, folder / CONFIGS[2])
    text_name = str(_key(main, "text_encoder_name", folder / CONFIGS[0]))
    scheduler = _scheduler_config(folder, str(_key(main, "scheduler_name", folder / CONFIGS[0])))
    file = folder / MAIN if checkpoint is None else _checkpoint_file(checkpoint)
    tensors = read_tensors(file)
    unet = _unet(folder, main, _part(tensors, "unet.", file), file)
    text_encoder = _text_encoder(_part(tensors, "text_encoder.", file), file)
    del tensors
    vae, vocoder = _vae_and_vocoder(folder, described_vae, mel)
    _compare_basis(folder / STFT, mel)
    return TangoModules(unet, text_encoder, vae, vocoder, mel, scheduler, text_name)


def write(folder: Path, modules: TangoModules) -> None:
    """Write a folder of the layout: the six files, the UNet's configuration at the path that ``main_config.json`` names, and
    the scheduler's beside it. Tensors are float32, as published; what was not trained is bit for bit what was read."""
    folder.mkdir(parents=True, exist_ok=True)
    unet_config = {key: value for key, value in modules.unet.config.items() if key in names.UNET_CONFIG}
    main = {
        "text_encoder_name": modules.text_name,
        "scheduler_name": names.SCHEDULER_NAME,
        "unet_model_name": None,
        "unet_model_config_path": UNET_CONFIG_FILE,
        "snr_gamma": 5.0,
    }
    mel = modules.mel
    stft = {
        "filter_length": mel.window,
        "hop_length": mel.hop,
        "win_length": mel.window,
        "n_mel_channels": mel.mels,
        "sampling_rate": mel.rate,
        "mel_fmin": mel.low,
        "mel_fmax": mel.high,
    }
    described = {
        CONFIGS[0]: main,
        "config.json": main,
        CONFIGS[1]: names.described_vae(modules.vae.config),
        CONFIGS[2]: stft,
        UNET_CONFIG_FILE: unet_config,
        "scheduler/scheduler_config.json": dict(modules.scheduler_config),
    }
    for name, content in described.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    levels = len(modules.vae.config.block_out_channels)
    main_tensors = _prefixed(modules.unet, "unet.") | _prefixed(modules.text_encoder, "text_encoder.")
    torch.save(main_tensors, folder / MAIN)
    vae = names.vae_from_stock(_plain(modules.vae), levels) | names.vocoder_from_stock(_plain(modules.vocoder))
    torch.save(vae, folder / VAE)
    torch.save(stft_tables(mel), folder / STFT)


def stft_tables(mel: FrontEnd) -> dict[str, Tensor]:
    """What the original asks of ``pytorch_model_stft.bin``: the windowed Fourier basis (2 (W / 2 + 1), 1, W) with its
    pseudo-inverse, and the mel basis (M, W / 2 + 1)."""
    fourier = np.fft.fft(np.eye(mel.window))[: mel.window // 2 + 1]
    basis = np.vstack([fourier.real, fourier.imag])
    window = torch.hann_window(mel.window, dtype=torch.float64).numpy()
    inverse = np.linalg.pinv(basis * mel.window / mel.hop).T
    tables = {"stft_fn.forward_basis": basis * window, "stft_fn.inverse_basis": inverse * window}
    found = {name: torch.from_numpy(table).float().unsqueeze(1) for name, table in tables.items()}
    return {**found, "mel_basis": filter_bank(mel).T.contiguous()}


def _refuse_missing(folder: Path, *, without_main: bool) -> None:
    wanted = [*CONFIGS, VAE, *([] if without_main else [MAIN])]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is a folder in Tango's layout, and lacks {', '.join(missing)}. A download of declare-lab/tango2 "
            f"(or tango, tango-full, ...) has {', '.join([*CONFIGS, MAIN, VAE])}; copy the missing files there."
        )


def _checkpoint_file(place: Path) -> Path:
    if place.is_file():
        return place
    found = next((place / name for name in CHECKPOINT_FILES if (place / name).is_file()), None)
    if found is None:
        raise UserError(f"checkpoint is {place}: no such file, and no folder with one of {', '.join(CHECKPOINT_FILES)}")
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is no configuration in JSON ({error})") from error


def _key(config: Mapping[str, Any], key: str, file: Path) -> Any:
    if config.get(key) is None:
        raise UserError(f"{file} lacks {key}; it has {', '.join(sorted(config)) or 'nothing'}")
    return config[key]


def _number(config: Mapping[str, Any], key: str, file: Path) -> float:
    found = _key(config, key, file)
    if isinstance(found, bool) or not isinstance(found, int | float) or found < 0:
        raise UserError(f"{file}: {key} is {found!r}; expected a number, 0 or more")
    return float(found)


def _mel(stft: Mapping[str, Any], file: Path) -> FrontEnd:
    window, length = int(_number(stft, "filter_length", file)), int(_number(stft, "win_length", file))
    if window != length:
        raise UserError(f"{file}: win_length {length} is not filter_length {window}; only equal ones are known here")
    return FrontEnd(
        rate=int(_number(stft, "sampling_rate", file)),
        window=window,
        hop=int(_number(stft, "hop_length", file)),
        mels=int(_number(stft, "n_mel_channels", file)),
        low=_number(stft, "mel_fmin", file),
        high=_number(stft, "mel_fmax", file),
    )


def _scheduler_config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / "scheduler" / "scheduler_config.json"
    if file.is_file():
        return _json(file)
    if name != names.SCHEDULER_NAME:
        raise UserError(
            f"{folder / CONFIGS[0]}: scheduler_name is {name!r}, and only the configuration of {names.SCHEDULER_NAME} is "
            f"embedded. Put that repository's scheduler_config.json into {file.parent}"
        )
    return dict(names.SCHEDULER_CONFIG)


def _unet(folder: Path, main: Mapping[str, Any], tensors: dict[str, Tensor], file: Path) -> Any:
    if main.get("unet_model_name") is not None:
        raise UserError(
            f"{folder / CONFIGS[0]}: unet_model_name is {main['unet_model_name']!r}, a picture model's UNet between two "
            "projections; only models with unet_model_config_path are opened"
        )
    config, described = names.UNET_CONFIG, file
    inside = (folder / str(main.get("unet_model_config_path") or UNET_CONFIG_FILE)).resolve()
    if inside.is_relative_to(folder.resolve()) and inside.is_file():
        config, described = _json(inside), inside
    with torch.device("meta"):
        unet = _built(UNet2DConditionModel, config, described)
    _place(unet, tensors, "unet.", file)
    return unet


def _text_encoder(tensors: dict[str, Tensor], file: Path) -> Any:
    tensors.setdefault("encoder.embed_tokens.weight", tensors.get("shared.weight", torch.empty(0)))
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**names.t5_config(tensors, file)))
    _place(encoder, tensors, "text_encoder.", file)
    encoder.encoder.set_input_embeddings(encoder.shared)  # the same tensor under two names
    return encoder


def _vae_and_vocoder(folder: Path, described: Mapping[str, Any], mel: FrontEnd) -> tuple[Any, Any]:
    file = folder / VAE
    config = names.vae_config(described, folder / CONFIGS[1])
    tensors = read_tensors(file)
    voice = SpeechT5HifiGanConfig(**names.vocoder_config(tensors, mel.rate, file))
    hop = int(np.prod(voice.upsample_rates))
    if (voice.model_in_dim, hop) != (mel.mels, mel.hop):
        raise UserError(
            f"{file}: its vocoder turns frames of {voice.model_in_dim} bins into {hop} samples each, and {folder / CONFIGS[2]} "
            f"says {mel.mels} bins with a hop of {mel.hop}"
        )
    with torch.random.fork_rng(devices=[]):  # weights that are at once replaced are drawn at random
        vae = _built(AutoencoderKL, config, folder / CONFIGS[1])
        vocoder = SpeechT5HifiGan(voice)
    levels = len(config["block_out_channels"])
    _place(
        vae,
        names.vae_to_stock(tensors, levels),
        "",
        file,
        lambda name: names.from_stock(name, levels),
    )
    _place(vocoder, names.vocoder_to_stock(tensors, mel.mels), "vocoder.", file)
    return vae, vocoder


def _built(kind: Any, config: Mapping[str, Any], file: Path) -> Any:
    """A network of diffusers with weights at random."""
    try:
        return kind.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} describes no {kind.__name__} that can be built: {' '.join(str(error).split())[:300]}"
        ) from error


def _part(tensors: Mapping[str, Tensor], prefix: str, file: Path) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        raise UserError(f"{file} holds no tensor named {prefix}*; its tensors are named like {sorted(tensors)[:3]}")
    return found


def _place(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, file: Path, named: Any = str) -> None:
    """Tensors into a module, all of them and no other; messages name them as the file does."""
    wanted = module.state_dict()
    missing, odd = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or odd:
        kind = f"no {type(module).__name__} of this configuration has"
        lacks = f"lacks {len(missing)} tensors, first {prefix}{named(missing[0])}" if missing else ""
        has = f"has {len(odd)} that {kind}, first {prefix}{named(odd[0])}" if odd else ""
        raise UserError(f"{file} {' and '.join(part for part in (lacks, has) if part)}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{file}: {prefix}{named(name)} has the shape {tuple(tensor.shape)}, and the configuration asks for "
                f"{tuple(wanted[name].shape)}; is it the configuration of another model?"
            )
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    module.requires_grad_(False).eval()


def _compare_basis(file: Path, mel: FrontEnd) -> None:
    """Where the front end's tables are there, their mel basis says whether stft_config.json is theirs."""
    if not file.is_file():
        return
    basis = read_tensors(file).get("mel_basis")
    if basis is None or basis.shape != (mel.mels, mel.window // 2 + 1):
        raise UserError(f"{file}: no mel_basis of {mel.mels} x {mel.window // 2 + 1}, as stft_config.json describes it")
    if float((basis.float() - filter_bank(mel).T).abs().max()) > 1e-5:
        raise UserError(f"{file}: its mel_basis is another one than that of stft_config.json (slaney's, without power)")


def _plain(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _prefixed(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in _plain(module).items()}
