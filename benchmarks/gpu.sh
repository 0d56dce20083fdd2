#!/usr/bin/env bash
# All that is to be known about a GPU, in one command of about eight minutes on an H100:
#
#   benchmarks/gpu.sh                        results in $OUT, or in runs/gpu: results.md, results.json, a log for each part
#   benchmarks/gpu.sh --device cpu --tiny    the same parts at a size for a CPU, so that nothing runs for the first time there
#   benchmarks/gpu.sh --parts decoding       some parts alone
#
# It needs no network. A machine with Python 3.12 and torch 2.11 alone lacks the wheels of: numpy, tyro, tokenizers,
# safetensors, tqdm, pytest, hypothesis and what these need; jinja2 has come with torch. Without matplotlib there is no curve,
# without transformers no rival. They are fetched elsewhere with
#   pip download --python-version 3.12 --only-binary :all: -d wheels numpy tyro tokenizers safetensors tqdm pytest hypothesis
# and installed with pip install --no-index --find-links wheels and the same names.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
