"""Flow models sampled, exported and trained through a whole run; what contradicts them is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxTransformer2DModel
from flow_models import FAMILY_OF, KINDS, TOKENS
from image_runs import digest, lines, polyalign, write_recipe
from image_runs import recipe as small_recipe
from PIL import Image

from polyalign.core.adapter import Model
from polyalign.core.cli import main
from polyalign.core.errors import UserError
from polyalign.core.references import adapter_chosen
from polyalign.modalities.image import lora
from polyalign.modalities.image.adapter import ImageAdapter

Make = Callable[..., ImageAdapter]
PROMPT = "a red circle"

STOCK = """
import sys
sys.modules["torchvision"] = sys.modules["torchaudio"] = None
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
*jobs, out = sys.argv[1:]
pictures = []
for job in jobs:
    base, adapter = job.split("|")
    pipeline = DiffusionPipeline.from_pretrained(base)
    if adapter:
        pipeline.load_lora_weights(adapter)
    picture = pipeline("a red circle", height=32, width=32, num_inference_steps=3, guidance_scale=4.0,
                       max_sequence_length=TOKENS, generator=torch.Generator().manual_seed(3)).images[0]
    pictures.append(numpy.asarray(picture))
numpy.save(out, numpy.stack(pictures))
assert "polyalign" not in sys.modules
""".replace("TOKENS", str(TOKENS))


def same(one: Image.Image, two: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(two))


def trained(adapter: ImageAdapter) -> Model:
    """What training would do: every trainable number moves."""
    model, generator = adapter.trainable(adapter.load()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("kind", "negative"), [*((kind, None) for kind in KINDS), ("sd3", "blue")])
def test_pixels_are_those_of_stock_diffusers(
    kind: str, negative: str | None, make_flow: Make, flow_bases: dict[str, Path]
) -> None:
    adapter = make_flow(kind, guidance=4.0, sample_batch=1, negative_prompt=negative)
    found = adapter.sample(adapter.load(), [{"prompt": PROMPT}], [11])[0]
    pipeline: Any = DiffusionPipeline.from_pretrained(flow_bases[kind])
    expected = pipeline(
        PROMPT,
        negative_prompt=negative,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=4.0,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    assert same(found, expected)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_a_picture_depends_on_its_seed_alone(kind: str, make_flow: Make) -> None:
    adapter = make_flow(kind, sample_batch=3, guidance=3.0)
    model = adapter.load()
    prompts = [PROMPT, "a blue square", "two green dots", "x", PROMPT]
    together = adapter.sample(model, prompts, [1, 2, 3, 4, 5])
    assert not same(together[0], together[4])
    assert same(adapter.sample(model, prompts[2:3], [3])[0], together[2])
    assert all(same(a, b) for a, b in zip(adapter.sample(model, prompts[::-1], [5, 4, 3, 2, 1]), together[::-1], strict=True))


def test_flux_is_told_the_guidance_while_it_samples(make_flow: Make) -> None:
    weak, strong = (make_flow("flux-dev", guidance=scale) for scale in (1.0, 4.0))
    assert not same(weak.sample(weak.load(), [PROMPT], [0])[0], strong.sample(strong.load(), [PROMPT], [0])[0])
    weak, strong = (make_flow("flux-schnell", guidance=scale) for scale in (1.0, 4.0))
    assert same(weak.sample(weak.load(), [PROMPT], [0])[0], strong.sample(strong.load(), [PROMPT], [0])[0])


def test_stock_diffusers_opens_every_export(make_flow: Make, flow_bases: dict[str, Path], tmp_path: Path) -> None:
    """LoRA (alpha unlike rank) and whole networks of all kinds, in one other process without polyalign."""
    jobs, expected = [], []
    for kind, train in (*((kind, "lora") for kind in KINDS), ("sd35", "full"), ("flux-dev", "full")):
        adapter = make_flow(kind, train=train, alpha=6.0, guidance=4.0, sample_batch=1)
        model, base = trained(adapter), adapter.load()
        picture = adapter.sample(model, [PROMPT], [3])[0]
        assert not same(picture, adapter.sample(base, [PROMPT], [3])[0])
        expected.append(np.asarray(picture))
        folder = tmp_path / f"{kind}-{train}"
        adapter.export(model, folder)
        jobs.append(f"{flow_bases[kind]}|{folder}" if train == "lora" else f"{folder}|")
        assert model.parts["pipeline_class"].__name__ in (folder / "README.md").read_text()
    out = tmp_path / "pixels.npy"
    subprocess.run([sys.executable, "-c", STOCK, *jobs, str(out)], check=True, timeout=300)
    assert np.array_equal(np.load(out), np.stack(expected))


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_a_lora_comes_back(kind: str, make_flow: Make, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """As the trained one, in float32 on a bfloat16 base, and as a frozen reference beside another."""
    adapter = make_flow(kind, alpha=6.0, dtype="bfloat16")
    model = trained(adapter)
    adapter.export(model, tmp_path)
    again = adapter.load_lora(adapter.load(), tmp_path)
    found, expected = lora.state_dict(again.network), lora.state_dict(model.network)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == torch.float32 for name in expected)
    beside = adapter.load_lora(adapter.trainable(adapter.load()), tmp_path, name="reference")
    batch = adapter.prepare(beside, rows, step=0)
    draws = adapter.draws(beside, batch, step=0)
    assert torch.equal(adapter.score(beside, batch, draws).values, adapter.score(adapter.load(), batch, draws).values)
    with adapter_chosen(beside.network, "reference"):
        assert torch.equal(adapter.score(beside, batch, draws).values, adapter.score(model, batch, draws).values)


def test_a_lora_of_another_family_is_refused(make_flow: Make, make_adapter: Make, tmp_path: Path) -> None:
    for adapter, name in ((make_flow("flux-dev"), "flux"), (make_adapter("sd15"), "sd15")):
        adapter.export(adapter.trainable(adapter.load()), tmp_path / name)
    sd3, flux = make_flow("sd3"), make_flow("flux-dev")
    with pytest.raises(UserError, match="does not fit this base"):
        sd3.load_lora(sd3.load(), tmp_path / "flux")
    with pytest.raises(UserError, match="does not fit this base|holds nothing for a FluxTransformer2DModel"):
        flux.load_lora(flux.load(), tmp_path / "sd15")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sd3", {"family": "flux"}, "family is set to 'flux'.*is 'sd3'"),
        ("flux-dev", {"family": "sdxl"}, "family is set to 'sdxl'.*is 'flux'"),
        ("sd3", {"prediction_type": "epsilon"}, "prediction_type is set to 'epsilon'.*says 'flow'"),
        ("sd3", {"sampler": "ddim"}, "'ddim', which samples diffusion models; sd3 is a flow model.*to base"),
        ("flux-dev", {"sampler": "dpmsolver++"}, "flux is a flow model"),
        ("flux-dev", {"negative_prompt": "ugly"}, "flux has guidance inside the network"),
        ("flux-schnell", {"guidance_vector": 3.5}, "guidance_vector is set to 3.5.*is not told a guidance scale"),
        ("sd3", {"guidance_vector": 3.5}, "is not told a guidance scale"),
        ("flux-dev", {"use_t5": False}, "only sd3 was trained to do without T5, and this base is flux"),
        ("sd3", {"attention": "xformers"}, "for UNets only; sd3 uses sdpa"),
        ("sd3", {"resolution": 30}, "resolution is 30; this base needs a multiple of 4"),
        ("sd3", {"resolution": 52}, "resolution is 52; this base knows positions up to 48 pixels"),
        ("flux-dev", {"resolution": 34}, "resolution is 34; this base needs a multiple of 4"),
    ],
)
def test_contradictions_are_refused(kind: str, settings: dict[str, Any], message: str, make_flow: Make) -> None:
    with pytest.raises(UserError, match=message):
        make_flow(kind, **settings).load()


def test_settings_of_flow_models_are_refused_elsewhere(make_adapter: Make) -> None:
    with pytest.raises(UserError, match="text_tokens is set to 77, but sd has no T5"):
        make_adapter("sd15", text_tokens=77).load()
    with pytest.raises(UserError, match="only sd3 was trained to do without T5, and this base is sdxl"):
        make_adapter("sdxl", use_t5=False).load()
    with pytest.raises(UserError, match="text_tokens is 513; allowed: 1 to 512"):
        make_adapter("sd15", text_tokens=513)


def test_a_folder_that_mixes_models_is_refused(
    make_flow: Make, flow_bases: dict[str, Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    ddim = shutil.copytree(flow_bases["sd3"], tmp_path / "ddim")
    DDIMScheduler().save_pretrained(ddim / "scheduler")
    index = json.loads((ddim / "model_index.json").read_text())
    (ddim / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    with pytest.raises(UserError, match="its scheduler is a DDIMScheduler; a FlowMatch"):
        make_flow("sd3", base=str(ddim)).load()
    fill = shutil.copytree(flow_bases["flux-dev"], tmp_path / "fill")
    config = json.loads((fill / "transformer" / "config.json").read_text())
    shutil.rmtree(fill / "transformer")
    wider: Any = FluxTransformer2DModel.from_config({**config, "in_channels": 32})
    wider.save_pretrained(fill / "transformer")
    with pytest.raises(UserError, match="transformer of .* takes 8 channels and its VAE makes 4: inpainting"):
        make_flow("flux-dev", base=str(fill)).load()
    relabelled = shutil.copytree(tiny_models["sd15"], tmp_path / "relabelled")
    index = json.loads((relabelled / "model_index.json").read_text())
    (relabelled / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(UserError, match="relabelled cannot be read"):
        make_flow("sd3", base=str(relabelled)).load()


@pytest.mark.parametrize("kind", ["sd35", "flux-dev"])
def test_a_whole_run(kind: str, flow_bases: dict[str, Path], tmp_path: Path) -> None:
    """Pairs, training with a cached reference bank or a live one, evaluation and export, through the command line."""
    content = small_recipe(flow_bases[kind])
    content["model"] = {"base": str(flow_bases[kind]), "family": FAMILY_OF[kind], "lora": {"rank": 2}, "text_tokens": 32}
    if kind == "flux-dev":
        content["model"]["guidance_vector"] = 3.5
    content["prepare"] = {"resolution": 32}
    content["sampler"] = {"scheduler": "base", "steps": 2, "guidance": 3.5, "batch_size": 8, "vae_batch_size": 8}
    content["likelihood"] = {"timesteps": {"kind": "logit_normal"}}
    content["evaluate"]["judges"] = [{"name": "saturation"}]
    config, run = write_recipe(tmp_path, content), tmp_path / "run"
    for verb in ("generate", "train", "evaluate"):
        assert polyalign(verb, config, run) == 0, verb
    steps = [line for line in lines(run) if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert len(list((run / "samples" / "base").glob("*.png"))) == 4 and evaluation
    before = digest(run / "adapter" / lora.FILE)
    assert polyalign("train", config, run) == 0 and digest(run / "adapter" / lora.FILE) == before
    pipeline: Any = DiffusionPipeline.from_pretrained(flow_bases[kind])
    pipeline.load_lora_weights(run / "adapter")
    assert "default_0" in pipeline.transformer.peft_config


@pytest.mark.parametrize(("stem", "kind"), [("sd3", "sd35"), ("flux", "flux-dev")])
def test_the_shipped_recipes_run_in_small(
    stem: str, kind: str, flow_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format, family, levels, objective, optimiser, reference and precision stay their own."""
    monkeypatch.chdir(tmp_path)
    for index in range(6):
        for side, colour in (("chosen", (200, 40 + index, 40)), ("rejected", (90, 90 + index, 90))):
            (tmp_path / "my_pairs" / side).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), colour).save(tmp_path / "my_pairs" / side / f"{index}.png")
        (tmp_path / "my_pairs" / "chosen" / f"{index}.txt").write_text(f"a red circle {index}", encoding="utf-8")
    smaller = [
        f"model.base={flow_bases[kind]}",
        *("model.device=cpu", "prepare.resolution=32", "train.steps=2", "train.batch_size=4", "train.micro_batch_size=2"),
        *("sampler.steps=2", "train.schedule.warmup_steps=0", "train.threads=1", "evaluate.held_out=0.4"),
        "evaluate.judges=[{name: saturation}]",
    ]
    assert main(["align", f"image/{stem}", *smaller, "--run", "run"]) == 0
    steps = lines(tmp_path / "run")
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and steps[1]["loss"] != steps[0]["loss"]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["items"]
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}[stem] in card
