"""Re-Align's maker on the embedded base and its world, and its parts on tiny random models of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlms import BUILDERS, picture

from polyalign.core.errors import UserError
from polyalign.datasets.pictures import fingerprint
from polyalign.datasets.worlds import scenes_rows
from polyalign.datasets.worlds.scenes_questions import ScenesJudge
from polyalign.modalities.vlm import processing
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.answer_similarity import by_sentences, by_words
from polyalign.modalities.vlm.completion import Task, _Opening, complete, filled_in, kept_words, last_question, with_question
from polyalign.modalities.vlm.loading import TINY_BASE
from polyalign.modalities.vlm.masking import Gap, Masked, masker_of
from polyalign.modalities.vlm.re_align import ReAlign
from polyalign.modalities.vlm.re_align_config import ReAlignConfig
from polyalign.modalities.vlm.settings import VlmModelSettings

CONSTRAINED = ReAlignConfig(completion="constrained")
COUNT = 60


@pytest.fixture(scope="module")
def base() -> tuple[VlmAdapter, Any]:
    adapter = VlmAdapter(VlmModelSettings(str(TINY_BASE), device="cpu", max_new_tokens=40))
    return adapter, adapter.load()


@pytest.fixture(scope="module")
def given() -> list[dict[str, Any]]:
    return scenes_rows.rows("train", COUNT, pictures=1)


@pytest.fixture(scope="module")
def made(base: tuple[VlmAdapter, Any], given: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return ReAlign(*base, given, CONSTRAINED, seed=3).make(range(COUNT))


def test_pairs_of_the_world_are_right_and_wrong_answers_with_another_picture(
    made: tuple[list[dict[str, Any]], dict[str, Any]], given: list[dict[str, Any]]
) -> None:
    rows, note = made
    conditions = [row["condition"] for row in rows]
    judge = ScenesJudge()
    chosen, rejected = (judge.score(conditions, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    good = sum(one == 1.0 and other < 1.0 for one, other in zip(chosen, rejected, strict=True))
    assert len(rows) >= COUNT // 2 and good >= 0.8 * len(rows)
    pictures = {fingerprint(row["condition"]["images"][0]) for row in given}
    for row in rows:
        assert by_words(row["chosen"], row["rejected"]) < CONSTRAINED.gate
        assert fingerprint(row["rejected_images"][0]) in pictures - {fingerprint(row["condition"]["images"][0])}
        masked = row["provenance"]["sampler"]["masked"]
        assert "[MASK]" in masked
        assert all(piece.strip() in row["rejected"] for piece in masked.split("[MASK]"))  # what is not masked stays
    assert note["asked"] == COUNT == note["kept"] + note["exhausted"] + note["nothing_to_mask"] + note["empty"]
    assert note["kept"] == len(rows) == sum(note["ranks"].values())


def test_rows_are_what_a_store_and_the_adapter_take(
    base: tuple[VlmAdapter, Any], made: tuple[list[dict[str, Any]], dict[str, Any]]
) -> None:
    adapter, model = base
    rows, _ = made
    assert [row["pair_id"] for row in rows] == sorted(row["pair_id"] for row in rows)
    for row in rows[:5]:
        assert isinstance(row["condition"]["prompt"], str) and row["condition"]["task"]
        json.dumps({name: value for name, value in row["condition"].items() if name != "images"})
        json.dumps(row["provenance"])
        assert row["provenance"]["model"] == "tiny_base" and isinstance(row["provenance"]["chosen_seed"], int)
    three = VlmAdapter(VlmModelSettings(str(TINY_BASE), device="cpu", branches=("chosen", "response", "image")))
    batch = three.prepare(model, rows[:4], step=0)
    scores = three.score(model, batch, None)
    assert scores.values.shape[:2] == (4, 3)
    assert torch.equal(batch.tensors["completion_ids"][:, 0], batch.tensors["completion_ids"][:, 2])
    assert not torch.equal(scores.values[:, 0], scores.values[:, 2])


def test_pairs_depend_on_their_own_numbers_alone(
    base: tuple[VlmAdapter, Any], given: list[dict[str, Any]], made: tuple[list[dict[str, Any]], dict[str, Any]]
) -> None:
    whole, _ = made
    maker = ReAlign(*base, given, CONSTRAINED, seed=3)
    last, note = maker.make(range(40, COUNT))
    first, other = maker.make(range(40))
    told = [(row["pair_id"], row["chosen"], row["rejected"], row["provenance"]) for row in (*first, *last)]
    assert told == [(row["pair_id"], row["chosen"], row["rejected"], row["provenance"]) for row in whole]
    summary = ReAlign.summary([json.loads(json.dumps(one)) for one in (other, note)])
    assert summary["kept"] == len(whole) and 0 < summary["mean_similarity"] < CONSTRAINED.gate
    assert 1 <= summary["mean_rank"] <= CONSTRAINED.k and "words" in summary["similarity"]
    lines = ReAlign.lines(summary)
    assert f"{COUNT} questions, {len(whole)} pairs" in lines[0] and len(lines) == 2
    assert json.dumps(maker.inputs()) == json.dumps(ReAlign(*base, given, CONSTRAINED, seed=3).inputs())
    assert maker.inputs()["questions"] != ReAlign(*base, given[::-1], CONSTRAINED, seed=3).inputs()["questions"]


def test_given_answers_are_taken_as_they_are(base: tuple[VlmAdapter, Any], given: list[dict[str, Any]]) -> None:
    config = CONSTRAINED.model_copy(update={"chosen": "given", "k": 2})
    rows, note = ReAlign(*base, given[:24], config).make(range(24))
    answers = {row["pair_id"]: row["chosen"] for row in given}
    assert rows and all(row["chosen"] == answers[row["pair_id"]] for row in rows)
    assert all(row["provenance"]["chosen_seed"] is None for row in rows) and note["empty"] == 0
    with pytest.raises(UserError, match="chosen is None"):
        ReAlign(*base, [row["condition"] for row in given[:2]], config).make(range(2))


def test_what_makes_no_pair_is_counted(base: tuple[VlmAdapter, Any], given: list[dict[str, Any]]) -> None:
    few = [{**row, "chosen": "Certainly." if place % 2 else row["chosen"]} for place, row in enumerate(given[:12])]
    few[0] = {**few[0], "chosen": "  "}
    config = CONSTRAINED.model_copy(update={"chosen": "given", "gate": 1e-9, "k": 2})
    maker = ReAlign(*base, few, config)
    rows, note = maker.make(range(12))
    assert rows == [] and (note["empty"], note["nothing_to_mask"], note["exhausted"]) == (1, 6, 5)
    assert note["tried"] == 10
    summary = ReAlign.summary([note])
    assert summary["mean_similarity"] is None and summary["mean_rank"] is None
    assert ReAlign.lines(summary)[0].startswith("12 questions, 0 pairs; dropped: 1 with an empty answer, 6 with nothing")


def test_of_several_pictures_the_one_that_is_asked_about_is_exchanged(base: tuple[VlmAdapter, Any]) -> None:
    several = scenes_rows.rows("train", 24, pictures=2)
    rows, _ = ReAlign(*base, several, CONSTRAINED).make(range(24))
    assert rows
    for row in rows:
        target = row["condition"]["layout"]["targets"][0]
        same = [
            fingerprint(one) == fingerprint(other)
            for one, other in zip(row["condition"]["images"], row["rejected_images"], strict=True)
        ]
        assert same == [place != target for place in range(2)]
        assert fingerprint(row["rejected_images"][target]) not in map(fingerprint, row["condition"]["images"])
    bare = {"prompt": "Which is larger?", "images": several[0]["condition"]["images"]}
    with pytest.raises(UserError, match="depends on 2 images"):
        ReAlign(*base, [bare, bare], CONSTRAINED).make(range(1))


def test_questions_that_cannot_be_used_are_refused(base: tuple[VlmAdapter, Any], given: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="1 question"):
        ReAlign(*base, given[:1], CONSTRAINED)
    with pytest.raises(UserError, match="there is no image"):
        ReAlign(*base, [*given[:2], {"prompt": "What?"}], CONSTRAINED).make(range(2))


# --- completions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "most", "following", "kept"),
    [
        (" red square and a", 2, ".", "red square"),
        (" red square and a", 3, " and a blue one", "red square"),
        (" dog on the table", 3, " on the table", "dog"),
        (" on the", 1, " on it", "on"),  # the first word may be the one that follows
        (" red, blue", 2, ".", "red"),
        (". It is", 2, "", ""),
        ("", 1, ".", ""),
        ("  t-shirt's colour", 1, ".", "t-shirt's"),
    ],
)
def test_words_at_a_gap(said: str, most: int, following: str, kept: str) -> None:
    assert kept_words(said, most, following) == kept


def test_a_gap_is_filled_with_what_the_model_says(base: tuple[VlmAdapter, Any], given: list[dict[str, Any]]) -> None:
    """The model's own greedy answer with gaps is filled in to that answer again."""
    adapter, model = base
    greedy = VlmAdapter(VlmModelSettings(str(TINY_BASE), device="cpu", max_new_tokens=40, temperature=0.0))
    conditions = [row["condition"] for row in given[:18]]
    answers = [answer.strip() for answer in greedy.sample(model, conditions, [0] * len(conditions))]
    mask = masker_of(CONSTRAINED)
    tasks = [
        Task(condition, mask(answer, last_question(condition)), f"question {place}")
        for place, (condition, answer) in enumerate(zip(conditions, answers, strict=True))
    ]
    assert complete(greedy, model, tasks, CONSTRAINED, seed=0) == answers
    whole = [
        Task(task.condition, Masked(one, (Gap(0, len(one), 12),)), task.key) for task, one in zip(tasks, answers, strict=True)
    ]
    for answer, found in zip(answers, complete(greedy, model, whole, CONSTRAINED, seed=0), strict=True):
        assert found and answer.startswith(found)  # up to the first mark
    drawn = [complete(adapter, model, tasks, CONSTRAINED, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_fills_in_both_ways(family: str, tiny_vlms: Callable[[str], Path]) -> None:
    adapter = VlmAdapter(VlmModelSettings(str(tiny_vlms(family)), device="cpu", max_new_tokens=6, temperature=0.0))
    model = adapter.load()
    masked = Masked("It is red and blue.", (Gap(6, 9), Gap(14, 18)))
    tasks = [Task({"prompt": "what is it", "images": [picture(place)]}, masked, f"question {place}") for place in range(2)]
    found = complete(adapter, model, tasks, CONSTRAINED, seed=0)
    assert found[:1] == complete(adapter, model, tasks[:1], CONSTRAINED, seed=0)
    assert all(answer and answer.startswith("It is ") and " and " in answer and answer.endswith(".") for answer in found)
    assert len(complete(adapter, model, tasks, ReAlignConfig(), seed=0)) == 2
    opening = _Opening.of(adapter, model, tasks[0])
    ids = opening.ids_before(model, tasks[0], ["red"])
    assert model.parts["tokenizer"].decode(ids) == "It is red and"
    longer = opening.followed_by(ids)
    expected = processing._positions(model, longer.ids, longer.pictures)
    assert (expected is None) == (longer.positions is None)
    assert expected is None or torch.equal(expected, longer.positions)


def test_the_words_that_the_model_is_asked_with() -> None:
    parts = [{"type": "text", "text": "Image1: "}, {"type": "image"}, {"type": "text", "text": "\nWhat {mask} is it?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}, {"role": "user", "content": parts}]
    condition = {"messages": turns, "images": [picture(0), picture(1)], "task": "kept"}
    assert last_question(condition) == "What {mask} is it?"
    text = filled_in("{question} {masked} {other}", {"question": "What {mask} is it?", "masked": "a [MASK]", "mask": "[MASK]"})
    assert text == "What {mask} is it? a [MASK] {other}"
    found = with_question(condition, text)
    assert found["messages"][2]["content"] == [*parts[:2], {"type": "text", "text": text}]
    assert found["messages"][0]["content"] == parts and found["task"] == "kept"
    assert condition["messages"][2]["content"] == parts


def test_a_model_that_masks_by_itself(base: tuple[VlmAdapter, Any], given: list[dict[str, Any]]) -> None:
    """The tiny base cannot: what it says is not its answer with gaps, and is not taken for that."""
    config = CONSTRAINED.model_copy(update={"masker": "model"})
    rows, note = ReAlign(*base, given[:6], config).make(range(6))
    assert rows == [] and note["nothing_to_mask"] == 6


# --- similarities ------------------------------------------------------------------------------------------------------------


def test_similarity_of_words() -> None:
    both = "There is a red square and a blue circle."
    assert by_words(both, both.upper()) == 1.0
    assert by_words(both, "There is a blue circle and a red square.") == 1.0  # a list in another order
    assert by_words(both, "There is a blue square and a red circle.") == pytest.approx(15 / 17)
    assert by_words("red", "blue") == 0.0 and by_words("", "") == 1.0 and by_words("", "red") == 0.0
    assert by_words("a red bus", "a red car") == pytest.approx(3 / 5)  # a, red, (a red) of a, red, bus, (a red), (red bus)


def test_similarity_of_sentences(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "a", "red", "blue", "bus", "car"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).eval()
    network.save_pretrained(tmp_path)
    encoder = by_sentences(str(tmp_path), torch.device("cpu"))
    same, other = encoder.of([("a red bus", "a red bus"), ("a red bus", "a blue car car")])
    assert same == pytest.approx(1.0, abs=1e-9) and other < 0.999

    def mean(text: str) -> torch.Tensor:
        ids = torch.tensor([[words[word] for word in text.split()]])
        with torch.no_grad():
            return network(input_ids=ids).last_hidden_state.double().mean(1)

    expected = torch.nn.functional.cosine_similarity(mean("a red bus"), mean("a blue car car"))
    assert other == pytest.approx(float(expected), abs=1e-5)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert "first token" in by_sentences(str(tmp_path), torch.device("cpu")).identity
    (tmp_path / "2_Dense").mkdir()
    with pytest.raises(UserError, match="2_Dense"):
        by_sentences(str(tmp_path), torch.device("cpu"))
    with pytest.raises(UserError, match="sentence_encoder"):
        by_sentences(str(tmp_path / "nothing"), torch.device("cpu"))
