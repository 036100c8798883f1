"""The data card's counts of pairs that were read, and the line on diversity within a prompt."""

import json
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from polyalign.datasets.formats.table import import_format
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictures import encode_png
from polyalign.evaluation.diversity import compare_diversity
from polyalign.evaluation.report import write_report
from polyalign.evaluation.report.markup import number, signed


def section(run, name) -> ElementTree.Element:
    page = write_report(run).read_text(encoding="utf-8")
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    (found,) = [node for node in tree.iter("section") if node.get("id") == name]
    return found


def figures(run) -> dict[str, tuple[str, str]]:
    """The data card's figures: label -> (value, remark)."""
    cells = [["".join(part.itertext()) for part in cell] for cell in section(run, "data").findall("dl/div")]
    return {label: (value, remark) for label, value, remark in cells}


class Redness:
    name, version = "redness", "2"

    def score(self, conditions, outputs):
        return [float(picture.getpixel((0, 0))[0]) for picture in outputs]


def pickapic(path) -> None:
    """Eight pairs of which the first three are redder on the rejected side, two ties, one without a label, one unreadable."""

    def png(red):
        return encode_png(Image.new("RGB", (8, 8), (red, 10, 10)))

    pairs = [(png(50 + i), png(200 - i if i < 3 else 20 + i)) for i in range(8)]
    rows = [
        {"jpg_0": first, "jpg_1": second, "label_0": 1.0, "caption": f"p {i}", "has_label": True}
        for i, (first, second) in enumerate(pairs)
    ]
    rows += [{**rows[4], "label_0": 0.5, "caption": f"tie {i}"} for i in range(2)]
    rows += [{**rows[5], "has_label": False, "caption": "nobody"}, {**rows[6], "jpg_0": b"no picture", "caption": "broken"}]
    parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def read(make_run, tmp_path):
    """A run whose pairs were read from Pick-a-Pic's format, dropping what cannot be used."""
    run = make_run(count=24)
    shutil.rmtree(run / "pairs")
    pickapic(tmp_path / "rows.parquet")
    summary = import_format("pickapic", tmp_path / "rows.parquet", PairStore(run / "pairs"), on_bad_row="drop")
    assert (summary["pairs"], summary["rows_dropped"]) == (8, 1)
    return run


def test_the_data_card_counts_what_was_dropped_by_its_reason(read):
    found = figures(read)
    assert found["rows read"] == ("12", "") and found["pairs kept"] == ("8", "") and found["ties dropped"] == ("2", "")
    assert found["unlabelled dropped"] == ("1", "nobody chose")
    assert found["rows dropped"] == ("1", "unusable; pairs/summary.json lists them")
    assert "pictures" in found and "samples drawn" not in found, "pictures that were there are not samples"
    assert "judge against the labels" not in found, "nothing was judged anew"


def test_the_data_card_says_how_often_a_judge_turned_a_pair_round(read, tmp_path):
    (read / "pairs").rename(tmp_path / "given")
    summary = import_format("relabel", tmp_path / "given", PairStore(read / "pairs"), judge=Redness())
    assert summary["disagreement"] == 3 / 8
    found = figures(read)
    assert found["judge against the labels"] == ("37.5 %", "3 of 8 pairs turned round")
    assert found["rows dropped"] == ("0", ""), "a remark belongs to something"
    assert "unlabelled dropped" not in found, "a store has labels only"
    assert "redness" in "".join(section(read, "data").itertext())


def test_a_disagreement_over_no_pairs_is_none(read):
    file = read / "pairs" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "disagreement": None, "agreed": 0, "disagreed": 0}))
    assert "judge against the labels" not in figures(read)


def test_generated_pairs_are_counted_as_samples(make_run):
    found = figures(make_run(count=24))
    assert found["samples drawn"] == ("1,152", "") and found["prompts without a pair"] == ("23", "")
    assert not {"rows read", "rows dropped", "pictures"} & set(found)


def with_diversity(run, factor: float, metric="rms"):
    """The run's evaluation with features whose distances within a prompt are ``factor`` times the base's."""
    random = np.random.default_rng(0)
    prompts = [f"p {index // 4}" for index in range(160)]
    base = random.normal(size=(160, 12))
    noise = random.normal(size=base.shape) if factor == 1 else base
    block = compare_diversity(base, factor * noise, prompts, metric=metric, seed=0)
    file = run / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "diversity": block}))
    return block


@pytest.mark.parametrize(
    ("factor", "says"),
    [
        (0.5, "It fell: the aligned model's outputs of one prompt are more alike"),
        (1.5, "It rose: the aligned model's outputs of one prompt differ more"),
        (1, "It did not change beyond chance: the interval of the change holds zero"),
    ],
)
def test_diversity_within_a_prompt_is_said_with_its_direction(make_run, factor, says):
    run = make_run(count=24)
    block = with_diversity(run, factor)
    words = "".join(section(run, "alarms").itertext())
    assert says in words and sum(other in words for other in ("It fell", "It rose", "It did not change")) == 1
    shown = [number(block[side]) for side in ("base", "aligned")]
    assert f"Base {shown[0]}, aligned {shown[1]}: {signed(block['change'])}, " in words and "over 40 prompts" in words
    assert "thumbnails (0 to 1)" in words


def test_no_diversity_where_no_prompt_has_two_outputs(make_run):
    run = make_run(count=24)
    assert "Diversity within a prompt" not in "".join(section(run, "alarms").itertext())
    with_diversity(run, 0.5, metric="cosine")
    assert "cosine of the outputs' features" in "".join(section(run, "alarms").itertext())
    file = run / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "diversity": {}}))
    assert "Diversity within a prompt" not in "".join(section(run, "alarms").itertext())


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("win_rate", "x", "win_rate: Input should be"),
        ("items", 3, "items: Input should be a valid list"),
        ("items", [{"prompt": "a"}], "items.0.base_score: Field required"),
        ("scores", {"base": {}}, "scores.base.mean: Field required"),
    ],
)
def test_an_evaluation_of_another_shape_is_left_out_and_said(make_run, key, value, told):
    run = make_run()
    file = run / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    page = write_report(run).read_text(encoding="utf-8")
    assert "is not what the evaluation writes" in page and told in page.replace("&#x27;", "'")
