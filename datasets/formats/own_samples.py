"""Real pictures against the base's own: each picture of a folder is preferred to what the base draws for its caption.

This is self-play as in SPIN-Diffusion (arXiv 2402.10210) and LightGen (arXiv 2503.08619): the data win, the model's own samples
lose, until the two cannot be told apart. One round is one run; for the next, make the trained model the base. The folder is the
one that LoRA trainers read::

    my_pictures/
      cat.png  cat.txt          a picture and its caption (.txt or .caption)

Every sample has its own seed, by the picture's place in the order of names, and is drawn in batches that are always cut alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyalign.core.errors import UserError
from polyalign.core.files import sha256_of
from polyalign.core.randomness import seed_of
from polyalign.datasets.formats.checking import check_picture, read_file
from polyalign.datasets.formats.importing import import_pairs
from polyalign.datasets.formats.source import Entry, OnBadRow, Outcome, Pair, Source, entry, identity_of
from polyalign.datasets.formats.suffixes import CAPTIONS, ENDINGS, caption_of, files_in
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictures import encode_png

if TYPE_CHECKING:
    from PIL import Image

JUDGE = "data"  # 1 for the real picture, 0 for the drawn one


@dataclass(frozen=True)
class Drawing:
    """Who draws: ``draw(conditions, seeds)``, under which name, with which settings (recorded only), from which run's seed."""

    draw: Callable[[Sequence[Mapping[str, Any]], Sequence[int]], list[Image.Image]]
    model: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)


def import_own_samples(path: Path, store: PairStore, *, drawing: Drawing, on_bad_row: OnBadRow = "error") -> dict[str, Any]:
    """Fill ``store``; see :func:`polyalign.datasets.formats.importing.import_pairs`.

    Args:
        path: the folder of pictures and captions.
        drawing: what makes the rejected pictures.
    """
    return import_pairs(OwnSamples(Path(path), drawing), store, on_bad_row=on_bad_row)


class OwnSamples(Source):
    """The pictures of one folder, in the order of their names."""

    name = "own_samples"
    judges = (JUDGE,)

    def __init__(self, path: Path, drawing: Drawing):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder. It holds pictures NAME.png and their captions NAME.txt")
        self.path, self.drawing, self.files = path, drawing, files_in(path)
        self._around: list[str] = []
        self.captions = self._captions()
        self._drawn: tuple[int, list[bytes]] = (-1, [])

    def _captions(self) -> list[tuple[str, str]]:
        """(picture's name, caption). All is looked over before anything is drawn, since drawing takes long."""
        found = []
        for name, file in self.files.items():
            if file.suffix.lower() in CAPTIONS:
                continue
            try:
                if file.suffix.lower() not in ENDINGS:
                    raise ValueError("neither a picture nor a caption")
                caption = caption_of(self.path, self.files, (file.stem,))
                check_picture(read_file(self.path, name))
                found.append((name, caption))
            except ValueError as error:
                self._around.append(f"{name}: {error}")
        return found

    def identity(self) -> dict[str, Any]:
        files = {name: file for name, file in self.files.items() if file.is_file()}
        who = {"model": self.drawing.model, "seed": self.drawing.seed, "sampler": dict(self.drawing.settings)}
        return {"files": identity_of(files), **who}

    def total(self) -> int:
        return len(self.captions)

    def problems(self) -> list[str]:
        return self._around

    def entries(self, start: int) -> Iterator[Entry]:
        for index in range(start, len(self.captions)):
            yield entry(self.captions[index][0], self._read, index)

    def _read(self, index: int) -> Outcome:
        name, caption = self.captions[index]
        real = read_file(self.path, name)
        model, _, content_hash = self.drawing.model.partition("@")
        provenance = {
            "model": model,
            "model_hash": content_hash or None,
            "rejected_seed": self._seed(index),
            "sampler": {**self.drawing.settings, "source": self.name, "chosen": name, "chosen_sha256": sha256_of(real)},
            "judges": {JUDGE: {"version": "1"}},
        }
        scores = ({JUDGE: 1.0}, {JUDGE: 0.0})
        return Outcome([Pair(name, {"prompt": caption}, real, self._own(index), scores=scores, provenance=provenance)])

    def _seed(self, index: int) -> int:
        return seed_of(self.drawing.seed, "own_sample", index)

    def _own(self, index: int) -> bytes:
        """The base's picture for a caption, drawn together with those of the same shard."""
        shard, place = divmod(index, self.rows_per_shard)
        if self._drawn[0] != shard:
            first = shard * self.rows_per_shard
            conditions = [{"prompt": caption} for _, caption in self.captions[first : first + self.rows_per_shard]]
            made = self.drawing.draw(conditions, [self._seed(first + number) for number in range(len(conditions))])
            self._drawn = shard, [encode_png(picture) for picture in made]
        return self._drawn[1][place]
