"""The recipe of the LiDAR modality: what a YAML file under ``configs/lidar`` may say.

Nothing here imports torch or loads a model, so that ``explain`` and ``--dry-run`` answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from polyalign.core.config import Section
from polyalign.core.objectives.table import DPO, ObjectiveSpec
from polyalign.core.recipe import (
    PairingConfig,
    ReferenceConfig,
    ReportConfig,
    TrackingConfig,
    TrainSettings,
    named_as_folders,
)
from polyalign.datasets.lidar.layouts import TRAINING_SEQUENCES, VALIDATION_SEQUENCES

Metric = Literal["cd", "jsd", "jsd_3d", "f1", "iou"]
Steps = Annotated[int, Field(ge=1)]


class ModelConfig(Section):
    """Which network, and what of it is trained."""

    base: str = "tiny"
    """`tiny` (the base that comes with the package), the checkpoint of LiDiff, ScoreLiDAR or Distillation-DPO (.ckpt), one of
    ours (.safetensors), or `new`: random weights, for objective lidiff."""

    layout: Literal["distilled", "diffusion_dpo", "lidiff"] | None = None
    """Whose names the tensors of the checkpoint have; null takes the first of these that the file has."""

    width: float = Field(default=1.0, gt=0.0)
    """Of `new`: the published channels times this."""

    device: str = "auto"
    """`auto` is the GPU if there is one."""

    train: Literal["full", "lora"] = "full"
    """All weights of the denoiser, or low-rank changes to them. The encoder of the scan stands still, but in lidiff."""

    rank: int = Field(default=8, ge=1)
    """Of low-rank changes."""


class DataConfig(Section):
    """Scans with their ground truth."""

    source: Literal["streets", "semantic_kitti", "kitti_360"] = "streets"
    """The world that comes with the package, or a data set in the layout of SemanticKITTI or KITTI-360."""

    folder: str | None = None
    """Of a data set: what holds `dataset/sequences` or `sequences` (SemanticKITTI), or `data_3d_raw` (KITTI-360)."""

    streets: int = Field(default=40, ge=1)
    """Of the world: streets trained on, of up to four scans each."""

    sequences: tuple[str, ...] = TRAINING_SEQUENCES
    """Of a data set: drives trained on; by default SemanticKITTI's, as LiDiff splits them."""

    every: int = Field(default=1, ge=1)
    """Of a data set: only every so many-th scan is trained on."""

    maps: str | None = None
    """Of a data set: a folder with SEQUENCE/map_clean.npy, as LiDiff's map_from_scans.py writes them. Null: maps are built from
    the scans, into the run folder."""

    labels: str | None = None
    """Of KITTI-360, which has none for scans: a folder with SEQUENCE/NNNNNNNNNN.label. Null: moving objects stay in the map."""

    sensor_poses: bool = False
    """Of SemanticKITTI: poses.txt has poses of the sensor already, and there is no calib.txt."""

    scan_points: int = Field(default=18_000, ge=1)
    """Points that a completion starts from, farthest points of the scan."""

    max_range: float = Field(default=50.0, gt=0.0)
    """Metres around the sensor that are completed."""

    versions: int = Field(default=1, ge=1)
    """How often a scan comes in an epoch; all but the first time turned, tilted, scaled and mirrored at random (LiDiff)."""

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        if (self.source == "streets") != (self.folder is None):
            raise ValueError("data sets need 'folder', and the world 'streets' has none")
        return self


class SamplerConfig(Section):
    """How scans are completed; in how many steps is said where it is done. Defaults are Distillation-DPO's."""

    guidance: float = Field(default=3.5, ge=0.0)
    """Scale of classifier-free guidance; 1 is without, at half the cost. LiDiff: 6."""

    student_guidance: float | None = Field(default=None, ge=0.0)
    """Of a distilled student; null is that of `guidance`. Set it to 1 where the teacher's guidance was distilled too."""

    copies: int = Field(default=10, ge=1)
    """Points of a completion for each point of the scan."""

    voxel: float = Field(default=0.05, gt=0.0)
    """Metres; as the base was trained."""

    noise_scale: float = Field(default=1.0, gt=0.0)
    """Standard deviation of the starting noise in metres."""

    formulation: Literal["local", "vanilla"] = "local"
    """`local`: LiDiff and its descendants; `vanilla`: LiDPM. As the base was trained."""

    start: int = Field(default=1000, ge=1, le=1000)
    """Sampling starts one level below this; LiDPM: 300."""

    stochastic: bool = True
    """The SDE solver, as published; false is the ODE's."""

    final: Literal["clean", "level_zero"] = "clean"
    """`level_zero` ends with the little noise of level 0, as the diffusers release did that the published numbers are made
    with."""

    coarser: tuple[tuple[int, float], ...] = ()
    """(level, voxel) pairs: from that noise level on, larger voxels. Not for distillation."""

    batch_size: int = Field(default=1, ge=1)
    """Scans completed together."""

    postprocess: bool = True
    """Leave out points beyond `data.max_range` and out of the scan's heights, as all the projects do before they measure."""


class PreferenceConfig(Section):
    """Which of two completions is preferred: the one nearer to the ground truth."""

    metrics: dict[Metric, Annotated[float, Field(gt=0.0)]] = {"cd": 1.0}
    """Weights of distances: `cd` (Chamfer, metres), `jsd` (from above), `jsd_3d`, `f1` and `iou` (one less them)."""

    margin: float = Field(default=0.0, ge=0.0)
    """Two completions whose distances differ by no more are a tie, and teach nothing."""

    f1_threshold: float = Field(default=0.1, gt=0.0)
    """Metres."""

    iou_voxel: float = Field(default=0.5, gt=0.0)
    """Metres."""

    jsd_voxel: float = Field(default=0.5, gt=0.0)
    """Metres."""

    @field_validator("metrics")
    @classmethod
    def _some(cls, metrics: dict[Metric, float]) -> dict[Metric, float]:
        if not metrics:
            raise ValueError("at least one metric has to decide")
        return metrics


class AssistantsConfig(Section):
    """The networks that learn the student's own samples."""

    train: Literal["whole", "low_rank"] = "whole"
    """Copies of the teacher, or low-rank changes to it at about a quarter of the memory."""

    rank: int = Field(default=8, ge=1)
    """Of low-rank changes."""

    steps: int = Field(default=1, ge=1)
    """Their steps for each of the student's; `train.steps` counts both."""

    lead: int = Field(default=0, ge=0)
    """Steps at the beginning that are theirs alone. They start as copies of the teacher: without a lead the student's first
    steps follow chance."""

    learning_rate_ratio: float = Field(default=5.0, gt=0.0)
    """Their learning rate relative to the student's, which is `train.optimizer.learning_rate`. Published: 1."""


class Distillation(Section):
    """What both ways to distil have."""

    courses: tuple[Steps, ...] = Field(default=(1, 2), min_length=1)
    """Numbers of steps that the student is trained for. Published: 1, and then used in 8."""

    guidance: float = Field(default=1.0, ge=0.0)
    """Of the student's samples in training. Published: 1."""

    teacher_guidance: float = Field(default=1.0, ge=0.0)
    """Of the teacher. Above 1 the student learns what guidance does, and needs none itself."""

    assistants: AssistantsConfig = AssistantsConfig()
    """The networks that learn the student's own samples."""

    diverged: float = Field(default=2.0, gt=1.0)
    """A run whose samples get so many times as far from the ground truth as at first is refused."""


class DistillationDPO(Distillation):
    """Distillation-DPO (arXiv 2504.11447): a few-step student learns from a teacher and from preferences among its samples."""

    name: Literal["distillation_dpo"]
    """This objective."""

    pairs: Literal["scaled", "independent"] = "scaled"
    """`scaled`: the second sample starts from the first one's noise times `noise_ratio`, as published; `independent`: from its
    own."""

    noise_ratio: float = Field(default=1.1, gt=0.0)
    """For `scaled`."""

    loser_weight: float = Field(default=0.3, ge=0.0)
    """Of the rejected sample's term, which has no lower bound. Published: 1."""


class ScoreDistillation(Distillation):
    """The student follows the teacher's score alone, without preferences."""

    name: Literal["score_distillation"]
    """This objective."""


class LiDiff(Section):
    """Train denoiser and encoder on scans and ground truth (CVPR 2024): what makes a teacher."""

    name: Literal["lidiff"]
    """This objective."""

    regularisation: float = Field(default=5.0, ge=0.0)
    """Weight of the part that keeps mean and spread of the predicted noise at 0 and 1; LiDPM: 0."""

    unconditional: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of scans replaced by none, which guidance needs."""

    statistics: Literal["moving", "frozen"] = "moving"
    """Of batch normalisation. `frozen` keeps those of the base, so that scans do not depend on each other."""


class DiffusionDPO(Section):
    """Completions of the base, judged and paired, and a preference objective on the likelihoods of denoising: what made the
    teacher of Distillation-DPO's starred rows."""

    name: Literal["diffusion_dpo"]
    """This objective."""

    preference: ObjectiveSpec = DPO()
    """Any objective for pairs and denoising likelihoods; `polyalign explain objective` lists all."""

    samples_per_scan: int = Field(default=4, ge=2)
    """Completions among which pairs are found."""

    steps: int = Field(default=8, ge=1)
    """In which they are made."""

    pairing: PairingConfig = PairingConfig()
    """How they become pairs. Its margin counts beside that of `preference.margin`."""

    timesteps_per_pair: int = Field(default=1, ge=1)
    """Noise levels drawn for a pair in a step."""

    low: int = Field(default=0, ge=0)
    """The lowest noise level drawn."""

    high: int | None = Field(default=None, ge=1)
    """One above the highest; null is all."""


if TYPE_CHECKING:
    LidarObjective = DistillationDPO | ScoreDistillation | LiDiff | DiffusionDPO
else:
    LidarObjective = Annotated[DistillationDPO | ScoreDistillation | LiDiff | DiffusionDPO, Field(discriminator="name")]


class MetricsConfig(Section):
    """Definitions of what is measured."""

    f1_threshold: float = Field(default=0.1, gt=0.0)
    """Metres."""

    jsd_voxel: float = Field(default=0.5, gt=0.0)
    """Metres."""

    iou_voxels: tuple[float, ...] = (0.5, 0.2, 0.1)
    """Metres."""

    emd: bool = False
    """Earth mover's distance too; seconds to minutes a scan."""

    compat: Literal["none", "lidiff", "lidiff_old"] = "none"
    """Whose definition of IoU and EMD: ours; LiDiff's since July 2025; that of the papers' numbers, with its faults."""


class EvaluateConfig(Section):
    """Teacher, student and arms on held-out scans, from the same noise."""

    steps: tuple[Steps, ...] = Field(default=(1, 2, 8), min_length=1)
    """Numbers of steps in which all complete. The first gives the verdict."""

    streets: int = Field(default=13, ge=1)
    """Of the world: held-out streets, of up to four scans each."""

    sequences: tuple[str, ...] = VALIDATION_SEQUENCES
    """Of a data set: held-out drives."""

    every: int = Field(default=1, ge=1)
    """Of a data set: only every so many-th scan."""

    truth_points: int | None = Field(default=None, ge=1)
    """Thin the ground truth to so many points, or repeat it up to them; null takes all there are."""

    metrics: MetricsConfig = MetricsConfig()
    """Definitions of what is measured."""

    refinement: str | None = None
    """A checkpoint of the refinement network: completions are measured refined too. Null: they are not."""

    shown: int = Field(default=4, ge=0)
    """Scans whose clouds the report shows."""


class LidarRecipe(Section):
    """One run of the LiDAR modality."""

    modality: Literal["lidar"]
    """This recipe's modality."""

    seed: int = Field(default=0, ge=0)
    """Every random choice of the run follows from it."""

    run: str = "runs/lidar"
    """The run folder; `{seed}` in it becomes the seed."""

    model: ModelConfig = ModelConfig()
    """Which network, and what of it is trained."""

    data: DataConfig = DataConfig()
    """Scans with their ground truth."""

    sampler: SamplerConfig = SamplerConfig()
    """How scans are completed."""

    preference: PreferenceConfig = PreferenceConfig()
    """Which of two completions is preferred."""

    objective: LidarObjective
    """What is trained: distillation_dpo, score_distillation, lidiff or diffusion_dpo."""

    train: TrainSettings = TrainSettings(reference=ReferenceConfig(seat="frozen"))
    """The training loop. Its batch is of scans; its reference is diffusion_dpo's."""

    arms: dict[str, LidarObjective] = {}
    """Further objectives trained in as many steps and evaluated beside, such as `score: {name: score_distillation}`. An arm's
    name is also its folder's: small letters, digits, - and _."""

    evaluate: EvaluateConfig = EvaluateConfig()
    """Teacher, student and arms on held-out scans."""

    report: ReportConfig = ReportConfig()
    """What the report shows."""

    tracking: TrackingConfig = TrackingConfig()
    """Where the figures go besides metrics.jsonl."""

    @field_validator("arms")
    @classmethod
    def _named_as_folders(cls, arms: dict[str, LidarObjective]) -> dict[str, LidarObjective]:
        return named_as_folders(arms)

    def objectives(self) -> dict[str, Any]:
        """All that is trained: by the place below the run folder, `` `` for the recipe's own objective, ``arms/NAME/``."""
        return {"": self.objective} | {f"arms/{name}/": arm for name, arm in self.arms.items()}
