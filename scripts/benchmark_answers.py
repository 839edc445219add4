"""Measure how often the peak of a word's map is on the cell that the word is read from, for a tiny LLaVA.

    python scripts/benchmark_answers.py --samples 500

The model and its pictures are those of `_tiny_llava.py`; the pictures are others than it was trained on. Counted are
the words for things that are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _tiny_llava import ANSWER, CELL, NONE, SHAPES, SIDE, load, sample, to_picture, to_prompt
from torch import Tensor

import torchcam

SEED, BATCH = 1, 50
BACKGROUND = 115.0  # the mean of what is behind the things

Maps = Callable[[Any, dict[str, Tensor]], Tensor]  # of a model and its inputs: (N, words, cells)


def logits_of(model: Any, inputs: dict[str, Tensor], embeddings: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """Return the logit of each word of the answers, (N, words), and the decoder's output."""
    output = model.model.language_model(inputs_embeds=embeddings, use_cache=False, **options)
    logits = model.lm_head(output.last_hidden_state[:, -1 - ANSWER : -1])
    return logits.gather(-1, inputs["input_ids"][:, -ANSWER:].unsqueeze(-1)).squeeze(-1), output


def embeddings_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what the decoder gets, (N, T, D), and which positions are visual tokens, (N, T)."""
    mask = inputs["input_ids"] == model.config.image_token_id
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
    features = torch.cat([*features]) if isinstance(features, (tuple, list)) else features.flatten(0, 1)
    filled: Tensor = embeddings.masked_scatter(mask.unsqueeze(-1), features)
    return filled.detach(), mask


def by_gradient(weigh: Callable[[Tensor, Tensor], Tensor]) -> Maps:
    """Return a method that makes maps of the visual tokens (N, V, D) and a word's plain gradients for them."""

    def maps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        embeddings, mask = embeddings_of(model, inputs)
        embeddings.requires_grad_()
        scores, _ = logits_of(model, inputs, embeddings)
        activation = embeddings.detach()[mask].reshape(len(mask), SIDE**2, -1)
        found = []
        for word in range(ANSWER):
            (gradient,) = torch.autograd.grad(scores[:, word].sum(), embeddings, retain_graph=True)
            found.append(weigh(activation, gradient[mask].reshape(activation.shape)))
        return torch.stack(found, 1)

    return maps


def by_attention(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Attention × gradient: what is positive, summed over layers and heads, of the position that chooses the word."""
    embeddings, mask = embeddings_of(model, inputs)
    embeddings.requires_grad_()
    scores, output = logits_of(model, inputs, embeddings, output_attentions=True)
    found = []
    for word in range(ANSWER):
        gradients = torch.autograd.grad(scores[:, word].sum(), output.attentions, retain_graph=True, allow_unused=True)
        place = word - ANSWER - 1
        total = torch.zeros(mask.shape)
        for attention, gradient in zip(output.attentions, gradients, strict=True):
            if gradient is not None:
                total = total + (attention.detach() * gradient)[:, :, place].clamp_min(0).sum(1)
        found.append(total[mask].reshape(len(mask), -1))
    return torch.stack(found, 1)


def by_occlusion(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return how much a word's logit falls when a cell is grey."""
    maps = []
    with torch.no_grad():
        whole, _ = logits_of(model, inputs, embeddings_of(model, inputs)[0])
        for cell in range(SIDE**2):
            row, column = (CELL * place for place in divmod(cell, SIDE))
            pixels = inputs["pixel_values"].clone()
            pixels[:, :, row : row + CELL, column : column + CELL] = (BACKGROUND / 255 - 0.5) / 0.5
            embeddings, _ = embeddings_of(model, {**inputs, "pixel_values": pixels})
            maps.append(whole - logits_of(model, inputs, embeddings)[0])
    return torch.stack(maps, -1)


METHODS: dict[str, Maps] = {
    "occlusion of each cell (25 passes)": by_occlusion,
    "attention × gradient": by_attention,
    "activation × gradient, plain": by_gradient(lambda activation, gradient: (activation * gradient).sum(-1)),
    "Grad-CAM of the decoder's input": by_gradient(
        lambda activation, gradient: (activation * gradient.mean(1, keepdim=True)).sum(-1).clamp_min(0)
    ),
}


def batches(count: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield pictures and questions that the model was not trained on."""
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, count, BATCH):
        yield sample(min(BATCH, count - start), generator)


def measure(count: int) -> dict[str, list[float]]:
    """Return how often the peak is on the right cell, for each method and word, and how often the model is right."""
    model, processor = load()
    model.set_attn_implementation("eager")  # which returns the probabilities of attention
    forms = [*SHAPES, NONE]
    hits: dict[str, list[Tensor]] = {}
    for pixels, asked, shapes, places in batches(count):
        is_there = shapes < len(SHAPES)
        pictures, prompts = [to_picture(one) for one in pixels], [to_prompt(one) for one in asked]
        answers = [" ".join(forms[shape] for shape in row) for row in shapes.tolist()]
        texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
        inputs = dict(processor(images=pictures, text=texts, return_tensors="pt"))
        own = torchcam.explain_answer(model, processor, pictures, prompts, answers)
        found = {"torchcam.explain_answer": torch.stack([one.maps for one in own])}
        found |= {name: maps(model, inputs) for name, maps in METHODS.items()}
        for name, maps in found.items():
            hits.setdefault(name, []).append(torch.where(is_there, (maps.argmax(-1) == places).double(), torch.nan))
        said = torchcam.explain_answer(model, processor, pictures, prompts, tokens=0, max_new_tokens=ANSWER)
        right = [
            [word == wanted for word, wanted in zip(one.answer.split(), answer.split(), strict=True)]
            for one, answer in zip(said, answers, strict=True)
        ]
        hits.setdefault("the model's answers", []).append(torch.tensor(right))
    return {name: torch.cat(parts).double().nanmean(0).tolist() for name, parts in hits.items()}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    torch.set_num_threads(1)
    numbers = measure(parser.parse_args().samples)
    right = numbers.pop("the model's answers")
    print(f"right answers: {', '.join(f'{share:.1%}' for share in right)}\n")
    print("| peak on the right cell, of 25 | first word | second word |\n|---|---|---|")
    for name, shares in numbers.items():
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |")


if __name__ == "__main__":
    main()
