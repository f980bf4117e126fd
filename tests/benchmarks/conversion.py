"""Converting, beside mlx-vlm: seconds, peak memory and the bytes that come out, at Qwen3-VL-8B's widths.

    python -m tests.benchmarks.conversion [--layers 4 26] [--repeats 3] [--cache cold|warm] [--folder DIR] [--json]

Random bfloat16 checkpoints are written (4 layers: 4.3 GB, 26 layers: 12.8 GB, the largest tensor 1.24 GB in each) and
converted to 4 bits in groups of 64 by `mlxvr.convert` and `mlx_vlm.convert`, each in a process of its own, in turn.
Memory is the largest resident size that the system accounts for the finished process; `cold` drops the source from
the page cache before each run, `warm` reads it. The tensors that come out must be equal, bit for bit. All that is
written goes with the benchmark, and takes twice the largest checkpoint while it runs.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tests.checkpoints import (
    SPECIAL_TOKENS,
    make_config,
    tensor_shapes,
    text_settings,
    train_tokenizer,
    vision_settings,
    write_side_files,
)

TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
}
VISION = {  # Qwen3-VL-8B's widths, two of its 27 blocks
    "depth": 2,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [0],
    "out_hidden_size": 4096,
}
RECIPE = """\
family = "qwen3_vl"
threshold = 0.98
[quantization]
bits = 4
group_size = 64
keep = ["vision_tower.*"]
"""
QUANTIZE = ("-q", "--q-bits", "4", "--q-group-size", "64")
SHARD_BYTES = 5 * 10**9
CHUNK = 2**24  # numbers that are written at once


@dataclass(frozen=True)
class Run:
    """One conversion: wall and processor seconds, the largest resident size and the output in bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output_bytes: int


def write_model(folder: Path, layers: int) -> None:
    """A random checkpoint in shards, written in little memory."""
    folder.mkdir(parents=True)
    text = text_settings("qwen3_vl") | TEXT | {"num_hidden_layers": layers}
    vision = vision_settings("qwen3_vl") | VISION
    tokenizer = train_tokenizer("qwen3_vl")
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    config = make_config("qwen3_vl", text, vision, ids, dialect="4.57")
    config["text_config"]["rope_scaling"]["mrope_section"] = [24, 20, 20]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["<|im_end|>"]}))
    write_side_files(folder, "qwen3_vl", vision)
    shapes = tensor_shapes("qwen3_vl", text, vision)
    shards = list(deal(shapes))
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for file, shard in zip(names, shards):
        write_shard(folder / file, {name: shapes[name] for name in shard}, seed=names.index(file))
    index = {"metadata": {}, "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def deal(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names for one shard after the other."""
    shard: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if shard and filled + size > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], *, seed: int) -> None:
    """Numbers from a pool of normal ones, begun at a random place for each chunk: incompressible enough, and fast."""
    draw = np.random.default_rng(seed)
    pool = (draw.standard_normal(2 * CHUNK, dtype=np.float32) * 0.02).view(np.uint32)
    bits = (pool >> 16).astype("<u2")  # truncated to bfloat16
    del pool
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                count, start = min(left, CHUNK), int(draw.integers(CHUNK))
                file.write(bits[start : start + count])
                left -= count
        file.flush()
        os.fsync(file.fileno())


def convert(command: list[str], source: Path, out: Path, cache: str) -> Run:
    """Run a converter as a process of its own, alone."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what earlier runs left to be written is not this one's
    prepare_cache(source, cache)
    started = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        child = os.posix_spawn(
            command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)]
        )
        _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak, size)


def prepare_cache(source: Path, cache: str) -> None:
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            if cache == "cold":
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            while file.read(2**24):
                pass


def compare(ours: Path, theirs: Path) -> None:
    """Every tensor, bit for bit; a tensor at a time."""
    import mlx.core as mx

    def tensors(folder: Path) -> dict[str, mx.array]:
        files = sorted(folder.glob("*.safetensors"))
        return {name: array for file in files for name, array in mx.load(str(file)).items()}

    here, there = tensors(ours), tensors(theirs)
    assert here.keys() == there.keys(), sorted(here.keys() ^ there.keys())[:4]
    for name in sorted(here):
        a, b = here.pop(name), there.pop(name)
        assert a.dtype == b.dtype, name
        assert mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)).item(), name
        del a, b
        mx.clear_cache()


def apart(work: Callable[..., None], *arguments: object) -> None:
    """Do memory-hungry work in a process of its own: a child's peak is never below its parent's size."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} failed")


def measure(folder: Path, layers: int, repeats: int, cache: str) -> dict[str, list[Run]]:
    """Convert in turn, compare, and clean up."""
    source, recipe = folder / "source", folder / "plain.toml"
    recipe.write_text(RECIPE)
    apart(write_model, source, layers)
    outs = {name: folder / name for name in ("mlxvr", "mlx-vlm")}
    python = sys.executable
    way = ["--hf-path", str(source), "--mlx-path"]
    commands = {
        "mlxvr": [python, "-m", "mlxvr.convert", *way, str(outs["mlxvr"]), "--recipe", str(recipe), "--json"],
        "mlx-vlm": [python, "-m", "mlx_vlm", "convert", *way, str(outs["mlx-vlm"]), *QUANTIZE],
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    try:
        for repeat in range(repeats):
            order = list(commands) if repeat % 2 == 0 else list(commands)[::-1]
            for name in order:
                runs[name].append(convert(commands[name], source, outs[name], cache))
                print(f"{layers} layers, {name}: {runs[name][-1]}", file=sys.stderr)
        apart(compare, outs["mlxvr"], outs["mlx-vlm"])
    finally:
        for path in (source, *outs.values()):
            shutil.rmtree(path, ignore_errors=True)
    return runs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 26])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", choices=["cold", "warm"], default="cold", help="the source before each run")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[int, dict[str, list[Run]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for layers in options.layers:
            found[layers] = measure(Path(folder), layers, options.repeats, options.cache)
    if options.json:
        print(
            json.dumps(
                {layers: {n: [asdict(r) for r in runs] for n, runs in by.items()} for layers, by in found.items()}
            )
        )
        return
    print(f"{options.cache} page cache, medians of {options.repeats}, tensors equal")
    for layers, by in found.items():
        middle = {}
        for name, runs in by.items():
            middle[name] = statistics.median(run.seconds for run in runs)
            spread = f"{min(run.seconds for run in runs):.1f} to {max(run.seconds for run in runs):.1f}"
            cpu = statistics.median(run.cpu_seconds for run in runs)
            peak = max(run.peak_bytes for run in runs)
            print(
                f"  {layers:>2} layers  {name:<8} {middle[name]:6.1f} s ({spread}), {cpu:6.1f} s of CPU, "
                f"peak {peak / 1e9:.2f} GB, output {runs[0].output_bytes / 1e9:.2f} GB"
            )
        ratios = [a.seconds / b.seconds for a, b in zip(by["mlxvr"], by["mlx-vlm"])]
        print(f"  {layers:>2} layers  mlxvr / mlx-vlm, pair by pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
