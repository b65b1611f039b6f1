#!/usr/bin/env bash
# Writes requirements.lock: every version exact, no hashes, no local build tag on torch, so that the
# same file serves machines with the CPU and with the CUDA build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
"${PYTHON:-python3}" -m venv "$fresh/venv"
pip="$fresh/venv/bin/python -m pip --disable-pip-version-check"
torch=$(grep -oE 'torch==[0-9.]+' pyproject.toml | head -1)
# torch first: with it installed, no other package's range pulls another build.
$pip install --quiet "$torch"
$pip install --quiet setuptools ".[dev,molecules,s3,tracking]"
{
  echo "# Every version exact; \`make lock\` writes this file anew from pyproject.toml."
  $pip list --format=freeze | grep -vE '^(pip|cafemed)==' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' | sort -f
} > "$fresh/lock"
mv "$fresh/lock" requirements.lock
