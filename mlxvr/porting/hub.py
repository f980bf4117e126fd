"""From what a user calls a model to a folder on disk: a local folder as it is, or a snapshot from the Hub.

Whatever looks like a path is never sent over the network: a mistyped folder is told to be missing, not
looked up on the Hub. A Hub id is fetched with `huggingface_hub.snapshot_download`, which brings the cache,
the resuming of broken downloads, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN` and `hf auth login`. Only the
files that a model needs are fetched, and pickle weights are not among them. Each way in which this goes
wrong becomes one `CheckpointError` line that says what to do.

`huggingface_hub` is imported on first need, so that a local model pays nothing for it.
"""

import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxvr.callbacks import Progress
from mlxvr.errors import CheckpointError, ConfigError

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

    `model` is a folder or a Hub id `org/name` (`hf://org/name` where a local folder `org` is in the way);
    `revision` is a branch, tag or commit of a Hub repository. `progress("download", bytes_done, bytes_total)`
    replaces the Hub client's own bars on stderr.

    Raises `CheckpointError` when the folder or repository is missing, closed, unreachable or has no
    safetensors weights, and `ConfigError` when a revision is asked of a local folder.
    """
    folder = Path(model).expanduser()
    if str(model) and folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{folder} is a local folder, which has no revisions; leave out revision {revision!r}")
        return folder
    if not is_hub_id(model):
        raise _no_such_folder(str(model), folder)
    snapshot = _download(repo_id(str(model)), revision, progress)
    if not any(snapshot.glob("*.safetensors")):
        raise CheckpointError(
            f"{model} holds no safetensors weights; pickled weights (.bin, .pt) are never loaded, because "
            "reading them can run code: choose a repository or revision with .safetensors files"
        )
    return snapshot


def is_hub_id(model: str | Path) -> bool:
    """Tell whether `model` can only be meant as a Hub id; no path is. Looks at the disk alone."""
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
    found = _SNAPSHOT.search(snapshot.as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else ("", "")


def _no_such_folder(model: str, folder: Path) -> CheckpointError:
    if folder.is_file():
        return CheckpointError(f"{folder} is a file; expected a model folder or a Hub id such as org/name")
    hint = "expected a model folder or a Hub id such as org/name"
    if _HUB_ID.fullmatch(model):  # its parent is a folder here
        hint = f"the folder {folder.parent} exists but holds no {folder.name}; for the Hub's, write hf://{model}"
    return CheckpointError(f"no such folder: {model or repr(model)}; {hint}")


def _download(repo_id: str, revision: str | None, progress: Progress | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # the transport's: httpx in 1.x, httpx2 in 2.x

    _log.info("fetching %s (revision %s) from the Hub", repo_id, revision or "main")
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(NEEDED_FILES),
            ignore_patterns=["*/*"],  # other exports of the same model live in subfolders
            endpoint=_endpoint(),
            library_name="mlxvr",
            tqdm_class=None if progress is None else _forwarding_bar(progress),
        )
    except (HTTPError, OSError, ValueError) as error:
        raise CheckpointError(_explain(error, repo_id, revision)) from error
    return Path(folder)


def _endpoint() -> str:
    """Return the Hub's address as the environment has it now; the client itself read it when it was imported."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    """Say in one line what went wrong with a download and what to do."""
    from huggingface_hub import errors

    endpoint = _endpoint()
    page = f"{endpoint}/{repo_id}"
    causes = list(_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.OfflineModeIsEnabled):
        return f"{repo_id} is not (wholly) in the local cache and HF_HUB_OFFLINE is set; unset it to download"
    if caused_by(errors.GatedRepoError):
        return f"{repo_id} is gated: accept its licence at {page}, then sign in with `hf auth login`"
    if caused_by(errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}; expected a branch, tag or commit listed at {page}"
    if caused_by(errors.RepositoryNotFoundError):
        return f"no model {repo_id} at {endpoint}: check the id; if it is private, sign in with `hf auth login`"
    if caused_by(errors.DisabledRepoError):
        return f"{repo_id} has been disabled at {endpoint}; choose another model"
    if caused_by(errors.FileMetadataError):
        return f"{endpoint} does not answer as the Hub does; check HF_ENDPOINT and the proxy settings"
    refusals = [cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)]
    if refusals:
        return _explain_status(refusals[0].response.status_code, repo_id, endpoint)
    reason = f"{type(causes[-1]).__name__}: {causes[-1]}"
    if caused_by(errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError, TimeoutError):
        return f"cannot reach {endpoint} for {repo_id} ({reason}); check the network and run again: it resumes"
    return f"cannot download {repo_id} from {endpoint} ({reason}); run again: it resumes"


def _explain_status(status: int, repo_id: str, endpoint: str) -> str:
    login = "`hf auth login`"
    if status == 401:
        return f"{endpoint} does not accept the token for {repo_id}; sign in again with {login}"
    if status == 403:
        return f"the token may not read {repo_id}; allow it at {endpoint}/settings/tokens, then {login}"
    if status == 429:
        return f"{endpoint} limits the rate of requests (429); wait a few minutes, or sign in with {login}"
    if status >= 500:
        return f"{endpoint} has trouble of its own ({status}) with {repo_id}; run again later: it resumes"
    return f"{endpoint} answered {status} for {repo_id}; check the id and the revision"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def _forwarding_bar(progress: Progress) -> type[Any]:
    """Return a silent tqdm class that hands the bytes of a snapshot download to `progress`."""
    from tqdm.auto import tqdm

    # Newer clients keep two byte bars, the second of which counts what has reached the disk.
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
