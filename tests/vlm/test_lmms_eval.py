"""The plug-in for lmms-eval: conditions from its tasks, options, likelihoods, and its own classes where it is installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_vlms import picture

from polyalign.core.errors import UserError
from polyalign.modalities.vlm import lmms_eval, processing
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.harness import LONGEST, Harness, Wanted
from polyalign.modalities.vlm.lmms_eval import condition_of_messages, condition_of_text, settings_of
from polyalign.modalities.vlm.settings import VlmModelSettings

Folder = Callable[[str], Path]
RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


@pytest.fixture(scope="module")
def base(tiny_vlms: Folder) -> str:
    return str(tiny_vlms("llava"))


@pytest.fixture(scope="module")
def lora(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes answers."""
    adapter = VlmAdapter(VlmModelSettings(base, device="cpu", rank=4))
    model = adapter.trainable(adapter.load())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    adapter.export(model, folder)
    return folder


# --- conditions and options --------------------------------------------------------------------------------------------------


def kinds(condition: dict[str, Any]) -> list[str]:
    return [part.get("text", "#") for turn in condition["messages"] for part in turn["content"]]


def test_words_with_and_without_places_for_pictures() -> None:
    assert kinds(condition_of_text("what?", [RED, BLUE])) == ["#", "#", "what?"]
    assert kinds(condition_of_text("Image1: <image>\nImage2: <image>\nwhat?", [RED, BLUE])) == [
        *("Image1: ", "#", "\nImage2: ", "#", "\nwhat?"),
    ]
    assert kinds(condition_of_text("one <image> too few", [RED, BLUE])) == ["#", "#", "one ", " too few"]
    assert kinds(condition_of_text("no picture", None)) == ["no picture"] == kinds(condition_of_text("no picture", []))
    assert condition_of_text("nested", [[RED], [BLUE]])["images"] == [RED, BLUE]
    with pytest.raises(UserError, match="this task shows a str"):
        condition_of_text("what?", ["clip.mp4"])


def test_messages_keep_pictures_where_they_are() -> None:
    content = [{"type": "image", "url": RED}, {"type": "text", "text": "and"}, {"type": "image", "url": BLUE}]
    found = condition_of_messages([{"role": "system", "content": "be brief"}, {"role": "user", "content": content}])
    assert kinds(found) == ["be brief", "#", "and", "#"] and found["images"] == [RED, BLUE]
    first = [{"type": "image", "url": RED}, {"type": "image", "url": BLUE}, {"type": "text", "text": "<image> or <image>?"}]
    assert kinds(condition_of_messages([{"role": "user", "content": first}])) == ["#", " or ", "#", "?"]
    assert processing.asked_of(found, where="here").messages[1]["role"] == "user"
    with pytest.raises(UserError, match="a part of type video"):
        condition_of_messages([{"role": "user", "content": [{"type": "video", "url": "clip.mp4"}]}])


def test_options_of_tasks() -> None:
    assert (
        Wanted.of({})
        == Wanted(0.0, 1.0, None, LONGEST, ())
        == Wanted.of({"do_sample": False, "temperature": 0.7, "top_p": 0.9})
    )
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_new_tokens": 4, "until": ["\n\n", "###", ""], "num_beams": 1}
    assert Wanted.of(asked) == Wanted(0.7, 0.9, 5, 4, ("###",))
    assert Wanted.of({"until": "stop", "max_new_tokens": None}).until == ("stop",)
    assert Wanted(until=("b", "a")).cut("xxaxb") == "xx" and Wanted(until=("###",)).cut("all\n\nof it") == "all\n\nof it"
    with pytest.raises(UserError, match="num_beams is 5"):
        Wanted.of({"num_beams": 5})
    with pytest.raises(UserError, match="generation_kwargs: temprature"):
        Wanted.of({"temprature": 1.0})


def test_arguments_of_the_command_line() -> None:
    found = settings_of({"base": "tiny", "dtype": "float32", "revision": None}, batch_size="8", device="cpu")
    assert VlmModelSettings(**found) == VlmModelSettings("tiny", device="cpu", sample_batch=8, append_eos=False)
    with pytest.raises(UserError, match="--model_args: pretrained; known: adapter, seed, base"):
        settings_of({"pretrained": "x"}, batch_size=1, device=None)
    with pytest.raises(UserError, match="--batch_size is 'auto'"):
        settings_of({}, batch_size="auto", device=None)


# --- answers and likelihoods -------------------------------------------------------------------------------------------------


def test_the_lora_answers_and_its_absence_is_told(base: str, lora: Path, tmp_path: Path) -> None:
    settings = VlmModelSettings(base, device="cpu", sample_batch=2)
    condition, wanted = condition_of_text("what is it", [picture(1)]), Wanted(max_new_tokens=6)
    plain, trained = Harness(settings), Harness(settings, lora)
    one, other = (harness.answers([condition] * 3, wanted, ["a", "b", "c"]) for harness in (plain, trained))
    assert one[0] == one[1] == one[2] != other[0], "greedy answers do not depend on their keys"
    free = Wanted(temperature=1.0, max_new_tokens=6)
    first = trained.answers([condition] * 2, free, ["a", "b"])
    assert first == trained.answers([condition] * 2, free, ["a", "b"]) and first[0] != first[1]
    assert first != Harness(settings, lora, seed=1).answers([condition] * 2, free, ["a", "b"])
    with pytest.raises(UserError, match="there is no LoRA folder"):
        Harness(settings, tmp_path / "absent")


def test_likelihoods_are_those_of_the_answers_tokens(base: str, lora: Path) -> None:
    settings = VlmModelSettings(base, device="cpu", sample_batch=2, append_eos=False)
    harness = Harness(settings, lora)
    conditions = [condition_of_text("what is it", [picture(seed)]) for seed in (1, 2, 3)]
    answers = ["red", "blue what", "it is"]
    found = harness.likelihoods(conditions, answers)
    for condition, answer, (total, count, _) in zip(conditions, answers, found, strict=True):
        adapter = VlmAdapter(replace(settings, prefix_sharing="off"))
        ids = processing.completion_of(harness.model, condition, answer, False, where="here")
        ends = processing.ends_of(harness.model, condition, where="here")
        assert not ends & set(ids[:count]) and ids[count] in ends
        row = {"pair_id": "0", "condition": condition, "completion": answer}
        with torch.no_grad():
            values = adapter.score(harness.model, adapter.prepare(harness.model, [row], step=0), None).values[0, 0]
        assert total == pytest.approx(float(values[:count].sum()), abs=1e-5)
    with pytest.raises(UserError, match="has no tokens"):
        harness.likelihoods(conditions[:1], [""])


def test_what_greedy_decoding_gives_is_greedy(base: str) -> None:
    harness = Harness(VlmModelSettings(base, device="cpu", append_eos=False, temperature=0.0, max_new_tokens=1))
    conditions = [
        condition_of_text(words, [picture(1)]) for words in ("what", "is", "it", "red", "blue", "what is", "it is red")
    ]
    made = harness.adapter.answers(harness.model, conditions, [0] * len(conditions))
    usable = []
    for condition, answer in zip(conditions, made, strict=True):
        written = processing.completion_of(harness.model, condition, answer.text, False, where="here")
        if (
            answer.text.strip()
            and written[0] == answer.ids[0]
            and written[1] in processing.ends_of(harness.model, condition, where="here")
        ):
            usable.append((condition, answer.text))
    assert usable, "some first word is the same when it is read again"
    for condition, text in usable:
        (right, wrong) = harness.likelihoods([condition] * 2, [text, f"{text} {text} it"])
        assert right[2] and right[1] == 1 and wrong[0] < right[0]
        assert not harness.likelihoods([condition], ["it is what"])[0][2]


# --- lmms-eval itself --------------------------------------------------------------------------------------------------------


@dataclass
class Document:
    picture: Image.Image
    words: str


DOCUMENTS = [Document(picture(seed), f"what is it {'red' * (seed % 2)}") for seed in range(4)]


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(UserError, match=r"evaluation by lmms-eval needs .*polyalign\[lmms\]"):
        lmms_eval.manifest()
    with pytest.raises(AttributeError, match="PolyalignLm"):
        _ = lmms_eval.PolyalignLm


def of_lmms_eval(name: str, base: str, **arguments: Any) -> Any:
    registry = pytest.importorskip("lmms_eval.models.registry_v2").ModelRegistryV2()
    registry.register_manifest(lmms_eval.manifest())
    made = registry.get_model_class("polyalign", force_simple=name == "simple")
    model = made.create_from_arg_string(f"base={base},dtype=float32", {"batch_size": 2, "device": "cpu", **arguments})
    model.task_dict = {"task": {"test": DOCUMENTS}}
    return model


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    instance = pytest.importorskip("lmms_eval.api.instance").Instance
    metadata = [{"task": "task", "doc_id": one[-3], "repeats": 1} for one in arguments]
    return [instance(kind, one, idx=0, metadata=told) for one, told in zip(arguments, metadata, strict=True)]


def messages(document: Document, **rounds: Any) -> Any:
    turn = [{"type": "image", "url": document.picture}, {"type": "text", "text": document.words}]
    if not rounds:
        return [{"role": "user", "content": turn}]
    said = rounds["previous_output"]
    asked = [{"role": "user", "content": [*turn, {"type": "text", "text": said[-1]}]}]
    return (None if len(said) == 3 else asked, len(said) == 3, said, {"round": rounds["round_idx"]})


def next_words(document: Document, **rounds: Any) -> Any:
    said = rounds["previous_output"]
    assert rounds["round_idx"] == len(said) and (len(said) == 1) == (rounds["previous_round_info"] is None)
    return [document.picture], f"{document.words}{said[-1]}", len(said) == 3, said, {"round": len(said)}


def test_both_forms_answer_as_the_adapter_does(base: str, lora: Path) -> None:
    options = {"max_new_tokens": 5, "until": ["\n\n"], "do_sample": False}

    def visual(document: Document) -> list[Image.Image]:
        return [document.picture]

    chat, simple = (of_lmms_eval(name, base, adapter=str(lora)) for name in ("chat", "simple"))
    assert simple.is_simple and not chat.is_simple
    said = chat.generate_until(
        instances("generate_until", [("", messages, dict(options), number, "task", "test") for number in range(4)])
    )
    words = [document.words for document in DOCUMENTS]
    asked = [(words[number], dict(options), visual, number, "task", "test") for number in range(4)]
    assert simple.generate_until(instances("generate_until", asked)) == said
    conditions = [condition_of_text(document.words, [document.picture]) for document in DOCUMENTS]
    assert said == Harness(VlmModelSettings(base, device="cpu"), lora).answers(
        conditions, Wanted(max_new_tokens=5), [str(number) for number in range(4)]
    )


def test_rounds_and_choices(base: str) -> None:
    def visual(document: Document) -> list[Image.Image]:
        return [document.picture]

    chat, simple = (of_lmms_eval(name, base) for name in ("chat", "simple"))
    options = {"max_new_tokens": 3}
    asked = [("", messages, dict(options), number, "task", "test") for number in range(2)]
    in_rounds = chat.generate_until_multi_round(instances("generate_until_multi_round", asked))
    assert [len(rounds) for rounds in in_rounds] == [3, 3]
    asked = [(DOCUMENTS[n].words, dict(options), visual, next_words, n, "task", "test") for n in range(2)]
    again = simple.generate_until_multi_round(instances("generate_until_multi_round", asked))
    assert again == in_rounds
    choices = [(DOCUMENTS[0].words, target, visual, 0, "task", "test") for target in (" red", " blue", lambda document: "red")]
    unwrap = pytest.importorskip("lmms_eval.api.instance").unwrap_generation_output
    found = [unwrap(one)[0] for one in simple.loglikelihood(instances("loglikelihood", choices))]
    (first, count, greedy), *_ = simple.harness.likelihoods([condition_of_text(choices[0][0], [picture(0)])], ["red"])
    assert found[0] == found[2] == (pytest.approx(-first / count), greedy) and found[0][0] > 0.0 != found[1][0]


def test_the_entry_point_names_what_is_there() -> None:
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'\[project\.entry-points\."lmms_eval\.models"\]\npolyalign = "(.+)"', project)
    assert found is not None
    path, _, name = found[1].partition(":")
    assert path == lmms_eval.__name__ and getattr(lmms_eval, name) is lmms_eval.manifest
