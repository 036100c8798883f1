"""What is trained on, and what is kept for evaluation: no prompt is ever on both sides."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from polyalign.core.errors import UserError
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.pictures import content_digest

SHOWN_OVERLAPS = 5

Condition = Mapping[str, Any]
Prompts = TypeVar("Prompts", covariant=True)


class Evaluate(Protocol, Generic[Prompts]):
    """What a recipe says of the prompts of an evaluation."""

    @property
    def prompts(self) -> Prompts | None: ...

    @property
    def held_out(self) -> float: ...

    @property
    def seeds_per_prompt(self) -> int: ...


class TrainingPairs:
    """The trainer's view of the pair store: without the pairs whose prompts are kept for evaluation, and with pictures as the
    bytes of their files, which the adapter decodes only if it does not have their latents."""

    def __init__(self, store: PairStore, indices: Sequence[int]):
        self.store, self.indices = store, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.store.rows([self.indices[index] for index in indices], decode=False)


def split_pairs(evaluate: Evaluate[Any], seed: int, store: PairStore) -> tuple[list[int], list[int]]:
    """Indices to train on and indices kept aside. Pairs with one prompt (or conversation) stay on one side, however
    it is spaced or capitalised: the hash of its words decides; of conditions with pictures that of the pictures does, so that
    all that is asked about them stays on one side. A picture that stands beside others in several conditions may be on both.

    Raises:
        UserError: one of the two would be empty.
    """
    if evaluate.prompts is not None:
        return list(range(len(store))), []
    return _split(evaluate, seed, store.conditions())


def _split(evaluate: Evaluate[Any], seed: int, conditions: Sequence[Condition]) -> tuple[list[int], list[int]]:
    """As :func:`split_pairs`, where no prompts are given."""
    everything = list(range(len(conditions)))
    kept = [index for index in everything if _kept_aside(conditions[index], evaluate.held_out, seed)]
    if not kept:
        raise UserError(
            f"evaluate.held_out = {evaluate.held_out} keeps none of the {len(everything)} pairs aside, so there is "
            "nothing to evaluate on. Raise it, or give evaluate.prompts"
        )
    if len(kept) == len(everything):
        raise UserError(
            f"evaluate.held_out = {evaluate.held_out} keeps all of the {len(everything)} pairs aside, so there is "
            "nothing to train on. Lower it, or give evaluate.prompts"
        )
    aside = set(kept)
    return [index for index in everything if index not in aside], kept


def tell_kept_aside(evaluate: Evaluate[Any], trained: Sequence[int], kept: Sequence[int], what: str = "pairs") -> None:
    """Say on stderr how many are kept aside, which of few may be far from the share asked for; nothing where none are."""
    if not kept:
        return
    everything = len(trained) + len(kept)
    found = f"{len(kept)} of {everything} {what} ({len(kept) / everything:.0%})"
    print(f"evaluate.held_out = {evaluate.held_out:g} keeps {found} aside for evaluation", file=sys.stderr, flush=True)


def _kept_aside(condition: Condition, share: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed} {_pictures(condition) or _words(condition)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share


def evaluation_conditions(
    evaluate: Evaluate[Prompts], seed: int, store: PairStore, conditions_of: Callable[[Prompts, int], Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Prompts that took no part in training; each prompt as often as it gets seeds. ``conditions_of(prompts, seed)`` gives
    those that the recipe asks for.

    Raises:
        UserError: ``evaluate.prompts`` asks for prompts of pairs that are trained on.
    """
    known = store.conditions()
    if evaluate.prompts is not None:
        conditions = conditions_of(evaluate.prompts, seed)
        _refuse_overlap(conditions, known)
    else:
        conditions = [known[index] for index in _asked_aside(evaluate, seed, known)]
    return [condition for condition in conditions for _ in range(evaluate.seeds_per_prompt)]


def asked_aside(evaluate: Evaluate[Any], seed: int, store: PairStore) -> list[int]:
    """Of the pairs that are kept aside one for each prompt, in the order in which they are evaluated."""
    return _asked_aside(evaluate, seed, store.conditions())


def _asked_aside(evaluate: Evaluate[Any], seed: int, known: Sequence[Condition]) -> list[int]:
    return list({_asked(known[index]): index for index in _split(evaluate, seed, known)[1]}.values())


def _refuse_overlap(conditions: Sequence[Condition], trained: Sequence[Condition]) -> None:
    """Case and spacing make no other prompt."""
    seen = {_words(condition) for condition in trained}
    shared = list(dict.fromkeys(condition["prompt"] for condition in conditions if _words(condition) in seen))
    if not shared:
        return
    shown = ", ".join(repr(prompt) for prompt in shared[:SHOWN_OVERLAPS])
    more = f" and {len(shared) - SHOWN_OVERLAPS} more" if len(shared) > SHOWN_OVERLAPS else ""
    raise UserError(
        f"evaluate.prompts: {len(shared)} of these prompts are also prompts of the pairs that are trained on, so they would "
        f"be no test: {shown}{more}. Take them out of evaluate.prompts, or give others; without evaluate.prompts a share of "
        "the pairs is kept aside (evaluate.held_out)"
    )


def _asked(condition: Condition) -> str:
    """What tells a condition from others: its prompt, of a conversation all turns, since many end with the same words, and its
    pictures, of which the same is asked."""
    turns = condition.get("messages")
    words = condition["prompt"] if turns is None else "\n".join(f"{turn['role']}: {_said(turn['content'])}" for turn in turns)
    return "\n".join([words, *([_pictures(condition)] if condition.get("images") else [])])


def _pictures(condition: Condition) -> str:
    """The pictures of a condition: whatever is asked about them stays on one side."""
    return "\n".join(content_digest(picture) for picture in condition.get("images") or ())


def _said(content: Any) -> str:
    """A turn's text; of one in parts the texts, and a mark where a picture stands, apart from the words whether the data have
    a line break there or not."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if part.get("type") == "text" else f" <{part.get('type')}> " for part in content)


def _words(condition: Condition) -> str:
    return " ".join(_asked(condition).split()).casefold()


def keeps_pairs(recipe: Any) -> bool:
    """Whether some of the run's pairs take no part in training."""
    return recipe.evaluate.prompts is None and recipe.online is None and not recipe.pairs.labelled
