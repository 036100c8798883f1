"""Tiny random vision-language models of every family, each from its own configuration class, with a processor built offline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

LETTERS = ["what colour is it in the first image ? it is red", "describe both images , please", "user assistant system"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.2,
}
SIDE = 28


def tokens_with(image: str, *more: str, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens of a family; ``named`` become attributes."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>", image, *more, *named.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(dict.fromkeys(special)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(LETTERS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        model_max_length=10_000,
        extra_special_tokens={"image_token": image, **named},
    )


def ids_of(tokens: PreTrainedTokenizerFast, *names: str) -> list[int]:
    found = tokens.convert_tokens_to_ids(list(names))
    assert isinstance(found, list)
    return found


@dataclass(frozen=True)
class Built:
    """A configuration and its processor; ``placeholder`` is what a picture is in the chat template."""

    config: Any
    processor: Any
    placeholder: str


def llava() -> Built:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    tokens = tokens_with("<image>")
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokens)),
        image_token_index=tokens.image_token_id,
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return Built(config, processor, "<image>")


PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def llava_next() -> Built:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor

    tokens = tokens_with("<image>")
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokens)),
        image_token_index=tokens.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    processor = LlavaNextProcessor(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return Built(config, processor, "<image>")


def llava_onevision() -> Built:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokens = tokens_with("<image>", video_token="<video>")
    images = LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
    image, video = ids_of(tokens, "<image>", "<video>")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**{**VISION, "vision_use_head": False}),
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokens)),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    processor = LlavaOnevisionProcessor(
        images,
        tokens,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return Built(config, processor, "<image>")


QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen(processor_of: Any, config_of: Callable[..., Any], patch: int) -> Built:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokens = tokens_with("<|image_pad|>", *QWEN, video_token="<|video_pad|>")
    start, end, image, video = ids_of(tokens, *QWEN)
    images = Qwen2VLImageProcessor(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 4 * patch * patch, "longest_edge": 24 * patch * patch},
    )
    names = {
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
    }
    processor = processor_of(images, tokens, Qwen2VLVideoProcessor())
    return Built(config_of(len(tokens), names), processor, "<|vision_start|><|image_pad|><|vision_end|>")


ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}


def qwen2_vl() -> Built:
    from transformers import Qwen2VLConfig, Qwen2VLProcessor

    def config(words: int, names: dict[str, int]) -> Any:
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
        return Qwen2VLConfig(text_config={**TEXT, "vocab_size": words, "rope_parameters": ROPE}, vision_config=vision, **names)

    return _qwen(Qwen2VLProcessor, config, 14)


def qwen2_5_vl() -> Built:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor

    def config(words: int, names: dict[str, int]) -> Any:
        vision = {
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        }
        return Qwen2_5_VLConfig(
            text_config={**TEXT, "vocab_size": words, "rope_parameters": ROPE}, vision_config=vision, **names
        )

    return _qwen(Qwen2_5_VLProcessor, config, 14)


def qwen3_vl() -> Built:
    from transformers import Qwen3VLConfig, Qwen3VLProcessor

    def config(words: int, names: dict[str, int]) -> Any:
        vision = {
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        rope = {**ROPE, "mrope_interleaved": True}
        return Qwen3VLConfig(
            text_config={**TEXT, "vocab_size": words, "head_dim": 8, "rope_parameters": rope}, vision_config=vision, **names
        )

    return _qwen(Qwen3VLProcessor, config, 16)


def internvl() -> Built:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    tokens = tokens_with(
        "<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**{**VISION, "image_size": [SIDE, SIDE], "patch_size": [7, 7]}),
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokens)),
        image_token_id=ids_of(tokens, "<IMG_CONTEXT>")[0],
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return Built(config, InternVLProcessor(images, tokens, InternVLVideoProcessor(), image_seq_length=4), "<IMG_CONTEXT>")


IDEFICS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def _idefics3(config_of: Any) -> Built:
    """SmolVLM's model with Idefics3's processor too: they write the same prompts, and SmolVLM's own needs another package."""
    from transformers import Idefics3ImageProcessor, Idefics3Processor, LlamaConfig
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

    tokens = tokens_with("<image>", *IDEFICS, *(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)))
    images = Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True)
    vision = {**VISION, "patch_size": 7}
    config = config_of(
        vision_config=vision if config_of.__name__ == "SmolVLMConfig" else Idefics3VisionConfig(**vision),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokens)),
        image_token_id=tokens.image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )
    return Built(config, Idefics3Processor(images, tokens, image_seq_len=4), "<image>")


def idefics3() -> Built:
    from transformers import Idefics3Config

    return _idefics3(Idefics3Config)


def smolvlm() -> Built:
    from transformers import SmolVLMConfig

    return _idefics3(SmolVLMConfig)


def gemma3() -> Built:
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor, Gemma3TextConfig

    tokens = tokens_with("<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    begin, end, image = ids_of(tokens, "<start_of_image>", "<end_of_image>", "<image_soft_token>")
    images = Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    text = Gemma3TextConfig(
        **TEXT,
        vocab_size=len(tokens),
        head_dim=8,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config={**VISION, "patch_size": 7, "model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=image,
    )
    return Built(config, Gemma3Processor(images, tokens, image_seq_length=4), "<start_of_image>")


BUILDERS: dict[str, Callable[[], Built]] = {
    build.__name__: build
    for build in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        idefics3,
        smolvlm,
        gemma3,
    )
}


def save_model(family: str, folder: Path) -> Path:
    built = BUILDERS[family]()
    torch.manual_seed(list(BUILDERS).index(family))
    network = AutoModelForImageTextToText.from_config(built.config)
    with torch.no_grad():
        for parameter in network.parameters():  # pictures have to matter, and some families start their projector at zero
            if not parameter.any():
                parameter.normal_(0.0, 0.2)
    network.save_pretrained(folder)
    built.processor.chat_template = TEMPLATE.replace("IMAGE", built.placeholder)
    built.processor.save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Blocks of random colours."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(blocks.numpy()).resize(size, Image.Resampling.NEAREST)


def exact(network: Any) -> Any:
    """The network in float64 throughout: transformers' RMSNorm computes in float32, which rounds differences of 1e-16 up."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                scale = child.weight.detach().double() + (1.0 if type(child).__name__.startswith("Gemma") else 0.0)
                eps = getattr(child, "variance_epsilon", None) or child.eps
                norm = torch.nn.RMSNorm(len(scale), eps=float(eps), dtype=torch.float64)
                norm.weight.data = scale
                setattr(module, name, norm.requires_grad_(child.weight.requires_grad))
    return network.double()
