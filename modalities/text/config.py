"""The recipe of the text modality: what a YAML file under ``configs/text`` may say.

Nothing here imports transformers or loads a model, so that ``explain`` and ``--dry-run`` answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from polyalign.core.config import Section
from polyalign.core.recipe import (
    JudgeConfig,
    PairingConfig,
)
from polyalign.core.recipe_loops import FastSlowConfig, GuideConfig, MarginsConfig, OnlineConfig
from polyalign.datasets.formats.table import TEXT_SOURCES
from polyalign.modalities import token_recipe
from polyalign.modalities.recipe_sections import check_pairs, location_of
from polyalign.modalities.token_recipe import TokenRecipe

TINY_BASE = Path(__file__).parent / "tiny_base"

IN_DISTRIBUTION = "in distribution"
"""The split of ``evaluate.rewards`` that is like the training pairs."""

if TYPE_CHECKING:
    PairSource = str
else:
    PairSource = Literal[("generate", *TEXT_SOURCES)]
"""Where pairs come from: made here, or in one of the formats that can be read."""


class PromptsConfig(Section):
    """Where prompts come from: a file, or a world that comes with the package. Exactly one of the two."""

    file: str | None = None
    """A .txt (a prompt a line), .jsonl or .parquet file, relative to the working directory. What stands beside a prompt stays
    with it for the judges; `messages` are the turns of a conversation that ends with the question."""

    world: Literal["clinical"] | None = None
    """A world with an exact judge."""

    split: Literal["train", "heldout"] = "train"
    """Of a world: prompts that take part in alignment, or those that never do."""

    count: int | None = Field(default=None, ge=1)
    """How many prompts; null is all of a file. A world needs a number."""

    chat: bool = False
    """Ask each prompt as a user's turn, in the model's chat template, rather than let the model go on with its words."""

    system: str | None = None
    """With `chat`: the system's turn before it."""

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if (self.file is None) == (self.world is None):
            raise ValueError("give either 'file' or 'world'")
        if self.world is not None and self.count is None:
            raise ValueError("a world needs 'count', since it has no end")
        if self.system is not None and not self.chat:
            raise ValueError("'system' is a turn of a conversation, and needs 'chat: true'")
        return self


class ChesConfig(Section):
    """The pairs that are most likely to pull their chosen side down, left out (arXiv 2410.08847)."""

    keep: float = Field(gt=0.0, le=1.0)
    """The share of pairs with the lowest scores that is trained on. The publication uses 0.05; up to 0.15 was similar."""

    normalised: bool = True
    """By length, as the publication does to filter; the plain score grows with length."""


class FilterConfig(Section):
    """Which pairs are trained on, decided before the training."""

    ches: ChesConfig
    """By the similarity of both sides' hidden states in the base."""


class PairsConfig(Section):
    """Where preference pairs come from: made from prompts, or preferences that are there already."""

    source: PairSource = "generate"
    """`generate`: sample, judge, pair. `rows`: prompt, chosen, rejected as TRL's preference data have them in all their
    variants (implicit prompts, conversations), from parquet, a saved data set or JSON lines. `jsonl`: the same, from JSON
    lines. `store`: a pair store. `relabel`: a pair store, its pairs turned as `judges` prefer. `labels`: no pairs but single
    answers, rows of prompt, completion and label (true or false), for objectives kto and bco, and for sft."""

    path: str | None = None
    """For `rows`, `jsonl` and `labels`: the file, or the folder of files."""

    store: str | None = None
    """For `store` and `relabel`: the folder of the pair store, such as `runs/first/pairs`."""

    options: dict[str, Any] = {}
    """Settings of the format, by name, such as `split: train`; polyalign.datasets.formats documents them."""

    on_bad_row: Literal["error", "drop"] = "error"
    """For pairs that are read: a row that cannot be used stops the import, or is left out, counted and listed in
    pairs/summary.json."""

    prompts: PromptsConfig | None = None
    """For `generate`: what to ask."""

    samples_per_prompt: int = Field(default=4, ge=2)
    """For `generate`: answers among which the judge chooses."""

    prompts_per_shard: int = Field(default=32, ge=1)
    """For `generate`: prompts between two points at which an interrupted generation goes on."""

    judges: tuple[JudgeConfig, ...] = ()
    """For `generate` and `relabel`: who decides; several are summed with their weights."""

    pairing: PairingConfig = PairingConfig()
    """For `generate`: how judged answers become pairs."""

    filter: FilterConfig | None = None
    """Rank the pairs before the training, and leave some out; the data card counts them. Null: train on all."""

    @model_validator(mode="after")
    def _complete(self) -> PairsConfig:
        check_pairs(self, TEXT_SOURCES)
        if self.labelled and self.filter is not None:
            raise ValueError("'filter' ranks pairs, and source 'labels' has single answers")
        return self

    @property
    def sampled(self) -> bool:
        """Whether the base draws answers for the pairs."""
        return self.source == "generate"

    @property
    def labelled(self) -> bool:
        """Whether there are single answers with labels in the place of pairs."""
        return self.source == "labels"

    @property
    def location(self) -> str | None:
        """The file or folder that the pairs, or the prompts to make them from, are read from."""
        return location_of(self, TEXT_SOURCES)

    def inputs(self) -> dict[str, Any]:
        """What the pairs depend on, besides the content of ``location``."""
        return self.model_dump(mode="json", exclude={"path", "store", "filter"})


class RewardsConfig(Section):
    """Explicit reward models against the aligned model's implicit reward, on pairs like those of the training and on others
    (arXiv 2409.03650)."""

    judges: tuple[JudgeConfig, ...] = Field(min_length=1)
    """The explicit rewards, such as `reward_model` with the folder that `python -m polyalign.modalities.text.reward_model`
    wrote."""

    splits: dict[str, str] = Field(min_length=1)
    """Pair stores by name, none of which was trained on: those out of distribution, such as `prompt shift` and `response
    shift`, and `in distribution`, which is by default the pairs that are kept aside (`evaluate.held_out`)."""


class EvaluateConfig(token_recipe.EvaluateConfig):
    """Base against aligned, on the same prompts and seeds."""

    prompts: PromptsConfig | None = None
    """Prompts that did not take part in training. Null: a share of the user's own prompts is kept aside (see `held_out`)."""

    rewards: RewardsConfig | None = None
    """Compare explicit rewards with the implicit one; evaluation.json has it under `rewards`. Null: do not."""


class TextRecipe(TokenRecipe):
    """One run of the text modality."""

    modality: Literal["text"]
    """This recipe's modality."""

    run: str = "runs/text"
    """The run folder; `{seed}` in it becomes the seed."""

    pairs: PairsConfig
    """Where preference pairs come from."""

    online: OnlineConfig | None = None
    """Train in rounds on samples of the policy (online DPO, online IPO, IPO-MD, iterated DPO, listwise ADPO). Null: train on
    the pairs as they are."""

    fast_slow: FastSlowConfig | None = None
    """For objective ofs_dpo: how its two adapters are trained. Null takes the defaults of this section."""

    guide: GuideConfig | None = None
    """For objective tgdpo: the model that guides it."""

    margins: MarginsConfig | None = None
    """For objective modpo: the judges whose rewards are its margins."""

    evaluate: EvaluateConfig
    """Base against aligned."""
