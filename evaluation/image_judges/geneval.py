"""GenEval with transformers' Mask2Former and CLIP in place of mmdet and open_clip, which no longer install together.

The rules are :mod:`polyalign.evaluation.geneval`'s. Letters: Q the detector's queries, C its classes, (H, W) the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from polyalign.core.errors import UserError
from polyalign.evaluation import geneval
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.geneval import COLOURS, Detection
from polyalign.evaluation.image_judges import pixels
from polyalign.evaluation.image_judges.clip_judges import FolderClipJudge
from polyalign.evaluation.network_judge import pretrained

RENAMED = {
    **{"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"},
    **{"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch"},
    **{"pottedplant": "potted plant", "diningtable": "dining table", "tvmonitor": "tv"},
}
"""GenEval's names of some of COCO's classes: three that would be ambiguous in prompts, and six that some detectors call as
Pascal VOC does."""
MEAN, DEVIATION = (123.675 / 255, 116.28 / 255, 103.53 / 255), (58.395 / 255, 57.12 / 255, 57.375 / 255)
GREY = 128 / 255
"""Of what is added to the right and below, so that sides are multiples of 32."""
STEP = 32
MOST = 100
"""Detections of a picture, over all classes."""
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GROUND = (0x99, 0x99, 0x99)
"""Colour of everything that is not the object, when its colour is asked for."""


def detections(
    classes: torch.Tensor, masks: torch.Tensor, names: Sequence[str], *, least: float, sizes: Sequence[tuple[int, int]]
) -> dict[str, list[Detection]]:
    """Objects from one picture's logits, as the published detector's head makes them.

    The ``MOST`` best (query, class) pairs by softmax probability; a mask is where its logit is above 0; the score is the
    probability times the mean sigmoid of the mask; the box encloses the mask, its end not belonging to it.

    Args:
        classes: (Q, C + 1), the last for "nothing".
        masks: (Q, h, w).
        names: of the C classes.
        least: pairs whose probability is no higher are left out before masks are enlarged; their score could not be higher.
        sizes: (height, width) of the padded input, of the input without padding, and of the picture.
    """
    probabilities = classes.float().softmax(-1)[:, :-1]
    best, places = probabilities.flatten().topk(min(MOST, probabilities.numel()))
    best, places = best[best > least], places[best > least]
    if not len(best):
        return {}
    padded, inner, outer = sizes
    queries = torch.div(places, probabilities.shape[1], rounding_mode="floor")
    large = _enlarged(masks.float()[queries], padded)[:, : inner[0], : inner[1]]
    logits = _enlarged(large, outer)
    found: dict[str, list[Detection]] = {}
    for probability, place, logit in zip(best.tolist(), places.tolist(), logits, strict=True):
        inside = logit > 0
        if not bool(inside.any()):
            continue
        score = probability * float(logit.sigmoid()[inside].mean())
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1), score)
        name = names[int(place) % probabilities.shape[1]]
        found.setdefault(name, []).append(Detection(box, inside.cpu().numpy()))
    return found


def _enlarged(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]


def cut_out(picture: Image.Image, detection: Detection) -> Image.Image:
    """The object within its box, on grey where the mask is not."""
    image = picture.convert("RGB")
    if detection.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, GROUND), Image.fromarray(detection.mask))
    left, top, right, bottom = (round(side) for side in detection.box[:4])
    return image.crop((left, top, right, bottom))


class GenEvalJudge(FolderClipJudge):
    """1 if the picture holds what the prompt asks for by GenEval's rules, else 0.

    Prompts are GenEval's ``evaluation_metadata.jsonl`` (a recipe's ``prompts: {file: ...}`` reads it): each condition needs
    ``tag`` and ``include``, and may have ``exclude``. Published figures were made with mmdet's copy of the detector; compare
    models that were judged alike.

    Args:
        detector: folder or hub id of a Mask2Former in transformers' layout with COCO's 80 classes.
        model: folder or hub id of the CLIP that names colours.
        side: shorter side of the detector's input in pixels; the longer is at most 1333 / 800 of that.
        options: see :class:`FolderClipJudge`.
    """

    name = "geneval"
    formula = "1"
    rounding = "round"
    right_from = 1.0

    def __init__(
        self,
        *,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        model: str = "openai/clip-vit-large-patch14",
        side: int = 800,
        **options: Any,
    ):
        super().__init__(model=model, **options)
        files.check(detector, "the judge 'geneval': detector")
        if not isinstance(side, int) or side < STEP:
            raise UserError(f"the judge 'geneval': side is {side!r}; a whole number of pixels from {STEP} is needed")
        self.where, self.side, self.thresholds = detector, side, geneval.Thresholds()
        self.sources = (*self.sources, detector)
        self._colours: dict[str, torch.Tensor] = {}

    @cached_property
    def version(self) -> str:
        return f"{self.formula} side {self.side} {self.weights()}"

    @cached_property
    def detector_folder(self) -> Path:
        """Where the detector is on this machine; fetched from the hub if it is not."""
        return files.folder(self.where, "the judge 'geneval': detector", weights=True)

    def weights(self) -> str:
        detector = files.identity(self.where, files.weight_files(self.detector_folder))
        return f"{detector}, colours {super().weights()}"

    @cached_property
    def detector(self) -> Any:
        """The network, read when it is first needed."""
        network = pretrained(Mask2FormerForUniversalSegmentation, self.detector_folder)
        return network.eval().requires_grad_(False).to(device=self.device, dtype=self.dtype)

    @cached_property
    def classes(self) -> list[str]:
        """GenEval's names of the detector's classes, in its order."""
        names: dict[int, str] = self.detector.config.id2label
        return [RENAMED.get(names[index], names[index]) for index in range(len(names))]

    def verdict(self, condition: Mapping[str, Any], picture: Image.Image) -> geneval.Verdict:
        """What was found, held against what was asked for.

        Raises:
            UserError: the condition is no line of GenEval's, or asks for a class that the detector does not know.
        """
        asked = [part.get("class") for kind in ("include", "exclude") for part in condition.get(kind, ())]
        unknown = [name for name in asked if name not in self.classes]
        if "tag" not in condition or not asked or unknown:
            why = f"unknown classes {unknown}" if unknown else "'tag' and 'include' are needed beside the prompt"
            raise UserError(
                f"the judge 'geneval': the prompt {condition.get('prompt')!r} cannot be judged: {why}. Take GenEval's "
                "evaluation_metadata.jsonl as the file of prompts"
            )
        objects = geneval.kept(self.detect(picture), str(condition["tag"]), self.thresholds)
        return geneval.judge(objects, condition, lambda name, found: self.colours(picture, name, found))

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image]) -> torch.Tensor:
        pairs = zip(conditions, pictures, strict=True)
        return torch.tensor([float(self.verdict(condition, picture).correct) for condition, picture in pairs])

    @torch.inference_mode()
    def detect(self, picture: Image.Image) -> dict[str, list[Detection]]:
        """All objects above the lower threshold, by class."""
        values = pixels.unit(picture.convert("RGB"))[None]
        height, width = values.shape[-2:]
        scale = min(self.side / min(height, width), self.side * (1333 / 800) / max(height, width))
        inner = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        values = torch.nn.functional.interpolate(values, size=inner, mode="bilinear", align_corners=False)
        below, right = -inner[0] % STEP, -inner[1] % STEP
        values = torch.nn.functional.pad(values, (0, right, 0, below), value=GREY)
        values = pixels.normalised(values, MEAN, DEVIATION).to(self.device, self.dtype)
        output = self.detector(pixel_values=values)
        sizes = ((inner[0] + below, inner[1] + right), inner, (height, width))
        least = min(self.thresholds.confidence, self.thresholds.counting)
        logits = output.class_queries_logits[0], output.masks_queries_logits[0]
        return detections(*logits, self.classes, least=least, sizes=sizes)

    @torch.inference_mode()
    def colours(self, picture: Image.Image, name: str, found: Sequence[Detection]) -> list[str]:
        """The colour of each object: the nearest of ten by CLIP, each the mean of three phrases."""
        if name not in self._colours:
            phrases = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            each = self.clip.prompts(phrases).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._colours[name] = torch.nn.functional.normalize(each.mean(1), dim=-1)
        seen = self.clip.pictures([cut_out(picture, one) for one in found])
        return [COLOURS[index] for index in (seen @ self._colours[name].T).argmax(-1).tolist()]
