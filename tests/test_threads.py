"""A pass belongs to the thread or task that ran it: one model in several threads, asyncio tasks and notebook cells."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import cycle, pairwise, product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torchvision.models import VisionTransformer

from tests.lines import at_each_line
from tests.models import shuffled
from torchcam import methods
from torchcam.explain import explain

TIMEOUT = 20.0  # seconds until a thread that waits counts as hanging
THREADS = 8
PASSES = 2  # of each thread
CLASSES = 5

SITUATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "GradCAM": partial(methods.GradCAM, target_layer=["stem", "middle"]),
    "LayerCAM": partial(methods.LayerCAM, target_layer=["stem", "middle"]),
    "EigenCAM": partial(methods.EigenCAM, target_layer=["stem", "middle"]),
    "ScoreCAM": partial(methods.ScoreCAM, target_layer="middle", batch_size=5),
    "AblationCAM": partial(methods.AblationCAM, target_layer="middle", batch_size=5),
    "ReciproCAM": partial(methods.ReciproCAM, target_layer="middle", batch_size=5),
    "LeGrad": partial(
        methods.LeGrad, target_layer=["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]
    ),
}
KEEP = {method: {"retain_graph": True} for method in ["GradCAM", "LayerCAM"]}  # to use one graph more than once
RUNS_THE_MODEL_AGAIN = ["ScoreCAM", "AblationCAM", "ReciproCAM"]

every_method = pytest.mark.parametrize("method", METHODS)
every_situation = pytest.mark.parametrize("situation", SITUATIONS)
replaying_methods = pytest.mark.parametrize("method", RUNS_THE_MODEL_AGAIN)
own_or_shared = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Let the interpreter switch between threads so often that every race has its chance."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


# The models, and what a single thread gets from them ------------------------------------------------------------------

_stops = threading.local()


def stop_here(place: int) -> None:
    """Wait where this thread is asked to: the nets call this in the middle of their forward pass."""
    stop: Stop | None = getattr(_stops, "stop", None)
    if stop is not None:
        stop.wait_at(place)


class Stop:
    """Halts the thread that enters it, once, until it is released."""

    def __init__(self, place: int | None = None) -> None:
        self.place = place  # None: the first place that is reached
        self.reached = threading.Event()
        self.released = threading.Event()

    def wait_at(self, place: int) -> None:
        if self.place in {None, place} and not self.reached.is_set():
            self.reached.set()
            assert self.released.wait(TIMEOUT), "never released"

    def __enter__(self) -> Stop:
        _stops.stop = self
        return self

    def __exit__(self, *_: object) -> None:
        _stops.stop = None


class Net(nn.Module):
    """A CNN with batch norm, and operations in place right behind the target layers."""

    def __init__(self) -> None:
        super().__init__()
        # The statistics of a pass in training mode do not change the running ones: every result is the same each time.
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(6, momentum=0.0)
        self.middle = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.last_bn = nn.BatchNorm2d(8, momentum=0.0)
        self.fc = nn.Linear(8 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stop_here(0)
        x = self.relu(self.bn(self.stem(x)))
        stop_here(1)
        x = self.relu(self.middle(x))
        stop_here(2)
        return self.fc(self.relu(self.last_bn(self.last(x))).flatten(1))


class Transformer(VisionTransformer):
    """The transformer of torchvision, with two small blocks."""

    def __init__(self) -> None:
        super().__init__(16, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES)
        self.conv_proj.register_forward_hook(lambda *_: stop_here(0))
        self.encoder.layers.encoder_layer_0.mlp.register_forward_hook(lambda *_: stop_here(1))
        self.encoder.ln.register_forward_hook(lambda *_: stop_here(2))


def make_model(method: str) -> nn.Module:
    """Make the net for a method, in evaluation mode."""
    model = shuffled(Transformer() if method == "LeGrad" else Net(), scale=2.0)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and name not in {"stem", "conv_proj"}:
            module.weight.data.abs_()  # with evidence for every class, no ReLU leaves a map empty
    return model


class Question(NamedTuple):
    """What is explained, and in which mode."""

    image: Tensor
    class_idx: int
    situation: str


class Answer(NamedTuple):
    """What came of it."""

    output: Tensor
    maps: list[Tensor]


def make_question(seed: int, situation: str = "grad", batch_size: int = 2) -> Question:
    generator = torch.Generator().manual_seed(seed)
    return Question(torch.randn((batch_size, 3, 16, 16), generator=generator), seed % CLASSES, situation)


def make_questions(number: int) -> list[Question]:
    """Make different inputs, in alternating modes."""
    return [make_question(seed, situation) for seed, situation in zip(range(number), cycle(SITUATIONS), strict=False)]


def ask(model: nn.Module, extractor: Any, question: Question, give_scores: bool = False) -> Answer:
    """Run the model and explain its output in the mode of the question, which must be on afterwards as well."""
    with SITUATIONS[question.situation]():
        before = modes()
        output = model(question.image)
        assert modes() == before
        maps = extractor(question.class_idx, output if give_scores else None)
        assert modes() == before
    return Answer(output, maps)


def plain_outputs(model: nn.Module, questions: Sequence[Question]) -> list[Tensor]:
    """Run the model without any extractor."""
    outputs = []
    for question in questions:
        with SITUATIONS[question.situation]():
            outputs.append(model(question.image))
    return outputs


def expect(model: nn.Module, method: str, questions: Sequence[Question]) -> list[Answer]:
    """Compute the answers in a single thread: the outputs without any extractor, the maps with one."""
    outputs = plain_outputs(model, questions)
    with METHODS[method](model) as extractor:
        maps = [ask(model, extractor, question).maps for question in questions]
    for some, others in pairwise(maps):  # so that a mix-up shows
        assert all((a - b).abs().amax() > 0.05 for a, b in zip(some, others, strict=True))
    return [Answer(*pair) for pair in zip(outputs, maps, strict=True)]


def modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def same_maps(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(maps) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(maps, expected, strict=True)
    )


def same_output(output: Tensor, expected: Tensor) -> bool:
    return torch.equal(output, expected) and output.requires_grad == expected.requires_grad


def check(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Compare all answers with those of a single thread."""
    pairs = list(zip(answers, expected, strict=True))
    wrong_maps = sum(not same_maps(answer.maps, right.maps) for answer, right in pairs)
    wrong_outputs = sum(not same_output(answer.output, right.output) for answer, right in pairs)
    assert (wrong_maps, wrong_outputs) == (0, 0), f"wrong of {len(pairs)}: {wrong_maps} maps, {wrong_outputs} outputs"


def check_map(maps: Sequence[Tensor], expected: Answer) -> None:
    assert same_maps(maps, expected.maps)


def check_right_or_refused(call: Callable[[], Sequence[Tensor]], expected: Answer, word: str = "scores") -> None:
    """Check that a call gives the right maps, or a RuntimeError with a word that leads to the way out."""
    try:
        maps = call()
    except RuntimeError as error:
        assert word in str(error)  # noqa: PT017 - maps are as welcome as the error
    else:
        check_map(maps, expected)


class State:
    """What other threads can see of a model: flags and tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.training = {name: module.training for name, module in model.named_modules()}
        self.tensors = {
            name: (id(tensor), tensor.detach().clone(), tensor.requires_grad)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }

    def check(self) -> None:
        """Compare with what is there now. Counters of batches grow with each pass in training mode."""
        now = State(self.model)
        assert now.training == self.training
        assert now.tensors.keys() == self.tensors.keys()
        for name, (identity, value, requires_grad) in self.tensors.items():
            assert now.tensors[name][0] == identity, name
            assert torch.equal(now.tensors[name][1], value) or name.endswith("num_batches_tracked"), name
            assert now.tensors[name][2] == requires_grad, name
        assert all(parameter.grad is None for parameter in self.model.parameters())
        assert not any("forward" in vars(module) for module in self.model.modules())


# Threads --------------------------------------------------------------------------------------------------------------


def run_threads(
    workers: Sequence[Callable[[], Any]], background: Sequence[Callable[[threading.Event], Any]] = ()
) -> list[Any]:
    """Run callables in a thread each, all started at once, and raise whatever they raised.

    Args:
        workers: what is waited for
        background: what runs until the event that it is called with is set, as soon as the workers are done

    Returns:
        what the workers returned, then what the background returned
    """
    done = threading.Event()
    calls = [*workers, *(partial(call, done) for call in background)]
    start = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)
    errors: list[Exception] = []

    def run(index: int) -> None:
        start.wait(TIMEOUT)
        try:
            results[index] = calls[index]()
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads[: len(workers)]:
        thread.join(TIMEOUT)
    done.set()
    for thread in threads[len(workers) :]:
        thread.join(TIMEOUT)
    if errors:
        raise ExceptionGroup("in threads", errors)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


def call_only(
    model: nn.Module, questions: Sequence[Question], expected: Sequence[Tensor], done: threading.Event
) -> tuple[int, int]:
    """Call the model, and nothing else, until the others are done.

    Returns:
        the number of calls, and of those whose output is not bit for bit that of a single thread
    """
    calls = wrong = 0
    for question, output in cycle(zip(questions, expected, strict=True)):
        with SITUATIONS[question.situation]():
            before = modes()
            wrong += not same_output(model(question.image), output)
            assert modes() == before
        calls += 1
        if done.is_set() and calls >= len(questions):
            break
    return calls, wrong


def plain_callers(model: nn.Module) -> list[Callable[..., tuple[int, int]]]:
    """Make what calls the model in the background, in two threads; ``check_plain`` takes what it returns."""
    questions = [make_question(1000 + number, situation) for number, situation in enumerate([*SITUATIONS] * 2)]
    halves = questions[:3], questions[3:]
    return [partial(call_only, model, half, plain_outputs(model, half)) for half in halves]


def check_plain(results: Sequence[tuple[int, int]]) -> None:
    calls, wrong = (sum(counts) for counts in zip(*results, strict=True))
    assert wrong == 0, f"{wrong} of {calls} outputs of threads without an extractor are wrong"


def ask_all(model: nn.Module, extractor: Any, questions: Sequence[Question], give_scores: bool = False) -> list[Answer]:
    return [ask(model, extractor, question, give_scores) for question in questions]


def questions_of_threads(situations: Sequence[str], threads: int = THREADS) -> list[list[Question]]:
    """Make different inputs for each pass of each thread, in alternating modes."""
    return [
        [make_question(thread * PASSES + k, situations[(thread + k) % len(situations)]) for k in range(PASSES)]
        for thread in range(threads)
    ]


def flat(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for items in lists for item in items]


@own_or_shared
@every_method
def test_eight_threads_on_one_model(method: str, shared: bool) -> None:
    """Each thread uses two of the three modes; every other one gives the scores."""
    model = make_model(method)
    questions = questions_of_threads(list(SITUATIONS))
    expected = expect(model, method, flat(questions))
    callers = plain_callers(model)
    state = State(model)
    with ExitStack() as stack:
        made = [stack.enter_context(METHODS[method](model)) for _ in range(1 if shared else THREADS)]
        workers = [
            partial(ask_all, model, made[thread % len(made)], questions[thread], give_scores=thread % 2 == 1)
            for thread in range(THREADS)
        ]
        results = run_threads(workers, callers)
        state.check()
    check_plain(results[THREADS:])
    check(flat(results[:THREADS]), expected)


@pytest.mark.parametrize("method", ["GradCAM", "ScoreCAM", "AblationCAM", "LeGrad"])
def test_explain_in_threads(method: str) -> None:
    model = make_model(method)
    layer = "encoder.layers.encoder_layer_1" if method == "LeGrad" else "middle"

    def explain_all(numbers: Sequence[int]) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        answers = []
        for number in numbers:
            situation = list(SITUATIONS)[number % 3]
            image, class_idx, _ = make_question(number, batch_size=1)
            with SITUATIONS[situation]():
                before = modes()
                found = explain(model, image, method=method, target_layer=layer, class_idx=class_idx)
                assert modes() == before
            answers.append((found.logits, found.cams[class_idx]))
        return answers

    numbers = [range(thread * PASSES, (thread + 1) * PASSES) for thread in range(THREADS)]
    expected = explain_all(range(THREADS * PASSES))
    callers = plain_callers(model)
    state = State(model)
    results = run_threads([partial(explain_all, own) for own in numbers], callers)
    state.check()
    check_plain(results[THREADS:])
    answers = flat(results[:THREADS])
    assert all(
        torch.allclose(logits, right, rtol=1e-5) for (logits, _), (right, _) in zip(answers, expected, strict=True)
    )
    wrong = sum(not same_maps(maps, right) for (_, maps), (_, right) in zip(answers, expected, strict=True))
    assert wrong == 0, f"{wrong} of {len(answers)} maps are wrong"


@pytest.mark.filterwarnings("ignore:behind the `target_layer`")  # samples are mixed in training mode
@own_or_shared
@every_method
def test_training_mode_is_right_or_refused(method: str, shared: bool) -> None:
    threads = 4
    model = make_model(method).train()
    questions = questions_of_threads(["grad"], threads)
    expected = expect(model, method, flat(questions))
    callers = plain_callers(model)
    state = State(model)

    def ask_or_be_refused(extractor: Any, questions: Sequence[Question], expected: Sequence[Answer]) -> None:
        for (image, class_idx, _), right in zip(questions, expected, strict=True):
            output = model(image)
            check_right_or_refused(partial(extractor, class_idx), right, "training")
            assert same_output(output, right.output)

    with ExitStack() as stack:
        made = [stack.enter_context(METHODS[method](model)) for _ in range(1 if shared else threads)]
        workers = [
            partial(
                ask_or_be_refused, made[thread % len(made)], questions[thread], expected[thread * PASSES :][:PASSES]
            )
            for thread in range(threads)
        ]
        results = run_threads(workers, callers)
        state.check()
    check_plain(results[threads:])


def extractors_for_two(model: nn.Module, method: str, shared: bool, stack: ExitStack) -> tuple[Any, Any]:
    first = stack.enter_context(METHODS[method](model))
    return first, first if shared else stack.enter_context(METHODS[method](model))


def run_within(stop: Stop, quick: Callable[[], Any], slow: Callable[[], Any]) -> list[Any]:
    """Run one callable in a thread while another halts at ``stop`` in the middle of it."""

    def within() -> Any:
        assert stop.reached.wait(TIMEOUT)
        try:
            return quick()
        finally:
            stop.released.set()

    def around() -> Any:
        try:
            return slow()
        finally:
            stop.reached.set()  # if the place was never reached

    return run_threads([within, around])


@own_or_shared
@every_method
def test_a_pass_within_the_pass_of_another_thread(method: str, shared: bool) -> None:
    """One thread runs its pass and gets its map while another's pass is halfway, whatever the modes of the two."""
    model = make_model(method)
    names = list(SITUATIONS)
    quick = [make_question(1, situation) for situation in names]
    slow = [make_question(2, situation) for situation in names]
    right = [expect(model, method, pair) for pair in zip(quick, slow, strict=True)]
    state = State(model)

    def ask_and_stop(extractor: Any, question: Question, stop: Stop) -> Answer:
        with stop:
            return ask(model, extractor, question)

    with ExitStack() as stack:
        first, second = extractors_for_two(model, method, shared, stack)
        for place, one in product(range(3), range(3)):
            other = (one + place) % 3
            stop = Stop(place)
            answers = run_within(
                stop, partial(ask, model, first, quick[one]), partial(ask_and_stop, second, slow[other], stop)
            )
            check(answers, [right[one][0], right[other][1]])
            state.check()


@own_or_shared
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@replaying_methods
def test_a_pass_within_the_replay_of_another_thread(method: str, training: bool, shared: bool) -> None:
    """While an extractor runs the model again, halfway, another thread sees nothing of it."""
    model = make_model(method).train(training)
    names = list(SITUATIONS)
    replayed = [make_question(1, situation) for situation in names]
    quick = [make_question(2, situation) for situation in names]
    right = [expect(model, method, pair) for pair in zip(replayed, quick, strict=True)]
    state = State(model)

    def explained(extractor: Any, question: Question, right: Answer, stop: Stop | None = None) -> None:
        with SITUATIONS[question.situation]():
            output = model(question.image)
            assert same_output(output, right.output)
            with stop or nullcontext():
                call = partial(extractor, question.class_idx)
                if training:
                    check_right_or_refused(call, right, "training")
                else:
                    check_map(call(), right)

    def look_and_explain(*arguments: Any) -> None:
        state.check()
        explained(*arguments)
        state.check()

    with ExitStack() as stack:
        first, second = extractors_for_two(model, method, shared, stack)
        for one, other in product(range(3), range(3)):
            stop = Stop()
            run_within(
                stop,
                partial(look_and_explain, second, quick[other], right[other][1]),
                partial(explained, first, replayed[one], right[one][0], stop),
            )
            state.check()


@every_method
def test_a_thread_whose_pass_fails_disturbs_no_other(method: str) -> None:
    model = make_model(method)
    question = make_question(1)
    (expected,) = expect(model, method, [question])
    recorded, failed = threading.Event(), threading.Event()
    with METHODS[method](model) as extractor:

        def fails() -> None:
            assert recorded.wait(TIMEOUT)
            for situation in SITUATIONS.values():
                with situation():
                    before = modes()
                    with pytest.raises(RuntimeError):
                        model(torch.zeros(1, 4, 16, 16))
                    assert modes() == before
                    with pytest.raises((RuntimeError, AssertionError)):
                        extractor(0)
            failed.set()

        def asks() -> list[Tensor]:
            model(question.image)
            recorded.set()
            assert failed.wait(TIMEOUT)
            maps: list[Tensor] = extractor(question.class_idx)
            return maps

        maps, _ = run_threads([asks, fails])
    check_map(maps, expected)


@every_method
def test_hook_a_and_hook_g_are_those_of_the_thread(method: str) -> None:
    model = make_model(method)
    questions = make_questions(4)
    expected = []
    for question in questions:
        with METHODS[method](model) as extractor:
            ask(model, extractor, question)
            expected.append([*extractor.hook_a, *extractor.hook_g])
    together = threading.Barrier(len(questions))
    with METHODS[method](model) as extractor:

        def ask_and_look(question: Question) -> list[Tensor | None]:
            with SITUATIONS[question.situation]():
                model(question.image)
                together.wait(TIMEOUT)
                extractor(question.class_idx)
                together.wait(TIMEOUT)
                return [*extractor.hook_a, *extractor.hook_g]

        found = run_threads([partial(ask_and_look, question) for question in questions])
    for tensors, right in zip(found, expected, strict=True):
        torch.testing.assert_close(tensors, right, rtol=1e-5, atol=1e-5)


@every_method
def test_scores_identify_their_pass(method: str) -> None:
    """The outputs of live threads, handed to another thread that has a pass of its own."""
    model = make_model(method)
    questions = make_questions(4)
    expected = expect(model, method, questions)
    together = threading.Barrier(4)
    outputs: queue.Queue[tuple[int, Tensor]] = queue.Queue()
    with METHODS[method](model) as extractor:

        def run(number: int) -> None:
            with SITUATIONS[questions[number].situation]():
                outputs.put((number, model(questions[number].image)))
            together.wait(TIMEOUT)  # all passes are over
            together.wait(TIMEOUT)  # all maps are there

        def ask_for_all() -> None:
            model(questions[0].image)
            together.wait(TIMEOUT)
            try:
                for number, output in [outputs.get(timeout=TIMEOUT) for _ in range(3)]:
                    with SITUATIONS[questions[number].situation]():
                        check_map(extractor(questions[number].class_idx, output), expected[number])
                check_map(extractor(questions[0].class_idx), expected[0])
            finally:
                together.wait(TIMEOUT)

        run_threads([ask_for_all, *(partial(run, number) for number in range(1, 4))])


@every_situation
@every_method
def test_scores_of_an_earlier_pass(method: str, situation: str) -> None:
    model = make_model(method)
    questions = [make_question(number, situation) for number in range(2)]
    expected = expect(model, method, questions)
    with METHODS[method](model) as extractor, SITUATIONS[situation]():
        outputs = [model(question.image) for question in questions]
        check_right_or_refused(partial(extractor, questions[0].class_idx, outputs[0]), expected[0], "")
        check_map(extractor(questions[1].class_idx, outputs[1]), expected[1])


@every_method
def test_stream_in_threads(method: str) -> None:
    model = make_model(method)
    questions = questions_of_threads(["grad"], 4)
    class_idx = [own[0].class_idx for own in questions]
    passes = [make_question(100 + thread) for thread in range(4)]
    expected = expect(model, method, passes)
    with METHODS[method](model) as extractor:

        def streamed(thread: int) -> list[list[Tensor]]:
            return list(extractor.stream([question.image for question in questions[thread]], class_idx[thread]))

        right = [streamed(thread) for thread in range(4)]
        state = State(model)

        def stream_after_a_pass(thread: int) -> list[list[Tensor]]:
            model(passes[thread].image)
            maps = streamed(thread)
            check_map(extractor(passes[thread].class_idx), expected[thread])
            return maps

        found = run_threads([partial(stream_after_a_pass, thread) for thread in range(4)])
        state.check()
    for thread in range(4):
        assert all(same_maps(a, b) for a, b in zip(found[thread], right[thread], strict=True))


@own_or_shared
@pytest.mark.parametrize("method", ["GradCAM", "AblationCAM"])
def test_the_default_layer_in_threads(method: str, shared: bool) -> None:
    model = make_model(method)
    make = getattr(methods, method)
    questions = [make_question(number) for number in range(THREADS)]
    with make(model) as extractor:
        ask(model, extractor, questions[0])
        names = extractor.target_names
        right = [ask(model, extractor, question) for question in questions]
    with ExitStack() as stack:
        made = [stack.enter_context(make(model)) for _ in range(1 if shared else THREADS)]
        calls = [partial(ask, model, made[number % len(made)], question) for number, question in enumerate(questions)]
        answers = run_threads(calls)
        assert all(extractor.target_names == names for extractor in made)
    assert all(same_maps(answer.maps, expected.maps) for answer, expected in zip(answers, right, strict=True))


@every_situation
def test_two_extractors_one_of_them_switched_off_elsewhere(situation: str) -> None:
    model = make_model("GradCAM")
    questions = questions_of_threads([situation], 4)
    expected = {name: expect(model, name, flat(questions)) for name in ["GradCAM", "ScoreCAM"]}
    callers = plain_callers(model)
    state = State(model)
    with METHODS["GradCAM"](model) as steady, METHODS["ScoreCAM"](model) as switched:

        def switch(done: threading.Event) -> None:
            while not done.is_set():
                switched.disable_hooks()
                switched.enable_hooks()

        results = run_threads([partial(ask_all, model, steady, own) for own in questions], [*callers, switch])
        state.check()
        check(flat(results[:4]), expected["GradCAM"])
        check_plain(results[4:6])

        (question, *_), answer, scored = questions[0], expected["GradCAM"][0], expected["ScoreCAM"][0]
        recorded, disabled = threading.Event(), threading.Event()

        def ask_both() -> None:
            with SITUATIONS[situation]():
                output = model(question.image)
                recorded.set()
                assert disabled.wait(TIMEOUT)
                check([Answer(output, steady(question.class_idx))], [answer])
                check_map(switched(question.class_idx), scored)

        def disable() -> None:
            assert recorded.wait(TIMEOUT)
            switched.disable_hooks()
            disabled.set()

        run_threads([ask_both, disable])


@pytest.mark.parametrize("method", [method for method in METHODS if method != "LeGrad"])
def test_an_extractor_switched_off_in_the_middle_of_a_pass(method: str) -> None:
    model = make_model(method)
    questions = [make_question(1, situation) for situation in SITUATIONS]
    right = [(expect(model, "GradCAM", [question])[0], expect(model, method, [question])[0]) for question in questions]

    def ask_both(steady: Any, switched: Any, number: int, stop: Stop) -> None:
        question, (answer, expected) = questions[number], right[number]
        with SITUATIONS[question.situation]():
            with stop:
                output = model(question.image)
            try:
                maps = switched(question.class_idx, **KEEP.get(method, {}))
            except (RuntimeError, AssertionError):  # half a pass is none
                maps = expected.maps
            check_map(maps, expected)
            check([Answer(output, steady(question.class_idx))], [answer])

    for place, number in product(range(3), range(3)):
        stop = Stop(place)
        with METHODS["GradCAM"](model) as steady, METHODS[method](model) as switched:
            run_within(stop, switched.disable_hooks, partial(ask_both, steady, switched, number, stop))


@pytest.mark.parametrize("method", ["GradCAM", "ScoreCAM", "AblationCAM", "LeGrad"])
def test_extractors_come_and_go_while_others_call(method: str) -> None:
    model = make_model(method)
    situations = list(SITUATIONS)
    questions = questions_of_threads(situations, 4)
    expected = expect(model, method, flat(questions))
    callers = plain_callers(model)
    state = State(model)

    def come_and_go(done: threading.Event) -> None:
        while not done.is_set():
            with METHODS[method](model):
                pass
            METHODS[method](model).remove_hooks()
            METHODS[method](model)  # removed by being dropped

    with METHODS[method](model) as extractor:
        results = run_threads(
            [partial(ask_all, model, extractor, own) for own in questions], [*callers, come_and_go, come_and_go]
        )
        state.check()
    check(flat(results[:4]), expected)
    check_plain(results[4:6])


class Meanwhile:
    """Runs a callable on another thread at each line of the package that this thread reaches, once for each line."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.lines: set[tuple[str, int]] = set()
        self.errors: list[Exception] = []
        self.pool = ThreadPoolExecutor(1)
        self.running: Future[Any] | None = None

    def __enter__(self) -> Meanwhile:
        self.pool.submit(bool).result(TIMEOUT)  # the thread lives from now on
        self.tracing = at_each_line(self.visit)
        self.tracing.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.tracing.__exit__(*raised)
        self.pool.shutdown()

    def visit(self, line: tuple[str, int]) -> None:
        if line not in self.lines and self.has_ended():
            self.lines.add(line)
            self.running = self.pool.submit(self.run)
            self.has_ended()

    def has_ended(self) -> bool:
        """Wait for the callable, but not for long: it may wait for a lock of this thread."""
        with contextlib.suppress(TimeoutError):
            if self.running is not None:
                self.running.result(0.05)
        return self.running is None or self.running.done()

    def run(self) -> None:
        try:
            self.call()
        except Exception as error:  # noqa: BLE001 - raised again below
            self.errors.append(error)

    def check(self) -> None:
        assert len(self.lines) > 100
        if self.errors:
            raise ExceptionGroup(f"at {len(self.errors)} of {len(self.lines)} lines", self.errors)


@pytest.mark.parametrize("method", ["GradCAM", "AblationCAM", "LeGrad"])
def test_others_call_at_each_line_of_an_extractor(method: str) -> None:
    model = make_model(method)
    question = make_question(1, "no_grad")
    expected = expect(model, method, [question])
    others = [make_question(1000 + number, situation) for number, situation in enumerate(SITUATIONS)]
    outputs = plain_outputs(model, others)

    def call() -> None:
        assert all(map(same_output, plain_outputs(model, others), outputs))

    with Meanwhile(call) as meanwhile, METHODS[method](model) as extractor:
        answer = ask(model, extractor, question)
    meanwhile.check()
    check([answer], expected)


def test_another_extractor_at_each_line_of_an_extractor() -> None:
    model = make_model("GradCAM")
    questions = [make_question(1, "no_grad"), make_question(2, "grad")]
    first, second = expect(model, "GradCAM", questions)

    def call() -> None:
        with METHODS["GradCAM"](model) as other:
            check([ask(model, other, questions[1])], [second])

    with Meanwhile(call) as meanwhile, METHODS["GradCAM"](model) as extractor:
        answer = ask(model, extractor, questions[0])
    meanwhile.check()
    check([answer], [first])


def test_an_extractor_arrives_while_a_replica_is_made() -> None:
    """Of a module that has no wrapper yet; an attribute of it stands in for the other thread."""
    model, arrived = make_model("LeGrad"), []

    class Arrival(np.ndarray):
        def copy(self, *_: Any) -> Any:
            if not arrived:
                arrived.append(METHODS["LeGrad"](model))
            return self

    attention = model.get_submodule("encoder.layers.encoder_layer_0.self_attention")
    layer, question = "encoder.layers.encoder_layer_1", make_question(1)
    with methods.ScoreCAM(model, layer) as extractor:
        expected = ask(model, extractor, question)
    attention.note = np.zeros(1).view(Arrival)
    assert "_compiled_call_impl" not in vars(attention)
    with methods.ScoreCAM(model, layer) as extractor:
        answer = ask(model, extractor, question)
    check([answer], [expected])
    arrived[0].remove_hooks()


# asyncio --------------------------------------------------------------------------------------------------------------


def run_async(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, TIMEOUT))


@own_or_shared
@every_method
def test_tasks_with_an_await_between_pass_and_call(method: str, shared: bool) -> None:
    model = make_model(method)
    questions = questions_of_threads(list(SITUATIONS), 4)
    expected = expect(model, method, flat(questions))

    async def task(extractor: Any, questions: Sequence[Question], barrier: asyncio.Barrier) -> list[Answer]:
        answers = []
        for image, class_idx, situation in questions:
            with SITUATIONS[situation]():
                output = model(image)
            await barrier.wait()  # all tasks have run their passes, in an order of the loop's
            await asyncio.sleep(0)
            with SITUATIONS[situation]():
                answers.append(Answer(output, extractor(class_idx)))
        return answers

    async def main() -> list[list[Answer]]:
        barrier = asyncio.Barrier(len(questions))
        with ExitStack() as stack:
            made = [stack.enter_context(METHODS[method](model)) for _ in range(1 if shared else len(questions))]
            pairs = zip(cycle(made), questions, strict=False)
            return await asyncio.gather(*(task(extractor, own, barrier) for extractor, own in pairs))

    check(flat(run_async(main())), expected)


@every_method
def test_a_child_task_explains_the_pass_of_its_parent(method: str) -> None:
    model = make_model(method)
    questions = [make_question(number) for number in range(3)]
    expected = expect(model, method, questions)

    async def explain_later(extractor: Any, class_idx: int) -> list[Tensor]:
        await asyncio.sleep(0)
        maps: list[Tensor] = extractor(class_idx)
        return maps

    async def parent(extractor: Any, question: Question) -> list[Tensor]:
        model(question.image)
        await asyncio.sleep(0)
        return await asyncio.create_task(explain_later(extractor, question.class_idx))

    async def main() -> list[list[Tensor]]:
        with METHODS[method](model) as extractor:
            return await asyncio.gather(*(parent(extractor, question) for question in questions))

    for maps, right in zip(run_async(main()), expected, strict=True):
        check_map(maps, right)


@every_method
def test_a_pass_of_a_child_task(method: str) -> None:
    """A parent that asks for the map of its child's pass gets that, or is asked for ``scores``: never an older one."""
    model = make_model(method)
    old, new = questions = [make_question(number) for number in range(2)]
    _, expected = expect(model, method, questions)

    async def run(image: Tensor) -> Tensor:
        await asyncio.sleep(0)
        output: Tensor = model(image)
        return output

    async def main(older_pass: bool, give_scores: bool) -> None:
        with METHODS[method](model) as extractor:
            if older_pass:
                model(old.image)
            output = await asyncio.create_task(run(new.image))
            if give_scores:
                check_map(extractor(new.class_idx, output), expected)
            elif older_pass:
                with pytest.raises(RuntimeError, match="scores"):
                    extractor(new.class_idx)
            else:
                check_right_or_refused(partial(extractor, new.class_idx), expected)

    for older_pass in (False, True):
        run_async(main(older_pass, give_scores=True))
        run_async(main(older_pass, give_scores=False))


@every_method
def test_to_thread_with_scores(method: str) -> None:
    model = make_model(method)
    questions = [make_question(number) for number in range(4)]
    expected = expect(model, method, questions)

    async def alone() -> None:
        with METHODS[method](model) as extractor:
            for (image, class_idx, _), right in zip(questions, expected, strict=True):
                output = await asyncio.to_thread(model, image)
                assert same_output(output, right.output)
                check_map(extractor(class_idx, output), right)

    async def task(extractor: Any, question: Question, right: Answer, barrier: asyncio.Barrier) -> None:
        output = await asyncio.to_thread(model, question.image)
        await barrier.wait()
        check_map(extractor(question.class_idx, output), right)

    async def together() -> None:
        barrier = asyncio.Barrier(len(questions))
        with METHODS[method](model) as extractor:
            pairs = zip(questions, expected, strict=True)
            await asyncio.gather(*(task(extractor, question, right, barrier) for question, right in pairs))

    run_async(alone())
    run_async(together())


@every_method
def test_to_thread_without_scores(method: str) -> None:
    """Never the map of an older pass of the task's own."""
    model = make_model(method)
    old, new = questions = [make_question(number) for number in range(2)]
    before, expected = expect(model, method, questions)

    async def first() -> None:
        with METHODS[method](model) as extractor:
            await asyncio.to_thread(model, new.image)
            check_right_or_refused(partial(extractor, new.class_idx), expected)

    async def second() -> None:
        with METHODS[method](model) as extractor:
            for _ in range(5):
                model(old.image)
                await asyncio.to_thread(model, new.image)
                with pytest.raises(RuntimeError, match="scores"):
                    extractor(new.class_idx)
                model(old.image)  # the task's own pass is the newest again
                check_map(extractor(old.class_idx), before)

    run_async(first())
    run_async(second())


@every_method
def test_run_in_executor_without_scores(method: str) -> None:
    """As before, in a worker thread that knows nothing of the task's context."""
    model = make_model(method)
    old, new = questions = [make_question(number) for number in range(2)]
    _, expected = expect(model, method, questions)

    async def main(older_pass: bool) -> None:
        with METHODS[method](model) as extractor:
            if older_pass:
                model(old.image)
            output = await asyncio.get_running_loop().run_in_executor(None, model, new.image)
            check_right_or_refused(partial(extractor, new.class_idx, **KEEP.get(method, {})), expected)
            check_map(extractor(new.class_idx, output), expected)

    run_async(main(older_pass=False))
    run_async(main(older_pass=True))


@every_method
def test_the_call_in_another_thread(method: str) -> None:
    """``asyncio.to_thread`` copies the context of the task, and so its pass."""
    model = make_model(method)
    questions = [make_question(number) for number in range(4)]
    expected = expect(model, method, questions)

    async def task(extractor: Any, question: Question, barrier: asyncio.Barrier) -> list[Tensor]:
        model(question.image)
        await barrier.wait()
        return await asyncio.to_thread(extractor, question.class_idx)

    async def main() -> list[list[Tensor]]:
        barrier = asyncio.Barrier(len(questions))
        with METHODS[method](model) as extractor:
            return await asyncio.gather(*(task(extractor, question, barrier) for question in questions))

    for maps, right in zip(run_async(main()), expected, strict=True):
        check_map(maps, right)


@every_method
def test_workers_of_an_executor(method: str) -> None:
    """Pass and call in one function, in threads that serve one job after the other."""
    model = make_model(method)
    questions = make_questions(12)
    expected = expect(model, method, questions)

    async def main(extractor: Any, pool: ThreadPoolExecutor) -> list[Answer]:
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(pool, ask, model, extractor, question) for question in questions]
        return await asyncio.gather(*jobs)

    with METHODS[method](model) as extractor, ThreadPoolExecutor(4) as pool:
        check(list(pool.map(partial(ask, model, extractor), questions)), expected)
        check(run_async(main(extractor, pool)), expected)


@every_method
def test_two_jobs_on_one_thread(method: str) -> None:
    """Threads of an executor keep their context from job to job."""
    model = make_model(method)
    questions = [make_question(number) for number in range(2)]
    expected = expect(model, method, questions)
    with METHODS[method](model) as extractor, ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for pool, question in zip([one, other], questions, strict=True):
            pool.submit(model, question.image).result(TIMEOUT)
        for pool, question, right in zip([one, other], questions, expected, strict=True):
            check_map(pool.submit(extractor, question.class_idx).result(TIMEOUT), right)


def test_explain_in_to_thread() -> None:
    model = make_model("GradCAM")
    questions = [make_question(number, batch_size=1) for number in range(THREADS)]

    def explain_one(question: Question) -> Any:
        return explain(model, question.image, method="ScoreCAM", target_layer="middle", class_idx=question.class_idx)

    expected = [explain_one(question) for question in questions]

    async def main() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(explain_one, question) for question in questions))

    for found, right, question in zip(run_async(main()), expected, questions, strict=True):
        assert same_maps(found.cams[question.class_idx], right.cams[question.class_idx])


# Notebooks: cells with an `await` run in a context of their own -------------------------------------------------------


class Notebook:
    """Runs the cells of a notebook: each in the kernel's context, in a copy of it, or in a task with such a copy."""

    def __init__(self) -> None:
        self.kernel = contextvars.copy_context()
        self.loop = asyncio.Runner()

    def __enter__(self) -> Notebook:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.close()

    def cell(self, kind: str, function: Callable[..., Any], *args: Any) -> Any:
        if kind == "kernel":
            return self.kernel.run(function, *args)
        if kind == "copy":
            return self.kernel.copy().run(function, *args)
        if kind == "empty":
            return contextvars.Context().run(function, *args)

        async def awaiting() -> Any:
            await asyncio.sleep(0)
            result = function(*args)
            await asyncio.sleep(0)
            return result

        return self.loop.run(awaiting(), context=self.kernel.copy())


own_contexts = pytest.mark.parametrize("kind", ["copy", "empty", "await"])


@own_contexts
@every_method
def test_the_pass_in_one_cell_and_the_call_in_the_next(method: str, kind: str) -> None:
    model = make_model(method)
    question = make_question(1)
    (expected,) = expect(model, method, [question])
    with METHODS[method](model) as extractor, Notebook() as notebook:
        for next_kind in ["kernel", kind]:
            notebook.cell(kind, model, question.image)
            call = partial(notebook.cell, next_kind, extractor, question.class_idx)
            check_right_or_refused(call, expected)
            output = notebook.cell(kind, model, question.image)
            check_map(notebook.cell(next_kind, extractor, question.class_idx, output), expected)


@pytest.mark.parametrize("kind", ["copy", "await"])
@every_method
def test_a_cell_in_the_context_of_an_older_pass(method: str, kind: str) -> None:
    model = make_model(method)
    old, new = questions = [make_question(number) for number in range(2)]
    before, expected = expect(model, method, questions)
    with METHODS[method](model) as extractor, Notebook() as notebook:
        notebook.cell("kernel", model, old.image)
        check_map(notebook.cell(kind, extractor, old.class_idx), before)
        for next_kind in ["kernel", kind]:
            output = notebook.cell(kind, model, new.image)
            with pytest.raises(RuntimeError, match="scores"):
                notebook.cell(next_kind, extractor, new.class_idx)
            check_map(notebook.cell(next_kind, extractor, new.class_idx, output), expected)
        notebook.cell("kernel", model, old.image)  # the kernel's own pass is the newest again
        check_map(notebook.cell("kernel", extractor, old.class_idx), before)


@every_method
def test_contexts_that_take_turns(method: str) -> None:
    """Contexts that are still there have their own pass, in whichever order they go on."""
    model = make_model(method)
    questions = [make_question(number) for number in range(4)]
    expected = expect(model, method, questions)
    for make in [contextvars.copy_context, contextvars.Context]:
        contexts = [make() for _ in questions]
        with METHODS[method](model) as extractor:
            for context, question in zip(contexts, questions, strict=True):
                context.run(model, question.image)
            for number in (2, 0, 3, 1):
                check_map(contexts[number].run(extractor, questions[number].class_idx), expected[number])


# Memory ---------------------------------------------------------------------------------------------------------------


class Passes:
    """Runs passes, and counts those of which anything is still in memory."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        self.model = model
        self.seen: list[list[StorageWeakRef]] = []
        self.local = threading.local()
        # Ahead of the extractor's hooks: the layer's own output
        model.get_submodule(layer).register_forward_hook(lambda _module, _args, output: self._see(output))

    def _see(self, output: Tensor) -> None:
        if hasattr(self.local, "storages"):
            self.local.storages.append(StorageWeakRef(output.untyped_storage()))

    def run(self, seed: int, extractor: Any = None) -> None:
        """Run a pass, keeping nothing of it."""
        self.local.storages = []
        image = make_question(seed).image
        output = self.model(image)
        shown = [] if extractor is None else [tensor for tensor in extractor.hook_a if tensor is not None]
        self.local.storages += [StorageWeakRef(tensor.untyped_storage()) for tensor in [image, output, *shown]]
        self.seen.append(self.local.storages)

    def alive(self) -> int:
        return sum(not all(storage.expired() for storage in storages) for storages in self.seen)

    def settles_at(self, most: int) -> bool:
        """Wait for threads that are about to let go of their last pass."""
        end = time.monotonic() + 5
        while self.alive() > most and time.monotonic() < end:
            time.sleep(0.01)
            gc.collect()
        return self.alive() <= most


def case_of_memory(method: str) -> tuple[nn.Module, Passes]:
    model = make_model(method)
    return model, Passes(model, "encoder.layers.encoder_layer_1" if method == "LeGrad" else "middle")


@every_method
def test_threads_that_ended_leave_one_pass_at_most(method: str) -> None:
    model, passes = case_of_memory(method)
    with METHODS[method](model) as extractor:
        run_threads([partial(passes.run, number, extractor) for number in range(THREADS)])
        assert len(passes.seen) == THREADS
        assert passes.settles_at(1)
        passes.run(100, extractor)
        assert passes.settles_at(1)
        assert passes.alive() == 1  # the pass that can be asked about
        assert not all(storage.expired() for storage in passes.seen[-1])
        extractor(0)
        run_threads([partial(passes.run, 200 + number) for number in range(THREADS)])
        assert passes.settles_at(2)  # this thread's own as well
    assert passes.settles_at(0)


@every_method
def test_tasks_that_ended_leave_one_pass_at_most(method: str) -> None:
    model, passes = case_of_memory(method)
    with METHODS[method](model) as extractor:

        async def task(number: int) -> None:
            passes.run(number, extractor)
            await asyncio.sleep(0)
            extractor(0)

        async def main() -> None:
            await asyncio.gather(*(task(number) for number in range(4)))
            for number in range(4, 8):
                await asyncio.to_thread(passes.run, number, extractor)

        run_async(main())
        assert len(passes.seen) == 8
        assert passes.settles_at(1)
    assert passes.settles_at(0)


@pytest.mark.parametrize("end", ["block", "dropped"])
@every_method
def test_nothing_is_kept_for_threads_that_live_on(method: str, end: str) -> None:
    model, passes = case_of_memory(method)
    extractor = METHODS[method](model)
    together = threading.Barrier(4)

    def run(number: int) -> None:
        passes.run(number)
        together.wait(TIMEOUT)  # a thread of its own for each

    with ThreadPoolExecutor(4) as pool:
        for first in (0, 4, 8):
            list(pool.map(run, range(first, first + 4)))
        assert passes.settles_at(4)  # the last of each thread
        assert passes.alive() >= 1
        if end == "block":
            with extractor:
                pass
        else:
            del extractor
        assert passes.settles_at(0)


def test_a_diagnosis_hides_no_warning_of_another_thread() -> None:
    """Its own warnings are among its findings; warnings of other threads are shown meanwhile."""
    repeats, warned = threading.Event(), threading.Event()
    slow = threading.local()

    class Mean(nn.Module):
        def forward(self, grid: Tensor) -> Tensor:
            if getattr(slow, "diagnoses", False) and not warned.is_set():
                repeats.set()
                assert warned.wait(TIMEOUT)
            return grid.flatten(2).mean(2)

    broken = torch.rand(1, 3, 8, 8)
    broken[0, 0, 0, 0] = torch.nan
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Mean()).eval()

    def diagnose_slowly() -> list[str]:
        with methods.GradCAM(model, "0") as extractor:
            model(broken.expand(2, -1, -1, -1))
            slow.diagnoses = True
            return [finding.code for finding in extractor.diagnose(0)]

    def warn_meanwhile() -> None:
        assert repeats.wait(TIMEOUT)
        with methods.GradCAM(model, "0") as extractor:
            extractor(0, model(broken))
        warned.set()

    with pytest.warns(RuntimeWarning) as shown:
        codes, _ = run_threads([diagnose_slowly, warn_meanwhile])
    assert codes == ["input_not_finite"]
    assert ["maps of 1 of 1 samples are NaN" in str(one.message) for one in shown] == [True]


@pytest.mark.parametrize("passes", range(8))
def test_a_diagnosis_does_not_wait_for_another_one(passes: int) -> None:
    class Later(Stop):
        """Halts after some passes."""

        left = passes

        def wait_at(self, place: int) -> None:
            self.left -= place == 0
            if self.left < 0:
                super().wait_at(0)

    def diagnose(stop: AbstractContextManager[Any]) -> list[str]:
        with methods.GradCAM(make_model("GradCAM"), "middle", reshape_transform=torch.clone) as extractor:
            extractor.model(make_question(1).image)
            with stop:
                return [finding.code for finding in extractor.diagnose(0)]

    stop = Later()
    quick, slow = run_within(stop, partial(diagnose, nullcontext()), partial(diagnose, stop))
    assert stop.reached.is_set()
    assert stop.left < 0
    assert quick == slow
