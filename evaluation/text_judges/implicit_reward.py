"""The implicit reward of a trained policy as a judge of texts (DPORM of Lin et al., arXiv 2409.03650)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from polyalign.core.errors import UserError
from polyalign.core.likelihood.tokens import TokenSettings, score_tokens
from polyalign.evaluation import weight_files
from polyalign.evaluation.network_judge import NetworkJudge, pretrained, quietly
from polyalign.evaluation.text_judges.conversation import prompt_and_answer_ids
from polyalign.evaluation.text_judges.folders import identity, local_folder, padded, read_files, read_tokenizer, refuse_too_long
from polyalign.evaluation.text_judges.reward_model import positions_of

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
REDUCTIONS = ("sum", "mean")


class ImplicitRewardTextJudge(NetworkJudge):
    """beta (log pi(y | x) - log pi_ref(y | x)), summed over the tokens of the answer and its end (Rafailov et al., arXiv
    2305.18290, Eq. 5, without the constant of the prompt).

    Args:
        policy: a folder on this machine: a language model of transformers, or an adapter of peft on ``base``.
        base: the folder of the language model that it was trained from.
        beta: the factor; the order of answers does not depend on it.
        reduction: ``sum``, which is the reward that DPO trains, or ``mean`` over the tokens, which takes the length out.
        options: see :class:`~polyalign.evaluation.network_judge.NetworkJudge`.

    Raises:
        UserError: no such folders, or an option that is none of the allowed.
    """

    name = "implicit_reward_text"
    formula = "1"

    def __init__(self, *, policy: str, base: str, beta: float = 0.1, reduction: Literal["sum", "mean"] = "sum", **options: Any):
        super().__init__(**options)
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 < beta < float("inf"):
            raise UserError(f"the judge '{self.name}': beta is {beta!r}; a number above 0 is needed")
        if reduction not in REDUCTIONS:
            raise UserError(f"the judge '{self.name}': reduction is {reduction!r}; allowed: {', '.join(REDUCTIONS)}")
        self.policy = local_folder(policy, f"the judge '{self.name}': policy")
        self.base = local_folder(base, f"the judge '{self.name}': base")
        self.beta, self.reduction, self.sources = float(beta), reduction, (str(self.policy), str(self.base))

    @property
    def is_adapter(self) -> bool:
        return (self.policy / ADAPTER[0]).is_file()

    @cached_property
    def version(self) -> str:
        return f"{self.formula} beta {self.beta:g}, {self.reduction}, {self.weights()}"

    def local_files(self) -> list[Path]:
        return [*self._policy_files(), *_files(self.base)]

    def weights(self) -> str:
        return f"{identity(self.policy, self._policy_files())} over {identity(self.base, _files(self.base))}"

    @cached_property
    def networks(self) -> tuple[Any, Any]:
        """Policy and reference, read when they are first needed; one and the same network if the policy is an adapter."""
        base = self._placed(_language_model(self.base))
        if not self.is_adapter:
            return self._placed(_language_model(self.policy)), base
        self._policy_files()  # says so if the weights are absent
        kind = weight_files.settings(self.policy / ADAPTER[0]).get("peft_type")
        if kind != "LORA":
            raise UserError(f"{self.policy / ADAPTER[0]} describes an adapter of the kind {kind!r}; only LORA is read here")
        try:
            with quietly():
                policy = PeftModel.from_pretrained(base, str(self.policy), is_trainable=False, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the adapter in {self.policy} does not go onto {self.base}: {reason}") from error
        return self._placed(policy), policy

    @cached_property
    def tokenizer(self) -> Any:
        return read_tokenizer(self.base)

    @cached_property
    def ends(self) -> list[int]:
        """What ends an answer: the tokenizer's token, else the model's."""
        network = self.networks[1]
        found = [self.tokenizer.eos_token_id]
        for config in (getattr(network, "generation_config", None), network.config):
            value = getattr(config, "eos_token_id", None)
            found += value if isinstance(value, list | tuple) else [value]
        return list(dict.fromkeys(int(value) for value in found if value is not None))

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> Tensor:
        policy, reference = self.networks
        pairs = [
            prompt_and_answer_ids(self.tokenizer, self.ends, condition, output)
            for condition, output in zip(conditions, outputs, strict=True)
        ]
        positions = positions_of(reference.config)
        for (prompt, answer), condition in zip(pairs, conditions, strict=True):
            refuse_too_long(self.name, len(prompt) + len(answer), positions, condition.get("prompt"))
        tensors = self._tensors(pairs)
        without: AbstractContextManager[Any] = policy.disable_adapter() if self.is_adapter else nullcontext()
        value = _log_likelihood(policy, tensors)
        with without:
            value = value - _log_likelihood(reference, tensors)
        if self.reduction == "mean":
            value = value / tensors["completion_mask"].sum((1, 2))
        return self.beta * value

    def _tensors(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """A batch of groups of one candidate."""
        pad = self.tokenizer.pad_token_id
        filler = 0 if pad is None else pad  # any id will do: what is padding, the masks say
        prompt_ids, prompt_mask = padded([prompt for prompt, _ in pairs], filler, left=True)
        answer_ids, answer_mask = padded([answer for _, answer in pairs], filler)
        tensors = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
        tensors |= {"completion_ids": answer_ids.unsqueeze(1), "completion_mask": answer_mask.unsqueeze(1)}
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _policy_files(self) -> list[Path]:
        if not self.is_adapter:
            return _files(self.policy)
        found = [self.policy / name for name in ADAPTER]
        if not found[1].is_file():
            raise UserError(f"{self.policy} has no {ADAPTER[1]}: an adapter's weights are read from safetensors only")
        return found

    def _placed(self, network: Any) -> Any:
        return network.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)


def _files(folder: Path) -> list[Path]:
    return read_files(folder, weight_files.weight_files(folder, safetensors=True))


def _language_model(folder: Path) -> Any:
    return pretrained(AutoModelForCausalLM, folder, safetensors=True, trust_remote_code=False)


def _log_likelihood(network: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """(B,) sums over the answer's tokens, in float64."""
    scores = score_tokens(network, tensors, TokenSettings(prefix_sharing="off"))
    values = scores.values.double()
    return torch.where(scores.mask.bool(), values, torch.zeros_like(values)).sum((1, 2))
