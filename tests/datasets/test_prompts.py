"""Prompts files: what is read, and that everything wrong is said at once."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyalign.core.errors import UserError
from polyalign.datasets.prompts import load_prompts


def test_text_is_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red circle\r\n\r\n  two blue squares  \n".encode())
    assert load_prompts(path) == [{"prompt": "a red circle"}, {"prompt": "two blue squares"}]
    assert load_prompts(path, limit=1) == [{"prompt": "a red circle"}]


def test_json_lines_keep_what_stands_beside_the_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    entries = [
        {"task": "count", "caption": "two cats", "objects": [{"shape": "cat"}]},
        "a dog",
        {"prompt": "x\u2028y", "text": "t"},
    ]
    path.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries), encoding="utf-8")
    assert load_prompts(path) == [
        {"prompt": "two cats", "task": "count", "objects": [{"shape": "cat"}]},
        {"prompt": "a dog"},
        {"prompt": "x\u2028y", "text": "t"},
    ]


def test_parquet_leaves_pictures_out(tmp_path):
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"text": ["a cat", "a dog"], "jpg_0": [b"1", b"2"], "tags": [["x"], None]}), path)
    assert load_prompts(path) == [{"prompt": "a cat", "tags": ["x"]}, {"prompt": "a dog"}]


def test_all_broken_entries_are_listed_with_their_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": }\n{"task": "x"}\n\n{"prompt": 3}\n{"prompt": "  "}\n[1]\n')
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert "5 broken entries" in message and str(path) in message
    for part in (
        "line 2: not JSON",
        "line 3: no 'prompt'",
        "line 5: 'prompt' must be text, found int",
        "line 6: 'prompt' is empty",
    ):
        assert part in message
    assert "line 7: expected an object" in message


def test_long_lists_of_problems_are_cut_at_twenty(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("{}\n" * 30)
    with pytest.raises(UserError, match="and 10 more"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("prompts.csv", b"a", "ends in .txt, .jsonl, .parquet"),
        ("prompts.txt", b"\n \n", "no prompts"),
        ("prompts.txt", b"caf\xe9", "not UTF-8"),
        ("prompts.parquet", b"PAR1 no", "not a readable parquet"),
    ],
)
def test_unusable_files(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_prompts(path)


def test_no_such_file_and_no_such_column(tmp_path):
    with pytest.raises(UserError, match="no such prompts file"):
        load_prompts(tmp_path / "none.txt")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no text column 'prompt'.*columns: a"):
        load_prompts(tmp_path / "p.parquet")


PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    'bond\tAbstract\tBasic\tBiology-inspired concepts\na sign that says "x\tArts\tWriting & Symbols\n\nmath\tAbstract\n'
)


@pytest.mark.parametrize("name", ["PartiPrompts.tsv", "parti.txt"])
def test_partiprompts_with_category_and_challenge(tmp_path, name):
    (tmp_path / name).write_text(PARTI, encoding="utf-8")
    assert load_prompts(tmp_path / name) == [
        {"prompt": "bond", "category": "Abstract", "challenge": "Basic", "note": "Biology-inspired concepts"},
        {"prompt": 'a sign that says "x', "category": "Arts", "challenge": "Writing & Symbols"},
        {"prompt": "math", "category": "Abstract"},
    ]
    assert [one["prompt"] for one in load_prompts(tmp_path / name, limit=1)] == ["bond"]


def test_hpsv2_by_file_by_folder_and_in_one_object(tmp_path):
    styles = {"anime": ["a girl", "a robot"], "photo": ["a dog"]}
    for style, prompts in styles.items():
        (tmp_path / f"{style}.json").write_text(json.dumps(prompts))
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "styles.json").write_text(json.dumps(styles))
    anime = [{"prompt": "a girl", "category": "anime"}, {"prompt": "a robot", "category": "anime"}]
    dog = {"prompt": "a dog", "category": "photo"}
    assert load_prompts(tmp_path / "anime.json") == anime
    assert load_prompts(tmp_path) == load_prompts(tmp_path / "all" / "styles.json") == [anime[0], dog, anime[1]]
    assert load_prompts(tmp_path, limit=2) == [anime[0], dog]
    (tmp_path / "rows.json").write_text(json.dumps([{"Prompt": "x"}, {"prompt": "y", "category": "z"}, 3]))
    with pytest.raises(UserError, match="2 broken entries"):
        load_prompts(tmp_path / "rows.json")


def test_a_text_with_tabs_is_no_table(tmp_path):
    (tmp_path / "tabs.txt").write_text("a cat\ton a mat\nthe text\n")
    assert load_prompts(tmp_path / "tabs.txt") == [{"prompt": "a cat\ton a mat"}, {"prompt": "the text"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "a cat\n", "names of its columns, one of them Prompt"),
        ("a.tsv", "Prompt\tCategory\nx\ty\tz\n", "3 cells in a table of 2 columns"),
        ("a.json", "{", "cannot be read as JSON"),
        ("a.json", '{"anime": "x"}', "an object with such a list"),
        ("a.json", "[]", "no prompts"),
    ],
)
def test_benchmark_files_that_cannot_be_used(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        load_prompts(tmp_path / name)


def test_a_folder_without_styles(tmp_path):
    with pytest.raises(UserError, match="a .json file for each style"):
        load_prompts(tmp_path)
