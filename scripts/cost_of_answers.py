"""Compute what `explain_answer` costs on a model of 7B parameters, on tensors without values.

    python scripts/cost_of_answers.py

The decoder is that of LLaVA-1.5 (32 layers of 4,096 channels) in bfloat16 with frozen parameters. Counted are the bytes
that the graph holds on to beside the parameters, and the multiplications of a backward pass in units of a forward pass
(F).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torchcam.tasks._streams import VisualStreams

GIB = 2**30
LENGTHS = {"one picture of 336 pixels": (576, 64), "five tiles": (2880, 64)}  # visual tokens, other tokens
KEPT = 17  # positions whose logits are computed


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts multiplications."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        output = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output


class _Valueless(VisualStreams):
    """Streams whose relevance is not read: which positions hold visual tokens cannot be known without values."""

    def _read(self, gradients: Sequence[Tensor | None]) -> Tensor:
        return sum(gradient.sum() for gradient in gradients if gradient is not None)  # type: ignore[return-value]


def build(layers: int, attention: str) -> Any:
    """Return the model, frozen, on tensors without values."""
    import transformers

    text = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
    )
    vision = transformers.CLIPVisionConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    kind: Any = transformers.LlavaForConditionalGeneration
    model = kind._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def cost(model: Any, tokens: int, checkpointing: bool) -> tuple[float, float]:
    """Return the bytes that the graph holds on to after a forward pass, and the cost of a backward pass in F."""
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    streams = _Valueless(model, torch.ones(1, tokens, dtype=torch.bool), checkpointing)
    inputs = {"input_ids": torch.ones(1, tokens, dtype=torch.long), "use_cache": False, "logits_to_keep": KEPT}
    kind: Any = _Counter  # untyped
    forward, backward = kind(), kind()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with forward:
            logits = streams.run(inputs)
        for segment in streams._segments:
            pack(segment.given)
        held = sum(kept.values())
        kept.clear()
        with backward:
            streams.relevance(logits[0, -1, :1])
    if checkpointing:
        held += sum(kept.values()) // len(streams._segments)  # of one layer at a time
    return held, backward.total / forward.total


def main() -> None:
    """Compute, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    layers = parser.parse_args().layers
    print("| prompt and answer | attention | graph | backward pass |\n|---|---|---|---|")
    for name, (visual, others) in LENGTHS.items():
        for attention, checkpointing in (("sdpa", False), ("eager", False), ("sdpa", True)):
            start = time.monotonic()
            with FakeTensorMode():
                held, share = cost(build(layers, attention), visual + others, checkpointing)
            what = f"{attention}, `checkpointing=True`" if checkpointing else attention
            print(
                f"| {visual + others:,} tokens ({name}) | {what} | {held / GIB:.1f} GiB | {share:.2f} F |", flush=True
            )
            print(f"  {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
