"""CUDA wheels of torchvision and torchaudio beside a CPU torch: one test for each thing that has to work, and their absence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

import numpy
import pytest
import torch
from PIL import Image

from polyalign.core.compat import cpu_wheels

needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed (extra 'image')")
needs_torchaudio = pytest.mark.skipif(find_spec("torchaudio") is None, reason="torchaudio is not installed (extra 'audio')")

WITHOUT_THEM = """
import sys, time
began = time.process_time()
import polyalign
seconds = time.process_time() - began
assert seconds < 0.05, f"import polyalign took {seconds:.3f} s"
assert not {"torch", "numpy", "torchvision", "torchaudio"} & set(sys.modules)

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("torchvision", "torchaudio")
        return None if hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import importlib, pkgutil
import polyalign.core
names = [module.name for module in pkgutil.walk_packages(polyalign.core.__path__, "polyalign.core.")]
for name in names:
    importlib.import_module(name)
assert len(names) > 10
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModelWithProjection
assert "torchvision" not in sys.modules and "torchaudio" not in sys.modules
from polyalign.core.doctor import report
assert report()["repaired"] == {}
"""

ORDER_OF_IMPORT = """
import polyalign
import torchvision, torchaudio
from polyalign.core.compat import cpu_wheels
import torch
print(sorted(cpu_wheels.repaired()), torchvision.extension._has_ops(), torch.version.cuda, torch.version.hip)
"""


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=numpy.uint8))


@pytest.fixture(scope="module")
def wave() -> torch.Tensor:
    """Half a second of 440 Hz at 16 kHz, (1, 8000)."""
    return torch.sin(2 * torch.pi * 440 * torch.arange(8000) / 16000).unsqueeze(0)


def test_arming_twice_adds_nothing() -> None:
    before = list(sys.meta_path)
    cpu_wheels.arm()
    assert sys.meta_path == before


@pytest.mark.parametrize("word", ["off", "0", "No"])
def test_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv(cpu_wheels.SWITCH, word)
    assert cpu_wheels.arm() == ()


def test_core_does_not_need_them(run_python: Callable[..., str]) -> None:
    run_python("-c", WITHOUT_THEM)


@needs_torchvision
@needs_torchaudio
def test_only_what_is_broken_is_repaired(run_python: Callable[..., str]) -> None:
    repaired, has_operators, cuda, hip = run_python("-c", ORDER_OF_IMPORT).strip().rsplit(" ", 3)
    if (cuda, hip) != ("None", "None"):
        assert repaired == "[]"
    assert ("torchvision" in repaired) == (has_operators == "False")


def test_suppression_by_hand() -> None:
    """Overlap of the first two: 81 of 119 shared, 0.68; the third touches neither."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.9, 0.1])
    assert cpu_wheels.suppress_overlapping(boxes, scores, 0.5).tolist() == [1, 2]
    assert cpu_wheels.suppress_overlapping(boxes, scores, 0.7).tolist() == [1, 0, 2]
    assert cpu_wheels.suppress_overlapping(boxes[:0], scores[:0], 0.5).tolist() == []


def test_suppression_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(60, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + 1 + torch.rand(60, 2, generator=generator) * 10], dim=1)
    scores = torch.rand(60, generator=generator)

    def overlap(a: list[float], b: list[float]) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return width * height / (area - width * height)

    rows, kept = boxes.double().tolist(), []
    for index in scores.argsort(descending=True).tolist():
        if all(overlap(rows[index], rows[other]) <= 0.4 for other in kept):
            kept.append(index)
    assert 5 < len(kept) < 60
    assert cpu_wheels.suppress_overlapping(boxes.double(), scores, 0.4).tolist() == kept


@needs_torchvision
class TestTorchvision:
    def test_operator(self) -> None:
        import torchvision  # noqa: F401  (defines or loads the operator)

        boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
        assert torch.ops.torchvision.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]

    def test_transforms(self, picture: Image.Image) -> None:
        from torchvision import transforms

        pixels = transforms.Compose([transforms.Resize(20), transforms.CenterCrop(16), transforms.ToTensor()])(picture)
        assert isinstance(pixels, torch.Tensor) and pixels.shape == (3, 16, 16)

    def test_transforms_v2(self, picture: Image.Image) -> None:
        from torchvision.transforms import v2

        tensor = v2.functional.pil_to_tensor(picture)
        assert torch.equal(v2.functional.horizontal_flip(tensor), tensor.flip(-1))
        assert v2.functional.to_dtype(tensor, torch.float32, scale=True).max() <= 1

    def test_models(self) -> None:
        from torchvision import models

        with torch.no_grad():
            assert models.resnet18(num_classes=5).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)

    def test_make_grid(self) -> None:
        from torchvision.utils import make_grid

        assert make_grid(torch.rand(4, 3, 8, 8), nrow=2, padding=1).shape == (3, 19, 19)

    def test_boxes(self) -> None:
        from torchvision import ops

        boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]])
        torch.testing.assert_close(ops.box_iou(boxes, boxes), torch.tensor([[1, 1 / 7], [1 / 7, 1]]))

    def test_roi_align(self) -> None:
        from torchvision import ops

        constant = torch.full((1, 2, 8, 8), 3.0)
        with torch.compiler.set_stance("force_eager"):  # the fallback asks for torch.compile: 20 s
            pooled = ops.roi_align(constant, [torch.tensor([[1.0, 1, 6, 6]])], output_size=2)
        torch.testing.assert_close(pooled, torch.full((1, 2, 2, 2), 3.0))

    def test_image_processors_of_transformers(self, picture: Image.Image) -> None:
        from transformers import CLIPImageProcessor, Qwen2VLVideoProcessor

        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        assert processor(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
        assert Qwen2VLVideoProcessor().patch_size == 14

    def test_open_clip(self, picture: Image.Image) -> None:
        open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed (extra 'image')")
        tokens = open_clip.get_tokenizer("ViT-B-32")(["a red square"])
        assert tokens.shape == (1, 77) and tokens[0, 0] == 49406
        assert open_clip.image_transform(32, is_train=False)(picture).shape == (3, 32, 32)


@needs_torchaudio
class TestTorchaudio:
    def test_mel_spectrogram_with_gradient(self, wave: torch.Tensor) -> None:
        from torchaudio.transforms import MelSpectrogram

        signal = wave.clone().requires_grad_()
        mel = MelSpectrogram(16000, n_fft=512, n_mels=40)(signal)
        mel.sum().backward()
        assert mel.shape == (1, 40, 32)
        assert signal.grad is not None and signal.grad.abs().sum() > 0

    def test_mfcc_and_griffin_lim(self, wave: torch.Tensor) -> None:
        from torchaudio.transforms import MFCC, GriffinLim, Spectrogram

        assert MFCC(16000, n_mfcc=13, melkwargs={"n_fft": 512, "n_mels": 40})(wave).shape[:2] == (1, 13)
        assert GriffinLim(n_fft=256, n_iter=4)(Spectrogram(n_fft=256)(wave)).shape[0] == 1

    def test_resample_keeps_the_pitch(self, wave: torch.Tensor) -> None:
        from torchaudio.functional import resample

        half = resample(wave, 16000, 8000)
        assert half.shape == (1, 4000)
        assert torch.fft.rfft(half[0]).abs().argmax().item() * 8000 / 4000 == pytest.approx(440)

    def test_kaldi_fbank(self, wave: torch.Tensor) -> None:
        from torchaudio.compliance import kaldi

        assert kaldi.fbank(wave, num_mel_bins=23, dither=0.0).shape == (48, 23)

    def test_filters(self, wave: torch.Tensor) -> None:
        from torchaudio.functional import lfilter, lowpass_biquad

        delayed = lfilter(wave, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), clamp=False)
        torch.testing.assert_close(delayed[:, 1:], wave[:, :-1])
        assert lowpass_biquad(wave, 16000, 50.0).abs().max() < 0.2

    def test_loudness_and_edit_distance(self, wave: torch.Tensor) -> None:
        from torchaudio.functional import edit_distance, loudness

        assert loudness(wave, 16000) - loudness(wave / 2, 16000) == pytest.approx(6.02, abs=0.01)
        assert edit_distance("kitten", "sitting") == 3

    def test_model_constructors(self) -> None:
        from torchaudio.models import Conformer

        model = Conformer(input_dim=8, num_heads=2, ffn_dim=16, num_layers=1, depthwise_conv_kernel_size=3).eval()
        with torch.no_grad():
            assert model(torch.zeros(1, 5, 8), torch.tensor([5]))[0].shape == (1, 5, 8)
