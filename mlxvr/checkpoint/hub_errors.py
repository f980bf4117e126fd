"""Each way in which talking to the Hub goes wrong, as one line that says what to do.

The Hub's client raises some twenty kinds of error, often several lines long and chained. Here they become what a user
can act on: sign in, accept a licence, check the id, wait, look at the network. The first row of a table that fits an
error, or one of the errors that it was raised from, is the answer: errors by name, then by text, then by the status of
the Hub's refusal.
"""

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["endpoint", "explain_download", "explain_upload"]

_LOGIN = "`hf auth login`"
_ANY_5XX, _ANY_OTHER = 500, 0
_IN_THE_WAY = (
    "{repo_id} is in the way or being changed at the same time ({refusal}); upload again, or choose another id"
)


class _Explanations(NamedTuple):
    """What to say, with {hub}, {page}, {repo_id}, {revision!r}, {reason}, {status}, {refusal}, {wait} and {login}."""

    errors: dict[str, str]  # by the name in huggingface_hub.errors
    texts: dict[str, str]  # by a pattern in an error's text, whose groups can be named, too
    refusals: dict[int, str]  # by the HTTP status
    unreachable: str
    otherwise: str


_DOWNLOAD = _Explanations(
    {
        "OfflineModeIsEnabled": "{repo_id} is not (wholly) in the local cache and HF_HUB_OFFLINE is set; unset it to "
        "download",
        "GatedRepoError": "{repo_id} is gated: accept its licence at {page}, then sign in with {login}",
        "RevisionNotFoundError": "{repo_id} has no revision {revision!r}; expected a branch, tag or commit listed at "
        "{page}",
        "RepositoryNotFoundError": "no model {repo_id} at {hub}: check the id; if it is private, sign in with {login}",
        "DisabledRepoError": "{repo_id} has been disabled at {hub}; choose another model",
        "FileMetadataError": "{hub} does not answer as the Hub does; check HF_ENDPOINT and the proxy settings",
    },
    {
        r"should be of size (?P<announced>\d+) but has size (?P<received>\d+) \((?P<path>.+?)\)\.": "{path} of "
        "{repo_id} came with {received} bytes where {hub} announced {announced}; nothing of it was kept: run again, "
        "and if that does not help, look at the proxy or mirror in between",
    },
    {
        401: "{hub} does not accept the token for {repo_id}; sign in again with {login}",
        403: "the token may not read {repo_id}; allow it at {hub}/settings/tokens, then {login}",
        429: "{hub} limits the rate of requests (429); {wait}, or sign in with {login}",
        _ANY_5XX: "{hub} has trouble of its own ({status}) with {repo_id}; run again later: it resumes",
        _ANY_OTHER: "{hub} answered {status} for {repo_id}; check the id and the revision",
    },
    "cannot reach {hub} for {repo_id} ({reason}); check the network and run again: it resumes",
    "cannot download {repo_id} from {hub} ({reason}); run again: it resumes",
)

_UPLOAD = _Explanations(
    {
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, so nothing can be uploaded to {repo_id}; unset it",
        "LocalTokenNotFoundError": "not signed in to {hub}: make a token with the role write at {hub}/settings/tokens, "
        "then {login}",
        "HFValidationError": "{repo_id!r} is no Hub id ({reason}); expected org/name",
        "RevisionNotFoundError": "{repo_id} has no revision {revision!r} to upload to; expected a branch",
    },
    {
        r"(?s)(?P<text>.*metadata in README\.md.*)": "{hub} refuses the model card ({text}); correct the head of "
        "README.md and upload again",
    },
    {
        401: "{hub} does not accept the token ({refusal}); make one with the role write at {hub}/settings/tokens, then "
        "{login}; HF_TOKEN, where it is set, comes before that",
        403: "the token may not write to {repo_id} ({refusal}); use a name of your own or of an organization that you "
        "write for, and a token with the role write ({hub}/settings/tokens, then {login})",
        404: "no model {repo_id} at {hub}, or the token may not see it ({refusal}); check the id",
        409: _IN_THE_WAY,
        412: _IN_THE_WAY,
        413: "{hub} finds a file of this folder too large for {repo_id} ({refusal}); convert with fewer bits",
        429: "{hub} limits the rate of requests (429); {wait}, then upload again: it resumes",
        _ANY_5XX: "{hub} has trouble of its own ({refusal}) with {repo_id}; upload again later: it resumes",
        _ANY_OTHER: "{hub} refused the upload to {repo_id} ({refusal}); check the id, the revision and README.md",
    },
    "cannot reach {hub} for {repo_id} ({reason}); check the network and upload again: it resumes",
    "cannot upload to {repo_id} at {hub} ({reason}); upload again: it resumes",
)


def endpoint() -> str:
    """Return the Hub's address as the environment has it now; the client itself read it when it was imported."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def explain_download(error: BaseException, repo_id: str, revision: str | None) -> str:
    """Say in one line what went wrong with a download and what to do."""
    return _explain(_DOWNLOAD, error, repo_id, revision)


def explain_upload(error: BaseException, repo_id: str, revision: str | None) -> str:
    """Say in one line what went wrong with an upload, or with the question whether it is allowed, and what to do."""
    return _explain(_UPLOAD, error, repo_id, revision)


def _explain(table: _Explanations, error: BaseException, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import errors

    causes = list(_causes(error))
    facts: dict[str, Any] = {
        "hub": endpoint(),
        "page": f"{endpoint()}/{repo_id}",
        "repo_id": repo_id,
        "revision": revision,
        "reason": _one_line(f"{type(causes[-1]).__name__}: {causes[-1]}"),
        "login": _LOGIN,
    }
    for name, line in table.errors.items():
        if any(isinstance(cause, getattr(errors, name)) for cause in causes):
            return line.format(**facts)
    for pattern, line in table.texts.items():
        for cause in causes:
            if match := re.search(pattern, str(cause)):
                groups = {name: _one_line(text) for name, text in match.groupdict().items()}
                if "path" in groups:  # it may be a URL, which is known by its end
                    groups["path"] = groups["path"].rpartition("/")[2]
                return line.format(**facts, **groups)
    for cause in causes:
        if isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
            line = table.refusals.get(status) or table.refusals[_ANY_5XX if status >= 500 else _ANY_OTHER]
            message = f"{status}: {_one_line(cause.server_message)}" if cause.server_message else str(status)
            return line.format(**facts, status=status, refusal=message, wait=_wait(cause))
    network = (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError, TimeoutError)
    is_unreachable = any(isinstance(cause, network) for cause in causes)
    return (table.unreachable if is_unreachable else table.otherwise).format(**facts)


def _wait(refusal: "HfHubHTTPError") -> str:
    """Say how long the Hub wants us to wait, as far as its headers tell."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = refusal.response.headers
    limit, after = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
    seconds = limit.reset_in_seconds if limit is not None else int(after) if after.isdecimal() else None
    return "wait a few minutes" if seconds is None else f"wait {seconds} seconds"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__
