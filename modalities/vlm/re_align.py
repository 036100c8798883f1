"""Re-Align's pairs (arXiv 2502.13146): an answer, and what the model makes of it when it looks at a similar picture.

For each question about a picture:

1. chosen: the model's own answer (or the given one);
2. it is masked (:mod:`polyalign.modalities.vlm.masking`);
3. similar pictures are retrieved (:mod:`polyalign.modalities.vlm.retrieval`);
4. for one after another, the most similar first, the model fills the gaps in (:mod:`polyalign.modalities.vlm.completion`); the
   first completion whose similarity to the chosen answer (:mod:`polyalign.modalities.vlm.answer_similarity`) is below the gate
   is the rejected answer, and its picture the rejected picture. Where there is none the question is dropped.

The publication's code for this is not released; what its text leaves open (masking, prompts, k, encoders) is ours and can be
set. In a row with several pictures it is the one that the answer depends on (its layout's target) that is looked for and
exchanged; a row whose answer depends on several is refused.

Since the chosen answer is the model's own, a pair is as right as the model is: the audit counts, and a world's judge can tell.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.randomness import seed_of
from polyalign.datasets.pictures import fingerprint
from polyalign.modalities.picture_contents import content_of
from polyalign.modalities.vlm.adapter import VlmAdapter
from polyalign.modalities.vlm.answer_similarity import AnswerSimilarity, similarity_of
from polyalign.modalities.vlm.completion import Task, complete, filled_in, last_question, seed_for, with_question
from polyalign.modalities.vlm.data_card import tables_of_re_align
from polyalign.modalities.vlm.masking import Masked, aligned, masker_of
from polyalign.modalities.vlm.re_align_config import ReAlignConfig
from polyalign.modalities.vlm.retrieval import Encoder, Found, PictureIndex, encoder_of, index_of

Row = Mapping[str, Any]
COUNTS = ("asked", "empty", "nothing_to_mask", "exhausted", "kept", "tried", "unfilled")
"""What is counted. Of the questions ``asked``: an ``empty`` answer, ``nothing_to_mask`` in it, no completion below the gate
(``exhausted``), or a pair (``kept``). Of the completions ``tried``: ``unfilled``, in which the model left a gap."""


@dataclass
class _Question:
    """A question on its way to a pair."""

    index: int
    name: str
    condition: dict[str, Any]
    picture: int  # of the index
    slot: int  # of the condition's images
    chosen: str = ""
    seed: int | None = None
    masked: Masked | None = None
    similar: list[Found] = field(default_factory=list)


class Pictures(Sequence[Any]):
    """The pictures of all questions in one row, each opened where it is asked for.

    Raises:
        UserError: a question without a picture.
    """

    def __init__(self, given: Sequence[Row]):
        self.given, self.starts = given, [0]
        for place in range(len(given)):
            images = _condition_of(given[place]).get("images")
            if not images:
                raise UserError(
                    f"{_where(given[place], place)}: there is no image, and Re-Align needs one to exchange. Give this question "
                    "its image, or take it out"
                )
            self.starts.append(self.starts[-1] + len(images))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        index = bisect.bisect_right(self.starts, place) - 1
        return _condition_of(self.given[index])["images"][place - self.starts[index]]

    def of(self, index: int) -> range:
        """The places of a question's pictures."""
        return range(self.starts[index], self.starts[index + 1])


class ReAlign:
    """Makes pairs of questions by their numbers.

    Args:
        adapter, model: that answer and fill in; the adapter's settings say how many tokens an answer may have.
        given: questions: conditions, or rows with a ``condition`` (and ``chosen``, where that is taken); they are opened one at
            a time, and their pictures are those that are retrieved. A row's ``place``, such as a line of a file, stands in
            messages.

    Raises:
        UserError: no questions, one without a picture or whose answer depends on several, or a network that cannot be read.
    """

    def __init__(self, adapter: VlmAdapter, model: Model, given: Sequence[Any], config: ReAlignConfig, *, seed: int = 0):
        if len(given) < 2:
            raise UserError(f"{len(given)} question(s); Re-Align looks for similar pictures among those of all questions")
        self.adapter, self.model, self.given, self.config, self.seed = adapter, model, given, config, seed
        self.answering = _at_temperature(adapter, config.chosen_temperature)
        self.completing = _at_temperature(adapter, config.completion_temperature)
        self.rules = masker_of(config)

    @cached_property
    def encoder(self) -> Encoder:
        """What sees pictures, read when it is first needed."""
        return encoder_of(self.adapter, self.model, self.config)

    @cached_property
    def similarity(self) -> AnswerSimilarity:
        """What compares answers, read when it is first needed."""
        return similarity_of(self.config, next(self.model.network.parameters()).device)

    @cached_property
    def index(self) -> PictureIndex:
        """Of every picture of every question."""
        config = self.config
        options: dict[str, Any] = {"kind": config.index, "lists": config.lists, "probes": config.probes}
        return index_of(self.pictures, self.encoder, cache=self.adapter.cache, **options)

    @cached_property
    def pictures(self) -> Pictures:
        """Every picture of every question."""
        return Pictures(self.given)

    def __len__(self) -> int:
        return len(self.given)

    def inputs(self) -> dict[str, Any]:
        """What pairs depend on besides the configuration and the model."""
        names = ("max_new_tokens", "top_k", "top_p", "picture_options", "dtype", "attention", "sample_batch")
        sampler = {name: getattr(self.adapter.settings, name) for name in names}
        temperatures = [made.settings.temperature for made in (self.answering, self.completing)]
        networks = {"encoder": self.encoder.identity, "similarity": self.similarity.identity}
        sampling = {**sampler, "temperatures": temperatures}
        return {"questions": self._hash(), "sampler": sampling, **networks, "seed": self.seed}

    def _hash(self) -> str:
        """SHA-256 of all questions: their words, given answers and pictures."""
        total = hashlib.sha256()
        for place in range(len(self)):
            row, name, where = self.given[place], _name(self.given[place], place), _where(self.given[place], place)
            condition = dict(_condition_of(row))
            images = [fingerprint(content_of(image, where=where)) for image in condition.pop("images", None) or ()]
            chosen = row.get("chosen") if self.config.chosen == "given" else None
            total.update(json.dumps([name, condition, images, chosen], sort_keys=True).encode())
        return total.hexdigest()

    def make(self, indices: range) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The pairs of these questions, and what became of all of them (:meth:`summary` puts such notes together).

        Raises:
            UserError: a picture that cannot be used, a prompt that leaves no room for an answer, no given answer where one is
                to be taken, or a chat template after which an answer cannot be gone on with.
        """
        questions = [self._question(index) for index in indices]
        self._choose(questions)
        self._mask(questions)
        note: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"ranks": {}, "similarities": [], "gaps": 0}
        note["asked"] = len(questions)
        note["empty"] = sum(not one.chosen for one in questions)
        waiting = [one for one in questions if one.masked is not None and one.masked.gaps]
        note["nothing_to_mask"] = len(questions) - note["empty"] - len(waiting)
        for one in waiting:
            one.similar = self.index.similar(one.picture, self.config.k, besides=self.pictures.of(one.index))
        pairs: dict[int, dict[str, Any]] = {}
        for rank in range(self.config.k):
            going = [one for one in waiting if one.index not in pairs and len(one.similar) > rank]
            for one, row in self._tried(going, rank, note):
                pairs[one.index] = row
        note["kept"], note["exhausted"] = len(pairs), len(waiting) - len(pairs)
        note["similarity"], note["encoder"] = self.similarity.identity, self.encoder.identity
        return [pairs[index] for index in sorted(pairs)], note

    @staticmethod
    def summary(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of all notes, as JSON: the counts; of the pairs the mean similarity of both answers, how many gaps an answer had, and
        which of the retrieved pictures (1 is the most similar) it was; and what answers and pictures were compared by."""
        found: dict[str, Any] = {name: sum(note[name] for note in notes) for name in COUNTS}
        ranks: Counter[int] = Counter()
        for note in notes:
            ranks.update({int(rank): number for rank, number in note["ranks"].items()})
        similarities = [value for note in notes for value in note["similarities"]]
        found["ranks"] = {str(rank): ranks[rank] for rank in sorted(ranks)}
        found["mean_rank"] = statistics.fmean(ranks.elements()) if ranks else None
        found["mean_similarity"] = statistics.fmean(similarities) if similarities else None
        found["gaps_of_a_pair"] = sum(note["gaps"] for note in notes) / max(1, found["kept"])
        for name in ("similarity", "encoder"):
            found[name] = next((note[name] for note in notes), None)
        return {**found, "tables": tables_of_re_align(found)}

    @staticmethod
    def lines(summary: dict[str, Any]) -> list[str]:
        """A summary for a terminal."""
        dropped = ", ".join(
            f"{summary[name]} {words}"
            for name, words in (
                ("empty", "with an empty answer"),
                ("nothing_to_mask", "with nothing to mask"),
                ("exhausted", "of which no similar picture gave another answer"),
            )
        )
        shown = [f"{summary['asked']} questions, {summary['kept']} pairs; dropped: {dropped}"]
        if summary["kept"]:
            shown.append(
                f"rejected answers: mean similarity {summary['mean_similarity']:.3f} ({summary['similarity']}), "
                f"{summary['gaps_of_a_pair']:.1f} gaps an answer, picture number {summary['mean_rank']:.1f} of the retrieved "
                "on average"
            )
        if summary["unfilled"]:
            shown.append(f"{summary['unfilled']} of {summary['tried']} completions left a gap")
        return shown

    # --- steps ---

    def _question(self, index: int) -> _Question:
        row = self.given[index]
        name, where, condition = _name(row, index), _where(row, index), dict(_condition_of(row))
        slot = _slot(condition, where)
        one = _Question(index, name, condition, self.pictures.of(index)[slot], slot)
        if self.config.chosen == "given":
            chosen = row.get("chosen") if "condition" in row else None
            if not isinstance(chosen, str):
                raise UserError(
                    f"{where}: chosen is {chosen!r}, and pairs.re_align.chosen: given takes the answer that stands with each "
                    "question. Give this one its 'chosen' (text), take it out, or set pairs.re_align.chosen: sampled"
                )
            one.chosen = chosen.strip()
        else:
            one.seed = seed_of(self.seed, "re_align", "chosen", name)
        return one

    def _choose(self, questions: Sequence[_Question]) -> None:
        """The model's own answers, where none are given."""
        asked = [one for one in questions if one.seed is not None]
        if not asked:
            return
        found = self.answering.sample(self.model, [one.condition for one in asked], [one.seed or 0 for one in asked])
        for one, answer in zip(asked, found, strict=True):
            one.chosen = answer.strip()

    def _mask(self, questions: Sequence[_Question]) -> None:
        """The gaps of every answer, by the rules or by the model's word."""
        told = [one for one in questions if one.chosen]
        if self.config.masker == "rules":
            for one in told:
                one.masked = self.rules(one.chosen, last_question(one.condition))
            return
        conditions = []
        for one in told:
            values = {"answer": one.chosen, "mask": self.config.mask, "question": last_question(one.condition)}
            conditions.append(with_question(one.condition, filled_in(self.config.masking_prompt, values)))
        seeds = [seed_of(self.seed, "re_align", "masking", one.name) for one in told]
        for one, reply in zip(told, self.completing.sample(self.model, conditions, seeds), strict=True):
            one.masked = aligned(reply, one.chosen, self.config.mask)

    def _tried(self, questions: Sequence[_Question], rank: int, note: dict[str, Any]) -> list[tuple[_Question, dict[str, Any]]]:
        """Completions under each question's picture of a rank, and the pairs of those below the gate."""
        tasks, images = [], []
        for one in questions:
            shown = list(one.condition["images"])
            shown[one.slot] = self.pictures[one.similar[rank].place]
            images.append(shown)
            assert one.masked is not None
            tasks.append(Task({**one.condition, "images": shown}, one.masked, _task_name(one, rank)))
        answers = complete(self.completing, self.model, tasks, self.config, seed=self.seed)
        note["tried"] += len(tasks)
        note["unfilled"] += sum(answer is None for answer in answers)
        done = [place for place, answer in enumerate(answers) if answer is not None]
        values = self.similarity.of([(questions[place].chosen, answers[place] or "") for place in done])
        found = []
        for place, value in zip(done, values, strict=True):
            one, answer = questions[place], answers[place]
            if value < self.config.gate and answer is not None:
                found.append((one, self._pair(one, answer, images[place], rank, value)))
                note["ranks"][str(rank + 1)] = note["ranks"].get(str(rank + 1), 0) + 1
                note["similarities"].append(round(value, 6))
                note["gaps"] += len(one.masked.gaps) if one.masked else 0
        return found

    def _pair(self, one: _Question, rejected: str, images: list[Any], rank: int, similarity: float) -> dict[str, Any]:
        assert one.masked is not None
        model, _, content_hash = self.model.identity.partition("@")
        sampler = {
            "chosen": self.config.chosen,
            "masked": one.masked.text(self.config.mask),
            "kinds": sorted({kind for gap in one.masked.gaps for kind in gap.kinds}),
            "completion": self.config.completion,
            "rank": rank + 1,
            "cosine": round(one.similar[rank].cosine, 6),
            "similarity": round(similarity, 6),
            "temperature": [self.answering.settings.temperature, self.completing.settings.temperature],
        }
        return {
            "pair_id": one.name,
            "condition": {"prompt": last_question(one.condition), **one.condition},
            "chosen": one.chosen,
            "rejected": rejected,
            "rejected_images": images,
            "chosen_scores": {},
            "rejected_scores": {},
            "provenance": {
                "model": model,
                "model_hash": content_hash or None,
                "chosen_seed": one.seed,
                "rejected_seed": seed_for(self.seed, _task_name(one, rank)),
                "sampler": sampler,
                "judges": {},
            },
        }


def _at_temperature(adapter: VlmAdapter, temperature: float | None) -> VlmAdapter:
    """The adapter with another temperature, and the same cache."""
    if temperature is None:
        return adapter
    found = VlmAdapter(replace(adapter.settings, temperature=temperature))
    found.cache = adapter.cache
    return found


def _task_name(one: _Question, rank: int) -> str:
    return f"{one.name}, picture {rank + 1}"


def _condition_of(row: Row) -> Mapping[str, Any]:
    return row["condition"] if "condition" in row else row


def _name(row: Row, index: int) -> str:
    return str(row.get("pair_id") or f"re-align-{index:06d}")


def _where(row: Row, index: int) -> str:
    """What a question is called in messages: where it stands, where the row says so in ``place``."""
    return str(row.get("place") or _name(row, index))


def _slot(condition: Row, where: str) -> int:
    """Which of a condition's images its answer depends on."""
    images, layout = condition["images"], condition.get("layout")
    slots = sorted({layout["places"][target]["image"] for target in layout["targets"]}) if layout else [*range(len(images))]
    if len(slots) != 1:
        raise UserError(
            f"{where}: the answer depends on {len(slots)} images, and Re-Align exchanges one. Ask about single images, or say "
            "in the row's layout which one is meant"
        )
    return slots[0]
