"""Write `configs/*.json` and `positions.json` anew, with the releases of transformers themselves.

    python tests/releases/make.py [--work DIR]

It makes a virtual environment of its own with torch (CPU) and, beside it, a folder with each release and the versions
of huggingface-hub and tokenizers that this release admits. That takes about 5 GB in DIR, which is kept if it is named.
Python 3.11: the older releases were not made for later ones.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Release -> versions of huggingface-hub and tokenizers that it runs with.
RELEASES = {
    "4.49.0": ("0.36.0", "0.21.4"),
    "4.51.3": ("0.36.0", "0.21.4"),
    "4.52.1": ("0.36.0", "0.21.4"),
    "4.52.4": ("0.36.0", "0.21.4"),
    "4.55.4": ("0.36.0", "0.21.4"),
    "4.57.1": ("0.36.0", "0.22.1"),
    "5.0.0": ("1.5.0", "0.22.1"),
    "5.2.0": ("1.5.0", "0.22.1"),
    "5.3.0": ("1.5.0", "0.22.1"),
    "5.5.4": ("1.5.0", "0.22.1"),
    "5.6.0": ("1.5.0", "0.22.1"),
    "5.17.0": ("1.31.0", "0.23.1"),
    "5.18.0": ("2.4.0", "0.23.1"),
    "5.24.0": ("2.4.0", "0.23.1"),
}
CONFIGS = ("4.49.0", "4.52.4", "4.55.4", "4.57.1", "5.0.0", "5.24.0")  # in order: the first leaves what others load


def prepare(work: Path) -> Path:
    """The virtual environment's interpreter; makes what is missing."""
    python = work / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, "torch==2.13.0"], check=True)
        subprocess.run([*install, "transformers==5.24.0", "requests"], check=True)  # for what it needs itself
    for release, (hub, tokenizers) in RELEASES.items():
        if (work / release / "transformers").exists():
            continue
        wanted = [f"transformers=={release}", f"huggingface-hub=={hub}", f"tokenizers=={tokenizers}"]
        command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", work / release]
        subprocess.run([*command, *wanted], check=True)
    return python


def run(python: Path, work: Path, release: str, *arguments: str | Path) -> None:
    """Run `run_release.py` under a release."""
    environment = {**os.environ, "PYTHONPATH": str(work / release), "HF_HUB_OFFLINE": "1"}
    command = [python, "-W", "ignore", HERE / "run_release.py", *arguments]
    subprocess.run(command, check=True, env=environment)
    print(release, arguments[0], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write configs and positions with the releases of transformers.")
    parser.add_argument("--only", choices=("configs", "positions"), help="write one of the two (default: both)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for the releases (default: a temporary one)")
    arguments = parser.parse_args()
    work = arguments.work
    with tempfile.TemporaryDirectory() as temporary:
        work = (work or Path(temporary)).resolve()
        python = prepare(work)
        if arguments.only != "positions":
            write_configs(python, work, Path(temporary) / "sources")
        if arguments.only != "configs":
            write_positions(python, work, Path(temporary) / "positions.json")


def write_configs(python: Path, work: Path, sources: Path) -> None:
    """Write a file with the configs that each release saves."""
    (HERE / "configs").mkdir(exist_ok=True)
    for release in CONFIGS:
        run(python, work, release, "configs", sources, HERE / "configs" / f"{release}.json")


def write_positions(python: Path, work: Path, out: Path) -> None:
    """Write the positions that each release computes; `out` is a temporary file."""
    found = {}
    for release in RELEASES:
        run(python, work, release, "positions", out)
        found[release] = json.loads(out.read_text())["positions"]
    lines = [f'"{release}": {json.dumps(prompts)}' for release, prompts in found.items()]
    (HERE / "positions.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
