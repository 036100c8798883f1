"""COFS-DPO: exact combinations of adapters, the choice of coefficients on a memory, and adapters on the disk."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from polyalign.core.adapter_files import load_adapter, save_adapter
from polyalign.core.cofs import COMBINED, Replay, choose_coefficients, combine_adapters, search
from polyalign.core.errors import UserError
from polyalign.core.fast_slow import ADAPTERS, FastSlow, add_twin, slow_optimizer
from polyalign.core.low_rank import reduce_rank
from polyalign.core.objectives import Beta, Objective, Term
from polyalign.core.objectives.table import SPEC
from polyalign.core.recipe import BetaConfig
from polyalign.core.references import AdapterOff, FrozenCopy, adapter_chosen, adapter_layers, adapter_parameters
from polyalign.core.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "exactness"))

from tiny_training import Denoiser, TinyAdapter, TinyPairs, settings  # noqa: E402  # pyright: ignore[reportMissingImports]

NAMES = ["default", "second", "third"]
INPUTS = (torch.ones(1, 3, 6, 6), torch.tensor([3]), torch.ones(1, 4))


class Words(nn.Module):
    """An embedding, for LoRA's other form."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(7, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids))


def three(targets: list[str] | None = None, base: nn.Module | None = None) -> Any:
    """A network with three random adapters of different rank and scale, one of them with a rank of its own in one layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options: dict[str, Any] = {"target_modules": targets or ["inwards", "middle", "outwards"], "init_lora_weights": False}
        network: Any = get_peft_model(base or Denoiser(), LoraConfig(r=4, lora_alpha=4, **options))
        network.add_adapter("second", LoraConfig(r=2, lora_alpha=7, use_rslora=True, **options))
        pattern = {} if targets else {"middle": 3}
        network.add_adapter("third", LoraConfig(r=1, lora_alpha=1, rank_pattern=pattern, **options))
    network.set_adapter("default")
    return network


def updates(network: Any, name: str) -> list[Tensor]:
    return [layer.get_delta_weight(name).detach() for layer in adapter_layers(network)]


@pytest.mark.parametrize("coefficients", [(1.0, 0.0, 0.0), (0.2, 0.5, 0.3), (0.7, -0.4, 1.5)])
def test_the_combination_is_that_of_the_products(coefficients: tuple[float, ...]) -> None:
    network = three()
    assert combine_adapters(network, NAMES, coefficients) == 0.0
    parts = [updates(network, name) for name in NAMES]
    for place, found in enumerate(updates(network, COMBINED)):
        wanted = sum(c * part[place] for c, part in zip(coefficients, parts, strict=True))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_it_is_what_peft_calls_cat() -> None:
    network = three()
    network.delete_adapter("third")
    combine_adapters(network, NAMES[:2], (0.3, 0.9))
    network.add_weighted_adapter(NAMES[:2], [0.3, 0.9], "cat", combination_type="cat")
    for ours, theirs in zip(updates(network, COMBINED), updates(network, "cat"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_embeddings_are_combined_too() -> None:
    network = three(["words", "out"], Words())
    combine_adapters(network, NAMES, (0.2, 0.5, 0.3))
    parts = [updates(network, name) for name in NAMES]
    for place, found in enumerate(updates(network, COMBINED)):
        wanted = sum(c * part[place] for c, part in zip((0.2, 0.5, 0.3), parts, strict=True))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_adapters_on_different_layers() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = get_peft_model(Denoiser(), LoraConfig(r=2, target_modules=["inwards"], init_lora_weights=False))
        network.add_adapter("second", LoraConfig(r=3, target_modules=["middle"], init_lora_weights=False))
    network.set_adapter("default")
    combine_adapters(network, NAMES[:2], (0.5, 2.0))
    layers = dict(network.base_model.model.named_modules())
    torch.testing.assert_close(
        layers["inwards"].get_delta_weight(COMBINED), 0.5 * layers["inwards"].get_delta_weight("default")
    )
    torch.testing.assert_close(layers["middle"].get_delta_weight(COMBINED), 2.0 * layers["middle"].get_delta_weight("second"))


def test_other_adapters_on_further_layers_are_no_hindrance() -> None:
    def adding(network: Any, name: str, *targets: str) -> None:
        with torch.random.fork_rng(devices=[]):
            network.add_adapter(name, LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))

    network: Any = get_peft_model(Denoiser(), LoraConfig(r=2, target_modules=["inwards"], init_lora_weights=False))
    adding(network, "second", "inwards")
    adding(network, "wide", "inwards", "outwards")
    for names in (["default", "second"], ["default", "wide"], ["default", "second"]):  # each into the one before
        combine_adapters(network, names, (0.5, 2.0))
        for layer in adapter_layers(network):
            parts = [
                c * layer.get_delta_weight(name) for c, name in zip((0.5, 2.0), names, strict=True) if name in layer.scaling
            ]
            found = layer.get_delta_weight(COMBINED) if COMBINED in layer.scaling else torch.zeros(())
            torch.testing.assert_close(found, sum(parts, torch.zeros_like(found)), rtol=1e-5, atol=1e-6)


def test_combining_leaves_the_training_as_it_was() -> None:
    network = three()
    before, trained = network(*INPUTS), {k: v.requires_grad for k, v in network.named_parameters()}
    combine_adapters(network, NAMES, (0.2, 0.5, 0.3))
    combine_adapters(network, NAMES, (0.1, 0.1, 0.8))
    assert torch.equal(network(*INPUTS), before)
    now = {key: weight.requires_grad for key, weight in network.named_parameters()}
    assert {key: now[key] for key in trained} == trained and not any(now[key] for key in set(now) - set(trained))


def test_a_cut_rank_is_the_best_one_and_its_loss_is_told() -> None:
    network = three()
    combine_adapters(network, NAMES, (0.2, 0.5, 0.3))
    exact = updates(network, COMBINED)
    share = combine_adapters(network, NAMES, (0.2, 0.5, 0.3), rank=2)
    cut = updates(network, COMBINED)
    lost = sum(float((a - b).square().sum()) for a, b in zip(exact, cut, strict=True))
    size = sum(float(a.square().sum()) for a in exact)
    assert share == pytest.approx((lost / size) ** 0.5, rel=1e-4) and 0.01 < share < 0.9
    assert network.peft_config[COMBINED].r == 2
    assert combine_adapters(network, NAMES, (0.2, 0.5, 0.3), rank=20) == pytest.approx(0.0, abs=1e-6)


def test_reducing_agrees_with_the_svd_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(5, 7, generator=generator), torch.randn(6, 5, generator=generator)
    new_down, new_up, lost, size = reduce_rank(down, up, 3)
    u, s, v = torch.linalg.svd(up @ down)
    torch.testing.assert_close(new_up @ new_down, u[:, :3] * s[:3] @ v[:3], rtol=1e-4, atol=1e-4)
    assert lost == pytest.approx(float(s[3:].square().sum()), rel=1e-4)
    assert size == pytest.approx(float(s.square().sum()), rel=1e-4)
    with pytest.raises(ValueError, match="at least 1"):
        reduce_rank(down, up, 0)


def test_what_is_no_plain_lora_is_refused() -> None:
    network: Any = get_peft_model(Denoiser(), LoraConfig(r=2, target_modules=["middle"], use_dora=True))
    with pytest.raises(UserError, match="'default' is not a plain LoRA .use_dora"):
        combine_adapters(network, ["default"], [1.0])
    with pytest.raises(UserError, match="no adapter 'other' to combine"):
        combine_adapters(network, ["other"], [1.0])


def test_search_finds_the_best_point_of_the_simplex_and_beyond_it() -> None:
    def bowl(centre: tuple[float, ...]) -> Any:
        return lambda point: sum((a - b) ** 2 for a, b in zip(point, centre, strict=True))

    found = search(bowl((0.2, 0.7, 0.1)), 3)
    assert sum(found) == pytest.approx(1.0) and all(abs(a - b) < 0.04 for a, b in zip(found, (0.2, 0.7, 0.1), strict=True))
    assert search(bowl((2.0, 0.0, -1.0)), 3) == (1.0, 0.0, 0.0)
    found = search(bowl((1.2, 0.7, 0.0)), 3, space="coordinates")
    assert all(abs(a - b) < 0.04 for a, b in zip(found, (1.2, 0.7, 0.0), strict=True))
    assert search(bowl((0.3,)), 1) == (1.0,)
    assert search(lambda point: math.exp(-sum(point)), 2, space="coordinates") == (2.0, 2.0)  # more is better, for ever


def replayed(network: Any) -> Replay:
    kind = TinyAdapter()
    model = kind.load().with_network(network)
    rows = TinyPairs(12).rows(range(12))
    domains = {"first": rows[:5], "second": rows[5:12]}
    objective, beta = Objective("dpo", (Term(),)), Beta.of(BetaConfig(value=20.0))
    return Replay(kind, model, objective, beta, AdapterOff(network), domains, batch_size=4)


class Turned(TinyPairs):
    """A domain in which half of the pairs prefer the other candidate."""

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        found = super().rows(indices)
        return [
            row | {"latents": row["latents"].flip(0)} if index % 2 else row for index, row in zip(indices, found, strict=True)
        ]


def test_two_domains_after_each_other_and_their_combination(tmp_path: Path) -> None:
    """OFS-DPO on each domain, its fast adapter kept; then both on one base, combined for pairs of both, and used."""
    domains: dict[str, TinyPairs] = {"plain": TinyPairs(), "turned": Turned()}
    spec = SPEC.validate_python({"name": "ofs_dpo", "beta": {"value": 20.0}})
    for name, data in domains.items():
        kind = TinyAdapter()
        model = kind.trainable(kind.load())
        add_twin(model.network)
        method = FastSlow(kind, model, spec, {"reference": AdapterOff(model.network)}, interval=2)
        chosen = settings(steps=6)
        Trainer(method, data, chosen, tmp_path / name, optimizers=slow_optimizer(chosen.optimizer, 0.3)).run()
        save_adapter(model.network, ADAPTERS["fast"], tmp_path / name / "adapter")

    kind = TinyAdapter()
    model = kind.trainable(kind.load())
    for name in domains:
        load_adapter(model.network, tmp_path / name / "adapter", name)
    memory = {name: data.rows(range(6)) for name, data in domains.items()}
    replay = Replay(
        kind, model, Objective("dpo", (Term(),)), Beta.of(BetaConfig(value=20.0)), AdapterOff(model.network), memory
    )
    alone = {name: replay.losses(name) for name in domains}
    assert alone["plain"]["plain"] < 0.69 and alone["turned"]["turned"] < alone["plain"]["turned"]  # each is for its domain
    chosen = choose_coefficients(model.network, list(domains), replay)
    assert chosen.loss <= min(sum(losses.values()) / 2 for losses in alone.values())
    save_adapter(model.network, COMBINED, tmp_path / "combined")
    load_adapter(model.network, tmp_path / "combined", "deployed")
    assert replay.losses("deployed") == chosen.losses


@pytest.mark.parametrize("space", ["simplex", "coordinates"])
def test_the_chosen_combination_is_at_least_as_good_as_each_alone(space: Any) -> None:
    network = three()
    memory = replayed(network)
    alone = {name: sum(memory.losses(name).values()) / 2 for name in NAMES}
    chosen = choose_coefficients(network, NAMES, memory, space=space)
    assert chosen.loss <= min(alone.values())
    assert memory.losses(COMBINED) == chosen.losses and chosen.loss == pytest.approx(sum(chosen.losses.values()) / 2)
    assert chosen.tried > 4 and (space == "coordinates" or sum(chosen.coefficients) == pytest.approx(1.0))


def test_a_memory_has_pairs_of_every_domain() -> None:
    network = three()
    kind = TinyAdapter()
    seat, beta = AdapterOff(network), Beta.of(BetaConfig())
    with pytest.raises(UserError, match=r"no pairs of \['new'\]"):
        Replay(kind, kind.load(), Objective("dpo", (Term(),)), beta, seat, {"old": TinyPairs().rows([0]), "new": []})


def test_a_memory_scores_its_reference_without_dropout_as_it_does_the_adapters() -> None:
    kind = TinyAdapter(dropout=0.5)
    model = kind.trainable(kind.load())
    with torch.no_grad():
        for weight in adapter_parameters(model.network, "default"):
            weight.fill_(0.1)
    assert model.network.training
    objective, seat = Objective("dpo", (Term(),)), FrozenCopy(model.network)
    memory = Replay(kind, model, objective, Beta.of(BetaConfig()), seat, {"all": TinyPairs().rows(range(4))})
    assert memory.losses("default")["all"] == pytest.approx(math.log(2.0), abs=1e-7)  # the policy is its reference
    assert model.network.training


def test_a_combination_is_saved_as_an_ordinary_adapter(tmp_path: Path) -> None:
    network = three()
    combine_adapters(network, NAMES, (0.2, 0.5, 0.3))
    save_adapter(network, COMBINED, tmp_path / "combined")
    with adapter_chosen(network, COMBINED):
        wanted = network(*INPUTS)
    base = Denoiser()
    base.load_state_dict(_base_of(network))
    fresh = PeftModel.from_pretrained(base, str(tmp_path / "combined"))
    torch.testing.assert_close(fresh(*INPUTS), wanted)
    save_adapter(network, COMBINED, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "combined" / name).read_bytes()


def _base_of(network: Any) -> dict[str, Tensor]:
    state = network.base_model.model.state_dict()
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if "lora_" not in key}


def test_an_adapter_is_loaded_beside_others(tmp_path: Path) -> None:
    network = three()
    save_adapter(network, "second", tmp_path / "second")
    before, trained = network(*INPUTS), {k: v.requires_grad for k, v in network.named_parameters()}
    load_adapter(network, tmp_path / "second", "guide")
    assert torch.equal(network(*INPUTS), before)
    for ours, theirs in zip(adapter_parameters(network, "guide"), adapter_parameters(network, "second"), strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad
    now = {key: weight.requires_grad for key, weight in network.named_parameters()}
    assert {key: now[key] for key in trained} == trained
    with pytest.raises(UserError, match="one of that name already"):
        load_adapter(network, tmp_path / "second", "guide")
    with pytest.raises(UserError, match="set model.train to lora"):
        load_adapter(Denoiser(), tmp_path / "second", "guide")


def llama(dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).to(dtype)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_half_base_does_not_round_an_adapter_and_its_file_fits_both_ways_of_peft(tmp_path: Path, wrapped: bool) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    first, second = llama(torch.float32), llama(torch.bfloat16)
    first.add_adapter(config)
    if wrapped:
        second = get_peft_model(second, config)
    else:
        second.add_adapter(config)
    save_adapter(first, "default", tmp_path)
    load_adapter(second, tmp_path, "guide")
    for ours, theirs in zip(adapter_parameters(second, "guide"), adapter_parameters(first, "default"), strict=True):
        assert torch.equal(ours, theirs)


def test_an_adapter_that_changes_the_base_is_refused(tmp_path: Path) -> None:
    network = get_peft_model(llama(torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    odd = get_peft_model(llama(torch.float32), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    save_adapter(odd, "default", tmp_path)
    before = {name: value.clone() for name, value in network.named_parameters()}
    with pytest.raises(UserError, match="init_lora_weights is 'pissa', which changes the base's own weights"):
        load_adapter(network, tmp_path, "guide")
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    (tmp_path / "adapter_config.json").write_text("{half")
    with pytest.raises(UserError, match=r"adapter_config.json: cannot be read"):
        load_adapter(network, tmp_path, "guide")


def test_all_of_it_on_what_diffusers_puts_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=4,
    )
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    add_twin(network)
    for ours, twins in zip(updates(network, "default"), updates(network, "slow"), strict=True):
        assert torch.equal(ours, twins)
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([3, 5]), torch.randn(2, 5, 4))
    before = network(*inputs).sample.detach()
    save_adapter(network, "default", tmp_path)
    load_adapter(network, tmp_path, "again")
    for rank in (None, 1):
        combine_adapters(network, ["default", "again"], (0.25, 0.75), rank=rank)
        with adapter_chosen(network, COMBINED):
            combined = network(*inputs).sample.detach()
        assert torch.allclose(combined, before, atol=1e-5) == (rank is None)
    assert torch.equal(network(*inputs).sample, before)


def test_what_is_no_adapter_of_this_base_is_refused(tmp_path: Path) -> None:
    network = three()
    with pytest.raises(UserError, match="a LoRA is a folder with adapter_config.json.*there is none"):
        load_adapter(network, tmp_path, "guide")
    save_adapter(three(["words", "out"], Words()), "default", tmp_path / "words")
    with pytest.raises(UserError, match="does not fit this base"):
        load_adapter(network, tmp_path / "words", "guide")
    save_adapter(network, "default", tmp_path / "short")
    weights = tmp_path / "short" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(network, tmp_path / "short", "guide2")
    weights.rename(tmp_path / "short" / "adapter_model.bin")
    with pytest.raises(UserError, match="in a pickle"):
        load_adapter(network, tmp_path / "short", "guide3")
