"""MIA-DPO's pairs (arXiv 2410.17637): questions of one of several images, the model's own answers, and a selection of them by
what they looked at.

Where the model is wrong, its answer is the rejected one, if every filter lets it through
(:mod:`polyalign.modalities.vlm.filters`): that is the published selection. Where it is right, with ``balance``, the answer that
is right of another image is the rejected one; such a pair shows no mistake of the model's, so it goes through the filters of
the text and not through those of attention and perplexity, which are about the model's own wrong answer.

Differences from the published data: see :mod:`polyalign.modalities.vlm.attention_ratio` and the defaults of
:class:`polyalign.modalities.vlm.mia_dpo_config.MultiImageConfig`. Questions that compare two images have two targets, for which
there is no threshold: of them the relative rule is taken. Questions of single images are not selected by attention.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.datasets.multi_image.sources import plain
from polyalign.evaluation.selection import telling_word
from polyalign.modalities.vlm.adapter import Answer, VlmAdapter
from polyalign.modalities.vlm.attention_ratio import Looked, image_attention, looked, middle_layer
from polyalign.modalities.vlm.attention_rows import NoAttention, Recorded, layers_of, record
from polyalign.modalities.vlm.filters import Candidate, perplexity, select
from polyalign.modalities.vlm.geometries import geometries_of
from polyalign.modalities.vlm.mia_dpo_config import FilterConfig, MultiImageConfig
from polyalign.modalities.vlm.mia_dpo_figures import PARTS, add_ratio, kind_of, lines_of, merged, new_kind, summary_of
from polyalign.modalities.vlm.mia_dpo_questions import SINGLE, Row, Source, source_of
from polyalign.modalities.vlm.negatives import noised_for_sampling

BATCHES = 4
"""That are sampled together: answers of like lengths, so that there is little padding."""


@dataclass(frozen=True)
class Asked:
    """A question, the model's answer to it, and what is known of that answer: whether it is ``right``, the perplexity of its
    tokens, and by layer where it looked (of several images). A broken answer has an image token in it: it is wrong, and nothing
    more is known of it."""

    index: int
    row: Row
    seed: int
    answer: str
    right: bool
    perplexity: float | None
    looked: Mapping[int, Looked] = field(default_factory=dict)

    @property
    def layout(self) -> Mapping[str, Any]:
        return self.row["condition"]["layout"]

    @property
    def confused(self) -> bool:
        """Whether the answer is another image's."""
        return not self.right and plain(self.answer) in map(plain, self.row["confusions"])

    @property
    def telling_word(self) -> str | None:
        """What tells the right answer from the model's own wrong one, or from that of another image, were it a pair."""
        wrong = next(iter(self.row["confusions"]), None) if self.right else self.answer
        return None if wrong is None else telling_word(self.row["chosen"], wrong)


class MiaDpo:
    """Makes pairs of questions by their numbers.

    Args:
        adapter, model: that answer.
        given: not read; makers that complete given pairs have it. ``config`` says where questions come from.

    Raises:
        UserError: questions that cannot be used, or a layer that the model does not have.
    """

    def __init__(self, adapter: VlmAdapter, model: Model, given: Any, config: MultiImageConfig, *, seed: int = 0):
        settings = replace(
            adapter.settings,
            temperature=config.rejected.temperature,
            max_new_tokens=config.rejected.max_new_tokens or adapter.settings.max_new_tokens,
        )
        self.sampler = VlmAdapter(settings)
        self.sampler.cache = adapter.cache
        self.model, self.config, self.seed = model, config, seed
        self.source: Source = source_of(config, seed)
        count = layers_of(model)
        self.layer = middle_layer(count) if config.layer is None else config.layer
        if self.layer >= count:
            raise UserError(f"layer {self.layer}: the language model has the layers 0 to {count - 1}")
        self.layers = tuple(range(count)) if config.every_layer else (self.layer,)

    def __len__(self) -> int:
        return len(self.source)

    def inputs(self) -> dict[str, Any]:
        """What pairs depend on besides the configuration and the model."""
        names = ("temperature", "max_new_tokens", "top_k", "top_p", "picture_options", "dtype", "attention", "sample_batch")
        sampler = {name: getattr(self.sampler.settings, name) for name in names}
        return {"source": self.source.inputs(), "sampler": sampler, "layer": self.layer, "seed": self.seed}

    def make(self, indices: range) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The pairs of these questions, and what became of all of them (:func:`summary` puts such notes together).

        Raises:
            UserError: a picture that cannot be used (unless bad rows are dropped), a prompt that leaves no room for an answer,
                or a processor that cuts a named image away.
        """
        rows, unusable = self._rows(indices)
        asked = self._asked(rows)
        kinds: dict[str, dict[str, Any]] = {}
        for one in asked:
            _count(kinds.setdefault(kind_of(one.layout), new_kind()), one, self.layer)
        pairs: dict[int, dict[str, Any]] = {}
        audits: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
        for part, config, members in self._groups(asked):
            candidates = [self._candidate(one, part) for one in members]
            selection = select(candidates, config)
            audits[part].append(selection.audit.plain())
            for place in selection.kept:
                one = members[place]
                pairs[one.index] = self._pair(one, part, candidates[place])
                kinds[kind_of(one.layout)][part] += 1
        note = {
            "questions": len(asked),
            "pairs": len(pairs),
            "unusable": unusable,
            "conversations": self.source.conversations,
            "broken_answers": sum(one.perplexity is None for one in asked),
            "right_without_pair": sum(one.right and not self._balanced(one) for one in asked),
            "layer": self.layer,
            "words": dict(Counter(one.telling_word for one in asked if one.telling_word)),
            "words_of_pairs": dict(Counter(one.telling_word for one in asked if one.telling_word and one.index in pairs)),
            **{part: merged(audits[part]) for part in PARTS},
            "kinds": kinds,
        }
        return [pairs[index] for index in sorted(pairs)], note

    @staticmethod
    def summary(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of all notes, as JSON."""
        return summary_of(notes)

    @staticmethod
    def lines(summary: dict[str, Any]) -> list[str]:
        """A summary for a terminal."""
        return lines_of(summary)

    def _rows(self, indices: range) -> tuple[dict[int, Row], int]:
        """Questions by number, and how many cannot be used."""
        found: dict[int, Row] = {}
        unusable = 0
        for index in indices:
            try:
                found[index] = self.source.row(index)
            except UserError as error:
                if self.config.on_bad_row == "error":
                    advice = "Mend it, or leave such questions out with pairs.multi_image.on_bad_row: drop"
                    raise UserError(f"{error}. {advice}") from error
                unusable += 1
        return found, unusable

    def _asked(self, rows: Mapping[int, Row]) -> list[Asked]:
        """Every question answered by the model, some batches at a time: prompts hold their pictures."""
        items, size = list(rows.items()), BATCHES * self.sampler.settings.sample_batch
        return [one for start in range(0, len(items), size) for one in self._answered(dict(items[start : start + size]))]

    def _answered(self, rows: Mapping[int, Row]) -> list[Asked]:
        seeds = [seed_of(self.seed, "mia_dpo", "answer", index) for index in rows]
        conditions = [self._shown(index, row) for index, row in rows.items()]
        answers = self.sampler.answers(self.model, conditions, seeds)
        whole = {place: answer for place, answer in enumerate(answers) if self.model.parts["image_token"] not in answer.ids}
        recorded = dict(zip(whole, self._recorded(list(whole.values())), strict=True))
        asked = []
        for place, (index, row) in enumerate(rows.items()):
            found, text = recorded.get(place), answers[place].text.strip()  # as right answers are: templates may end in a space
            if found is None:
                asked.append(Asked(index, row, seeds[place], text, right=False, perplexity=None))
            else:
                right, seen = self.source.right(row, text), self._looked(row, answers[place], found)
                asked.append(Asked(index, row, seeds[place], text, right, perplexity(found.logps), seen))
        return asked

    def _recorded(self, answers: Sequence[Answer]) -> list[Recorded]:
        """A pass over the answers; without attention where there is none and no filter needs it."""
        asked = [(answer.prompt, answer.ids) for answer in answers]
        try:
            return record(self.sampler, self.model, asked, self.layers)
        except NoAttention:
            if self.config.filter.attention is not None:
                raise
        return record(self.sampler, self.model, asked, ())

    def _shown(self, index: int, row: Row) -> dict[str, Any]:
        """What the model is asked, with noised pictures where they are wanted."""
        condition = row["condition"]
        if not self.config.noise:
            return condition
        return {**condition, "images": noised_for_sampling(condition, seed=self.seed, key=str(index))}

    def _looked(self, row: Row, answer: Answer, recorded: Recorded) -> dict[int, Looked]:
        layout = row["condition"]["layout"]
        if layout["format"] == SINGLE:
            return {}
        spans = answer.prompt.spans(self.model.parts["image_token"])
        by_geometry = layout["format"] != "sequence" and not self.config.compat
        geometries = geometries_of(self.model, answer.prompt) if by_geometry else ()
        return {
            layer: looked(layout, image_attention(rows, spans), geometries, compat=self.config.compat)
            for layer, rows in recorded.rows.items()
        }

    def _balanced(self, one: Asked) -> bool:
        return one.right and self.config.balance and bool(one.row["confusions"])

    def _groups(self, asked: Sequence[Asked]) -> list[tuple[str, FilterConfig, list[Asked]]]:
        """Answers that may make pairs, by the filters that they go through."""
        filters = self.config.filter
        wrong = [one for one in asked if not one.right and one.perplexity is not None]
        alone = [one for one in wrong if not one.looked]
        several = [one for one in wrong if one.looked and len(one.layout["targets"]) > 1]
        named = [one for one in wrong if one.looked and len(one.layout["targets"]) == 1]
        relative = "not_first" if filters.attention is not None else None
        text = filters.model_copy(update={"attention": None, "perplexity": None})
        found = [
            ("mistakes", filters, named),
            ("mistakes", filters.model_copy(update={"attention": relative}), several),
            ("mistakes", filters.model_copy(update={"attention": None}), alone),
            ("balanced", text, [one for one in asked if self._balanced(one)]),
        ]
        return [group for group in found if group[2]]

    def _candidate(self, one: Asked, part: str) -> Candidate:
        where = f"question {one.row['pair_id']}"
        if part == "mistakes":
            return Candidate(one.row["chosen"], one.answer, one.perplexity, one.looked.get(self.layer), where)
        draws = random.Random(seed_of(self.seed, "mia_dpo", "confusion", one.index))
        return Candidate(one.row["chosen"], draws.choice(one.row["confusions"]), where=where)

    def _pair(self, one: Asked, part: str, candidate: Candidate) -> dict[str, Any]:
        condition = {
            **one.row["condition"],
            "prompt": words_of(one.row["condition"]),
            "confusions": list(one.row["confusions"]),
        }
        name, _, content_hash = self.model.identity.partition("@")
        seen = one.looked.get(self.layer)
        sampler = {
            "rejected": "own" if part == "mistakes" else "of another image",
            "answer": one.answer,
            "perplexity": one.perplexity,
            "ratio": None if seen is None else seen.ratio,
            "target_is_first": None if seen is None else seen.target_is_first,
            "layer": self.layer,
            "temperature": self.sampler.settings.temperature,
            "max_new_tokens": self.sampler.settings.max_new_tokens,
            "noise": self.config.noise,
        }
        return {
            "pair_id": one.row["pair_id"],
            "condition": condition,
            "chosen": candidate.chosen,
            "rejected": candidate.rejected,
            "chosen_scores": {},
            "rejected_scores": {},
            "provenance": {
                "model": name,
                "model_hash": content_hash or None,
                "chosen_seed": None,
                "rejected_seed": one.seed if part == "mistakes" else None,
                "sampler": sampler,
                "judges": {},
            },
        }


def words_of(condition: Mapping[str, Any]) -> str:
    """The question in words: the last line of text of what the user said last."""
    users = [message for message in condition["messages"] if message["role"] == "user"]
    content = users[-1]["content"]
    said = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return said.strip().split("\n")[-1]


def _count(kind: dict[str, Any], one: Asked, layer: int) -> None:
    kind["questions"] += 1
    kind["right"] += one.right
    kind["confused"] += one.confused
    side = "right" if one.right else "wrong"
    for number, seen in one.looked.items():
        add_ratio(kind, number, str(one.row["condition"].get("task", "")), side, seen.ratio)
        if number == layer:
            kind[f"elsewhere_{side}"] += not seen.target_is_first
