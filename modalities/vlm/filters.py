"""Which sampled answers become rejected ones: MIA-DPO's selection by attention and its post-selection, with an audit.

Published with numbers (arXiv 2410.17637, released code): an answer that equals the truth is no pair; the truth has fewer than
512 characters; the attention ratio (:mod:`polyalign.modalities.vlm.attention_ratio`); a perplexity above 1.1. The ratio of
lengths and the edit distance are named in the paper and not in the code, and no number is given: the bounds here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyalign.core.errors import UserError
from polyalign.modalities.vlm.attention_ratio import Looked, looked_elsewhere
from polyalign.modalities.vlm.mia_dpo_config import FilterConfig


@dataclass(frozen=True)
class Candidate:
    """A right answer, a sampled one, and what was recorded of the sampled one. ``where`` names the row in messages."""

    chosen: str
    rejected: str
    perplexity: float | None = None
    looked: Looked | None = None
    where: str = "a pair"


@dataclass(frozen=True)
class Audit:
    """What became of all pairs. ``dropped`` counts a pair by the first filter that refused it, in the order of the filters, so
    that ``kept`` and its counts add up to ``pairs``; ``alone`` counts all that a filter refuses, whatever the others do."""

    pairs: int
    kept: int
    dropped: Mapping[str, int]
    alone: Mapping[str, int]

    def plain(self) -> dict[str, Any]:
        """As a summary has it."""
        return {"pairs": self.pairs, "kept": self.kept, "dropped": dict(self.dropped), "refused_alone": dict(self.alone)}

    def lines(self) -> list[str]:
        """For the terminal."""
        shown = [f"{name}: {self.dropped[name]} dropped ({self.alone[name]} by itself)" for name in self.dropped]
        return [f"{self.pairs} pairs, {self.kept} kept", *shown]


@dataclass(frozen=True)
class Selection:
    """``kept``: the places of the pairs that every filter lets through."""

    kept: list[int]
    audit: Audit


def select(candidates: Sequence[Candidate], config: FilterConfig | None = None) -> Selection:
    """Every pair against every filter.

    Raises:
        UserError: a right answer is empty, or what a filter needs was not recorded for a pair.
    """
    filters = _filters(config or FilterConfig())
    dropped, alone, kept = dict.fromkeys(filters, 0), dict.fromkeys(filters, 0), []
    for place, candidate in enumerate(candidates):
        if not candidate.chosen.strip():
            raise UserError(f"{candidate.where}: the right answer is empty; an answer needs at least one visible character")
        refused = [name for name, refuses in filters.items() if refuses(candidate)]
        for name in refused:
            alone[name] += 1
        if refused:
            dropped[refused[0]] += 1
        else:
            kept.append(place)
    return Selection(kept, Audit(len(candidates), len(kept), dropped, alone))


def _filters(config: FilterConfig) -> dict[str, Callable[[Candidate], bool]]:
    """Filters by name, in their order; each says whether it refuses a pair."""
    filters: dict[str, Callable[[Candidate], bool]] = {
        "empty": lambda pair: not pair.rejected.strip(),
        "same": lambda pair: _plain(pair.chosen) == _plain(pair.rejected),
    }
    if (limit := config.chosen_below) is not None:
        filters["chosen_below"] = lambda pair: len(pair.chosen) >= limit
    if (rule := config.attention) is not None:
        filters["attention"] = lambda pair: not looked_elsewhere(_recorded(pair, "looked", "attention"), rule, config.limits)
    if (least := config.perplexity) is not None:
        filters["perplexity"] = lambda pair: not _recorded(pair, "perplexity", "perplexity") > least
    if (bounds := config.length_ratio) is not None:
        filters["length_ratio"] = lambda pair: not bounds[0] <= len(pair.rejected) / len(pair.chosen) <= bounds[1]
    if (apart := config.edit_distance) is not None:
        filters["edit_distance"] = lambda pair: relative_edit_distance(pair.chosen, pair.rejected) < apart
    return filters


def _plain(words: str) -> str:
    return " ".join(words.split())


def _recorded(pair: Candidate, name: str, filter_name: str) -> Any:
    found = getattr(pair, name)
    if found is None or (isinstance(found, float) and math.isnan(found)):
        raise UserError(
            f"{pair.where}: the filter {filter_name} needs what was not recorded when the answer was sampled. Record it, or "
            f"turn the filter off with {filter_name}: null"
        )
    return found


def perplexity(logps: Tensor) -> float:
    """exp(-mean log p) of an answer's tokens (T,).

    Raises:
        UserError: no token.
    """
    if logps.ndim != 1 or not len(logps):
        raise UserError(f"the log-probabilities of an answer have the shape {tuple(logps.shape)}; expected one number a token")
    return float(torch.exp(-logps.double().mean()))


def path_perplexity(logits: Tensor) -> float:
    """The perplexity of the greedy path through logits (T, V), exp(-mean_t log max_v softmax(logits_t)_v), which is what the
    released code filters by: it samples greedily, so it is the answer's own.

    Raises:
        UserError: no token.
    """
    return perplexity(logits.double().log_softmax(dim=-1).amax(dim=-1))


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein's distance of two sequences, by a column of bits at a time (Myers 1999, in Hyyro's form 2001): a row of
    Python's whole numbers for each element of ``second``, so texts of thousands of characters take milliseconds."""
    if not first:
        return len(second)
    last, every = 1 << (len(first) - 1), (1 << len(first)) - 1
    where: dict[Hashable, int] = {}
    for place, element in enumerate(first):
        where[element] = where.get(element, 0) | 1 << place
    up, down, distance = every, 0, len(first)  # by one more, by one less than the cell above
    for element in second:
        equal = where.get(element, 0)
        vertical = equal | down
        horizontal = (((equal & up) + up) ^ up) | equal
        more, less = down | (~(horizontal | up) & every), up & horizontal
        distance += bool(more & last) - bool(less & last)
        more, less = (more << 1 | 1) & every, less << 1 & every
        up, down = less | (~(vertical | more) & every), more & vertical
    return distance


def relative_edit_distance(first: str, second: str) -> float:
    """Edit distance in characters over the longer length, 0 (equal) to 1; case and runs of spaces count."""
    longer = max(len(first), len(second))
    return edit_distance(first, second) / longer if longer else 0.0
