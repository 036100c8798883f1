"""Stop a token model before it over-optimises (Shi et al., arXiv 2410.11677): watch what it makes of its next tokens.

While a preference is being learnt the entropy H of the ten most probable next tokens rises. The publication finds the turning
point of the win rate where H turns down (DPO, IPO), or where the mass M of these tokens falls while H still rises (hinge). It
looks every 50 steps and gives no numbers; these are in :class:`~polyalign.core.recipe.StopConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyalign.core.errors import UserError
from polyalign.core.recipe import StopConfig

ENTROPY, MASS = "top_k/entropy", "top_k/mass"
SIDES = ("chosen", "rejected")


def indicators(figures: Mapping[str, Any]) -> tuple[float, float] | None:
    """Entropy (bits) and mass from a line of metrics.jsonl, means over both sides of the pairs, or those of single candidates;
    None where there are none."""
    found = [[float(figures[f"{name}_{side}"]) for side in SIDES if f"{name}_{side}" in figures] for name in (ENTROPY, MASS)]
    entropies, masses = found
    return (sum(entropies) / len(entropies), sum(masses) / len(masses)) if entropies and masses else None


@dataclass
class TopKWatch:
    """Takes in the two figures of every step and says why to stop, once.

    At each check, the means since the last one enter a running mean of checks: s <- a s + (1 - a) x with a = ``smoothing``.
    Entropy turns down: s_H falls in ``patience`` checks in a row, having been above its first value before. Mass falls: s_M is
    ``mass_drop`` (relative) below its maximum while s_H rises against the check before.
    """

    config: StopConfig
    stopped: str | None = None
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    seen: int = 0
    entropies: list[float] = field(default_factory=list)
    """Smoothed, one a check."""
    masses: list[float] = field(default_factory=list)

    def saw(self, step: int, entropy: float, mass: float) -> str | None:
        """Why the run should stop after this step; None while it should not."""
        if math.isfinite(entropy) and math.isfinite(mass):
            self.sums = [self.sums[0] + entropy, self.sums[1] + mass]
            self.seen += 1
        if step % self.config.every == 0 and self.seen:
            self._check(self.sums[0] / self.seen, self.sums[1] / self.seen)
            self.sums, self.seen = [0.0, 0.0], 0
            if step >= self.config.after:
                self.stopped = self._why(step)
        return self.stopped

    def _check(self, entropy: float, mass: float) -> None:
        for values, new in ((self.entropies, entropy), (self.masses, mass)):
            kept = self.config.smoothing
            values.append(new if not values else kept * values[-1] + (1.0 - kept) * new)

    def _why(self, step: int) -> str | None:
        entropies, patience = self.entropies, self.config.patience
        recent = entropies[-patience - 1 :]
        falls = len(recent) == patience + 1 and all(later < earlier for earlier, later in zip(recent, recent[1:], strict=False))
        if falls and recent[0] > entropies[0]:
            return (
                f"at step {step} the entropy of the ten most probable tokens has fallen in {patience} checks in a row, from "
                f"{recent[0]:.4f} to {recent[-1]:.4f} bits, after having risen from {entropies[0]:.4f}"
            )
        highest = max(self.masses)
        rises = len(entropies) > 1 and entropies[-1] > entropies[-2]
        if rises and self.masses[-1] < (1.0 - self.config.mass_drop) * highest:
            return (
                f"at step {step} the ten most probable tokens hold {self.masses[-1]:.4f} of the probability, "
                f"{1 - self.masses[-1] / highest:.1%} less than at their highest ({highest:.4f}), while their entropy rises"
            )
        return None

    def of_figures(self, step: int, figures: Mapping[str, Any]) -> str | None:
        """:meth:`saw` with a line of metrics.jsonl.

        Raises:
            UserError: it does not have the two figures.
        """
        found = indicators(figures)
        if found is None:
            raise UserError(
                f"train.stop watches {ENTROPY} and {MASS}, which this run does not compute: only the likelihoods of token "
                "models can keep them. Leave train.stop out."
            )
        return self.saw(step, *found)

    def state_dict(self) -> dict[str, Any]:
        names = ("stopped", "sums", "seen", "entropies", "masses")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
