"""Randomness without state: every draw is keyed by what it is for.

No generator is carried from step to step, so nothing random has to be saved in a checkpoint and a resumed run draws what the
uninterrupted one would have drawn. The idea is NVlabs/edm2's, which reseeds every step; here the key also names the purpose and
the pair, so that a draw does not depend on the rank, the micro-batch or the order.

One thing cannot be keyed by pair: dropout inside a network draws from torch's global generator, for a whole micro-batch at
once. The trainer seeds that generator before each micro-batch by the place of its first group in the order of the data. So
dropout is the same after a resume and on any number of processes whose micro-batches begin at the same places, but another
``micro_batch_size`` gives other masks.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, *keys: str | int) -> int:
    """A 63-bit seed from the run's seed and the keys (SHA-256, so it is the same on every machine and Python)."""
    text = "\x1f".join([f"{type(key).__name__}:{key}" for key in (seed, *keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *keys: str | int) -> torch.Generator:
    """A fresh CPU generator keyed by purpose, step, pair id and so on: ``rng(seed, "noise", pair_id, draw)``.

    Draws are made on the CPU and moved, so that one GPU, eight GPUs and none see the same numbers.
    """
    return torch.Generator("cpu").manual_seed(seed_of(seed, *keys))


def permutation(seed: int, length: int, *keys: str | int) -> list[int]:
    """A keyed permutation of ``range(length)``; the data order of an epoch is ``permutation(seed, n, "order", epoch)``."""
    return torch.randperm(length, generator=rng(seed, *keys)).tolist()
