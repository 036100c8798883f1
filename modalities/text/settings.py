"""What a text model is, and how it is prepared, scored, sampled and trained: the record a recipe is mapped onto."""

from __future__ import annotations

from dataclasses import dataclass

from polyalign.modalities.token_settings import TokenModelSettings


@dataclass(frozen=True)
class TextModelSettings(TokenModelSettings):
    """Settings of a causal language model.

    Which model:
        base: ``tiny`` (the embedded base), a hub id, or a transformers folder.
        revision: of a hub repository.
        dtype: of the frozen weights; with ``train="full"`` they are float32 and the forward pass is cast.
        device: ``auto`` is this process's GPU if there is one, else the CPU.
        attention: ``sdpa``, ``eager``, or ``flash_attention_2`` (needs CUDA and its package).
        chat_template: a jinja file that takes the place of the tokenizer's own template.
    Training:
        train: ``lora``, ``full``, or ``qlora`` (a LoRA on weights of 4 bits; needs CUDA and bitsandbytes).
        rank, alpha: of the LoRA; alpha None is rank.
        dropout: of the LoRA's input; a reference that has a LoRA (frozen, ema, adapter) has it too. The base's own dropout is
            always off: policy and reference are compared under the same draws, and two dropout masks would be two draws.
        targets: ``("all-linear",)`` is every linear layer but the LM head; else names of modules.
        gradient_checkpointing: recompute activations in the backward pass.
    Preparation (nothing is ever cut):
        append_eos: end completions with the end-of-sequence token. A chat template that ends the turn with a special token has
            done so.
        max_prompt_tokens, max_completion_tokens, max_length: a row beyond one of them does not fit. The model's own number of
            positions is a limit too.
    Scoring (see :mod:`polyalign.core.likelihood.tokens`):
        prefix_sharing: compute the prompt once for all candidates of a group.
        head_chunk: positions a piece of the LM head.
        dense: further statistics of each position.
    Sampling:
        max_new_tokens: includes the one that ends the answer. temperature 0 is greedy. top_k, top_p: cut the distribution.
        sample_batch: prompts at once.
    """
