"""BERTScore (Zhang et al., arXiv 1904.09675) with an encoder of the user's: how near a text's words are in meaning to
another's.

With unit vectors x_i of the reference's tokens and y_j of the candidate's, from one layer of the encoder, and weights w (1, or
the inverse document frequency):

    recall = sum_i w(x_i) max_j x_i . y_j / sum_i w(x_i)       precision = the same from y's side       F1 = their harmonic mean

Differences from the authors' package: the encoder's own special tokens take no part at all (there they have weight 0 and can
still be matched); nothing is rescaled with a baseline; the layer is the last one unless given, where the package has a table
of layers by model; and a text longer than the encoder's positions is read in windows that follow each other, where the package
cuts it.

Letters: T tokens of a text, D width of the encoder.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from polyalign.core.errors import UserError
from polyalign.core.files import sha256_of
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.network_judge import NetworkJudge, pretrained
from polyalign.evaluation.text_metrics.rouge import references_of

MEASURES = ("f1", "precision", "recall")


class Similarity(NamedTuple):
    """Each at most 1; 0 where either text has no tokens (or none of any weight)."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Idf:
    """idf(t) = log((M + 1) / (df(t) + 1)) over M documents; a token in none of them has log(M + 1)."""

    weights: Mapping[int, float]
    unseen: float

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]]) -> Idf:
        """From the token ids of each document.

        Raises:
            ValueError: no documents.
        """
        if not documents:
            raise ValueError("inverse document frequencies need documents")
        counts = Counter(token for document in documents for token in set(document))
        total = len(documents) + 1
        return cls({token: math.log(total / (count + 1)) for token, count in counts.items()}, math.log(total))

    def __call__(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([self.weights.get(token, self.unseen) for token in ids])


def greedy_match(
    candidate: torch.Tensor, reference: torch.Tensor, candidate_weights: torch.Tensor, reference_weights: torch.Tensor
) -> Similarity:
    """BERTScore of two texts' vectors.

    Args:
        candidate, reference: (T, D) each, of any length; zero vectors are near to nothing.
        candidate_weights, reference_weights: (T,), not negative.
    """
    if not float(candidate_weights.sum()) > 0 or not float(reference_weights.sum()) > 0:
        return Similarity(0.0, 0.0, 0.0)
    one, other = (nn.functional.normalize(side.double(), dim=-1) for side in (candidate, reference))
    cosines = one @ other.T
    precision = float((cosines.amax(1) * candidate_weights).sum() / candidate_weights.sum())
    recall = float((cosines.amax(0) * reference_weights).sum() / reference_weights.sum())
    total = precision + recall
    return Similarity(precision, recall, 2 * precision * recall / total if total else 0.0)


class Encoder:
    """The vectors of a text's tokens from one layer of a transformers encoder.

    Args:
        folder: with config.json, weights as safetensors and a tokenizer.
        layer: index into the hidden states: 0 is the embeddings, 1 the first layer, -1 the last.

    Raises:
        UserError: the folder has no such model or tokenizer, or the model no such layer.
    """

    def __init__(
        self, folder: Path, *, layer: int = -1, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ):
        self.device = device or torch.device("cpu")
        self.network: Any = (
            pretrained(AutoModel, folder, safetensors=True, trust_remote_code=False).eval().requires_grad_(False)
        )
        self.network.to(device=self.device, dtype=dtype)
        layers = self.network.config.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise UserError(f"layer is {layer}; the encoder in {folder} has {layers} layers: 0 (embeddings) to {layers}, or -1")
        self.layer = layer
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"the tokenizer in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error
        self.padding = self.tokenizer.pad_token_id or 0
        self.before, self.after = self._special()
        self.window = self._positions() - len(self.before) - len(self.after)

    def _special(self) -> tuple[list[int], list[int]]:
        """The tokens that this tokenizer puts before and after a text, seen on one word."""
        bare, whole = self.ids("a"), self.tokenizer("a")["input_ids"]
        start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    def _positions(self) -> int:
        """Tokens that the encoder reads at once, special ones included."""
        limit = min(getattr(self.network.config, "max_position_embeddings", None) or 512, self.tokenizer.model_max_length)
        for name, module in self.network.named_modules():
            # RoBERTa's kind counts positions from behind the padding's, so that the table is shorter by as many.
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                limit = min(limit, module.num_embeddings - module.padding_idx - 1)
        return int(limit)

    def ids(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def vectors(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """(T, D) float32 of each text's token ids, read in windows where they are too many for one."""
        windows = [(index, start) for index, ids in enumerate(texts) for start in range(0, len(ids), self.window)]
        found: list[list[torch.Tensor]] = [[] for _ in texts]
        for begin in range(0, len(windows), len(texts)):  # as many rows at once as there are texts, however long those are
            part = windows[begin : begin + len(texts)]
            rows = [list(texts[index][start : start + self.window]) for index, start in part]
            for (index, _), vectors in zip(part, self._read(rows), strict=True):
                found[index].append(vectors)
        width = self.network.config.hidden_size
        return [torch.cat(parts) if parts else torch.zeros(0, width) for parts in found]

    @torch.inference_mode()
    def _read(self, rows: Sequence[list[int]]) -> list[torch.Tensor]:
        whole = [[*self.before, *row, *self.after] for row in rows]
        width = max(map(len, whole))
        ids = torch.tensor([row + [self.padding] * (width - len(row)) for row in whole], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=self.device)
        hidden = self.network(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[self.layer]
        start = len(self.before)
        return [states[start : start + len(row)].float().cpu() for states, row in zip(hidden, rows, strict=True)]


class BertSimilarityJudge(NetworkJudge):
    """BERTScore against ``condition["reference"]`` with an encoder in a folder; of several references the nearest counts.

    Figures of different encoders or layers do not compare; the version has the encoder's name and hash. Meaning only: an
    encoder hardly sees that 128 became 182, or that two sentences changed places. Use it beside ``clinical_facts``, not
    instead.

    Args:
        model: folder of the encoder (config.json, safetensors, tokenizer).
        layer: which hidden states, see :class:`Encoder`.
        idf: a file of documents to weight rare tokens by: a ``.txt`` with one a line, or a ``.jsonl`` with the texts under the
            key ``reference``. It is fixed, so that scores of separate calls compare.
        measure: ``f1``, ``precision`` or ``recall``.
        reference: name of the reference beside the prompt.
        options: see :class:`~polyalign.evaluation.network_judge.NetworkJudge`.

    Raises:
        UserError: an option is none of the allowed.
    """

    name = "bert_similarity"
    formula = "1"

    def __init__(
        self,
        *,
        model: str,
        layer: int = -1,
        idf: str | None = None,
        measure: str = "f1",
        reference: str = "reference",
        **options: Any,
    ):
        super().__init__(**options)
        if measure not in MEASURES:
            raise UserError(f"the judge 'bert_similarity': measure is {measure!r}; allowed: {', '.join(MEASURES)}")
        if not isinstance(model, str) or not Path(model).expanduser().is_dir():
            raise UserError(
                f"the judge 'bert_similarity': model is {model!r}; it needs the folder of an encoder on this machine"
            )
        if idf is not None and not Path(idf).expanduser().is_file():
            raise UserError(f"the judge 'bert_similarity': idf is {idf!r}; there is no such file")
        self.folder, self.layer, self.measure, self.reference = Path(model).expanduser(), layer, measure, reference
        self.documents = None if idf is None else Path(idf).expanduser()
        self.sources = (model, idf)

    def weights(self) -> str:
        """The encoder's name and hash, and what else a score depends on."""
        named = files.identity(str(self.folder), files.weight_files(self.folder, safetensors=True))
        frequencies = "" if self.documents is None else f" idf {self.documents.name}@sha256:{sha256_of(self.documents)[:16]}"
        return f"{named} layer {self.layer} {self.measure} {self.reference}{frequencies}"

    @cached_property
    def encoder(self) -> Encoder:
        """Read when it is first needed."""
        return Encoder(self.folder, layer=self.layer, device=self.device, dtype=self.dtype)

    @cached_property
    def idf(self) -> Idf | None:
        if self.documents is None:
            return None
        return Idf.of([self.encoder.ids(text) for text in _documents(self.documents)])

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> torch.Tensor:
        references = [references_of(condition, self.name, self.reference) for condition in conditions]
        texts = list(dict.fromkeys([*outputs, *(text for several in references for text in several)]))
        ids = [self.encoder.ids(text) for text in texts]
        vectors = dict(zip(texts, self.encoder.vectors(ids), strict=True))
        weights = {text: self._weights(own) for text, own in zip(texts, ids, strict=True)}

        def similar(output: str, reference: str) -> float:
            found = greedy_match(vectors[output], vectors[reference], weights[output], weights[reference])
            return getattr(found, self.measure)

        pairs = zip(outputs, references, strict=True)
        return torch.tensor([max(similar(output, text) for text in several) for output, several in pairs])

    def _weights(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.ones(len(ids)) if self.idf is None else self.idf(ids)


def _documents(path: Path) -> list[str]:
    """The documents of a file.

    Raises:
        UserError: it is not UTF-8, a line is no JSON object with a text under ``reference``, or there are none.
    """
    try:
        lines = [line for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8") from error
    if path.suffix.lower() == ".jsonl":
        lines = [_reference(path, number, line) for number, line in enumerate(lines, start=1)]
    if not lines:
        raise UserError(f"{path}: no documents. Inverse document frequencies need at least one, better hundreds")
    return lines


def _reference(path: Path, number: int, line: str) -> str:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}: entry {number} is not JSON: {error}") from error
    text = given.get("reference") if isinstance(given, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{path}: entry {number} has no text under 'reference'")
    return text
