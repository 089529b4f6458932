"""Where a number comes from: commit, hardware, versions, processes."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import TrainingArguments


def commit() -> str:
    """The commit of this package's checkout, with `+` if files differ from it; `unknown` outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        words = ["git", "-C", str(folder)]
        head = subprocess.run([*words, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*words, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def hardware() -> str:
    """Name of the accelerator, or of the processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return "CPU " + line.split(":", 1)[1].strip()
    return f"CPU {platform.processor() or platform.machine()}"


def run_facts(num_threads: int, arguments: TrainingArguments) -> dict:
    """The part of `eval_results.json` that says what the run ran on."""
    packages = ("smt_hf", "torch", "transformers", "accelerate", "datasets")
    return {
        "commit": commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "num_threads": num_threads,
        "world_size": arguments.world_size,
        "distributed_type": arguments.distributed_state.distributed_type.value if arguments.distributed_state else "NO",
    }
