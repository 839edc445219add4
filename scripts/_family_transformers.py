"""The families of transformers, from tiny random configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _family import Family, noise
from torch import Tensor

Options = dict[str, Any]
VIT: Options = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
TEXT: Options = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DETECTOR: Options = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_labels": 5,
}
QUERIES = (7, 100, 300)  # of which two, on a square picture, have the number of a grid


def config(name: str, **options: Any) -> Any:
    """Make a configuration of a class of transformers."""
    import transformers

    return getattr(transformers, f"{name}Config")(**options)


def model(name: str, made_from: Any) -> Any:
    """Make a model of a class of transformers from a configuration."""
    import transformers

    return getattr(transformers, name)(made_from)


def made(name: str, config_name: str, **options: Any) -> Callable[[], Any]:
    """Return a function that makes a model from the options of its configuration."""
    return lambda: model(name, config(config_name, **options))


def _resnet(name: str = "ResNet", **options: Any) -> Any:
    stages: Options = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return config(name, embedding_size=8, **stages, **options)


def _swin() -> Any:
    stages: Options = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
    return config("Swin", image_size=64, patch_size=4, out_features=["stage1", "stage2", "stage3", "stage4"], **stages)


def by_name(name: str, **others: Any) -> Callable[[Tensor], Any]:
    """Return a function from an input to keyword arguments: the input by a name, and others."""
    return lambda x: {name: x, **others}


def ids(count: int, length: int, seed: int = 0) -> Tensor:
    """Make rows of tokens that end with the token of an end, always the same."""
    tokens = torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, -1] = 2
    return tokens


pixels = by_name("pixel_values")


def best_query(output: Any) -> Any:
    """The highest score of any query for class 1."""
    return output.logits[..., 1].max()


def pooled(output: Any) -> Any:
    """How much an embedding points one way."""
    vector = output.pooler_output
    return (vector * noise(tuple(vector.shape), 1)).sum()


def detectors() -> Iterator[Family]:
    """Yield those that answer with boxes."""
    hf = partial(Family, call=pixels, target=best_query)
    large: Options = {"shape": (1, 3, 192, 192), "other": (1, 3, 192, 256)}
    last = _resnet(out_features=["stage4"])
    for queries in QUERIES:
        for name in ("Detr", "ConditionalDetr"):
            build = made(f"{name}ForObjectDetection", name, **DETECTOR, backbone_config=last, num_queries=queries)
            yield hf(f"{name}, {queries} queries", build, **large)
    levels = _resnet(out_features=["stage2", "stage3", "stage4"])
    build = made(
        "DeformableDetrForObjectDetection", "DeformableDetr", **DETECTOR, backbone_config=levels, num_queries=100
    )
    yield hf("DeformableDetr", build, **large)
    options: Options = {name: value for name, value in DETECTOR.items() if name != "encoder_layers"}
    options |= {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32, 32, 32]}
    options |= {"backbone_config": _resnet("RTDetrResNet", out_features=["stage2", "stage3", "stage4"])}
    for name in ("RTDetr", "RTDetrV2", "DFine"):
        build = made(f"{name}ForObjectDetection", name, **options, num_queries=30)
        yield hf(name, build, (1, 3, 128, 128), (1, 3, 128, 192))
    for tokens in (9, 100):
        options = VIT | {"image_size": [96, 96], "num_detection_tokens": tokens, "num_labels": 5}
        build = made("YolosForObjectDetection", "Yolos", **options)
        yield hf(f"Yolos, {tokens} tokens", build, (1, 3, 96, 96), (1, 3, 96, 128))
    text = TEXT | {"max_position_embeddings": 16}
    build = made("OwlViTForObjectDetection", "OwlViT", text_config=text, vision_config=VIT, projection_dim=32)
    yield hf("OwlViT", build, call=by_name("pixel_values", input_ids=ids(3, 16)))


def segmenters() -> Iterator[Family]:
    """Yield those that answer with masks."""

    def a_class(output: Any) -> Any:
        return output.class_queries_logits[..., 1].max()

    def a_mask(output: Any) -> Any:
        return output.masks_queries_logits[3].clamp_min(0).sum()

    def whole_mask(output: Any) -> Any:
        return output.pred_masks[..., 0, :, :].sum()

    large: Options = {"shape": (1, 3, 128, 128), "other": (1, 3, 128, 192)}
    options: Options = {"backbone_config": _swin(), "num_labels": 5, "mask_feature_size": 32}
    masked: Options = {"feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64, "encoder_layers": 2}
    masked |= {"decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 64, "num_queries": 16}
    queries = config("Detr", **DETECTOR, num_queries=16, backbone_config=_resnet()).to_dict()
    for name, build in {
        "Mask2Former": made("Mask2FormerForUniversalSegmentation", "Mask2Former", **options, **masked),
        "MaskFormer": made(
            "MaskFormerForInstanceSegmentation", "MaskFormer", **options, fpn_feature_size=32, decoder_config=queries
        ),
    }.items():
        yield Family(f"{name}, class of a query", build, **large, call=pixels, target=a_class)
        yield Family(f"{name}, mask of a query", build, **large, call=pixels, target=a_mask)
    vision = VIT | {"mlp_dim": 64, "output_channels": 32, "global_attn_indexes": [2], "window_size": 2}
    vision |= {"num_pos_feats": 16, "initializer_range": 0.02}
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16}
    masks = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    build = made("SamModel", "Sam", vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    point = torch.tensor([[[[20.0, 30.0]]]])
    yield Family("SAM", build, call=by_name("pixel_values", input_points=point), target=whole_mask)
    options = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 2], "num_attention_heads": [1, 2, 2, 4]}
    build = made("SegformerForSemanticSegmentation", "Segformer", **options, decoder_hidden_size=32, num_labels=5)
    yield Family("SegFormer", build, **large, call=pixels, target=1)


def embedders() -> Iterator[Family]:
    """Yield those that compare with texts or give a vector."""
    text: Options = TEXT | {"max_position_embeddings": 77}
    towers: Options = {"text_config": text, "vision_config": VIT, "projection_dim": 32}
    for images, texts, length in [(1, 1, 9), (1, 3, 9), (1, 7, 9), (1, 64, 9), (1, 77, 9), (1, 3, 64), (2, 2, 9)]:
        call = by_name("pixel_values", input_ids=ids(texts, length))
        name = f"CLIP, {images} x {texts} texts" + (f" of {length} tokens" if length != 9 else "")
        yield Family(name, made("CLIPModel", "CLIP", **towers), (images, 3, 64, 64), call=call)
    short: Options = {"text_config": TEXT | {"max_position_embeddings": 64}, "vision_config": VIT}
    for texts in (3, 16):
        call = by_name("pixel_values", input_ids=ids(texts, 64))
        yield Family(f"SigLIP, {texts} texts", made("SiglipModel", "Siglip", **short), call=call)
    vit: Options = {name: value for name, value in VIT.items() if name != "intermediate_size"}
    hf = partial(Family, call=pixels, target=pooled)
    yield hf("DINOv2", made("Dinov2Model", "Dinov2", **vit), other=(1, 3, 64, 96))
    registers = made("Dinov2WithRegistersModel", "Dinov2WithRegisters", **vit, num_register_tokens=4)
    yield hf("DINOv2 with registers", registers, other=(1, 3, 64, 96))
    for count in (0, 4):
        options: Options = VIT | {"num_register_tokens": count}
        yield hf(f"DINOv3, {count} registers", made("DINOv3ViTModel", "DINOv3ViT", **options), other=(1, 3, 64, 96))
    yield hf("ViT, pooled", made("ViTModel", "ViT", **VIT))
    yield hf("SigLIP vision, pooled", made("SiglipVisionModel", "SiglipVision", **VIT))
    yield hf("CLIP vision, pooled", made("CLIPVisionModel", "CLIPVision", **VIT))


def next_word(output: Any) -> Any:
    """The score of a word as the next one."""
    return output.logits[-1, 7]


def prompt(count: int) -> Options:
    """Make a prompt in which a picture takes as many tokens."""
    tokens = torch.cat([torch.tensor([[1]]), torch.full((1, count), 90), ids(1, 5)], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def patch_rows(x: Tensor) -> Options:
    """Cut an image as the processor of Qwen does: a row for each patch of 8 pixels, four neighbours in a row."""
    _, channels, height, width = x.shape
    rows, columns = height // 16, width // 16
    cut = x.reshape(channels, rows, 2, 8, columns, 2, 8).permute(1, 4, 2, 5, 0, 3, 6)
    flat = cut.reshape(rows * columns * 4, channels, 1, 64).expand(-1, -1, 2, -1).flatten(1)
    tokens = prompt(rows * columns)
    kinds = (tokens["input_ids"] == 90).int()
    sizes = torch.tensor([[1, height // 8, width // 8]])
    return {"pixel_values": flat, "image_grid_thw": sizes, "mm_token_type_ids": kinds, "use_cache": False, **tokens}


def generators() -> Iterator[Family]:
    """Yield those that answer a picture with words."""
    hf = partial(Family, target=next_word)
    words = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 256}
    asked = by_name("pixel_values", **prompt(16), use_cache=False)
    towers: Options = {"vision_config": config("CLIPVision", **VIT), "text_config": config("Llama", **words)}
    build = made("LlavaForConditionalGeneration", "Llava", **towers, image_token_index=90, vision_feature_layer=-2)
    yield hf("LLaVA", build, call=asked)
    vision = VIT | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32}
    towers = {"vision_config": vision, "text_config": words | {"model_type": "gemma", "head_dim": 16}}
    towers |= {"image_token_index": 90, "projection_dim": 32, "hidden_size": 32}
    yield hf("PaliGemma", made("PaliGemmaForConditionalGeneration", "PaliGemma", **towers), call=asked)
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    first = vision | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    second = vision | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 32}
    second |= {"fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    towers = {"text_config": words | {"rope_parameters": rope}, **tokens}
    for label, name, vision in (("Qwen2-VL", "Qwen2VL", first), ("Qwen2.5-VL", "Qwen2_5_VL", second)):
        build = made(f"{name}ForConditionalGeneration", name, **towers, vision_config=vision)
        yield hf(label, build, (1, 3, 96, 96), (1, 3, 96, 64), call=patch_rows)
    reader: Options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    reader |= {"encoder_hidden_size": 32, "vocab_size": 50}
    language: Options = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    language |= {"num_attention_heads": 2, "vocab_size": 99, "word_embed_proj_dim": 32, "pad_token_id": 0}
    towers = {"vision_config": VIT, "qformer_config": reader, "text_config": language}
    build = made("Blip2ForConditionalGeneration", "Blip2", **towers, num_query_tokens=16, image_token_index=90)
    yield hf("BLIP-2", build, call=by_name("pixel_values", **prompt(16)))
    towers = {"vision_config": VIT, "text_config": words | {"model_type": "llama"}}
    build = made("Idefics3ForConditionalGeneration", "Idefics3", **towers, scale_factor=2, image_token_id=90)
    yield hf("Idefics3", build, call=lambda x: {"pixel_values": x[:, None], **prompt(4), "use_cache": False})


def recordings() -> Iterator[Family]:
    """Yield those of films, sounds and series."""
    clip: Options = VIT | {"num_labels": 5}
    film: Options = {"shape": (1, 8, 3, 64, 64), "axes": (1, 3, 4), "call": pixels}
    options: Options = clip | {"num_frames": 8, "tubelet_size": 2}
    yield Family("VideoMAE", made("VideoMAEForVideoClassification", "VideoMAE", **options), **film)
    options = clip | {"num_frames": 8, "tubelet_size": [2, 16, 16]}
    yield Family("ViViT", made("VivitForVideoClassification", "Vivit", **options), **film)
    options = clip | {"num_frames": 8}
    yield Family("TimeSformer", made("TimesformerForVideoClassification", "Timesformer", **options), **film)
    options = {name: value for name, value in clip.items() if name != "image_size"}
    options |= {"max_length": 128, "num_mel_bins": 64, "frequency_stride": 16, "time_stride": 16}
    build = made("ASTForAudioClassification", "AST", **options)
    yield Family("AST", build, (1, 128, 64), axes=(1, 2), call=by_name("input_values"))
    layers: Options = {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    layers |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "num_mel_bins": 40}
    layers |= {"vocab_size": 99, "max_source_positions": 50, "max_target_positions": 20, "decoder_start_token_id": 1}
    layers |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    listen = by_name("input_features", decoder_input_ids=ids(1, 4), use_cache=False)
    build = made("WhisperForConditionalGeneration", "Whisper", **layers)
    yield Family("Whisper", build, (1, 40, 100), call=listen, target=next_word)
    layers |= {"num_labels": 5}
    build = made("WhisperForAudioClassification", "Whisper", **layers)
    yield Family("Whisper, classifier", build, (1, 40, 100), call=by_name("input_features"))
    speech: Options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    speech |= {"conv_dim": [16, 16, 16], "conv_stride": [5, 4, 2], "conv_kernel": [10, 8, 4], "num_labels": 5}
    speech |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32}
    for label, name in (("wav2vec2", "Wav2Vec2"), ("HuBERT", "Hubert")):
        build = made(f"{name}ForSequenceClassification", f"{name}", **speech)
        yield Family(label, build, (1, 2000), (1, 3000), axes=(1,), call=by_name("input_values"))
    series: Options = {
        "num_input_channels": 5,
        "context_length": 64,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 32,
    }
    series |= {"ffn_dim": 64, "num_targets": 5, "num_hidden_layers": 2}

    def scores(output: Any) -> Any:
        return output.prediction_logits[1]

    for name, token in (("PatchTST", False), ("PatchTST, class token", True)):
        build = made("PatchTSTForClassification", "PatchTST", **series, use_cls_token=token)
        yield Family(name, build, (1, 64, 5), axes=(1, 2), call=by_name("past_values"), target=scores)
    latents: Options = {
        "num_latents": 16,
        "d_latents": 32,
        "d_model": 32,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
    }
    latents |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 32, "num_labels": 5}
    for kind in ("Learned", "Fourier"):
        size: Options = latents | ({"d_model": 512} if kind == "Learned" else {"d_model": 261, "image_size": 224})
        build = made(f"PerceiverForImageClassification{kind}", "Perceiver", **size)
        side = size["image_size"]
        yield Family(f"Perceiver, {kind.lower()}", build, (1, 3, side, side), call=by_name("inputs"))


def families() -> Iterator[Family]:
    """Yield them all."""
    yield from detectors()
    yield from segmenters()
    yield from embedders()
    yield from generators()
    yield from recordings()
