"""From a model's name to a folder on disk: a local folder as it is, or a snapshot from the Hub.

Anything that looks like a path is never sent over the network: a mistyped folder is reported as missing, not looked up
on the Hub. A Hub id is fetched with `huggingface_hub.snapshot_download`, which brings the cache, the resuming of broken
downloads, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN` and `hf auth login`. Only the files that a model needs are
fetched, never pickled weights; new files are compared with the hashes that the Hub announced (`download_check`). Each
kind of failure becomes one `CheckpointError` line that says what to do (`hub_errors`).

A broken connection is resumed where it broke. After a broken call, the next one fetches only the files that are not
complete yet; it fetches them from their beginning, since the client (from 2.0 on) keeps no part of a file.

`huggingface_hub` is imported on first need, so that a local model pays nothing for it.
"""

import io
import logging
import re
from pathlib import Path
from typing import Any

from mlxvr.checkpoint import download_check
from mlxvr.checkpoint.hub_errors import endpoint, explain_download
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.runtime.hooks import Progress
from mlxvr.storage.paths import list_visible

__all__ = ["NEEDED_FILES", "is_hub_id", "origin_of", "repo_id", "resolve"]


NEEDED_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "mlxvr.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "README.md",  # names the licence
    "LICENSE*",
)

_HUB_SCHEME = "hf://"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$")
_log = logging.getLogger(__name__)


def resolve(model: str | Path, *, revision: str | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of `model`: a local folder untouched (no network), or a downloaded snapshot.

    `model` is a folder or a Hub id `org/name` (`hf://org/name` where a local folder `org` exists); `revision` is a
    branch, tag or commit of a Hub repository. `progress("download", bytes_done, bytes_total)` replaces the Hub client's
    own bars on stderr; `progress("check", ...)` follows while the new files are hashed.

    Raises `CheckpointError` when the folder or repository is missing, closed, unreachable or has no safetensors
    weights, or when a file arrives damaged, and `ConfigError` for a revision of a local folder.
    """
    folder = Path(model).expanduser()
    if str(model) and folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{folder} is a local folder, which has no revisions; leave out revision {revision!r}")
        return folder
    if not is_hub_id(model):
        raise _no_such_folder(str(model), folder)
    snapshot = _download(repo_id(str(model)), revision, progress)
    if not list_visible(snapshot, "*.safetensors"):
        raise CheckpointError(
            f"{model} holds no safetensors weights; pickled weights (.bin, .pt) are never loaded, because "
            "reading them can run code: choose a repository or revision with .safetensors files"
        )
    return snapshot


def is_hub_id(model: str | Path) -> bool:
    """Whether `model` can only be a Hub id and not a path; looks at the disk alone."""
    if isinstance(model, Path):
        return False
    if model.startswith(_HUB_SCHEME):
        return _HUB_ID.fullmatch(model.removeprefix(_HUB_SCHEME)) is not None
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists() and not Path(model).parent.is_dir()


def repo_id(model: str) -> str:
    """Return the `org/name` of a Hub id, without its scheme."""
    return model.removeprefix(_HUB_SCHEME)


def origin_of(folder: Path) -> tuple[str, str]:
    """Return repository and commit of a folder in the Hub's cache, `('', '')` of any other.

    The cache keeps a snapshot in `models--<org>--<name>/snapshots/<commit>`.
    """
    snapshot = folder.absolute()
    match = _SNAPSHOT.search(snapshot.as_posix())
    return (f"{match[1]}/{match[2]}", match[3]) if match else ("", "")


def _no_such_folder(model: str, folder: Path) -> CheckpointError:
    if folder.is_file():
        return CheckpointError(f"{folder} is a file; expected a model folder or a Hub id such as org/name")
    hint = "expected a model folder or a Hub id such as org/name"
    if _HUB_ID.fullmatch(model):  # its parent is a local folder
        hint = f"the folder {folder.parent} exists but has no {folder.name}; for the Hub's model, write hf://{model}"
    return CheckpointError(f"no such folder: {model or repr(model)}; {hint}")


def _download(repo_id: str, revision: str | None, progress: Progress | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # the transport's own: httpx in 1.x, httpx2 in 2.x

    _log.info("fetching %s (revision %s) from the Hub", repo_id, revision or "main")
    repository = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo_id.replace('/', '--')}"
    try:
        with download_check.noted(repository) as known:
            folder = snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(NEEDED_FILES),
                ignore_patterns=["*/*"],  # other exports of the same model live in subfolders
                endpoint=endpoint(),
                library_name="mlxvr",
                tqdm_class=None if progress is None else _forwarding_bar(progress),
            )
            download_check.check(Path(folder), known, progress)
    except (HTTPError, OSError, ValueError) as error:
        raise CheckpointError(explain_download(error, repo_id, revision)) from error
    return Path(folder)


def _forwarding_bar(progress: Progress) -> type[Any]:
    """Return a silent tqdm class that reports the bytes of a snapshot download to `progress`."""
    from tqdm.auto import tqdm

    # Newer clients have two bars that count bytes; the second counts those on disk.
    newest: list[Any] = []

    class ForwardingBar(tqdm):  # type: ignore[misc, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})
            if kwargs.get("unit") == "B":
                newest[:] = [self]

        def update(self, n: float | None = 1) -> bool | None:
            drawn = super().update(n)
            if newest and newest[0] is self:
                progress("download", int(self.n), int(self.total or 0))
            return drawn

    return ForwardingBar
