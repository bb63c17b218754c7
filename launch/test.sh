#!/usr/bin/env bash
# Installs into .venv, then lints, then runs the tests. Arguments go to pytest: launch/test.sh -m slow, -k bounce, ...
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

./launch/install.sh

# One thread a process: the tests use tiny tensors, some start two ranks, and some compare runs bit for bit.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
# No test needs the network; one that reaches for it must fail everywhere, not only where there is none.
export HF_HUB_OFFLINE=1

echo "== ruff"
.venv/bin/ruff check --config launch/ruff.toml .
.venv/bin/ruff format --check --config launch/ruff.toml .
echo "== pytest"
# a worker a core, a file a worker: what a file's tests share is made once
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@" </dev/null
