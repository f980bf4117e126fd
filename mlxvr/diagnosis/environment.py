"""Checks of the environment: the machine, Python, and the packages compared with the releases that we test with."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx

from mlxvr.diagnosis.findings import Finding
from mlxvr.runtime.device_memory import backend

__all__ = ["NEWEST_TESTED", "NEWEST_TESTED_PYTHON", "check_machine", "check_versions"]

# The newest releases with which the whole test suite has run.
NEWEST_TESTED = {
    "mlx": "0.32.4",
    "mlx-lm": "0.32.2",
    "mlx-vlm": "0.7.10",
    "numpy": "2.5.5",
    "pillow": "13.0.0",
    "av": "19.0.2",
    "huggingface-hub": "2.4.0",
    "transformers": "5.24.0",
}
NEWEST_TESTED_PYTHON = (3, 13)
_GIB = 2**30


def check_machine() -> Iterator[Finding]:
    """Chip, memory and operating system (always green), and the backend (yellow without Metal on a Mac)."""
    device = mx.device_info()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = (
        f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.release()}"
    )
    named = device.get("device_name") or _processor()
    text = f"{named}, {memory / _GIB:.0f} GiB of memory, {system}, {platform.machine()}"
    if recommended := device.get("max_recommended_working_set_size"):
        text += f", recommended working set {int(recommended) / _GIB:.1f} GiB"
    yield Finding(check="machine", status="green", text=text)
    runs_on = backend()
    slow = runs_on == "cpu" and sys.platform == "darwin"
    yield Finding(
        check="backend",
        status="yellow" if slow else "green",
        text=f"MLX computes on: {runs_on}",
        advice="Metal is not available: install the arm64 build of Python, and run on the Mac itself" if slow else "",
    )


def check_versions() -> Iterator[Finding]:
    """Python and packages; releases newer than the tested ones are yellow."""
    python = sys.version_info[:2]
    newer = python > NEWEST_TESTED_PYTHON
    tested = ".".join(map(str, NEWEST_TESTED_PYTHON))
    yield Finding(
        check="Python",
        status="yellow" if newer else "green",
        text=f"{platform.python_version()}" + (f"; the newest that we test with is {tested}" if newer else ""),
        advice="it probably works: the other lines say" if newer else "",
    )
    installed, beyond = [], []
    for package, newest in NEWEST_TESTED.items():
        try:
            release = version(package)
        except PackageNotFoundError:
            yield Finding(
                check=package, status="red", text="is not installed", advice="install mlxvr again: pip install mlxvr"
            )
            continue
        installed.append(f"{package} {release}")
        if _release(release) > _release(newest):
            beyond.append(f"{package} {release} ({newest})")
    yield Finding(
        check="packages",
        status="yellow" if beyond else "green",
        text="newer than we test with: " + ", ".join(beyond) if beyond else ", ".join(installed),
        advice="they probably work: the other lines say" if beyond else "",
    )


def _release(text: str) -> tuple[int, int]:
    """Major and minor number, by which releases are compared; (0, 0) if there are none."""
    numbers = [int(number) for number in re.findall(r"\d+", text)[:2]]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def _processor() -> str:
    """The processor's name."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration, subprocess.SubprocessError):
        return platform.processor() or "an unknown processor"
