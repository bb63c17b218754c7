#!/usr/bin/env bash
# Installs into .venv, then runs the main job: distil the embedded teacher into a one-step student and report on it.
# Arguments go to `vpae quickstart`; see launch/quickstart.sh --help.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

./launch/install.sh
installed=$SECONDS

.venv/bin/python -m vpae quickstart "$@" </dev/null
echo "install ${installed} s + quickstart $((SECONDS - installed)) s = ${SECONDS} s"
