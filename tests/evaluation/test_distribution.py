"""Distances between sets of pictures: the formulas against known answers, and the command in named feature spaces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from transformers import Dinov2Config, Dinov2Model

from polyalign.core.errors import UserError
from polyalign.evaluation.distribution import (
    compare_distributions,
    frechet_distance,
    kernel_distance,
    main,
    precision_recall,
)
from polyalign.evaluation.feature_spaces import FEATURES, open_space, read_picture

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_judge_models import PREPARATION, pictures, save_clip  # noqa: E402  # pyright: ignore[reportMissingImports]
from small_networks import HEAD, lite_weights, save_lite  # noqa: E402  # pyright: ignore[reportMissingImports]


def normal(count: int, width: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (count, width))


def test_frechet_is_the_formula_with_a_matrix_root():
    mixing = normal(6, 6, 0)
    a, b = normal(80, 6, 1) @ mixing, normal(50, 6, 2, shift=0.3) @ mixing.T
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    root = np.real(linalg.sqrtm(first @ second))
    expected = shift @ shift + np.trace(first + second - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_frechet_of_diagonal_covariances_and_of_itself():
    a = normal(400, 3, 3)
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a, rowvar=False)).T)  # covariance exactly 1
    moved = a * np.array([2.0, 1.0, 0.5]) + np.array([1.0, 0.0, -2.0])
    assert frechet_distance(a, moved) == pytest.approx(5.0 + (1 - 2) ** 2 + (1 - 0.5) ** 2, rel=1e-10)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0.0, abs=1e-10)


def test_frechet_with_fewer_samples_than_features_is_real_and_right():
    """A rotation into 40 features, of which 30 never vary, changes nothing."""
    a, b = normal(12, 10, 4), normal(9, 10, 5, shift=1.0)
    basis = np.linalg.qr(normal(40, 40, 6))[0][:10]
    assert frechet_distance(a @ basis, b @ basis) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_kernel_distance_is_the_sum_over_pairs_and_unbiased():
    a, b = normal(7, 4, 0), normal(5, 4, 1, shift=0.5)

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    own = [np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(own[0] + own[1] - 2 * across, rel=1e-12)
    alike = [kernel_distance(normal(20, 4, 2 * seed), normal(20, 4, 2 * seed + 1)) for seed in range(200)]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / np.sqrt(len(alike)) and min(alike) < 0


def test_precision_and_recall_by_hand():
    """On a line, one neighbour: balls of radius 1 at 0, 1, and of 2 at 3; generated points at 0.5, 2 and 100."""
    reference, generated = np.array([[0.0], [1.0], [3.0]]), np.array([[0.5], [2.0], [100.0]])
    precision, recall = precision_recall(reference, generated, neighbours=1)
    assert precision == pytest.approx(2 / 3)
    assert recall == pytest.approx(1.0)  # the ball of 100 reaches to 2 and so to 3, those of 0.5 and 2 hold 0 and 1
    assert precision_recall(reference, reference, neighbours=1) == (1.0, 1.0)
    assert precision_recall(reference, reference + 50, neighbours=1)[0] == 0.0


def test_intervals_narrow_with_more_samples_and_hold_the_truth():
    few = compare_distributions(normal(60, 3, 0), normal(60, 3, 1, shift=0.5), seed=0)
    many = compare_distributions(normal(960, 3, 2), normal(960, 3, 3, shift=0.5), seed=0)
    widths = [np.ptp(found["fid"]["interval"]) for found in (few, many)]
    assert widths[1] < widths[0] / 2
    low, high = many["fid"]["interval"]
    assert low < 3 * 0.5**2 < high
    assert many["kid"]["interval"][0] > 0 and many["samples"] == {"reference": 960, "generated": 960}
    assert many == compare_distributions(normal(960, 3, 2), normal(960, 3, 3, shift=0.5), seed=0)
    assert few["notes"] == [] and few["neighbours"] == 3 and few["dimensions"] == 3
    assert "KID" in compare_distributions(normal(8, 20, 0), normal(9, 20, 1), seed=0)["notes"][0]


def test_what_cannot_be_compared():
    for bad in (normal(1, 3, 0), normal(5, 2, 0), np.full((5, 3), np.nan)):
        with pytest.raises(ValueError):
            frechet_distance(normal(5, 3, 0), bad)
    with pytest.raises(ValueError):
        precision_recall(normal(3, 2, 0), normal(5, 2, 0))


# --- feature spaces -----------------------------------------------------------------------------------------------------------


def torch_reference(weights: dict[str, torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 written out flat, from torch's functions and TensorFlow's rule of padding."""
    functional = torch.nn.functional
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)

    def conv(name, x, stride=1, groups=1):
        kernel = weights[name].shape[-1]
        total = [max(0, (int(np.ceil(side / stride)) - 1) * stride + kernel - side) for side in x.shape[-2:]]
        x = functional.pad(x, (total[1] // 2, (total[1] + 1) // 2, total[0] // 2, (total[0] + 1) // 2))
        return functional.conv2d(x, weights[name], stride=stride, groups=groups)

    def norm(name, x):
        own = [weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *own, training=False, eps=1e-3)

    x = functional.relu6(norm("_bn0", conv("_conv_stem.weight", values, 2)))
    for place, stride in enumerate(strides):
        block, inner = f"_blocks.{place}", x
        if place:
            inner = functional.relu6(norm(f"{block}._bn0", conv(f"{block}._expand_conv.weight", inner)))
        inner = conv(f"{block}._depthwise_conv.weight", inner, stride, groups=inner.shape[1])
        inner = norm(f"{block}._bn2", conv(f"{block}._project_conv.weight", functional.relu6(norm(f"{block}._bn1", inner))))
        x = x + inner if inner.shape == x.shape else inner
    return functional.relu6(norm("_bn1", conv("_conv_head.weight", x))).mean((2, 3))


def test_efficientnet_lite_is_its_architecture_and_refuses_other_layouts(tmp_path):
    from polyalign.evaluation.image_judges import efficientnet_lite

    network = efficientnet_lite.read(save_lite(tmp_path / "lite.pth"))
    values = torch.randn(2, 3, 45, 64)  # odd and even sides pad differently
    torch.testing.assert_close(network.features(values), torch_reference(lite_weights(), values), rtol=1e-5, atol=1e-6)
    assert network(values).shape == (2, 7)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no EfficientNet-Lite0"):
        efficientnet_lite.read(tmp_path / "other.pth")
    lacking = lite_weights()
    del lacking["_blocks.3._bn2.bias"]
    torch.save(lacking, tmp_path / "lacking.pth")
    with pytest.raises(UserError, match=r"lacks _blocks\.3\._bn2\.bias"):
        efficientnet_lite.read(tmp_path / "lacking.pth")


def spaces(folder: Path) -> dict[str, dict[str, str]]:
    """Each kind with tiny random weights, as its options."""
    import timm

    save_lite(folder / "lite.pth")
    save_clip(folder / "clip")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "dino")
    (folder / "dino" / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), folder / "timm.pth")
    return {
        "efficientnet_lite0": {"model": str(folder / "lite.pth")},
        "clip": {"model": str(folder / "clip")},
        "transformers": {"model": str(folder / "dino")},
        "timm": {"model": str(folder / "timm.pth"), "architecture": "test_vit"},
    }


def test_every_space_says_its_network_its_hash_and_its_preprocessing(tmp_path):
    for kind, options in spaces(tmp_path).items():
        space = open_space(kind, **options, device="cpu")
        said = space.as_json()
        assert "@sha256:" in said["network"] and said["preprocessing"] and said["features"], said
        shown = pictures()
        found = space.of_pictures(shown, batch_size=2)
        assert found.dtype == np.float64 and found.shape[0] == 3 and np.isfinite(found).all()
        np.testing.assert_allclose(found, space.of_pictures(shown, batch_size=1), rtol=1e-4, atol=1e-5)
        assert np.abs(found[0] - found[1]).max() > 1e-4  # it does see the picture
    assert set(FEATURES) == {"efficientnet_lite0", "clip", "open_clip", "transformers", "timm"}


def test_open_clip_by_its_architecture(tmp_path):
    """The smallest of the package's architectures, random weights in a file."""
    import open_clip

    network = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    space = open_space("open_clip", model=str(tmp_path / "clip.pt"), architecture="ViT-S-32-alt", device="cpu")
    assert space.of_pictures(pictures()[:1]).shape[0] == 1 and "ViT-S-32-alt" in space.as_json()["network"]


def test_spaces_are_never_unnamed(tmp_path):
    for kind, options, said in (
        ("inception", {}, "allowed: efficientnet_lite0"),
        ("clip", {}, "--model"),
        ("timm", {"model": str(save_lite(tmp_path / "lite.pth"))}, "--architecture"),
        ("efficientnet_lite0", {"architecture": "b0"}, "leave it out"),
        ("timm", {"model": str(tmp_path / "lite.pth"), "architecture": "nonsense"}, "timm does not know"),
    ):
        with pytest.raises(UserError, match=said):
            open_space(kind, **options)


def folder_of(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir()
    for place, picture in enumerate(pictures([(24, 24)] * count, seed=seed)):
        picture.save(folder / f"{place}.png")
    return folder


def test_the_command_writes_figures_with_everything_they_depend_on(tmp_path, capsys):
    real, made = folder_of(tmp_path / "real", 8, 0), folder_of(tmp_path / "made", 6, 1)
    weights = save_lite(tmp_path / "lite.pth")
    out = tmp_path / "distances.json"
    asked = [str(real), str(made), "--features", "efficientnet_lite0", "--model", str(weights)]
    assert main([*asked, "--neighbours", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["samples"] == {"reference": 8, "generated": 6} and found["dimensions"] == HEAD and found["neighbours"] == 2
    assert found["features"]["network"].startswith("lite.pth@sha256:") and "224" in found["features"]["preprocessing"]
    assert found["fid"]["value"] > 0 and len(found["kid"]["interval"]) == 2 and found["notes"]
    capsys.readouterr()
    assert main(asked[:1] + asked[:1] + asked[2:]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fid"]["value"] == pytest.approx(0.0, abs=1e-8) and printed["precision"]["value"] == 1.0


def test_the_command_on_bad_input(tmp_path, capsys):
    real, few = folder_of(tmp_path / "real", 5, 0), folder_of(tmp_path / "few", 2, 1)
    weights = str(save_lite(tmp_path / "lite.pth"))
    last = ["--features", "efficientnet_lite0", "--model", weights]
    assert main([str(real), str(few), *last]) == UserError("").exit_code
    assert "has 2 pictures, and these distances need at least 4" in capsys.readouterr().err
    assert main([str(real), str(tmp_path / "none"), *last]) == UserError("").exit_code
    assert main([str(real), str(real), *last, "--neighbours", "0"]) != 0 and main(
        [str(real)] * 2 + last + ["--batch-size", "0"]
    )
    (real / "broken.png").write_bytes(b"not a picture")
    assert main([str(real), str(real), *last]) == UserError("").exit_code
    assert "broken.png" in capsys.readouterr().err


def test_a_picture_is_read_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
