"""Method names: every spelling, one resolver, errors with the closest names."""

import pytest

from torchcam import methods
from torchcam._methods import by_method, find_method, method_names
from torchcam._names import closest, match_name
from torchcam.methods import GradCAM, GradCAMpp, LayerCAM, SmoothGradCAMpp


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (GradCAM, GradCAM),
        ("GradCAM", GradCAM),
        ("gradcam", GradCAM),
        ("grad-cam", GradCAM),
        ("grad_cam", GradCAM),
        ("Grad CAM", GradCAM),
        ("Grad-CAM++", GradCAMpp),
        ("gradcampp", GradCAMpp),
        ("grad_cam_plusplus", GradCAMpp),
        ("GradCAMPlusPlus", GradCAMpp),
        ("Smooth Grad-CAM++", SmoothGradCAMpp),
        ("layer-cam", LayerCAM),
    ],
)
def test_spellings(name: type | str, method: type) -> None:
    assert find_method(name) is method


def test_every_method_is_found_by_its_name_and_no_two_names_are_alike() -> None:
    names = method_names()
    assert {"CAM", "LeGrad", "AttentionRollout", "FullGrad", "RefineCAM"} <= set(names)
    assert not {"OutputTarget", "DeepFeatureFactorization"} & set(names)
    for name in names:
        assert find_method(name.upper()) is getattr(methods, name)


def test_unknown_names_get_the_closest() -> None:
    with pytest.raises(ValueError, match=r"^`method` 'GardCAM' is not a method of torchcam; did you mean 'GradCAM'"):
        find_method("GardCAM")
    with pytest.raises(ValueError, match=r"^--method 'OutputTarget' is not a method of torchcam; "):
        find_method("OutputTarget", "--method")
    with pytest.raises(ValueError, match=r"^`methods` '' is not a method of torchcam; there are CAM, .*XGradCAM$"):
        find_method("", "methods")


@pytest.mark.parametrize("wrong", [3, None, int, GradCAM.fuse_cams])
def test_what_is_no_method(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"^`methods` must be a CAM class such as GradCAM, or its name, got "):
        find_method(wrong, "methods")  # type: ignore[arg-type]  # that is what is tested


def test_arguments_by_method() -> None:
    labels = ["GradCAM", "GradCAMpp", "mine"]
    given = {"grad-cam": {"a": 1}, GradCAMpp: {"b": 2}, "Mine": {"c": 3}}
    assert by_method("method_kwargs", given, labels) == {"GradCAM": {"a": 1}, "GradCAMpp": {"b": 2}, "mine": {"c": 3}}
    with pytest.raises(ValueError, match=r"from 'GradCAM', 'GradCAMpp', 'mine', got 'Layer'; "):
        by_method("target_layer", {"Layer": "x"}, labels)
    with pytest.raises(TypeError, match="`method_kwargs` of mine must be a mapping, got int"):
        by_method("method_kwargs", {"mine": 3}, labels)


def test_an_exact_name_comes_before_one_that_is_spelled_alike() -> None:
    assert match_name("a b", ["A-B", "a b"]) == "a b"
    assert match_name("ab", ["A-B", "a b"]) == "A-B"
    assert match_name("abc", ["ab"]) is None
    assert closest("GRAD", ["GradCAM", "x"]) == "did you mean 'GradCAM'?"
    assert closest("ab1", ["ab2", "ab3"]) == "did you mean 'ab3' or 'ab2'?"
    assert closest("?", ["GradCAM", "x"], ["some"]) == "there are some"
    assert closest("?", ["GradCAM", "x"]) == "there are GradCAM, x"
