"""Where a number comes from: commit, hardware, versions, processes."""

import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import TrainingArguments

_PACKAGES = ("smt_hf", "torch", "transformers", "accelerate", "datasets")


def commit() -> str:
    """The commit of this package's checkout, with `+` if tracked files differ from it; `unknown` outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed package may lie in another's checkout
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> str:
    """Name of the accelerator, or of the processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    return f"CPU {name[1].strip() if name else platform.processor() or platform.machine()}"


def run_facts(num_threads: int, arguments: TrainingArguments | None = None) -> dict:
    """What every result says about where it comes from.

    Args:
        num_threads: of torch, per process.
        arguments: of a training, for its number of processes and how they work together.
    """
    facts = {
        "commit": commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "num_threads": num_threads,
    }
    if arguments is None:
        return facts
    state = arguments.distributed_state
    kind = state.distributed_type.value if state else "NO"
    return {**facts, "world_size": arguments.world_size, "distributed_type": kind}
