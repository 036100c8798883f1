"""Sounds as data: reading and writing them, perturbed captions for pairs, prompts chosen by clusters."""
