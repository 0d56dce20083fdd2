#!/usr/bin/env bash
# All that is to be known about a GPU, in one command of about eight minutes on an H100:
#
#   benchmarks/gpu.sh                        results in $OUT, or in runs/gpu: results.md, results.json, a log for each part
#   benchmarks/gpu.sh --device cpu --tiny    the same parts at a size for a CPU, so that nothing runs for the first time there
#   benchmarks/gpu.sh --parts decoding       some parts alone
#
# It needs no network. A machine with Python 3.12 and torch 2.11 alone lacks the wheels of: tyro (with docstring-parser,
# typeguard), tokenizers (with huggingface-hub), safetensors, tqdm, wandb, matplotlib, pytest and hypothesis; gigatoken and
# transformers are left out where they are not there. `pip download --python-version 3.12 --only-binary :all: PACKAGE` fetches
# them elsewhere.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
