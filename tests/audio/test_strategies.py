"""Audio-alpaca's strategies: which samples become pairs, the filter, the table, and the generation shard by shard."""

import json
import shutil
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from polyalign.core.errors import UserError
from polyalign.core.recipe import PairingConfig
from polyalign.datasets.audio.perturb import Perturbed
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.worlds import sounds
from polyalign.evaluation.chat import Unusable
from polyalign.modalities.audio.config import FilterConfig, PairsConfig, StrategiesConfig
from polyalign.modalities.audio.pairs import strategy_pairs
from polyalign.modalities.audio.perturbing import captions_in
from polyalign.modalities.audio.strategies import Judged, Made, as_text, asked_of, pairs_of, passes, table_of

PROMPT = {"prompt": "a bell then a drum"}


def judged(*totals, hashes=None):
    names = hashes or [str(place) for place in range(len(totals))]
    return [Judged(name, {"clap": total}, total) for name, total in zip(names, totals, strict=True)]


def test_what_is_asked_for_a_prompt():
    settings = StrategiesConfig(steps=(5, 50), samples=3)
    asked = asked_of(PROMPT, {"2": [Perturbed("a bell", "drop")], "3": []}, settings)
    assert [(one.strategy, one.number) for one in asked] == [
        ("1.1", 0),
        ("1.1", 1),
        ("1.2", 0),
        ("1.2", 1),
        ("1.2", 2),
        ("2", 0),
    ]
    assert [one.condition.get("steps") for one in asked] == [5, 50, None, None, None, None]
    assert asked[-1].condition["prompt"] == "a bell" and asked[-1].kind == "drop"
    alone = asked_of(PROMPT, {"3": [Perturbed("a drum then a bell", "order")]}, StrategiesConfig(steps=(), samples=0))
    assert [one.strategy for one in alone] == ["1.2", "3"], "the prompt's own sound is sampled once for the perturbed ones"


def test_the_best_wins_over_each_of_the_others_and_ties_are_counted():
    settings = StrategiesConfig(steps=(), samples=4, perturbed=0, temporal=0)
    asked = asked_of(PROMPT, {}, settings)
    found = pairs_of(asked, judged(0.3, 0.6, 0.6, 0.1), settings, PairingConfig(), {})
    assert found.pairs == [Made("1.2", 1, 3), Made("1.2", 1, 0)] and found.counts["1.2"]["ties"] == 1
    limited = pairs_of(asked, judged(0.3, 0.6, 0.6, 0.1), settings, PairingConfig(margin=0.4, max_pairs_per_prompt=1), {})
    assert limited.pairs == [Made("1.2", 1, 3)] and limited.counts["1.2"]["below_margin"] == 1
    same = pairs_of(asked, judged(0.3, 0.6, 0.5, 0.1, hashes=["a", "b", "b", ""]), settings, PairingConfig(), {})
    assert same.pairs == [Made("1.2", 1, 0)]
    assert same.counts["1.2"]["duplicates"] == 1 and same.counts["1.2"]["silent"] == 1


@pytest.mark.parametrize(("winner", "expected"), [("first", [(0, 3)]), ("best", [(1, 3), (1, 2)])])
def test_the_prompts_own_sound_wins_over_those_of_perturbed_prompts(winner, expected):
    settings = StrategiesConfig(steps=(), samples=2, winner=winner)
    asked = asked_of(PROMPT, {"3": [Perturbed("x", "order"), Perturbed("y", "add")]}, settings)
    found = pairs_of(asked, judged(0.4, 0.6, 0.5, 0.2), settings, PairingConfig(), {})
    assert [(pair.chosen, pair.rejected) for pair in found.pairs if pair.strategy == "3"] == expected
    assert found.counts["3"]["reversed"] == (winner == "first")


def test_the_published_filter():
    first = FilterConfig(alpha=0.45, beta=0.40, delta=(0.05, 0.35))
    second = FilterConfig(alpha=0.60, beta=0.0, delta=(0.08, 0.70))
    assert passes(first, 0.6, 0.45) and passes(second, 0.7, 0.1)
    assert not passes(first, 0.44, 0.40) and not passes(first, 0.6, 0.39) and not passes(first, 0.6, 0.56)
    assert not passes(first, 0.8, 0.41) and not passes(second, 0.61, 0.55)
    settings = StrategiesConfig(steps=(), samples=2, perturbed=0, temporal=0)
    outcome = pairs_of(asked_of(PROMPT, {}, settings), judged(0.6, 0.3), settings, PairingConfig(), {"clap": first})
    assert outcome.pairs == [] and outcome.counts["1.2"]["filtered"] == 1


def test_the_table_has_a_row_for_each_strategy_and_one_for_all():
    counts = {"1.2": {"compared": 3, "pairs": 2, "ties": 1}, "3": {"compared": 2, "pairs": 1, "reversed": 1}}
    scores = {"1.2": [({"clap": 0.6}, {"clap": 0.4}), ({"clap": 0.8}, {"clap": 0.2})], "3": [({"clap": 0.7}, {"clap": 0.6})]}
    table = table_of(counts, scores)
    assert [(row["strategy"], row["pairs"]) for row in table] == [("1.2", 2), ("3", 1), ("all", 3)]
    assert table[0]["scores"]["clap"] == pytest.approx({"chosen": 0.7, "rejected": 0.3, "difference": 0.4})
    assert table[2]["scores"]["clap"]["chosen"] == pytest.approx(0.7) and table[2]["ties"] == 1
    assert "clap: chosen 0.700, rejected 0.300, difference 0.400" in as_text(table)


class Renderer:
    """A sampler that plays what a prompt asks for, and with an odd seed something else: the world's own clips."""

    def __init__(self):
        self.calls = []

    def sample(self, model, conditions, seeds):
        self.calls.append([condition["prompt"] for condition in conditions])
        return [self._clip(condition["prompt"], seed) for condition, seed in zip(conditions, seeds, strict=True)]

    def _clip(self, prompt, seed):
        try:
            spec = sounds.parse(prompt)
        except ValueError:  # a perturbed prompt that the world has no word for
            spec = sounds.parse("a croak")
        return sounds.render(spec if seed % 2 else sounds.parse("a bell"), seed % 1000)[0]


def settings(**changes):
    return PairsConfig.model_validate(
        {
            "source": "strategies",
            "prompts": {"world": "sounds", "count": 4},
            "prompts_per_shard": 2,
            "judges": [{"name": "sounds", "filter": {"alpha": 1.0}}],
            "strategies": {"steps": [5, 10], "samples": 3, "perturbed": 0, "temporal": 1, "winner": "best"},
            **changes,
        }
    )


PROMPTS = [{"prompt": text} for text in ("a bell then a drum", "a clap before a horn", "a drum twice")]
MODEL = SimpleNamespace(identity="renderer@1")


def made(folder, sampler=None, **changes):
    return strategy_pairs(
        sampler or Renderer(), MODEL, PROMPTS, settings(**changes), folder=folder, seed=1, sampler={"steps": 50}
    )


def test_pairs_are_made_with_all_that_is_known_of_them(tmp_path, capsys):
    judges = [{"name": "sounds"}, {"name": "event_order", "weight": 0, "filter": {"alpha": 0.9}}]
    summary = made(tmp_path / "pairs", judges=judges)
    store = PairStore(tmp_path / "pairs", "sound")
    assert store.validate() == summary["pairs"] > 0
    rows = store.rows(range(len(store)))
    assert {row["condition"]["strategy"] for row in rows} <= {"1.1", "1.2", "3"}
    for row in rows:
        assert row["chosen_scores"]["sounds"] > row["rejected_scores"]["sounds"] and row["chosen_scores"]["event_order"] >= 0.9
        assert ("rejected_prompt" in row["provenance"]["sampler"]) == (row["condition"]["strategy"] in ("2", "3"))
    table = summary["strategies"]
    assert sum(row["pairs"] for row in table[:-1]) == table[-1]["pairs"] == summary["pairs"]
    assert all(
        row["compared"] == sum(row[name] for name in row if name not in ("strategy", "compared", "scores")) for row in table
    )
    assert "strategy  compared  pairs" in capsys.readouterr().err
    samples = pq.read_table(tmp_path / "pairs" / "samples-00000.parquet").to_pylist()
    assert {row["steps"] for row in samples if row["strategy"] == "1.1"} == {5, 10}


def test_an_interrupted_generation_ends_with_the_same_bytes(tmp_path):
    made(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "pairs-00001.parquet").unlink()
    sampler = Renderer()
    made(tmp_path / "again", sampler)
    assert len(sampler.calls) == 1, "only the missing shard is sampled"
    for name in ("pairs-00000.parquet", "pairs-00001.parquet", "samples-00001.parquet", "summary.json", "perturbed.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(UserError, match="made in another way"):
        made(tmp_path / "again", prompts_per_shard=3)


def test_nothing_that_passes_is_an_error_with_the_counts(tmp_path, capsys):
    with pytest.raises(UserError, match="no two make a pair"):
        made(tmp_path / "pairs", judges=[{"name": "sounds", "filter": {"alpha": 2.0}}])
    assert "filtered" in capsys.readouterr().err
    assert json.loads((tmp_path / "pairs" / "summary.json").read_text())["filtered_dropped"] > 0


def test_an_endpoints_captions_are_read_or_refused():
    assert captions_in('Here: ["A cat  meows", "A dog barks", "a cat meows"]', "a dog barks") == ["A cat meows", "a cat meows"]
    for answer in ("no list", "[1, 2]", "[]", '["a", ""]', '["a"'):
        with pytest.raises(Unusable, match="JSON list of texts"):
            captions_in(answer, "x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategies": {"steps": [], "samples": 0, "perturbed": 0, "temporal": 0}}, "all strategies are left out"),
        ({"strategies": {"steps": [5]}}, "one sample makes no pair"),
        ({"strategies": {"steps": [5, 5]}}, "different numbers"),
        ({"strategies": {"samples": 0, "winner": "best"}}, "there are none"),
        ({"source": "generate"}, "'filter' of a judge is for source 'strategies'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)
