"""An explicit reward model as a judge of texts.

The folder is in the format of transformers' ``AutoModelForSequenceClassification`` with one label, which is what
``polyalign.modalities.text.reward_model`` and TRL's RewardTrainer write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files
from polyalign.evaluation.network_judge import NetworkJudge, pretrained
from polyalign.evaluation.text_judges.conversation import sequence_ids
from polyalign.evaluation.text_judges.folders import identity, local_folder, padded, read_files, read_tokenizer, refuse_too_long


class RewardModelJudge(NetworkJudge):
    """The reward of a Bradley-Terry head, in its own units (Ouyang et al., arXiv 2203.02155, Eq. 1).

    A conversation is written down by the tokenizer's chat template if it has one. Rewards of one prompt compare; a constant of
    each prompt, and of all, is free.

    Args:
        model: a folder on this machine: config.json with one label, .safetensors, a tokenizer.
        options: see :class:`~polyalign.evaluation.network_judge.NetworkJudge`.

    Raises:
        UserError: no such folder.
    """

    name = "reward_model"
    formula = "1"

    def __init__(self, *, model: str, **options: Any):
        super().__init__(**options)
        self.folder = local_folder(model, f"the judge '{self.name}': model")
        self.sources = (str(self.folder),)

    def local_files(self) -> list[Path]:
        return read_files(self.folder, weight_files.weight_files(self.folder, safetensors=True))

    def weights(self) -> str:
        return identity(self.folder, self.local_files())

    @cached_property
    def network(self) -> Any:
        """The model, read when it is first needed."""
        network = reward_network(self.folder)
        return network.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        return read_tokenizer(self.folder)

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> Tensor:
        tokenizer, network = self.tokenizer, self.network
        rows = [sequence_ids(tokenizer, condition, output) for condition, output in zip(conditions, outputs, strict=True)]
        positions = positions_of(network.config)
        for row, condition in zip(rows, conditions, strict=True):
            refuse_too_long(self.name, len(row), positions, condition.get("prompt"))
        pad = pad_of(network.config, tokenizer)
        if pad is None:  # transformers finds the last token by the padding, and cannot where there is none
            return torch.cat([rewards(network, *padded([row], 0)) for row in rows])
        return rewards(network, *padded(rows, pad))


def reward_network(folder: Path) -> Any:
    """The network of a folder, in float32.

    Raises:
        UserError: no configuration, not one label, no safetensors, damaged, or without a head.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder / 'config.json'} describes no model that transformers knows ({reason})") from error
    if config.num_labels != 1:
        raise UserError(
            f"{folder} has {config.num_labels} labels, and a reward model has one (num_labels: 1 in config.json). It is a "
            "classifier, or a language model without a reward head. python -m polyalign.modalities.text.reward_model trains one"
        )
    return pretrained(AutoModelForSequenceClassification, folder, safetensors=True, config=config, trust_remote_code=False)


def rewards(network: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(B,) rewards in float32 of right-padded ids (B, L)."""
    device = next(network.parameters()).device
    return network(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()


def positions_of(config: Any) -> int | None:
    """How many tokens a model reads, where it has a limit. RoBERTa's kind begins to count after its padding token."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    return limit - config.pad_token_id - 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else limit


def pad_of(config: Any, tokenizer: Any) -> int | None:
    """What to pad with: the configuration's token, which is how transformers finds the last token, else the tokenizer's, which
    the configuration is then told of."""
    if config.pad_token_id is None and tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
    return config.pad_token_id
