"""Preferences between texts: every variant of TRL's preference data, every kind of file, every kind of bad row."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyalign.core.errors import UserError
from polyalign.datasets.formats.table import FORMATS, TEXT_FORMATS, checked_options, import_format
from polyalign.datasets.formats.text_rows import pair_of_row
from polyalign.datasets.pairs import PairStore

USER, OTHER = {"role": "user", "content": "Is it far?"}, {"role": "user", "content": "By car?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def answer(text):
    return {"role": "assistant", "content": text}


def rows(count=5):
    return [{"prompt": f"Q{index}?", "chosen": f" yes {index}", "rejected": " no"} for index in range(count)]


def lines(path, given):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given), encoding="utf-8")
    return path


def imported(path, tmp_path, name="rows", on_bad_row="error", **options):
    store = PairStore(tmp_path / "store", "text")
    summary = import_format(name, path, store, on_bad_row=on_bad_row, options=options, formats=TEXT_FORMATS)
    return store, summary


VARIANTS = {
    "explicit": ({"prompt": "Q?", "chosen": " yes", "rejected": " no"}, {"prompt": "Q?"}, (" yes", " no")),
    "spaces stay": ({"prompt": "Q?\n", "chosen": "yes ", "rejected": "no\n"}, {"prompt": "Q?\n"}, ("yes ", "no\n")),
    "implicit": (
        {"chosen": "Human: far? Assistant: car park", "rejected": "Human: far? Assistant: cart"},
        {"prompt": "Human: far? Assistant:"},
        (" car park", " cart"),
    ),
    "conversation": (
        {"prompt": [SYSTEM, USER], "chosen": [answer("yes")], "rejected": [answer("no")]},
        {"prompt": "Is it far?", "messages": [SYSTEM, USER]},
        ("yes", "no"),
    ),
    "whole conversations beside the prompt": (
        {"prompt": [USER], "chosen": [USER, answer("yes")], "rejected": [USER, answer("no")]},
        {"prompt": "Is it far?", "messages": [USER]},
        ("yes", "no"),
    ),
    "implicit, conversation": (
        {"chosen": [USER, answer("a"), OTHER, answer("yes")], "rejected": [USER, answer("a"), OTHER, answer("no")]},
        {"prompt": "By car?", "messages": [USER, answer("a"), OTHER]},
        ("yes", "no"),
    ),
    "UltraFeedback": (
        {
            "prompt": "Is it far?",
            "chosen": [USER, answer("yes")],
            "rejected": [USER, answer("no")],
            "messages": [USER, answer("yes")],
            "score_chosen": 8.0,
        },
        {"prompt": "Is it far?", "messages": [USER], "score_chosen": 8.0},
        ("yes", "no"),
    ),
    "further columns": (
        {"prompt": "Q?", "chosen": "a", "rejected": "b", "task": "x", "tags": ["one"], "none": None},
        {"prompt": "Q?", "task": "x", "tags": ["one"]},
        ("a", "b"),
    ),
    "turns with more than role and content": (
        {"prompt": [{**USER, "name": None}], "chosen": [{**answer("yes"), "weight": 1}], "rejected": [answer("no")]},
        {"prompt": "Is it far?", "messages": [USER]},
        ("yes", "no"),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant):
    row, condition, answers = VARIANTS[variant]
    assert pair_of_row(row) == (condition, *answers)


def test_where_an_implicit_prompt_ends_can_be_said():
    row = {"chosen": "\n\nHuman: far?\n\nAssistant: It is near", "rejected": "\n\nHuman: far?\n\nAssistant: It is far"}
    assert pair_of_row(row) == ({"prompt": "\n\nHuman: far?\n\nAssistant: It is"}, " near", " far")
    ends = pair_of_row(row, prompt_ends="\n\nAssistant:")
    assert ends == ({"prompt": "\n\nHuman: far?\n\nAssistant:"}, " It is near", " It is far")


def test_texts_that_begin_with_the_prompt():
    row = {"prompt": "Q?", "chosen": "Q? yes", "rejected": "Q? no"}
    assert pair_of_row(row, whole=True) == ({"prompt": "Q?"}, " yes", " no")
    assert pair_of_row(row) == ({"prompt": "Q?"}, "Q? yes", "Q? no"), "nothing is taken off without being asked"


def test_other_names_of_columns():
    row = {"question": "Q?", "good": "a", "bad": "b", "chosen": "x"}
    condition, chosen, rejected = pair_of_row(row, ("question", "good", "bad"))
    assert (condition["prompt"], chosen, rejected) == ("Q?", "a", "b")


BAD = {
    "no chosen": ({"prompt": "Q?", "rejected": "b"}, "no column 'chosen'; found 'prompt', 'rejected'"),
    "null": ({"prompt": "Q?", "chosen": None, "rejected": None}, "no column 'chosen' and no 'rejected'"),
    "empty answer": ({"prompt": "Q?", "chosen": " \n", "rejected": "b"}, "column 'chosen': the answer is empty"),
    "empty prompt": ({"prompt": " ", "chosen": "a", "rejected": "b"}, "column 'prompt': the prompt is empty"),
    "the same": ({"prompt": "Q?", "chosen": "a", "rejected": "a"}, "are the same, so nothing is preferred"),
    "a number": ({"prompt": "Q?", "chosen": 3, "rejected": "b"}, "column 'chosen' must be text, as the others are, found int"),
    "two kinds": (
        {"prompt": "Q?", "chosen": [answer("a")], "rejected": "b"},
        "'chosen' is a list of turns and column 'rejected'",
    ),
    "no common beginning": ({"chosen": "yes it is", "rejected": "no"}, "have no common beginning"),
    "one is the other's beginning": (
        {"chosen": "Q? yes", "rejected": "Q? yes it is"},
        "'chosen': the answer is empty after the",
    ),
    "a turn without content": (
        {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [answer("b")]},
        "turn 0: expected",
    ),
    "an empty list": (
        {"prompt": [USER], "chosen": [], "rejected": [answer("b")]},
        "must be a list of turns, found an empty list",
    ),
    "an empty turn": (
        {"prompt": [USER], "chosen": [answer("")], "rejected": [answer("b")]},
        "column 'chosen': the answer is empty",
    ),
    "another prompt": (
        {"prompt": [USER], "chosen": [OTHER, answer("a")], "rejected": [USER, answer("b")]},
        "column 'chosen': the conversation does not begin with the prompt's turns",
    ),
    "a text that is none of the turns": (
        {"prompt": "By car?", "chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
        "column 'prompt' is none of the turns",
    ),
    "conversations that part early": (
        {"chosen": [USER, answer("a"), OTHER, answer("c")], "rejected": [USER, answer("b"), OTHER, answer("d")]},
        "found assistant, user, assistant. Conversations that differ in an earlier turn",
    ),
    "nothing to answer": (
        {"prompt": [USER, answer("a")], "chosen": [answer("b")], "rejected": [answer("c")]},
        "the prompt ends with an assistant's turn",
    ),
    "no user": ({"prompt": [SYSTEM], "chosen": [answer("b")], "rejected": [answer("c")]}, "has no turn of a user"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_or_left_out(case, tmp_path):
    bad, words = BAD[case]
    path = lines(tmp_path / "data.jsonl", [*rows(2), bad, *rows(1)])
    with pytest.raises(UserError) as refused:
        imported(path, tmp_path)
    assert (
        words in str(refused.value) and "data.jsonl line 3" in str(refused.value) and "on_bad_row: drop" in str(refused.value)
    )
    store, summary = imported(path, tmp_path, on_bad_row="drop")
    assert (summary["pairs"], summary["rows_dropped"]) == (3, 1) == (len(store), len(summary["dropped"]))
    assert summary["dropped"][0]["place"] == "data.jsonl line 3" and words in summary["dropped"][0]["problem"]


def test_whole_texts_without_the_prompt_are_bad_rows(tmp_path):
    path = lines(tmp_path / "data.jsonl", [{"prompt": "Q?", "chosen": "Q? yes", "rejected": "no"}])
    with pytest.raises(UserError, match="column 'rejected' does not begin with the prompt: it has 'no', the prompt is 'Q\\?'"):
        imported(path, tmp_path, whole=True)


def test_a_file_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match="latin.jsonl: not UTF-8 text .line 2, byte 16 of it.. Save the file as UTF-8"):
        imported(path, tmp_path)


def test_half_of_a_unicode_pair_is_a_bad_row(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b\\ud83d", "rejected": "c"}\n' + json.dumps(rows(1)[0]) + "\n")
    with pytest.raises(UserError, match="chosen: is not Unicode"):
        imported(path, tmp_path)
    assert imported(path, tmp_path, on_bad_row="drop")[1]["pairs"] == 1


def test_not_json_and_nothing_at_all(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("{'prompt': 1}\n[]\n")
    with pytest.raises(UserError, match="line 1: not JSON.*\n.*line 2: expected an object, found list"):
        imported(path, tmp_path)
    with pytest.raises(UserError, match="no such file"):
        imported(tmp_path / "none.jsonl", tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        imported(tmp_path / "none", tmp_path)


# --- files --------------------------------------------------------------------------------------------------------------------


def saved(kind, folder, given):
    """The rows in one of the kinds of files; returns what a recipe names."""
    folder.mkdir()
    if kind == "jsonl":
        return lines(folder / "data.jsonl", given)
    if kind == "json":
        (folder / "data.json").write_text(json.dumps(given))
        return folder / "data.json"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(given), folder / "data.parquet")
        return folder / "data.parquet"
    if kind == "folder of parquet":
        for part, cut in enumerate((given[:2], given[2:])):
            pq.write_table(pa.Table.from_pylist(cut), folder / f"train-{part:05d}-of-00002.parquet")
        return folder
    if kind == "folder of jsonl":
        for part, cut in enumerate((given[:2], given[2:])):
            lines(folder / f"part-{part}.jsonl", cut)
        return folder
    from datasets import Dataset

    Dataset.from_list(given).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder of parquet", "folder of jsonl", "saved data set"])
@pytest.mark.parametrize("variant", ["explicit", "conversation"])
def test_every_kind_of_file_gives_the_same_pairs(kind, variant, tmp_path):
    row, condition, (chosen, _) = VARIANTS[variant]
    given = [{**row, "rejected": _numbered(row["rejected"], index)} for index in range(5)]
    store, summary = imported(saved(kind, tmp_path / "data", given), tmp_path)
    assert (summary["pairs"], summary["rows"], summary["source"]) == (5, 5, "rows")
    found = store.rows(range(5))
    assert [one["condition"] for one in found] == [condition] * 5 and [one["chosen"] for one in found] == [chosen] * 5
    assert [one["rejected"][-1] for one in found] == list("01234")
    assert store.validate() == 5


def _numbered(side, index):
    return f"{side} {index}" if isinstance(side, str) else [answer(f"{side[0]['content']} {index}")]


def test_a_missing_column_of_a_table_is_an_error_at_once(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "chosen": "b"}]), path)
    with pytest.raises(UserError, match="data.parquet: no column 'rejected'; columns: prompt, chosen"):
        imported(path, tmp_path, on_bad_row="drop")


def test_splits_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        lines(tmp_path / f"{split}.jsonl", rows(2))
    with pytest.raises(UserError, match="holds several splits"):
        imported(tmp_path, tmp_path / "out")
    assert imported(tmp_path, tmp_path / "out", split="test")[1]["pairs"] == 2


def test_an_interrupted_import_ends_in_the_same_bytes(tmp_path, monkeypatch):
    from polyalign.datasets.formats.text_rows import TextRows

    monkeypatch.setattr(TextRows, "rows_per_shard", 4)
    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(3):
        lines(folder / f"{part}.jsonl", [{**row, "prompt": f"{part} {row['prompt']}"} for row in rows(5)])
    store, _ = imported(folder, tmp_path)
    assert [row["condition"]["prompt"] for row in store.rows([4, 5, 14])] == ["0 Q4?", "1 Q0?", "2 Q4?"]
    before = store.content_hash()
    store.shard_path(2).unlink()
    store, _ = imported(folder, tmp_path)
    assert store.content_hash() == before and store.missing(4) == []


def test_options_are_checked():
    with pytest.raises(ValueError, match="options.wole: source 'rows' has no such option; its options: split, prompt, chosen"):
        checked_options("rows", {"wole": True}, TEXT_FORMATS)
    with pytest.raises(ValueError, match="options.whole"):
        checked_options("rows", {"whole": "yes"}, TEXT_FORMATS)
    assert checked_options("jsonl", {"prompt_ends": "A:"}, TEXT_FORMATS) == {"prompt_ends": "A:"}


def test_every_text_format_has_an_importer():
    for name in TEXT_FORMATS:
        assert checked_options(name, {}, TEXT_FORMATS) == {}
    assert set(TEXT_FORMATS) <= set(FORMATS), "the names mean the same for pictures and texts"


def test_a_column_that_holds_nothing_is_not_listed_as_found() -> None:
    with pytest.raises(ValueError, match=r"no column 'chosen'; found 'prompt', 'rejected'; there is nothing in 'chosen'$"):
        pair_of_row({"prompt": "p", "chosen": None, "rejected": "b"})
