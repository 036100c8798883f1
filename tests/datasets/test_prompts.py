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
