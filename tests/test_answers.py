"""Why this word: explained answers of tiny vision-language models of every family, with their real processors."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import torchcam
from tests import vision_language as vl
from tests.browsers import chromium
from tests.snapshots import own_attributes
from torchcam._replica import replicate
from torchcam.layout import Cells
from torchcam.targets import Token
from torchcam.tasks import answers
from torchcam.tasks._cells import find_cells
from torchcam.tasks._streams import VisualStreams
from torchcam.tasks._teacher import encode, generate, grown
from torchcam.tasks._tokens import choose, pieces_of, words_of
from torchcam.tasks.answers import AnswerExplanation, explain_answer

ANSWER = "a cat on the left"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in a processor
every_family = pytest.mark.parametrize("name", vl.FAMILIES)


def explained(name: str, answer: str | None = ANSWER, size: tuple[int, int] = (90, 130), **options: Any) -> Any:
    model, processor = vl.family(name)
    return explain_answer(model, processor, vl.picture(*size), vl.prompt(name), answer, **options)


def full_inputs(name: str, answer: str = ANSWER, pictures: int = 1) -> tuple[dict[str, Any], Tensor]:
    """Return the inputs of one pass over a prompt and an answer, and the answer's token ids."""
    model, processor = vl.family(name)
    images = [vl.picture(seed=seed) for seed in range(pictures)]
    inputs, _ = encode(model, processor, [images], [vl.prompt(name, pictures)])
    ids = torch.tensor([processor.tokenizer(answer, add_special_tokens=False)["input_ids"]])
    return grown(model, inputs, ids), ids


# The maps by hand: plain gradients of a model whose parts are linear wherever a rule says so.


def constant_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention whose probabilities are constants."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    return (scores.softmax(-1).detach() @ value).transpose(1, 2).contiguous(), None


def as_factor(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function as a constant factor of its argument."""
    return lambda x: x * (function(x) / x).detach()


def gated(module: Any) -> Callable[[Tensor], Tensor]:
    """Return a gated block in which each factor of the product gets half of the gradient."""

    def forward(x: Tensor) -> Tensor:
        gate, value = as_factor(module.act_fn)(module.gate_proj(x)), module.up_proj(x)
        return module.down_proj((gate * value.detach() + gate.detach() * value) / 2)

    return forward


@contextmanager
def cut_off(decoder: nn.Module, leaves: list[Tensor]) -> Iterator[None]:
    """Make leaves of the tensors that pictures enter a decoder by."""

    def enter(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        def leaf(value: Tensor) -> Tensor:
            leaves.append(value.detach().requires_grad_())
            return leaves[-1].clone()

        names = [name for name in ("cross_attention_states", "inputs_embeds") if kwargs.get(name) is not None][:1]
        changed = {name: leaf(kwargs[name]) for name in names}
        if kwargs.get("deepstack_visual_embeds"):
            changed["deepstack_visual_embeds"] = [leaf(one) for one in kwargs["deepstack_visual_embeds"]]
        return args, kwargs | changed

    handle = decoder.register_forward_pre_hook(enter, with_kwargs=True)
    yield
    handle.remove()


def maps_by_hand(name: str, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return gradient × activation of a score of each token, (K, V), with the rules written into the forward pass.

    Args:
        name: the family
        score: function of the logits (K, V) and the token ids (K,)
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register("constant", constant_attention)
    AttentionMaskInterface.register("constant", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model = copy.deepcopy(vl.family(name)[0])
    model.set_attn_implementation("constant")
    decoder = model.get_decoder()
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = as_factor(module.forward)
        elif hasattr(module, "gate_proj"):
            module.forward = gated(module)
    inputs, ids = full_inputs(name)
    leaves: list[Tensor] = []
    with cut_off(decoder, leaves):
        logits = model(**inputs).logits[0, -1 - ids.shape[1] : -1]
    image = getattr(model.config, "image_token_id", None)
    maps = []
    for one in score(logits, ids[0]):
        total: Any = 0
        for leaf, gradient in zip(leaves, torch.autograd.grad(one, leaves, retain_graph=True), strict=True):
            product = (leaf * gradient).sum(-1).detach()
            is_sequence = name != "Mllama" and leaf.ndim == 3
            total = total + (product[inputs["input_ids"] == image] if is_sequence else product.flatten())
        maps.append(total)
    return torch.stack(maps)


def logit(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(1, ids[:, None])[:, 0]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare maps, to a share of the largest value: norms of transformers compute in float32 in a float64 model."""
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


class TestOnePass:
    @every_family
    def test_has_the_logits_of_generate(self, name: str) -> None:
        model, processor = vl.family(name)
        inputs, _ = encode(model, processor, [[vl.picture()]], [vl.prompt(name)])
        made = model.generate(**inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        ids = made.sequences[:, -4:]
        logits = model(**grown(model, inputs, ids)).logits[:, -5:-1]
        own = torch.stack(made.logits, 1)
        assert_close(logits, own, 1e-6)
        found = explained(name, None, max_new_tokens=4)
        assert list(found.token_ids) == ids[0].tolist()
        assert_close(found.scores, own.gather(-1, ids[..., None])[0, :, 0])
        assert_close(found.probabilities, own.softmax(-1).gather(-1, ids[..., None])[0, :, 0])

    @pytest.mark.parametrize("answer", [None, ANSWER])
    def test_that_is_another_computation_is_an_error(self, answer: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        """The answer of PaliGemma is causal and its prompt is not: if both see all, all logits are others."""

        def naive(model: Any, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
            full = grown(model, inputs, ids)
            return full | {"token_type_ids": torch.zeros_like(full["token_type_ids"])}

        monkeypatch.setattr(answers, "grown", naive)
        with pytest.raises(RuntimeError, match=r"PaliGemma.*has other logits than its generation: they differ by \d"):
            explained("PaliGemma", answer, **({} if answer else {"max_new_tokens": 2}))

    def test_in_half_precision(self) -> None:
        model, processor = vl.family("LLaVA")
        full = explained("LLaVA", None, max_new_tokens=3)
        for dtype in (torch.bfloat16, torch.float16):
            small = copy.deepcopy(model).to(dtype)
            found = explain_answer(small, processor, vl.picture(), vl.prompt("LLaVA"), "".join(full.tokens))
            assert found.maps.dtype == torch.float32
            pair = torch.stack([found.maps.double().flatten(), full.maps.flatten()])
            assert float(torch.corrcoef(pair)[0, 1]) > 0.99

    def test_relevance_that_is_not_finite(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read = VisualStreams._read
        monkeypatch.setattr(VisualStreams, "_read", lambda self, gradients: read(self, gradients) / 0)
        with pytest.warns(
            UserWarning, match="relevance of LlavaForConditionalGeneration's visual tokens is not finite"
        ):
            found = explained("LLaVA", "dog")
        assert found._items[0]._sheet().rows[0].cells[0].note.endswith("undefined (NaN)")

    def test_an_answer_ends_where_the_model_ends_it(self) -> None:
        model, processor = vl.family("LLaVA")
        four = explained("LLaVA", None, max_new_tokens=4)
        changed = copy.copy(model)
        changed.generation_config = copy.deepcopy(model.generation_config)
        changed.generation_config.eos_token_id = four.token_ids[2]
        changed.generation_config.pad_token_id = 0
        found = explain_answer(changed, processor, vl.picture(), vl.prompt("LLaVA"), max_new_tokens=4)
        assert found.token_ids == four.token_ids[:2]
        changed.generation_config.eos_token_id = [5, four.token_ids[0]]
        with pytest.raises(ValueError, match="the answer to prompt 0 is empty"):
            explain_answer(changed, processor, vl.picture(), vl.prompt("LLaVA"), max_new_tokens=4)

    def test_of_beams(self) -> None:
        model, processor = vl.family("LLaVA")
        inputs, _ = encode(model, processor, [[vl.picture()]], [vl.prompt("LLaVA")])
        ids = model.generate(**inputs, num_beams=3, max_new_tokens=3)[0, -3:].tolist()
        found = explained("LLaVA", None, num_beams=3, max_new_tokens=3)
        assert list(found.token_ids) == ids

    def test_of_several_sequences(self) -> None:
        """The first answer to each prompt counts, with its own length."""
        asked = torch.tensor([[3, 4], [3, 4]])
        sequences = torch.cat([torch.full((4, 2), 3), torch.tensor([[7, 7, 5], [7, 7, 7], [8, 5, 0], [8, 8, 8]])], 1)

        def answer(input_ids: torch.Tensor, logits_processor: Any = (), **_: Any) -> Any:
            rows = len(input_ids) if logits_processor else len(sequences)
            return SimpleNamespace(sequences=sequences, logits=[torch.zeros(rows, 9)] * 3)

        model: Any = SimpleNamespace(generate=answer, generation_config=SimpleNamespace(eos_token_id=5))
        found = generate(model, None, {"input_ids": asked}, {})
        assert (found.ids.tolist(), found.lengths) == ([[7, 7], [8, 8]], [2, 1])


class TestMaps:
    @every_family
    def test_by_hand(self, name: str) -> None:
        found = explained(name)
        assert found.unbalanced == ()
        expected = maps_by_hand(name, logit)
        assert float(expected.abs().max()) > 1e-4
        assert_close(found.maps, expected)

    def test_of_log_probabilities(self) -> None:
        found = explained("LLaVA", score="logprob")
        assert_close(found.maps, maps_by_hand("LLaVA", lambda y, ids: logit(y.log_softmax(-1), ids)))
        assert_close(found.scores, found.probabilities.log())

    def test_against_another_token(self) -> None:
        other = vl.family("LLaVA")[1].tokenizer.convert_tokens_to_ids("dog")
        expected = maps_by_hand("LLaVA", lambda y, ids: logit(y, ids) - y[:, other])
        by_text = explained("LLaVA", against="dog")
        assert_close(by_text.maps, expected)
        assert torch.equal(explained("LLaVA", against=other).maps, by_text.maps)
        assert by_text.question == "the token's logit less that of 'dog'"

    def test_against_all_others(self) -> None:
        def score(y: Tensor, ids: Tensor) -> Tensor:
            return torch.stack(
                [row[k] - row[torch.arange(len(row)) != k].mean() for row, k in zip(y, ids, strict=True)]
            )

        assert_close(explained("LLaVA", against="others").maps, maps_by_hand("LLaVA", score))

    @every_family
    def test_with_layers_computed_again(self, name: str) -> None:
        assert_close(explained(name, checkpointing=True).maps, explained(name).maps, 1e-9)

    @pytest.mark.parametrize("name", ["LLaVA", "Qwen3-VL", "Mllama"])
    def test_layers_computed_again_keep_no_graph(self, name: str) -> None:
        """What the graph holds on to is a share of what it holds without, and does not grow with the layers."""
        model, _ = vl.family(name)
        inputs, _ = full_inputs(name)
        kept = []
        for checkpointing in (False, True):
            total = 0

            def pack(tensor: Tensor) -> Tensor:
                nonlocal total
                total += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                VisualStreams(replicate(model), None, checkpointing).run(inputs)
            kept.append(total)
        assert kept[1] < 0.25 * kept[0]

    @every_family
    def test_of_a_batch_are_those_of_each_prompt(self, name: str) -> None:
        """Prompts of different lengths, padded on the left, with pictures of different sizes."""
        model, processor = vl.family(name)
        prompts = [vl.prompt(name), vl.prompt(name, question="what is this cat ? on the left red sofa and : answer")]
        images, given = [vl.picture(), vl.picture(120, 64, seed=1)], [ANSWER, "dog"]
        batch = explain_answer(model, processor, images, prompts, given)
        for one, image, prompt, answer in zip(batch, images, prompts, given, strict=True):
            alone = explain_answer(model, processor, image, prompt, answer)
            assert one.tokens == alone.tokens
            assert_close(one.maps, alone.maps, 1e-4)
            assert_close(one.scores, alone.scores, 1e-4)
            assert one.images[0].size == image.size
            for own, other in zip(one.cells, alone.cells, strict=True):
                assert torch.allclose(own.boxes, other.boxes, rtol=0, atol=0, equal_nan=True)

    def test_of_generated_answers_in_a_batch(self) -> None:
        model, processor = vl.family("Qwen2-VL")
        prompts = [vl.prompt("Qwen2-VL"), vl.prompt("Qwen2-VL", question="a dog on the red sofa or what is it ?")]
        batch = explain_answer(model, processor, [[vl.picture()], [vl.picture(seed=1)]], prompts, max_new_tokens=3)
        for number, one in enumerate(batch):
            alone = explain_answer(model, processor, vl.picture(seed=number), prompts[number], max_new_tokens=3)
            assert one.token_ids == alone.token_ids
            assert_close(one.maps, alone.maps, 1e-4)

    def test_of_words_and_of_the_answer_are_sums(self, backward_passes: list[int]) -> None:
        tokens = explained("LLaVA")
        assert len(backward_passes) == 5
        whole = explained("LLaVA", per="answer")
        assert len(backward_passes) == 6
        assert_close(whole.maps, tokens.maps.sum(0, keepdim=True))
        assert_close(tokens.relevance(), whole.maps[0])
        some = explained("LLaVA", tokens="cat on", per="answer")
        assert some.words == ("cat on",)
        assert_close(some.maps[0], tokens.relevance([1, "on"]))
        assert torch.equal(explained("LLaVA", tokens=[1, -1]).maps, tokens.maps[[1, 4]])

    def test_of_two_pictures(self) -> None:
        """Only the one that the model is asked about decides: swapping both swaps the maps, up to their positions."""
        for name in ("LLaVA", "Qwen2-VL", "Idefics3"):
            model, processor = vl.family(name)
            pictures = [vl.picture(), vl.picture(120, 64, seed=1)]
            found = explain_answer(model, processor, pictures, vl.prompt(name, 2), ANSWER)
            assert [cells.boxes[:, 0].unique().tolist() for cells in found.cells] == [[0], [1]]
            alone = [explain_answer(model, processor, one, vl.prompt(name), ANSWER) for one in pictures]
            assert [len(cells.boxes) for cells in found.cells] == [one.maps.shape[1] for one in alone]
            for own, one in zip(found.cells, alone, strict=True):
                assert torch.equal(own.boxes[:, 1:].nan_to_num(), one.cells[0].boxes[:, 1:].nan_to_num())
            for number in range(2):
                drawn = found.overlay("cat", number)
                assert drawn.size == torchcam._pictures.enlarged(pictures[number]).size
            values = [found.map("cat", number) for number in range(2)]
            assert max(float(np.nanmax(one)) for one in values) == pytest.approx(1, abs=1e-6)

    def test_by_given_positions(self) -> None:
        model, _ = vl.family("LLaVA")
        inputs, ids = full_inputs("LLaVA")
        mask = inputs["input_ids"] == model.config.image_token_id
        found = explained("LLaVA", positions=mask[:, : -ids.shape[1]])
        assert torch.equal(found.maps, explained("LLaVA").maps)


class TestCells:
    """Where the tokens are, against where they react: in vision towers without attention each patch sees itself."""

    @every_family
    @pytest.mark.parametrize("size", [(90, 130), (200, 64)])
    def test_follow_planted_strips(self, name: str, size: tuple[int, int]) -> None:
        model, processor = vl.family(name)
        model = copy.deepcopy(model)
        vl.without_mixing(model)
        base = np.asarray(vl.picture(*size))

        def features(pixels: Any) -> tuple[Tensor, dict[str, Any]]:
            inputs, _ = encode(model, processor, [[Image.fromarray(pixels)]], [vl.prompt(name)])
            streams = VisualStreams(replicate(model))
            streams.run(inputs)
            leaf = streams._leaves[0].detach()
            return leaf.reshape(*streams.mask.shape, -1)[streams.mask], inputs  # type: ignore[union-attr]

        before, inputs = features(base)
        (cells,) = find_cells(model, processor, inputs, [[Image.fromarray(base)]], [len(before)])[0]
        boxes = cells.boxes
        nowhere = boxes.isnan().any(1)
        sides = boxes[:, 3:] - boxes[:, 1:3]
        visible = ((boxes[:, 1:3] + 0.3 * sides < 1) & (boxes[:, 3:] - 0.3 * sides > 0)).all(1)  # not all is padding
        strips = 4
        seen = torch.zeros(len(boxes), 2)
        for axis in (0, 1):
            low, high = boxes[:, 1 + axis], boxes[:, 3 + axis]
            margin = 0.3 * (high - low)
            for strip in range(strips):
                start, stop = (round(edge * size[axis] / strips) for edge in (strip, strip + 1))
                changed = base.copy()
                where = (slice(start, stop), slice(None)) if axis == 0 else (slice(None), slice(start, stop))
                changed[where] = 255 - changed[where]
                reacts = (features(changed)[0] - before).abs().amax(1) > 1e-6
                start, stop = start / size[axis], stop / size[axis]
                touches = (low + margin < stop) & (high - margin > start)
                apart = (low - margin > stop) | (high + margin < start)
                assert not bool((reacts & (apart | nowhere)).any()), (axis, strip)
                assert bool(reacts[touches & visible].all()), (axis, strip)
                seen[:, axis] += touches
        assert bool((seen[visible] > 0).all())
        assert int(visible.sum()) >= 4

    def test_cover_the_picture(self) -> None:
        for name in vl.FAMILIES:
            found = explained(name, "dog")
            drawn = found.map()
            assert float(np.isfinite(drawn).mean()) > (0.6 if name == "LLaVA" else 0.999), name  # it crops

    def test_are_weighed_by_area(self) -> None:
        """A token that sees four times as much counts a quarter for each place."""
        left = Cells(torch.tensor([[0, 0.0, 0.0, 1.0, 0.5], [0, 0.0, 0.5, 0.5, 0.75], [0, 0.5, 0.5, 1.0, 1.0]]))
        found = AnswerExplanation(
            prompt="",
            answer="x",
            tokens=("x",),
            token_ids=(1,),
            probabilities=torch.ones(1),
            explained=((0,),),
            scores=torch.ones(1),
            maps=torch.tensor([[4.0, 1.0, -2.0]]),
            cells=(left,),
            images=(Image.new("RGB", (8, 4)),),
            model="m.M",
            question="",
            unbalanced=(),
            versions={},
        )
        drawn = found.map("x")
        assert drawn.shape == (4, 8)
        assert np.allclose(drawn[:, :4], 1)
        assert np.allclose(drawn[:2, 4:6], 1)
        assert np.allclose(drawn[2:, 4:], 0)
        assert np.isnan(drawn[:2, 6:]).all()
        assert np.allclose(found.map("x", signed=True)[2:, 4:], -1)


class TestKnownEvidence:
    """A LLaVA that was trained to read each word from one cell."""

    def test_the_peak_is_on_the_cell_that_a_word_is_read_from(self) -> None:
        from tests.tiny_llava import benchmark_answers

        shares = benchmark_answers.measure(50)
        assert min(shares["the model's answers"]) == 1
        own = shares.pop("torchcam.explain_answer")
        assert min(own) >= 0.97
        assert min(own) > max(max(shares[name]) for name in ("activation × gradient, plain", "attention × gradient"))

    def test_words_have_places_of_their_own(self) -> None:
        from tests.tiny_llava import example

        model, processor, picture = example()
        found = explain_answer(model, processor, picture, "<image> red and blue :", max_new_tokens=2)
        bar, cross = found.maps
        assert found.answer == "bar cross"
        assert bar.argmax() != cross.argmax()
        contrast = explain_answer(
            model, processor, picture, "<image> red and blue :", "bar cross", tokens="cross", against="plus"
        )
        assert contrast.maps[0].argmax() == cross.argmax()


class TestTokens:
    def test_pieces_join_to_the_answer(self) -> None:
        tokenizer = vl.family("LLaVA")[1].tokenizer
        ids = tokenizer("a cat on", add_special_tokens=False)["input_ids"]
        assert pieces_of(tokenizer, ids) == ["a", " cat", " on"]

    def test_pieces_of_a_letter_in_several_bytes(self) -> None:
        class Bytes:
            def decode(self, ids: list[int], **_: Any) -> str:
                return bytes(ids).decode(errors="replace")

        assert pieces_of(Bytes(), [*"aé b".encode()]) == ["a", "", "é", " ", "b"]
        assert pieces_of(Bytes(), [97, 0xC3]) == ["a", "\ufffd"]

    def test_words(self) -> None:
        assert words_of([" A", " sub", "word", ",", " then"]) == [(0,), (1, 2, 3), (4,)]
        assert words_of(["a ", "b", "\n", "c"]) == [(0,), (1,), (2,), (3,)]

    def test_choices(self) -> None:
        pieces = ["A", " sub", "word", " here"]
        assert choose(pieces, None, "token") == ((0,), (1,), (2,), (3,))
        assert choose(pieces, "subword", "token") == ((1,), (2,))
        assert choose(pieces, "word", "word") == ((1, 2),)
        assert choose(pieces, [-1, 0], "answer") == ((0, 3),)

    def test_the_target_for_loops_of_ones_own(self) -> None:
        logits = torch.arange(12.0).reshape(3, 4).square()
        assert float(Token(-1, 2)(logits)) == 100
        assert float(Token(1, 0, against=3)(logits)) == 16 - 49
        assert float(Token(0, 3, against="others")(logits)) == pytest.approx(9 - 5 / 3)
        for target, match in (
            (Token(3, 0), "`position` is 3"),
            (Token(0, 4), "`token_id` must be a token id in"),
            (Token(0, 0, against=-1), "`against` must be a token id in"),
        ):
            with pytest.raises(ValueError, match=match):
                target(logits)

    def test_the_target_is_the_score_of_an_answer(self) -> None:
        model, _ = vl.family("LLaVA")
        inputs, ids = full_inputs("LLaVA")
        logits = model(**inputs).logits[0]
        found = [Token(place - ids.shape[1] - 1, int(token))(logits) for place, token in enumerate(ids[0])]
        assert_close(torch.stack(found).detach(), explained("LLaVA").scores)


class TestInput:
    def test_a_question_goes_through_the_chat_template(self) -> None:
        model, processor = vl.family("LLaVA")
        processor = copy.copy(processor)
        processor.chat_template = (
            "{% for message in messages %}{% for part in message['content'] %}"
            "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endfor %} Assistant :"
        )
        question = "what is in this picture ?"
        found = explain_answer(model, processor, vl.picture(), question, "dog")
        assert found.prompt == "<image> what is in this picture ? Assistant :"
        plain = explain_answer(model, processor, vl.picture(), found.prompt, "dog")
        assert torch.equal(found.maps, plain.maps)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = explain_answer(model, processor, vl.picture(), [{"role": "user", "content": content}], "dog")
        assert torch.equal(found.maps, chat.maps)

    def test_pictures_by_path_and_as_arrays(self, tmp_path: Path) -> None:
        model, processor = vl.family("LLaVA")
        vl.picture().save(tmp_path / "picture.png")
        for given in (tmp_path / "picture.png", str(tmp_path / "picture.png"), np.asarray(vl.picture())):
            found = explain_answer(model, processor, given, vl.prompt("LLaVA"), ANSWER)
            assert torch.equal(found.maps, explained("LLaVA").maps)

    def test_an_answer_as_token_ids(self) -> None:
        model, processor = vl.family("LLaVA")
        plain = explained("LLaVA")
        for ids in (list(plain.token_ids), torch.tensor(plain.token_ids)):
            found = explain_answer(model, processor, vl.picture(), vl.prompt("LLaVA"), ids)
            assert torch.equal(found.maps, plain.maps)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_in_any_grad_mode(self, context: Any) -> None:
        with context():
            found = explained("LLaVA")
        assert torch.equal(found.maps, explained("LLaVA").maps)

    def test_in_training_mode(self) -> None:
        model, processor = vl.family("LLaVA")
        training = copy.deepcopy(model).train()
        found = explain_answer(training, processor, vl.picture(), vl.prompt("LLaVA"), ANSWER)
        assert torch.equal(found.maps, explained("LLaVA").maps)
        assert training.training


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"tokens": 5}, r"`tokens` names 5, but the answer 'a cat on the left' has 5 tokens: 0 to 4"),
            ({"tokens": "dog"}, "`tokens` names 'dog', which is not in the answer"),
            ({"answer": ""}, "`answer` is empty"),
            ({"answer": 5}, "`answer` must be a text, or token ids"),
            ({"answer": [0, 10**6]}, "`answer` must be a text, or token ids"),
            ({"against": "a cat"}, r"`against` 'a cat' is not one token but \['a', 'cat'\]"),
            ({"against": 10**6}, "`against` must be a token id"),
            ({"score": "loss"}, "`score` must be 'logit' or 'logprob', got 'loss'"),
            ({"per": "letter"}, "`per` must be 'token', 'word' or 'answer'"),
            ({"max_new_tokens": 3}, "`answer` is given, so nothing is generated: leave out max_new_tokens"),
            ({"positions": [True]}, "`positions` must say of each position"),
            ({"cells": Cells.of_grid((2, 2))}, "`cells` has 4 places for the 16 visual tokens of prompt 0"),
            ({"cells": [Cells.of_grid((4, 4))] * 2}, "`cells` must hold a `Cells` for each of the 1 pictures"),
        ],
    )
    def test_bad_arguments(self, options: dict[str, Any], match: str) -> None:
        answer = options.pop("answer", ANSWER)
        with pytest.raises(ValueError, match=match):
            explained("LLaVA", answer, **options)

    def test_wrong_types(self) -> None:
        model, processor = vl.family("LLaVA")
        image, prompt = vl.picture(), vl.prompt("LLaVA")
        for arguments, match in (
            ((3, processor), r"`model` must be a torch\.nn\.Module"),
            ((nn.Linear(1, 1), processor), "`model` must be a generative model of transformers"),
            ((model, processor.tokenizer), "`processor` must be the processor of a vision-language model"),
        ):
            with pytest.raises(TypeError, match=match):
                explain_answer(*arguments, image, prompt)
        with pytest.raises(TypeError, match="`tokens` must be an index"):
            explained("LLaVA", tokens=1.5)
        with pytest.raises(TypeError, match="`against` must be a token's id or text"):
            explained("LLaVA", against=1.5)

    @pytest.mark.parametrize("name", vl.FAMILIES)
    def test_as_many_pictures_as_places(self, name: str) -> None:
        model, processor = vl.family(name)
        with pytest.raises(ValueError, match=r"`images` holds 2 picture.* but `prompt` has 1 place"):
            explain_answer(model, processor, [vl.picture()] * 2, vl.prompt(name), ANSWER)
        if name != "PaliGemma":  # which puts them in front itself
            with pytest.raises(ValueError, match="`images`"):
                explain_answer(model, processor, vl.picture(), "what is this ?", ANSWER)

    def test_batches_of_other_lengths(self) -> None:
        model, processor = vl.family("LLaVA")
        prompts = [vl.prompt("LLaVA")] * 2
        with pytest.raises(ValueError, match="`images` must be a list with an entry for each of the 2 prompts, got 1"):
            explain_answer(model, processor, [vl.picture()], prompts, [ANSWER] * 2)
        with pytest.raises(ValueError, match="`answer` must be a list with an entry for each of the 2 prompts"):
            explain_answer(model, processor, [vl.picture()] * 2, prompts, [ANSWER])
        with pytest.raises(ValueError, match="`images` is empty"):
            explain_answer(model, processor, [], vl.prompt("LLaVA"), ANSWER)

    @pytest.mark.parametrize("other", ["Qwen2-VL", "LLaVA-NeXT", "Idefics3", "Mllama", "Gemma3"])
    def test_a_processor_of_another_model(self, other: str) -> None:
        model, processor = vl.family("LLaVA")[0], vl.family(other)[1]
        with pytest.raises(
            ValueError, match=f"pass the processor of this model .this one is a {type(processor).__name__}"
        ):
            explain_answer(model, processor, vl.picture(), vl.prompt(other), ANSWER)

    def test_queries_have_no_place(self) -> None:
        model, processor = vl.family("BLIP-2")
        image, prompt = vl.picture(), "what is this ?"
        with pytest.raises(ValueError, match=r"visual tokens of Blip2.* is not known.*`cells=`.*vision tower"):
            explain_answer(model, processor, image, prompt, ANSWER)
        found = explain_answer(model, processor, image, prompt, ANSWER, cells=Cells.of_grid((2, 4)))
        assert found.maps.shape == (5, 8)

    def test_pictures_that_enter_in_no_known_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchcam.tasks import _streams

        monkeypatch.setattr(
            _streams._Placement, "__torch_function__", lambda _, f, __, a=(), k=None: f(*a, **(k or {}))
        )
        with pytest.raises(ValueError, match=r"scatters no features of `images`.*`positions=`"):
            explained("LLaVA")

    def test_maps_and_pictures_that_are_not_there(self) -> None:
        found = explained("LLaVA")
        with pytest.raises(ValueError, match=r"`word` 'dog' was not explained; there are maps 0 to 4 of \['a', 'cat'"):
            found.overlay("dog")
        with pytest.raises(ValueError, match="`word` 7 was not explained"):
            found.map(7)
        with pytest.raises(ValueError, match=r"`picture` must be a number in \[0, 1\), got 1"):
            found.map(0, 1)


class TestTraces:
    @pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "Qwen3-VL", "Mllama"])
    def test_the_model_is_what_it_was(self, name: str) -> None:
        model, processor = vl.family(name)
        model = copy.deepcopy(model)

        def state() -> dict[str, Any]:
            found: dict[str, Any] = {}
            for path, module in model.named_modules():
                for key, value in vars(module).items():
                    if isinstance(value, (bool, int, float, str, type(None))):
                        found[f"{path}.{key}"] = value
                found[f"{path}.hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
                found[f"{path}.own"] = own_attributes(module)
            for path, tensor in (*model.named_parameters(), *model.named_buffers()):
                found[path] = (tensor.requires_grad, tensor.grad, tensor._version)
            found["random"] = torch.get_rng_state().tolist()
            found["grad"] = torch.is_grad_enabled()
            return found

        inputs, _ = encode(model, processor, [[vl.picture()]], [vl.prompt(name)])
        expected = model(**inputs).logits
        before = state()
        explain_answer(model, processor, vl.picture(), vl.prompt(name), max_new_tokens=2, do_sample=True)
        explain_answer(model, processor, vl.picture(), vl.prompt(name), ANSWER, checkpointing=True)
        with pytest.raises(ValueError, match="`tokens` names"):
            explain_answer(model, processor, vl.picture(), vl.prompt(name), ANSWER, tokens=99)
        assert state() == before
        assert torch.equal(model(**inputs).logits, expected)


@pytest.fixture(scope="module")
def found() -> AnswerExplanation:
    """The answer to a prompt with two pictures."""
    model, processor = vl.family("LLaVA")
    pictures = [vl.picture(), vl.picture(120, 64, seed=1)]
    result: AnswerExplanation = explain_answer(model, processor, pictures, vl.prompt("LLaVA", 2), ANSWER)
    return result


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from chromium()


class TestResult:
    def test_says_what_was_asked_and_answered(self, found: AnswerExplanation) -> None:
        assert found.answer == ANSWER
        assert found.words == ("a", "cat", "on", "the", "left")
        assert found.title == "LlavaForConditionalGeneration answers: a cat on the left"
        assert repr(found) == f"<AnswerExplanation: {found.title}; maps of 5 on 2 picture(s)>"
        assert found.prompt == vl.prompt("LLaVA", 2)
        assert set(found.versions) == {"python", "torch", "transformers", "torchcam"}

    def test_the_overlay_is_where_the_map_is(self, found: AnswerExplanation) -> None:
        """In the middle of each cell is its relevance, and what the model does not see stays as it is."""
        drawn = found.map("cat", 0)
        rows, columns = np.nonzero(np.isfinite(drawn))
        assert (rows.min(), rows.max() + 1) == (0, 90)
        assert (columns.min(), columns.max() + 1) == (20, 110)  # 90 of 130 pixels, in the middle
        values = found.maps[1].clamp_min(0) / found.maps[1].max()
        for cell, value in enumerate(values[:16].tolist()):
            row, column = divmod(cell, 4)
            assert drawn[int(22.5 * row + 11), int(20 + 22.5 * column + 11)] == pytest.approx(value, abs=0.1)
        overlay = np.asarray(found.overlay("cat", 0).resize((130, 90)), dtype=int)
        below = np.asarray(found.images[0].resize((130, 90)), dtype=int)
        assert np.abs(overlay[:, :15] - below[:, :15]).max() < 40

    def test_save(self, found: AnswerExplanation, tmp_path: Path) -> None:
        folder = found.save(tmp_path / "answer")
        names = {path.name for path in folder.iterdir()}
        overlays = {f"map-{word}-image-{picture}.png" for word in range(5) for picture in range(2)}
        assert names == {"maps.npy", "cells.npy", "manifest.json", "image-0.png", "image-1.png"} | overlays
        assert np.array_equal(np.load(folder / "maps.npy"), found.maps.numpy())
        assert np.load(folder / "cells.npy").shape == (32, 5)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["answer"] == ANSWER
        assert [entry["word"] for entry in manifest["maps"]] == list(found.words)
        assert manifest["maps"][1]["score"] == pytest.approx(float(found.scores[1]))
        with pytest.raises(FileExistsError, match="`directory`"):
            found.save(folder)

    def test_plot_has_a_row_for_each_picture(self, found: AnswerExplanation) -> None:
        figure = found.plot()
        shown = [axes for axes in figure.axes if axes.get_label() != "colour bar"]
        assert len(shown) == 2 * (1 + 5)
        assert "a cat on the left" in figure.texts[0].get_text()

    def test_a_notebook_shows_the_page(self, found: AnswerExplanation) -> None:
        import html

        shown = found._repr_html_()
        match = re.search(r'srcdoc="([^"]*)"', shown)
        assert match is not None
        assert html.unescape(match[1]) == found.to_html()
        assert 'sandbox="allow-scripts allow-downloads"' in shown
        assert found._repr_png_() is not None

    def test_the_page_escapes_all_text(self) -> None:
        from dataclasses import replace

        evil = "</script><script>document.title = 'gone'</script><!-- & \"x\" 'y'"
        found = replace(explained("LLaVA", "dog"), tokens=(evil,), answer=evil, prompt=evil)
        page = found.to_html()
        assert "document.title = 'gone'</script>" not in page
        assert page.count("</script>") == 2
        assert evil not in found._repr_html_()


class TestBrowser:
    @pytest.fixture
    def page(self, found: AnswerExplanation, browser: Any, tmp_path: Path) -> Iterator[Any]:
        found.to_html(tmp_path / "answer.html")
        shown = browser.new_page(viewport={"width": 390, "height": 800})
        problems: list[str] = []
        shown.on("pageerror", lambda error: problems.append(str(error)))
        shown.on("request", lambda request: request.url.startswith("http") and problems.append(request.url))
        shown.goto((tmp_path / "answer.html").as_uri())
        yield shown
        assert problems == []
        shown.close()

    def test_pointing_at_a_word_shows_its_map(self, page: Any) -> None:
        caption = page.locator("figcaption span").first
        words = page.locator(".sentence button")
        assert words.all_inner_texts() == ["a", "cat", "on", "the", "left"]
        assert "of a" in caption.inner_text()
        before = page.locator(".map canvas").first.evaluate("c => c.toDataURL()")
        words.nth(1).hover()
        assert "of cat" in caption.inner_text()
        assert page.locator(".map canvas").first.evaluate("c => c.toDataURL()") != before
        page.locator("h1").hover()
        assert "of a" in caption.inner_text()
        words.nth(4).click()
        page.locator("h1").hover()
        assert "of left" in caption.inner_text()

    def test_the_keyboard_goes_from_word_to_word(self, page: Any) -> None:
        words = page.locator(".sentence button")
        words.first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.textContent") == "on"
        assert "of on" in page.locator("figcaption span").first.inner_text()
        page.keyboard.press("End")
        assert [word.get_attribute("aria-checked") for word in words.all()] == ["false"] * 4 + ["true"]
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.textContent") == "left"

    def test_other_pictures_and_narrow_screens(self, page: Any) -> None:
        page.locator(".sentence button").nth(1).click()
        page.locator("#input").select_option("1")
        assert "of cat" in page.locator("figcaption span").first.inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
