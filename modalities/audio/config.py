"""The recipe of the audio modality: what a YAML file under ``configs/audio`` may say.

Nothing here imports diffusers or loads a model, so that ``explain`` and ``--dry-run`` answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from polyalign.core.config import Section
from polyalign.core.objectives.table import DPO, ObjectiveSpec
from polyalign.core.recipe import (
    BetaConfig,
    Fraction,
    JudgeConfig,
    PairingConfig,
    ReportConfig,
    TrackingConfig,
    TrainSettings,
    named_as_folders,
)
from polyalign.core.recipe_loops import OnlineConfig
from polyalign.datasets.formats.table import SOUND_FORMATS
from polyalign.modalities.recipe_sections import (
    ImplicitRewardConfig,
    LikelihoodConfig,
    SftFirstConfig,
    check_pairs,
    location_of,
)

MADE = ("generate", "strategies")
"""Sources of pairs that sample from the base and judge."""

if TYPE_CHECKING:
    PairSource = str
else:
    PairSource = Literal[(*MADE, *SOUND_FORMATS)]
"""Where pairs come from: made here, or in one of the formats that can be read."""


class LoraConfig(Section):
    """The adapter that is trained beside the frozen base."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""

    alpha: float | None = Field(default=None, gt=0.0)
    """Scale of the update is alpha / rank; null means alpha = rank."""

    targets: tuple[str, ...] | None = None
    """Layers that get an update, by the end of their name. Null is all attention projections of the family."""


class ModelConfig(Section):
    """Which model, and what of it is trained."""

    base: str = "tiny"
    """`tiny` (the base that comes with the package), a folder in Tango's own layout, a diffusers folder (AudioLDM2, Stable
    Audio), or a hub id of either."""

    family: Literal["tiny", "tango", "audioldm2", "stable_audio"] | None = None
    """Null detects it, and a wrong one is refused."""

    checkpoint: str | None = None
    """For `tango`: a file, or a training folder of accelerate, with the weights to take in the place of the base's own."""

    tokenizer: str | None = None
    """For `tango`: folder or hub id of FLAN-T5's tokenizer, which Tango's files lack. Null looks for `tokenizer/` in the base,
    and then for the hub id that the base names."""

    revision: str | None = None
    """Revision of a hub repository."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the frozen denoiser; full training keeps float32 and casts the forward pass."""

    device: str = "auto"
    """`auto` is the GPU if there is one."""

    train: Literal["lora", "full"] = "lora"
    """A low-rank adapter, or all of the denoiser."""

    lora: LoraConfig = LoraConfig()
    """The adapter."""


class PrepareConfig(Section):
    """How sounds and captions become training inputs; every random choice is the same for both sounds of a pair."""

    seconds: float | None = Field(default=None, gt=0.0, le=600.0)
    """Length of the clips that are trained on and sampled; null is the model's own (Tango: 10.24)."""

    resampler: Literal["scipy.resample_poly", "torchaudio"] = "scipy.resample_poly"
    """How sounds of another rate are brought to the model's; `torchaudio` needs the extra `audio`."""

    caption_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of pairs trained with an empty caption, the same for both sounds."""

    posterior: Literal["sample", "mode"] = "sample"
    """Draw from the VAE's posterior, as published, or take its mode."""

    cache: bool = True
    """Keep latents and text states on disk, in the run folder."""

    cache_folder: str | None = None
    """Another folder for them, which several runs may share, also at once. Null: `cache/` in the run folder."""


class SamplerConfig(Section):
    """How sounds are sampled, for pairs and for evaluation."""

    solver: Literal["ddim", "dpmpp", "ddpm", "euler"] | None = None
    """`dpmpp` (DPM-Solver++) and `ddim` do with 25 to 50 steps; `ddpm` is as published (200 steps); `euler` is for flow models.
    Null is `ddim`, or `euler` for a flow model."""

    steps: int = Field(default=50, ge=1)
    """Denoising steps."""

    guidance: float = Field(default=3.0, ge=1.0, allow_inf_nan=False)
    """Scale of classifier-free guidance (published: Tango 3, TangoFlux 4.5). 1 is none."""

    negative_prompt: str | None = None
    """What to steer away from; for a guidance above 1."""

    batch_size: int = Field(default=8, ge=1)
    """Sounds sampled together."""

    codec_batch_size: int = Field(default=8, ge=1)
    """Sounds decoded together."""

    @model_validator(mode="after")
    def _steers(self) -> SamplerConfig:
        if self.negative_prompt is not None and self.guidance == 1.0:
            raise ValueError("'negative_prompt' does nothing at guidance 1: leave it out, or take a guidance above 1")
        return self


class SelectConfig(Section):
    """Prompts of many kinds out of many: k-means of their embeddings, and as many of each cluster (Tango 2: 200 clusters of
    AudioCaps' captions, embedded by gte-large, and 70 of each)."""

    embedder: str = Field(min_length=1)
    """Folder of a sentence encoder that transformers opens, such as a download of `thenlper/gte-large`."""

    clusters: int = Field(default=200, ge=1)
    """How many clusters."""

    per_cluster: int = Field(default=70, ge=1)
    """At most so many prompts of each, by a keyed draw."""


class PromptsConfig(Section):
    """Where prompts come from: a file, or a world that comes with the package. Exactly one of the two."""

    file: str | None = None
    """A .txt (a prompt a line), .jsonl (also with Tango's keys captions and location), .parquet, .tsv or .json file, relative
    to the working directory."""

    world: Literal["sounds"] | None = None
    """A world with an exact judge."""

    split: Literal["train", "heldout"] = "train"
    """Of a world: prompts that take part in alignment, or those that never do."""

    count: int | None = Field(default=None, ge=1)
    """How many prompts; null is all of a file. A world needs a number."""

    select: SelectConfig | None = None
    """Take some of these by clusters. Null: all."""

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if (self.file is None) == (self.world is None):
            raise ValueError("give either 'file' or 'world'")
        if self.world is not None and self.count is None:
            raise ValueError("a world needs 'count', since it has no end")
        return self


class FilterConfig(Section):
    """Which pairs one judge lets through. Audio-alpaca's had to pass with both of two CLAP checkpoints: 630k-audioset-best with
    alpha 0.45, beta 0.40, delta 0.05 to 0.35, and 630k-best with alpha 0.60, beta 0.0, delta 0.08 to 0.70."""

    alpha: float | None = None
    """The chosen sound's score is at least this."""

    beta: float | None = None
    """The rejected sound's score is at least this: one that is too bad teaches little."""

    delta: tuple[float | None, float | None] = (None, None)
    """The difference of the two is within these."""


class AudioJudgeConfig(JudgeConfig):
    """One judge of sounds."""

    filter: FilterConfig | None = None
    """For `strategies`: what pairs need of this judge. A judge of weight 0 filters alone and does not rank."""


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint that writes perturbed captions in the place of the rules, as GPT-4 did for Audio-alpaca."""

    url: str = Field(min_length=1)
    """Of the API, such as `http://127.0.0.1:8000/v1`."""

    model: str = Field(min_length=1)
    """The endpoint's name of it."""

    key_variable: str | None = None
    """The environment variable that holds the API key; null sends none. Keys do not belong in recipes."""


class StrategiesConfig(Section):
    """How Audio-alpaca's pairs were made (arXiv 2404.09956). Numbers are the publication's; 0, or an empty list, leaves a
    strategy out."""

    steps: tuple[int, ...] = (5, 25, 50, 100)
    """1.1: the same prompt, sampled once with each of these numbers of steps; the best wins over each of the others."""

    samples: int = Field(default=4, ge=0)
    """1.2: so many samples of the same prompt; the best wins over each of the others."""

    perturbed: int = Field(default=5, ge=0)
    """2: the prompt's sound wins over those of so many captions that are partly wrong."""

    temporal: int = Field(default=5, ge=0)
    """3: the same with another order, an added or a removed event, for prompts with while, before, after, then or followed."""

    winner: Literal["first", "best"] = "first"
    """For 2 and 3: which of the prompt's own samples wins. `first` is as published, one sample whatever its score; `best` is
    the best of the `samples`."""

    endpoint: EndpointConfig | None = None
    """Who writes perturbed captions. Null: rules (polyalign.datasets.audio.perturb), which always write the same."""

    @model_validator(mode="after")
    def _something(self) -> StrategiesConfig:
        if not (self.steps or self.samples or self.perturbed or self.temporal):
            raise ValueError("all strategies are left out; give at least one of steps, samples, perturbed, temporal")
        if len(self.steps) == 1 or self.samples == 1:
            raise ValueError("one sample makes no pair: 'steps' and 'samples' need two or more, or none")
        if len(set(self.steps)) != len(self.steps) or any(step < 1 for step in self.steps):
            raise ValueError("'steps' are different numbers from 1")
        if self.winner == "best" and not self.samples:
            raise ValueError("'winner: best' takes the best of 'samples', and there are none")
        return self


class PairsConfig(Section):
    """Where preference pairs come from: made from prompts, or preferences that are there already."""

    source: PairSource = "generate"
    """`generate`: sample, judge, pair. `strategies`: Audio-alpaca's four ways to make pairs, and its filter. `alpaca`: parquet
    with prompt, chosen, rejected and strategy, as Audio-alpaca. `jsonl`: a line with prompt, chosen, rejected. `folders`:
    sounds in `chosen/` and `rejected/` with equal names, captions beside them. `store`: a pair store. `relabel`: a pair store,
    its pairs turned as `judges` prefer."""

    folder: str | None = None
    """For `folders`: what holds `chosen/` and `rejected/`."""

    path: str | None = None
    """For `alpaca` and `jsonl`: the file, or the folder of files."""

    store: str | None = None
    """For `store` and `relabel`: the folder of the pair store, such as `runs/first/pairs`."""

    options: dict[str, Any] = {}
    """Settings of the format, by name, such as `split: train`; polyalign.datasets.formats documents them."""

    on_bad_row: Literal["error", "drop"] = "error"
    """For pairs that are read: a row that cannot be used (a silent or damaged file, an empty caption) stops the import, or is
    left out, counted and listed in pairs/summary.json."""

    prompts: PromptsConfig | None = None
    """For `generate` and `strategies`: what to ask."""

    samples_per_prompt: int = Field(default=4, ge=2)
    """For `generate`: samples among which the judge chooses."""

    strategies: StrategiesConfig = StrategiesConfig()
    """For `strategies`: which, and how many of each."""

    prompts_per_shard: int = Field(default=32, ge=1)
    """For `generate` and `strategies`: prompts between two points at which an interrupted generation goes on."""

    judges: tuple[AudioJudgeConfig, ...] = ()
    """For `generate`, `strategies` and `relabel`: who decides; several are summed with their weights."""

    pairing: PairingConfig = PairingConfig()
    """For `generate`: how judged samples become pairs. For `strategies` the margin, and the most pairs of a prompt and
    strategy."""

    @model_validator(mode="after")
    def _complete(self) -> PairsConfig:
        check_pairs(self, SOUND_FORMATS, MADE)
        if self.source != "strategies" and any(judge.filter is not None for judge in self.judges):
            raise ValueError("'filter' of a judge is for source 'strategies'; pairing.margin is for 'generate'")
        return self

    @property
    def sampled(self) -> bool:
        """Whether the base draws sounds for the pairs."""
        return self.source in MADE

    @property
    def labelled(self) -> bool:
        """Whether there are single sounds with labels in the place of pairs."""
        return False

    @property
    def location(self) -> str | None:
        """The file or folder that the pairs, or the prompts to make them from, are read from."""
        return location_of(self, SOUND_FORMATS)

    def inputs(self) -> dict[str, Any]:
        """What the pairs depend on, besides the content of ``location``."""
        left = {"path", "store"} | (set() if self.source == "strategies" else {"strategies"})
        return self.model_dump(mode="json", exclude=left)


class EvaluateConfig(Section):
    """Base against aligned, on the same prompts and seeds."""

    prompts: PromptsConfig | None = None
    """Prompts that did not take part in training. Null: a share of the user's own captions is kept aside (see `held_out`)."""

    held_out: Fraction = 0.1
    """For pairs that are read, without prompts here: the share of pairs whose captions are kept out of training for this. A
    hash decides of each caption by itself, so of few pairs the share may be far from this; training says how many they are."""

    seeds_per_prompt: int = Field(default=1, ge=1)
    """Sounds of each prompt, each with its own seed."""

    judges: tuple[JudgeConfig, ...] = Field(default=(), min_length=1)
    """The first gives the verdict, the others are shown beside it. A CLAP that chose the pairs should not be the only one."""

    implicit_reward: ImplicitRewardConfig | None = None
    """Measure it too, on the pairs kept aside (`held_out`); evaluation.json has it under `implicit_reward`. Null: do not."""


class AudioRecipe(Section):
    """One run of the audio modality."""

    modality: Literal["audio"]
    """This recipe's modality."""

    seed: int = Field(default=0, ge=0)
    """Every random choice of the run follows from it."""

    run: str = "runs/audio"
    """The run folder; `{seed}` in it becomes the seed."""

    model: ModelConfig = ModelConfig()
    """Which model, and what of it is trained."""

    prepare: PrepareConfig = PrepareConfig()
    """How sounds and captions become training inputs."""

    likelihood: LikelihoodConfig = LikelihoodConfig()
    """How the likelihood of a sound is estimated."""

    sampler: SamplerConfig = SamplerConfig()
    """How sounds are sampled."""

    pairs: PairsConfig
    """Where preference pairs come from."""

    objective: ObjectiveSpec = DPO(beta=BetaConfig(value=2000.0))
    """What is minimised; `polyalign explain objective` lists all."""

    train: TrainSettings = TrainSettings()
    """The training loop."""

    sft_first: SftFirstConfig | None = None
    """Fine-tune on the chosen sounds before the objective, and every arm, takes over. Null: do not."""

    arms: dict[str, ObjectiveSpec] = {}
    """Further objectives trained on the same pairs at the same cost and evaluated beside, such as `sft: {name: sft}`. An arm's
    name is also its folder's: small letters, digits, - and _."""

    online: OnlineConfig | None = None
    """Train in rounds on samples of the policy (CRPO, iterated DPO). Null: train on the pairs as they are."""

    evaluate: EvaluateConfig
    """Base against aligned."""

    report: ReportConfig = ReportConfig()
    """What the report shows."""

    tracking: TrackingConfig = TrackingConfig()
    """Where the figures go besides metrics.jsonl."""

    @field_validator("arms")
    @classmethod
    def _named_as_folders(cls, arms: dict[str, ObjectiveSpec]) -> dict[str, ObjectiveSpec]:
        return named_as_folders(arms)
