"""How similar two answers are, from 0 to 1: what Re-Align's gate looks at (arXiv 2502.13146).

The paper takes the cosine of a SentenceTransformer's embeddings (:func:`by_sentences`). Without such a network there is
:func:`by_words`:

    cos(c(a), c(b)),    c: how often each word, and each pair of neighbouring words, occurs

in lower case, where pairs do not reach across a mark or ``and``, ``or``, ``but``: a list says the same in another order, and
another thing with its adjectives exchanged. Its values are not those of a sentence encoder: one word of n that differs costs
some 1 / n, so a gate of 0.95 lets a single other word pass in answers of up to about 40 words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyalign.core.errors import UserError
from polyalign.modalities.vlm.re_align_config import ReAlignConfig

CLAUSE = re.compile(r"[^\w\s'’-]|\b(?:and|or|but)\b")
WORD = re.compile(r"\w+(?:['’-]\w+)*")
WORDS_VERSION = "words and pairs of words 1"
TOGETHER = 64
LONGEST = 512
"""Tokens of an answer that are looked at, where an encoder does not say how many it reads."""


@dataclass(frozen=True)
class AnswerSimilarity:
    """``identity`` says what it is measured with; ``of`` gives the similarity of each (chosen, other)."""

    identity: str
    of: Callable[[Sequence[tuple[str, str]]], list[float]]


def similarity_of(config: ReAlignConfig, device: Any) -> AnswerSimilarity:
    """The similarity of a configuration.

    Raises:
        UserError: no sentence encoder where one is named.
    """
    if config.sentence_encoder is None:
        return AnswerSimilarity(WORDS_VERSION, lambda pairs: [by_words(*pair) for pair in pairs])
    return by_sentences(config.sentence_encoder, device)


def by_words(first: str, second: str) -> float:
    """Cosine of counts; 1 for answers of the same words, 0 where they share none or one has none."""
    one, two = _counts(first), _counts(second)
    if not one or not two:
        return float(first.strip() == second.strip())
    if one == two:
        return 1.0
    product = sum(number * two[gram] for gram, number in one.items())
    return product / math.sqrt(sum(number**2 for number in one.values()) * sum(number**2 for number in two.values()))


def _counts(text: str) -> Counter[tuple[str, ...]]:
    lowered = text.lower()
    found: Counter[tuple[str, ...]] = Counter((word,) for word in WORD.findall(lowered))
    for clause in CLAUSE.split(lowered):
        words = WORD.findall(clause)
        found.update(zip(words, words[1:], strict=False))
    return found


def by_sentences(where: str, device: Any) -> AnswerSimilarity:
    """Cosine of a sentence encoder's embeddings: the mean of the last states over tokens, or the first token's where the
    folder's ``1_Pooling/config.json`` says so.

    Args:
        where: folder or hub id in the layout of transformers, as sentence-transformers writes it too.

    Raises:
        UserError: no encoder there, or one with layers behind the pooling, which would be left out.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from polyalign.evaluation import weight_files as files
    from polyalign.evaluation.network_judge import pretrained

    folder = files.folder(where, "sentence_encoder", weights=True)
    first = _takes_first(folder)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"sentence_encoder: the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    network = pretrained(AutoModel, folder, safetensors=True).eval().requires_grad_(False).to(device)
    longest = min(LONGEST, getattr(network.config, "max_position_embeddings", None) or LONGEST)

    @torch.no_grad()
    def embedded(texts: Sequence[str]) -> Any:
        parts = []
        for start in range(0, len(texts), TOGETHER):
            part = list(texts[start : start + TOGETHER])
            tokens = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
            states, mask = network(**tokens).last_hidden_state.double(), tokens["attention_mask"].unsqueeze(-1)
            pooled = states[:, 0] if first else (states * mask).sum(1) / mask.sum(1)
            parts.append(torch.nn.functional.normalize(pooled, dim=-1).cpu())
        return torch.cat(parts)

    def of(pairs: Sequence[tuple[str, str]]) -> list[float]:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        if not texts:
            return []
        vectors, place = embedded(texts), {text: at for at, text in enumerate(texts)}
        return [float(vectors[place[one]] @ vectors[place[two]]) for one, two in pairs]

    pooling = "first token" if first else "mean of tokens"
    return AnswerSimilarity(f"{files.identity(where, files.weight_files(folder, safetensors=True))} {pooling}", of)


def _takes_first(folder: Path) -> bool:
    """Whether the pooling that the folder names is the first token's state and not the mean."""
    from polyalign.evaluation import weight_files as files

    behind = [path.name for path in sorted(folder.glob("[2-9]_*")) if path.name.split("_")[1] != "Normalize"]
    if behind:
        raise UserError(f"sentence_encoder: {folder} has {', '.join(behind)} behind its pooling, which is not supported")
    file = folder / "1_Pooling" / "config.json"
    return file.is_file() and bool(files.settings(file).get("pooling_mode_cls_token"))
