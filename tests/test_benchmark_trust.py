"""The benchmark of verdicts: what is broken, what counts as right, and its numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchcam.demo import load_model
from torchcam.trust import trust

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))  # the scripts import each other as a script does
import _quality_models as models  # noqa: E402
import _quality_scenes as scenes  # noqa: E402
import _trust_models as others  # noqa: E402
import benchmark_trust as bench  # noqa: E402

sys.path.remove(str(SCRIPTS))


def entry(precision: float, correlation: float = 0.9, odds: float = 3.0, **more: Any) -> dict[str, Any]:
    """What is kept of one map."""
    values = {"correlation": correlation, "largest_fall": 0.5, "asked": 0.5, "rival": 0.5, "odds": odds}
    outcomes = dict.fromkeys(("diagnosis", "evidence", "removal", "region"), "passed")
    fixed = {"model": "cnn", "kind": "method", "map": "GradCAM", "picture": 0}
    return {**fixed, "precision": precision, "outcomes": outcomes, "values": values, **more}


def test_what_is_right() -> None:
    assert [bench.truth_of(entry(precision)) for precision in (0.95, 0.8, 0.6)] == [True, None, False]
    assert [bench.truth_of(entry(precision, kind="broken")) for precision in (0.95, 0.8, 0.6)] == [None, None, False]


def test_verdicts_by_the_limits_of_today() -> None:
    assert bench.verdict_without(entry(1.0)) == "believe"
    assert bench.verdict_without(entry(1.0, correlation=0.1)) == "do not believe"
    assert bench.verdict_without(entry(1.0, correlation=0.1), "removal") == "believe"
    assert bench.verdict_without(entry(1.0, correlation=0.1, odds=-2.0), "removal") == "do not believe"
    decided = entry(1.0, outcomes={"diagnosis": "passed", "evidence": "failed"}, values={})
    assert bench.verdict_without(decided) == "do not believe"
    assert bench.verdict_without(decided, "evidence") == "believe"


def test_auroc() -> None:
    scores, right = np.array([0, 1, 2, 2, 1]), np.array([False, False, True, False, True])
    assert bench.auroc(scores, right) == pytest.approx((2 + 0.5 + 1 + 0.5) / 6)


def test_tables() -> None:
    entries = [
        *(entry(0.95, picture=number) for number in range(8)),
        *(entry(0.5, correlation=0.1, picture=number, kind="broken", map="shuffled") for number in range(8)),
        entry(0.5, picture=8),
        *(entry(0.95, correlation=0.5, picture=number) for number in range(9, 13)),
    ]
    parts = bench.blocks(entries)
    assert "| believe | 8 | 1 | 88.9% (" in parts["verdicts"]
    assert "| wrong maps believed | 1 of 9 | 0 of 200 |" in parts["goals"]
    assert "| cnn | 8 of 12 | 8 of 9 | 1 |" in parts["models"]
    assert "| *shuffled* | 0 | 8 | 0 | 0 | 8 | 0 |" in parts["maps"]
    assert "| removal | 0.500 | 100.0% | 0.0% | 9 |" in parts["checks"]
    page = bench.PAGE.read_text(encoding="utf-8")
    assert bench.put(page, parts) != page


def test_choice_of_limits() -> None:
    right = [entry(0.95, correlation=value, odds=3.0) for value in np.linspace(0.57, 0.9, 100)]
    wrong = [entry(0.5, correlation=value, odds=3.0) for value in (0.1, 0.2, 0.52)]
    decided = entry(0.5, outcomes={"diagnosis": "failed", "evidence": "passed"}, values={})
    told = bench.choose([*right, *wrong, decided]).splitlines()
    assert told[0].startswith("100 right maps, 4 wrong ones")
    assert told[-1] == "for belief (0.55, -2.0), against it (0.35, -2.0)"
    assert "0.55, -1.0: 100.0% and 0.0% (0), 0.0% and 100.0% (4)" in told
    assert "0.35, -1.0: 100.0% and 25.0% (1), 0.0% and 75.0% (3)" in told


def test_broken_maps_are_broken_and_judged() -> None:
    model = load_model()
    pool = scenes.two_digits(8, 5)
    task = pool.found_by(models.predict(model, pool.images), 2)
    good = bench.maps_of("cnn", model, "GradCAM", task.images, task.classes)
    found = bench.broken("cnn", model, task, 0)
    torch.testing.assert_close(found["inverted"], 1 - good)
    torch.testing.assert_close(found["transposed layout"].mT, good)
    torch.testing.assert_close(found["shuffled"].flatten(1).sort(1).values, good.flatten(1).sort(1).values)
    torch.testing.assert_close(found["of the next best class"], good[[1, 0, 3, 2]], msg="of the other digit")
    torch.testing.assert_close(found["of another picture"], good[[2, 3, 0, 1]])
    assert all(cam.shape == good.shape and not torch.equal(cam, good) for cam in found.values())
    judged = trust(model, task.images, task.classes, methods=[bench.given(found["inverted"])], target_layer="layer4")
    for item, cam in zip(judged, found["inverted"], strict=True):
        torch.testing.assert_close(item.cam, cam)
        assert item.verdict == "do not believe"


@pytest.mark.parametrize("name", others.OTHERS)
def test_the_other_models_find_digits(name: str) -> None:
    model = others.load_other(name)
    pool = scenes.two_digits(16, 77)
    assert len(pool.found_by(models.predict(model, pool.images), 16)) >= 24
    assert model.get_submodule(others.LAYERS[name]) is not None
