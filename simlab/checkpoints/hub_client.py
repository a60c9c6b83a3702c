"""Requests to the hub: bounded in time, without huggingface_hub's own output, each failure one line."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

import httpx
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

from simlab.checkpoints.hub_limits import LOGIN, GivenUpError, Limits, answer_of, passing
from simlab.config import ConfigError, nearest, printable

REFS_SHOWN = 3  # branches and tags that a line names
_REFS_LIMIT = 8 << 20  # bytes of the list of branches and tags
# Seconds between tries of a request that the hub answers with its own error.
WAITS = (1.0, 2.0, 4.0)
_Answer = TypeVar("_Answer")


@contextmanager
def _bounded(limits: Limits) -> Iterator[None]:
    """Give the client our hooks, and silence huggingface_hub. Xet, which has no such hooks, is off."""
    client, hooks = get_session(), get_session().event_hooks
    bars, no_xet = not are_progress_bars_disabled(), constants.HF_HUB_DISABLE_XET
    # httpx logs every request, which Hydra prints in a launcher's process.
    logs = {log: log.level for log in map(logging.getLogger, ("huggingface_hub", "httpx"))}
    limits.begin()
    client.event_hooks = {
        "request": [*hooks["request"], limits.request],
        "response": [*hooks["response"], limits.response],
    }
    constants.HF_HUB_DISABLE_XET = True
    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if bars:
                disable_progress_bars()
            yield
    finally:
        client.event_hooks, constants.HF_HUB_DISABLE_XET = hooks, no_xet
        for log, level in logs.items():
            log.setLevel(level)
        if bars:
            enable_progress_bars()


def as_given(repo: str, revision: str | None) -> str:
    """A repository's revision as the command line has it."""
    return f"source.path={repo}" + (f" source.revision={revision}" if revision else "")


def ask(
    repo: str,
    revision: str | None,
    what: str,
    call: Callable[[], _Answer],
    most: int,
    *,
    tries: int = 2,
) -> _Answer:
    """The value of ``call``, which asks the hub; an error of the hub itself is tried again.

    what: the file that is asked for. most: its bytes at most. tries: how often huggingface_hub asks for
    its bytes where none come. Raises ConfigError, one line, and RemoteEntryNotFoundError for a file
    that the repository hasn't got.
    """
    waits, limits = iter(WAITS), Limits(most, tries)
    while True:
        try:
            with _bounded(limits):
                return call()
        except RemoteEntryNotFoundError:
            raise
        except (GivenUpError, httpx.HTTPError, OSError, ValueError, TypeError, KeyError) as error:
            wait = next(waits, None) if _passing(error) else None
            if wait is None:
                raise told(repo, revision, what, error) from error
            time.sleep(wait)


def _passing(error: Exception) -> bool:
    """True for an answer of the hub that may be another one soon."""
    if isinstance(error, HfHubHTTPError):
        return passing(error.response)
    return isinstance(error, GivenUpError) and error.again


def told(repo: str, revision: str | None, what: str, error: Exception) -> ConfigError:
    """The one line for what a request to the hub has raised."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return ConfigError(f"{as_given(repo, revision)}: {_line(repo, revision, what, error)}")


def _line(repo: str, revision: str | None, what: str, error: Exception) -> str:
    absent = f"no such folder, {what} of it is not in the local hub cache"
    hub = f"the hub ({urlsplit(constants.ENDPOINT).hostname})"
    if isinstance(error, GivenUpError):
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
        return f"{hub} {answer_of(error.response)}"
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
        return (
            f"{what} has arrived with another size than {hub} names: try again; if it stays so, a "
            "login page or a proxy answers in its place"
        )
    silent = isinstance(error, httpx.TimeoutException)
    reached = "does not answer" if silent else "can't be reached"
    return f"{absent}, and {hub} {reached}"


def _refs(repo: str, revision: str | None) -> str:
    """``"; it has …"``: some branches and tags of a repository, and the nearest; empty if unknown."""
    try:
        with _bounded(Limits(_REFS_LIMIT, 1)):
            refs = HfApi().list_repo_refs(repo)
    except (GivenUpError, httpx.HTTPError, OSError, ValueError, TypeError, KeyError):
        return ""  # the line that says what is wrong is without them
    names = [printable(ref.name) for ref in (*refs.branches, *refs.tags)]
    more = f" and {len(names) - REFS_SHOWN} more" if len(names) > REFS_SHOWN else ""
    return f"; it has {', '.join(names[:REFS_SHOWN])}{more}{nearest(revision or '', names)}"
