"""Training of the embedded base: its data, its going on after a kill, what it ships, and its gate."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyalign.core.errors import UserError
from polyalign.datasets.worlds import clinical
from polyalign.modalities.text import pretrain
from polyalign.modalities.text import tiny_architecture as tiny
from polyalign.modalities.text.pretrain import IGNORED, WINDOW, Data, Settings, loss_at, random_rows, stage_of

SMALL = Settings(steps=4, batch=4, tokenizer_stays=60, save_every=2, measured=4)


@pytest.fixture(scope="module")
def tokenizer():
    torch.set_num_threads(1)
    return tiny.tokenizer_of(text for row in random_rows(60, 0, "tokenizer", 0) for text in row)


def test_tokenizer_knows_any_text_and_splits_numbers(tokenizer):
    text = "naïve ☃ 2134-03-05\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("128") == ["1", "2", "8"]


def test_batches_follow_from_the_step_and_learn_the_summary_only(tokenizer):
    data = Data(tokenizer, SMALL)
    ids, labels = data.batch(WINDOW + 1)
    data.batch(0)
    again = data.batch(WINDOW + 1)
    assert torch.equal(ids, again[0]) and torch.equal(labels, again[1])
    for row, targets in zip(ids, labels, strict=True):
        learnt = row[targets != IGNORED]
        text = tokenizer.decode(learnt)
        assert text.startswith("A ") and text.endswith(tiny.END)
        assert tokenizer.decode(row).split("summary:")[0].startswith(("woman,", "man,"))
        assert torch.equal(targets[targets != IGNORED], learnt)


def test_no_held_out_stay_is_learnt_from():
    assert not any(clinical.held_out(prompt) for prompt, _ in random_rows(200, 0, "stays", 0))


def test_a_killed_training_goes_on_to_the_same_weights(tokenizer, tmp_path: Path):
    def trained(name: str, stop: int | None = None) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir(exist_ok=True)
        network, data = tiny.build(tokenizer, 0), Data(tokenizer, SMALL)
        stage = stage_of(network, SMALL, tmp_path / name)

        def loss_of(step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            return loss_at(step, network, data)

        with suppress(KeyboardInterrupt):
            stage.run(loss_of)
        return network.state_dict()

    straight = trained("straight")
    trained("killed", stop=3)
    assert all(torch.equal(value, straight[name]) for name, value in trained("killed").items())


def test_what_is_written_opens_with_transformers_and_other_settings_are_refused(tmp_path: Path):
    record = pretrain.pretrain(tmp_path / "base", SMALL)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert network.dtype == torch.float16 and again.eos_token == tiny.END
    assert record == json.loads((tmp_path / "base" / "base.json").read_text())
    assert record["sha256"] == pretrain.digest(tmp_path / "base")
    with pytest.raises(UserError, match="is of another run"):
        pretrain.pretrain(tmp_path / "base", replace(SMALL, seed=1))


def test_the_gate():
    good = {"right": 0.5, "facts_right": 0.95}
    assert pretrain.unfit(good) is None
    assert "less than 0.9" in (pretrain.unfit({**good, "facts_right": 0.8}) or "")
    assert "0.25 to 0.85" in (pretrain.unfit({**good, "right": 0.9}) or "")
