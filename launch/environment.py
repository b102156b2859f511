"""What a run was started with: command.sh, environment.txt, and the same facts for its checkpoints."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchaudio", "pytorch-lightning", "torchmetrics", "hydra-core", "numpy")


def versions() -> dict[str, str]:
    """Python and the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        found[name.replace("-", "_")] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of this checkout, with `+changes` when the work tree differs; None outside of git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain") else commit


def record(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The run's part of a checkpoint of format 1."""
    return {"config": config, "overrides": overrides, "versions": versions(), "git": git_commit() or ""}


def write_snapshot(folder: Path, git: str) -> None:
    """command.sh repeats the run; environment.txt says on what it ran."""
    arguments = shlex.join([sys.executable, *sys.argv])
    launcher = {
        name: os.environ[name] for name in sorted(os.environ) if name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in launcher.items())
    command = folder / "command.sh"
    command.write_text(f"#!/bin/sh\ncd {shlex.quote(os.getcwd())} || exit 1\n{exports}exec {arguments}\n")
    command.chmod(0o755)
    packages = sorted(f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions())
    lines = [
        f"git {git or 'none'}",
        f"python {sys.version.splitlines()[0]}",
        f"platform {platform.platform()}",
        f"host {platform.node()}",
        f"cpu {_cpu_name()} x {len(os.sched_getaffinity(0))}",
        *_gpus(),
        "",
        *packages,
    ]
    (folder / "environment.txt").write_text("\n".join(lines) + "\n")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _gpus() -> list[str]:
    import torch

    return [f"gpu {index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
