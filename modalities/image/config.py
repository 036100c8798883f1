"""The recipe of the image modality: what a YAML file under ``configs/image`` may say.

Nothing here imports diffusers or loads a model, so that ``explain`` and ``--dry-run`` answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from polyalign.core.config import Section
from polyalign.core.objectives.table import DPO, ObjectiveSpec
from polyalign.core.recipe import (
    Fraction,
    JudgeConfig,
    PairingConfig,
    ReportConfig,
    TrackingConfig,
    TrainSettings,
    named_as_folders,
)
from polyalign.core.recipe_loops import OnlineConfig
from polyalign.datasets.formats.table import IMAGE_SOURCES
from polyalign.modalities.recipe_sections import ImplicitRewardConfig, LikelihoodConfig, check_pairs, location_of

if TYPE_CHECKING:
    PairSource = str
else:
    PairSource = Literal[("generate", *IMAGE_SOURCES)]
"""Where pairs come from: made here, or in one of the formats that can be read."""


class LoraConfig(Section):
    """The adapter that is trained beside the frozen base."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""

    alpha: float | None = Field(default=None, gt=0.0)
    """Scale of the update is alpha / rank; null means alpha = rank, as in the published Diffusion-DPO LoRA script."""

    targets: tuple[str, ...] | None = None
    """Layers that get an update, by the end of their name. Null is all attention projections, as in the published scripts:
    to_q, to_k, to_v, to_out.0, and for sd3 and flux also add_q_proj, add_k_proj, add_v_proj, to_add_out."""


class ModelConfig(Section):
    """Which model, and what of it is trained."""

    base: str = "tiny"
    """`tiny` (the base that comes with the package), a hub id, a diffusers folder, or a single-file checkpoint
    (.safetensors)."""

    family: Literal["sd", "sdxl", "sd3", "flux"] | None = None
    """`sd` (Stable Diffusion 1.x, 2.x), `sdxl`, `sd3` (3 and 3.5) or `flux` (FLUX.1); null detects it, and a wrong one is
    refused."""

    network: str | None = None
    """A network published alone, as a folder or hub id with `unet/` or `transformer/` in it, in the place of the base's own:
    `mhdang/dpo-sd1.5-text2image-v1` on an SD 1.5. Null is the base's own."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """Null takes the base's own; only a single file may need it said."""

    revision: str | None = None
    """Revision of a hub repository."""

    variant: str | None = None
    """Variant of the weight files, such as `fp16`."""

    single_file_config: str | None = None
    """Folder or hub id with the configurations and tokenizers that a single-file checkpoint lacks."""

    use_t5: bool = True
    """False leaves out SD3's third text encoder, the largest; the model was trained to do without."""

    text_tokens: int | None = Field(default=None, ge=1, le=512)
    """Tokens that T5 reads of a caption. Null is 256 for sd3 and 512 for flux, as in diffusers; FLUX.1-schnell wants 256."""

    guidance_vector: float | None = Field(default=None, ge=0.0)
    """For FLUX.1-dev, which was distilled from a guided model: the guidance scale it is told while it is trained; what it is
    told while it samples is `sampler.guidance`. Null is 1."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the frozen weights."""

    vae_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """`auto` is float32 where float16 is known to fail (SDXL), else `dtype`."""

    device: str = "auto"
    """`auto` is the GPU if there is one."""

    train: Literal["lora", "full"] = "lora"
    """A low-rank adapter, or all of the network."""

    lora: LoraConfig = LoraConfig()
    """The adapter."""

    attention: Literal["sdpa", "xformers"] = "sdpa"
    """`xformers` needs the extra of that name and a GPU, and a UNet."""

    @model_serializer(mode="wrap")
    def _without_later_keys(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that came later are left out at their defaults, so that finished runs stay finished."""
        later = {"network": None, "use_t5": True, "text_tokens": None, "guidance_vector": None}
        given: dict[str, Any] = serialise(self)
        return {key: value for key, value in given.items() if key not in later or value != later[key]}


class PrepareConfig(Section):
    """How pictures and captions become training inputs; every random choice is the same for both pictures of a pair."""

    resolution: int | None = Field(default=None, ge=8)
    """Pixels of a side; null is the base's own."""

    crop: Literal["centre", "random"] = "centre"
    """Which part of a picture that is not square."""

    flip: bool = False
    """Mirror half of the pairs. Leave it off where left and right matter."""

    caption_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of pairs trained with an empty caption (Diffusion-DPO: 0.2)."""

    posterior: Literal["sample", "mode"] = "sample"
    """Draw from the VAE's posterior, as published, or take its mode."""

    cache: bool = True
    """Keep latents and text states on disk, in the run folder."""

    cache_folder: str | None = None
    """Another folder for them, and for cached reference scores, which several runs may share, also at once. Everything in it is
    named by what it was made from, and may be deleted at any time. Null: `cache/` in the run folder."""


class SamplerConfig(Section):
    """How pictures are sampled, for pairs and for evaluation."""

    scheduler: Literal["base", "ddim", "dpmsolver++", "euler"] = "ddim"
    """`base` is the model's own, and the only one for sd3 and flux (flow matching, Euler)."""

    steps: int = Field(default=50, ge=1)
    """Denoising steps."""

    guidance: float = Field(default=7.5, ge=0.0)
    """Scale of classifier-free guidance (published comparisons: SD1.5 7.5, SDXL 5; diffusers: SD3 7, SD3.5-large 3.5). For
    flux, what the network is told (FLUX.1-dev 3.5)."""

    negative_prompt: str | None = None
    """What to steer away from; not for flux."""

    batch_size: int = Field(default=4, ge=1)
    """Pictures sampled together."""

    vae_batch_size: int = Field(default=4, ge=1)
    """Pictures decoded together."""


class PromptsConfig(Section):
    """Where prompts come from: a file, or a world that comes with the package. Exactly one of the two."""

    file: str | None = None
    """A .txt (a prompt a line), .jsonl, .parquet, .tsv (PartiPrompts) or .json (HPSv2; also a folder of these) file, relative
    to the working directory."""

    world: Literal["shapes"] | None = None
    """A world with an exact judge."""

    split: Literal["train", "heldout"] = "train"
    """Of a world: prompts that take part in alignment, or those that never do."""

    count: int | None = Field(default=None, ge=1)
    """How many prompts; null is all of a file. A world needs a number."""

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if (self.file is None) == (self.world is None):
            raise ValueError("give either 'file' or 'world'")
        if self.world is not None and self.count is None:
            raise ValueError("a world needs 'count', since it has no end")
        return self


class PairsConfig(Section):
    """Where preference pairs come from: made from prompts, or preferences that are there already, in one of many formats."""

    source: PairSource = "generate"
    """`generate`: sample, judge, pair. `folders`: pictures in `chosen/` and `rejected/` with equal names, captions beside
    them. `suffixes`: the same in one folder, NAME_w and NAME_l. `jsonl`: a line with prompt, chosen, rejected. `pickapic`:
    Pick-a-Pic v2 parquet. `rows`: a data set with the columns prompt, chosen, rejected. `webdataset`: tar files. `rankings`:
    several ranked pictures of a prompt. `store`: a pair store. `relabel`: a pair store, its pairs turned as `judges` prefer.
    `own_samples`: pictures with captions, preferred to what the base draws for the same captions (self-play). `labels`: no
    pairs but single pictures that are liked or disliked, in `liked/` and `disliked/` with captions beside them or in lines of
    prompt, image and label, for objectives diffusion_kto and bco, and for sft."""

    folder: str | None = None
    """For `folders`: what holds `chosen/` and `rejected/`; for `suffixes` and `own_samples`: what holds the pictures."""

    path: str | None = None
    """For `jsonl`, `pickapic`, `rows`, `webdataset`, `rankings`, `labels`: the file, or the folder of files."""

    store: str | None = None
    """For `store` and `relabel`: the folder of the pair store, such as `runs/first/pairs`."""

    options: dict[str, Any] = {}
    """Settings of the format, by name, such as `split: train`; polyalign.datasets.formats documents them."""

    on_bad_row: Literal["error", "drop"] = "error"
    """For pairs that are read: a row that cannot be used stops the import, or is left out, counted and listed in
    pairs/summary.json."""

    prompts: PromptsConfig | None = None
    """For `generate`: what to draw."""

    samples_per_prompt: int = Field(default=4, ge=2)
    """For `generate`: samples among which the judge chooses."""

    prompts_per_shard: int = Field(default=32, ge=1)
    """For `generate`: prompts between two points at which an interrupted generation goes on."""

    judges: tuple[JudgeConfig, ...] = ()
    """For `generate` and `relabel`: who decides; several are summed with their weights."""

    pairing: PairingConfig = PairingConfig()
    """For `generate`: how judged samples become pairs."""

    @model_validator(mode="after")
    def _complete(self) -> PairsConfig:
        check_pairs(self, IMAGE_SOURCES)
        return self

    @property
    def sampled(self) -> bool:
        """Whether the base draws pictures for the pairs."""
        return self.source == "generate" or IMAGE_SOURCES[self.source].needs == "drawing"

    @property
    def labelled(self) -> bool:
        """Whether there are single pictures with labels in the place of pairs."""
        return self.source == "labels"

    @property
    def location(self) -> str | None:
        """The file or folder that the pairs, or the prompts to make them from, are read from."""
        return location_of(self, IMAGE_SOURCES)

    def inputs(self) -> dict[str, Any]:
        """What the pairs depend on, besides the content of ``location``. Keys that came later are left out at their defaults,
        so that finished runs stay finished."""
        given = self.model_dump(mode="json", exclude={"path", "store"})
        later = {"options": {}, "on_bad_row": "error"}
        return {key: value for key, value in given.items() if key not in later or value != later[key]}


class EvaluateConfig(Section):
    """Base against aligned, on the same prompts and seeds."""

    prompts: PromptsConfig | None = None
    """Prompts that did not take part in training. Null: a share of the user's own captions is kept aside (see `held_out`)."""

    held_out: Fraction = 0.1
    """For pairs that are read, without prompts here: the share of pairs whose captions are kept out of training for this. A
    hash decides of each caption by itself, so of few pairs the share may be far from this; training says how many they are."""

    seeds_per_prompt: int = Field(default=1, ge=1)
    """Pictures of each prompt, each with its own seed."""

    judges: tuple[JudgeConfig, ...] = Field(default=(), min_length=1)
    """The first gives the verdict, the others are shown beside it."""

    implicit_reward: ImplicitRewardConfig | None = None
    """Measure it too, on the pairs kept aside (`held_out`); evaluation.json has it under `implicit_reward`. Null: do not."""

    @model_serializer(mode="wrap")
    def _without_later_keys(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that came later is left out at its default, so that finished runs stay finished."""
        given: dict[str, Any] = serialise(self)
        return {key: value for key, value in given.items() if key != "implicit_reward" or value is not None}


class ImageRecipe(Section):
    """One run of the image modality."""

    modality: Literal["image"]
    """This recipe's modality."""

    seed: int = Field(default=0, ge=0)
    """Every random choice of the run follows from it."""

    run: str = "runs/image"
    """The run folder; `{seed}` in it becomes the seed."""

    model: ModelConfig = ModelConfig()
    """Which model, and what of it is trained."""

    prepare: PrepareConfig = PrepareConfig()
    """How pairs become training inputs."""

    likelihood: LikelihoodConfig = LikelihoodConfig()
    """How the likelihood of a picture is estimated."""

    sampler: SamplerConfig = SamplerConfig()
    """How pictures are sampled."""

    pairs: PairsConfig
    """Where preference pairs come from."""

    objective: ObjectiveSpec = DPO()
    """What is minimised; `polyalign explain objective` lists all."""

    train: TrainSettings = TrainSettings()
    """The training loop."""

    arms: dict[str, ObjectiveSpec] = {}
    """Further objectives trained on the same pairs at the same cost and evaluated beside, such as `sft: {name: sft}`. An arm's
    name is also its folder's: small letters, digits, - and _."""

    online: OnlineConfig | None = None
    """Train in rounds on samples of the policy (online DPO, iterated DPO). Null: train on the pairs as they are."""

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
