"""The package that AOTInductor compiles, in Python and in the C++ program of the guide."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from torchcam.demo import load_model, sample_images
from torchcam.export import export
from torchcam.methods import GradCAM

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "production.md"


@pytest.mark.zoo
def test_package_in_a_program(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: g++")
    from torch.utils.cpp_extension import include_paths, library_paths

    model = load_model()
    package = export(model, "GradCAM", "layer4", example=sample_images()[0].to_tensor()).save(tmp_path / "m.aoti.pt2")

    images = torch.arange(2 * 3 * 96 * 96).float().remainder(255).div(255).reshape(2, 3, 96, 96)
    with GradCAM(model, "layer4") as extractor, torch.inference_mode():
        (wanted,) = extractor([6, 2], model(images))
    _, cam = torch._inductor.aoti_load_package(str(package))(images, torch.tensor([6, 2]))
    torch.testing.assert_close(cam, wanted, rtol=0, atol=1e-4)

    (source,) = re.findall(r"```cpp\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "main.cpp").write_text(source)
    abi = int(torch.compiled_with_cxx11_abi())
    command = [compiler, "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-o", "main", "main.cpp"]
    command += [f"-I{place}" for place in include_paths()]
    command += [option for place in library_paths() for option in (f"-L{place}", f"-Wl,-rpath,{place}")]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "main", package], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [float(mean) for mean, _ in lines] == pytest.approx(wanted.mean((1, 2)).tolist(), abs=1e-4)
    assert [int(place) for _, place in lines] == wanted.flatten(1).argmax(1).tolist()
