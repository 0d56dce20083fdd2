"""Which code and which packages made a run."""

import platform
import subprocess
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages whose results may differ between versions."""
    packages = (torch, np, tokenizers, safetensors)
    return {"python": platform.python_version()} | {package.__name__: package.__version__ for package in packages}


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" where files differ from it; None outside git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed elsewhere, where a repository around it would be another one
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
