"""What the comparisons with other packages share: the other package answers in a process of its own."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["Maps", "Peer", "install", "load", "run"]

Maps = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Peer:
    """A package to compare with.

    Attributes:
        requirements: what is installed for it, without dependencies, itself first and with its version
        module: the name it is imported by
        script: the file of the comparison
    """

    requirements: Sequence[str]
    module: str
    script: str


def run(
    peer: Peer,
    title: str | None,
    answer: Callable[[], Maps],
    compare: Callable[[Maps, float], bool],
    tolerance: float,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a comparison; return the exit code.

    Args:
        peer: the package to compare with
        title: what the script does
        answer: computes the maps of the peer, in a process where it can be imported
        compare: prints the comparison, given the maps of the peer and the tolerance; returns whether all is well
        tolerance: the largest difference, unless an argument says otherwise
        arguments: those of the command line by default
    """
    parser = argparse.ArgumentParser(description=title, formatter_class=argparse.RawDescriptionHelpFormatter)
    name = peer.requirements[0]
    cache = Path(tempfile.gettempdir()) / name.replace("==", "-")
    parser.add_argument(
        "--peer-dir", type=Path, default=cache, help=f"folder for {name}; reused if it holds it (default: {cache})"
    )
    parser.add_argument(
        "--tolerance", type=float, default=tolerance, help=f"largest difference (default: {tolerance:g})"
    )
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.as_peer is None:
        return 0 if compare(maps_of(peer, options.peer_dir), options.tolerance) else 1
    found = Path(str(__import__(peer.module).__file__)).resolve().parent.parent
    if found != options.peer_dir.resolve():
        raise SystemExit(f"the peer should come from {options.peer_dir}, but {found} was imported")
    np.savez(options.as_peer, **answer())  # type: ignore[arg-type, unused-ignore]
    return 0


def install(peer: Peer, folder: Path) -> None:
    """Install a package into a folder of its own, unless it is there."""
    if not (folder / peer.module).is_dir():
        print(f"installing {', '.join(peer.requirements)} into {folder}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, *peer.requirements], check=True)  # noqa: S603 - nothing in it comes from elsewhere


def load(peer: Peer, folder: Path, name: str) -> ModuleType:
    """Import a package from a folder into this process, under a name that no other package has.

    Under a name that is not its own, the package finds its own modules by relative imports. Under its own, what else it
    needs is looked for in the folder last.
    """
    if name in sys.modules:
        return sys.modules[name]
    place = (folder / peer.module).resolve()
    if not (place / "__init__.py").is_file():
        raise SystemExit(f"{peer.requirements[0]} is not in {folder}")
    if name == peer.module:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
    if spec is None or spec.loader is None:
        raise SystemExit(f"{place} is not a package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def maps_of(peer: Peer, folder: Path) -> Maps:
    """Compute the maps of a peer, in a process of its own."""
    install(peer, folder)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "maps.npz"
        subprocess.run(  # noqa: S603 - nothing in it comes from elsewhere
            [sys.executable, peer.script, "--peer-dir", str(folder), "--as-peer", str(target)],
            check=True,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )
        with np.load(target) as maps:
            return dict(maps)
