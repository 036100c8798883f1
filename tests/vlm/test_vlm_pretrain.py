"""Training of the embedded vision-language base: its data, its going on after a kill, what it ships, and its gate."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyalign.core.errors import UserError
from polyalign.datasets.worlds import scenes, scenes_rows
from polyalign.datasets.worlds.scenes_questions import asked
from polyalign.modalities.vlm import pretrain
from polyalign.modalities.vlm import tiny_architecture as tiny
from polyalign.modalities.vlm.loading import load
from polyalign.modalities.vlm.pretrain import Settings, unfit
from polyalign.modalities.vlm.processing import completion_of, prompt_of
from polyalign.modalities.vlm.settings import VlmModelSettings

SMALL = Settings(
    steps=4,
    alone=1,
    batches=(3, 3, 2, 2),
    warmup=2,
    tokenizer_texts=300,
    save_every=2,
    watched=2,
    measured=4,
    shares=(0, 1, 0, 0),
)
SHIPPED = Path(pretrain.__file__).parent / "tiny_base"
FIT = {"one": 0.97, "two": 0.95, "three": 0.9, "four": 0.5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("base") / "whole"
    return folder, pretrain.pretrain(folder, SMALL)


def test_training_shows_no_held_out_composition_and_keeps_to_its_shares() -> None:
    settings = replace(Settings(), alone=2, batches=(2, 2, 2, 2), shares=(0.25, 0.25, 0.25, 0.25))
    numbers = Counter()
    for step in range(60):
        given = pretrain.exercises(step, settings)
        for row, _ in given:
            judged = asked(row["condition"])
            assert not any(scenes.held_out(scene.names) for scene in (judged.scene, *judged.others))
            assert len(judged.others) == 0 or step >= 2
            numbers[1 + len(judged.others)] += 1
    assert sum(numbers.values()) == 120 and min(numbers[count] for count in (1, 2, 3, 4)) >= 10
    first, again = (pretrain.exercises(7, settings) for _ in range(2))
    assert [answer for _, answer in first] == [answer for _, answer in again]


def test_a_batch_is_what_the_adapter_makes_of_the_same_rows(whole: tuple[Path, dict]) -> None:
    model = load(VlmModelSettings(base=str(whole[0])))
    rows = [*scenes_rows.rows("train", 4, pictures=3), *scenes_rows.rows("train", 6)]
    batch = pretrain.batch_of(model.parts["processor"], [(row, row["chosen"]) for row in rows])
    pixels = iter(batch.pixels)
    for row, ids, labels in zip(rows, batch.ids, batch.labels, strict=True):
        prompt = prompt_of(model, row["condition"], where="a row")
        answer = completion_of(model, row["condition"], row["chosen"], True, where="a row")
        assert answer == completion_of(model, row["condition"], f" {row['chosen']}", True, where="as it is sampled")
        kept = labels != pretrain.IGNORED
        assert ids[: len(prompt.ids)].tolist() == prompt.ids and labels[kept].tolist() == answer == ids[kept].tolist()
        assert int(kept.nonzero()[0]) == len(prompt.ids)
        for picture in prompt.pictures:
            torch.testing.assert_close(picture.inputs["pixel_values"][0], next(pixels), atol=1e-5, rtol=0)
            assert picture.tokens == tiny.IMAGE_TOKENS


def test_the_network_starts_at_the_scale_of_its_width() -> None:
    tokenizer = tiny.tokenizer_of(pretrain.texts(SMALL))
    network, again = tiny.build(tokenizer, 1), tiny.build(tokenizer, 1)
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    assert all(torch.equal(weight, weights[name]) for name, weight in again.named_parameters())
    for name, fan_in in (("language_model.layers.0.mlp.down_proj", 256), ("vision_tower.embeddings.patch_embedding", 768)):
        assert float(weights[f"model.{name}.weight"].std()) == pytest.approx(fan_in**-0.5, rel=0.05)
    assert float(weights["model.language_model.embed_tokens.weight"].std()) == pytest.approx(0.3, rel=0.05)
    assert tokenizer.decode(tokenizer("Ça va? 12").input_ids) == "Ça va? 12"  # any text


def test_a_base_is_written_with_its_record_and_a_killed_run_goes_on(
    whole: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, record = whole
    assert json.dumps(record, indent=2) + "\n" == (folder / "base.json").read_text()
    assert record["sha256"] == pretrain.digest(folder) and 0.0 <= record["figures"]["two"] <= 1.0

    def killed(step: int, *given: object) -> torch.Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return loss_at(step, *given)  # type: ignore[arg-type]

    loss_at = pretrain.loss_at
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "loss_at", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(tmp_path / "parts", SMALL)
    with pytest.raises(UserError, match="rate was 0.002, now 0.001"):
        pretrain.pretrain(tmp_path / "parts", replace(SMALL, rate=1e-3))
    again = pretrain.pretrain(tmp_path / "parts", replace(SMALL, measured=3))  # how it is measured may change
    assert again["sha256"] == record["sha256"]


@pytest.mark.parametrize(
    ("figure", "value", "why"),
    [
        ("one", 0.9, "has not learnt to see"),
        ("two", 0.85, "does not know which is meant"),
        ("four", 0.4, "leaves something to learn"),
        ("four", 0.95, "leaves something to learn"),
    ],
)
def test_a_base_without_competence_or_without_errors_is_called_unfit(figure: str, value: float, why: str) -> None:
    assert unfit(FIT) is None
    assert why in (unfit({**FIT, figure: value}) or "")


def test_the_shipped_base_is_the_one_of_its_record_and_knows_which_picture_is_meant() -> None:
    record = json.loads((SHIPPED / "base.json").read_text())
    assert record["sha256"] == pretrain.digest(SHIPPED) and unfit(record["figures"]) is None
    assert record["settings"] == json.loads(json.dumps(vars(Settings())))
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 6e6
    model = load(VlmModelSettings(base=str(SHIPPED)))
    made, kept = pretrain.new_processor(Settings()), model.parts["processor"]
    assert made.tokenizer.get_vocab() == kept.tokenizer.get_vocab() and made.chat_template == kept.chat_template
    assert made.image_processor.to_dict() == kept.image_processor.to_dict()
    rows = scenes_rows.rows("heldout", 40, seed=9, pictures=2)
    said = pretrain.answers(model.network, model.parts["processor"], rows)
    right = [asked(row["condition"]).verdict(text) == "right" for row, text in zip(rows, said, strict=True)]
    assert sum(right) / len(right) > 0.75  # looking at either is right in a half
