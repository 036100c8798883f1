"""Checkpoints are whole or absent."""

from __future__ import annotations

import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from polyalign.core import checkpoint
from polyalign.core.errors import UserError
from polyalign.core.files import set_aside


def save(root: Path, step: int, *, keep: int = 2, elements: int = 6, **algorithm: Any) -> Path:
    parameter = torch.nn.Parameter(torch.arange(float(elements)))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(elements)
    optimizer.step()
    return checkpoint.save(
        root,
        step,
        weights={"policy": {"weight": torch.arange(float(elements)) + step}},
        optimizers={"policy": optimizer.state_dict()},
        algorithm=algorithm,
        identity={"train": {"steps": 3}},
        keep=keep,
    )


def change_state(folder: Path, **changes: Any) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | changes))


def test_everything_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save(tmp_path, step, beta={"value": 0.1, "mean": None}, seats={"reference": {"a.b": torch.ones(2), "n": 3}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000030"]
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest.step == 30
    assert torch.equal(latest.weights("policy")["weight"], torch.arange(6.0) + 30)
    assert torch.equal(latest.optimizer("policy")["state"][0]["exp_avg"], torch.full((6,), 0.1))
    back = latest.algorithm()
    assert back["beta"] == {"value": 0.1, "mean": None} and back["seats"]["reference"]["n"] == 3
    assert torch.equal(back["seats"]["reference"]["a.b"], torch.ones(2))


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = save(tmp_path / "one", 1, x=torch.ones(3)), save(tmp_path / "other", 1, x=torch.ones(3))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize("damage", ["no state", "torn state", "missing", "short", "unfinished"])
def test_incomplete_ones_are_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    if damage == "no state":
        (folder / "state.json").unlink()
    elif damage == "torn state":
        (folder / "state.json").write_text((folder / "state.json").read_text()[:20])
    elif damage == "missing":
        (folder / "policy.safetensors").unlink()
    elif damage == "short":
        (folder / "policy.optimizer.pt").write_bytes((folder / "policy.optimizer.pt").read_bytes()[:-1])
    else:
        folder.rename(folder.with_name(folder.name + checkpoint.PARTIAL))
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest.step == 1
    said = {
        "no state": "state.json is missing",
        "torn state": "state.json is damaged",
        "missing": "policy.safetensors is missing",
        "short": "policy.optimizer.pt has changed",
    }
    assert checkpoint.damaged(tmp_path) == ({folder: said[damage]} if damage in said else {})


@pytest.mark.parametrize(
    ("content", "hashed"), [("zeros", True), ("zeros", False), ("noise", False), ("one bit", True)], ids=str
)
@pytest.mark.parametrize("name", ["policy.safetensors", "policy.optimizer.pt", "algorithm.safetensors"])
def test_damage_that_keeps_the_size_is_named(tmp_path: Path, name: str, content: str, hashed: bool) -> None:
    folder = save(tmp_path, 1, mean=torch.ones(3))
    whole = (folder / name).read_bytes()
    if content == "one bit":
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        filling = bytes([0]) if content == "zeros" else hashlib.sha256(b"noise").digest()
        (folder / name).write_bytes((filling * len(whole))[: len(whole)])
    if not hashed:
        change_state(folder, sha256={})
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    read = {
        "policy.safetensors": lambda: latest.weights("policy"),
        "policy.optimizer.pt": lambda: latest.optimizer("policy"),
        "algorithm.safetensors": latest.algorithm,
    }
    with pytest.raises(UserError, match=f"{name}: (is damaged|cannot be read).* Move .*step-000001 away"):
        read[name]()


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="Out of range float"):
        save(tmp_path, 2, bad=float("nan"))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_full_disk_is_explained_and_loses_nothing(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the same errors on the same calls, for each kind of file."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, elements in ((200_000, 100_000), (500_000, 100_000)):  # the weights do not fit; the optimiser's state does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match="limit is reached.*checkpoint.*step-000002.*was finished before is kept.*Free"):
                save(tmp_path, 2, elements=elements)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and len(latest.weights("policy")["weight"]) == 6


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"state": Evil()}, folder / "policy.optimizer.pt")
    change_state(folder, sha256={}, files={"policy.optimizer.pt": (folder / "policy.optimizer.pt").stat().st_size})
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    with pytest.raises(UserError, match="policy.optimizer.pt: cannot be read .*Move .*step-000001 away"):
        latest.optimizer("policy")
    assert not (tmp_path / "ran").exists()


def test_other_settings_are_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    latest = checkpoint.latest(tmp_path)
    assert latest is not None
    checkpoint.refuse_other_settings(latest, {"train": {"steps": 3}})
    with pytest.raises(UserError, match=r"train\.clip: None -> 1\.0\n  train\.steps: 3 -> 4"):
        checkpoint.refuse_other_settings(latest, {"train": {"steps": 4, "clip": 1.0}})


def test_set_aside_keeps_everything(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path / "checkpoints", 1)
        moved = set_aside(tmp_path, ["checkpoints", "metrics.jsonl"])
    assert moved == ["checkpoints.stale-2"] and set_aside(tmp_path, ["checkpoints"]) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints.stale-1", "checkpoints.stale-2"]


def test_what_a_kill_left_of_a_removed_checkpoint_is_no_checkpoint_and_goes_with_the_next(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    left = tmp_path / ".step-000001.removed"
    left.mkdir()
    (left / "policy.optimizer.pt").write_bytes(b"half")
    assert [found.step for found in checkpoint.complete(tmp_path)] == [2, 3] and checkpoint.damaged(tmp_path) == {}
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]
