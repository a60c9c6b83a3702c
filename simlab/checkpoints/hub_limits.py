"""Limits of time and bytes on requests to the hub, as hooks of huggingface_hub's HTTP client."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import cast

import httpx
from huggingface_hub import constants

from simlab.config import printable

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_OTHER_LIMIT = 1 << 20  # bytes of the body of an error or of a redirection


class GivenUpError(Exception):
    """The hub is asked no more; the text says what it does instead of answering.

    again: it has answered with an error of its own, so that it is worth while to wait and ask again.
    """

    def __init__(self, text: str, again: bool = False) -> None:
        super().__init__(text)
        self.again = again


class Limits:
    """The hooks for one file, or one list. They end huggingface_hub's retries, which may take minutes.

    The hub is given up where for huggingface_hub's own time limit (10 s), over all tries, nothing new
    has come: no answer to what is asked for the first time, and no byte after those that have come.

    most: bytes of the body at most, without which a body could fill memory or disk. tries: of a body of
    which nothing more comes, as far as huggingface_hub tries; the time is divided among them.
    """

    def __init__(self, most: int, tries: int) -> None:
        self.most, self.tries = most, tries
        self.seconds = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        self.since = time.monotonic()  # when the last new thing came
        self.come = 0  # bytes of the body
        self.heads: set[str] = set()
        self.answer, self.again = "can't be reached", False

    def begin(self) -> None:
        """Before another try with everything that huggingface_hub asks."""
        self.heads.clear()

    def request(self, request: httpx.Request) -> None:
        """Before a request: refuse it where time is up or it is futile, and bound its own time."""
        left = self.seconds - (time.monotonic() - self.since)
        if left <= 0:
            silent = f"has sent nothing for {self.seconds:.0f} s (HF_HUB_DOWNLOAD_TIMEOUT=SECONDS)"
            raise GivenUpError(self.answer if self.again else silent)
        if request.method == "HEAD":
            # Where the second of them can't connect, huggingface_hub goes on without these hooks.
            if str(request.url) in self.heads:
                raise GivenUpError(self.answer, self.again)
            self.heads.add(str(request.url))
        else:
            own = (request.extensions.get("timeout") or {}).get("read")  # less, of asides
            left = min(left, self.seconds / self.tries, own or left)
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), left)
        request.headers["Accept-Encoding"] = "identity"  # the bytes that come are those of the file

    def response(self, response: httpx.Response) -> None:
        """After a response's headers: note an error, and count the body."""
        stream = cast("httpx.SyncByteStream", response.stream)
        if response.is_success and response.request.method != "HEAD":
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise GivenUpError("sends compressed files, of which the size can't be known")
            part = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            response.stream = _Counted(stream, self._body, int(part[1]) if part else 0)
            return
        response.stream = _Counted(stream, self._other, 0)
        if response.status_code < 400:
            # A GET that is sent again is redirected again: that is nothing new.
            if response.request.method == "HEAD":
                self.since, self.again = time.monotonic(), False
            return
        self.answer, self.again = answer_of(response), passing(response)
        wait = response.headers.get("Retry-After", "0")
        limited = response.status_code == 429 and "RateLimit" in response.headers
        if limited or not wait.isdigit() or int(wait) > self.seconds / 2:
            raise GivenUpError(self.answer)

    def _body(self, stop: int) -> None:
        """Bytes have come, up to the one before ``stop``."""
        if stop > self.most:
            raise GivenUpError(f"sends more than the {self.most} bytes that are allowed here")
        if stop > self.come:
            self.since, self.come = time.monotonic(), stop

    def _other(self, stop: int) -> None:
        if stop > _OTHER_LIMIT:
            raise GivenUpError(
                f"sends more than {_OTHER_LIMIT} bytes of a page in place of an answer"
            )


class _Counted(httpx.SyncByteStream):
    """A stream of bytes that tells ``come`` where each piece of it ends."""

    def __init__(self, stream: httpx.SyncByteStream, come: Callable[[int], None], at: int) -> None:
        self.stream, self.come, self.at = stream, come, at

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.stream:
            self.at += len(piece)
            self.come(self.at)
            yield piece

    def close(self) -> None:
        """Let the connection go."""
        self.stream.close()


def passing(response: httpx.Response) -> bool:
    """True for an error status that may be another one soon."""
    return response.status_code >= 500 or response.status_code in (408, 429)


def answer_of(response: httpx.Response) -> str:
    """The clause for an error status: the hub "answers 500 …"."""
    code = response.status_code
    if code != 429:
        return f"answers {code} {printable(response.reason_phrase)[:80]}; try again later"
    wait = response.headers.get("Retry-After")
    ask = f" and asks to wait {int(wait)} s" if wait and wait.isdigit() else ""
    return f"answers 429, too many requests,{ask or ' for now'}; a token raises the limit: {LOGIN}"
