"""Latents, text states and reference scores that several runs share."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_runs import LORA, digest, only_generated, polyalign, recipe, write_recipe  # noqa: E402

from polyalign.modalities.content_cache import size_of  # noqa: E402


def with_cache(base: Path, folder: Path | None, **objective: Any) -> dict[str, Any]:
    content = recipe(base)
    content["prepare"] = {} if folder is None else {"cache_folder": str(folder)}
    content["train"]["reference"] = {"seat": "cached", "draws_per_pair": 2}
    content["objective"] |= objective
    return content


def test_a_second_run_finds_what_the_first_made_and_trains_the_same(base, tmp_path, capsys):
    shared = tmp_path / "shared"
    alone, first, second = (tmp_path / name for name in ("alone", "first", "second"))
    own = write_recipe(tmp_path / "own", with_cache(base, None))
    config = write_recipe(tmp_path / "recipe", with_cache(base, shared))
    assert polyalign("generate", own, alone) == 0
    for run in (first, second):
        only_generated(alone, run)
    assert polyalign("train", own, alone) == 0 and (alone / "cache" / "reference").is_dir()

    assert polyalign("train", config, first) == 0
    said = capsys.readouterr().err
    files = sorted(path.relative_to(shared) for path in shared.rglob("*") if path.is_file())
    assert files and any(path.parts[0] == "reference" for path in files) and not (first / "cache").exists()
    count, total = size_of(shared)
    assert count == len(files) and f"{total / 1e6:,.1f} MB in {count:,} files in {shared}" in said

    times = {path: (shared / path).stat().st_mtime_ns for path in files}
    assert polyalign("train", config, second) == 0
    assert {path: (shared / path).stat().st_mtime_ns for path in files} == times
    assert sorted(path.relative_to(shared) for path in shared.rglob("*") if path.is_file()) == files  # nothing was made anew
    assert digest(first / LORA) == digest(second / LORA) == digest(alone / LORA)


def test_another_place_makes_no_training_stale_and_a_deleted_cache_is_made_again(base, tmp_path, capsys):
    shared, run = tmp_path / "shared", tmp_path / "run"
    own = write_recipe(tmp_path / "own", with_cache(base, None))
    config = write_recipe(tmp_path / "recipe", with_cache(base, shared))
    assert polyalign("generate", own, run) == 0 and polyalign("train", own, run) == 0
    before = digest(run / LORA)
    capsys.readouterr()
    assert polyalign("train", config, run) == 0
    assert "train: begins" not in capsys.readouterr().err and digest(run / LORA) == before
    harder = write_recipe(tmp_path / "harder", with_cache(base, shared, beta={"value": 50}))
    assert polyalign("train", harder, run) == 0
    assert size_of(shared)[0] > 0 and digest(run / LORA) != before
    shutil.rmtree(shared)
    again = write_recipe(tmp_path / "again", with_cache(base, shared))
    assert polyalign("train", again, run) == 0
    assert digest(run / LORA) == before and size_of(shared)[0] > 0
