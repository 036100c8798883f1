"""CLIP score, PickScore, LAION aesthetics: tiny random models saved in the published layouts, opened by the judges, and their
scores held against the formulas written out."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from polyalign.core.errors import UserError
from polyalign.core.recipe import JudgeConfig
from polyalign.evaluation import judges
from polyalign.evaluation.image_judges import pixels

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_judge_models import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    PREPARATION,
    SIDE,
    conditions,
    head_weights,
    pictures,
    save_clip,
    save_processor,
)


def judge(name: str, **options):
    return judges.build(JudgeConfig(name=name, options=options))


def plain_cosines(model: CLIPModel, ids: list[list[int]], images: list[Image.Image]) -> torch.Tensor:
    """Cosines one by one from the two towers and projections, without padding or masks; pictures must need no resizing."""
    mean, std = (np.array(PREPARATION[key], dtype=np.float32) for key in ("image_mean", "image_std"))
    found = []
    with torch.no_grad():
        for tokens, image in zip(ids, images, strict=True):
            values = torch.tensor((np.asarray(image, dtype=np.float32) / 255 - mean) / std).permute(2, 0, 1)[None]
            seen = model.visual_projection(model.vision_model(pixel_values=values).pooler_output)
            states = model.text_model(input_ids=torch.tensor([tokens])).last_hidden_state
            said = model.text_projection(states[:, -1])
            found.append(torch.nn.functional.cosine_similarity(seen, said)[0])
    return torch.stack(found)


IDS = {"ab": [72, 0, 37, 73], "c d": [72, 38, 39, 73]}  # start, letters (the last of a word is 36 on), end


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("clip") / "tiny-clip"
    save_clip(place)
    return place


@pytest.fixture(scope="module")
def cosines(folder) -> torch.Tensor:
    return plain_cosines(CLIPModel.from_pretrained(folder), list(IDS.values()), pictures([(SIDE, SIDE)] * 2))


def test_pickscore_is_the_scaled_cosine(folder, cosines):
    images = pictures([(SIDE, SIDE)] * 2)
    scored = judge("pickscore", model=str(folder)).score(conditions(IDS), images)
    assert scored == pytest.approx((100 * cosines).tolist(), rel=1e-4)
    assert abs(scored[0] - scored[1]) > 0.1
    bare = judge("pickscore", model=str(folder), scaled=False)
    assert bare.score(conditions(IDS), images) == pytest.approx(cosines.tolist(), rel=1e-4)
    assert bare.version != judge("pickscore", model=str(folder)).version


def test_clip_score_has_three_formulas(folder, cosines):
    images = pictures([(SIDE, SIDE)] * 2)
    for formula, expected in (
        ("torchmetrics", (100 * cosines).clamp(min=0)),
        ("paper", 2.5 * cosines.clamp(min=0)),
        ("cosine", cosines),
    ):
        scored = judge("clip_score", model=str(folder), formula=formula).score(conditions(IDS), images)
        assert scored == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-7), formula
    prefixed = judge("clip_score", model=str(folder), formula="cosine", prefix="a").score(conditions(["b", "c d"]), images)
    assert prefixed[0] == pytest.approx(float(cosines[0]), rel=1e-4)


def test_a_negative_cosine_scores_zero(folder):
    images = pictures([(SIDE, SIDE)] * 12, seed=5)
    prompts = [chr(97 + index) for index in range(12)]
    bare = judge("clip_score", model=str(folder), formula="cosine").score(conditions(prompts), images)
    clipped = judge("clip_score", model=str(folder)).score(conditions(prompts), images)
    assert min(bare) < 0 < max(bare)
    assert clipped == pytest.approx([max(100 * cosine, 0.0) for cosine in bare], rel=1e-5)


def test_aesthetics_is_five_linear_layers_on_the_unit_embedding(folder, tmp_path):
    weights = head_weights(24)
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(weights, file)
    model, image = CLIPModel.from_pretrained(folder), pictures([(SIDE, SIDE)])[0]
    values = pixels.CentreCrop(SIDE, SIDE)([image])
    with torch.no_grad():
        features = model.visual_projection(model.vision_model(pixel_values=values).pooler_output)[0]
    features = features / features.norm()
    for place in (0, 2, 4, 6, 7):
        features = weights[f"layers.{place}.weight"] @ features + weights[f"layers.{place}.bias"]
    for head in (file, tmp_path):  # the file, or the folder with the published name in it
        scorer = judge("laion_aesthetics", model=str(folder), head=str(head))
        assert scorer.score(conditions(["any"]), [image]) == pytest.approx([float(features)], rel=1e-4)
    assert scorer.score(conditions(["other words"]), [image]) == scorer.score(conditions(["any"]), [image])
    assert "tiny-clip@sha256:" in scorer.version


def test_batches_and_padding_change_nothing(folder):
    asked = conditions(["a", "a much longer prompt than the others, cut at sixteen tokens", "b c", "d", "e e e"])
    images = pictures([(SIDE, SIDE), (40, 31), (29, 64), (90, 17), (1, 1)])
    together = judge("pickscore", model=str(folder)).score(asked, images)
    for size in (1, 2):
        assert judge("pickscore", model=str(folder), batch_size=size).score(asked, images) == pytest.approx(together, rel=1e-4)
    assert judge("pickscore", model=str(folder)).score(asked, images) == together
    assert judge("pickscore", model=str(folder)).score([], []) == []
    with pytest.raises(ValueError, match="2 outputs for 1 conditions"):
        judge("pickscore", model=str(folder)).score(conditions(["a"]), images[:2])


def test_low_precision_comes_near(folder):
    images = pictures()
    exact = judge("pickscore", model=str(folder), scaled=False).score(conditions(), images)
    near = judge("pickscore", model=str(folder), scaled=False, dtype="bfloat16").score(conditions(), images)
    assert near == pytest.approx(exact, abs=0.02) and near != exact


def test_the_version_names_the_weights_and_changes_with_them(folder, tmp_path):
    version = judge("pickscore", model=str(folder)).version
    assert version.startswith("1 tiny-clip@sha256:") and str(folder.parent) not in version
    other = tmp_path / "tiny-clip"
    save_clip(other, seed=7)
    assert judge("pickscore", model=str(other)).version != version
    same = tmp_path / "elsewhere" / "tiny-clip"
    shutil.copytree(folder, same)
    assert judge("pickscore", model=str(same)).version == version


def test_pickled_weights_open_too_and_code_in_them_does_not_run(folder, tmp_path):
    place = save_processor(tmp_path / "pickled")
    shutil.copy(folder / "config.json", place)
    torch.save(CLIPModel.from_pretrained(folder).state_dict(), place / "pytorch_model.bin")
    scored = judge("pickscore", model=str(place)).score(conditions(), pictures())
    assert scored == pytest.approx(judge("pickscore", model=str(folder)).score(conditions(), pictures()), rel=1e-5)

    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for name in ("pytorch_model.bin", "head.pth"):
        (place / name).write_bytes(pickle.dumps({"layers.0.weight": Touch()}, protocol=2))
    with pytest.raises(UserError, match="cannot be read"):
        judge("pickscore", model=str(place)).score(conditions(), pictures())
    with pytest.raises(UserError, match="head.pth is refused"):
        judge("laion_aesthetics", model=str(folder), head=str(place / "head.pth")).score(conditions(), pictures())
    assert not (tmp_path / "ran").exists()


def test_a_processor_can_be_elsewhere(folder, tmp_path):
    bare = tmp_path / "bare"
    save_clip(bare, processor=False)
    with pytest.raises(UserError, match="preprocessor_config.json"):
        judge("clip_score", model=str(bare)).score(conditions(), pictures())
    elsewhere = save_processor(tmp_path / "processor")
    scored = judge("clip_score", model=str(bare), processor=str(elsewhere), formula="cosine").score(conditions(), pictures())
    assert scored == judge("clip_score", model=str(folder), formula="cosine").score(conditions(), pictures())


def test_what_is_missing_is_said(folder, tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder, and it is no hub id"):
        judge("pickscore", model=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no hub id"):
        judge("laion_aesthetics", model=str(folder), head="owner/name/../../secret")
    with pytest.raises(UserError, match="options"):
        judge("laion_aesthetics", model=str(folder))
    for options, said in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu9"}, "device is 'tpu9'"),
        ({"formula": "clip"}, "formula is 'clip'"),
        ({"backend": "jax"}, "backend is 'jax'"),
        ({"backend": "open_clip"}, "architecture"),
    ):
        with pytest.raises(UserError, match=said):
            judge("clip_score", model=str(folder), **options)

    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    model = CLIPModel.from_pretrained(folder)
    kept = {name: value for name, value in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(cut, state_dict=kept)
    with pytest.raises(UserError, match="no whole CLIPModel: it lacks text_model.encoder.layers.1"):
        judge("pickscore", model=str(cut)).score(conditions(), pictures())

    wide = tmp_path / "wide.pth"
    torch.save({**head_weights(24), "layers.9.weight": torch.zeros(1)}, wide)
    with pytest.raises(UserError, match="it has besides layers.9.weight"):
        judge("laion_aesthetics", model=str(folder), head=str(wide)).score(conditions(), pictures())
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "preprocessor_config.json").write_text(json.dumps({**PREPARATION, "do_center_crop": False}))
    with pytest.raises(UserError, match="left out: do_center_crop"):
        judge("pickscore", model=str(other)).score(conditions(), pictures())


def test_preparation_is_transformers_pillow_one():
    theirs = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    for image in pictures([(SIDE, SIDE), (40, 31), (29, 64), (300, 201), (17, 90), (1, 1)]):
        expected = torch.tensor(np.asarray(theirs(images=image)["pixel_values"][0]))
        assert pixels.CentreCrop(SIDE, SIDE)([image])[0].numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_preparation_is_torchvisions_centre_crop_where_that_was_published():
    transforms = pytest.importorskip("torchvision.transforms")
    theirs = transforms.Compose(
        [
            transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize(pixels.CLIP_MEAN, pixels.CLIP_STD),
        ]
    )
    ours, differ = pixels.CentreCrop(SIDE, SIDE, rounding="round"), 0
    for image in pictures([(SIDE, SIDE), (40, 31), (29, 64), (31, 28), (28, 31), (33, 28)]):
        assert ours([image])[0].numpy() == pytest.approx(theirs(image).numpy(), abs=1e-5)
        differ += not torch.equal(ours([image]), pixels.CentreCrop(SIDE, SIDE)([image]))
    assert differ > 0  # a margin of 3 pixels begins at 2 there and at 1 in transformers
    assert ours([Image.new("L", (40, 30), 128)]).shape == (1, 3, SIDE, SIDE)


def test_open_clip_backend_needs_its_package_or_gives_the_same_numbers(folder, tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    shutil.copy(folder / "model.safetensors", file)
    scorer = judge("clip_score", model=str(file), backend="open_clip", architecture="ViT-H-14")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"polyalign\[image\]"):
        scorer.score(conditions(), pictures())
    assert "open_clip weights.safetensors@sha256:" in scorer.version
