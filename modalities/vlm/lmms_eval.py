"""Our models in lmms-eval: the base, or the base with a LoRA that was trained here, on every task that it has.

    lmms-eval --model polyalign --model_args base=tiny,adapter=runs/vlm/adapter --tasks pope --batch_size 8

lmms-eval (0.7 or newer) finds :func:`manifest` through the entry-point group ``lmms_eval.models``. Tasks are answered in its
chat form; ``--force_simple`` takes its older form, with which alone it runs multiple choice by likelihood. Pictures stand where
a task puts them, or where its words have ``<image>``.

Known differences from its own models: texts in ``until`` end answers, but its default, an empty line, does not; beam search is
refused; pictures only, no video and no sound. Likelihoods are given as its own models give them, as the mean negative
log-probability of a token, since lmms-eval takes the least of several; the end of the turn is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from polyalign.core.errors import UserError
from polyalign.core.optional import require

PLACEHOLDER = "<image>"
SETTINGS = ("base", "revision", "dtype", "device", "attention", "chat_template", "prefix_sharing")
"""Of :class:`polyalign.modalities.vlm.settings.VlmModelSettings`, those that ``--model_args`` may have."""

Condition = dict[str, Any]
Following = Callable[[int, list[str], Any], "tuple[Condition, Any] | None"]


def manifest() -> Any:
    """What lmms-eval registers: the model ``polyalign`` in both forms."""
    registry = _lmms_eval("models.registry_v2")
    return registry.ModelManifest(
        model_id="polyalign",
        simple_class_path=f"{__name__}.PolyalignVlm",
        chat_class_path=f"{__name__}.PolyalignVlmChat",
    )


def __getattr__(name: str) -> Any:
    """The two classes, made when lmms-eval asks for them: their base class is its own."""
    if name in ("PolyalignVlm", "PolyalignVlmChat"):
        made = _classes()
        globals().update(made)
        return made[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def condition_of_text(words: str, pictures: Any) -> Condition:
    """The condition of a task in the simple form: pictures where the words have ``<image>``, if they have it once for each,
    else before the words.

    Raises:
        UserError: something else than pictures.
    """
    images = _pictures(pictures)
    parts = _in_place([*({"type": "image"} for _ in images), {"type": "text", "text": words}])
    return {"messages": [{"role": "user", "content": parts}], "images": images}


def condition_of_messages(messages: Sequence[Mapping[str, Any]]) -> Condition:
    """The condition of a task in the chat form, whose parts of type image hold their picture as ``url``. Many tasks give a
    turn's pictures first and write ``<image>`` where they belong: they are put there.

    Raises:
        UserError: a part that is neither text nor picture.
    """
    turns, images = [], []
    for turn in messages:
        content = turn["content"]
        parts: list[Condition] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                images += _pictures([part["url"]])
                parts.append({"type": "image"})
            else:
                raise UserError(f"this task has a part of type {part['type']}; this model sees texts and pictures")
        turns.append({"role": turn["role"], "content": _in_place(parts)})
    return {"messages": turns, "images": images}


def _in_place(parts: Sequence[Condition]) -> list[Condition]:
    """A turn's parts without ``<image>`` in its words: the pictures stand there if it is written once for each of them, else
    where they were."""
    written = sum(part["text"].count(PLACEHOLDER) for part in parts if part["type"] == "text")
    moved = written > 0 and written == sum(part["type"] == "image" for part in parts)
    found: list[Condition] = []
    for part in parts:
        if part["type"] == "image":
            found += [] if moved else [part]
            continue
        for place, piece in enumerate(part["text"].split(PLACEHOLDER)):
            found += [{"type": "image"}] if place and moved else []
            found += [{"type": "text", "text": piece}] if piece.strip() else []
    return found


def _pictures(given: Any) -> list[Image.Image]:
    found = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    flat = [one for entry in found for one in (entry if isinstance(entry, list | tuple) else [entry])]
    for one in flat:
        if not isinstance(one, Image.Image):
            raise UserError(f"this task shows a {type(one).__name__} ({str(one)[:80]!r}); this model sees pictures alone")
    return flat


def settings_of(arguments: Mapping[str, Any], *, batch_size: Any, device: str | None) -> dict[str, Any]:
    """``--model_args``, the batch size and the device as settings of the model.

    Raises:
        UserError: an argument that is not known, or a batch size that is no number.
    """
    unknown = set(arguments) - set(SETTINGS)
    if unknown:
        raise UserError(f"--model_args: {', '.join(sorted(unknown))}; known: adapter, seed, {', '.join(SETTINGS)}")
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise UserError(f"--batch_size is {batch_size!r}; give a number of answers at once, 1 or more")
    chosen = {name: value for name, value in arguments.items() if value is not None}
    return {"device": device or "auto", **chosen, "sample_batch": int(batch_size), "append_eos": False}


def _lmms_eval(module: str) -> Any:
    return require(f"lmms_eval.{module}", extra="lmms", purpose="evaluation by lmms-eval")


def _kept(pair: tuple[float, bool]) -> Any:
    """A likelihood in a form that lmms-eval leaves as it is: 0.7.3 makes text of pairs that are not wrapped as answers."""
    instance = _lmms_eval("api.instance")
    unwrap = getattr(instance, "unwrap_generation_output", None)
    return pair if unwrap is None or unwrap(pair)[0] == pair else instance.GenerationResult(pair)


class _Answering:
    """What both forms share: the model, and requests answered by groups of the same options."""

    cache_hook: Any
    task_dict: Any

    def __init__(
        self,
        base: str = "tiny",
        adapter: str | None = None,
        batch_size: Any = 1,
        device: str | None = None,
        seed: int = 0,
        max_batch_size: Any = None,
        **arguments: Any,
    ):
        """Raises:
        UserError: an argument that is not known, no such base, or no such LoRA.
        """
        from polyalign.modalities.vlm.harness import Harness
        from polyalign.modalities.vlm.settings import VlmModelSettings

        super().__init__()
        settings = settings_of({"base": base, **arguments}, batch_size=batch_size, device=device)
        self.harness = Harness(VlmModelSettings(**settings), adapter, seed=int(seed))

    def document(self, task: str, split: str, number: Any) -> Any:
        return self.task_dict[task][split][number]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """(mean negative log-probability of a token, whether the answer is the greedy one) for each request."""
        conditions, answers = [], []
        for words, target, pictures_of, number, task, split in (request.args for request in requests):
            document = self.document(task, split, number)
            conditions.append(condition_of_text(words, pictures_of(document)))
            answers.append((target if isinstance(target, str) else str(target(document))).strip())
        found = self.harness.likelihoods(conditions, answers)
        return [_kept((-total / count, greedy)) for total, count, greedy in found]

    def answered(self, requests: Sequence[Any], conditions: Sequence[Condition], options: Sequence[Any]) -> list[str]:
        """An answer to each condition, those with the same options together."""
        from polyalign.modalities.vlm.harness import Wanted

        groups: dict[Wanted, list[int]] = {}
        for place, one in enumerate(options):
            groups.setdefault(Wanted.of(one or {}), []).append(place)
        found = [""] * len(conditions)
        for wanted, places in groups.items():
            keys = [f"{requests[place].task_name} {requests[place].doc_id} {requests[place].idx}" for place in places]
            said = self.harness.answers([conditions[place] for place in places], wanted, keys)
            for place, answer in zip(places, said, strict=True):
                found[place] = answer
                words = str(requests[place].args[0])
                self.cache_hook.add_partial("generate_until", (words, options[place]), answer)
        return found

    def rounds(self, request: Any, options: Any, first: Condition, following: Following) -> list[str]:
        """What is said in each round. ``following(round, said, notes)`` gives the next condition with the task's notes, or None
        at the end."""
        said: list[str] = []
        condition, notes = first, None
        while True:
            said += self.answered([request], [condition], [options])
            after = following(len(said), said, notes)
            if after is None:
                return said
            condition, notes = after


def _classes() -> dict[str, type]:
    base: Any = _lmms_eval("api.model").lmms

    class PolyalignVlm(_Answering, base):
        """lmms-eval's simple form: words, and pictures beside."""

        is_simple = True

        def generate_until(self, requests: list[Any]) -> list[str]:
            conditions, options = [], []
            for words, wanted, pictures_of, number, task, split in (request.args for request in requests):
                conditions.append(condition_of_text(words, pictures_of(self.document(task, split, number))))
                options.append(wanted)
            return self.answered(requests, conditions, options)

        def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
            return [self._rounds(request) for request in requests]

        def _rounds(self, request: Any) -> list[str]:
            words, options, pictures_of, words_of, number, task, split = request.args
            document = self.document(task, split, number)

            def following(place: int, said: list[str], notes: Any) -> Any:
                found = words_of(document, previous_output=list(said), round_idx=place, previous_round_info=notes)
                if not (isinstance(found, tuple) and len(found) == 5) or found[2]:
                    return None
                return condition_of_text(found[1], found[0]), found[4]

            return self.rounds(request, options, condition_of_text(words, pictures_of(document)), following)

    class PolyalignVlmChat(PolyalignVlm):
        """lmms-eval's chat form: messages with pictures in their places."""

        is_simple = False

        def generate_until(self, requests: list[Any]) -> list[str]:
            conditions, options = [], []
            for _, messages_of, wanted, number, task, split in (request.args for request in requests):
                conditions.append(condition_of_messages(messages_of(self.document(task, split, number))))
                options.append(wanted)
            return self.answered(requests, conditions, options)

        def _rounds(self, request: Any) -> list[str]:
            _, messages_of, options, number, task, split = request.args
            document = self.document(task, split, number)

            def following(place: int, said: list[str], notes: Any) -> Any:
                found = messages_of(document, round_idx=place, previous_output=list(said), previous_round_info=notes)
                if not (isinstance(found, tuple) and len(found) == 4) or found[1]:
                    return None
                return condition_of_messages(found[0]), found[3]

            return self.rounds(request, options, condition_of_messages(messages_of(document)), following)

    made: dict[str, type] = {"PolyalignVlm": PolyalignVlm, "PolyalignVlmChat": PolyalignVlmChat}
    for name, one in made.items():
        one.__qualname__ = name
    return made
