"""Online IPO and IPO-MD go to the equilibrium that their settings ask for, and no further: what looks flat is a large tau.

Answers are one token, and a judge likes those with a vowel. At the equilibrium of the regularised game the odds of a vowel are
the base's times exp((sigma(1 / scale) - 1/2) / tau), whatever the mixture that samples are drawn from.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polyalign.modalities.text import stages
from polyalign.modalities.text.training import open_start, open_trained

sys.path.insert(0, str(Path(__file__).resolve().parent))

from text_runs import polyalign, prompts_file, recipe, write_recipe  # noqa: E402

torch.set_num_threads(1)

VOWEL = {"name": "text_rules", "options": {"rules": [{"rule": "present", "pattern": "[aeiou]"}]}}


def log_odds_of_a_vowel(recipe: Any, trained: Path | None) -> float:
    """Of the first token after the training's only prompt."""
    adapter, model = open_start(recipe) if trained is None else open_trained(recipe, trained)
    row = {"pair_id": "0", "condition": {"prompt": "train 0: what is it?"}, "completion": "x"}
    ids = adapter.prepare(model, [row], step=0).tensors["prompt_ids"]
    with torch.no_grad():
        chances = model.network(input_ids=ids).logits[0, -1].double().softmax(-1)
    tokenizer = model.parts["tokenizer"]
    texts = [tokenizer.decode([token]) for token in range(len(chances))]
    # Parts of letters come back as other tokens than were sampled, so what is trained of them is something else.
    whole = [tokenizer(text, add_special_tokens=False).input_ids == [token] for token, text in enumerate(texts)]
    asked = [kept and bool(text.strip()) and "<" not in text for kept, text in zip(whole, texts, strict=True)]
    vowel = [any(letter in "aeiou" for letter in text) for text in texts]
    good = torch.tensor([kept and one for kept, one in zip(asked, vowel, strict=True)])
    other = torch.tensor([kept and not one for kept, one in zip(asked, vowel, strict=True)])
    return math.log(chances[good].sum() / chances[other].sum())


def gained_and_wanted(base: Path, folder: Path, *, tau: float, mixture: float = 0.0, full: bool = False) -> tuple[float, float]:
    """The change of the log-odds of a vowel by a training, and that of the equilibrium."""
    scale = 1.0
    online = {"rounds": 8, "prompts_per_round": 48, "mode": "first_second", "targets": "soft", "ties": "half"}
    objective = {"name": "online_ipo", "tau": tau, "beta": {"value": 1.0, "convention": "nats"}}
    content = recipe(base, folder, online={**online, "scale": scale, "mixture": mixture}, objective=objective)
    content["pairs"] = {"prompts": {"file": str(prompts_file(folder, "train", 1))}, "judges": [VOWEL]}
    content["prepare"], content["sampler"] = {"append_eos": False}, {"max_new_tokens": 1, "batch_size": 96}
    optimizer = {"learning_rate": 1e-2, "betas": [0.0, 0.999], "weight_decay": 0.0}
    content["train"] |= {"steps": 96, "batch_size": 16, "micro_batch_size": 16, "optimizer": optimizer, "save_every": 200}
    content["train"]["schedule"] = {"name": "linear"}
    if full:
        content["model"] = {"base": str(base), "train": "full"}
        content["train"]["reference"] = {"seat": "frozen"}
    config, run = write_recipe(folder, content), folder / "run"
    for verb in ("generate", "train"):
        assert polyalign(verb, config, run) == 0
    made = stages.SCHEMA.model_validate(content)
    gained = log_odds_of_a_vowel(made, run / "adapter") - log_odds_of_a_vowel(made, None)
    wanted = (1 / (1 + math.exp(-1 / scale)) - 0.5) / tau
    return gained, wanted


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_the_odds_are_those_of_the_equilibrium(tau: float, tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    """With all weights, the head's too, every token is free to move."""
    gained, wanted = gained_and_wanted(tiny_texts["llama"], tmp_path, tau=tau, full=True)
    assert gained == pytest.approx(wanted, abs=0.1 + 0.25 * wanted)


def test_a_mixture_has_the_same_equilibrium(tiny_texts: dict[str, Path], tmp_path: Path) -> None:
    """A LoRA leaves the head as it is and comes only part of the way, the same part whatever samples are drawn from."""
    parts = []
    for mixture in (0.0, 0.125):
        gained, wanted = gained_and_wanted(tiny_texts["llama"], tmp_path / str(mixture), tau=0.25, mixture=mixture)
        parts.append(gained / wanted)
    assert all(0.2 < part < 1.0 for part in parts) and parts[1] == pytest.approx(parts[0], abs=0.15), parts
