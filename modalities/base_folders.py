"""What a base says by its name and its files alone, before torch is imported and anything is opened."""

from __future__ import annotations

from pathlib import Path

from polyalign.core.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def local_folder(base: str) -> Path | None:
    """The folder that ``base`` names, or None where it is a hub id.

    Raises:
        UserError: it is a file, or neither a folder nor a hub id.
    """
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(
            f"base is {base!r}, a file; a language model is a folder with config.json, a tokenizer and .safetensors"
        )
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError(
            f"base is {base!r}: there is no such folder, and it is no hub id (owner/name). "
            "Allowed: tiny, a hub id, a transformers folder."
        )
    return None


def refuse_what_is_no_base(folder: Path, *, opened_by: str = "AutoModelForCausalLM", beside: str = "AutoTokenizer") -> None:
    """Say what a folder lacks before a library says it in its own words.

    Args:
        opened_by, beside: transformers' classes for such a model and for what stands beside its weights.

    Raises:
        UserError: no configuration, no weights, or weights as pickles only.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} holds a LoRA and not a whole model: give its base as base, and load the LoRA onto it")
        raise UserError(f"{folder} is no transformers model: there is no config.json in it")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickled:
        raise UserError(
            f"{folder} has its weights in {pickled[0]} only, a pickle, which can run code when it is read. Take the "
            ".safetensors version of this model, or convert it where you trust it: "
            f"{opened_by}.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and the same with {beside}."
        )
    raise UserError(f"{folder} holds no weights: there is no .safetensors file in it")
