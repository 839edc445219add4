"""Train the tiny LLaVA of `_tiny_llava.py`: a few minutes on one core.

python scripts/train_tiny_llava.py --out scripts/quality_models/tiny_llava.pt
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _tiny_llava import ANSWER, COLORS, NONE, SHAPES, SIDE, WEIGHTS, build, sample
from torch import Tensor

BATCH, STEPS, RATE, SEED = 64, 1200, 2e-3, 0


def tokens_of(processor: Any, asked: Tensor, shapes: Tensor) -> Tensor:
    """Return prompts and answers as the processor and the tokenizer make them, (N, T)."""
    ids = processor.tokenizer.convert_tokens_to_ids
    colors, forms = torch.tensor(ids([*COLORS])), torch.tensor(ids([*SHAPES, NONE]))
    count = len(asked)
    image, joint, end = (torch.full((count, 1), ids(word)) for word in ("<image>", "and", ":"))
    first, second = colors[asked].unsqueeze(-1).unbind(1)
    return torch.cat([image.expand(-1, SIDE * SIDE), first, joint, second, end, forms[shapes]], 1)


def main() -> None:
    """Train, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model, processor = build()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    start, right = time.monotonic(), 0.0
    for step in range(options.steps):
        share = step / options.steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
        pixels, asked, shapes, _ = sample(BATCH, generator)
        tokens = tokens_of(processor, asked, shapes)
        values = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        logits = model(input_ids=tokens[:, :-1], pixel_values=values, use_cache=False).logits[:, -ANSWER:]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, -ANSWER:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        hit = float((logits.argmax(-1) == tokens[:, -ANSWER:]).float().mean())
        right += (hit - right) * 0.02
        if step % 200 == 0 or step == options.steps - 1:
            print(f"{step:5d}  loss {loss.item():.4f}  right {right:.4f}  {time.monotonic() - start:.0f} s", flush=True)
    state = {name: value.detach().half() for name, value in model.state_dict().items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, options.out)
    print(f"{sum(value.numel() for value in state.values()):,} numbers, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
