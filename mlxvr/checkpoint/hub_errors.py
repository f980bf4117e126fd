"""Each way in which talking to the Hub goes wrong, as one line that says what to do.

The Hub's client raises some twenty kinds of error, often several lines long and chained. Here they become what a user
can act on: sign in, accept a licence, check the id, wait, look at the network.
"""

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["endpoint", "explain_download", "explain_upload"]

_LOGIN = "`hf auth login`"
_WRONG_SIZE = re.compile(r"should be of size (\d+) but has size (\d+) \((.+?)\)\.")


def endpoint() -> str:
    """Return the Hub's address as the environment has it now; the client itself read it when it was imported."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def explain_download(error: BaseException, repo_id: str, revision: str | None) -> str:
    """Say in one line what went wrong with a download and what to do."""
    from huggingface_hub import errors

    hub, page, causes = endpoint(), f"{endpoint()}/{repo_id}", _causes(error)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.OfflineModeIsEnabled):
        return f"{repo_id} is not (wholly) in the local cache and HF_HUB_OFFLINE is set; unset it to download"
    if caused_by(errors.GatedRepoError):
        return f"{repo_id} is gated: accept its licence at {page}, then sign in with {_LOGIN}"
    if caused_by(errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}; expected a branch, tag or commit listed at {page}"
    if caused_by(errors.RepositoryNotFoundError):
        return f"no model {repo_id} at {hub}: check the id; if it is private, sign in with {_LOGIN}"
    if caused_by(errors.DisabledRepoError):
        return f"{repo_id} has been disabled at {hub}; choose another model"
    if caused_by(errors.FileMetadataError):
        return f"{hub} does not answer as the Hub does; check HF_ENDPOINT and the proxy settings"
    refusal = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    if refusal is not None:
        return _explain_refused_download(refusal, repo_id)
    for cause in causes:
        if sizes := _WRONG_SIZE.search(str(cause)):
            announced, received, name = sizes.groups()
            name = name.rpartition("/")[2]  # it may be a URL's end
            return (
                f"{name} of {repo_id} came with {received} bytes where {hub} announced {announced}; nothing of it was "
                "kept: run again, and if that does not help, look at the proxy or mirror in between"
            )
    if caused_by(errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError, TimeoutError):
        return f"cannot reach {hub} for {repo_id} ({_reason(causes)}); check the network and run again: it resumes"
    return f"cannot download {repo_id} from {hub} ({_reason(causes)}); run again: it resumes"


def explain_upload(error: BaseException, repo_id: str, revision: str | None) -> str:
    """Say in one line what went wrong with an upload, or with the question whether it is allowed, and what to do."""
    from huggingface_hub import errors

    hub, causes = endpoint(), _causes(error)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so nothing can be uploaded to {repo_id}; unset it"
    if caused_by(errors.LocalTokenNotFoundError):
        return f"not signed in to {hub}: make a token with the role write at {hub}/settings/tokens, then {_LOGIN}"
    if caused_by(errors.HFValidationError):
        return f"{repo_id!r} is no Hub id ({_reason(causes)}); expected org/name"
    if caused_by(errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r} to upload to; expected a branch"
    refusal = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    metadata = next((str(cause) for cause in causes if "metadata in README.md" in str(cause)), None)
    if metadata is not None:
        return f"{hub} refuses the model card ({_one_line(metadata)}); correct the head of README.md and upload again"
    if refusal is not None:
        return _explain_refused_upload(refusal, repo_id)
    if caused_by(errors.HTTPError, ConnectionError, TimeoutError):
        return f"cannot reach {hub} for {repo_id} ({_reason(causes)}); check the network and upload again: it resumes"
    return f"cannot upload to {repo_id} at {hub} ({_reason(causes)}); upload again: it resumes"


def _explain_refused_download(refusal: "HfHubHTTPError", repo_id: str) -> str:
    hub, status = endpoint(), refusal.response.status_code
    if status == 401:
        return f"{hub} does not accept the token for {repo_id}; sign in again with {_LOGIN}"
    if status == 403:
        return f"the token may not read {repo_id}; allow it at {hub}/settings/tokens, then {_LOGIN}"
    if status == 429:
        return f"{hub} limits the rate of requests (429); {_how_long(refusal)}, or sign in with {_LOGIN}"
    if status >= 500:
        return f"{hub} has trouble of its own ({status}) with {repo_id}; run again later: it resumes"
    return f"{hub} answered {status} for {repo_id}; check the id and the revision"


def _explain_refused_upload(refusal: "HfHubHTTPError", repo_id: str) -> str:
    hub, status = endpoint(), refusal.response.status_code
    said = f"{status}: {_one_line(refusal.server_message)}" if refusal.server_message else str(status)
    if status == 401:
        return (
            f"{hub} does not accept the token ({said}); make one with the role write at {hub}/settings/tokens, then "
            f"{_LOGIN}; HF_TOKEN, where it is set, comes before that"
        )
    if status == 403:
        return (
            f"the token may not write to {repo_id} ({said}); use a name of your own or of an organization that you "
            f"write for, and a token with the role write ({hub}/settings/tokens, then {_LOGIN})"
        )
    if status == 404:
        return f"no model {repo_id} at {hub}, or the token may not see it ({said}); check the id"
    if status in (409, 412):
        return f"{repo_id} is in the way or being changed at the same time ({said}); upload again, or choose another id"
    if status == 413:
        return f"{hub} finds a file of this folder too large for {repo_id} ({said}); convert with fewer bits"
    if status == 429:
        return f"{hub} limits the rate of requests (429); {_how_long(refusal)}, then upload again: it resumes"
    if status >= 500:
        return f"{hub} has trouble of its own ({said}) with {repo_id}; upload again later: it resumes"
    return f"{hub} refused the upload to {repo_id} ({said}); check the id, the revision and README.md"


def _how_long(refusal: "HfHubHTTPError") -> str:
    """Say how long the Hub wants us to wait, as far as its headers tell."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = refusal.response.headers
    limit, after = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
    seconds = limit.reset_in_seconds if limit is not None else int(after) if after.isdecimal() else None
    return "wait a few minutes" if seconds is None else f"wait {seconds} seconds"


def _reason(causes: list[BaseException]) -> str:
    return _one_line(f"{type(causes[-1]).__name__}: {causes[-1]}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return an exception and what it was raised from, outermost first."""

    def walk(error: BaseException | None) -> Iterator[BaseException]:
        while error is not None:
            yield error
            error = error.__cause__

    return list(walk(error))
