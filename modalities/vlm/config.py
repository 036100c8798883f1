"""The recipe of the vision-language modality: what a YAML file under ``configs/vlm`` may say.

Nothing here imports transformers or loads a model, so that ``explain`` and ``--dry-run`` answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from polyalign.core.config import Section
from polyalign.core.recipe import (
    JudgeConfig,
    PairingConfig,
)
from polyalign.datasets.formats.table import ANSWER_SOURCES
from polyalign.modalities import token_recipe
from polyalign.modalities.recipe_sections import check_pairs, location_of
from polyalign.modalities.token_recipe import TokenRecipe
from polyalign.modalities.vlm.mia_dpo_config import MultiImageConfig
from polyalign.modalities.vlm.negative_config import NegativesConfig
from polyalign.modalities.vlm.re_align_config import ReAlignConfig

TINY_BASE = Path(__file__).parent / "tiny_base"

MADE = ("generate", "multi_image", "re_align")
"""Sources that sample from the base."""

Format = Literal["sequence", "grid"]
Task = Literal["what", "colour", "shape", "exists", "count", "alt"]

NUMBERS: Mapping[Format, range] = {"sequence": range(1, 5), "grid": range(2, 5)}
"""How many pictures a question of the world may have."""

if TYPE_CHECKING:
    PairSource = str
else:
    PairSource = Literal[(*MADE, *ANSWER_SOURCES)]
"""Where pairs come from: made here, or in one of the formats that can be read."""


class ModelConfig(token_recipe.ModelConfig):
    """Which model, and what of it is trained."""

    parts: tuple[Literal["language", "projector", "vision"], ...] = ("language",)
    """What is trained of it. What pictures become is computed once for good where only the language model is."""


class PrepareConfig(token_recipe.PrepareConfig):
    """How pairs become tokens. Nothing is ever cut; the tokens of pictures count."""

    picture_options: dict[str, Any] = {}
    """Options of the model's image processor, by its own names, such as `size`."""

    branches: tuple[str, ...] | None = None
    """What a pair's candidates are, the first preferred to all others: `chosen`, then what loses, of `response`, `image` and
    `context`, joined by + (`image+response`). Null: what the objective needs."""

    cache_folder: str | None = None
    """Where the features of pictures are kept besides in memory, while projector and vision tower stay as they are; runs may
    share one. Null: in memory alone."""


class PromptsConfig(Section):
    """Where questions come from: a file, or a world that comes with the package. Exactly one of the two."""

    file: str | None = None
    """A .jsonl or .parquet file of `prompt` or `messages`, and `images`: paths relative to the file. What stands beside them
    stays with a question for the judges; `chosen` is its right answer, where Re-Align is to take given ones."""

    world: Literal["scenes"] | None = None
    """A world with an exact judge."""

    split: Literal["train", "heldout"] = "train"
    """Of a world: questions that take part in alignment, or those that never do."""

    count: int | None = Field(default=None, ge=1)
    """How many questions: of a file in all (null is all of it), of a world of each number and format of `pictures`."""

    pictures: dict[Format, tuple[int, ...]] = {"sequence": (1,)}
    """Of a world: how many pictures a question has, one after another or in one collage."""

    tasks: tuple[Task, ...] = ("what", "colour", "shape", "exists", "count")
    """Of a world: what is asked, each as often. `alt` is alt-text for a post, of single pictures only."""

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if (self.file is None) == (self.world is None):
            raise ValueError("give either 'file' or 'world'")
        if self.world is not None and self.count is None:
            raise ValueError("a world needs 'count', since it has no end")
        wrong = [
            f"{arrangement} of {number}"
            for arrangement, numbers in self.pictures.items()
            for number in numbers
            if number not in NUMBERS[arrangement]
        ]
        if wrong:
            allowed = "; ".join(f"{name}: {numbers[0]} to {numbers[-1]}" for name, numbers in NUMBERS.items())
            raise ValueError(f"pictures: the world has no {', '.join(wrong)}. Allowed: {allowed}")
        if any(number > 1 for numbers in self.pictures.values() for number in numbers) and set(self.tasks) == {"alt"}:
            raise ValueError("tasks: alt is asked of a single picture only; give pictures: {sequence: [1]}, or another task")
        return self


class PairsConfig(Section):
    """Where preference pairs come from: made from questions, or preferences that are there already."""

    source: PairSource = "multi_image"
    """`multi_image`: MIA-DPO, questions about one of several pictures. `re_align`: Re-Align, answers rewritten under a similar
    picture. `generate`: sample, judge, pair. `rows`: conversations with pictures, chosen and rejected, in the forms of TRL,
    RLHF-V, Re-Align and MCM-DPO. `store`: a pair store. `relabel`: a pair store, its pairs turned as `judges` prefer."""

    path: str | None = None
    """For `rows`: the file, or the folder of files."""

    store: str | None = None
    """For `store` and `relabel`: the folder of the pair store, such as `runs/first/pairs`."""

    options: dict[str, Any] = {}
    """Settings of the format, by name; polyalign.datasets.formats documents them."""

    on_bad_row: Literal["error", "drop"] = "error"
    """For pairs that are read: a row that cannot be used stops the import, or is left out, counted and listed in
    pairs/summary.json. Questions of `multi_image` have `pairs.multi_image.on_bad_row`."""

    prompts: PromptsConfig | None = None
    """For `generate` and `re_align`: what to ask."""

    samples_per_prompt: int = Field(default=4, ge=2)
    """For `generate`: answers among which the judge chooses."""

    prompts_per_shard: int = Field(default=32, ge=1)
    """Questions between two points at which an interrupted generation goes on."""

    judges: tuple[JudgeConfig, ...] = ()
    """For `generate` and `relabel`: who decides; several are summed with their weights."""

    pairing: PairingConfig = PairingConfig()
    """For `generate`: how judged answers become pairs."""

    multi_image: MultiImageConfig | None = None
    """For `multi_image`: questions, arrangements, the rejected answers and their selection."""

    re_align: ReAlignConfig | None = None
    """For `re_align`: retrieval, masking and the gate. Null takes the defaults of this section."""

    negatives: NegativesConfig | None = None
    """Losing pictures and losing contexts, made for pairs of any source: what mcm_dpo, mdpo and chip compare. Null: none."""

    @model_validator(mode="after")
    def _complete(self) -> PairsConfig:
        if self.source in MADE and self.on_bad_row == "drop":
            raise ValueError(
                f"on_bad_row: drop is for pairs that are read, and source '{self.source}' makes them. "
                + (
                    "Questions have a key of their own: give pairs.multi_image.on_bad_row: drop instead"
                    if self.source == "multi_image"
                    else "Leave it out: every question of pairs.prompts has to be usable (mend or take out those that are not)"
                )
            )
        if self.source == "multi_image":
            if self.multi_image is None:
                raise ValueError("source 'multi_image' needs 'multi_image', its section")
            return self
        check_pairs(self, ANSWER_SOURCES, MADE, judged=("generate",))
        return self

    @property
    def sampled(self) -> bool:
        """Whether the base draws answers for the pairs."""
        return self.source in MADE

    @property
    def location(self) -> str | None:
        """The file or folder that the pairs, or the questions to make them from, are read from."""
        if self.source == "multi_image":
            assert self.multi_image is not None  # the schema asks for it
            return self.multi_image.questions
        return location_of(self, ANSWER_SOURCES)

    def inputs(self) -> dict[str, Any]:
        """What the pairs depend on, besides the content of ``location``."""
        return self.model_dump(mode="json", exclude={"path", "store"})


class EvaluateConfig(token_recipe.EvaluateConfig):
    """Base against aligned, on the same questions and seeds."""

    prompts: PromptsConfig | None = None
    """Questions that did not take part in training. Null: a share of the pairs is kept aside with their pictures (see
    `held_out`)."""

    attention: int = Field(default=12, ge=0)
    """Questions for which the report shows where base and aligned model look, those about several pictures first; 0 is none."""


class VlmRecipe(TokenRecipe):
    """One run of the vision-language modality."""

    modality: Literal["vlm"]
    """This recipe's modality."""

    run: str = "runs/vlm"
    """The run folder; `{seed}` in it becomes the seed."""

    model: ModelConfig = ModelConfig()
    """Which model, and what of it is trained."""

    prepare: PrepareConfig = PrepareConfig()
    """How pairs become tokens."""

    pairs: PairsConfig
    """Where preference pairs come from."""

    evaluate: EvaluateConfig
    """Base against aligned."""
