"""How losing pictures and losing contexts are made: the sections of a recipe. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from polyalign.core.config import Section

Kind = Literal["diffused", "cropped", "rotated", "blanked", "swapped"]

STEPS = 1000
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageNegativeConfig(Section):
    """How the losing image is made of the right one."""

    kind: Kind = "diffused"
    """diffused, cropped, rotated, blanked (one colour), or swapped for another row's."""

    step: int = Field(default=700, ge=0, lt=STEPS)
    """Of diffusion, 0 to 999. 700 is MCM-DPO's, 500 CHiP's."""

    crop: tuple[Annotated[int, Field(ge=2)], Annotated[int, Field(ge=2)]] = (320, 240)
    """Largest width and height of a crop. MCM-DPO; pictures have to be larger, so give `area` for small ones."""

    area: float | None = Field(default=None, gt=0.0, le=1.0)
    """Instead of ``crop``: a crop in the picture's proportions with up to this part of its area. 0.2 is mDPO's."""

    degrees: tuple[Annotated[float, Field(gt=0.0, lt=360.0)], Annotated[float, Field(gt=0.0, lt=360.0)]] = (10.0, 80.0)
    """Least and largest angle of a rotation. MCM-DPO."""

    mean: tuple[float, float, float] = CLIP_MEAN
    """The processor's mean colour: what a blanked picture is filled with, and what diffusion is centred at."""

    std: tuple[float, float, float] = CLIP_STD
    """The processor's standard deviation, the unit of diffusion's noise."""


class NegativesConfig(Section):
    """What loses beside the rejected answer."""

    image: ImageNegativeConfig | None = None
    """The losing picture; it takes the place of one that pairs have. Null: they have none, or keep theirs."""

    context: bool = False
    """The losing context: the whole question of another pair, as MCM-DPO has it."""

    compat: bool = False
    """Draw the other pair as MCM-DPO's code does, which may find one with the same words."""

    @model_validator(mode="after")
    def _something(self) -> NegativesConfig:
        if self.image is None and not self.context:
            raise ValueError("nothing is to lose: give 'image', or set 'context: true', or leave 'negatives' out")
        return self


METHODS: Mapping[str, ImageNegativeConfig] = {
    "mcm_dpo": ImageNegativeConfig(),
    "chip": ImageNegativeConfig(step=500),
    "mdpo": ImageNegativeConfig(kind="cropped", area=0.2),
}
