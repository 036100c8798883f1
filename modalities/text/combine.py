"""COFS-DPO (arXiv 2406.05534): the adapters of several runs, one for each domain, combined into one.

    python -m polyalign.modalities.text.combine FOLDER RUN RUN [RUN ...] [--pairs 32] [--space simplex] [--rank N]

Each RUN is the folder of a finished run on the same base, with a LoRA, such as those with objective ofs_dpo. Some pairs of each
run are the memory on which coefficients are chosen, each domain counting the same; ``FOLDER/adapter`` is the combination, in
peft's format, and ``FOLDER/combination.json`` has the coefficients and each domain's loss, alone and combined. A LoRA for the
next domain goes on from it by ``model.lora.start``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyalign.core.adapter import Row
from polyalign.core.cofs import Replay, Space, choose_coefficients, combine_adapters
from polyalign.core.config import load
from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.core.objectives import Beta, build
from polyalign.core.randomness import permutation
from polyalign.core.references import AdapterOff
from polyalign.datasets.pairs import PairStore
from polyalign.modalities.text import lora
from polyalign.modalities.text.config import TextRecipe
from polyalign.modalities.text.training import open_model

SUMMARY = "combination.json"
WHOLE = "whole"
"""The adapter that combinations are tried in where the one to export is cut to a lower rank."""


def combine(
    runs: Sequence[Path], folder: Path, *, pairs: int = 32, space: Space = "simplex", rank: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Combine the adapters of ``runs`` into ``folder/adapter``; returns what ``combination.json`` says.

    Args:
        pairs: of each run, chosen by ``seed``, for the memory.
        space: of the coefficients: at least 0 and with the sum 1, or each by itself from 0 to 2.
        rank: of the combination; None keeps the sum of the ranks, which is exact.

    Raises:
        UserError: fewer than two runs, two of one name, one that is no finished run with a LoRA and pairs, other bases, an
            objective that compares without pairs or with more than a reference; something in ``folder`` already.
    """
    recipes = {name: _recipe(run) for name, run in _named(runs).items()}
    _refuse_other_models(recipes)
    if (folder / "adapter").exists():
        raise UserError(f"{folder / 'adapter'}: exists already; nothing was written. Give another folder")
    first = next(iter(recipes.values()))
    names = list(recipes)
    adapter, model = open_model(first)
    for name, run in zip(names, runs, strict=True):
        adapter.load_lora(model, run / "adapter", name=_adapter(name))
    model.network.requires_grad_(False)
    memory = {name: _memory(run, pairs, seed) for name, run in zip(names, runs, strict=True)}
    replay = Replay(adapter, model, build(first.objective), Beta.of(first.objective.beta), AdapterOff(model.network), memory)
    loaded = [_adapter(name) for name in names]
    alone = {name: replay.losses(_adapter(name)) for name in names}
    chosen = choose_coefficients(model.network, loaded, replay, space=space, into=WHOLE)
    lost = combine_adapters(model.network, loaded, chosen.coefficients, into=lora.NAME, rank=rank)
    found = {
        "runs": {name: str(run) for name, run in zip(names, runs, strict=True)},
        "coefficients": dict(zip(names, chosen.coefficients, strict=True)),
        "space": space,
        "objective": first.objective.model_dump(mode="json"),
        "memory": {name: len(rows) for name, rows in memory.items()},
        "loss": {"combined": replay.losses(lora.NAME), **alone},
        "combinations_tried": chosen.tried,
        "rank": model.network.peft_config[lora.NAME].r,  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        "lost_by_rank": lost,
        "seed": seed,
    }
    adapter.export(model, folder / "adapter", card={"base": model.identity, "combined": found["coefficients"], "seed": seed})
    atomic_write(folder / SUMMARY, json.dumps(found, indent=1) + "\n")
    return found


def _named(runs: Sequence[Path]) -> dict[str, Path]:
    """The runs by the names of their folders."""
    named = {run.resolve().name: run for run in runs}
    if len(runs) < 2 or len(named) < len(runs):
        raise UserError("a combination is of two or more runs whose folders have different names")
    return named


def _adapter(name: str) -> str:
    """The name of a run's adapter on the network: peft's names take no dots."""
    return "of_" + "".join(letter if letter.isalnum() else "_" for letter in name)


def _recipe(run: Path) -> TextRecipe:
    if not (run / "config.yaml").is_file() or not (run / "adapter" / "adapter_config.json").is_file():
        raise UserError(f"{run}: is no finished run with a LoRA (looked for config.yaml and adapter/adapter_config.json)")
    return load(run / "config.yaml", [], TextRecipe)[0]


def _refuse_other_models(recipes: dict[str, TextRecipe]) -> None:
    first, *others = recipes.items()
    for name, recipe in others:
        for key in ("base", "revision", "chat_template"):
            own, wanted = getattr(recipe.model, key), getattr(first[1].model, key)
            if own != wanted:
                raise UserError(
                    f"adapters of one base can be combined: model.{key} of {first[0]} is {wanted!r}, and that of {name} {own!r}"
                )
    objective = build(first[1].objective)
    if "pairs" not in objective.data or set(objective.seats) - {"policy", "reference", "partner"}:
        raise UserError(
            f"coefficients are chosen by the loss of pairs against the base, and {first[0]} has objective {objective.name}. "
            "Name a run with objective dpo, or the like, first"
        )


def _memory(run: Path, count: int, seed: int) -> list[Row]:
    """Some pairs of a run, chosen by key, in the order of its store."""
    store = PairStore(run / "pairs", "text")
    chosen = permutation(seed, len(store), "combination", run.name)[:count]
    return list(store.rows(sorted(chosen)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser("python -m polyalign.modalities.text.combine", description="Combine adapters (COFS-DPO)")
    parser.add_argument("folder", type=Path, help="where the combination goes: adapter/ and combination.json")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs on one base, two or more")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of each run that coefficients are chosen on (default: 32)")
    parser.add_argument("--space", choices=("simplex", "coordinates"), default="simplex", help="of the coefficients")
    parser.add_argument("--rank", type=int, help="cut the combination to this rank (default: the sum of the ranks, exact)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        found = combine(given.runs, given.folder, pairs=given.pairs, space=given.space, rank=given.rank, seed=given.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for name, coefficient in found["coefficients"].items():
        losses = found["loss"]
        print(f"{name}: coefficient {coefficient:.3f}; loss {losses[name][name]:.4f} alone, {losses['combined'][name]:.4f} now")
    print(f"{given.folder / 'adapter'}: rank {found['rank']}, {100 * found['lost_by_rank']:.2g} % lost by the cut")
    return 0


if __name__ == "__main__":
    sys.exit(main())
