"""From conversations with pictures to ids and the tensors that a family's vision tower takes, through its own processor.

A condition is ``{"messages": [...], "images": [...]}``: turns whose content is text, or a list of parts ``{"type": "image"}``
and ``{"type": "text", "text": ...}``, and the pictures in the order of their parts. One with ``prompt`` and ``images`` is one
user turn, pictures first. The prompt is the chat template's rendering with the generation prompt, its pictures expanded by the
processor; what it puts before a text (a beginning-of-sequence token) stands there once. Nothing is ever cut.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.datasets.pictures import fingerprint
from polyalign.modalities import token_rows
from polyalign.modalities.picture_contents import content_of, decode
from polyalign.modalities.token_rows import completion_after, ends_after
from polyalign.modalities.vlm.families import GRID, Family
from polyalign.modalities.vlm.spans import ended_counts, spans_of, whole_last_counts

SEVERAL = "batch_num_images"
"""LLaVA-OneVision's count of the pictures in a prompt, which decides how each is cut."""

TEXTUAL = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "num_crops", "num_patches"})
"""What a processor gives besides tensors of pictures."""


@dataclass(frozen=True)
class Picture:
    """A picture as its vision tower takes it. ``key`` is of its pixels and of how it is cut; ``inputs`` are the arguments of
    ``get_image_features`` for it alone; ``tokens`` how many it has in a prompt; ``size`` its width and height as given."""

    key: int
    inputs: Mapping[str, Tensor]
    tokens: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, pictures expanded, its pictures in order, and its positions (axes, P) where they are not 0, 1, 2, ..."""

    ids: list[int]
    pictures: tuple[Picture, ...] = ()
    positions: Tensor | None = field(default=None, compare=False)

    def spans(self, token: int) -> list[list[int]]:
        """The positions of each picture's tokens; ``token`` is the image token (``model.parts["image_token"]``)."""
        return spans_of(self.ids, token, [picture.tokens for picture in self.pictures])


@dataclass(frozen=True)
class Asked:
    """A condition checked: its turns, contents as lists of parts, and its pictures, as files' bytes where they are such."""

    messages: list[dict[str, Any]]
    images: list[bytes | Image.Image]

    def opened(self, *, where: str) -> list[Image.Image]:
        """The pictures, decoded.

        Raises:
            UserError: a damaged one.
        """
        return [decode(content, where=f"{where}, images[{place}]") for place, content in enumerate(self.images)]


def asked_of(condition: Any, *, where: str) -> Asked:
    """The turns and pictures of a condition.

    Raises:
        UserError: no turns, a turn or part of another kind, another number of pictures than of their places, or no picture.
    """
    turns, given = _conversation(condition, where)
    return Asked(turns, [content_of(image, where=f"{where}, images[{place}]") for place, image in enumerate(given)])


def _conversation(condition: Any, where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """The turns of a condition, and as many pictures as these have places for, as they were given."""
    condition = {"prompt": condition} if isinstance(condition, str) else condition
    if not isinstance(condition, Mapping):
        raise UserError(f"{where}: the condition is {condition!r}; expected a prompt, or a mapping with messages and images")
    given = list(condition.get("images") or ())
    messages = condition.get("messages")
    if messages is None:
        if not isinstance(condition.get("prompt"), str):
            raise UserError(f"{where}: the condition has neither messages nor a prompt; an empty prompt is written ''")
        parts = [*({"type": "image"} for _ in given), {"type": "text", "text": condition["prompt"]}]
        messages = [{"role": "user", "content": parts}]
    turns = [_turn(turn, place, where) for place, turn in enumerate(messages)]
    if not turns:
        raise UserError(f"{where}: messages is empty; give the turns before the answer, or a prompt")
    places = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    if places != len(given):
        raise UserError(
            f"{where}: {places} image placeholder(s) in the messages, and {len(given)} image(s); each image needs one part "
            '{"type": "image"}, in order'
        )
    return turns, given


def _turn(turn: Any, place: int, where: str) -> dict[str, Any]:
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or not isinstance(content, str | Sequence):
        raise UserError(f"{where}: messages[{place}] is {turn!r}; a turn has a role and a content, text or a list of parts")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    found = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            found.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            found.append({"type": "text", "text": part["text"]})
        else:
            raise UserError(
                f"{where}: messages[{place}] has the part {part!r}; allowed: "
                '{"type": "image"}, whose picture is in images, and {"type": "text", "text": ...}'
            )
    return {"role": turn["role"], "content": found}


def prompt_of(model: Model, condition: Any, *, where: str, options: Mapping[str, Any] | None = None) -> Prompt:
    """The ids and pictures of a condition.

    Args:
        options: of the image processor.

    Raises:
        UserError: as :func:`asked_of`; a chat template that does not fit; a text that holds the image placeholder itself.
    """
    return prompt_asked(model, asked_of(condition, where=where), where=where, options=options)


def prompt_asked(model: Model, asked: Asked, *, where: str, options: Mapping[str, Any] | None = None) -> Prompt:
    """As :func:`prompt_of`, of a condition that has been checked."""
    images = asked.opened(where=where)
    text = rendered(model, asked.messages, True, where=where)
    _refuse_written_placeholders(model, text, len(images), where)
    ids, inputs = _processed(model, text, images, options or {}, where)
    counts = _counts(model, ids, inputs, images, options or {}, where)
    family: Family = model.parts["family"]
    pictures = _pictures(family, inputs, counts, images, options or {}, where)
    begin = model.parts["begin"]
    ids = ids if ids[: len(begin)] == begin else [*begin, *ids]
    return Prompt(ids, pictures, _positions(model, ids, pictures))


def tell_image_tokens(model: Model, prompt: Prompt) -> str:
    """How much of a prompt its pictures are, and what makes it less: the end of a sentence about a prompt that is too long.
    Empty without pictures."""
    if not prompt.pictures:
        return ""
    number, tokens = len(prompt.pictures), sum(picture.tokens for picture in prompt.pictures)
    width, height = max(prompt.pictures, key=lambda picture: picture.tokens).size
    fewer = model.parts["family"].fewer
    cure = f"; fewer by prepare.picture_options, {fewer}" if fewer else ""
    what = "1 picture" if number == 1 else f"{number} pictures, the largest"
    return f" ({tokens} of the tokens are image tokens of {what} of {width} x {height} pixels{cure})"


def completion_of(model: Model, condition: Any, answer: str, append_eos: bool, *, where: str) -> list[int]:
    """The ids that the conversation has after the prompt's: the answer and the end of its turn.

    They are found with pictures left as single placeholders, which are tokens of their own and touch no answer.

    Raises:
        UserError: a chat template that rewrites the prompt once there is an answer, or an answer with an image token.
    """
    tokenizer, messages = model.parts["tokenizer"], asked_of_text(condition, where=where)
    turns = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    before, after = rendered(model, messages, True, where=where), rendered(model, turns, False, where=where)
    prompt, full = (list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in (before, after))
    template = model.parts["processor"].chat_template
    ids = completion_after(model, prompt, full, append_eos, template=template, where=where)
    if model.parts["image_token"] in ids or model.parts["placeholder"] in answer:
        raise UserError(f"{where}: the answer holds the image placeholder {model.parts['placeholder']!r}; answers are text")
    return ids


def asked_of_text(condition: Any, *, where: str) -> list[dict[str, Any]]:
    """The turns of a condition without looking at its pictures."""
    return _conversation(condition, where)[0]


def ends_of(model: Model, condition: Any, *, where: str) -> frozenset[int]:
    """The ids that end an answer to a condition."""
    messages = asked_of_text(condition, where=where)
    turns = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    return ends_after(model, rendered(model, messages, True, where=where), rendered(model, turns, False, where=where))


def rendered(model: Model, messages: list[dict[str, Any]], generation: bool, *, where: str) -> str:
    """The chat template's text, a placeholder for each picture."""
    lacking = (
        "the processor has no chat template, which says where pictures and turns stand. Give one with "
        "chat_template (a jinja file)."
    )
    return token_rows.rendered(model.parts["processor"], messages, generation, lacking=lacking, where=where)


def _refuse_written_placeholders(model: Model, text: str, images: int, where: str) -> None:
    found = text.count(model.parts["placeholder"])
    if found != images:
        raise UserError(
            f"{where}: {images} image(s), and {found} placeholder(s) {model.parts['placeholder']!r} in the prompt as the chat "
            "template writes it: a text holds the placeholder itself, or the template leaves parts of type image out. Give "
            'images as parts {"type": "image"}, or another chat_template'
        )


def _processed(
    model: Model, text: str, images: list[Image.Image], options: Mapping[str, Any], where: str
) -> tuple[list[int], dict[str, Tensor]]:
    """Ids, pictures expanded, and the pictures' tensors, of one prompt."""
    pictures: dict[str, Any] = {"images": [images], **options} if images else {}
    try:
        found = model.parts["processor"](text=[text], add_special_tokens=False, return_tensors="pt", verbose=False, **pictures)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        raise UserError(f"{where}: the processor refuses the prompt with {len(images)} image(s) ({sizes}): {reason}") from error
    inputs = {name: value for name, value in found.items() if name not in TEXTUAL and isinstance(value, Tensor)}
    return found["input_ids"][0].tolist(), inputs


def _counts(
    model: Model,
    ids: list[int],
    inputs: Mapping[str, Tensor],
    images: list[Image.Image],
    options: Mapping[str, Any],
    where: str,
) -> list[int]:
    """How many tokens each picture has."""
    token, family = model.parts["image_token"], model.parts["family"]
    total, number = ids.count(token), len(images)
    if number <= 1:
        counts = [total] * number
    elif family.counting == "even" or (family.counting == "uncut" and len(inputs["pixel_values"]) == number):
        counts = [total // number] * number
    elif family.counting == "grid" and GRID in inputs:
        cells = inputs[GRID].prod(-1).tolist()
        counts = [total * cell // sum(cells) for cell in cells]
    elif family.counting == "ended":
        counts = ended_counts(ids, token)
    elif family.counting == "whole_last":
        counts = whole_last_counts(ids, token, model.parts["whole_token"])
    else:
        alone = model.parts["placeholder"]
        counts = [_processed(model, alone, [image], options, where)[0].count(token) for image in images]
    if len(counts) != number or sum(counts) != total or min(counts, default=1) == 0:
        raise UserError(
            f"{where}: {number} image(s) have {total} image tokens in the prompt, and they cannot be told apart (counted "
            f"{counts}). The processor's settings are not those of its family ({family.name})"
        )
    return counts


def _pictures(
    family: Family,
    inputs: Mapping[str, Tensor],
    counts: list[int],
    images: list[Image.Image],
    options: Mapping[str, Any],
    where: str,
) -> tuple[Picture, ...]:
    """Each picture's own part of the tensors."""
    found, several = [], family.several_differ and len(images) > 1
    parts = _split(inputs, counts, where)
    for image, count, own in zip(images, counts, parts, strict=True):
        named = f"{fingerprint(image)} {several} {json.dumps(dict(options), sort_keys=True)}".encode()
        key = int.from_bytes(hashlib.sha256(named).digest()[:8], "big") >> 1
        found.append(Picture(key, own, count, image.size))
    return tuple(found)


def _split(inputs: Mapping[str, Tensor], counts: list[int], where: str) -> list[dict[str, Tensor]]:
    """Tensors of several pictures as those of each: patches by the grid, one row each, or tiles in the share of the tokens."""
    number = len(counts)
    if number == 0:
        return []
    patches = inputs[GRID].prod(-1).tolist() if GRID in inputs else None
    parts: list[dict[str, Tensor]] = [{} for _ in counts]
    for name, tensor in inputs.items():
        if name == SEVERAL:
            pieces: Sequence[Tensor] = [tensor] * number
        elif tensor.shape[0] == number and (patches is None or name == GRID):
            pieces = tensor.split(1)
        elif patches is not None and tensor.shape[0] == sum(patches):
            pieces = tensor.split(patches)
        else:
            nested = tensor.shape[0] == 1  # (1, tiles, ...), a prompt in a batch of one
            tiles = tensor[0] if nested else tensor
            shares = [count * len(tiles) / sum(counts) for count in counts]
            if any(share != int(share) for share in shares):
                raise UserError(
                    f"{where}: {name} of shape {tuple(tensor.shape)} cannot be shared out among {number} images with {counts} "
                    f"tokens: it is neither one row each, nor patches of {GRID}, nor tiles of equally many tokens"
                )
            pieces = [piece.unsqueeze(0) if nested else piece for piece in tiles.split([int(share) for share in shares])]
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return parts


def _positions(model: Model, ids: list[int], pictures: Sequence[Picture]) -> Tensor | None:
    """Positions (axes, P) as the model itself has them; None where they are 0, 1, 2, ..."""
    if model.parts["family"].axes == 1:
        return None
    if not pictures:
        return torch.arange(len(ids)).expand(model.parts["family"].axes, -1)
    row = torch.tensor([ids])
    types = (row == model.parts["image_token"]).int()
    grid = torch.cat([picture.inputs[GRID] for picture in pictures])
    found, _ = model.parts["rope_index"](input_ids=row, mm_token_type_ids=types, image_grid_thw=grid)
    return found[:, 0]
