"""The base that comes with the package: what it is, what it can do, and that its record tells the truth."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from polyalign.core.adapter import Model
from polyalign.core.randomness import seed_of
from polyalign.datasets.clinical.stay import prompt_of
from polyalign.datasets.worlds import clinical
from polyalign.modalities.text import loading, pretrain
from polyalign.modalities.text.adapter import TextAdapter
from polyalign.modalities.text.settings import TextModelSettings

FOLDER = Path(loading.__file__).parent / "tiny_base"
MOST_BYTES = 6 * 2**20


@pytest.fixture(scope="module")
def base() -> tuple[TextAdapter, Model]:
    torch.set_num_threads(1)
    adapter = TextAdapter(TextModelSettings(max_new_tokens=220, sample_batch=60))
    return adapter, adapter.load()


def test_its_record_is_of_these_weights_and_passes_the_gate():
    record = json.loads((FOLDER / "base.json").read_text())
    assert record["sha256"] == pretrain.digest(FOLDER)
    assert record["settings"] == json.loads(json.dumps(asdict(pretrain.Settings())))
    assert record["errors_in_its_summaries"] == dict(clinical.ERRORS)
    assert pretrain.unfit(record["figures"]) is None
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < MOST_BYTES


def test_it_summarises_stays_that_it_has_not_seen(base):
    adapter, model = base
    conditions = clinical.prompts("heldout", 60, seed=11)
    summaries = adapter.sample(model, conditions, [seed_of(11, "summary", index) for index in range(60)])
    verdicts = [clinical.ClinicalJudge().verdict(one, text) for one, text in zip(conditions, summaries, strict=True)]
    facts = sum(verdict.facts for verdict in verdicts)
    assert sum(verdict.right for verdict in verdicts) / facts > 0.85  # its record says 0.95, of 400 stays
    assert 0.4 < sum(verdict.score == 1 for verdict in verdicts) / len(verdicts) < 0.95


def test_it_finds_the_right_summary_likelier_than_a_wrong_one(base):
    adapter, model = base
    stays = clinical.stays("heldout", 16, seed=12)
    rows = [
        {
            "pair_id": str(index),
            "condition": {"prompt": prompt_of(stay)},
            "chosen": clinical.summary_of(stay),
            "rejected": clinical.summary_of(replace(stay, age=stay.age + 1)),
        }
        for index, stay in enumerate(stays)
    ]
    batch = adapter.prepare(model, rows, step=0)
    with torch.no_grad():
        scores = adapter.score(model, batch, adapter.draws(model, batch, step=0))
    likelihood = torch.where(scores.mask, scores.values, torch.zeros_like(scores.values)).sum(-1)
    assert (likelihood[:, 0] > likelihood[:, 1]).all()
