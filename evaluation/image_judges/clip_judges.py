"""Judges on a CLIP: CLIP score, PickScore, LAION aesthetics. e(x) and e(p) are the unit embeddings of picture and prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from polyalign.core.errors import UserError
from polyalign.evaluation import weight_files as files
from polyalign.evaluation.image_judges import clip, pixels
from polyalign.evaluation.image_judges.heads import LinearHead
from polyalign.evaluation.network_judge import NetworkJudge, prompts_of

FORMULAS = ("torchmetrics", "paper", "cosine")


class FolderClipJudge(NetworkJudge):
    """What the judges on a CLIP in transformers' layout share.

    Args:
        model: folder or hub id of a CLIPModel.
        processor: folder or hub id with the tokenizer and ``preprocessor_config.json``; null takes the model's own where it has
            both, else those that the judge was published with.
        revision: of the model's hub repository.
        options: see :class:`NetworkJudge`.
    """

    published_processor: str | None = None
    rounding: Literal["floor", "round"] = "floor"

    def __init__(self, *, model: str, processor: str | None = None, revision: str | None = None, **options: Any):
        super().__init__(**options)
        files.check(model, f"the judge '{self.name}': model")
        if processor is not None:
            files.check(processor, f"the judge '{self.name}': processor")
        self.model, self.processor, self.revision = model, processor, revision
        self.sources = (model, processor)

    @cached_property
    def folder(self) -> Path:
        """Where the model is on this machine; fetched from the hub if it is not."""
        return files.folder(self.model, f"the judge '{self.name}': model", weights=True, revision=self.revision)

    def weights(self) -> str:
        return files.identity(self.model, files.weight_files(self.folder))

    @cached_property
    def clip(self) -> clip.Clip:
        """The model with its tokenizer and preparation, read when it is first needed."""
        return self._opened()

    def _opened(self) -> clip.Clip:
        processor = self._processor()
        prepare = pixels.of_folder(processor, rounding=self.rounding)
        tokenizer, model = clip.read_tokenizer(processor), clip.read_model(self.folder)
        return clip.of_transformers(model, tokenizer, prepare, device=self.device, dtype=self.dtype)

    def _processor(self) -> Path:
        own = (self.folder / "preprocessor_config.json").is_file() and any(
            (self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
        )
        where = self.processor or (None if own else self.published_processor)
        if where is None:
            return self.folder
        return files.folder(where, f"the judge '{self.name}': processor", weights=False)


class ClipScoreJudge(FolderClipJudge):
    """CLIP score: how well a picture fits its prompt.

    With c = e(x) . e(p): ``torchmetrics`` max(100 c, 0); ``paper`` 2.5 max(c, 0) (Hessel et al., arXiv 2104.08718); ``cosine``
    c, which is what the Diffusion-DPO code reports. Figures of different backbones do not compare: the usual two are OpenAI's
    ViT-L/14 (the default) and LAION's ViT-H/14, with which the Diffusion-DPO paper was evaluated.

    Args:
        model: folder or hub id of a CLIPModel; with ``backend: open_clip`` a checkpoint file, or ``owner/name/file``.
        formula: ``torchmetrics``, ``paper`` or ``cosine``.
        prefix: put before every prompt. The paper's own code has "A photo depicts "; most others have nothing.
        backend: ``transformers``, or ``open_clip`` for the package's own towers, preprocessing and tokenizer.
        architecture: open_clip's name of the architecture, such as ``ViT-H-14``.
        options: see :class:`FolderClipJudge`.

    Raises:
        UserError: an option is none of the allowed, or ``open_clip`` is not installed.
    """

    name = "clip_score"
    formula = "1"

    def __init__(
        self,
        *,
        model: str = "openai/clip-vit-large-patch14",
        formula: str = "torchmetrics",
        prefix: str = "",
        backend: str = "transformers",
        architecture: str | None = None,
        **options: Any,
    ):
        super().__init__(model=model, **options)
        if formula not in FORMULAS:
            raise UserError(f"the judge 'clip_score': formula is {formula!r}; allowed: {', '.join(FORMULAS)}")
        if backend not in ("transformers", "open_clip"):
            raise UserError(f"the judge 'clip_score': backend is {backend!r}; allowed: transformers, open_clip")
        if (backend == "open_clip") != (architecture is not None):
            raise UserError(
                "the judge 'clip_score': architecture (such as ViT-H-14) goes with backend: open_clip, and only with it"
            )
        self.kind, self.prefix, self.backend, self.architecture = formula, prefix, backend, architecture

    @cached_property
    def version(self) -> str:
        """Formula, prefix and backend besides the weights, since each changes the score."""
        said = [self.formula, self.kind, *([f"prefix {self.prefix!r}"] if self.prefix else []), self.backend, self.weights()]
        return " ".join(said)

    def weights(self) -> str:
        return super().weights() if self.backend == "transformers" else files.identity(self.model, [self.checkpoint])

    @cached_property
    def checkpoint(self) -> Path:
        """The weights' file for open_clip."""
        return files.file(self.model, "the judge 'clip_score': model", revision=self.revision)

    def _opened(self) -> clip.Clip:
        if self.architecture is None:
            return super()._opened()
        return clip.of_open_clip(self.checkpoint, self.architecture, device=self.device, dtype=self.dtype)

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image]) -> torch.Tensor:
        cosine = self.clip.cosine([self.prefix + prompt for prompt in prompts_of(conditions)], pictures)
        if self.kind == "cosine":
            return cosine
        return (100.0 if self.kind == "torchmetrics" else 2.5) * cosine.clamp(min=0)


class PickScoreJudge(FolderClipJudge):
    """PickScore (Kirstain et al., arXiv 2305.01569), learned from the choices of Pick-a-Pic's users: exp(s) e(x) . e(p) with
    the learned logit scale s, so values are near 20; softmax over the pictures of a prompt gives the chance of being chosen.

    The Diffusion-DPO code reports the cosine alone (near 0.2), others divide by 26: give ``scaled: false`` for the cosine.

    Args:
        model: folder or hub id, in the layout of the published ``yuvalkirstain/PickScore_v1``.
        scaled: multiply by exp(s).
        options: see :class:`FolderClipJudge`.
    """

    name = "pickscore"
    formula = "1"
    published_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(self, *, model: str = "yuvalkirstain/PickScore_v1", scaled: bool = True, **options: Any):
        super().__init__(model=model, **options)
        self.scaled = scaled

    @cached_property
    def version(self) -> str:
        return f"{self.formula}{'' if self.scaled else ' cosine'} {self.weights()}"

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image]) -> torch.Tensor:
        return (self.clip.scale if self.scaled else 1.0) * self.clip.cosine(prompts_of(conditions), pictures)


class AestheticsJudge(FolderClipJudge):
    """LAION aesthetics v2: how much a picture is liked whatever its prompt, about 1 to 10.

    Five linear layers without activations between them on e(x) of OpenAI's CLIP ViT-L/14. Published as
    ``sac+logos+ava1-l14-linearMSE.pth`` (improved-aesthetic-predictor) with tensors ``layers.{0,2,4,6,7}.{weight,bias}``.

    Args:
        head: the file with the five layers, or ``owner/name/file`` on the hub.
        model: folder or hub id of the CLIP it was trained on.
        options: see :class:`FolderClipJudge`.
    """

    name = "laion_aesthetics"
    formula = "1"
    rounding = "round"

    def __init__(self, *, head: str, model: str = "openai/clip-vit-large-patch14", **options: Any):
        super().__init__(model=model, **options)
        files.check(head, "the judge 'laion_aesthetics': head")
        self.where = head
        self.sources = (*self.sources, head)

    @cached_property
    def file(self) -> Path:
        """The head's file on this machine."""
        return files.file(self.where, "the judge 'laion_aesthetics': head", published="sac+logos+ava1-l14-linearMSE.pth")

    def weights(self) -> str:
        return f"{files.identity(self.where, [self.file])} on {super().weights()}"

    @cached_property
    def head(self) -> LinearHead:
        """The five layers, in float32."""
        return LinearHead.read(files.tensors(self.file), str(self.file)).to(self.device)

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.head(self.clip.pictures(pictures))
