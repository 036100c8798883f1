"""What tells one family of vision-language models from another, beyond the keys that all have in common in transformers.

| family | image tokens of a picture | positions | types of tokens |
| --- | --- | --- | --- |
| LLaVA-1.5 | equally many for each (576 at 336 pixels) | 0, 1, 2, ... | |
| LLaVA-NeXT | by its size: whole picture, tiles, ends of rows | 0, 1, 2, ... | |
| LLaVA-OneVision | as NeXT if it is alone in its prompt, else equally many | 0, 1, 2, ... | |
| Qwen2-VL, 2.5, 3 | t h w / merge^2 of image_grid_thw | M-RoPE (3 axes) | mm_token_type_ids |
| InternVL | 256 for each tile; an end token behind | 0, 1, 2, ... | |
| SmolVLM, Idefics3 | 64 to 169 for each tile, tiles marked one by one | 0, 1, 2, ... | |
| Gemma3 | 256, or as many for each crop; they see one another | 0, 1, 2, ... | token_type_ids |

A family that is not here works as long as it follows the common keys: an image token in its configuration, features from
``get_image_features``, a forward pass that takes them. How many tokens each of several pictures has is then found by giving the
processor one picture at a time, and prompts are not shared: its pictures' tokens may see one another.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from polyalign.core.errors import UserError

Counting = Literal["even", "uncut", "grid", "ended", "whole_last", "alone"]
"""How the image tokens of a prompt are shared out among its pictures. ``even``: equally; ``uncut``: equally
where each is one row of pixels, else as ``alone``; ``grid``: by image_grid_thw; ``ended``:
a picture is a run of them; ``whole_last``: a picture's last run is that of the whole, behind a token of its own; ``alone``: by
what the processor makes of each picture alone."""

GRID = "image_grid_thw"
FEATURES = "mm_encoder_outputs"


@dataclass(frozen=True)
class Family:
    """How a family counts, and what it is called with besides ids and pixels.

    ``several_differ``: with several pictures in a prompt each is cut otherwise than alone. ``types``: the argument that marks
    image tokens. ``mutual``: a picture's tokens see one another. ``tested``: the tests show that shared prompts give what
    separate ones give. ``takes_features``: the forward pass takes what the vision tower has made. ``fewer``: the options of its
    image processor that give a picture fewer tokens.
    """

    name: str
    counting: Counting = "alone"
    several_differ: bool = False
    types: str | None = None
    axes: int = 1
    mutual: bool = False
    tested: bool = True
    takes_features: bool = True
    fewer: str = ""


_LLAVA = Family("llava", "even")
_QWEN = Family(
    "qwen",
    "grid",
    types="mm_token_type_ids",
    axes=3,
    fewer="size: {shortest_edge: ..., longest_edge: ...}, its least and most pixels (min_pixels and max_pixels)",
)
_TILED = Family("idefics3", "whole_last", fewer="do_image_splitting: false, or a smaller size: {longest_edge: ...}")
FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "llava_next": Family("llava_next", "alone"),
    "llava_onevision": Family("llava_onevision", "even", several_differ=True),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "internvl": Family("internvl", "ended", fewer="crop_to_patches: false, or a smaller max_patches"),
    "smolvlm": _TILED,
    "idefics3": _TILED,
    "gemma3": Family("gemma3", "uncut", types="token_type_ids", mutual=True, fewer="do_pan_and_scan: false"),
}
"""By ``model_type``."""

LANGUAGE = ("language_model", "text_model")
VISION = ("vision_tower", "visual", "vision_model")
PROJECTOR = ("multi_modal_projector", "connector", "aligner", "merger", "deepstack_merger_list", "image_newline")
"""Names of the parts inside a model, the projector also inside of the vision tower."""


def family_of(network: Any) -> Family:
    """The family of a network, or what its own keys say of one that is not known.

    Raises:
        UserError: something is missing that pictures need, with its name; or something is there that has no one meaning.
    """
    config = network.config
    arguments = inspect.signature(network.forward).parameters
    missing = []
    if image_token_of(config) is None:
        missing.append("image_token_id in its configuration")
    if not hasattr(network, "get_image_features"):
        missing.append("get_image_features")
    if network.get_output_embeddings() is None:
        missing.append("an LM head")
    if FEATURES not in arguments and "pixel_values" not in arguments:
        missing.append(f"{FEATURES} or pixel_values in its forward pass")
    if missing:
        raise UserError(
            f"{type(network).__name__} ({config.model_type}) cannot be used as a vision-language model here; it lacks "
            f"{', '.join(missing)}. Tested families: {', '.join(FAMILIES)}"
        )
    known = FAMILIES.get(config.model_type) or _by_its_keys(network, arguments)
    return replace(known, takes_features=FEATURES in arguments)


def _by_its_keys(network: Any, arguments: Any) -> Family:
    grid = GRID in arguments
    if "token_type_ids" in arguments:
        raise UserError(
            f"{type(network).__name__} ({network.config.model_type}) takes token_type_ids, which mark pictures in one family "
            f"and prompts in another, and this family is not known here. Tested families: {', '.join(FAMILIES)}"
        )
    types = "mm_token_type_ids" if "mm_token_type_ids" in arguments else None
    axes = 3 if hasattr(inner(network), "get_rope_index") else 1
    if axes == 3 and not grid:
        raise UserError(
            f"{type(network).__name__} ({network.config.model_type}) has positions of its own for pictures (get_rope_index) "
            f"and no {GRID} to take them from. Tested families: {', '.join(FAMILIES)}"
        )
    return Family(network.config.model_type, "grid" if grid else "alone", types=types, axes=axes, tested=False)


def image_token_of(config: Any) -> int | None:
    """The id that stands in a prompt where a picture's features are put."""
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found


def inner(network: Any) -> Any:
    """The model under the LM head."""
    return getattr(network, "model", network)


def prefixes(network: Any) -> dict[str, list[str]]:
    """Names of the modules that make up each part (language, projector, vision).

    Raises:
        UserError: no language tower, or no vision tower, under any of the usual names.
    """
    body = inner(network)
    stem = "model." if body is not network else ""
    children = dict(body.named_children()) | {name: None for name, _ in body.named_parameters(recurse=False)}
    language = [stem + name for name in LANGUAGE if name in children]
    tower = [name for name in VISION if name in children]
    if not language or not tower:
        raise UserError(
            f"{type(network).__name__}: no {'language' if not language else 'vision'} tower is found under "
            f"{', '.join(LANGUAGE if not language else VISION)}; its parts are {', '.join(children)}. Tested families: "
            f"{', '.join(FAMILIES)}"
        )
    vision, projector = [], [stem + name for name in PROJECTOR if name in children]
    for name in tower:
        module = children[name]
        assert isinstance(module, nn.Module)
        inside = [part for part, _ in module.named_children()]
        vision += [f"{stem}{name}.{part}" for part in inside if part not in PROJECTOR]
        projector += [f"{stem}{name}.{part}" for part in inside if part in PROJECTOR]
    return {"language": language, "projector": projector, "vision": vision}


def stands_still(network: Any) -> bool:
    """Whether tower and projector are those of the base: nothing in them is trained, and no LoRA is on them."""
    parts = prefixes(network)
    stems = tuple(parts["vision"] + parts["projector"])
    inside = ((name, weight) for name, weight in network.named_parameters() if name.startswith(stems))
    return not any(weight.requires_grad or ".lora_" in name for name, weight in inside)
