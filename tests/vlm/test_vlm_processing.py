"""Prompts with pictures: where each picture's tokens are, what a family lacks, and wrong input of every kind."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_vlm_exactness import MESSAGES, PICTURES, ROWS
from tiny_vlms import BUILDERS, picture

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.vlm import batches, processing
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.families import FAMILIES, Family, family_of
from polyalign.modalities.vlm.settings import VlmModelSettings, losing_in
from polyalign.modalities.vlm.spans import ended_counts, runs_of, spans_of, whole_last_counts

Folder = Callable[[str], Path]

COUNTS = {  # of the pictures 40 x 30 and 30 x 60, worked out by hand from the sizes in tiny_vlms
    "llava": [4, 4],  # (28 / 14)^2
    "llava_next": [24, 16],  # 4 of the whole; 56 x 56: 4 x 4 and 4 row ends; 28 wide and 56 high: 4 x 2 and 4 row ends
    "llava_onevision": [5, 5],  # with several pictures none is tiled: 4 and a row end
    "qwen2_vl": [1, 2],  # 28 x 28 and 28 x 56 pixels after rounding, 2 x 2 patches of 14 a token
    "qwen2_5_vl": [1, 2],
    "qwen3_vl": [1, 2],  # 32 x 32 and 32 x 64, patches of 16
    "internvl": [4, 12],  # one tile; two tiles and the whole
    "idefics3": [20, 12],  # 56 x 42: 2 x 2 tiles and the whole; 28 x 56: 2 and the whole
    "smolvlm": [20, 12],
    "gemma3": [4, 4],
}


def opened(folder: Path, **settings: Any) -> tuple[VlmAdapter, Model]:
    adapter = VlmAdapter(VlmModelSettings(str(folder), device="cpu", **settings))
    return adapter, adapter.load()


@pytest.mark.parametrize("family", BUILDERS)
def test_each_picture_has_its_span(family: str, tiny_vlms: Folder) -> None:
    """Also where pictures touch; the model's own tower gives as many features as there are places."""
    adapter, model = opened(tiny_vlms(family))
    token = model.parts["image_token"]
    touching = {"prompt": "both", "images": [PICTURES[0], PICTURES[1], PICTURES[0]]}
    for condition in ({"messages": MESSAGES, "images": PICTURES}, touching):
        prompt = adapter.prompt(model, condition, where="here")
        counts = [own.tokens for own in prompt.pictures]
        assert counts[:2] == COUNTS[family] and counts[2:] == COUNTS[family][: len(counts) - 2]
        spans = prompt.spans(token)
        assert [len(span) for span in spans] == counts
        assert sorted(sum(spans, [])) == [place for place, one in enumerate(prompt.ids) if one == token]
        for own in prompt.pictures:
            assert len(adapter.features_of(model)(own.key, own.inputs)["features"]) == own.tokens
        assert prompt.pictures[0].size == (40, 30)
    assert prompt.pictures[0].key == prompt.pictures[2].key != prompt.pictures[1].key


def test_runs_and_counts() -> None:
    ids = [9, 7, 7, 1, 8, 7, 7, 7, 9]
    assert runs_of(ids, 7) == [range(1, 3), range(5, 8)] and ended_counts(ids, 7) == [2, 3]
    assert whole_last_counts(ids, 7, whole=8) == [5] and whole_last_counts([8, 7, 8, 7, 7], 7, whole=8) == [1, 2]
    assert spans_of(ids, 7, [1, 4]) == [[1], [2, 5, 6, 7]]
    with pytest.raises(ValueError, match="5 image tokens in the prompt, and 3"):
        spans_of(ids, 7, [1, 2])


def test_positions_of_qwen(tiny_vlms: Folder) -> None:
    """A picture of 1 x 2 tokens (t h w) takes one position in time and two across; the text goes on from the highest."""
    adapter, model = opened(tiny_vlms("qwen2_vl"))
    wide = adapter.prompt(model, {"prompt": "it", "images": [picture(1, (60, 30))]}, where="here")
    [(first, second)] = wide.spans(model.parts["image_token"])
    assert wide.positions is not None
    assert wide.positions[:, first].tolist() == [first] * 3 and wide.positions[:, second].tolist() == [first, first, first + 1]
    assert wide.positions[:, second + 1].tolist() == [first + 2] * 3
    batch = adapter.prepare(model, [ROWS[2]], step=0)
    assert batch.tensors["prompt_positions"].shape == (1, 1, 3, batch.tensors["prompt_ids"].shape[-1])


def test_a_beginning_of_sequence_token_stands_there_once(tiny_vlms: Folder, tmp_path: Path) -> None:
    """Where the tokenizer puts one (LLaVA-1.5), as the stock processor does."""
    folder = tmp_path / "with_begin"
    shutil.copytree(tiny_vlms("llava"), folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    adapter, model = opened(folder)
    prompt = adapter.prompt(model, ROWS[2]["condition"], where="here")
    parts = [{"type": "image"}, {"type": "text", "text": "describe"}]
    text = model.parts["processor"].apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    stock = model.parts["processor"](text=[text], images=[PICTURES[:1]])["input_ids"][0]
    assert prompt.ids == list(stock) and prompt.ids[0] == 1 and 1 not in prompt.ids[1:]


def test_one_prompt_and_its_pictures_are_in_a_batch_once(tiny_vlms: Folder) -> None:
    adapter, model = opened(tiny_vlms("llava"), branches=("chosen", "response", "image", "image+response", "context"))
    batch = adapter.prepare(model, ROWS, step=0)
    tensors = batch.tensors
    assert tensors["prompt_of"].tolist() == [[0, 0, 1, 1, 2]] * 4
    assert tensors["prompt_ids"].shape[:2] == (4, 3) and tensors["picture_key"].shape == (4, 3)
    assert tensors["prompt_pictures"][0].tolist() == [[0, 1], [0, 2], [0, 1]]
    assert tensors["prompt_pictures"][1].tolist() == [[0, 0], [0, 1], [0, 0]]
    assert batch.target.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 4
    [other] = adapter.prompt(model, {"prompt": "", "images": ROWS[2]["rejected_images"]}, where="x").pictures
    assert torch.equal(batches.inputs_of(tensors, 2, 1)["pixel_values"], other.inputs["pixel_values"])


def jpeg(cut: bool) -> bytes:
    stream = io.BytesIO()
    picture(0, (64, 64)).save(stream, "JPEG")
    return stream.getvalue()[: 300 if cut else None]


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "it"}
WRONG: dict[str, tuple[Any, str]] = {
    "more pictures": (
        {"messages": user(IMAGE, TEXT), "images": PICTURES},
        r"1 image placeholder\(s\) in the messages, and 2 image",
    ),
    "fewer pictures": ({"messages": user(IMAGE, IMAGE, TEXT), "images": PICTURES[:1]}, "2 image placeholder.*and 1 image"),
    "none at all": ({"messages": user(IMAGE, TEXT)}, "1 image placeholder.*and 0 image"),
    "cut short": ({"prompt": "it", "images": [PICTURES[0], jpeg(cut=True)]}, r"images\[1\]: the picture cannot be decoded"),
    "no picture": ({"prompt": "it", "images": [3]}, r"images\[0\]: expected a picture"),
    "no file": ({"prompt": "it", "images": ["gone.png"]}, r"images\[0\]: there is no file gone.png"),
    "written placeholder": ({"prompt": "it <image>", "images": PICTURES[:1]}, "1 image.s., and 2 placeholder.s. '<image>'"),
    "another part": ({"messages": user({"type": "video"}, TEXT)}, r"messages\[0\] has the part"),
    "no role": ({"messages": [{"content": "it"}]}, r"messages\[0\] is"),
    "no turns": ({"messages": []}, "messages is empty"),
    "nothing": ({"images": []}, "neither messages nor a prompt"),
    "a number": (3, "expected a prompt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_conditions_name_the_row(name: str, tiny_vlms: Folder) -> None:
    condition, words = WRONG[name]
    adapter, model = opened(tiny_vlms("llava"))
    row = {"pair_id": "row 7", "condition": condition, "chosen": "red", "rejected": "no"}
    with pytest.raises(UserError, match=f"pair row 7.*{words}"):
        adapter.prepare(model, [row], step=0)


def test_pictures_come_in_every_form(tiny_vlms: Folder, tmp_path: Path) -> None:
    """And a huge one is resized, not refused."""
    adapter, model = opened(tiny_vlms("qwen2_vl"))
    (tmp_path / "a.jpg").write_bytes(jpeg(cut=False))
    decoded = Image.open(tmp_path / "a.jpg")
    forms = [jpeg(cut=False), str(tmp_path / "a.jpg"), {"bytes": jpeg(cut=False), "path": None}, decoded]
    prompt = adapter.prompt(model, {"prompt": "it", "images": forms}, where="here")
    assert len({own.key for own in prompt.pictures}) == 1
    huge = Image.new("RGB", (6000, 5000))
    assert adapter.prompt(model, {"prompt": "it", "images": [huge]}, where="here").pictures[0].tokens <= 6


def test_nothing_is_cut(tiny_vlms: Folder) -> None:
    """A row that does not fit is told, and refused; image tokens count."""
    for settings, words in (
        ({"max_prompt_tokens": 40}, "the prompt: 46 tokens, more than max_prompt_tokens, 40"),
        ({"max_completion_tokens": 5}, "the longest answer: .* more than max_completion_tokens, 5"),
        ({"max_length": 50}, "prompt and longest answer: .* more than max_length, 50"),
    ):
        adapter, model = opened(tiny_vlms("llava_next"), **settings)
        wanted = 46 if "max_prompt_tokens" in settings else None
        first, *_ = adapter.lengths(model, ROWS[:1])
        assert first.reason is not None and (wanted is None or first.prompt > 40)
        with pytest.raises(UserError, match="pair two does not fit: " + words.replace("46", r"\d+")):
            adapter.prepare(model, ROWS[:1], step=0)
    adapter, model = opened(tiny_vlms("llava_next"))
    found = adapter.lengths(model, ROWS)
    assert [length.reason for length in found] == [None] * 4 and found[0].longest == found[0].prompt + max(found[0].completions)
    long = {"pair_id": "long", "condition": {"prompt": "red " * 2100}, "chosen": "red", "rejected": "no"}
    assert "more than the model's 2048 positions" in str(adapter.lengths(model, [long])[0].reason)


@pytest.mark.parametrize(
    ("family", "options", "cure"),
    [
        ("qwen2_5_vl", {"size": {"shortest_edge": 4 * 196, "longest_edge": 4 * 196}}, r"size: .*longest_edge.*max_pixels"),
        ("qwen3_vl", {"size": {"shortest_edge": 4 * 256, "longest_edge": 4 * 256}}, r"size: .*longest_edge.*max_pixels"),
        ("idefics3", {"do_image_splitting": False}, "do_image_splitting: false"),
        ("smolvlm", {"size": {"longest_edge": 28}}, "size: .longest_edge"),
        ("internvl", {"crop_to_patches": False}, "crop_to_patches: false"),
    ],
)
def test_a_prompt_that_is_long_by_its_pictures_names_what_makes_it_shorter(
    family: str, options: dict[str, Any], cure: str, tiny_vlms: Folder
) -> None:
    condition = {"prompt": "it", "images": [picture(0, (90, 50))]}
    row = {"pair_id": "p", "condition": condition, "chosen": "red", "rejected": "no"}
    adapter, model = opened(tiny_vlms(family))
    prompt = adapter.prompt(model, condition, where="x")
    tokens, limit = prompt.pictures[0].tokens, len(prompt.ids) - 1
    told = (
        rf"{tokens} of the tokens are image tokens of 1 picture of 90 x 50 pixels; fewer by prepare.picture_options, .*{cure}"
    )
    for key in ("max_prompt_tokens", "max_length"):
        short, _ = opened(tiny_vlms(family), **{key: limit})
        with pytest.raises(UserError, match=rf"pair p does not fit: .* tokens, more than {key}, {limit} \({told}"):
            short.prepare(model, [row], step=0)
    short, _ = opened(tiny_vlms(family), max_prompt_tokens=limit, picture_options=options)
    assert short.score(model, short.prepare(model, [row], step=0), None).values.isfinite().all()
    answers, _ = opened(tiny_vlms(family), max_completion_tokens=1)
    assert "image tokens" not in str(answers.lengths(model, [row])[0].reason)


def test_a_prompt_that_leaves_no_room_for_an_answer_names_its_pictures(tiny_vlms: Folder) -> None:
    adapter, model = opened(tiny_vlms("qwen2_5_vl"), max_new_tokens=2040)
    images = [picture(0, (90, 50)), picture(1)]
    with pytest.raises(
        UserError, match=r"tokens \(\d+ of the tokens are image tokens of 2 pictures, the largest of 90 x 50 .*max_new"
    ):
        adapter.sample(model, [{"prompt": "it", "images": images}], [0])


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tiles_that_the_model_cannot_join_are_refused(family: str, tiny_vlms: Folder) -> None:
    with pytest.raises(UserError, match=r"image_grid_pinpoints is \[\[28, 28\]\], and this model joins"):
        opened(tiny_vlms(family), picture_options={"image_grid_pinpoints": [[28, 28]]})
    adapter, model = opened(tiny_vlms(family), max_prompt_tokens=10)
    (reason,) = [found.reason for found in adapter.lengths(model, ROWS[:1])]
    assert reason is not None and "image tokens" in reason and "picture_options" not in reason


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "red"}, "rejected is None, and has to be text"),
        ({"chosen": "a <image>", "rejected": "no"}, "the answer holds the image placeholder '<image>'"),
        ({"chosen": "a", "rejected": "b", "branches": ("chosen", "image")}, "no rejected_images, which the branch image needs"),
        ({"chosen": "a", "rejected": "b", "branches": ("chosen", "context")}, "no rejected_messages"),
        ({"candidates": []}, "candidates is empty"),
        ({"chosen": "a", "rejected": "b", "target": (1.0,)}, "2 candidates but 1 values in target"),
    ],
)
def test_wrong_rows(row: dict[str, Any], words: str, tiny_vlms: Folder) -> None:
    branches = row.pop("branches", ("chosen", "response"))
    adapter, model = opened(tiny_vlms("llava"), branches=branches)
    with pytest.raises(UserError, match=f"pair p.*{words}"):
        adapter.prepare(model, [{"pair_id": "p", "condition": {"prompt": "it"}, **row}], step=0)


def test_rows_of_several_answers_and_of_one(tiny_vlms: Folder) -> None:
    adapter, model = opened(tiny_vlms("llava"))
    condition = ROWS[0]["condition"]
    rows = [{"pair_id": "k", "condition": condition, "candidates": ["a", "b", "c"], "target": (0.5, 0.5, 0.0)}]
    batch = adapter.prepare(model, rows, step=0)
    assert batch.target.tolist() == [[0.5, 0.5, 0.0]] and adapter.score(model, batch, None).values.shape[:2] == (1, 3)
    single = adapter.prepare(model, [{"pair_id": "1", "condition": condition, "completion": "a", "label": False}], step=0)
    assert single.desirable is not None and single.desirable.tolist() == [[False]]
    with pytest.raises(UserError, match="the same number of candidates"):
        adapter.prepare(model, [*rows, ROWS[0]], step=0)


def test_branches_and_settings() -> None:
    assert losing_in("chosen") == frozenset() and losing_in("image+response") == {"image", "response"}
    for wrong, words in (
        ({"branches": ("chosen", "picture")}, "the branch 'picture' is unknown"),
        ({"branches": ("image+response", "response+image")}, "each once"),
        ({"branches": ()}, "one or more"),
        ({"parts": ("head",)}, "parts is"),
        ({"rank": 0}, "rank is 0"),
        ({"top_p": 0.0}, "top_p is"),
        ({"temperature": -1.0}, "temperature is"),
        ({"dropout": 1.0}, "dropout is"),
        ({"targets": ()}, "targets is empty"),
    ):
        with pytest.raises(UserError, match=words):
            VlmModelSettings("base", **wrong)


def test_targets_that_a_part_does_not_have(tiny_vlms: Folder) -> None:
    adapter, model = opened(tiny_vlms("gemma3"), parts=("projector",))
    with pytest.raises(UserError, match="not in the projector of Gemma3ForConditionalGeneration.*none .train it as a whole"):
        adapter.trainable(model)
    adapter, model = opened(tiny_vlms("llava"), targets=("fc1",))
    with pytest.raises(UserError, match="not in the language of Llava.*q_proj"):
        adapter.trainable(model)
    chosen, model = opened(tiny_vlms("llava"), targets=("q_proj", "v_proj"))
    names = {name for name, weight in chosen.trainable(model).network.named_parameters() if weight.requires_grad}
    assert {name.split(".lora_")[0].split(".")[-1] for name in names} == {"q_proj", "v_proj"}


def test_an_unknown_family_goes_by_its_keys(tiny_vlms: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Separately, and says so; one whose token types may mean anything is refused."""
    for family in ("llava", "llava_next", "qwen2_5_vl", "internvl", "idefics3"):
        adapter, model = opened(tiny_vlms(family))
        known = adapter.score(model, adapter.prepare(model, ROWS, step=0), None)
        plain = unknown(model, family)
        assert plain.counting in ("grid", "alone")
        other = Model(model.network, {**model.parts, "family": plain}, model.identity)
        found = adapter.score(other, adapter.prepare(other, ROWS, step=0), None)
        assert torch.allclose(found.values, known.values, atol=1e-4)
        if family == "llava":
            assert "computed once for each answer, and not shared: llava is not among" in capsys.readouterr().err
        on = VlmAdapter(VlmModelSettings(str(tiny_vlms(family)), device="cpu", prefix_sharing="on"))
        with pytest.raises(UserError, match="prefix_sharing is on.*not among the families"):
            on.score(other, on.prepare(other, ROWS, step=0), None)
    with pytest.raises(UserError, match="takes token_type_ids, which mark pictures in one family"):
        unknown(opened(tiny_vlms("gemma3"))[1], "gemma3")


def unknown(model: Model, family: str) -> Family:
    """What the adapter makes of a family without its row in the table."""
    row = FAMILIES.pop(family)
    try:
        return family_of(model.network)
    finally:
        FAMILIES[family] = row


def test_a_model_that_lacks_what_pictures_need() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(UserError, match="lacks image_token_id in its configuration, get_image_features, mm_encoder_outputs or"):
        family_of(LlamaForCausalLM(LlamaConfig(**shape)))


def spoil(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil("config.json"), "no config.json"),
        (spoil("processor_config.json", "preprocessor_config.json"), "has no processor"),
        (spoil("model.safetensors"), "no .safetensors file"),
        (pickled, "a pickle.*AutoModelForImageTextToText"),
    ],
)
def test_a_folder_that_cannot_be_opened(change: Callable[[Path], None], words: str, tiny_vlms: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_vlms("llava"), folder)
    change(folder)
    with pytest.raises(UserError, match=words):
        opened(folder)


def test_other_bases_that_cannot_be_opened(tiny_vlms: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Allowed: tiny, a hub id, a transformers folder"):
        opened(Path("/no/such/folder"))
    folder = tmp_path / "copy"
    shutil.copytree(tiny_vlms("llava"), folder)
    (folder / "chat_template.jinja").unlink()
    adapter, model = opened(folder)
    with pytest.raises(UserError, match="pair two: the processor has no chat template"):
        adapter.prepare(model, ROWS[:1], step=0)


def test_smolvlms_own_processor(tiny_vlms: Folder, tmp_path: Path) -> None:
    """Its prompts are those of the one that the other tests give it."""
    pytest.importorskip("num2words")
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    adapter, model = opened(tiny_vlms("smolvlm"))
    known = model.parts["processor"]
    images = SmolVLMImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True)
    own = SmolVLMProcessor(images, known.tokenizer, SmolVLMVideoProcessor(), image_seq_len=4, chat_template=known.chat_template)
    other = Model(model.network, {**model.parts, "processor": own}, model.identity)
    first, second = (processing.prompt_of(one, ROWS[0]["condition"], where="here") for one in (model, other))
    assert first.ids == second.ids
