"""The run folder: what is skipped, what is made anew, and that nothing is lost on the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, disk_full_explained, locked, sha256_of
from polyalign.core.memory import peak_memory, reset_peak_memory
from polyalign.core.recipe import TrainSettings
from polyalign.core.run import RunFolder


class Run:
    """A run folder with two stages, and what it said."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.said: list[str] = []
        self.done: list[str] = []

    def go(self, *, count: int = 3, steps: int = 5, fail: bool = False, planning: bool = False) -> RunFolder:
        self.said.clear()
        self.done.clear()
        run = RunFolder(self.folder, tell=self.said.append, planning=planning)
        with run.stage("generate", {"count": count}, products=("pairs",)) as stage:
            if stage.todo:
                self.done.append("generate")
                (run / "pairs").mkdir(exist_ok=True)
                (run / "pairs" / "numbers").write_text("1" * min(count, 9))
        inputs = {"train": TrainSettings(steps=steps)}
        with run.stage("train", inputs, after=("generate",), products=("adapter",), scratch=("log",)) as stage:
            if stage.todo:
                self.done.append("train")
                with open(run / "log", "a") as log:
                    log.write("x")
                if fail:
                    raise KeyError("interrupted")
                (run / "adapter").write_text(str(steps) + (run / "pairs" / "numbers").read_text())
        return run


def test_finished_stages_are_kept(tmp_path: Path):
    run = Run(tmp_path / "run")
    record = run.go().records()
    assert run.done == ["generate", "train"]
    assert record["train"]["finished"] is True and record["train"]["seconds"] >= 0.0
    assert record["train"]["peak_memory_bytes"] > 1_000_000 and len(record["train"]["inputs_hash"]) == 64
    assert record["generate"]["products"] == {"pairs/numbers": {"bytes": 3, "sha256": sha256_of(b"111")}}
    run.go()
    assert run.done == []
    assert run.said == ["generate: done already, kept", "train: done already, kept"]


def test_the_environment_is_that_of_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["polyalign", "train"])
    folder = run.go()
    folder.write_environment({"base": "abc"})
    written = (tmp_path / "environment.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["polyalign", "report"])
    run.go()
    assert (tmp_path / "environment.json").read_bytes() == written, "a run that does nothing changes nothing"
    monkeypatch.setattr(sys, "argv", ["polyalign", "align"])
    records = run.go(steps=6).records()
    assert [records[name]["environment"]["argv"][1] for name in ("generate", "train")] == ["train", "align"]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["argv"] == ["polyalign", "align"] and environment["hashes"] == {"base": "abc"}
    (tmp_path / "environment.json").write_text("{")
    folder.write_environment()
    assert "hashes" not in json.loads((tmp_path / "environment.json").read_text())


def test_a_changed_setting_makes_a_stage_anew_and_keeps_the_old(tmp_path: Path):
    run = Run(tmp_path)
    run.go(steps=5)
    run.go(steps=6)
    assert run.done == ["train"]
    assert run.said[1] == (
        "train: begins anew, since train.steps 5 -> 6; the old products are kept as adapter.stale-1, log.stale-1"
    )
    assert (tmp_path / "adapter").read_text() == "6111" and (tmp_path / "adapter.stale-1").read_text() == "5111"
    assert (tmp_path / "log").read_text() == "x"
    run.go(steps=5)
    assert (tmp_path / "adapter.stale-2").read_text() == "6111" and (tmp_path / "adapter").read_text() == "5111"


def test_other_products_upstream_make_a_stage_stale_but_equal_ones_do_not(tmp_path: Path):
    run = Run(tmp_path)
    run.go(count=3)
    run.go(count=4)
    assert run.done == ["generate", "train"] and "generate has other products" in run.said[1]
    run.go(count=9)
    run.go(count=12)  # generates the same bytes as 9
    assert run.done == ["generate"] and run.said[1] == "train: done already, kept"


def test_an_interrupted_stage_continues_with_what_it_left(tmp_path: Path):
    run = Run(tmp_path)
    with pytest.raises(KeyError):
        run.go(fail=True)
    assert RunFolder(tmp_path).records()["train"]["finished"] is False
    run.go()
    assert run.said == ["generate: done already, kept", "train: continues (was interrupted)"]
    assert (tmp_path / "log").read_text() == "xx"


def test_interrupted_work_of_other_settings_is_not_continued(tmp_path: Path):
    run = Run(tmp_path)
    with pytest.raises(KeyError):
        run.go(fail=True, steps=5)
    run.go(steps=6)
    assert (tmp_path / "log").read_text() == "x" and (tmp_path / "log.stale-1").read_text() == "x"


def test_missing_and_damaged_products_are_made_again(tmp_path: Path):
    run = Run(tmp_path)
    run.go()
    (tmp_path / "adapter").unlink()
    run.go()
    assert run.done == ["train"] and run.said[1] == "train: continues (adapter is missing)"
    (tmp_path / "pairs" / "numbers").write_text("cut")
    (tmp_path / "pairs" / "numbers").write_text("c")
    run.go()
    assert run.done == ["generate"] and "pairs/numbers has changed" in run.said[0]
    assert (tmp_path / "pairs" / "numbers.stale-1").read_text() == "c"


def test_products_without_a_record_are_not_taken_for_ours(tmp_path: Path):
    (tmp_path / "adapter").write_text("foreign")
    run = Run(tmp_path)
    run.go()
    assert "adapter was there before, without a record" in run.said[1]
    assert (tmp_path / "adapter.stale-1").read_text() == "foreign"


def test_a_stage_needs_what_it_comes_after(tmp_path: Path):
    with pytest.raises(UserError, match="train needs the products of generate, which has not finished"):
        with RunFolder(tmp_path).stage("train", {}, after=("generate",)):
            pass


def test_a_stage_that_writes_nothing_is_our_fault(tmp_path: Path):
    with pytest.raises(RuntimeError, match="ended without writing"):
        with RunFolder(tmp_path).stage("train", {}, products=("adapter",)):
            pass
    assert RunFolder(tmp_path).records()["train"]["finished"] is False


def test_planning_writes_nothing_and_says_how_things_stand(tmp_path: Path):
    run = Run(tmp_path / "run")
    planned = run.go(planning=True).planned
    assert {name: stage.status for name, stage in planned.items()} == {"generate": "todo", "train": "todo"}
    assert run.done == [] and not (tmp_path / "run").exists()
    run.go()
    assert [stage.status for stage in run.go(planning=True).planned.values()] == ["done", "done"]
    planned = run.go(planning=True, count=4).planned
    assert [stage.status for stage in planned.values()] == ["stale", "stale"]
    assert planned["generate"].reasons == ("count 3 -> 4",) and planned["train"].reasons == ("generate runs again",)
    assert run.done == []


def test_other_ranks_decide_alike_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Run(tmp_path).go()
    before = (tmp_path / "stages.json").read_bytes()
    monkeypatch.setenv("RANK", "1")
    run = RunFolder(tmp_path)
    with run.lock(), run.stage("train", {"steps": 7}, products=("adapter",)) as stage:
        assert stage.todo
    assert (tmp_path / "stages.json").read_bytes() == before and (tmp_path / "adapter").exists()


def test_a_damaged_ledger_is_named(tmp_path: Path):
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(UserError, match="stages.json: is damaged"):
        RunFolder(tmp_path).records()


def test_config_is_written_whole(tmp_path: Path):
    RunFolder(tmp_path).write_config(TrainSettings(steps=3))
    assert (tmp_path / "config.yaml").read_text().startswith("steps: 3\n")
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_recipe_is_written_when_a_stage_begins_work_and_not_for_one_that_is_done(tmp_path: Path):
    def step(steps: int, inputs: int) -> str:
        run = RunFolder(tmp_path, recipe=TrainSettings(steps=steps))
        with run.stage("train", {"steps": inputs}, products=("adapter",)) as stage:
            found = (tmp_path / "config.yaml").read_text().splitlines()[0]
            if stage.todo:
                (run / "adapter").write_text("x")
        return found

    assert step(3, 3) == "steps: 3"
    assert step(4, 3) == "steps: 3"
    assert step(5, 5) == "steps: 5"


def test_a_second_process_is_kept_out_until_the_first_is_dead(tmp_path: Path):
    hold = (
        "import sys, time\nfrom polyalign.core.run import RunFolder\n"
        "with RunFolder(sys.argv[1]).lock():\n    print('held', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is in use by process {process.pid} on "):
            with RunFolder(tmp_path).lock():
                pass
    finally:
        process.kill()
        process.wait()
    with RunFolder(tmp_path).lock():
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_a_killed_stage_continues(tmp_path: Path):
    work = (
        "import sys, time\nfrom polyalign.core.run import RunFolder\nrun = RunFolder(sys.argv[1])\n"
        "with run.stage('train', {'steps': 5}, products=('adapter',), scratch=('log',)) as stage:\n"
        "    (run / 'log').write_text('half')\n    print('working', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", work, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.kill()
    process.wait()
    run = RunFolder(tmp_path)
    with run.stage("train", {"steps": 5}, products=("adapter",), scratch=("log",)) as stage:
        assert stage.status == "started" and (run / "log").read_text() == "half"
        (run / "adapter").write_text("whole")
    assert run.records()["train"]["finished"] is True


def test_a_full_disk_is_the_users_business(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match="the disk is full: .*while writing pairs.*Free some space"):
        with disk_full_explained("pairs"), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")


def test_a_file_limit_leaves_the_old_file_whole(tmp_path: Path):
    script = (
        "import resource, signal, sys\nfrom polyalign.core.run import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "atomic_write(sys.argv[1], b'x' * 5000)"
    )
    target = tmp_path / "config.yaml"
    target.write_text("old")
    if os.name != "posix":
        pytest.skip("file limits are of POSIX systems")
    ended = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True)
    assert "UserError: the file-size limit is reached" in ended.stderr
    assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_other_errors_of_the_system_pass_through():
    with pytest.raises(FileNotFoundError):
        with disk_full_explained("pairs"):
            raise FileNotFoundError(errno.ENOENT, "no such file")


def test_a_stage_on_a_full_disk_is_left_unfinished(tmp_path: Path):
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match="while writing stage train"):
        with run.stage("train", {}):
            raise OSError(errno.ENOSPC, "No space left on device", "checkpoint")
    assert run.records()["train"]["finished"] is False


def test_atomic_write_makes_folders_and_replaces(tmp_path: Path):
    atomic_write(tmp_path / "a" / "b.txt", "é")
    atomic_write(tmp_path / "a" / "b.txt", b"two")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_file_systems_without_locks_are_tolerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / ".lock", what="run"):
        assert (tmp_path / ".lock").is_file()


def test_peak_memory_is_of_the_stage():
    block = bytearray(80_000_000)
    high = peak_memory()["peak_memory_bytes"]
    assert len(block) < high
    del block
    reset_peak_memory()
    assert peak_memory()["peak_memory_bytes"] <= high


def test_seconds_add_up_over_interruptions(tmp_path: Path):
    for fail in (True, False):
        try:
            with RunFolder(tmp_path).stage("train", {}) as stage:
                assert stage.todo
                time.sleep(0.05)
                if fail:
                    raise KeyError
        except KeyError:
            pass
    assert json.loads((tmp_path / "stages.json").read_text())["train"]["seconds"] >= 0.1
