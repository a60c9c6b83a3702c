"""A hub that begins to answer and stops, or doesn't stop: it takes neither minutes nor the disk."""

import contextlib
import gzip
import hashlib
import time

import pytest
from hub_server import REPO, SLEEP, cache, hub, pushed
from huggingface_hub import constants
from test_hub import WEIGHTS, line, on

__all__ = ["cache", "hub", "pushed"]  # fixtures

STALLS = {  # what comes before nothing more does: headers, half a body
    "list": ("/api/models/org/olmo", 0),
    "half a list": ("/api/models/org/olmo", 99),
    "config": ("config.json", 0),
    "half a config": ("config.json", 99),
    "weights": ("/lfs/", 0),
    "half of the weights": ("/lfs/", 50_000),
}


@pytest.mark.parametrize("case", STALLS)
def test_nothing_more_comes(hub, pushed, cache, capfd, monkeypatch, case):
    """The hub is given up within its limit and a second's wait, however often it begins an answer."""
    monkeypatch.setattr("time.sleep", SLEEP)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 2)
    where, count = STALLS[case]

    def stall(handler, path):
        if where not in path or handler.command != "GET":
            return False
        handler.say(200, {"Content-Length": "100000"}, b"x" * count, cut=None)
        return handler.wait()

    hub.fault = stall
    begun = time.monotonic()
    text = line(capfd)
    assert time.monotonic() - begun < 2 + 1 + 1
    assert "has sent nothing for 2 s" in text or "does not answer" in text


def test_more_than_it_can_be(hub, pushed, cache, capfd):
    """A small file, or a list, of gigabytes is refused by its size, or where it comes to that."""
    commit = hub.repos[REPO][0]["main"]
    files = hub.repos[REPO][1][commit]
    endless = {
        "Transfer-Encoding": "chunked",
        "Content-Length": None,
        "ETag": '"e"',
        "X-Repo-Commit": commit,
    }
    sent = []

    def pour(handler, path):
        if not path.endswith(where):
            return False
        handler.say(200, endless)
        with contextlib.suppress(ConnectionError):
            while handler.command == "GET" and len(sent) < 200:
                handler.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
                sent.append(1 << 20)
        handler.close_connection = True
        return True

    hub.fault = pour
    for where, limit in (
        ("/olmo", 32),
        ("config.json", 2),
        ("/lfs/" + hashlib.sha256(files[WEIGHTS]).hexdigest(), 1),
    ):
        sent.clear()
        assert "sends more than" in line(capfd)
        assert sum(sent) <= (limit + 16) << 20, where  # sockets were seen to hold 8 MiB
    assert max(p.stat().st_size for p in cache.rglob("*") if p.is_file()) <= len(files[WEIGHTS])
    hub.fault = lambda handler, path: False
    for name, count, limit in (
        ("config.json", (2 << 20) + 1, 2),
        ("tokenizer.json", (64 << 20) + 1, 64),
    ):
        hub.repos["org/large"] = {"main": "c" * 40}, {"c" * 40: {**files, name: bytes(count)}}
        text = line(capfd, "org/large")
        assert f"{name} has {count} bytes; simlab reads {limit} MiB of one at most" in text
        assert not hub.gets(f"/lfs/{hashlib.sha256(bytes(count)).hexdigest()}")


def test_a_compressed_answer(hub, pushed, cache, capfd):
    """It isn't asked for; of it a few bytes can become gigabytes."""
    hub.fault = on(
        "config.json",
        lambda h, path: h.say(
            200,
            {"Content-Encoding": "gzip", "ETag": '"e"', "X-Repo-Commit": "c" * 40},
            gzip.compress(bytes(1 << 24)),
        ),
    )
    assert "sends compressed files" in line(capfd)


def test_too_large_for_http(hub, pushed, cache, capfd, monkeypatch):
    """The hub gives files of more than 50 GB by Xet alone."""
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 1000)
    commit = hub.repos[REPO][0]["main"]
    assert f"`hf download {REPO} --revision {commit}` brings it to the local cache" in line(capfd)
    assert not [path for _, path, _ in hub.asked if "/lfs/" in path]
