"""A model run layer by layer over several prompts at once, so that few of its weights are in memory.

A checkpoint of 17 GB runs in 16 GB: each layer is read from disk when its turn comes, applied to all prompts, and
dropped. A pass over any number of prompts reads the weights once, and so does one more token of each of them. As many
layers stay in memory as the limit allows; which ones is decided when the model is opened, and the numbers do not depend
on it.

The layers are mlx-vlm's, each called through a decoder of this layer alone: mask, rotary embedding and the visual
features that some families add after their first layers are those of the whole network.

Prompts about the same media share the pass over their prefix, cut where `mlxvr.model.prefix` cuts it. So the logits are
those of `Prefix`, to the last bit, as long as neither part of a prompt is longer than a long step of `prefill`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.errors import Cancelled
from mlxvr.media.patches import VisionInput
from mlxvr.model.loading import load_model, map_weights
from mlxvr.model.network import VideoModel, VisionFeatures
from mlxvr.model.prompt import Prompt
from mlxvr.runtime import device_memory
from mlxvr.runtime.hooks import Progress, ShouldStop

__all__ = ["Layer", "LayerwiseModel", "Piece", "Track", "default_weights_limit"]

_TOWER = "vision_tower"
_EMBEDDING = "language_model.model.embed_tokens"
_LAYERS = "language_model.model.layers"
_NORM = "language_model.model.norm"
_HEAD = "language_model.lm_head"
_WEIGHTS_SHARE = 0.4
_TOKENS_AT_ONCE = 512  # that a layer computes before it is waited for: bounds its intermediate results


@dataclass(eq=False)
class Piece:
    """Tokens that go through a layer together.

    Attributes:
        ids: int32 (n,).
        positions: int32 (3, n).
        media_mask: bool (n,), True for visual tokens.
        features: of the visual tokens among them; None: there are none.
        hidden: (1, n, hidden), what the next layer reads.
    """

    ids: np.ndarray
    positions: np.ndarray
    media_mask: np.ndarray
    features: VisionFeatures | None
    hidden: mx.array


@dataclass(eq=False)
class Track:
    """A prompt, and what is generated after it, on the way through the layers.

    Attributes:
        prompt: as it was asked.
        position: rope position of the next token.
        cache: one KV cache a layer.
        pieces: the tokens that have not been through all layers, in order.
        prefix: the track whose keys and values come before these pieces, until both have been read; None: nothing does.
    """

    prompt: Prompt
    position: int
    cache: list[Any]
    pieces: list[Piece] = field(default_factory=list)
    prefix: "Track | None" = None

    def fork(self) -> "Track":
        """Another track that begins with the tokens that this one holds."""
        return Track(self.prompt, self.position, [_fork(layer) for layer in self.cache])


class Layer:
    """A decoder layer whose weights are in memory.

    Attributes:
        index: its place, from 0.
        path: MLX name of the module, such as "language_model.model.layers.3".
        module: mlx-vlm's layer; gradients are taken with respect to its parameters.
    """

    def __init__(self, index: int, module: nn.Module, model: VideoModel):
        """Wrap a layer of `model`'s network."""
        self.index = index
        self.path = f"{_LAYERS}.{index}"
        self.module = module
        decoder = model.family.decoder(model.network, [module])
        network = SimpleNamespace(language_model=SimpleNamespace(model=decoder))
        self._alone = VideoModel(network, model.family, model.config, spec=model.spec, tokenizer=model.tokenizer)

    def __call__(self, hidden: mx.array, piece: Piece, cache: Any = None) -> mx.array:
        """Apply the layer, and add the visual features that follow it.

        Args:
            hidden: (1, n, hidden), of the piece's tokens; `piece.hidden` itself is not read.
            piece: says which tokens they are.
            cache: the layer's KV cache, is read and extended; None: nothing came before.

        Returns:
            (1, n, hidden), not yet evaluated.
        """
        features = None
        if piece.features is not None and self.index < len(piece.features.deepstack):
            features = VisionFeatures(piece.features.embeds, [piece.features.deepstack[self.index]])
        return self._alone.hidden(
            mx.array(piece.ids)[None],
            mx.array(piece.positions)[:, None],
            cache=None if cache is None else [cache],
            features=features,
            media_mask=piece.media_mask[None],
            embeds=hidden,
        )


class LayerwiseModel:
    """A model whose parts are read when they are needed; `open` makes it.

    Attributes:
        model: the same model with its weights still on disk: family, config, spec, tokenizer, settings.
        nbytes: of all weights in memory.
        kept_bytes: of the weights that stay in memory.
    """

    def __init__(self, folder: ModelFolder, model: VideoModel, *, dtype: str | None, memory_limit: int | None):
        """Take over a model that was loaded lazily from `folder` in `dtype`."""
        self.model = model
        self._folder = folder
        self._dtype = dtype
        self._waiting: dict[str, list[tuple[str, mx.array]]] = {}
        language = model.network.language_model
        layers = [f"{_LAYERS}.{index}" for index in range(len(model.layers))]
        parts = [*layers, _EMBEDDING, *([_HEAD] if "lm_head" in language else []), _TOWER]
        sizes = {part: _nbytes(self._module(part)) for part in parts}
        self.nbytes = sum(sizes.values())
        self._kept = set(parts) if memory_limit is None else _fitting(sizes, memory_limit)
        self.kept_bytes = sum(sizes[part] for part in self._kept)
        self._layers = [Layer(index, module, model) for index, module in enumerate(model.layers)]
        mx.eval(self._module(_NORM).parameters())

    @classmethod
    def open(
        cls, folder: str | PathLike[str] | ModelFolder, *, dtype: str | None = None, memory_limit: int | None = None
    ) -> "LayerwiseModel":
        """Open a model folder; `folder`, `dtype` and errors are those of `load_model`.

        Args:
            folder: of the model, quantized or not.
            dtype: what to compute in; None: the checkpoint's own.
            memory_limit: bytes that the weights may take; None: all that there are. One part (a layer, the embedding,
                the head, the vision tower) is in memory whatever the limit.
        """
        opened = folder if isinstance(folder, ModelFolder) else ModelFolder.open(folder)
        return cls(opened, load_model(opened, dtype=dtype, lazy=True), dtype=dtype, memory_limit=memory_limit)

    @property
    def resident(self) -> bool:
        """Whether all weights stay in memory."""
        return self.kept_bytes == self.nbytes

    def read(
        self,
        prompts: Sequence[Prompt],
        *,
        last: int = 1,
        progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> tuple[list[Track], list[mx.array]]:
        """Read prompts, in one pass over the weights.

        Args:
            prompts: any number.
            last: tokens at the end of each prompt whose logits are wanted; fewer come where the question is shorter.
            progress: called with ("layers", layers done, layers in all).
            should_stop: asked before each layer.

        Returns:
            A track for each prompt, to go on from, and its float32 logits (tokens, vocab), evaluated: in each row
            what follows that token.

        Raises `Cancelled` when `should_stop` says so.
        """
        tracks = self.embed(prompts, should_stop=should_stop)
        self._run(tracks, progress=progress, should_stop=should_stop)
        return tracks, self._finish(tracks, last)

    def extend(
        self,
        tracks: Sequence[Track],
        tokens: Sequence[Sequence[int]],
        *,
        last: int = 1,
        should_stop: ShouldStop | None = None,
    ) -> list[mx.array]:
        """Append tokens to each track, in one pass over the weights; returns logits as `read` does."""
        with self._loaded(_EMBEDDING):
            for track, own in zip(tracks, tokens, strict=True):
                ids = np.array(own, dtype=np.int32)
                at = np.arange(track.position, track.position + len(ids), dtype=np.int32)
                nothing = np.zeros(len(ids), dtype=bool)
                hidden = self.model.embed(mx.array(ids)[None])
                track.pieces = [Piece(ids, np.tile(at, (3, 1)), nothing, None, hidden)]
                track.position += len(ids)
            mx.eval([piece.hidden for track in tracks for piece in track.pieces])
        self._run(tracks, should_stop=should_stop)
        return self._finish(tracks, last)

    def step(
        self, tracks: Sequence[Track], tokens: Sequence[int], *, should_stop: ShouldStop | None = None
    ) -> list[mx.array]:
        """Append a token to each track: float32 logits (vocab,) of what follows it, evaluated."""
        logits = self.extend(tracks, [[token] for token in tokens], should_stop=should_stop)
        return [rows[0] for rows in logits]

    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        shared: bool = True,
        step_size: int = 2048,
        should_stop: ShouldStop | None = None,
    ) -> list[Track]:
        """Look at the media of prompts and embed their tokens: a track for each, before the first layer.

        Args:
            prompts: any number; the media of several that are the same objects are looked at once.
            shared: whether prompts that begin alike share a prefix track; else each is one piece.
            step_size: the most tokens of a piece, where prefixes are shared.
            should_stop: asked while the vision tower runs.
        """
        features = self._look(prompts, should_stop)
        prefixes: dict[tuple[Any, ...], Track] = {}
        tracks = []
        with self._loaded(_EMBEDDING):
            for prompt in prompts:
                seen = features.get(_media_key(prompt.media))
                track = Track(prompt, prompt.next_position, self.model.make_cache())
                start, end = (prompt.prefix_length if shared else 0), len(prompt.ids)
                if start:
                    key = (_media_key(prompt.media), prompt.ids[:start].tobytes())
                    if key not in prefixes:
                        prefixes[key] = Track(prompt, 0, self.model.make_cache())
                        prefixes[key].pieces = self._cut(prompt, 0, start, seen, step_size)
                    track.prefix = prefixes[key]
                track.pieces = self._cut(prompt, start, end, seen, step_size if shared else end)
                tracks.append(track)
            mx.eval([piece.hidden for track in (*prefixes.values(), *tracks) for piece in track.pieces])
        return tracks

    def layers(
        self, *, backwards: bool = False, progress: Progress | None = None, should_stop: ShouldStop | None = None
    ) -> Iterator[Layer]:
        """The layers in order (or from the last to the first), each loaded until the next is asked for.

        Everything that was computed with a layer must be evaluated by then.
        """
        order = reversed(self._layers) if backwards else iter(self._layers)
        for done, layer in enumerate(order):
            if should_stop is not None and should_stop():
                raise Cancelled("the work was cancelled between two layers")
            with self._loaded(layer.path):
                yield layer
            if progress is not None:
                progress("layers", done + 1, len(self._layers))

    @contextmanager
    def embedding(self) -> Iterator[mx.array]:
        """The embedding matrix (vocab, hidden), loaded."""
        with self._loaded(_EMBEDDING):
            yield self.model.network.language_model.model.embed_tokens.weight

    @contextmanager
    def head(self) -> Iterator[Callable[[mx.array], mx.array]]:
        """The final norm and the output head: (.., hidden) after the last layer -> float32 logits (.., vocab)."""
        norm = self._module(_NORM)
        part = _EMBEDDING if self.model.config["tie_word_embeddings"] else _HEAD
        with self._loaded(part):
            try:
                yield lambda hidden: self.model.logits(norm(hidden))
            finally:
                self.model.head.release()

    def _look(self, prompts: Sequence[Prompt], should_stop: ShouldStop | None) -> dict[tuple[int, ...], VisionFeatures]:
        """Features of the media of each prompt, by their identity."""
        wanted = {_media_key(prompt.media): prompt.media for prompt in prompts if prompt.media}
        if not wanted:
            return {}
        with self._loaded(_TOWER):
            return {key: self.model.encode(media, should_stop=should_stop) for key, media in wanted.items()}

    def _cut(
        self, prompt: Prompt, start: int, end: int, features: VisionFeatures | None, step_size: int
    ) -> list[Piece]:
        """The tokens [start, end) of a prompt as pieces; the embedding is loaded."""
        seen = np.concatenate([[0], np.cumsum(prompt.media_mask)])  # visual tokens before each place
        pieces = []
        for first in range(start, end, step_size):
            after = min(first + step_size, end)
            mask = prompt.media_mask[first:after]
            own = features[int(seen[first]) : int(seen[after])] if features is not None and mask.any() else None
            ids = prompt.ids[first:after]
            hidden = self.model.embed(mx.array(ids)[None], features=own, media_mask=mask[None])
            pieces.append(Piece(ids, prompt.positions[:, first:after], mask, own, hidden))
        return pieces

    def _run(
        self, tracks: Sequence[Track], *, progress: Progress | None = None, should_stop: ShouldStop | None = None
    ) -> None:
        """Take all pieces through all layers; a prefix goes first, and its keys and values are handed on."""
        prefixes = {id(track.prefix): track.prefix for track in tracks if track.prefix is not None}
        for layer in self.layers(progress=progress, should_stop=should_stop):
            waiting: list[mx.array] = []
            tokens = 0
            for track in (*prefixes.values(), *tracks):
                if track.prefix is not None:
                    track.cache[layer.index] = _fork(track.prefix.cache[layer.index])
                cache = track.cache[layer.index]
                for piece in track.pieces:
                    piece.hidden = layer(piece.hidden, piece, cache)
                    tokens += len(piece.ids)
                waiting += [piece.hidden for piece in track.pieces] + [cache.keys, cache.values]
                if tokens >= _TOKENS_AT_ONCE:
                    mx.eval(waiting)
                    waiting, tokens = [], 0
            mx.eval(waiting)
        for track in tracks:
            track.prefix = None

    def _finish(self, tracks: Iterable[Track], last: int) -> list[mx.array]:
        """Logits of the last tokens of each track, whose pieces are then dropped."""
        with self.head() as head:
            logits = []
            for track in tracks:
                hidden = mx.concatenate([piece.hidden[0] for piece in track.pieces])  # (n, hidden)
                logits.append(head(hidden[-last:]))
                mx.eval(logits[-1])
                track.pieces = []
        return logits

    @contextmanager
    def _loaded(self, part: str) -> Iterator[None]:
        """Have a part's weights in memory."""
        module = self._module(part)
        mx.eval(module.parameters())
        try:
            yield
        finally:
            if part not in self._kept:
                self._put_back(part, module)

    def _put_back(self, part: str, module: nn.Module) -> None:
        """Replace a part's weights by the same ones on disk, to be read when they are needed again."""
        if part not in self._waiting:
            self._waiting = {}
            for key, array in map_weights(self._folder).items():
                owner = _owner(key)
                self._waiting.setdefault(owner, []).append((key.removeprefix(f"{owner}."), array))
        module.load_weights(self._waiting.pop(part))
        if self._dtype is not None:
            module.set_dtype(getattr(mx, self._dtype))
        if not part.startswith(_LAYERS):  # the next layer takes the buffers of the last
            mx.clear_cache()

    def _module(self, part: str) -> nn.Module:
        module: Any = self.model.network
        for name in part.split("."):
            module = module[int(name)] if name.isdigit() else module[name]
        return cast("nn.Module", module)


def default_weights_limit() -> int:
    """Bytes for weights where nobody sets a limit: 40% of the memory that MLX should use on this machine.

    As much again goes into keys, values and logits.
    """
    return int(_WEIGHTS_SHARE * device_memory.usable_memory())


def _owner(key: str) -> str:
    """The part that a tensor belongs to."""
    if key.startswith(f"{_LAYERS}."):
        return ".".join(key.split(".")[:4])
    return next((part for part in (_TOWER, _EMBEDDING, _HEAD) if key.startswith(f"{part}.")), _NORM)


def _nbytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters())))


def _fitting(sizes: dict[str, int], memory_limit: int) -> set[str]:
    """The parts that stay: all, or as many as leave room for the largest part that does not."""
    if sum(sizes.values()) <= memory_limit:
        return set(sizes)
    staying: set[str] = set()
    room = memory_limit - max(sizes.values())
    for part, size in sizes.items():
        if size > room:
            break
        staying.add(part)
        room -= size
    return staying


def _fork(cache: Any) -> Any:
    """A KV cache that holds the same and grows on its own."""
    forked = copy.copy(cache)
    if cache.keys is not None:  # slices are arrays of their own: what is written to one is not seen in the other
        forked.keys, forked.values = (array[..., : cache.offset, :] for array in (cache.keys, cache.values))
    return forked


def _media_key(media: Sequence[VisionInput]) -> tuple[int, ...]:
    return tuple(id(medium) for medium in media)
