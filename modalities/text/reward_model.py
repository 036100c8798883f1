"""Explicit reward models of texts: a Bradley-Terry head on any model of transformers that can classify sequences.

    python -m polyalign.modalities.text.reward_model FOLDER --base BASE --pairs STORE [--held-out STORE] [--epochs 1]

The network is transformers' own ``AutoModelForSequenceClassification`` with one label, which takes the last token's state of a
causal language model (the first's of an encoder), so what is saved is what transformers opens. What it reads of a pair is said
by :func:`polyalign.evaluation.text_judges.conversation.sequence_ids`, which the judge ``reward_model`` asks too.

Letters: N texts, L their padded length.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from polyalign.core.adapter import Row
from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write, disk_full_explained
from polyalign.core.objectives import build
from polyalign.core.objectives.table_free import BradleyTerry
from polyalign.core.randomness import seed_of
from polyalign.core.recipe import OptimizerConfig, TrainSettings
from polyalign.core.reward_model import PAIR, RewardTraining
from polyalign.core.trainer import Trainer
from polyalign.datasets.pairs import PairStore
from polyalign.evaluation.network_judge import quietly
from polyalign.evaluation.reward_accuracy import pair_accuracy
from polyalign.evaluation.text_judges.conversation import sequence_ids
from polyalign.evaluation.text_judges.folders import padded
from polyalign.evaluation.text_judges.reward_model import RewardModelJudge, positions_of
from polyalign.modalities.text.loading import autocast, device_of, open_base, plain, quiet
from polyalign.modalities.text.settings import TextModelSettings

EXPORT = "reward_model"
"""Folder of the trained model in the run's."""
SUMMARY = "reward_model.json"


@dataclass(frozen=True)
class RewardModel:
    """A reward model in memory; ``settings`` are those of its base."""

    network: nn.Module
    tokenizer: Any
    settings: TextModelSettings
    identity: str
    noise: Mapping[str, float]

    @property
    def config(self) -> Any:
        return plain(self.network).config

    def collate(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> dict[str, Tensor]:
        """``ids`` and ``mask`` (N, L), padded on the right."""
        rows = [sequence_ids(self.tokenizer, *pair) for pair in zip(conditions, outputs, strict=True)]
        ids, mask = padded(rows, self.config.pad_token_id)
        return {"ids": ids, "mask": mask}

    def rewards(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        """(N,)."""
        with autocast(self.settings, tensors["ids"].device):
            return network(input_ids=tensors["ids"], attention_mask=tensors["mask"]).logits[:, 0]

    def longer_than_allowed(self, row: Row) -> str | None:
        """Why a pair does not fit, or None."""
        length = max(len(sequence_ids(self.tokenizer, row["condition"], row[name])) for name in PAIR)
        limits = {"max_length": self.settings.max_length, "the model's positions": positions_of(self.config)}
        broken = [f"{name}, {limit}" for name, limit in limits.items() if limit is not None and length > limit]
        return f"{length} tokens, more than {broken[0]}" if broken else None


def load_reward_model(settings: TextModelSettings) -> RewardModel:
    """A base with a reward head of zeros, ready to be trained: all of it, or the head and a LoRA on the rest. A folder that has
    a head of one label already goes on from it. Dropout is off, as in all training here.

    Raises:
        UserError: no such base, one that transformers cannot classify with, or ``qlora``, whose weights of 4 bits do not merge.
    """
    if settings.train == "qlora":
        raise UserError(
            "train is qlora, and a reward model is saved whole, which weights of 4 bits cannot be. Take lora or full"
        )
    if settings.max_prompt_tokens is not None or settings.max_completion_tokens is not None:
        raise UserError("a reward model reads prompt and answer as one: give max_length, not max_prompt_tokens or the like")
    base = open_base(settings)
    tokenizer, config = base.tokenizer, base.config
    pad = next((one for one in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), None)
    if pad is None:
        raise UserError(
            f"the tokenizer in {base.folder} has neither a padding nor an end-of-sequence token, and transformers finds the "
            "last token of a text by its padding. Give the tokenizer a pad_token"
        )
    config.pad_token_id, config.num_labels = pad, 1
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = pad
    network, fresh = _network(base.folder, config, settings)
    with torch.no_grad():
        for head in _heads(network) if fresh else ():
            head.weight.zero_()
            if head.bias is not None:
                head.bias.zero_()
    network = _trainable(network, settings).to(device_of(settings))
    for head in _heads(network):  # rewards keep the precision of the head, whatever the base's
        head.register_forward_pre_hook(_in_own_dtype)
    return RewardModel(network.train(), tokenizer, settings, base.identity, base.noise)


@dataclass(frozen=True)
class RewardResult:
    """``folder`` is the trained model's; ``accuracy`` is that on held-out pairs, as :func:`pair_accuracy` gives it, or None."""

    folder: Path
    pairs: int
    left_out: int
    accuracy: dict[str, Any] | None


def train_reward_model(
    rows: Sequence[Row],
    folder: str | Path,
    *,
    model: TextModelSettings,
    train: TrainSettings,
    objective: BradleyTerry | None = None,
    held_out: Sequence[Row] = (),
) -> RewardResult:
    """Train a reward model on pairs and save it in ``folder/reward_model``.

    Pairs that are too long are left out and counted, never cut. A training that was interrupted goes on from its last
    checkpoint.

    Args:
        rows: pairs: ``pair_id``, ``condition``, ``chosen``, ``rejected``.
        folder: of the run: checkpoints, metrics.jsonl, the model, and ``reward_model.json``, which says what was done.
        model: the base and how it is trained; ``model.seed`` also keys the order of the pairs.
        train: the loop. ``train.reference`` has no meaning here.
        objective: margin, centring and beta; the factor on a reward is ``beta.value``, whatever its convention.
        held_out: pairs for the accuracy.

    Raises:
        UserError: no pairs that fit; what the trainer and the base refuse.
    """
    folder, parameters = Path(folder), objective or BradleyTerry()
    reward = load_reward_model(model)
    if train.gradient_checkpointing or model.gradient_checkpointing:
        plain(reward.network).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept, left_out = _fitting(reward, rows)
    held, held_left_out = _fitting(reward, held_out)
    algorithm = RewardTraining(
        reward.network, reward.collate, build(parameters), rewards=reward.rewards, beta=parameters.beta.value
    )
    identity = {
        "base": reward.identity,
        "pairs": _hash(kept),
        "objective": parameters.model_dump(mode="json"),
        "model": {name: getattr(model, name) for name in ("train", "rank", "scale", "dropout", "targets", "dtype")},
    }
    Trainer(algorithm, _Rows(kept), train, folder, seed=model.seed, identity=identity).run()
    save_reward_model(reward, folder / EXPORT)
    accuracy = None
    if held:
        judge = RewardModelJudge(model=str(folder / EXPORT), device=str(device_of(model)))
        accuracy = pair_accuracy(judge, held, seed=model.seed).as_json()
    done = {
        **identity,
        "trained_pairs": len(kept),
        "left_out": left_out,
        "held_out": accuracy,
        "held_out_left_out": held_left_out,
    }
    atomic_write(folder / SUMMARY, json.dumps(done, indent=2, default=str) + "\n")
    return RewardResult(folder / EXPORT, len(kept), sum(left_out.values()), accuracy)


def save_reward_model(reward: RewardModel, folder: Path) -> None:
    """Write the model, a LoRA merged into it, in the format of ``AutoModelForSequenceClassification``, with the tokenizer. All
    is written beside the folder first, so that an interruption or a full disk leaves an earlier one as it was."""
    network: Any = plain(reward.network)
    if hasattr(network, "merge_and_unload"):
        network = network.merge_and_unload()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with disk_full_explained(f"the reward model {folder}, which is as it was before"), quiet():
            network.save_pretrained(partial)
            reward.tokenizer.save_pretrained(partial)
            config = json.loads((partial / "config.json").read_text(encoding="utf-8")) | dict(reward.noise)
            (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            (folder / file.relative_to(partial)).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, folder / file.relative_to(partial))
    finally:
        shutil.rmtree(partial)


class _Rows:
    """Pairs in memory as the trainer takes them."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        return [self._rows[index] for index in indices]


def _network(folder: Path, config: Any, settings: TextModelSettings) -> tuple[Any, bool]:
    """The network of a folder, and whether its head is fresh: what a head has before its last layer is drawn by the seed."""
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(settings.seed, "reward head"))
            network, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=settings.weights_dtype,
                attn_implementation=settings.attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the model in {folder} cannot be given a reward head: {reason}") from error
    inside = f"{network.base_model_prefix}."
    # An encoder's pooler belongs to the head: language models are published without.
    missing = [name for name in info["missing_keys"] if name.startswith(inside) and "pooler" not in name]
    if missing:
        raise UserError(f"{folder} is no whole model: it lacks {missing[0]} and {len(missing) - 1} more")
    heads = {id(parameter) for head in _heads(network) for parameter in head.parameters()}
    return network, any(id(network.get_parameter(name)) in heads for name in info["missing_keys"])


def _heads(network: nn.Module) -> list[nn.Linear]:
    """The layers with a single output: a reward."""
    return [part for part in network.modules() if isinstance(part, nn.Linear) and part.out_features == 1]


def _in_own_dtype(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(layer.parameters()).dtype
    return tuple(value.to(dtype) for value in inputs)


def _trainable(network: Any, settings: TextModelSettings) -> Any:
    if settings.train == "full":
        return network.requires_grad_(True)
    everything = tuple(settings.targets) == ("all-linear",)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale,  # type: ignore[arg-type]  (peft says int and takes any number)
        lora_dropout=settings.dropout,
        target_modules="all-linear" if everything else list(settings.targets),
        task_type="SEQ_CLS",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from torch's global generator, on the CPU
        torch.manual_seed(seed_of(settings.seed, "lora"))
        try:
            with quietly():
                wrapped = get_peft_model(network, config)
        except ValueError as error:
            raise UserError(
                f"the LoRA targets {list(settings.targets)} do not fit this network ({str(error).splitlines()[0][:200]}); "
                "allowed: all-linear, or names of its modules"
            ) from error
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def _fitting(reward: RewardModel, rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """The pairs that fit, and how many do not, by the limit that they break.

    Raises:
        UserError: there are pairs and none fits; an answer that is no text.
    """
    kept: list[Row] = []
    left_out: dict[str, int] = {}
    reason = None
    for row in rows:
        wrong = [name for name in PAIR if not isinstance(row.get(name), str)]
        if wrong:
            raise UserError(f"pair {row.get('pair_id')}: {wrong[0]} is {row.get(wrong[0])!r}, and has to be text")
        reason = reward.longer_than_allowed(row)
        if reason is None:
            kept.append(row)
        else:
            limit = reason.split("more than ")[1]
            left_out[limit] = left_out.get(limit, 0) + 1
    if rows and not kept:
        raise UserError(
            f"none of {len(rows)} pairs fits: the last has {reason}. Nothing is cut; raise max_length, or shorten them"
        )
    return kept, left_out


def _hash(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        kept = {name: row.get(name) for name in ("pair_id", "condition", *PAIR, "target", "weight")}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser("python -m polyalign.modalities.text.reward_model", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where the run goes; the model is in reward_model/ there")
    parser.add_argument("--base", default="tiny", help="tiny, a hub id, or a transformers folder (default: tiny)")
    parser.add_argument("--pairs", type=Path, required=True, help="a pair store of texts")
    parser.add_argument("--held-out", type=Path, help="a pair store for the accuracy")
    parser.add_argument("--train", choices=("lora", "full"), default="lora")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA (default: 16)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the pairs (default: 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step (default: 8)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: 1e-4, TRL's for reward models")
    parser.add_argument("--margin", type=float, default=0.0)
    parser.add_argument("--centre", type=float, default=0.0, help="weight of (r_w + r_l)^2; TRL suggests 0.01")
    parser.add_argument("--max-length", type=int, help="longer pairs are left out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        rows, held_out = _read(given.pairs), _read(given.held_out) if given.held_out else []
        batch = max(1, min(given.batch_size, len(rows)))
        result = train_reward_model(
            rows,
            given.folder,
            model=TextModelSettings(
                base=given.base, train=given.train, rank=given.rank, max_length=given.max_length, seed=given.seed
            ),
            train=TrainSettings(
                steps=max(1, round(given.epochs * len(rows) / batch)),
                batch_size=batch,
                micro_batch_size=batch,
                optimizer=OptimizerConfig(learning_rate=given.learning_rate),
            ),
            objective=BradleyTerry(margin=given.margin, centre=given.centre),
            held_out=held_out,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{result.folder}: trained on {result.pairs} pairs, {result.left_out} left out as too long")
    if result.accuracy is not None:
        low, high = result.accuracy["interval"]
        print(f"accuracy on held-out pairs: {result.accuracy['accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    return 0


def _read(folder: Path) -> list[Row]:
    store = PairStore(folder)
    return list(store.rows(range(len(store))))


if __name__ == "__main__":
    sys.exit(main())
