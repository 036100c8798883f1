"""Loading a vision-language model of transformers and its processor from a hub id or a folder, or the embedded base. How
weights are read and dropout switched off stands in :mod:`polyalign.modalities.transformers_folders`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.modalities.base_folders import refuse_what_is_no_base
from polyalign.modalities.transformers_folders import (
    config_without_noise,
    first_line,
    model_hash,
    place_of,
    quiet,
    read_network,
    read_template,
    refuse_larger_tokenizer,
    tokenizer_parts,
)
from polyalign.modalities.vlm.config import TINY_BASE
from polyalign.modalities.vlm.families import family_of, image_token_of, inner
from polyalign.modalities.vlm.settings import VlmModelSettings

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
MORE_FILES = (*PROCESSOR_FILES, "video_preprocessor_config.json")


TILES = "image_grid_pinpoints"
"""LLaVA-NeXT's and OneVision's sizes that a picture may be cut in, which the model reads from its configuration."""


def load(settings: VlmModelSettings) -> Model:
    """The model of ``settings.base``, frozen, in evaluation mode, on its device.

    ``parts``: ``processor``, ``family``; ``image_token``, the id that pictures are put at, and ``placeholder``, what stands for
    a picture in a prompt before it is expanded; ``tokenizer`` and what :func:`tokenizer_parts` says of it; ``positions``, how
    many the language model has, or None; ``rope_index`` of families with positions on several axes; ``config_noise``, the
    dropout values that the base's configuration had; ``picture_options``, of the settings.

    Raises:
        UserError: nothing there, no processor, weights in pickles or damaged, code of its own, a model without pictures, or 4
        bits without CUDA.
    """
    folder, name, version = place_of(settings, TINY_BASE, "polyalign-tiny-vlm")
    refuse_what_is_no_base(folder, opened_by="AutoModelForImageTextToText", beside="AutoProcessor")
    identity = f"{name}@{version or f'sha256:{model_hash(folder, *MORE_FILES)}'}"
    with quiet():
        config, noise = config_without_noise(folder)
        processor = _processor(folder)
    if settings.chat_template is not None:
        processor.chat_template, digest = read_template(Path(settings.chat_template).expanduser())
        identity += f"+template@sha256:{digest}"
    with quiet():
        network = read_network(AutoModelForImageTextToText, folder, config, settings)
    _refuse_other_tiles(config, settings)
    more = {"config_noise": noise, "picture_options": dict(settings.picture_options)}
    return Model(network, {**parts_of(network, processor, folder), **more}, identity)


def _refuse_other_tiles(config: Any, settings: VlmModelSettings) -> None:
    """Raises UserError for tiles that the model does not know how to put together again."""
    asked, own = settings.picture_options.get(TILES), getattr(config, TILES, None)
    if asked is not None and own is not None and [list(one) for one in asked] != [list(one) for one in own]:
        raise UserError(
            f"picture_options: {TILES} is {asked}, and this model joins the tiles of a picture by its configuration's own, "
            f"{own}. Leave it out, or take a base whose config.json has these"
        )


def parts_of(network: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """What ``load`` says of a model's parts.

    Raises:
        UserError: processor and model do not belong together, or the model has no place for pictures.
    """
    family, tokenizer = family_of(network), processor.tokenizer
    refuse_larger_tokenizer(network, tokenizer, folder)
    token, placeholder = image_token_of(network.config), getattr(processor, "image_token", None)
    if placeholder is None:
        raise UserError(
            f"{type(processor).__name__} in {folder} has no image_token, which says where a picture stands in a prompt. Take "
            "the processor of a model that is opened by AutoModelForImageTextToText"
        )
    parts = tokenizer_parts(network, tokenizer)
    if parts["pad_id"] == token:  # padding would be taken for pictures
        parts["pad_id"] = 0 if token != 0 else 1
    text = network.config.get_text_config()
    whole = getattr(processor, "global_image_token", None) or getattr(processor, "global_image_tag", None)
    return {
        **parts,
        "processor": processor,
        "family": family,
        "image_token": token,
        "placeholder": placeholder,
        "whole_token": tokenizer.convert_tokens_to_ids(whole) if isinstance(whole, str) else None,
        "positions": getattr(text, "max_position_embeddings", None),
        "rope_index": inner(network).get_rope_index if family.axes > 1 else None,
    }


def _processor(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise UserError(
            f"{folder} has no processor: {' or '.join(PROCESSOR_FILES)} is expected there, with the tokenizer's files. Copy "
            "the files of the model it was made from."
        )
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise UserError(
            f"the processor in {folder} needs a package that is not here ({first_line(error)}). Install polyalign's extra: "
            'pip install "polyalign[vlm]"'
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the processor in {folder} cannot be read: {first_line(error)}") from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise UserError(f"{folder} has a {type(processor).__name__}, and a processor of pictures and text is expected there")
    return processor
