"""HPSv2 and HPSv2.1 (Wu et al., arXiv 2306.09341): an open_clip ViT-H/14 tuned on the Human Preference Dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from polyalign.evaluation import weight_files as files
from polyalign.evaluation.image_judges import clip, pixels
from polyalign.evaluation.image_judges.open_clip_layout import to_clip
from polyalign.evaluation.network_judge import NetworkJudge, prompts_of


class HPSv2Judge(NetworkJudge):
    """e(x) . e(p) of unit embeddings, without the logit scale: about 0.28. Published tables show 100 times that.

    The picture keeps its proportions, the rest of the square is black (:class:`pixels.LongestSide`).
    The published scorer runs in mixed precision on a GPU; here it is ``dtype``, float32 unless said otherwise. Scores of v2 and
    of v2.1 do not compare with each other.

    Args:
        model: the checkpoint, a folder with it, or a hub id, in the layout of the published ``HPS_v2_compressed.pt``:
            open_clip's tensors under ``state_dict``.
        tokenizer: folder or hub id with CLIP's tokenizer; the checkpoint has none. open_clip's own also mends broken Unicode
            and HTML entities in prompts, which this one leaves as they are.
        antialias: whether resizing does, as with torchvision from 0.17 on; false is as the paper's torchvision did.
        revision: of the model's hub repository.
        options: see :class:`NetworkJudge`.
    """

    name = "hpsv2"
    formula = "1"
    published = "HPS_v2_compressed.pt"

    def __init__(
        self,
        *,
        model: str = "xswu/HPSv2",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        antialias: bool = True,
        revision: str | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        files.check(model, f"the judge '{self.name}': model")
        files.check(tokenizer, f"the judge '{self.name}': tokenizer")
        self.model, self.tokenizer, self.antialias, self.revision = model, tokenizer, antialias, revision
        self.sources = (model, tokenizer)

    @cached_property
    def file(self) -> Path:
        """The checkpoint on this machine."""
        return files.file(self.model, f"the judge '{self.name}': model", published=self.published, revision=self.revision)

    @cached_property
    def version(self) -> str:
        return f"{self.formula}{'' if self.antialias else ' not antialiased'} {self.weights()}"

    def weights(self) -> str:
        return files.identity(self.model, [self.file])

    @cached_property
    def clip(self) -> clip.Clip:
        """The model with its tokenizer and preparation, read when it is first needed."""
        folder = files.folder(self.tokenizer, f"the judge '{self.name}': tokenizer", weights=False)
        tokenizer, model = clip.read_tokenizer(folder), to_clip(files.tensors(self.file), str(self.file))
        config: Any = model.config
        prepare = pixels.LongestSide(config.vision_config.image_size, self.antialias)
        return clip.of_transformers(model, tokenizer, prepare, device=self.device, dtype=self.dtype)

    def score_batch(self, conditions: Sequence[Mapping[str, Any]], pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.clip.cosine(prompts_of(conditions), pictures)


class HPSv21Judge(HPSv2Judge):
    """HPSv2.1: the same formula with ``HPS_v2.1_compressed.pt``."""

    name = "hpsv2.1"
    published = "HPS_v2.1_compressed.pt"
