"""Rows of attention, recorded in one pass over finished answers.

Answers are sampled with whatever attention is fast. Then prompt and answer go through the model once more, with an attention
that gives SDPA's output and, in the layers asked for, the softmax of the answer's own queries, averaged over heads: some rows
of a matrix that eager attention would keep whole, of every layer and head.

Letters: B answers of a batch, H heads, D width of a head, L positions of prompt and answer, Q queries, T tokens of an answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyalign.core.adapter import Model
from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens import score_rows
from polyalign.modalities.token_sampling import evaluating
from polyalign.modalities.transformers_folders import autocast, plain
from polyalign.modalities.vlm import batches, scoring
from polyalign.modalities.vlm.attention_ratio import answer_rows
from polyalign.modalities.vlm.batches import VlmRow
from polyalign.modalities.vlm.families import prefixes
from polyalign.modalities.vlm.processing import Prompt
from polyalign.modalities.vlm.rows import separate

if TYPE_CHECKING:
    from polyalign.modalities.vlm.adapter import VlmAdapter

ATTENTION = "polyalign_attention_rows"
"""The name of our attention in transformers' registry."""

WITHOUT_MEANING = frozenset({"position_bias", "softcap", "s_aux"})
"""Arguments of attentions that the softmax here does not have: where one of them is given, rows are taken from eager
attention."""

_announced: set[str] = set()


class NoAttention(UserError):
    """The model does not say what it attends to."""


@dataclass(frozen=True)
class Recorded:
    """What one pass says of an answer. ``rows``: by layer, (Q, L) attention of the answer's queries
    (:func:`polyalign.modalities.vlm.attention_ratio.answer_rows`) to prompt and answer, averaged over heads, on the CPU;
    ``logps`` (T,): the log-probability of each of its tokens, the one that ends it included, at temperature 1."""

    rows: Mapping[int, Tensor]
    logps: Tensor


@torch.no_grad()
def record(
    adapter: VlmAdapter, model: Model, answers: Sequence[tuple[Prompt, Sequence[int]]], layers: Sequence[int]
) -> list[Recorded]:
    """The attention of every answer in ``layers``, in batches of ``settings.sample_batch``.

    Args:
        answers: prompts, and the ids of the answers, without image tokens.
        layers: of the language model, counted from 0.

    Raises:
        NoAttention: a model whose attention can be had in no way.
        UserError: a layer that is not there, or an answer that is empty or has an image token.
    """
    modules = attention_modules(model.network)
    if wrong := sorted(set(layers) - set(modules.values())):
        raise UserError(f"layer {wrong[0]}: the language model has the layers 0 to {max(modules.values(), default=-1)}")
    if any(model.parts["image_token"] in ids for _, ids in answers):
        raise UserError("an answer has an image token in it, for which there is no picture; drop it")
    order = sorted(range(len(answers)), key=lambda place: len(answers[place][0].ids) + len(answers[place][1]))
    found: dict[int, Recorded] = {}
    size = adapter.settings.sample_batch
    with evaluating([model]):
        for start in range(0, len(order), size):
            places = order[start : start + size]
            found |= zip(places, _batch(adapter, model, [answers[place] for place in places], layers), strict=True)
    return [found[place] for place in range(len(answers))]


def attention_modules(network: nn.Module) -> dict[int, int]:
    """The layer of each module of the language tower that has one, by ``id``."""
    model = plain(network)
    towers = [model.get_submodule(name) for name in prefixes(model)["language"]]
    return {
        id(module): int(module.layer_idx)
        for tower in towers
        for module in tower.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    }


def layers_of(model: Model) -> int:
    """How many layers the language model has."""
    return max(attention_modules(model.network).values(), default=-1) + 1


def _batch(
    adapter: VlmAdapter, model: Model, answers: Sequence[tuple[Prompt, Sequence[int]]], layers: Sequence[int]
) -> list[Recorded]:
    network, parts = plain(model.network), model.parts
    device = next(network.parameters()).device
    rows = [VlmRow((prompt,), (0,), (list(ids),)) for prompt, ids in answers]
    tensors = {
        name: tensor if name.startswith(batches.PICTURE) else tensor.to(device)
        for name, tensor in batches.collate(rows, parts["pad_id"]).items()
    }
    queries = [answer_rows(len(prompt.ids), len(ids)) for prompt, ids in answers]
    layout, prompts = separate(tensors)
    inputs: dict[str, Any] = layout.inputs() | scoring.about_prompts(parts["family"], layout, prompts, parts["image_token"])
    inputs |= scoring.pictures_for(network, parts["family"], tensors, prompts, adapter.features_of(model))
    recording = _Recording(layout.ids.shape[1], attention_modules(network), frozenset(layers), queries)
    with autocast(adapter.settings, device):
        with _attending(network, recording):
            scores = score_rows(network, layout, inputs, tensors["completion_ids"], adapter.scoring)
        if recording.refused is not None or set(recording.rows) != set(layers):
            recording.rows = _eager_rows(network, inputs, recording)
    found = []
    for place, (prompt, ids) in enumerate(answers):
        length = len(prompt.ids) + len(ids) - 1  # the last token is predicted and never read
        kept = {layer: recording.rows[layer][place][:, :length] for layer in layers}
        found.append(Recorded(kept, scores.values[place, 0, : len(ids)].cpu()))
    return found


@dataclass
class _Recording:
    """What the attention notes down: of ``layers`` the rows ``queries`` (one range for each of the batch), in passes over rows
    of ``length``: the head is tried out with others."""

    length: int
    modules: Mapping[int, int]
    layers: frozenset[int]
    queries: Sequence[range]
    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    refused: str | None = None

    def take(self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, given: Mapping[str, Any]) -> None:
        layer = self.modules.get(id(module))
        if layer not in self.layers or (query.shape[0], query.shape[2]) != (len(self.queries), self.length):
            return
        if strange := sorted(name for name in WITHOUT_MEANING if given.get(name) is not None):
            self.refused = f"its attention has {', '.join(strange)}"
            return
        scaling = given.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        groups = query.shape[1] // key.shape[1]
        with torch.autocast(query.device.type, enabled=False):  # in the width that is asked for
            self.rows[layer] = [
                _rows(query[place], key[place], None if mask is None else mask[min(place, len(mask) - 1)], own, scale, groups)
                for place, own in enumerate(self.queries)
            ]


def _rows(query: Tensor, key: Tensor, mask: Tensor | None, queries: range, scale: float, groups: int) -> Tensor:
    """(Q, L) softmax of the queries' products with the keys they may see, averaged over heads, on the CPU.

    Args:
        query: (H, L, D). key: (H / groups, L, D). mask: (1, L, L) bool, or added; None is causal.
    """
    index = torch.arange(queries.start, queries.stop, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    picked = query[:, index].unflatten(0, (-1, groups)).to(wide)  # (heads of keys, groups, Q, D)
    products = torch.einsum("hgqd,hkd->hgqk", picked, key.to(wide)) * scale
    if mask is None:
        seen = torch.arange(key.shape[1], device=key.device) <= index[:, None]
        products = products.masked_fill(~seen, -torch.inf)
    elif mask.dtype == torch.bool:
        products = products.masked_fill(~mask[:, index].unsqueeze(1), -torch.inf)
    else:
        products = products + mask[:, index].unsqueeze(1)
    return products.softmax(-1).mean((0, 1)).cpu()


_current: list[_Recording] = []  # of the pass that is under way


def attention_with_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA (B, H, L, D) for transformers' registry of attentions, which also notes down the rows that are wanted."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _current:
        _current[-1].take(module, query, key, attention_mask, kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None


@contextmanager
def _attending(network: Any, recording: _Recording) -> Iterator[None]:
    """With the recording attention in the language model, and as before afterwards."""
    if not network._can_set_attn_implementation():
        recording.refused = "it does not follow transformers' registry of attentions"
        yield
        return
    _register()
    with _attention(network, ATTENTION):
        _current.append(recording)
        try:
            yield
        finally:
            _current.remove(recording)


@contextmanager
def _attention(network: Any, name: str) -> Iterator[None]:
    """The whole model with another attention, each part as before afterwards."""
    configs = {part: getattr(network.config, part, None) for part in network.config.sub_configs}
    before = {part: config._attn_implementation for part, config in configs.items() if config is not None}
    own = network.config._attn_implementation
    network.set_attn_implementation(name)
    try:
        yield
    finally:
        network.set_attn_implementation({"": own, **before})


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attention_with_rows)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _eager_rows(network: Any, inputs: Mapping[str, Any], recording: _Recording) -> dict[int, list[Tensor]]:
    """The same from eager attention, which keeps all of every layer.

    Raises:
        NoAttention: there is none.
    """
    name, reason = type(network).__name__, recording.refused or "it does not call the attention that is set"
    if name not in _announced:
        _announced.add(name)
        print(f"{name}: attention is recorded by a pass in eager mode: {reason}", file=sys.stderr, flush=True)
    if network._can_set_attn_implementation():
        with _attention(network, "eager"):
            found = network(**inputs, use_cache=False, output_attentions=True)
    else:
        found = network(**inputs, use_cache=False, output_attentions=True)
    attentions = list(getattr(found, "attentions", None) or ())
    layers = len(set(recording.modules.values()))
    if len(attentions) != layers or any(attentions[layer] is None for layer in recording.layers):
        given = sum(attention is not None for attention in attentions)
        raise NoAttention(
            f"{name} gives the attention of {given} of its {layers} layers, also in eager mode ({reason}). Take another layer, "
            "turn the selection by attention off (filter.attention: null), or take another model"
        )
    return {
        layer: [
            attentions[layer][place, :, queries].mean(0).cpu() for place, queries in enumerate(map(list, recording.queries))
        ]
        for layer in recording.layers
    }
