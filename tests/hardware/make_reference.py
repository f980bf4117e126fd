"""Write the committed truth of `mlxvr.doctor`: what transformers computes in float32 (gradients in float64).

    python -m tests.hardware.make_reference

Needs torch (extra `parity`) and the `ffmpeg` program. It writes `mlxvr/diagnosis/reference/`: a tiny random Qwen2.5-VL,
logits of that and of the bundled Qwen3-VL for a drawn clip and a drawn image, the same with weights that were packed to
4 bits and unpacked by the formula, the gradient of a group of completions, the frames of a bundled clip as the `ffmpeg`
program decodes them, and the bundled model's confidence in its answer about that clip.
"""

import json
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.diagnosis import check_decoding as clip_check
from mlxvr.diagnosis import reference
from mlxvr.media import load_vision, normalise
from mlxvr.media.patches import VisionInput
from mlxvr.model.adapter import find_layers
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt, build_prompt
from tests.checkpoints import write_checkpoint
from tests.reference import Reference

TOKENS = 8  # of the committed answers
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
}
VISION = {"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 64, "num_heads": 2, "intermediate_size": 96}


def main() -> None:
    """Write all of it."""
    folder = reference.FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder / "qwen2_5_vl", "qwen2_5_vl", dtype="BF16", tied=True, text=TEXT, vision=VISION)
    arrays: dict[str, np.ndarray] = {}
    for name in reference.MODELS:
        for bits in (None, 4):
            arrays |= logits_of(name, bits)
    for kind in ("float32", "4bit"):
        arrays |= {f"gradient.{kind}.{name}": array for name, array in gradients(kind).items()}
    safetensors_file = folder / "reference.safetensors"
    save(safetensors_file, arrays)
    notes = {
        "computed_by": {
            "transformers": transformers.__version__,
            "torch": torch.__version__.partition("+")[0],
            "machine": platform.machine(),
            "ffmpeg": ffmpeg_version(),
        },
        "clip": clip_truth(folder),
    }
    (folder / "reference.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def checkpoint(name: str) -> Path:
    """Where a model of the checks lies."""
    return demo_folder() / "checkpoint" if name == "qwen3_vl" else reference.FOLDER / name


def packed_by_hand(model: VideoModel) -> dict[str, np.ndarray]:
    """The weights of the packed modules, unpacked by the formula, by the names of the modules."""
    found = {}
    for path, module in model.network.language_model.named_modules():
        if "scales" in module:
            parts = [np.array(module[part]) for part in ("weight", "scales", "biases")]
            found[path] = reference.unpack(*parts, reference.BITS)
    return found


def their_model(name: str, model: VideoModel, bits: int | None) -> Reference:
    """transformers' model with the same weights."""
    theirs = Reference(checkpoint(name), name)
    if bits is not None:
        reference.quantize(model)
        network = theirs.model.model.language_model
        with torch.no_grad():
            for path, weight in packed_by_hand(model).items():
                network.get_submodule(path.removeprefix("model.")).weight.copy_(torch.tensor(weight))
    return theirs


def inputs_of(theirs: Reference, model: VideoModel, asked: Prompt, ids: np.ndarray) -> dict[str, Any]:
    """What transformers is given."""
    return theirs.inputs(ids, asked.media, [normalise(media.patches, model.spec) for media in asked.media])


def logits_of(name: str, bits: int | None) -> dict[str, np.ndarray]:
    """Greedy answers and their logits, for each thing that is shown."""
    model = reference.open_model(name)
    theirs = their_model(name, model, bits)
    found = {}
    for shown in reference.SHOWN:
        asked = reference.prompt(model, shown)
        answer = theirs.greedy(inputs_of(theirs, model, asked, asked.ids), TOKENS)
        if bits is not None:  # the same tokens as without packing
            answer = _answers[name, shown]
        _answers[name, shown] = answer
        whole = np.concatenate([asked.ids, np.array(answer, dtype=np.int32)])
        logits = theirs.logits(inputs_of(theirs, model, asked, whole))[len(asked.ids) - 1 : -1]
        if bits is None:
            found[f"{name}.{shown}.answer"] = np.array(answer, dtype=np.int32)
        found[f"{name}.{shown}.logits" + ("" if bits is None else f".{bits}bit")] = logits.astype(np.float32)
    return found


_answers: dict[tuple[str, str], list[int]] = {}


class Adapted(torch.nn.Module):
    """A linear module with LoRA, as its paper writes it (arXiv 2106.09685)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, a: np.ndarray, b: np.ndarray) -> None:
        super().__init__()
        self.frozen, self.bias = weight.detach(), bias
        self.a = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        self.b = torch.tensor(b, dtype=torch.float64, requires_grad=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """W x + scale * B A x."""
        return torch.nn.functional.linear(inputs, self.frozen, self.bias) + reference.LORA.scale * (
            inputs @ self.a @ self.b
        )


def gradients(kind: str) -> dict[str, np.ndarray]:
    """The gradient of mean over completions of the mean over tokens of -ratio * advantage, at ratio 1."""
    model = reference.open_model(reference.BUNDLED)
    theirs = their_model("qwen3_vl", model, 4 if kind == "4bit" else None)
    theirs.model.double().requires_grad_(False)
    reference.attach_known_adapter(model)
    layers = {}
    for path, layer in find_layers(model.network).items():
        owner, _, last = path.removeprefix("language_model.model.").rpartition(".")
        parent = theirs.model.model.language_model.get_submodule(owner)
        module = getattr(parent, last)
        layers[path] = Adapted(module.weight, module.bias, np.array(layer.lora_a), np.array(layer.lora_b))
        setattr(parent, last, layers[path])
    asked = reference.prompt(model, "clip")
    completions = reference.completions()
    for ids, advantage in zip(completions, reference.ADVANTAGES.tolist()):
        inputs = inputs_of(theirs, model, asked, np.concatenate([asked.ids, ids]))
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].double()
        logits = theirs.model(**inputs).logits[0, len(asked.ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids.astype(np.int64))]
        ratio = (logprobs - logprobs.detach()).exp()
        (-(ratio * advantage).mean() / len(completions)).backward()
    return {
        f"{path}.lora_{part}": getattr(layer, part).grad.numpy().astype(np.float32)
        for path, layer in layers.items()
        for part in ("a", "b")
    }


def clip_truth(folder: Path) -> dict[str, Any]:
    """Frames of a bundled clip as the ffmpeg program decodes them, and the confidence of the answer about it."""
    path = demo_folder() / clip_check.CLIP
    with tempfile.TemporaryDirectory() as made:
        command = ["ffmpeg", "-v", "error", "-i", str(path), "-fps_mode", "passthrough"]
        subprocess.run([*command, f"{made}/%05d.png"], check=True)
        decoded = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(Path(made).glob("*.png"))]
    for index in clip_check.FRAMES:
        Image.fromarray(decoded[index]).save(folder / f"frame{index}.png", optimize=True)
    model = reference.open_model(reference.BUNDLED)
    vision: VisionInput = load_vision(path, model.spec)
    asked = build_prompt(
        model.tokenizer,
        model.family,
        model.config,
        [vision],
        clip_check.QUESTION,
        options=clip_check.OPTIONS,
        system=model.system_prompt,
    )
    theirs = Reference(checkpoint("qwen3_vl"), "qwen3_vl")
    answer = theirs.greedy(inputs_of(theirs, model, asked, asked.ids), 6)
    whole = np.concatenate([asked.ids, np.array(answer, dtype=np.int32)])
    logits = theirs.logits(inputs_of(theirs, model, asked, whole))[len(asked.ids) - 1 : -1].astype(np.float64)
    texts = [model.tokenizer.decode([token]) for token in answer]
    letter = next(index for index, text in enumerate(texts) if text in "ABCD")
    row = logits[letter]
    probability = np.exp(row[answer[letter]] - row.max()) / np.exp(row - row.max()).sum()
    return {"answer": texts[letter], "confidence": float(probability), "frames": len(decoded)}


def ffmpeg_version() -> str:
    """The release of the ffmpeg program."""
    return subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout.split()[2]


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as safetensors."""
    import mlx.core as mx

    mx.save_safetensors(str(path), {name: mx.array(array) for name, array in arrays.items()})


if __name__ == "__main__":
    main()
