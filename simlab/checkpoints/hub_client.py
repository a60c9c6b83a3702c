"""Requests to the hub: bounded in time, without huggingface_hub's own output, each failure one line."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # as documented
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from simlab.config import ConfigError, nearest, printable

# httpx's, under the name by which huggingface_hub has it: what a broken download raises.
HTTPError = cast("type[Exception]", HfHubHTTPError.__mro__[1])
REFS_SHOWN = 3  # branches and tags that a line names
WAITS = (
    1.0,
    2.0,
    4.0,
)  # seconds between tries of a request that the hub answers with its own error
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_Answer = TypeVar("_Answer")


class UnansweredError(Exception):
    """The hub was asked often and long enough; the text is what it does instead."""


class _Patience:
    """Hooks of one client for one file: they end huggingface_hub's retries, which may take minutes.

    A request is sent again within huggingface_hub's own time limit (10 s) from its first
    time on; one that asks for a later part of its file begins anew, for bytes have arrived.
    """

    def __init__(self) -> None:
        self.limit = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        self.first: dict[tuple[str, str], tuple[float, int]] = {}  # time, and first byte asked for
        self.answer = f"has not answered for {self.limit:.0f} s (HF_HUB_DOWNLOAD_TIMEOUT=SECONDS)"

    def request(self, request: Any) -> None:
        """Before a request: refuse it where time is up, and bound its own time limit."""
        key, now = (request.method, str(request.url)), time.monotonic()
        start = int(request.headers.get("Range", "bytes=0-")[6:].split("-")[0] or 0)
        since, before = self.first.get(key, (now, start))
        if start > before:
            since = now
        self.first[key] = since, start
        left = self.limit - (now - since)
        if left <= 0:
            raise UnansweredError(self.answer)
        limits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            name: left if limit is None else min(left, limit) for name, limit in limits.items()
        }

    def response(self, response: Any) -> None:
        """After a response: note an error; where the hub asks to wait too long, don't."""
        if response.status_code < 400:
            return
        self.answer = _status(response)
        wait = response.headers.get("Retry-After", "0")
        limited = response.status_code == 429 and "RateLimit" in response.headers
        if limited or not wait.isdigit() or int(wait) > self.limit / 2:
            raise UnansweredError(self.answer)


def _status(response: Any) -> str:
    """The clause for an error status: the hub "answers 500 …"."""
    code = response.status_code
    if code != 429:
        return f"answers {code} {printable(response.reason_phrase)[:80]}; try again later"
    wait = response.headers.get("Retry-After")
    ask = f" and asks to wait {int(wait)} s" if wait and wait.isdigit() else ""
    return f"answers 429, too many requests,{ask or ' for now'}; a token raises the limit: {LOGIN}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence huggingface_hub's log, warnings and bars, and give the client our hooks."""
    client, patience = get_session(), _Patience()
    hooks, bars = client.event_hooks, not are_progress_bars_disabled()
    # httpx logs every request, which Hydra prints in a launcher's process.
    names = ("huggingface_hub", HTTPError.__module__.partition(".")[0])
    logs = {log: log.level for log in map(logging.getLogger, names)}
    client.event_hooks = {
        "request": [*hooks["request"], patience.request],
        "response": [*hooks["response"], patience.response],
    }
    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if bars:
                disable_progress_bars()
            yield
    finally:
        client.event_hooks = hooks
        for log, level in logs.items():
            log.setLevel(level)
        if bars:
            enable_progress_bars()


def as_given(repo: str, revision: str | None) -> str:
    """A repository's revision as the command line has it."""
    return f"source.path={repo}" + (f" source.revision={revision}" if revision else "")


def ask(repo: str, revision: str | None, what: str, call: Callable[[], _Answer]) -> _Answer:
    """The value of ``call``, which asks the hub; an error of the hub itself is tried again.

    what: the file that is asked for. Raises ConfigError, one line, and RemoteEntryNotFoundError for a
    file that the repository hasn't got.
    """
    waits = iter(WAITS)
    while True:
        try:
            with _quiet():
                return call()
        except RemoteEntryNotFoundError:
            raise
        except HfHubHTTPError as error:
            wait = next(waits, None) if error.response.status_code >= 500 else None
            if wait is None:
                raise _told(repo, revision, what, error) from error
            time.sleep(wait)
        except (UnansweredError, HTTPError, OSError, ValueError, TypeError, KeyError) as error:
            raise _told(repo, revision, what, error) from error


def _told(repo: str, revision: str | None, what: str, error: Exception) -> ConfigError:
    """The one line for what a request to the hub has raised."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return ConfigError(f"{as_given(repo, revision)}: {_line(repo, revision, what, error)}")


def _line(repo: str, revision: str | None, what: str, error: Exception) -> str:
    absent = f"no such folder, {what} of it is not in the local hub cache"
    hub = f"the hub ({urlsplit(constants.ENDPOINT).hostname})"
    if isinstance(error, UnansweredError):
        return f"{hub} {error}"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return f"{absent}, and HF_HUB_OFFLINE is set: without it, simlab asks the hub"
    if isinstance(error, GatedRepoError):
        return f"gated: ask for access on the repository's page, then {LOGIN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such folder, and no such repository that {hub} shows to you; private: {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no such branch, tag or commit{_refs(repo, revision)}"
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        if code in (401, 403):
            return f"{hub} answers {code}: your token is refused, or one is needed; {LOGIN}"
        return f"{hub} {_status(error.response)}"
    if isinstance(error, HFValidationError):
        return str(error).splitlines()[0]
    if isinstance(error, FileMetadataError | ValueError | TypeError | KeyError):
        return (
            f"what answers as {hub} isn't a hub: a login page, a proxy, or another HF_ENDPOINT? "
            "Open it in a browser"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"{error.filename or constants.HF_HUB_CACHE}: {os.strerror(error.errno)}: the hub's cache "
            "must be a folder that can be written to, with room; HF_HOME names another"
        )
    if isinstance(error, OSError):  # huggingface_hub's check of what has arrived
        return f"{what} has arrived with another size than {hub} names; try again"
    silent = type(error).__name__.endswith("Timeout")
    reached = "does not answer" if silent else "can't be reached"
    return f"{absent}, and {hub} {reached}"


def _refs(repo: str, revision: str | None) -> str:
    """``"; it has …"``: some branches and tags of a repository, and the nearest; empty if unknown."""
    try:
        with _quiet():
            refs = HfApi().list_repo_refs(repo)
    except (UnansweredError, HTTPError, OSError, ValueError, TypeError, KeyError):
        return ""  # the line that says what is wrong is without them
    names = [printable(ref.name) for ref in (*refs.branches, *refs.tags)]
    more = f" and {len(names) - REFS_SHOWN} more" if len(names) > REFS_SHOWN else ""
    return f"; it has {', '.join(names[:REFS_SHOWN])}{more}{nearest(revision or '', names)}"
