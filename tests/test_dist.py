"""What is built to be installed: a wheel and an sdist that hold all that is needed, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from check_dist import BESIDE, NEEDED, files_of_package, sdist_faults, wheel_faults

import torchcam

ROOT = Path(torchcam.__file__).parent.parent
VERSION = torchcam.__version__
EXPECTED = files_of_package()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of the source tree, and a wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")

    def build(kind: str, source: Path) -> None:
        command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr

    build("sdist", ROOT)
    with tarfile.open(folder / f"torchcam-{VERSION}.tar.gz") as archive:
        archive.extractall(folder / "unpacked", filter="data")
    build("wheel", folder / "unpacked" / f"torchcam-{VERSION}")
    return folder


def test_what_is_needed_is_in_the_source_tree() -> None:
    assert {f"torchcam/{name}" for name in NEEDED} <= EXPECTED
    assert {name for name in BESIDE - {"PKG-INFO"} if not (ROOT / name).exists()} == set()


def test_the_sdist_holds_package_tests_and_docs(built: Path) -> None:
    with tarfile.open(built / f"torchcam-{VERSION}.tar.gz") as archive:
        names = [member.name for member in archive if member.isfile()]
    assert sdist_faults(names, VERSION, EXPECTED) == []
    assert {f"torchcam-{VERSION}/tests/test_dist.py", f"torchcam-{VERSION}/docs/index.md"} <= set(names)


def test_the_wheel_from_the_sdist_holds_the_package_alone(built: Path) -> None:
    with zipfile.ZipFile(built / f"torchcam-{VERSION}-py3-none-any.whl") as archive:
        assert wheel_faults(archive.namelist(), VERSION, EXPECTED) == []
        metadata = archive.read(f"torchcam-{VERSION}.dist-info/METADATA").decode()
        entry_points = archive.read(f"torchcam-{VERSION}.dist-info/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "torchcam = torchcam.cli:main" in entry_points


def test_the_wheel_works_where_the_sources_are_not(built: Path, tmp_path: Path) -> None:
    """From the unpacked wheel, isolated from the working directory and the environment's own installation."""
    with zipfile.ZipFile(built / f"torchcam-{VERSION}-py3-none-any.whl") as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import torchcam, torch; torch.set_num_threads(1)\n"
        "from torchcam.demo import load_model, sample_images\n"
        "from torchcam.explain import explain\n"
        "result = explain(load_model(), sample_images()[0].to_tensor(), target_layer='layer4')\n"
        "print(torchcam.__file__, result.predicted_class_idx, len(result.to_html()) > 10_000)"
    )
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "site" / "torchcam" / "__init__.py"), "6", "True"]


def wheel_names() -> set[str]:
    return EXPECTED | {f"torchcam-{VERSION}.dist-info/{name}" for name in ("METADATA", "licenses/LICENSE")}


def sdist_names() -> set[str]:
    beside = {name if "." in name or name in {"LICENSE", "PKG-INFO"} else f"{name}/a" for name in BESIDE - {"torchcam"}}
    return {f"torchcam-{VERSION}/{name}" for name in EXPECTED | beside}


def test_faults_are_found() -> None:
    assert wheel_faults(wheel_names(), VERSION, EXPECTED) == []
    assert sdist_faults(sdist_names(), VERSION, EXPECTED) == []
    assert wheel_faults(wheel_names() | {"tests/a.py"}, VERSION, EXPECTED) == [
        "the wheel holds tests/a.py, which the source tree does not"
    ]
    assert wheel_faults(wheel_names() - {"torchcam/py.typed"}, VERSION, EXPECTED) == [
        "the wheel lacks torchcam/py.typed"
    ]
    assert wheel_faults(EXPECTED, VERSION, EXPECTED) == ["the wheel has no licence"]
    assert sdist_faults(sdist_names() | {f"torchcam-{VERSION}/docs/a.pyc"}, VERSION, EXPECTED) == [
        "the sdist holds docs/a.pyc"
    ]
    assert sdist_faults(sdist_names() - {f"torchcam-{VERSION}/tests/a"}, VERSION, EXPECTED) == ["the sdist lacks tests"]
    assert sdist_faults(sdist_names() | {"a"}, VERSION, EXPECTED)[0].startswith("the sdist holds a, which is not below")
