"""Check what a built wheel and sdist hold: all that is needed, and nothing else.

python -m build && python scripts/check_dist.py dist
"""

from __future__ import annotations

import argparse
import re
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["py.typed", "_base.html", "_page.html", "trust/_page.html", "demo/weights.pt", "demo/samples/samples.json"]
# Beside the package, an sdist has what its tests and docs need.
BESIDE = {
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "SECURITY.md",
    "docs",
    "mkdocs.yml",
    "pyproject.toml",
    "scripts",
    "tests",
    "torchcam",
}
FORBIDDEN = re.compile(r"(^|/)(__pycache__|\.ipynb_checkpoints|\.git)(/|$)|\.py[co]$|\.orig$|~$")


def files_of_package() -> set[str]:
    """List the files of the package in the source tree."""
    paths = [path for path in (ROOT / "torchcam").rglob("*") if path.is_file()]
    return {name for path in paths if not FORBIDDEN.search(name := path.relative_to(ROOT).as_posix())}


def wheel_faults(names: Iterable[str], version: str, expected: set[str]) -> list[str]:
    """Describe what is wrong with the names of the files in a wheel."""
    found = set(names)
    about = {name for name in found if name.startswith(f"torchcam-{version}.dist-info/")}
    faults = _faults("the wheel", found - about, expected)
    if not any(name.endswith("/licenses/LICENSE") for name in about):
        faults.append("the wheel has no licence")
    return faults


def sdist_faults(names: Iterable[str], version: str, expected: set[str]) -> list[str]:
    """Describe what is wrong with the names of the files in an sdist."""
    prefix = f"torchcam-{version}/"
    outside = [name for name in names if not name.startswith(prefix)]
    found = {name.removeprefix(prefix) for name in names} - set(outside)
    faults = [f"the sdist holds {name}, which is not below {prefix}" for name in outside]
    faults += _faults("the sdist", {name for name in found if name.startswith("torchcam/")}, expected)
    faults += [f"the sdist holds {name}" for name in sorted({name.split("/")[0] for name in found} - BESIDE)]
    faults += [f"the sdist lacks {name}" for name in sorted(BESIDE - {name.split("/")[0] for name in found})]
    return faults + [f"the sdist holds {name}" for name in sorted(found) if FORBIDDEN.search(name)]


def _faults(what: str, found: set[str], expected: set[str]) -> list[str]:
    needed = expected | {f"torchcam/{name}" for name in NEEDED}
    return [f"{what} lacks {name}" for name in sorted(needed - found)] + [
        f"{what} holds {name}, which the source tree does not" for name in sorted(found - expected)
    ]


def main() -> int:
    """Check a folder with one wheel and one sdist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `python -m build` has filled")
    folder = parser.parse_args().folder
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "torchcam" / "__init__.py").read_text(encoding="utf-8"), re.M)
    if match is None:
        raise SystemExit("torchcam/__init__.py says no `__version__`")
    version, expected = match[1], files_of_package()
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        raise SystemExit(f"{folder} must hold one wheel and one sdist, got {[p.name for p in [*wheels, *sdists]]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        faults = wheel_faults(wheel.namelist(), version, expected)
    with tarfile.open(sdists[0]) as sdist:
        faults += sdist_faults([member.name for member in sdist if member.isfile()], version, expected)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{wheels[0].name} and {sdists[0].name} hold {len(expected)} files of the package, and nothing else")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
