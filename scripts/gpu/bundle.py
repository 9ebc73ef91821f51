"""Packs vLLM for CUDA, this package, its tests and benchmarks for a GPU machine without network.

    python scripts/gpu/bundle.py --out DIR [--python 3.12] [--has FREEZE.txt] [--part-mib 28]
        [--vllm 0.32.0] [--wheel VLLM.whl] [--arch 90] [--lean]
    make gpu-bundle [GPU_BUNDLE="--has freeze.txt --lean"]

Runs where pip reaches an index, on x86-64 Linux; needs no GPU. Writes

    DIR/1/site.tar.xz.00 ...   numbered folders of at most PART_MIB each, to be brought there one
                               after the other; `unpack.py` lies in each
    DIR/PARTS                  the order, sizes and SHA-256 of all files

There, with the Python that was named: `python3 DIR/N/unpack.py --work WORK` for each folder, then
`bash WORK/gpu.sh [STAGE ...]`, which is `make gpu`.

--has   what `pip freeze` says on that machine: packages that are there stay there and are not
        packed, whatever version vLLM asks for. Without it torch and CUDA travel too: gigabytes.
--arch  of the libraries' machine code only what this compute capability runs (90: an H100).
--lean  for --has with torch, transformers and the like on an H100: only what an engine with a
        dense 16-bit or fp32 model and its server import, about 50 MiB. Implies --arch 90.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path.append(str(HERE))

from fatbin import prune  # noqa: E402

PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in range(39, 4, -1)]  # pip matches n exactly
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
TESTING = ("pytest", "pytest-xdist", "numpy", "triton")
# What the stages read of the checkout.
CHECKOUT = (
    "pyproject.toml", "setup.py", "README.md", "LICENSE", "benchmarks/kernels", "scripts/gpu",
    "tests/kernels", "tests/*.py", "tests/fixtures/bases", "tests/fixtures/routed",
    "integration_tests", "vllm_lora_ext", "kernels", "routing", "model_patches",
)  # fmt: skip
# --lean: what vLLM imports on its way to a dense model's engine and server, beside torch's and
# transformers' own needs; and what of vLLM an H100 never reads there.
LEAN = frozenset((
    "annotated-types", "apache-tvm-ffi", "blake3", "cachetools", "cbor2", "compressed-tensors",
    "distro", "dnspython", "email-validator", "fastapi", "httpcore2", "httpx2", "jiter",
    "llguidance", "loguru", "msgspec", "openai", "opentelemetry-api", "oss-harmony",
    "partial-json-parser", "prometheus-fastapi-instrumentator", "pybase64", "pydantic",
    "pydantic-core", "pydantic-extra-types", "python-multipart", "pyzmq", "setproctitle", "sniffio",
    "starlette", "truststore", "typing-inspection", "uvicorn", "watchfiles", "xgrammar", "dill",
    "vllm", "pytest", "pytest-xdist", "execnet", "pluggy", "iniconfig",
))  # fmt: skip
UNREAD = (
    "vllm/vllm-rs", "vllm/third_party/deep_gemm", "vllm/third_party/fmha_sm100",
    "vllm/third_party/tml_fa4", "vllm/_deepselect_C.abi3.so", "vllm/_flashmla_C.abi3.so",
    "vllm/_flashmla_extension_C.abi3.so", "vllm/_flashkda_C.abi3.so", "vllm/_qutlass_C.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so",
)  # fmt: skip
FLASH = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
JUNK = (".h", ".hpp", ".cuh", ".pyi", ".a")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--has", type=Path)
    parser.add_argument("--part-mib", type=float, default=28)
    parser.add_argument("--vllm", default="0.32.0")
    parser.add_argument("--wheel", type=Path, help="a vLLM wheel that is already here")
    parser.add_argument("--arch", type=int)
    parser.add_argument("--lean", action="store_true")
    args = parser.parse_args()
    if args.lean and args.has is None:
        parser.error("--lean leaves out what --has names, and needs it")
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        scratch = Path(folder)
        site = make_site(scratch, args)
        archives = [scratch / "checkout.tar.xz", scratch / "site.tar.xz"]
        pack(REPO, tracked(), archives[0])
        pack(site, sorted(p.name for p in site.iterdir()), archives[1])
        for line in deal(archives, args.out, int(args.part_mib * 2**20)):
            name, size, _ = line.split()
            print(f"{name:32} {int(size) / 2**20:7.2f} MiB")
    return 0


def tracked() -> list[str]:
    """The checkout's files that the stages read."""
    return subprocess.run(
        ["git", "-C", REPO, "ls-files", "--", *CHECKOUT], capture_output=True, text=True, check=True
    ).stdout.split()


# --- packages -------------------------------------------------------------------------------------


def make_site(scratch: Path, args: argparse.Namespace) -> Path:
    """A folder as Python wants it on its path: vLLM, this package and what they need."""
    wheels, site = scratch / "wheels", scratch / "site"
    wheels.mkdir()
    own = scratch / "own"
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", own, REPO)
    has = names(args.has.read_text()) if args.has else frozenset[str]()
    needed = wanted(resolve(args, scratch / "report.json"), has, args.lean)
    if args.wheel:
        needed = [n for n in needed if not n.startswith("vllm==")]
        shutil.copy(args.wheel, wheels)
    pip("download", "--no-deps", "-d", wheels, *target(args), *needed)
    for wheel in sorted((*wheels.glob("*.whl"), *own.glob("*.whl"))):
        run(sys.executable, "-m", "zipfile", "-e", wheel, site)
    for data in site.glob("*.data"):  # headers and scripts, but also some packages' modules
        for lib in (data / "purelib", data / "platlib"):
            if lib.is_dir():
                shutil.copytree(lib, site, dirs_exist_ok=True)
        shutil.rmtree(data)
    make_small(site, 90 if args.lean else args.arch, args.lean)
    return site


def resolve(args: argparse.Namespace, report: Path) -> list[str]:
    """`name==version` of all that vLLM and the tests need there, by pip's own resolver."""
    asked = [args.wheel or f"vllm=={args.vllm}", *TESTING]
    pip("install", "--dry-run", "--ignore-installed", "--report", report, "--target", report.parent,
        *target(args), *asked)  # fmt: skip
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return [f"{canonical(meta['name'])}=={meta['version']}" for meta in found]


def wanted(packages: Iterable[str], has: frozenset[str], lean: bool) -> list[str]:
    """Of `name==version`: what is to be brought."""
    missing = [p for p in packages if p.partition("==")[0] not in has]
    return [p for p in missing if not lean or p.partition("==")[0] in LEAN]


def names(freeze: str) -> frozenset[str]:
    """Packages that `pip freeze` lists, by canonical name."""
    lines = (line.split("#")[0].strip() for line in freeze.splitlines())
    heads = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line) for line in lines)
    return frozenset(canonical(head[0]) for head in heads if head)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def target(args: argparse.Namespace) -> list[str]:
    tags = [arg for name in PLATFORMS for arg in ("--platform", name)]
    return ["--only-binary=:all:", "--python-version", args.python, "--implementation", "cp", *tags]


def make_small(site: Path, arch: int | None, lean: bool) -> None:
    """Takes out what is never read there."""
    for name in UNREAD if lean else ():
        path = site / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in [p for p in site.rglob("*") if p.is_file()]:
        if lean and (path.suffix in JUNK or path.name == "RECORD"):
            path.unlink()
        elif ".so" in path.name:
            if arch is not None and path.name.endswith(".abi3.so"):
                attention = lean and path == site / FLASH
                prune(path, arch, dense_attention if attention else lambda _: True)
            if lean:  # not all can be
                subprocess.run(["strip", "--strip-unneeded", path], check=False)


def dense_attention(code: bytes) -> bool:
    """Of FlashAttention 3: 16-bit types, heads of 64 and 128, and what has no head size."""
    mangled = re.findall(rb"_ZN7cutlass13device_kernel\w{20,}", code)
    said = subprocess.run(["c++filt"], input=b"\n".join(mangled), capture_output=True).stdout
    shapes = re.findall(rb"cute::C<(\d+)> >, (\d+), (cutlass::\w+), float, cutlass::arch", said)
    return all(
        q == v and q in (b"64", b"128") and b"float_e" not in dtype for q, v, dtype in shapes
    )


def pip(*args: str | Path) -> None:
    run(sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *args)


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


# --- packing --------------------------------------------------------------------------------------


def pack(root: Path, files: list[str], out: Path) -> None:
    """An .xz archive of `files` below `root`, the same for the same files."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
        return None if info.name.endswith((".pyc", "__pycache__")) else info

    with lzma.open(out, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name in files:
            tar.add(root / name, name, filter=plain)


def deal(archives: Iterable[Path], out: Path, limit: int) -> list[str]:
    """Cuts the archives into pieces and fills numbered folders up to `limit` bytes each.

    Returns:
        The lines of PARTS: name, size, SHA-256.
    """
    lines, number, room = [], 1, limit
    for archive in archives:
        data, at, piece = archive.read_bytes(), 0, 0
        while at < len(data):
            if room < min(1 << 20, limit):
                number, room = number + 1, limit
            chunk = data[at : at + room]
            name = f"{number}/{archive.name}.{piece:02d}"
            (out / str(number)).mkdir(exist_ok=True)
            (out / name).write_bytes(chunk)
            lines.append(f"{name} {len(chunk)} {hashlib.sha256(chunk).hexdigest()}")
            at, piece, room = at + len(chunk), piece + 1, room - len(chunk)
    (out / "PARTS").write_text("\n".join(lines) + "\n")
    for i in range(1, number + 1):  # every part knows the whole list, and how to be opened
        for path in (out / "PARTS", HERE / "unpack.py"):
            shutil.copy(path, out / str(i) / path.name)
    return lines


if __name__ == "__main__":
    sys.exit(main())
