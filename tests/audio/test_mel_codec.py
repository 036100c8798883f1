"""The patched-mel codec: patches, the linear autoencoder, and sound back."""

import json

import numpy as np
import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.datasets.audio.waves import Wave
from polyalign.datasets.worlds import sound_detector, sounds
from polyalign.modalities.audio.mel import log_mel
from polyalign.modalities.audio.mel_codec import (
    MelCodec,
    MelSettings,
    PatchBasis,
    from_patches,
    griffin_lim,
    linear_magnitude,
    open_codec,
    patches_of,
    to_patches,
)

SETTINGS = MelSettings()


@pytest.fixture(scope="module")
def codec() -> MelCodec:
    clips = [wave for _, wave, _ in sounds.clips(None, 200, 3)]
    return MelCodec(SETTINGS, PatchBasis.fit(patches_of(clips, SETTINGS), SETTINGS.channels, deviation=0.7))


@pytest.mark.parametrize("patch", [(1, 1), (4, 16), (8, 32)])
def test_patches_lose_nothing(patch: tuple[int, int]) -> None:
    mel = torch.arange(2 * 128 * 32.0).view(2, 128, 32)
    parts = to_patches(mel, patch)
    assert parts.shape == (2, patch[0] * patch[1], 128 // patch[0], 32 // patch[1])
    assert torch.equal(from_patches(parts, patch), mel)
    assert torch.equal(parts[1, :, 0, 0], mel[1, : patch[0], : patch[1]].flatten())


def test_a_tone_is_in_its_band_and_silence_at_the_floor() -> None:
    time = torch.arange(SETTINGS.samples) / SETTINGS.rate
    mel = log_mel(torch.stack([0.5 * torch.sin(2 * np.pi * 1000 * time), torch.zeros_like(time)]), SETTINGS.front)
    assert mel.shape == (2, 128, 32)
    assert torch.allclose(mel[1], torch.tensor(np.log(SETTINGS.floor), dtype=torch.float32))
    # Slaney's scale: 1000 Hz is mel 15 of 45.245 at 8 kHz; 32 bands have their middles at multiples of 45.245 / 33
    assert set(mel[0, 20:100].argmax(1).tolist()) == {round(15 / (45.245 / 33)) - 1}


def test_a_basis_of_all_components_is_exact_and_one_of_few_keeps_the_most() -> None:
    patches = (
        torch.randn(50, 6, 4, 2, generator=torch.Generator().manual_seed(0))
        * torch.tensor([5, 3, 1, 0.5, 0.1, 0.1])[:, None, None]
    )
    whole = PatchBasis.fit(patches + 2, 6, deviation=0.7)
    latents = whole.encode(patches + 2)
    assert latents.square().mean().sqrt().item() == pytest.approx(0.7, rel=1e-3)
    assert torch.allclose(whole.decode(latents), patches + 2, atol=1e-4)
    few = PatchBasis.fit(patches + 2, 3, deviation=0.7)
    left = (few.decode(few.encode(patches + 2)) - patches - 2).square().sum(1).mean().item()
    assert left == pytest.approx(0.5**2 + 2 * 0.1**2, rel=0.2)


def test_magnitudes_come_back_from_mel_bands() -> None:
    clips = torch.stack(
        [torch.from_numpy(sounds.render(sounds.parse("a bell then a hiss"), seed)[0].samples) for seed in (1, 2)]
    )
    mel = log_mel(clips, SETTINGS.front)
    magnitude = linear_magnitude(mel, SETTINGS)
    assert magnitude.shape == (2, 513, 128) and (magnitude >= 0).all()
    again = log_mel(griffin_lim(magnitude, SETTINGS), SETTINGS.front)
    loud = mel > np.log(SETTINGS.floor) + 3
    assert (again - mel)[loud].abs().mean() < 0.25


def test_a_clip_survives_the_codec_for_the_judge(codec: MelCodec) -> None:
    found = list(sounds.clips("heldout", 24, 8, tasks=sounds.TASKS[1:]))
    latents = codec.draw(codec.moments([wave for _, wave, _ in found]), None)
    assert latents.shape == (24, *codec.latent_shape(codec.seconds)) == (24, 48, 16, 1)
    waves = codec.decode(latents)
    assert all(wave.rate == 16_000 and len(wave.samples) == 32_768 and abs(wave.samples).max() <= 1 for wave in waves)
    figures = sound_detector.measure((spec, wave) for (spec, _, _), wave in zip(found, waves, strict=True))
    assert figures["presence"] >= 0.97 and figures["strict"] >= 0.9


def test_a_clip_decodes_alike_alone_and_among_others(codec: MelCodec) -> None:
    latents = codec.moments([sounds.render(sounds.parse(prompt), 1)[0] for prompt in ("a bell", "a drum twice")])
    alone, among = codec.decode(latents[1:])[0], codec.decode(latents)[1]
    np.testing.assert_allclose(alone.samples, among.samples, atol=1e-4)


def test_shorter_and_resampled_waves_are_padded_and_others_cut(codec: MelCodec) -> None:
    wave = sounds.render(sounds.parse("a drum"), 1)[0]
    assert torch.equal(codec.moments([Wave(np.tile(wave.samples, 2), wave.rate)]), codec.moments([wave]))
    short = codec.moments([Wave(wave.samples[:16_384], wave.rate)])
    assert torch.allclose(short[:, :, 12:], codec.moments([Wave(np.zeros(10, dtype=np.float32), 8000)])[:, :, 12:], atol=1e-4)
    with pytest.raises(UserError, match=r"clips of 2\.048 s, not of 10\.0 s"):
        codec.latent_shape(10.0)


def test_a_saved_codec_opens_and_a_broken_one_is_refused(codec: MelCodec, tmp_path) -> None:
    codec.save(tmp_path)
    again = open_codec(tmp_path)
    wave = sounds.render(sounds.parse("a horn"), 1)[0]
    assert again.settings == codec.settings
    assert torch.equal(again.moments([wave]), codec.moments([wave]))
    content = json.loads((tmp_path / "codec.json").read_text())
    (tmp_path / "codec.json").write_text(json.dumps({**content, "channels": 7}))
    with pytest.raises(UserError, match="expected a basis of 7 components of 256 values"):
        open_codec(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps({**content, "patch": [7, 32]}))
    with pytest.raises(UserError, match="do not divide into patches of 7 frames x 32 bands"):
        open_codec(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps({"mels": 3}))
    with pytest.raises(UserError, match="no settings of a patched-mel codec"):
        open_codec(tmp_path)
    codec.save(tmp_path)
    (tmp_path / "codec.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no weights of a patched-mel codec"):
        open_codec(tmp_path)
