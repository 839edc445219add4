"""Tiny vision-language models of transformers with random weights, and their real processors, made offline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

transformers: Any = pytest.importorskip("transformers", minversion="5.0")
tokenizers: Any = pytest.importorskip("tokenizers")

QUESTION = ["what", "is", "in", "this", "picture", "and", "?", "answer", ":", "User", "Assistant"]
WORDS = [*QUESTION, "a", "cat", "dog", "on", "the", "left", "right", "sofa", "red", "blue"]
SIZE = 160  # of the vocabulary
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": SIZE,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
SIDE = {"height": 56, "width": 56}
PINS = [[56, 112], [112, 56], [112, 112]]


def tokenizer(special: Sequence[str], **names: str) -> Any:
    """Make a tokenizer of words; some tokens have names of their own."""
    known = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words = known + [f"word{number}" for number in range(SIZE - len(known) - len(special))]
    model = tokenizers.models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=names or None,
    )
    made.add_tokens(list(special), special_tokens=True)
    for name, token in names.items():
        setattr(made, name, token)
        setattr(made, name + "_id", made.convert_tokens_to_ids(token))
    return made


def ids(made: Any, *tokens: str) -> list[int]:
    found: list[int] = made.convert_tokens_to_ids(list(tokens))
    return found


def clip() -> Any:
    return transformers.CLIPVisionConfig(**VISION)


def llama() -> Any:
    return transformers.LlamaConfig(**TEXT)


def llava() -> tuple[Any, Any]:
    t = tokenizer(["<image>"])
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=llama(), image_token_index=ids(t, "<image>")[0], vision_feature_layer=-2
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=56),
        t,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    t = tokenizer(["<image>"])
    config = transformers.LlavaNextConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=ids(t, "<image>")[0],
        image_grid_pinpoints=PINS,
        vision_feature_layer=-2,
    )
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size=SIDE, image_grid_pinpoints=PINS),
        t,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def onevision() -> tuple[Any, Any]:
    t = tokenizer(["<image>", "<video>"])
    image, video = ids(t, "<image>", "<video>")
    pins = [[56, 56], *PINS]
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=pins,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=pins),
        t,
        transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def qwen(version: str, vision: dict[str, Any]) -> tuple[Any, Any]:
    """Make a model and a processor of one version of Qwen-VL."""
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    t = tokenizer(special)
    image, video, start, end = ids(t, *special)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    common = {"num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = getattr(transformers, f"{version}Config")(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=common | vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    pixels = {"min_pixels": 56 * 56, "max_pixels": 140 * 140}
    pictures = transformers.Qwen2VLImageProcessor(**pixels, patch_size=14, merge_size=2, temporal_patch_size=2)
    films = getattr(transformers, "Qwen3VLVideoProcessor" if version == "Qwen3VL" else "Qwen2VLVideoProcessor")()
    model = getattr(transformers, f"{version}ForConditionalGeneration")(config)
    return model, getattr(transformers, f"{version}Processor")(pictures, t, films)


def qwen2() -> tuple[Any, Any]:
    return qwen("Qwen2VL", {"depth": 2, "embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2})


def qwen25() -> tuple[Any, Any]:
    sizes = {"depth": 2, "hidden_size": 48, "intermediate_size": 64, "out_hidden_size": 64}
    return qwen("Qwen2_5_VL", sizes | {"window_size": 56, "fullatt_block_indexes": [1]})


def qwen3() -> tuple[Any, Any]:
    sizes = {"depth": 3, "hidden_size": 48, "intermediate_size": 64, "out_hidden_size": 64}
    return qwen("Qwen3VL", sizes | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]})


def paligemma() -> tuple[Any, Any]:
    t = tokenizer(["<image>"])
    config = transformers.PaliGemmaConfig(
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 64},
        text_config=TEXT | {"model_type": "gemma", "head_dim": 16, "vocab_size": 1400},  # its processor adds places
        image_token_id=ids(t, "<image>")[0],
        projection_dim=64,
        hidden_size=64,
    )
    pictures = transformers.SiglipImageProcessor(size=SIDE)
    pictures.image_seq_length = 16
    return transformers.PaliGemmaForConditionalGeneration(config), transformers.PaliGemmaProcessor(pictures, t)


def gemma3() -> tuple[Any, Any]:
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
    t = tokenizer([*names.values()], **names)
    config = transformers.Gemma3Config(
        vision_config=VISION | {"image_size": 112},
        text_config=TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16},
        mm_tokens_per_image=16,
        image_token_index=t.image_token_id,
        boi_token_index=t.boi_token_id,
        eoi_token_index=t.eoi_token_id,
    )
    pictures = transformers.Gemma3ImageProcessor(size={"height": 112, "width": 112})
    processor = transformers.Gemma3Processor(pictures, t, image_seq_length=16)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    t = tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles])
    config = transformers.Idefics3Config(
        vision_config=VISION,
        text_config=TEXT | {"model_type": "llama"},
        scale_factor=2,
        image_token_id=ids(t, "<image>")[0],
        pad_token_id=0,
    )
    pictures = transformers.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = transformers.Idefics3Processor(pictures, t, image_seq_len=4)
    return transformers.Idefics3ForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    t = tokenizer([*names.values()], **names)
    config = transformers.InternVLConfig(
        vision_config=VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_id=t.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    pictures = transformers.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=6)
    processor = transformers.InternVLProcessor(pictures, t, transformers.InternVLVideoProcessor(), image_seq_length=4)
    return transformers.InternVLForConditionalGeneration(config), processor


def mllama() -> tuple[Any, Any]:
    t = tokenizer(["<|image|>", "<|python_tag|>", "<|begin_of_text|>"])
    sizes = {key: value for key, value in VISION.items() if key != "num_attention_heads"}
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    config = transformers.MllamaConfig(
        vision_config=sizes
        | {"attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 96, "max_num_tiles": 4}
        | {"intermediate_layers_indices": [0], "supported_aspect_ratios": ratios},
        text_config=TEXT
        | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        image_token_index=ids(t, "<|image|>")[0],
    )
    pictures = transformers.MllamaImageProcessor(size=SIDE, max_image_tiles=4)
    return transformers.MllamaForConditionalGeneration(config), transformers.MllamaProcessor(pictures, t)


def blip2() -> tuple[Any, Any]:
    """Make a model whose visual tokens are queries, without a place."""
    t = tokenizer(["<image>"])
    reader = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    language = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "vocab_size": SIZE}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=reader | {"encoder_hidden_size": 48, "vocab_size": 50},
        text_config=language
        | {"num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 512, "pad_token_id": 0},
        num_query_tokens=8,
        image_token_index=ids(t, "<image>")[0],
    )
    pictures = transformers.BlipImageProcessor(size=SIDE)
    processor = transformers.Blip2Processor(pictures, t, num_query_tokens=8)
    return transformers.Blip2ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "LLaVA": llava,
    "LLaVA-NeXT": llava_next,
    "OneVision": onevision,
    "Qwen2-VL": qwen2,
    "Qwen2.5-VL": qwen25,
    "Qwen3-VL": qwen3,
    "PaliGemma": paligemma,
    "Gemma3": gemma3,
    "Idefics3": idefics3,
    "InternVL": internvl,
    "Mllama": mllama,
}
PLACES = {  # what stands for a picture in a prompt
    "Qwen2-VL": "<|vision_start|><|image_pad|><|vision_end|>",
    "Qwen2.5-VL": "<|vision_start|><|image_pad|><|vision_end|>",
    "Qwen3-VL": "<|vision_start|><|image_pad|><|vision_end|>",
    "Gemma3": "<boi>",
    "InternVL": "<IMG_CONTEXT>",
    "Mllama": "<|image|>",
}


@cache
def family(name: str) -> tuple[Any, Any]:
    """Return a model (float64, evaluation mode, seeded) and its processor; they are shared by all tests."""
    model, processor = {**FAMILIES, "BLIP-2": blip2}[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * math.sqrt(1.6 / parameter[0].numel()))
            elif parameter_name.endswith(("weight", "gate")):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.02 * noise)
    model.generation_config.eos_token_id = None  # random models end anywhere
    return model.double().eval(), processor


def prompt(name: str, pictures: int = 1, question: str = "what is in this picture ?") -> str:
    """Return a prompt with places for pictures."""
    return " ".join([*[PLACES.get(name, "<image>")] * pictures, question])


def picture(height: int = 90, width: int = 130, seed: int = 0) -> Image.Image:
    """Make a picture of coloured clouds."""
    low = np.random.default_rng(seed).random((9, 13, 3))
    return Image.fromarray((255 * low).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def without_mixing(model: nn.Module) -> None:
    """Let each patch of a vision tower see itself alone: the results of attention are multiplied by 0."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        in_tower = any(part.startswith(("vision", "visual")) for part in parts) and "language_model" not in parts
        is_output = {"out_proj", "o_proj", "proj", "projection_layer"}.intersection(parts[-2:-1])
        if in_tower and is_output and any("attn" in part or "attention" in part for part in parts):
            with torch.no_grad():
                parameter.zero_()
