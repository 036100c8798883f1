"""How Re-Align's pairs are made: the section of a recipe. It imports neither torch nor transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from polyalign.core.config import Section

MaskKind = Literal["objects", "attributes", "counts", "relations", "verdicts"]
MASK_KINDS: tuple[MaskKind, ...] = ("objects", "attributes", "counts", "relations", "verdicts")
OWN_ENCODERS = ("tower", "projector")
MASK = "[MASK]"

COMPLETION = (
    "{question}\n\nHere is an answer in which words were replaced by {mask}. Replace every {mask} with words that fit the "
    "image and keep all other words as they are. Write the whole answer and nothing else.\n\n{masked}"
)
MASKING = (
    "Replace every word or phrase about objects, their attributes (colour, number, size, shape, material) and their relations "
    "with {mask}. Keep all other words as they are. Write the whole text and nothing else.\n\n{answer}"
)
"""The paper's own prompts are not public; these are ours."""


class ReAlignConfig(Section):
    """Re-Align: the answer is masked, and the model fills the gaps in while it looks at a similar image."""

    chosen: Literal["sampled", "given"] = "sampled"
    """`sampled`: the model's own answer to image and question, as in the paper. `given`: the row's own `chosen`."""

    chosen_temperature: float | None = Field(default=0.0, ge=0.0)
    """Of the sampled answer; 0 is greedy, null what the sampler's settings say."""

    # --- retrieval ---

    k: int = Field(default=8, ge=1)
    """How many images are retrieved, the most similar first; each is tried in turn. The paper's number is not public."""

    encoder: Literal["tower", "projector", "clip", "open_clip", "transformers", "timm", "efficientnet_lite0"] = "tower"
    """What images are compared by. The model's own: `tower`, the mean of its vision encoder's last states, as in the paper, or
    `projector`, the mean of what the language model sees. Or one of the networks that `evaluation/feature_spaces.py` opens."""

    encoder_model: str | None = None
    """For an encoder that is not the model's own: its folder, file or hub id."""

    encoder_architecture: str | None = None
    """For `open_clip` and `timm`: its name there."""

    index: Literal["exact", "faiss", "ivf"] = "exact"
    """`exact`: every cosine, by NumPy. `faiss`: the same by FAISS. `ivf`: FAISS with inverted lists, approximate; for more than
    some 100,000 images. The last two need the extra `retrieval`."""

    lists: int | None = Field(default=None, ge=1)
    """For `ivf`: clusters of images; null is the square root of their number."""

    probes: int = Field(default=8, ge=1)
    """For `ivf`: how many clusters are searched."""

    # --- masking ---

    masker: Literal["rules", "model"] = "rules"
    """`rules`: by word lists and patterns (`masking.py`). `model`: the model itself is asked, with `masking_prompt`; what it
    gives back is taken only where it is the answer with gaps."""

    mask_kinds: tuple[MaskKind, ...] = MASK_KINDS
    """For `rules`: what is masked. The paper names objects, attributes (counts among them) and logical relations. `verdicts`
    are yes, no, not and the like."""

    nouns: bool = True
    """For `rules`: what stands behind a determiner (a large [brown dog]) counts as an object with its attributes, whether it is
    in a list or not."""

    words: dict[MaskKind, tuple[str, ...]] = {}
    """For `rules`: words and phrases that take the place of the built-in list of a kind."""

    keep_asked: bool = True
    """Words of the question stay: in `What colour is the bus?` the bus is given."""

    mask: str = Field(default=MASK, min_length=1)
    """What stands for a gap in prompts and in the record."""

    masking_prompt: str = MASKING
    """For `masker: model`. Has {mask} and {answer}."""

    # --- completion ---

    completion: Literal["prompt", "constrained"] = "prompt"
    """`prompt`: the model is asked in words to fill the gaps in. `constrained`: what is not masked is written for it, and at a
    gap it goes on by itself for as many words as stood there; works with every model, also one that follows no instructions."""

    completion_prompt: str = COMPLETION
    """For `completion: prompt`. Has {question}, {masked} and {mask}."""

    completion_temperature: float | None = Field(default=0.0, ge=0.0)
    """0 is greedy, null what the sampler's settings say."""

    tokens_per_word: int = Field(default=6, ge=1)
    """For `constrained`: most tokens at a gap, for each word that stood there."""

    # --- gate ---

    gate: float = Field(default=0.95, gt=0.0, le=1.0)
    """A completion is the rejected answer if its similarity to the chosen one is below this. Paper."""

    similarity: Literal["words", "sentences"] = "words"
    """`sentences`: cosine of the embeddings of a sentence encoder, as in the paper; needs `sentence_encoder`. `words`: cosine
    of counts of words and of pairs of neighbouring words, which needs no network (`answer_similarity.py`)."""

    sentence_encoder: str | None = None
    """Folder or hub id of a sentence encoder in transformers' layout, such as all-MiniLM-L6-v2 or all-mpnet-base-v2."""

    @model_validator(mode="after")
    def _fits(self) -> ReAlignConfig:
        if (self.similarity == "sentences") != (self.sentence_encoder is not None):
            raise ValueError("similarity 'sentences' and 'sentence_encoder' go together: give both or neither")
        if self.encoder in OWN_ENCODERS and (self.encoder_model or self.encoder_architecture):
            raise ValueError(f"encoder {self.encoder!r} is the model's own; leave encoder_model and encoder_architecture out")
        if not self.mask_kinds:
            raise ValueError("mask_kinds is empty, so nothing would be masked")
        for key, names in (("completion_prompt", ("masked",)), ("masking_prompt", ("answer", "mask"))):
            missing = [name for name in names if "{" + name + "}" not in getattr(self, key)]
            if missing:
                raise ValueError(f"{key} has no {{{missing[0]}}}, so the model would not be told it")
        return self
