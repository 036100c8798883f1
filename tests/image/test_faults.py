"""Wrong input and accidents, through the command line: a clear message, exit code 2, and nothing finished before is lost.

What single parts refuse is tested beside them: folders (tests/datasets/test_folders.py), recipes (tests/core/test_config.py),
models and pickles (test_adapter_loading.py), pictures (test_adapter_prepare.py), stores and full disks (tests/datasets and
tests/core).
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polyalign.core.checkpoint import latest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from image_runs import LORA, digest, lines, only_generated, polyalign, recipe, write_recipe  # noqa: E402


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and the folder of a finished training."""
    root = tmp_path_factory.mktemp("trained")
    config = write_recipe(root, recipe(base))
    for verb in ("generate", "train"):
        assert polyalign(verb, config, root / "run") == 0
    return config, root / "run"


def content_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*") if path.is_file()}


# --- the user's own pictures ----------------------------------------------------------------------------------------------


@pytest.fixture
def mine(base: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A recipe on eight pairs of JPEGs, their folder, and a run folder in which they have been imported."""
    folder = tmp_path / "mine"
    for side, red in (("chosen", 250), ("rejected", 100)):
        (folder / side).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(red + number).integers(0, red, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / side / f"{number}.jpg")
            (folder / "chosen" / f"{number}.txt").write_text(f"a red square number {number}")
    content = recipe(base, pairs={"source": "folders", "folder": str(folder)})
    content["evaluate"] = {"held_out": 0.3, "judges": [{"name": "saturation"}]}
    config = write_recipe(tmp_path, content)
    assert polyalign("generate", config, tmp_path / "run") == 0
    return config, folder, tmp_path / "run"


def truncate(folder: Path) -> None:
    file = folder / "chosen" / "3.jpg"
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 3])


def forget_a_caption(folder: Path) -> None:
    (folder / "chosen" / "5.txt").unlink()


def rename(folder: Path) -> None:
    (folder / "rejected" / "6.jpg").rename(folder / "rejected" / "six.jpg")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncate, ["chosen/3.jpg", "truncated"]),
        (forget_a_caption, ["5: no caption; expected chosen/5.txt"]),
        (rename, ["chosen/6.jpg has no rejected/6.*", "rejected/six.jpg has no chosen/six.*"]),
    ],
)
def test_spoilt_folders_are_refused_and_the_earlier_import_is_kept(
    spoil: Any, said: list[str], mine: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder, run = mine
    before = content_of(run / "pairs")
    spoil(folder)
    assert polyalign("generate", config, run) == 2
    message = capsys.readouterr().err
    assert [part for part in [*said, "nothing was imported"] if part not in message] == []
    assert content_of(run / "pairs.stale-1") == before


# --- recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.micro_batchsize=2", ["train.micro_batchsize: unknown key", "did you mean train.micro_batch_size"]),
        ("modle.base=tiny", ["modle", "did you mean model"]),
        ("train.steps=many", ["train.steps: must be a whole number"]),
        ("train.optimizer.learning_rate=-1", ["train.optimizer.learning_rate: must be greater than 0"]),
        ("model.train=lorra", ["model.train: must be one of lora, full", "did you mean lora"]),
        ("objective.name=dop", ["objective.name: must be one of", "did you mean dpo"]),
        ("pairs.judges=[{name: shape}]", ["there is no judge 'shape'; did you mean 'shapes'?"]),
        ("evaluate.judges=[{name: saturated}]", ["there is no judge 'saturated'; did you mean 'saturation'?"]),
        ("evaluate.prompts={file: missing.txt}", ["missing.txt: no such file"]),
        ("model.train=full", ["adapter_off needs a LoRA, and model.train is full"]),
        ("train.reference.seat=adapter", ["compares with a second LoRA", "Set it to adapter_off"]),
        ("objective.name=modpo", ["objective: modpo needs margins", "an image recipe makes pairs without"]),
        ("arms={other: {name: modpo}}", ["arms.other: modpo needs margins"]),
        ("arms={../sft: {name: sft}}", ["arms", "'../sft' is no folder's: take a-z, 0-9, - and _"]),
        ("arms={SFT: {name: sft}}", ["'SFT' is no folder's"]),
    ],
)
def test_wrong_recipes_are_refused_before_anything_is_made(
    override: str, said: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_recipe(tmp_path, recipe(base))
    assert polyalign("align", config, tmp_path / "run", override) == 2
    message = capsys.readouterr().err
    assert [part for part in said if part not in message] == [], message
    assert not (tmp_path / "run" / "pairs").exists()


# --- models and checkpoints -----------------------------------------------------------------------------------------------


class Attack:
    """Unpickled, it creates a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def test_a_truncated_base_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert polyalign("align", write_recipe(tmp_path, recipe(broken)), tmp_path / "run") == 2
    assert "broken cannot be read" in capsys.readouterr().err


def test_a_base_that_would_run_code_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(base, tmp_path / "attack")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps({"weights": Attack(tmp_path / "executed")}, protocol=2)
    )
    assert polyalign("align", write_recipe(tmp_path, recipe(folder)), tmp_path / "run") == 2
    assert "diffusion_pytorch_model.bin is refused" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def interrupted(trained: tuple[Path, Path], run: Path) -> Path:
    """A training that was stopped after its last checkpoint, before its end was recorded."""
    shutil.copytree(trained[1], run)
    shutil.rmtree(run / "adapter")
    ledger = json.loads((run / "stages.json").read_text())
    ledger["train"]["finished"] = False
    (run / "stages.json").write_text(json.dumps(ledger))
    return run


@pytest.mark.parametrize("name", ["policy.safetensors", "policy.optimizer.pt", "state.json"])
def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(
    name: str, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    run = interrupted(trained, tmp_path / "run")
    file = run / "checkpoints" / "step-000003" / name
    file.write_bytes(file.read_bytes()[:-100])
    assert polyalign("train", trained[0], run) == 0
    assert digest(run / LORA) == digest(trained[1] / LORA)
    assert lines(run) == lines(trained[1])


def test_smaller_micro_batches_after_running_out_of_memory_go_on(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = interrupted(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000003")
    capsys.readouterr()
    assert polyalign("train", trained[0], run, "train.micro_batch_size=1", "train.gradient_checkpointing=true") == 0
    assert "train: continues (was interrupted)" in capsys.readouterr().err
    assert lines(run)[:2] == lines(trained[1])[:2] and len(lines(run)) == 3
    assert not list(run.glob("*.stale-*"))


def test_a_checkpoint_that_would_run_code_runs_none(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its hash has been made to fit."""
    run, mark = interrupted(trained, tmp_path / "run"), tmp_path / "executed"
    folder = run / "checkpoints" / "step-000003"
    torch.save({"state": Attack(mark)}, folder / "policy.optimizer.pt")
    state = json.loads((folder / "state.json").read_text())
    state["files"]["policy.optimizer.pt"] = (folder / "policy.optimizer.pt").stat().st_size
    state["sha256"]["policy.optimizer.pt"] = digest(folder / "policy.optimizer.pt")
    (folder / "state.json").write_text(json.dumps(state))
    assert polyalign("train", trained[0], run) == 2
    assert "policy.optimizer.pt: cannot be read (Weights only load failed" in capsys.readouterr().err
    assert not mark.exists() and not (run / LORA).exists()


# --- accidents ------------------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate so large that the second step's loss overflows: its pairs are named, the step before it is kept."""
    config, generated = trained
    run = only_generated(generated, tmp_path / "run")
    wild = ("train.optimizer.learning_rate=1e30", "train.save_every=1", "train.clip_norm=null")
    assert polyalign("train", config, run, *wild) == 2
    refused = json.loads((run / "refused.json").read_text())
    message = capsys.readouterr().err
    assert refused["step"] == 2 and len(refused["group_ids"]) == 4
    assert "step 2 was refused" in message and refused["group_ids"][0] in message
    assert "learning_rate" in message  # what to do about it
    kept = latest(run / "checkpoints")
    assert kept is not None and kept.step == 1 and str(kept.folder) in message
    assert all(bool(tensor.isfinite().all()) for tensor in kept.weights("policy").values())
    assert [line["step"] for line in lines(run)] == [1]
    assert not (run / "adapter").exists()
    assert json.loads((run / "stages.json").read_text())["train"]["finished"] is False


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """No file of this process may get longer than ``count`` bytes: the way a full disk shows itself, without filling one."""
    resource = pytest.importorskip("resource", reason="file limits are of POSIX systems")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_on_a_full_disk_goes_on_when_there_is_room(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, finished = trained
    run = only_generated(finished, tmp_path / "run")
    pairs = content_of(run / "pairs")
    size = (finished / "checkpoints" / "step-000003" / "policy.safetensors").stat().st_size
    with files_of_at_most(size - 1):
        assert polyalign("train", config, run) == 2
    message = capsys.readouterr().err
    assert "Free some space" in message and "checkpoints" in message
    assert content_of(run / "pairs") == pairs
    assert not list((run / "checkpoints").iterdir()), "half a checkpoint was left"
    assert polyalign("train", config, run) == 0
    assert digest(run / LORA) == digest(finished / LORA)


def test_evaluation_on_a_full_disk_keeps_its_pictures(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, finished = trained
    run = shutil.copytree(finished, tmp_path / "run")
    with files_of_at_most(12_000):  # a picture has 3 kB, stages.json some 8, evaluation.json is kept small enough to be written
        made = polyalign("evaluate", config, run, "evaluate.prompts.count=40")
    assert made == 2
    assert "Free some space" in capsys.readouterr().err
    pictures = content_of(run / "samples")
    assert len(pictures) == 80
    assert polyalign("evaluate", config, run, "evaluate.prompts.count=40") == 0
    assert content_of(run / "samples") == pictures


def test_an_export_on_a_full_disk_leaves_nothing_half(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, finished = trained
    size = (finished / LORA).stat().st_size
    with files_of_at_most(size - 1):
        assert polyalign("export", config, finished, "--to", str(tmp_path / "export")) == 2
    assert "while writing the export" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
