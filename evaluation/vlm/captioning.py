"""Captions against references: BLEU-1 to 4, ROUGE-L, CIDEr and CIDEr-D; METEOR and SPICE where Java is.

Files: COCO's ``captions_*.json``, or ``references.jsonl`` of {"image", "references": [texts]}. Answers have the image as id.

    BLEU-n   = min(1, exp(1 - r / c)) (prod_{k <= n} p_k)^(1/n) of the whole corpus, r the closest reference lengths
               (Papineni et al. 2002), with no smoothing, so 0 without a common n-gram (coco-caption has about 1e-4 there)
    ROUGE-L  = (1 + b^2) P R / (R + b^2 P), b = 1.2, P and R the best of all references as in coco-caption; mean over images
    CIDEr(-D): :mod:`polyalign.evaluation.vlm.cider`

Words are :func:`polyalign.evaluation.vlm.ptb.tokens`, near Stanford's tokeniser but not it; the figures of METEOR and SPICE
come from pycocoevalcap with the original. Intervals resample images; CIDEr's document frequencies stay those of all images.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyalign.core.errors import UserError
from polyalign.core.optional import require
from polyalign.evaluation.text_metrics.rouge import lcs_length
from polyalign.evaluation.vlm import coco, ptb
from polyalign.evaluation.vlm.cider import SIZES, Tokens, cider, ngrams
from polyalign.evaluation.vlm.figures import Formula, Scores, Sums, figures, ratio, seed_for
from polyalign.evaluation.vlm.sheets import Question, Sheet, field_of, only_file, read_rows, simple_id, without_doubles

BETA = 1.2
JAVA_METRICS = ("meteor", "spice")
answer_id = simple_id("image_id")


def read(folder: Path) -> Sheet:
    """Images with their references.

    Raises:
        UserError: absent, or an image without a reference.
    """
    path = only_file(folder, ("captions_*.json", "references.jsonl"), "captions to compare with")
    known: dict[str, list[str]] = {}
    if path.suffix == ".jsonl":
        for where, row in read_rows(path, "references"):
            image, texts = str(field_of(row, "image", where, (str, int))), field_of(row, "references", where, list)
            if image in known or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise UserError(f"{where}: one list of texts is expected for an image, found {texts!r} for {image!r}")
            known[image] = texts
    else:
        for image, caption in coco.captions(path):
            known.setdefault(image, []).append(caption)
    questions = [Question(image, tuple(texts), cluster=image, images=(image,)) for image, texts in known.items()]
    return Sheet(without_doubles(questions, path), (path,))


def rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """F with beta = 1.2 of the best precision and the best recall, which may be of different references."""
    common = [lcs_length(candidate, reference) for reference in references]
    precision = max((count / len(candidate) for count in common), default=0.0) if candidate else 0.0
    recall = max((count / len(one) for count, one in zip(common, references, strict=True) if one), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def bleu_columns(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, list[float]]:
    """What corpus BLEU sums: lengths, n-grams that a candidate has, and those of them that one reference has as often."""
    columns: dict[str, list[float]] = {name: [] for name in ("length", "reference_length")}
    columns |= {f"{kind} {n}": [] for n in SIZES for kind in ("matched", "had")}
    for said, known in zip(candidates, references, strict=True):
        columns["length"].append(float(len(said)))
        columns["reference_length"].append(float(min((abs(len(one) - len(said)), len(one)) for one in known)[1]))
        for n in SIZES:
            own = ngrams(said, n)
            most = ngrams(known[0], n)
            for other in known[1:]:
                most |= ngrams(other, n)
            columns[f"matched {n}"].append(float((own & most).total()))
            columns[f"had {n}"].append(float(own.total()))
    return columns


def bleu_formula(size: int) -> Formula:
    """BLEU-``size`` of the sums of :func:`bleu_columns`; 0 where the candidates have no n-gram so long."""

    def formula(sums: Sums) -> np.ndarray:
        precisions = [np.nan_to_num(ratio(sums[f"matched {n}"], sums[f"had {n}"])) for n in range(1, size + 1)]
        brevity = np.exp(np.minimum(0.0, 1 - np.nan_to_num(ratio(sums["reference_length"], sums["length"]), nan=np.inf)))
        return brevity * np.prod(precisions, axis=0) ** (1 / size)

    return formula


def score(
    sheet: Sheet,
    said: Mapping[str, str],
    *,
    seed: int = 0,
    java: Sequence[str] = (),
    tokens: Callable[[str], list[str]] = ptb.tokens,
) -> Scores:
    """All figures of the captions that are there.

    Args:
        java: which of :data:`JAVA_METRICS` to compute as well.

    Raises:
        UserError: a metric of ``java`` that is unknown or cannot be computed here.
    """
    asked = [question for question in sheet.questions if question.id in said]
    candidates = [tokens(said[question.id]) for question in asked]
    references = [[tokens(text) for text in question.truth] for question in asked]
    by_rarity = cider(candidates, references)
    columns = {
        **bleu_columns(candidates, references),
        "images": [1.0] * len(asked),
        "rouge_l": [rouge_l(one, known) for one, known in zip(candidates, references, strict=True)],
        "cider": by_rarity.plain,
        "cider_d": by_rarity.d,
    }
    formulas: dict[str, Formula] = {f"bleu_{n}": bleu_formula(n) for n in SIZES}
    for name in java:
        columns[name] = java_scores(name, {one.id: said[one.id] for one in asked}, {one.id: one.truth for one in asked})
    formulas |= {name: _mean(name) for name in ("rouge_l", "cider", "cider_d", *java)}
    empty = [question.id for question, words in zip(asked, candidates, strict=True) if not words]
    notes = ["CIDEr is 0 for a single image: no n-gram is rarer than another"] if len(asked) == 1 else []
    counts = {"images": len(asked), "words": sum(map(len, candidates))}
    return Scores({"all": figures(columns, formulas, seed=seed_for(seed, "captions"))}, {"all": counts}, empty, notes)


def _mean(name: str) -> Formula:
    return lambda sums: sums[name] / sums["images"]


def java_scores(metric: str, said: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> list[float]:
    """METEOR or SPICE (F) of every image by pycocoevalcap, with its own tokeniser; an empty caption has 0.

    The figure is their mean, while pycocoevalcap's METEOR of a corpus is of summed counts.

    Raises:
        UserError: another metric, no Java, or the package is not installed.
    """
    if metric not in JAVA_METRICS:
        raise UserError(f"{metric!r} is no metric of captions; allowed with Java: {', '.join(JAVA_METRICS)}")
    if shutil.which("java") is None:
        raise UserError(
            f"{metric} runs a Java program, and no 'java' is on the PATH. Install a Java runtime, or leave {metric} out"
        )
    purpose = f"{metric} of captions"
    module = require(f"pycocoevalcap.{metric}.{metric}", extra="bench", purpose=purpose)
    cut = require("pycocoevalcap.tokenizer.ptbtokenizer", extra="bench", purpose=purpose).PTBTokenizer()
    spoken = sorted(name for name, text in said.items() if text.strip())  # sorted, since SPICE returns them so
    if not spoken:
        return [0.0] * len(said)
    results = cut.tokenize({name: [{"caption": said[name]}] for name in spoken})
    truths = cut.tokenize({name: [{"caption": text} for text in references[name]] for name in spoken})
    _, found = getattr(module, metric.capitalize())().compute_score(truths, results)
    by_name = {name: _f(one) for name, one in zip(spoken, found, strict=True)}
    return [by_name.get(name, 0.0) for name in said]


def _f(found: Any) -> float:
    """SPICE says precision, recall and F of every category of its graph, METEOR a number."""
    return float(found["All"]["f"] if isinstance(found, dict) else found)
