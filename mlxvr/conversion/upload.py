"""Upload of a converted folder to a model repository on the Hub.

`check_upload` asks, before hours of work begin, whether the final upload can succeed: is somebody signed in, and may
this token write there? `upload` then sends the folder as one commit, so that the repository holds either the old model
or the new one; weights of an earlier upload are deleted in the same commit. Only the files that make up a converted
folder are sent.

`HfApi.upload_folder` of the Hub's client does the transfer: through Xet where `hf_xet` is installed, over plain HTTP
elsewhere. An upload that broke is resumed by calling it again: data that reached the Hub is not sent twice (Xet: pieces
of files, HTTP: whole files). The client splits commits only above 250 files; a folder has about fifteen.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvr.checkpoint import hub
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.checkpoint.hub_errors import endpoint, explain_upload
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.runtime.hooks import Progress
from mlxvr.storage.paths import list_visible

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["check_upload", "upload"]

_REQUIRED = ("mlxvr.json", "config.json", "README.md")
_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
_log = logging.getLogger(__name__)


def check_upload(repo_id: str) -> None:
    """Ask the Hub whether `upload` to `repo_id` would be allowed; nothing is written.

    The check of an existing repository is the Hub's own. For one that must be created, the rights of the account and
    the token decide; what they do not cover (such as a full quota) shows only in `upload`.

    Raises `ConfigError` when nobody is signed in, the token or the account may not write there, the name is no Hub id,
    or the Hub cannot be reached.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    repo_id = _checked_id(repo_id)
    with _explained(repo_id, None):
        api = _api()
        account = api.whoami()
        token = (account.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise ConfigError(
                f"the token of {account.get('name')} may only read: make one with the role write at "
                f"{endpoint()}/settings/tokens, then `hf auth login`"
            )
        try:
            api.auth_check(repo_id, write=True)
            return
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:
                raise
    _check_namespace(repo_id, account, token)


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Send a converted folder to the model repository `repo_id`, created if necessary; return the commit's URL.

    Args:
        folder: a complete converted folder: weights, `config.json`, `mlxvr.json`, tokenizer, model card.
        repo_id: `org/name`.
        private: create the repository private. An existing public one is refused, not made private.
        revision: the branch to commit to (default: `main`), created if necessary.
        progress: `progress("upload", bytes_done, bytes_total)` when the transfer begins and when it is done; in between
            the client draws its own bars on a terminal's stderr.

    Raises `CheckpointError`, before any request, when the folder is not a complete converted one, and `ConfigError`
    when the Hub refuses or cannot be reached.
    """
    path, repo_id = Path(folder).expanduser(), _checked_id(repo_id)
    names = _files(path)
    total = sum((path / name).stat().st_size for name in names)
    _log.info("uploading %d files, %d bytes, to %s", len(names), total, repo_id)
    with _explained(repo_id, revision):
        api = _api()
        api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: the organization's default
        if private and not api.model_info(repo_id).private:
            raise ConfigError(
                f"{repo_id} exists and is public, but a private upload was asked for; choose another id, or make it "
                f"private at {endpoint()}/{repo_id}/settings"
            )
        if revision is not None:
            _ensure_branch(api, repo_id, revision)
        if progress is not None:
            progress("upload", 0, total)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=path,
            revision=revision,
            commit_message="Weights converted by mlxvr",
            allow_patterns=names,
            delete_patterns=list(_WEIGHTS),
        )
    if progress is not None:
        progress("upload", total, total)
    return str(commit.commit_url)


def _files(folder: Path) -> list[str]:
    """Return the names of the files to send; raises `CheckpointError` unless they are a complete converted folder."""
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}: `mlxvr convert` did not write it, or it is incomplete"
        )
    opened = ModelFolder.open(folder)
    opened.check_shapes()
    if not isinstance(opened.settings.get("source"), str):
        raise CheckpointError(f"{folder / 'mlxvr.json'} names no source: `mlxvr convert` did not write this folder")
    weights = {info.file.name for info in opened.tensors.values()}
    names = {path.name for pattern in hub.NEEDED_FILES for path in list_visible(folder, pattern) if path.is_file()}
    return sorted(name for name in names if name in weights or not name.endswith(".safetensors"))


def _checked_id(repo_id: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = hub.repo_id(repo_id)
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("no organization or user before the name")
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{repo_id!r} is no id to upload to ({reason}); expected org/name") from error
    return name


def _check_namespace(repo_id: str, account: dict[str, Any], token: dict[str, Any]) -> None:
    """Raise `ConfigError` unless the account may create `repo_id`, as far as its description shows."""
    name, owner = account.get("name"), repo_id.partition("/")[0]
    roles = {org.get("name"): org.get("roleInOrg") for org in account.get("orgs") or []}
    if owner.lower() != str(name).lower() and owner not in roles:
        others = ", ".join(f"{org}/..." for org in roles)
        raise ConfigError(
            f"{repo_id} cannot be created by {name}, who is no member of {owner}; expected {name}/..."
            + (f" or {others}" if others else "")
        )
    if roles.get(owner) == "read":
        raise ConfigError(f"{name} may only read in {owner}; ask its owners for the role write, or choose another id")
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and isinstance(scopes, list):
        entities = [scope.get("entity") or {} for scope in scopes if "repo.write" in (scope.get("permissions") or [])]
        if not any(str(entity.get("name")).lower() in (owner.lower(), repo_id.lower()) for entity in entities):
            raise ConfigError(
                f"the token of {name} may not write to the repositories of {owner}: allow it at "
                f"{endpoint()}/settings/tokens, then `hf auth login`"
            )


def _ensure_branch(api: "HfApi", repo_id: str, revision: str) -> None:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), library_name="mlxvr")


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn any error of the Hub's client into a `ConfigError` of one line."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(explain_upload(error, repo_id, revision)) from error
