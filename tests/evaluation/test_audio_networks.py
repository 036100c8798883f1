"""Networks that hear sounds: their front ends against the published ones, and files in the published layouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.evaluation.audio import clap, cnn14, folders, fronts, tagger, vggish
from polyalign.evaluation.audio.sound import RESAMPLER, Clip, at_rate, read_sound, sound_files, windows
from polyalign.evaluation.audio.spaces import SPACES, open_space
from polyalign.evaluation.weight_files import tensors

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the helpers lie beside the tests, which are no package

from audio_models import RATE, save_ast, save_clap, save_cnn14, save_vggish, tone, write_folder  # noqa: E402

torch.set_num_threads(1)


def test_clap_hears_what_the_published_extractor_makes(tmp_path: Path):
    from transformers import ClapFeatureExtractor

    front = {"sampling_rate": RATE, "max_length_s": 1, "fft_window_size": 512, "hop_length": 250, "feature_size": 16}
    theirs = ClapFeatureExtractor(**front, frequency_min=50, frequency_max=7000, truncation="rand_trunc", padding="repeatpad")
    sounds = [tone(300, 1.0), tone(500, 0.3), tone(900, 0.7)]
    prepare = clap.Preparation(RATE, 1, 512, 250, 16, 50.0, 7000.0)
    ours = prepare(sounds, torch.device("cpu"))
    expected = theirs([sound.samples for sound in sounds], sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert ours.shape == expected.shape == (3, 1, 65, 16)
    assert torch.allclose(ours, expected.float(), atol=2e-3)
    longer = Clip(np.concatenate([sounds[0].samples, sounds[2].samples]), RATE)
    assert torch.equal(prepare([longer], torch.device("cpu")), prepare(sounds[:1], torch.device("cpu")))  # never a random part


def test_ast_hears_what_the_published_extractor_makes(tmp_path: Path):
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    sound = tone(440, 0.8)
    mel = mel_filter_bank(257, 32, 20, 8000, RATE, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    expected = spectrogram(
        sound.samples, window_function(400, "hann", periodic=False), 400, 160, fft_length=512, power=2.0, center=False,
        preemphasis=0.97, mel_filters=mel, log_mel="log", mel_floor=1.192092955078125e-07, remove_dc_offset=True,
    ).T  # fmt: skip
    opened = tagger.read(save_ast(tmp_path / "ast"), device=torch.device("cpu"))
    ours = opened.inputs([sound])[0] * 2 * opened.deviation + opened.mean
    shown = min(64, len(expected))
    assert np.allclose(ours[:shown].numpy(), expected[:shown], atol=2e-3)
    short = opened.inputs([tone(440, 0.2)])[0] * 2 * opened.deviation + opened.mean
    assert torch.allclose(short[18:], torch.zeros(46, 32), atol=1e-5)  # zeros after the end, before the scale


def test_vggish_front_is_the_formula():
    samples = torch.from_numpy(tone(1000, 1.0).samples)
    frame = samples[160 * 7 : 160 * 7 + 400].double().numpy()
    magnitude = np.abs(np.fft.rfft(frame * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)), 512))
    to_mel = lambda hertz: 1127 * np.log(1 + hertz / 700)  # noqa: E731
    edges, bins = np.linspace(to_mel(125), to_mel(7500), 66), to_mel(np.linspace(0, 8000, 257))
    weights = np.stack(
        [
            np.maximum(0, np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)))
            for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False)
        ]
    )
    assert np.allclose(fronts.vggish(samples[None])[0, 7].numpy(), np.log(weights @ magnitude + 0.01), atol=1e-4)
    assert vggish.patches(samples).shape == (1, 96, 64)
    assert vggish.patches(torch.zeros(100)).shape == (1, 96, 64)  # continued with silence
    assert vggish.patches(torch.zeros(RATE * 2)).shape == (2, 96, 64)


def test_vggish_is_the_sequence_of_its_published_layers(tmp_path: Path):
    path = save_vggish(tmp_path / "vggish.pth")
    weights, patches = tensors(path), torch.randn(3, 96, 64)
    x = patches[:, None]
    for place in (0, 3, 6, 8, 11, 13):
        x = torch.relu(
            torch.nn.functional.conv2d(x, weights[f"features.{place}.weight"], weights[f"features.{place}.bias"], padding=1)
        )
        x = torch.nn.functional.max_pool2d(x, 2) if place in (0, 3, 8, 13) else x
    x = x.transpose(1, 3).transpose(1, 2).reshape(3, -1)
    for place in (0, 2, 4):
        x = torch.nn.functional.linear(x, weights[f"embeddings.{place}.weight"], weights[f"embeddings.{place}.bias"])
        x = torch.relu(x) if place != 4 else x
    assert torch.allclose(vggish.read(path)(patches), x, atol=1e-5)
    assert x.shape == (3, 8) and float(x.min()) < 0  # the last ReLU is left out


@pytest.mark.parametrize("rate", [8_000, 16_000, 32_000])
def test_cnn14_says_its_own_rate(tmp_path: Path, rate: int):
    network = cnn14.read(save_cnn14(tmp_path / "cnn14.pth", rate))
    assert network.front.rate == rate
    features, logits = network(torch.from_numpy(np.stack([tone(300, 2.0, rate).samples, tone(900, 2.0, rate).samples])))
    assert features.shape == (2, 12) and logits.shape == (2, 7) and float(features.min()) >= 0
    assert not torch.allclose(logits[0], logits[1])


def test_the_published_sizes_are_those_of_the_papers():
    with torch.device("meta"):
        large = cnn14.CNN14(cnn14.FRONTS[1], (64, 128, 256, 512, 1024, 2048), 2048, 527)
        hearing = vggish.VGGish((64, 128, 256, 256, 512, 512), 4096, 128)
    assert sum(one.numel() for one in large.parameters()) == 80_753_615
    assert sum(one.numel() for one in hearing.parameters()) == 72_141_184


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop("fc1.bias"), "lacks fc1.bias"),
        (lambda weights: weights.pop("logmel_extractor.melW"), "lacks logmel_extractor.melW"),
        (lambda weights: weights.update({"extra": torch.zeros(1)}), "has besides extra"),
        (lambda weights: weights.update({"logmel_extractor.melW": torch.zeros(100, 64)}), "100 frequencies"),
    ],
)
def test_cnn14_refuses_other_layouts(tmp_path: Path, change, says: str):
    path = save_cnn14(tmp_path / "cnn14.pth")
    weights = tensors(path)
    change(weights)
    torch.save({"model": weights}, path)
    with pytest.raises(UserError, match=says):
        cnn14.read(path)


def test_clap_with_fusion_and_a_file_with_code_are_refused(tmp_path: Path):
    folder = save_clap(tmp_path / "clap", truncation="fusion")
    with pytest.raises(UserError, match="without fusion"):
        clap.read(folder, device=torch.device("cpu"))
    torch.save({"model": print}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="refused"):
        cnn14.read(tmp_path / "evil.pth")


def test_labels_of_phrases():
    labels = ["Dog", "Bark", "Hot dog", "Thump, thud", "Bell", "Church bell"]
    named = lambda phrase, given=None: [labels[place] for place in tagger.labels_of(phrase, labels, given or {})]  # noqa: E731
    assert named("a dog barking") == ["Dog", "Bark"]
    assert named("thuds") == ["Thump, thud"]
    assert named("a church bell") == ["Church bell"]
    assert named("a violin") == []
    assert named("a violin", {"a violin": ["Bell"]}) == ["Bell"]
    with pytest.raises(UserError, match="no label 'Violin'"):
        named("a violin", {"a violin": ["Violin"]})


def test_reading_and_resampling(tmp_path: Path):
    import soundfile

    stereo = np.stack([np.full(4410, 0.5), np.full(4410, -0.1)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 44_100)
    clip = read_sound(tmp_path / "stereo.wav")
    assert clip.rate == 44_100 and np.allclose(clip.samples, 0.2, atol=1e-4)
    assert at_rate(clip, 44_100) is clip.samples and len(at_rate(clip, RATE)) == 1600
    (tmp_path / "cut.flac").write_bytes(b"fLaC and then nothing")
    with pytest.raises(UserError, match="cannot be read"):
        read_sound(tmp_path / "cut.flac")
    whole = (tmp_path / "stereo.wav").read_bytes()
    (tmp_path / "short.wav").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"short.wav: this sound is cut short \({len(whole) // 2} of {len(whole)} bytes"):
        read_sound(tmp_path / "short.wav")
    (tmp_path / "short.wav").unlink()
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    with pytest.raises(UserError, match="empty"):
        read_sound(tmp_path / "none.wav")
    assert [path.name for path in sound_files(tmp_path)] == ["cut.flac", "none.wav", "stereo.wav"]
    with pytest.raises(UserError, match="no such folder"):
        sound_files(tmp_path / "absent")


def test_vggish_and_cnn14_hear_sounds_less_their_mean_and_of_two_seconds(tmp_path: Path):
    """As audioldm_eval prepares them for both: a constant changes nothing, and silence to two seconds is a patch more."""
    sound = tone(300, 1.0)
    less = Clip(sound.samples - sound.samples.mean(), RATE)
    longer = Clip(np.concatenate([less.samples, np.zeros(RATE, dtype=np.float32)]), RATE)
    for kind, save in (("vggish", save_vggish), ("cnn14", save_cnn14)):
        space = open_space(kind, str(save(tmp_path / f"{kind}.pth")), device="cpu")
        with torch.inference_mode():
            plain, lifted, padded = (space.hear([one])[0] for one in (less, Clip(less.samples + 0.3, RATE), longer))
        assert np.allclose(plain.features, lifted.features, atol=1e-3), kind
        assert np.allclose(plain.features, padded.features, atol=1e-3), kind
        assert len(plain.features) == (2 if kind == "vggish" else 1)
        assert "less its mean, at least 2 s" in space.preprocessing


def test_a_second_caption_of_a_name_is_refused(tmp_path: Path):
    lines = [{"file_name": "a/1.wav", "text": "a bell"}, {"file_name": "b/1.wav", "text": "a bell"}]
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert folders.read_captions(path) == {"1": "a bell"}
    path.write_text("\n".join(map(json.dumps, [*lines, {"location": "1.flac", "captions": "a drum"}])))
    with pytest.raises(UserError, match=r"captions.jsonl: line 3 has another caption of '1'"):
        folders.read_captions(path)


def test_windows_cover_a_sound():
    clip = Clip(np.arange(RATE, dtype=np.float32), RATE)
    pieces, times = windows(clip, 0.5, 0.25)
    assert times.tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    assert all(len(piece.samples) == RATE // 2 for piece in pieces)
    assert pieces[2].samples[RATE // 4] == RATE // 2  # the middle of the window at 0.5 s
    assert pieces[0].samples[: RATE // 4].max() == 0  # silence before the start


def networks(folder: Path) -> dict[str, Path]:
    return {
        "vggish": save_vggish(folder / "vggish.pth"),
        "cnn14": save_cnn14(folder / "cnn14.pth"),
        "ast": save_ast(folder / "ast"),
        "clap": save_clap(folder / "clap"),
    }


@pytest.mark.parametrize("kind", list(SPACES))
def test_two_folders(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    model = networks(tmp_path)[kind]
    write_folder(tmp_path / "real", 8, rate=22_050)
    write_folder(tmp_path / "made", 8, start=1000)
    arguments = [str(tmp_path / "real"), str(tmp_path / "made"), "--features", kind, "--model", str(model)]
    if kind == "clap":
        lines = [json.dumps({"file_name": f"sound_{n:02d}.wav", "text": "a bell then a drum"}) for n in range(8)]
        (tmp_path / "captions.jsonl").write_text("\n".join(lines))
        arguments += ["--captions", str(tmp_path / "captions.jsonl")]
    assert folders.main([*arguments, "--out", str(tmp_path / "out.json"), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["files"] == {"reference": 8, "generated": 8} and found["silent"] == {"reference": 0, "generated": 0}
    made_with = found["features"]
    assert (
        made_with["resampler"] == RESAMPLER and "@sha256:" in made_with["network"] and RESAMPLER in made_with["preprocessing"]
    )
    low, high = found["frechet"]["interval"]
    assert 0 <= low <= found["frechet"]["value"] <= high
    assert ("inception_score" in found) == ("kl" in found) == (kind in ("cnn14", "ast"))
    assert ("clap_score" in found) == (kind == "clap")
    if "kl" in found:
        assert found["kl"]["paired"] == {"by": "base name without its suffix", "pairs": 8, "alone": 0}
        assert found["kl"]["kl_softmax"]["value"] > 0


def test_a_folder_against_itself_and_what_cannot_be_paired(tmp_path: Path):
    space = open_space("cnn14", str(save_cnn14(tmp_path / "cnn14.pth")), device="cpu")
    real = write_folder(tmp_path / "real", 6)
    same = folders.compare_folders(real, real, space, seed=0)
    assert same["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert same["kl"]["kl_softmax"]["value"] == pytest.approx(0, abs=1e-4)
    made = write_folder(tmp_path / "made", 6)
    for path in made.iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    assert "share one" in folders.compare_folders(real, made, space, seed=0)["kl"]["left_out"]


def test_the_command_refuses_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = save_cnn14(tmp_path / "cnn14.pth")
    real = write_folder(tmp_path / "real", 3)
    arguments = ["--features", "cnn14", "--model", str(model), "--device", "cpu"]
    assert folders.main([str(real), str(real), *arguments]) == 2
    assert "at least 4" in capsys.readouterr().err
    assert folders.main([str(real), str(real), *arguments, "--captions", "x.jsonl"]) == 2
    assert "no texts" in capsys.readouterr().err
