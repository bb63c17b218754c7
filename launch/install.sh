#!/usr/bin/env bash
# Makes .venv at the root of the repository and installs the package there, editable, with the tested versions.
# A second run finds nothing to do and returns at once.
#   PYTHON=/path/to/python3.12   the interpreter to build .venv with (default: the first suitable one on PATH)
#   TORCH_INDEX_URL=https://...  where torch alone comes from (default: the CPU build without an NVIDIA GPU, else pip's own)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

constraints=launch/constraints.txt
stamp=.venv/vpae-installed
cpu_index=https://download.pytorch.org/whl/cpu

say() { echo "install: $*"; }
die() { echo "install: error: $*" >&2; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
suitable() { [[ $1 == 3.11 || $1 == 3.12 ]]; }

find_python() {
    local name version seen="" without_venv=""
    for name in ${PYTHON:-python3 python3.12 python3.11}; do
        version=$(version_of "$name")
        [[ -n $version ]] && seen+="${seen:+, }$name is $version"
        suitable "$version" || continue
        # Debian and Ubuntu ship `venv` without `ensurepip`, which is what its failure is about.
        if "$name" -c 'import ensurepip, venv' 2>/dev/null; then echo "$name"; return; fi
        without_venv=${without_venv:-$version}
    done
    [[ -z $without_venv ]] || die "Python $without_venv cannot make a virtual environment here;" \
        "on Debian or Ubuntu: sudo apt install python$without_venv-venv"
    die "Python 3.11 or 3.12 is needed (found: ${seen:-none});" \
        "install one with its venv package, or name it: PYTHON=/path/to/python3.12 $0"
}

make_venv() {
    if [[ ! -e .venv ]]; then
        local python
        python=$(find_python)
        say "making .venv with $python ($(version_of "$python"))"
        trap 'rm -rf .venv' EXIT
        trap 'exit 130' INT TERM
        "$python" -m venv .venv
        trap - EXIT INT TERM
    fi
    local version
    version=$(version_of .venv/bin/python)
    suitable "$version" || die ".venv holds Python ${version:-that does not start}, not 3.11 or 3.12; remove .venv and run again"
    .venv/bin/python -c 'import pip, ssl' 2>/dev/null || die ".venv has no working pip; remove it and run again"
}

has_nvidia_gpu() { [[ -e /dev/nvidiactl ]] || nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Everything that decides what ends up in .venv, and where .venv lies, since an editable install holds the path.
fingerprint() {
    { cat setup.cfg pyproject.toml vpae/__init__.py "$constraints" launch/install.sh
      pwd -P; version_of .venv/bin/python; echo "${TORCH_INDEX_URL:-} $1"; } | sha256sum
}

pip_install() { .venv/bin/python -m pip install -qq --disable-pip-version-check "$@"; }

# Torch is installed first, by itself and without its dependencies, which the tested versions of the last step settle:
# an index for torch alone holds those too, in versions of its own.
install_torch_from() {
    pip_install --no-deps --index-url "$1" "torch==$2" ||
        die "could not install torch $2 from $1; set TORCH_INDEX_URL to an index that has it," \
            "or PIP_FIND_LINKS to a folder with the wheel"
}

# On Linux, PyPI's torch brings several gigabytes of CUDA. Asking for the `+cpu` version by name cannot resolve to that:
# either pip's configured sources hold a CPU build, or there is none there and PyTorch's own CPU index is next.
install_cpu_torch() {
    local version=$1 log
    log=$(mktemp)
    if pip_install --no-deps "torch==$version+cpu" >"$log" 2>&1; then
        :
    elif ! grep -q "No matching distribution found for torch" "$log"; then
        cat "$log" >&2
        rm -f "$log"
        die "could not install the CPU build of torch $version; pip's own words are above"
    else
        say "no CPU build of torch among pip's configured sources; taking it from $cpu_index"
        install_torch_from "$cpu_index" "$version"
    fi
    rm -f "$log"
}

install_torch() {
    local gpu=$1 wanted installed
    wanted=$(sed -n 's/^torch==//p' "$constraints")
    installed=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
    if [[ ${installed%%+*} == "$wanted" ]]; then
        say "torch $installed is already there"
    elif [[ -n ${TORCH_INDEX_URL:-} ]]; then
        say "torch $wanted from $TORCH_INDEX_URL"
        install_torch_from "$TORCH_INDEX_URL" "$wanted"
    elif [[ $gpu == no ]]; then
        say "torch $wanted, CPU build (no NVIDIA GPU here)"
        install_cpu_torch "$wanted"
    else
        say "torch $wanted, CUDA build, some gigabytes"
        pip_install --no-deps "torch==$wanted"
    fi
}

make_venv
gpu=no
if has_nvidia_gpu; then gpu=yes; fi
now=$(fingerprint "$gpu")
if [[ -f $stamp && $(<"$stamp") == "$now" ]]; then exit 0; fi

rm -f "$stamp"
# setuptools first: building with the venv's own, tested one needs no second download and no isolated environment.
pip_install -c "$constraints" setuptools
install_torch "$gpu"
say "vpae and what it needs (some minutes the first time)"
pip_install --no-build-isolation -c "$constraints" -e ".[dev]"
problems=$(.venv/bin/python -m pip check) || die "the installed packages do not fit together: $problems"
if [[ $gpu == yes ]] && ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    say "note: this machine has an NVIDIA GPU that the installed torch cannot use, so everything will run on the CPU;" \
        "for another build: rm -rf .venv, then TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 $0"
fi
echo "$now" >"$stamp"
say "done in ${SECONDS} s"
