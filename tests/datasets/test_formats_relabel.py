"""Pairs judged anew: swapped where the judge disagrees, ties dropped, and the share of disagreement said."""

import pytest
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.datasets.formats.stores import TOGETHER, relabel
from polyalign.datasets.formats.table import import_format
from polyalign.datasets.pairs import PairStore


class Brightness:
    """The brighter the better, in steps of 10 grey levels."""

    name, version = "brightness", "3"

    def __init__(self):
        self.calls = []

    def score(self, conditions, outputs):
        self.calls.append([condition["prompt"] for condition in conditions])
        return [output.getpixel((0, 0))[0] // 10 for output in outputs]


def row(index, chosen, rejected, origin=None):
    return {
        "pair_id": f"{index:03d}",
        "condition": {"prompt": f"p {index}", "task": "t"},
        "chosen": Image.new("RGB", (4, 4), (chosen, 0, 0)),
        "rejected": Image.new("RGB", (4, 4), (rejected, 0, 0)),
        "chosen_scores": {"user": 1.0},
        "rejected_scores": {"user": 0.0},
        "provenance": {
            "model": "m",
            "chosen_seed": index,
            "rejected_seed": 1000 + index,
            "sampler": origin or {"steps": 3},
            "judges": {"user": {"version": "1"}},
        },
    }


@pytest.fixture
def store(tmp_path):
    """Forty pairs in two shards: the judge agrees with one, disagrees with the next, cannot tell the third."""
    greys = [(200, 100), (50, 150), (101, 102)]
    rows = [row(index, *greys[index % 3]) for index in range(40)]
    rows[1] = row(
        1, 50, 150, {"source": "folders", "chosen": "chosen/1.png", "rejected": "rejected/1.png", "chosen_model": "x"}
    )
    store = PairStore(tmp_path / "store")
    store.write_shard(0, rows[:25])
    store.write_shard(1, rows[25:])
    return store


def test_swapped_where_the_judge_disagrees(store, tmp_path):
    judge, made = Brightness(), PairStore(tmp_path / "made")
    summary = relabel(store.folder, made, judge=judge)
    assert (summary["agreed"], summary["disagreed"], summary["ties_dropped"]) == (14, 13, 13)
    assert summary["disagreement"] == 13 / 27
    assert summary["pairs"] == made.validate() == 27 and summary["samples"] == 80
    assert summary["judge"] == {"name": "brightness", "version": "3"}
    assert sum(summary["score_histogram"]["counts"]) == 54
    rows = made.rows(range(27))
    assert [item["pair_id"] for item in rows] == [f"{index:03d}" for index in range(40) if index % 3 != 2]
    for item in rows:
        index = int(item["pair_id"])
        assert item["chosen"].getpixel((0, 0))[0] == (200 if index % 3 == 0 else 150)
        assert item["chosen_scores"]["brightness"] > item["rejected_scores"]["brightness"]
        kept = index % 3 == 0
        assert (item["chosen_scores"]["user"], item["rejected_scores"]["user"]) == ((1.0, 0.0) if kept else (0.0, 1.0))
        seeds = item["provenance"]["chosen_seed"], item["provenance"]["rejected_seed"]
        assert seeds == ((index, 1000 + index) if kept else (1000 + index, index))
        assert item["provenance"]["judges"] == {"user": {"version": "1"}, "brightness": {"version": "3"}}
        assert item["condition"] == {"prompt": f"p {index}", "task": "t"}
    origin = rows[1]["provenance"]["sampler"]
    assert origin == {"source": "folders", "chosen": "rejected/1.png", "rejected": "chosen/1.png", "rejected_model": "x"}


def test_the_judge_sees_many_pairs_at_once_and_each_once(store, tmp_path):
    judge = Brightness()
    relabel(store.folder, PairStore(tmp_path / "made"), judge=judge)
    assert [len(call) for call in judge.calls] == [2 * TOGETHER, 2 * TOGETHER, 2 * (40 - 2 * TOGETHER)]
    assert judge.calls[0][:4] == ["p 0", "p 0", "p 1", "p 1"]


def test_again_asks_nobody_and_another_judge_is_not_mixed_in(store, tmp_path):
    made = PairStore(tmp_path / "made")
    relabel(store.folder, made, judge=Brightness())
    before, idle = made.content_hash(), Brightness()
    relabel(store.folder, made, judge=idle)
    assert made.content_hash() == before and idle.calls == []
    idle.version = "4"
    with pytest.raises(UserError, match="judge changed"):
        relabel(store.folder, made, judge=idle)


def test_relabelled_twice_with_the_opposite_taste_is_the_first_order_again(store, tmp_path):
    class Darkness(Brightness):
        name = "darkness"

        def score(self, conditions, outputs):
            return [-score for score in super().score(conditions, outputs)]

    light, dark = PairStore(tmp_path / "light"), PairStore(tmp_path / "dark")
    relabel(store.folder, light, judge=Brightness())
    summary = relabel(light.folder, dark, judge=Darkness())
    assert summary["disagreement"] == 1.0 and summary["ties_dropped"] == 0
    for first, second in zip(light.rows(range(27), decode=False), dark.rows(range(27), decode=False), strict=True):
        assert (first["chosen"], first["rejected"]) == (second["rejected"], second["chosen"])


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (lambda outputs: [1.0], "gave 1 scores for 32 pictures"),
        (
            lambda outputs: [float("nan") if at == 3 else 1.0 * at for at in range(len(outputs))],
            "nan for the rejected .* '001'.* 'p 1'",
        ),
    ],
)
def test_a_judge_that_answers_garbage(store, tmp_path, scores, said):
    class Broken(Brightness):
        def score(self, conditions, outputs):
            return scores(outputs)

    for policy in ("error", "drop"):
        with pytest.raises(UserError, match=f"'brightness' \\(version 3\\) gave.*|{said}") as caught:
            relabel(store.folder, PairStore(tmp_path / "made"), judge=Broken(), on_bad_row=policy)
        assert caught.match(said)


def test_only_ties_is_an_error(tmp_path):
    store = PairStore(tmp_path / "store")
    store.write_shard(0, [row(0, 100, 101)])
    with pytest.raises(UserError, match="no pair is left \\(1 rows, 1 ties dropped"):
        relabel(store.folder, PairStore(tmp_path / "made"), judge=Brightness())


def test_a_store_is_taken_over_as_it_is(store, tmp_path):
    made = PairStore(tmp_path / "made")
    summary = import_format("store", store.folder, made)
    assert summary["pairs"] == 40 and made.rows(range(40), decode=False) == store.rows(range(40), decode=False)
    with pytest.raises(UserError, match="no pair store here"):
        import_format("store", tmp_path / "none", PairStore(tmp_path / "x"))
    with pytest.raises(UserError, match="'relabel' needs a judge"):
        import_format("relabel", store.folder, PairStore(tmp_path / "x"))
