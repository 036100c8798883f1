"""Pairs of pictures made automatically; :mod:`polyalign.modalities.generation` does it, as in every modality."""

from __future__ import annotations

from polyalign.modalities.generation import GenerationSettings, Sample, generate_pairs, read_samples, summarise

__all__ = ["GenerationSettings", "Sample", "generate_pairs", "read_samples", "summarise"]
