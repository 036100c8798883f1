"""The verbs, on a modality in small that is a real one (``sums_modality.py``)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polyalign import __version__
from polyalign.core import verbs
from polyalign.core.cli import VERBS, main
from polyalign.core.errors import UserError

MODALITIES = ", ".join([*verbs.MODALITIES, "sums"])


@pytest.fixture(autouse=True)
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a recipe for the modality ``sums``."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(verbs.MODALITIES, "sums", "sums_modality")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.yaml").write_text("modality: sums\nrun: runs/sums-{seed}\n")
    return tmp_path


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_help_and_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS) and len(out.splitlines()) < 20
    assert list(VERBS) == ["align", "generate", "train", "evaluate", "report", "diagnose", "explain", "export", "doctor"]
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"polyalign {__version__}\n"
    assert main([]) == 2


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_says_what_it_reads_and_writes(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "Reads" in out and f"example: polyalign {verb}" in out
    assert "Writes" in out or "Prints" in out


def test_help_imports_no_torch():
    script = (
        "import sys, polyalign.core.cli as cli\ncode = cli.main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules, 'torch'\nsys.exit(code)"
    )
    for arguments in (["--help"], ["--version"], ["trian"], ["align", "no/such/recipe"]):
        ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert ended.returncode == (0 if arguments[0].startswith("--") else 2), ended.stderr
        assert "Traceback" not in ended.stderr


def test_align_does_everything_once(sums: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["align", "sums.yaml", "seed=3"]) == 0
    folder = sums / "runs" / "sums-3"
    assert {"config.yaml", "stages.json", "evaluation.json", "report.html"} <= {path.name for path in folder.iterdir()}
    assert "train: begins" in capsys.readouterr().err
    before = everything_below(folder)
    assert main(["align", "sums.yaml", "seed=3"]) == 0
    assert everything_below(folder) == before
    assert "train: done already, kept" in capsys.readouterr().err


def test_the_resolved_config_reproduces_the_run(sums: Path):
    main(["align", "sums.yaml", "seed=3", "train.steps=7"])
    assert main(["align", "runs/sums-3/config.yaml", "--run", "again"]) == 0
    first, second = everything_below(sums / "runs" / "sums-3"), everything_below(sums / "again")
    assert first["adapter/sum.txt"] == second["adapter/sum.txt"] and first["report.html"] == second["report.html"]


def test_dry_run_shows_and_does_nothing(sums: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["align", "--dry-run", "sums.yaml", "train.steps=9"]) == 0
    out = capsys.readouterr().out
    assert "steps: 9" in out and "run: runs/sums-0" in out and "# run folder: runs/sums-0 (new)" in out
    assert [line.split()[1:3] for line in out.splitlines() if line.endswith("todo")] == [
        [name, "todo"] for name in ("generate", "train", "evaluate")
    ]
    assert not (sums / "runs").exists()
    main(["align", "sums.yaml"])
    before = everything_below(sums)
    capsys.readouterr()
    assert main(["align", "sums.yaml", "--dry-run", "train.steps=9"]) == 0
    out = capsys.readouterr().out
    assert "# generate    done" in out and "train.steps 2 -> 9" in out and "train runs again" in out
    assert everything_below(sums) == before


def test_verbs_one_by_one(sums: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "sums.yaml", "--run", "r"]) == 2
    assert "train needs the products of generate" in capsys.readouterr().err
    for verb in ("generate", "train", "evaluate", "report"):
        assert main([verb, "sums.yaml", "--run", "r"]) == 0
    assert main(["report", "r"]) == 0 and main(["evaluate", "r"]) == 0
    assert main(["export", "r", "--to", "out"]) == 0
    assert (sums / "out" / "sum.txt").read_text() == (sums / "r" / "adapter" / "sum.txt").read_text()


def test_a_run_folder_that_was_moved_is_used_where_it_is(sums: Path):
    main(["align", "sums.yaml"])
    (sums / "runs" / "sums-0").rename(sums / "moved")
    (sums / "moved" / "report.html").unlink()
    assert main(["report", "moved"]) == 0
    assert (sums / "moved" / "report.html").exists() and not (sums / "runs" / "sums-0").exists()


def test_report_leaves_what_the_folder_says_of_the_run(sums: Path, capsys: pytest.CaptureFixture[str]):
    main(["align", "sums.yaml"])
    folder = sums / "runs" / "sums-0"
    before = {name: content for name, content in everything_below(folder).items() if name != "report.html"}
    assert {"config.yaml", "environment.json"} <= before.keys()
    assert main(["report", "sums.yaml", "train.steps=9"]) == 0 and main(["report", "runs/sums-0"]) == 0
    after = everything_below(folder)
    assert {name: after[name] for name in after if name != "report.html"} == before
    (sums / "empty").mkdir()
    for name in ("empty", "new"):
        assert main(["report", "sums.yaml", "--run", name]) == 2
        assert f"run folder {name}: holds no run, so there is nothing to report" in capsys.readouterr().err
    assert list((sums / "empty").iterdir()) == [] and not (sums / "new").exists()


def test_what_is_refused_before_any_work_leaves_the_recipe_of_the_run(sums: Path, capsys: pytest.CaptureFixture[str]):
    main(["align", "sums.yaml"])
    folder = sums / "runs" / "sums-0"
    before = everything_below(folder)
    assert main(["align", "sums.yaml", "generate.count=0"]) == 2 and "nothing to add" in capsys.readouterr().err
    assert main(["generate", "sums.yaml", "generate.count=0"]) == 2
    assert everything_below(folder) == before
    assert main(["align", "sums.yaml", "interrupt=true", "train.steps=9"]) == 130
    assert {"interrupt: true", "steps: 9"} <= {line.strip() for line in (folder / "config.yaml").read_text().splitlines()}
    assert main(["align", "sums.yaml", "train.steps=9"]) == 0, "a switch that changes no stage is written at the end"
    assert "interrupt: false" in (folder / "config.yaml").read_text()


def test_a_new_folder_that_was_refused_early_is_a_run_all_the_same(sums: Path):
    assert main(["align", "sums.yaml", "generate.count=0", "--run", "new"]) == 2
    assert main(["align", "sums.yaml", "--run", "new"]) == 0
    assert "count: 4" in (sums / "new" / "config.yaml").read_text()


def test_the_report_is_of_the_recipe_that_was_given(sums: Path, monkeypatch: pytest.MonkeyPatch):
    import sums_modality

    seen = []
    monkeypatch.setattr(sums_modality, "report", lambda recipe, run: seen.append((run / "config.yaml").read_text()))
    main(["align", "sums.yaml"])
    main(["align", "sums.yaml", "interrupt=true"])
    assert ["interrupt: true" in text for text in seen] == [False, True]


def test_a_verb_does_not_build_on_stale_products(sums: Path, capsys: pytest.CaptureFixture[str]):
    main(["align", "sums.yaml"])
    before = everything_below(sums / "runs")
    assert main(["train", "sums.yaml", "generate.count=9"]) == 2
    assert "train builds on generate, but the products of generate" in (err := capsys.readouterr().err)
    assert "generate.count 4 -> 9" in err and "polyalign align" in err
    assert main(["evaluate", "sums.yaml", "train.steps=9"]) == 2
    assert everything_below(sums / "runs") == before
    assert main(["align", "sums.yaml", "generate.count=9"]) == 0
    assert (sums / "runs" / "sums-0" / "pairs.stale-1" / "numbers.txt").is_file()


def test_an_interrupt_is_quiet_and_says_how_to_go_on(sums: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["align", "sums.yaml", "interrupt=true"]) == 130
    err = capsys.readouterr().err
    assert "Run the same command again to continue:\n  polyalign align sums.yaml interrupt=true" in err
    assert "Traceback" not in err
    assert main(["align", "sums.yaml"]) == 0
    assert "train: continues (was interrupted)" in capsys.readouterr().err


WRONG = {
    "unknown verb": (["trian", "sums.yaml"], "unknown verb 'trian'. Did you mean train? Verbs: align,"),
    "unknown recipe": (["align", "nowhere"], "no file and no packaged recipe is called 'nowhere'"),
    "unknown key": (
        ["align", "sums.yaml", "trian.steps=3"],
        "trian: unknown key (found {'steps': 3}), did you mean train; set on",
    ),
    "wrong modality": (["align", "sums.yaml", "modality=sumz"], f"modality: must be one of {MODALITIES}"),
    "no modality": (["align", "empty.yaml"], f"empty.yaml: modality: missing; say which of {MODALITIES}"),
    "not a run": (["report", "folder"], "folder: is a folder without config.yaml, so not a run"),
    "occupied folder": (["align", "sums.yaml", "--run", "folder"], "is not empty and not the folder of a run"),
    "not exported yet": (["export", "sums.yaml"], "does not exist, so there is nothing to export"),
    "unknown topic": (["explain", "train.batch"], "nothing is called 'train.batch'. Did you mean train.batch_size"),
    "unknown modality": (["explain", "seed", "--modality", "smell"], f"no modality 'smell'; there are: {MODALITIES}"),
}


@pytest.mark.parametrize("arguments, part", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_explained_without_a_traceback(
    sums: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
):
    (sums / "empty.yaml").write_text("seed: 1\n")
    (sums / "folder").mkdir()
    (sums / "folder" / "precious.txt").write_text("mine")
    before = everything_below(sums)
    if "explain" in arguments and "--modality" not in arguments:
        arguments = [*arguments, "--modality", "sums"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert part in err and "Traceback" not in err
    assert everything_below(sums) == before


@pytest.mark.parametrize("arguments", [["train", "sums.yaml", "--seed", "3"], ["train"], ["explain", "a", "b"]])
def test_wrong_options_end_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "--help" in err
    assert ("key=value" in err) == ("--seed" in arguments)


def test_a_modality_that_works_outside_of_its_stages_is_our_fault(monkeypatch: pytest.MonkeyPatch):
    import sums_modality

    monkeypatch.setattr(sums_modality, "evaluate", lambda recipe, run: None)
    with pytest.raises(RuntimeError, match="outside of run.stage"):
        main(["align", "sums.yaml", "--dry-run"])


def test_modalities_come_from_other_packages_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[polyalign.modalities]\nscents = sums_modality\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "scents" in verbs.modality_names()
    assert verbs.modality_module("scents").__name__ == "sums_modality"
    with pytest.raises(UserError, match=f"no modality 'smell'; there are: {MODALITIES}, scents"):
        verbs.modality_module("smell")


def test_explain_keys(capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "train.batch_size", "--modality", "sums"]) == 0
    out = capsys.readouterr().out
    assert "train.batch_size: whole number, at least 1; default 8" in out
    assert "Pairs in one optimiser step, over all processes together." in out
    assert main(["explain", "train.optimizer", "--modality", "sums"]) == 0
    assert "learning_rate" in capsys.readouterr().out
    assert main(["explain", "--modality", "sums"]) == 0
    assert "generate" in capsys.readouterr().out
    assert main(["explain", "schema", "--modality", "sums"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "SumsRecipe"
    assert main(["explain", "configs"]) == 0
    assert "image/quickstart" in capsys.readouterr().out


def test_a_key_is_explained_for_every_modality_that_has_it(capsys: pytest.CaptureFixture[str]):
    """One text where they say the same, one each where they do not; a modality that is asked for stands alone."""
    assert main(["explain", "train.batch_size"]) == 0
    assert "in recipes of modality image, text" in capsys.readouterr().out
    assert main(["explain", "run"]) == 0
    both = capsys.readouterr().out
    assert both.count("in recipes of modality") >= 2 and "runs/image" in both
    assert main(["explain", "sampler.guidance"]) == 0
    assert "in recipes of modality image\n" in capsys.readouterr().out
    assert main(["explain", "run", "--modality", "text"]) == 0
    assert "in recipes of" not in capsys.readouterr().out


def test_an_objective_is_explained_with_the_defaults_of_the_modality(capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "dpo", "--modality", "text"]) == 0
    of_text = capsys.readouterr().out
    assert "objective.beta.value: number, greater than 0; default 0.1" in of_text and "convention: nats" in of_text
    assert main(["explain", "dpo"]) == 0
    of_all = capsys.readouterr().out
    assert "objective.beta.value: number, greater than 0; default 5000" in of_all
    assert "in recipes of modality text, where none is given: beta 0.1, convention nats" in of_all
    assert main(["explain", "ipo", "--modality", "text"]) == 0


def test_explain_objectives(capsys: pytest.CaptureFixture[str]):
    from polyalign.core.objectives.table import TABLE

    assert main(["explain", "objective"]) == 0
    table = capsys.readouterr().out
    for name, row in TABLE.items():
        assert f"  {name} " in table
        assert main(["explain", name]) == 0
        card = capsys.readouterr().out
        for part in (row.summary, f"name: {name}", "objective.beta.value: number, greater than 0", "source"):
            assert part in card
        flat = " ".join(card.split())
        assert " ".join(row.formula.split()) in flat and " ".join(row.differences.split()) in flat
