"""Exports that stock peft, diffusers and Tango's own names open: a LoRA, and the whole model with it added into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tango_models
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from tango_models import adapter_of
from torch import Tensor, nn

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.audio.adapter import AudioAdapter
from polyalign.modalities.audio.export import export_merged

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tango") / "tango-tiny"
    tango_models.build(folder)
    return folder


def trained(adapter: AudioAdapter) -> Model:
    model = adapter.trainable(adapter.load())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def answer(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, states = torch.randn(2, 8, 16, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    network.eval()
    with torch.no_grad():
        return network(latents, torch.tensor([3, 700]), encoder_hidden_states=states, return_dict=False)[0]


def stock_unet(folder: Path) -> Any:
    """The base's UNet with nothing but torch and diffusers."""
    tensors = torch.load(folder / "pytorch_model_main.bin", weights_only=True)
    unet: Any = UNet2DConditionModel.from_config(tango_models.UNET)
    own = {name.removeprefix("unet."): tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    unet.load_state_dict(own)
    return unet


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_stock_peft_and_diffusers_open_the_lora(alpha: float | None, base: Path, tmp_path: Path) -> None:
    """peft scales by the file's alpha; diffusers' loader reads the tensors alone, and is right where alpha is rank."""
    adapter = adapter_of(base, alpha=alpha)
    model = trained(adapter)
    adapter.export(model, tmp_path / "lora", {"objective": "dpo"})
    assert {file.name for file in (tmp_path / "lora").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    expected = answer(model.network)
    assert not torch.equal(expected, answer(stock_unet(base)))
    assert torch.equal(answer(PeftModel.from_pretrained(stock_unet(base), tmp_path / "lora")), expected)
    if alpha is None:
        unet = stock_unet(base)
        unet.load_lora_adapter(tmp_path / "lora", weight_name="adapter_model.safetensors", prefix="base_model.model")
        torch.testing.assert_close(answer(unet), expected)


def test_a_lora_added_into_the_weights_is_a_whole_tango(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, alpha=6.0)
    model = trained(adapter)
    before = answer(model.network)
    export_merged(model, tmp_path / "whole")
    torch.testing.assert_close(answer(stock_unet(tmp_path / "whole")), before, rtol=0, atol=2e-5)
    assert torch.equal(answer(model.network), before)
    again = adapter_of(tmp_path / "whole")
    first, second = (a.sample(m, ["rain"], [0])[0] for a, m in ((adapter, model), (again, again.load())))
    np.testing.assert_allclose(first.samples, second.samples, rtol=0, atol=5e-5)
    with pytest.raises(UserError, match="no LoRA to merge"):
        export_merged(again.load(), tmp_path / "other")
