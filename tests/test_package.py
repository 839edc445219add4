"""The package as a whole: what it imports, what it exports, and who may import whom."""

import ast
import copy
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import torchcam

ROOT = Path(torchcam.__file__).parent
HEAVY = {"torch", "torchvision", "torchmetrics", "matplotlib", "numpy", "PIL"}

# A room imports only from the floors below it.
FLOORS = {
    "__init__": 0,
    "_architecture": 0,
    "_cached": 0,
    "_certainty": 3,
    "_monitor_checks": 2,
    "_checks": 0,
    "_chunks": 0,
    "_pictures": 1,
    "_planted": 2,
    "_replica": 0,
    "_tensors": 0,
    "_extras": 0,
    "_files": 0,
    "_names": 0,
    "_numbers": 1,
    "_tables": 0,
    "_templates": 0,
    "_callable": 0,
    "_detector_rows": 0,
    "_detections": 2,
    "_recipes": 7,
    "_trust_request": 9,
    "tasks": 9,
    "_passes": 1,
    "_timeline": 3,
    "layout": 1,
    "targets": 1,
    "utils": 2,
    "_views": 1,
    "_figures": 3,
    "_choice": 2,
    "_inputs": 2,
    "_page": 5,
    "_recommended": 5,
    "layers": 4,
    "methods": 5,
    "_displays": 6,
    "_method_maps": 6,
    "_explanation": 7,
    "_methods": 6,
    "demo": 6,
    "metrics": 6,
    "evaluation": 7,
    "monitor": 8,
    "trust": 8,
    "explain": 10,
    "export": 10,
    "integrations": 10,
    "app": 11,
    "cli": 12,
    "__main__": 13,
}
# The rooms that are run, not imported.
COMMANDS = {"cli"}

# The rooms that import torchmetrics, which takes longer than all the others together.
WITH_METRICS = {"evaluation", "metrics", "trust"}
# The ways to get hold of the modules and of the functions of the same name.
ORDERS = [
    "from torchcam.explain import explain; from torchcam.trust import trust; import torchcam",
    (
        "import torchcam; torchcam.explain; torchcam.trust; from torchcam.explain import explain; "
        "from torchcam.trust import trust"
    ),
    "import torchcam.explain as e, torchcam.trust as t, torchcam; explain, trust = e.explain, t.trust",
    "from torchcam import explain as e, trust as t; import torchcam; explain, trust = e.explain, t.trust",
]


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_each(lots: dict[str, dict[str, str]]) -> dict[str, str]:
    """Run pieces of code, each in a fork of one fresh interpreter, and return what each prints.

    Args:
        lots: by the library that the interpreter has imported by then, the pieces by name
    """
    program = (
        "import importlib, os, sys\n"
        "for library, codes in eval(sys.stdin.read()).items():\n"
        "    importlib.import_module(library)\n"
        "    for name, code in codes.items():\n"
        "        print(name, end=': ', flush=True)\n"
        "        if not os.fork():\n"
        "            exec(code, {})\n"
        "            sys.stdout.flush()\n"
        "            os._exit(0)\n"
        "        assert os.wait()[1] == 0, name\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=repr(lots), capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def rooms() -> set[str]:
    """The public modules and packages of the source tree."""
    files = {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    return {name for name in files | packages if not name.startswith("_")} - COMMANDS


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What is printed by code that loads each room, and the callable modules in each order."""
    if not hasattr(os, "fork"):
        pytest.skip("needs a system that forks processes")
    room = "import sys, torchcam; before = 'torchcam.{0}' in sys.modules; print(before, torchcam.{0}.__name__)"
    order = (
        "{0}; print(callable(torchcam.explain), torchcam.explain.explain is explain, explain.__module__, "
        "callable(torchcam.trust), torchcam.trust.trust is trust)"
    )
    light, heavy = rooms() - WITH_METRICS, rooms() & WITH_METRICS
    after = {**{name: room.format(name) for name in heavy}, **{name: order.format(name) for name in ORDERS}}
    return run_each({"torch": {name: room.format(name) for name in light}, "torchmetrics": after})


def module_name(path: Path) -> str:
    parts = ["torchcam", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports(tree: ast.AST, importer: str, *, is_package: bool) -> Iterator[str]:
    """Yield the full name of every module that a piece of code imports, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = importer.split(".")
                keep = len(parents) - node.level + is_package
                base = ".".join([*parents[:keep], *filter(None, [base])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in SOURCES else base


def imports_of(module: str) -> set[str]:
    path = SOURCES[module]
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package=path.stem == "__init__"))


def room_of(module: str) -> str:
    """The room that a module of the package is in: `torchcam.methods.core` is in `methods`."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or "__init__"


class TestImport:
    def test_alone_loads_nothing_heavy(self) -> None:
        loaded = run_python("import sys, torchcam; print(*{name.split('.')[0] for name in sys.modules})")
        assert not HEAVY & set(loaded.split())

    def test_pictures_load_neither_torch_nor_matplotlib(self) -> None:
        loaded = set(run_python("import sys, torchcam.utils; print(*sys.modules)").split())
        assert "PIL.Image" in loaded
        assert not {"torch", "torchvision", "matplotlib"} & loaded

    def test_version_without_torch_is_that_of_the_installed_package(self) -> None:
        printed = run_python("import sys, torchcam; print(torchcam.__version__, 'torch' in sys.modules)")
        assert printed == f"{version('torchcam')} False"

    def test_attributes_load_their_modules(self, printed: dict[str, str]) -> None:
        assert {name: printed[name] for name in rooms()} == {name: f"False torchcam.{name}" for name in rooms()}

    def test_unknown_attribute(self) -> None:
        with pytest.raises(AttributeError, match="module 'torchcam' has no attribute 'method'"):
            _ = torchcam.method

    def test_missing_module_behind_a_submodule_is_not_an_attribute_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(torchcam, "utils", raising=False)
        monkeypatch.setitem(sys.modules, "torchcam.utils", None)
        with pytest.raises(ModuleNotFoundError, match=r"torchcam\.utils"):
            _ = torchcam.utils


class TestNames:
    def test_dir_lists_the_documented_names(self) -> None:
        assert set(torchcam.__all__) <= set(dir(torchcam))

    def test_modules_methods_and_functions_are_exported_and_nothing_else(self) -> None:
        methods = set(torchcam.methods.__all__) - {"OutputTarget"}
        functions = {"evaluate", "explain_answer", "overlay_map", "overlay_mask"}
        assert len(torchcam.__all__) == len(set(torchcam.__all__))
        assert set(torchcam.__all__) == rooms() | methods | functions | {"__version__"}

    def test_each_is_the_object_of_its_module(self) -> None:
        for name in set(torchcam.methods.__all__) - {"OutputTarget"}:
            assert getattr(torchcam, name) is getattr(torchcam.methods, name)
            assert pickle.loads(pickle.dumps(getattr(torchcam, name))) is getattr(torchcam, name)
        assert torchcam.evaluate is torchcam.evaluation.evaluate
        assert torchcam.overlay_mask is torchcam.utils.overlay_mask
        assert torchcam.overlay_map is torchcam.utils.overlay_map

    def test_all_of_them_at_once(self) -> None:
        names: dict[str, object] = {}
        exec("from torchcam import *", names)
        assert set(torchcam.__all__) <= set(names)


class TestCallableModules:
    @pytest.mark.parametrize("name", ["explain", "trust"])
    def test_a_module_with_the_signature_of_its_function(self, name: str) -> None:
        module = getattr(torchcam, name)
        function = getattr(module, name)
        assert isinstance(module, ModuleType)
        assert sys.modules[f"torchcam.{name}"] is module is importlib.import_module(f"torchcam.{name}")
        assert callable(module)
        assert inspect.isfunction(function)
        assert inspect.signature(module) == inspect.signature(function)
        assert pickle.loads(pickle.dumps(module)) is module
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(module) is module

    def test_the_call_is_that_of_the_function(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        x = torch.rand(1, 3, 8, 8)
        found = torchcam.explain(model, x, class_idx=2, target_layer="1", method="grad-cam")
        expected = torchcam.explain.explain(model, x, class_idx=2, target_layer="1")
        assert torch.equal(found.cams[2][0], expected.cams[2][0])
        with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got int"):
            torchcam.explain(3, x)
        with pytest.raises(TypeError, match=r"explain.*topk"):
            torchcam.explain(model, x, topk=2)

    def test_any_order_of_imports(self, printed: dict[str, str]) -> None:
        assert [printed[order] for order in ORDERS] == ["True True torchcam.explain True True"] * len(ORDERS)


class TestTorchCAMNames:
    """Every public name of TorchCAM 0.5.0, by its path."""

    @pytest.mark.parametrize(
        ("module", "names"),
        [
            ("torchcam", "__version__ explain methods metrics utils"),
            ("torchcam.explain", "PredictionExplanation explain"),
            (
                "torchcam.methods",
                (
                    "CAM FinerCAM GradCAM GradCAMpp ISCAM LayerCAM LeGrad OutputTarget RefineCAM SSCAM ScoreCAM "
                    "SmoothGradCAMpp XGradCAM activation core gradient"
                ),
            ),
            ("torchcam.methods.activation", "CAM ISCAM SSCAM ScoreCAM"),
            ("torchcam.methods.core", "OutputTarget _CAM"),
            (
                "torchcam.methods.gradient",
                "FinerCAM GradCAM GradCAMpp LayerCAM LeGrad RefineCAM SmoothGradCAMpp XGradCAM",
            ),
            ("torchcam.metrics", "ClassificationMetric DeletionInsertionMetric"),
            ("torchcam.utils", "overlay_mask"),
        ],
    )
    def test_is_here(self, module: str, names: str) -> None:
        for name in names.split():
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"

    @pytest.mark.parametrize(
        ("module", "names"),
        [("gradient", ["FinerCAM", "LeGrad", "RefineCAM"]), ("composite", ["AugmentedCAM", "SESS"])],
    )
    def test_those_that_are_elsewhere_are_the_same_objects(self, module: str, names: tuple[str, ...]) -> None:
        for name in names:
            assert getattr(getattr(torchcam.methods, module), name) is getattr(torchcam.methods, name)

    def test_names_of_the_first_edition(self) -> None:
        assert importlib.import_module("torchcam.monitor").Moment is torchcam.monitor.ProbeResult

    def test_unknown_names(self) -> None:
        with pytest.raises(AttributeError, match="gradient' has no attribute 'FinestCAM'"):
            _ = torchcam.methods.gradient.FinestCAM

    @pytest.mark.parametrize("name", ["version", "locate_candidate_layer"])
    def test_those_that_are_not_here_are_in_the_documentation(self, name: str) -> None:
        page = ROOT.parent / "docs" / "differences.md"
        assert f"{name}`" in page.read_text(encoding="utf-8")


class TestHouse:
    def test_every_room_has_a_floor(self) -> None:
        assert {room_of(module) for module in SOURCES} <= set(FLOORS)

    @pytest.mark.parametrize("module", sorted(SOURCES.keys() - {"torchcam"}))
    def test_imports_come_from_floors_below(self, module: str) -> None:
        room = room_of(module)
        inside = {name for name in imports_of(module) if name.split(".")[0] == "torchcam"}
        wrong = {name for name in inside if room_of(name) != room and FLOORS[room_of(name)] >= FLOORS[room]}
        assert not wrong, f"{module} is on floor {FLOORS[room]} and imports {sorted(wrong)}"

    def test_no_circles(self) -> None:
        waiting = {module: imports_of(module) & SOURCES.keys() - {module} for module in SOURCES.keys() - {"torchcam"}}
        while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
            waiting = {module: needs for module, needs in waiting.items() if module not in ready}
        assert not waiting, f"modules that import each other: {waiting}"

    @pytest.mark.parametrize("module", sorted(SOURCES))
    def test_drawing_and_torchvision_are_imported_where_they_are_used(self, module: str) -> None:
        tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
        statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        top = set(imports(ast.Module(statements, []), module, is_package=False))
        assert not {"matplotlib", "torchvision"} & {name.split(".")[0] for name in top}

    def test_relative_and_absolute_imports_are_understood(self) -> None:
        code = "from . import core\nfrom ..utils import overlay_mask\nfrom torchcam import utils\nimport torch.nn\n"
        found = list(imports(ast.parse(code), "torchcam.methods.gradient", is_package=False))
        assert found == ["torchcam.methods.core", "torchcam.utils", "torchcam.utils", "torch.nn"]
