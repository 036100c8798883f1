"""Losing images and losing contexts for rows of conversations: what MCM-DPO, CHiP and mDPO set beside the right ones.

| method | losing image |
| --- | --- |
| MCM-DPO (its script) | diffused to step 700 |
| CHiP | diffused to step 500 |
| mDPO (its paper) | a crop that keeps up to a fifth of the area |

The losing context of MCM-DPO is the whole question of another row; image and answers stay. Every draw is keyed by the row, so a
negative is the same in every epoch, as it is in the originals.

Known differences: the original draws the other row from Python's generator seeded with the row's number
(:func:`official_other`), and may draw a row that has the same text; here it has another. Its crops are at most 240 wide and 320
high, since it exchanges the two; here they are 320 by 240. Its "black" image is all zeros *after* normalisation, which is the
mean colour and is called ``blanked`` here. It diffuses what the processor made (:func:`diffused`); a stored picture
(:func:`diffused_picture`) loses what falls outside 0 to 255.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.core.randomness import rng, seed_of
from polyalign.datasets.multi_image.rows import IMAGE, check_row, count_images
from polyalign.datasets.pictures import fingerprint
from polyalign.modalities.vlm.negative_config import STEPS, ImageNegativeConfig, NegativesConfig

Row = Mapping[str, Any]

TRIES = 64
SAMPLING_NOISE: Mapping[str, float] = {"grid": 225.0, "picture_in_picture": 49.0}
"""Standard deviation, by format, in MIA-DPO's released code (:func:`noised_for_sampling`)."""


@lru_cache(maxsize=1)
def _kept() -> tuple[Tensor, Tensor]:
    """(1000,) sqrt(abar_t) and sqrt(1 - abar_t) of betas sigmoid(-6 .. 6) * (5e-3 - 1e-5) + 1e-5, the schedule of visual
    contrastive decoding (arXiv 2311.16922), in float32 as in the originals."""
    betas = torch.sigmoid(torch.linspace(-6, 6, STEPS)) * (5e-3 - 1e-5) + 1e-5
    alphas_bar = torch.cumprod(1 - betas, dim=0)
    return alphas_bar.sqrt(), (1 - alphas_bar).sqrt()


def diffused(pixels: Tensor, noise: Tensor, step: int) -> Tensor:
    """sqrt(abar_t) x + sqrt(1 - abar_t) eps, x being normalised pixels of any shape and eps noise of the same.

    Raises:
        UserError: a step that there is not.
    """
    if not 0 <= step < STEPS:
        raise UserError(f"step: diffusion has the steps 0 to {STEPS - 1}, found {step}")
    signal, spread = (float(values[step]) for values in _kept())
    return signal * pixels + spread * noise


def noise_for(pixels: Tensor, *, seed: int, key: str) -> Tensor:
    """Standard normal noise of the shape of ``pixels``, the same for a key on every machine."""
    drawn = torch.randn(pixels.shape, generator=rng(seed, "negative image", key))
    return drawn.to(device=pixels.device, dtype=pixels.dtype)


def diffused_picture(picture: Image.Image, config: ImageNegativeConfig, *, seed: int, key: str) -> Image.Image:
    """A picture noised in the processor's units and brought back to 8 bits."""
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    pixels = (torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255 - mean) / std
    noisy = diffused(pixels, noise_for(pixels, seed=seed, key=key), config.step) * std + mean
    return Image.fromarray((noisy * 255).round().clamp(0, 255).to(torch.uint8).numpy())


def cropped(picture: Image.Image, config: ImageNegativeConfig, draws: np.random.Generator) -> Image.Image:
    """A part of the picture, from anywhere in it; a picture that is smaller than the crop loses nothing, which
    :func:`loser_of` refuses."""
    if config.area is None:
        width, height = (min(full, most) for full, most in zip(picture.size, config.crop, strict=True))
    else:
        side = math.sqrt(draws.uniform(0.0, config.area))
        width, height = (max(2, int(full * side)) for full in picture.size)
    left = int(draws.integers(picture.width - width + 1))
    top = int(draws.integers(picture.height - height + 1))
    return picture.crop((left, top, left + width, top + height))


def rotated(picture: Image.Image, config: ImageNegativeConfig, draws: np.random.Generator) -> Image.Image:
    """Turned about its middle in a frame of the same size, black where nothing is left."""
    return picture.rotate(float(draws.uniform(*config.degrees)), fillcolor=(0, 0, 0))


def blanked(picture: Image.Image, config: ImageNegativeConfig) -> Image.Image:
    """One colour, the mean that the processor takes away."""
    return Image.new("RGB", picture.size, tuple(round(255 * part) for part in config.mean))


def image_negative(picture: Image.Image, config: ImageNegativeConfig, *, seed: int, key: str) -> Image.Image:
    """The losing image of a picture, by every kind but ``swapped``, which needs other rows (:func:`with_negatives`).

    Args:
        key: names the row and the picture.
    """
    draws = np.random.default_rng(seed_of(seed, "negative image", config.kind, key))
    plain = picture.convert("RGB")
    made: dict[str, Callable[[], Image.Image]] = {
        "diffused": lambda: diffused_picture(plain, config, seed=seed, key=key),
        "cropped": lambda: cropped(plain, config, draws),
        "rotated": lambda: rotated(plain, config, draws),
        "blanked": lambda: blanked(plain, config),
    }
    if config.kind not in made:
        raise UserError(f"kind {config.kind}: no negative of a picture alone; those are {', '.join(made)}")
    return made[config.kind]()


def noised_for_sampling(condition: Row, *, seed: int, key: str, std: float | None = None) -> list[Image.Image]:
    """The images as MIA-DPO's released code shows them to the model that gives the rejected answer: normal noise on the
    target's cell of a collage (standard deviation 225 of 255), or on all of a picture in picture (49); a sequence stays clean.
    The pair is then trained with the clean images, and the paper does not speak of it.

    The original finds the cell as an even part of the picture, beside the real one; its noise on a picture in picture wraps
    round at 0 and 255. Here the cell is the real one and noise is cut off.

    Args:
        condition: of a row of :mod:`polyalign.datasets.multi_image`.
        std: standard deviation in steps of 255; None is the released one.
    """
    images, layout = list(condition["images"]), condition["layout"]
    spread = SAMPLING_NOISE.get(layout["format"], 0.0) if std is None else std
    if not spread:
        return images
    for target in layout["targets"]:
        place = layout["places"][target]
        picture = images[place["image"]]
        box = place.get("cell", (0, 0, *picture.size))
        pixels = np.array(picture)
        part = torch.from_numpy(pixels[box[1] : box[3], box[0] : box[2]]).float()
        noisy = part + spread * noise_for(part, seed=seed, key=f"sampling {key} {target}")
        pixels[box[1] : box[3], box[0] : box[2]] = noisy.round().clamp(0, 255).to(torch.uint8).numpy()
        images[place["image"]] = Image.fromarray(pixels)
    return images


def with_negatives(
    rows: Sequence[Row],
    *,
    seed: int,
    image: ImageNegativeConfig | None = None,
    context: bool = False,
    compat: bool = False,
) -> Iterator[dict[str, Any]]:
    """Every row with ``rejected_images`` (if ``image`` is given) and ``rejected_messages`` (if ``context``).

    In a row with a layout, only the images that the answer depends on lose; in another, all.

    Args:
        rows: checked, each with ``condition`` and ``chosen``; opened one at a time.
        compat: other rows are drawn as the original draws them.

    Raises:
        UserError: a row that is wrong, or no other row to take from.
    """
    config = NegativesConfig.model_construct(image=image, context=context, compat=compat)
    for index in range(len(rows)):
        yield loser_of(rows, index, config, seed=seed)


def loser_of(rows: Sequence[Row], index: int, negatives: NegativesConfig, *, seed: int) -> dict[str, Any]:
    """One row with what loses; it depends on ``rows`` and ``index`` alone. See :func:`with_negatives`."""
    row = dict(rows[index])
    where = str(row.get("pair_id", f"row {index}"))
    check_row(row, where)
    if negatives.image is not None:
        row["rejected_images"] = _losing_images(rows, index, row, negatives.image, seed, negatives.compat)
        _refuse_equal(row["condition"]["images"], row["rejected_images"], negatives.image, where)
    if negatives.context:
        other = rows[_other(rows, index, seed, "context", negatives.compat, _with_other_words(_words(row)))]
        row["rejected_messages"] = context_negative(row["condition"], other["condition"])
    check_row(row, where)
    return row


def _refuse_equal(
    images: Sequence[Image.Image], losing: Sequence[Image.Image], config: ImageNegativeConfig, where: str
) -> None:
    """Raises UserError where nothing was taken from any picture, so that the same would win and lose."""
    if any(fingerprint(one) != fingerprint(other) for one, other in zip(images, losing, strict=True)):
        return
    width, height = images[0].size
    cure = {
        "cropped": f"it is {width} x {height}, not larger than the crop, {config.crop[0]} x {config.crop[1]}. Set "
        "pairs.negatives.image.area, the largest part that is kept (0.2 is mDPO's)",
        "blanked": "it has that one colour already. Leave the pair out, or take kind: diffused",
    }.get(config.kind, "it looks the same afterwards. Leave the pair out, or take kind: diffused")
    raise UserError(f"{where}: the losing picture ({config.kind}) is the picture itself: {cure}")


def _with_other_words(words: str) -> Callable[[Row], bool]:
    return lambda other: _words(other) != words


def _losing_images(
    rows: Sequence[Row], index: int, row: Row, config: ImageNegativeConfig, seed: int, compat: bool
) -> list[Image.Image]:
    images = list(row["condition"].get("images") or ())
    if not images:
        raise UserError(f"{row.get('pair_id', f'row {index}')}: no image, and a losing image is asked for")
    losing = _depended_on(row["condition"], len(images))
    if config.kind != "swapped":
        named = str(row.get("pair_id", index))
        return [
            image_negative(picture, config, seed=seed, key=f"{named} {place}") if place in losing else picture
            for place, picture in enumerate(images)
        ]
    shown = {fingerprint(picture) for picture in images}

    def fits(other: Row) -> bool:
        found = _first_images(other, len(losing))
        return len(found) == len(losing) and not any(fingerprint(picture) in shown for picture in found)

    other = _other(rows, index, seed, "image", compat, fits)
    given = _first_images(rows[other], len(losing))
    if len(given) < len(losing):  # only where the original's draw is taken as it is
        raise UserError(f"row {index}: {len(losing)} image(s) are to be swapped, and the drawn row {other} has {len(given)}")
    taken = iter(given)
    return [next(taken) if place in losing else picture for place, picture in enumerate(images)]


def _depended_on(condition: Row, count: int) -> set[int]:
    """Which images the answer depends on: those of the targets, or all."""
    layout = condition.get("layout")
    return set(range(count)) if layout is None else {layout["places"][target]["image"] for target in layout["targets"]}


def _first_images(row: Row, count: int) -> list[Image.Image]:
    """At most ``count`` images of a row."""
    images: list[Image.Image] = list(row["condition"].get("images") or ())
    return images[:count]


def _words(row: Row) -> str:
    """All text of a prompt."""
    contents = [message["content"] for message in row["condition"]["messages"]]
    parts = [[{"type": "text", "text": content}] if isinstance(content, str) else content for content in contents]
    return "\n".join(part["text"] for content in parts for part in content if part["type"] == "text")


def context_negative(condition: Row, other: Row) -> list[dict[str, Any]]:
    """The messages of ``other`` with places for as many images as ``condition`` has: as they are where they have so many,
    otherwise all images in front and the text behind."""
    wanted, messages = count_images(condition["messages"]), other["messages"]
    if count_images(messages) == wanted:
        return [dict(message) for message in messages]
    texts = [
        message["content"] if isinstance(message["content"], str) else [p for p in message["content"] if p["type"] == "text"]
        for message in messages
    ]
    first = [{"type": "text", "text": texts[0]}] if isinstance(texts[0], str) else texts[0]
    contents = [[dict(IMAGE)] * wanted + list(first), *texts[1:]]
    return [{"role": message["role"], "content": content} for message, content in zip(messages, contents, strict=True)]


def _other(rows: Sequence[Row], index: int, seed: int, purpose: str, compat: bool, fits: Callable[[Row], bool]) -> int:
    """Another row that fits, drawn by key: tried at random first, then one after another, so that one is found if there is."""
    count = len(rows)
    if compat:
        return official_other(index, count)
    draws = np.random.default_rng(seed_of(seed, "negative", purpose, index))
    tried = [int(place) for place in draws.integers(count, size=TRIES)]
    start = int(draws.integers(count))
    for place in (*tried, *((start + step) % count for step in range(count))):
        if place != index and fits(rows[place]):
            return place
    raise UserError(f"row {index}: none of the other {count - 1} row(s) has another {purpose} to take as the losing one")


def official_other(index: int, count: int) -> int:
    """The other row as MCM-DPO's code draws it: Python's generator seeded with the row's number, anew while it is the row.

    Raises:
        UserError: there is no other row.
    """
    if count < 2:
        raise UserError(f"{count} row(s); a losing context or image is taken from another row")
    generator = random.Random(index)
    while True:
        drawn = generator.choice(range(count))
        if drawn != index:
            return drawn
