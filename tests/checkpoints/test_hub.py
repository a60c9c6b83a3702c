"""Downloads from a hub on loopback: whole, cut, refused, silent; each failure is one line."""

import hashlib
import shutil

import pytest
from conftest import in_process, write_olmo
from hub_server import LOGIN_PAGE, REPO, TOKEN, cache, hub, pushed
from huggingface_hub import close_session, constants
from test_legacy_olmo import OLMO2, fused, write_legacy

from simlab import compose
from simlab.checkpoints.checkpoint import Checkpoint
from simlab.checkpoints.hub import find
from simlab.config import ConfigError
from simlab.experiment import prepare

WEIGHTS = "model.safetensors"
__all__ = ["cache", "hub", "pushed"]  # fixtures


def same(folder, source):
    for path in source.rglob("*"):
        if path.is_file() and path.name != "generation_config.json":
            assert (folder / path.relative_to(source)).read_bytes() == path.read_bytes(), path


def line(capfd, path=REPO, revision=None):
    """The one line that a hub id gets; nothing else is printed, and no token is in it."""
    with pytest.raises(ConfigError) as caught:
        Checkpoint(path, revision)
    text, shown = str(caught.value), capfd.readouterr()
    assert "\n" not in text
    assert TOKEN not in text
    assert text.startswith(f"source.path={path}")
    assert shown.out + shown.err == ""
    return text


def on(ending, answer):
    """A fault of paths that end so."""
    return lambda handler, path: path.endswith(ending) and bool(answer(handler, path) or True)


def test_whole_then_from_the_cache(hub, pushed, cache, capfd, caplog):
    caplog.set_level("INFO")  # as Hydra's in a launcher's process
    folder = find(REPO, None).fetch()
    same(folder, pushed)
    assert (cache / "refs" / "main").read_text() == folder.name
    tokens = {path.split("/")[1]: token for path, token in hub.tokens.items()}
    assert tokens == {"api": f"Bearer {TOKEN}", "org": f"Bearer {TOKEN}", "lfs": None}
    asked = len(hub.asked)
    assert find(REPO, None).fetch() == folder == find(REPO, folder.name).fetch()
    assert len(hub.asked) == asked
    assert capfd.readouterr().err == ""
    assert not caplog.records


def test_every_layout(hub, cache, tmp_path, written):
    write_olmo(tmp_path / "hf")
    write_olmo(tmp_path / "shards", shards="100KB")
    for file in ("hf/tokenizer.json", "hf/tokenizer_config.json", "hf/added_tokens.json"):
        (tmp_path / file).write_text("{}")
    (tmp_path / "shards" / "tokenizer.model").write_text("another tokenizer")
    assert len(list((tmp_path / "shards").glob("model-*"))) > 1
    for kind in ("pt", "safetensors"):
        write_legacy(tmp_path / kind, fused(write_olmo(tmp_path / "x")), OLMO2, kind)
    layouts = {name: tmp_path / name for name in ("hf", "shards", "pt", "safetensors")}
    for name, folder in {**layouts, "core": written / "olmo2"}.items():
        shutil.copytree(folder, tmp_path / "pushed" / name)
        (tmp_path / "pushed" / name / "states.safetensors").unlink(missing_ok=True)
        hub.push(f"org/{name}", tmp_path / "pushed" / name)
        with_weights = Checkpoint(f"org/{name}")
        assert with_weights.identity() == Checkpoint(str(folder)).identity(), name
        found = find(f"org/{name}", None)
        assert not found.missing
        beside = {path.name for path in folder.glob("*token*")}
        assert {path.name for path in found.folder.glob("*token*")} == beside


def test_a_plan_knows_the_tokenizer(hub, pushed, cache):
    """What becomes of a text is known before the weights are downloaded."""
    given = ["source=checkpoint", f"source.path={REPO}", "inputs=text", "inputs.prompt=' !'"]
    plan = prepare(compose(given), download=False)
    assert (plan.checkpoint, plan.unit) == (None, "bytes")
    (pushed / "tokenizer.model").write_text("another tokenizer")
    hub.push(REPO, pushed)
    shutil.rmtree(cache)
    with pytest.raises(ConfigError, match=r"tokenizer\.model: a text needs the tokenizer"):
        prepare(compose(given))
    assert not list(cache.rglob(WEIGHTS))


def test_revisions(hub, pushed, tmp_path, capfd):
    write_olmo(tmp_path / "early", num_hidden_layers=2)
    capfd.readouterr()  # what transformers prints
    early = hub.push(REPO, tmp_path / "early", "stage1-step10-tokens1B")
    assert Checkpoint(REPO, "stage1-step10-tokens1B").model.depth == 2
    assert Checkpoint(REPO, early).model.depth == 2
    assert Checkpoint(REPO).model.depth == 5
    text = line(capfd, revision="stage1-step10-token1B")
    assert text.endswith(
        "it has main, stage1-step10-tokens1B; did you mean stage1-step10-tokens1B?"
    )


def cut(handler, data, most):
    """Of a large file some bytes, from where they are asked for, and the connection ends."""
    asked = handler.headers.get("Range")
    start = int(asked[6:-1]) if asked else 0
    headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if asked else {}
    handler.say(206 if asked else 200, headers, data[start:], cut=most)


def test_cut_and_resumed(hub, pushed, cache, capfd, monkeypatch):
    """The rest is asked for, not the whole again; no part of the file is twice or never there."""
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 1000
    )  # what is kept of a cut; it has 10 MB
    data = (pushed / WEIGHTS).read_bytes()

    def cuts(handler, path):
        if handler.command == "GET" and "/lfs/" in path and len(hub.gets(path)) < 3:
            cut(handler, data, len(data) // 3)
            return True
        return False

    hub.fault = cuts
    same(find(REPO, None).fetch(), pushed)
    parts = [part for method, path, part in hub.asked if method == "GET" and "/lfs/" in path]
    third = len(data) // 3 // 1000 * 1000
    assert parts == [None, f"bytes={third}-", f"bytes={2 * third}-"]
    assert capfd.readouterr().err == ""  # nor what huggingface_hub says of it


def test_interrupted_and_resumed(hub, cache, tmp_path, monkeypatch):
    """A later process asks for the shards that aren't whole, and of those for what hasn't come."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    write_olmo(tmp_path / "m", shards="100KB")
    shards = [path.read_bytes() for path in sorted((tmp_path / "m").glob("model-*"))]
    commit = hub.push(REPO, tmp_path / "m")
    place = "/lfs/" + hashlib.sha256(shards[1]).hexdigest()

    def break_off(handler, path):
        """Some of the second shard, and then nothing that can be used."""
        if path == place and handler.command == "GET":
            if hub.gets(place)[1:]:
                handler.say(403)
            else:
                cut(handler, shards[1], 30_000)
        return path == place

    hub.fault = break_off
    with pytest.raises(ConfigError, match="answers 403"):
        find(REPO, None).fetch()
    kept = next(cache.rglob("*.incomplete"))
    assert kept.read_bytes() == shards[1][:30_000]
    hub.fault, asked = lambda handler, path: False, len(hub.asked)
    same(find(REPO, None).fetch(), tmp_path / "m")
    gets = [(path, part) for method, path, part in hub.asked[asked:] if method == "GET"]
    large = [get for get in gets if "/lfs/" in get[0]]
    assert large[0] == (place, "bytes=30000-")
    assert len(large) == len(shards) - 1  # the first was whole
    assert not [path for path, _ in gets if path.endswith(("config.json", "index.json"))]
    assert not list(cache.rglob("*.incomplete"))
    assert find(REPO, None).fetch().name == commit


@pytest.mark.parametrize("left", [b"x" * 500, b"x" * 10_000_000, None])
def test_what_was_left_is_checked(hub, pushed, cache, left, capfd):
    """Bytes that aren't the file's, more than it has, and all that it has."""
    data = (pushed / WEIGHTS).read_bytes()
    part = cache / "blobs" / f"{hashlib.sha256(data).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(data if left is None else left)
    same(find(REPO, None).fetch(), pushed)
    ranges = [part for method, path, part in hub.asked if method == "GET" and "/lfs/" in path]
    assert ranges == {500: ["bytes=500-", None], 10_000_000: [None]}.get(len(left or b""), [])


def test_another_content(hub, pushed, cache, capfd):
    """Of the right size, and not of the hash that the hub names."""
    size = (pushed / WEIGHTS).stat().st_size
    hub.fault = lambda h, path: (
        "/lfs/" in path and h.command == "GET" and bool(h.say(200, body=b"x" * size) or True)
    )
    assert f"{WEIGHTS} has arrived with another hash" in line(capfd)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size == size]


def test_stored_in_xet(hub, pushed, cache, monkeypatch):
    """As most of the hub is: its files come by HTTP, whether hf_xet is installed or not."""
    xet = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{hub.url}/api/xet-read-token"}
    monkeypatch.setattr(hub, "more", xet)
    same(find(REPO, None).fetch(), pushed)
    assert not [path for _, path, _ in hub.asked if "xet" in path]
    assert len(hub.gets(hashlib.sha256((pushed / WEIGHTS).read_bytes()).hexdigest())) == 1
    assert constants.HF_HUB_DISABLE_XET is False  # of others in this process


def code(status, name, kind="Code"):
    return lambda h, _: h.say(status, {f"X-Error-{kind}": name})


REFUSALS = {
    "no repository": (
        on("", code(401, "RepoNotFound")),
        "no such repository that the hub (127.0.0.1) shows to you; private: log in with",
    ),
    "a bad token": (
        on("", code(401, "Invalid credentials in Authorization header", "Message")),
        "answers 401: your token is refused",
    ),
    "forbidden": (on("", lambda h, _: h.say(403)), "answers 403: your token is refused, or one is"),
    "gated": (  # the list of files is shown to everybody
        lambda h, path: "/resolve/" in path and (h.say(403, {"X-Error-Code": "GatedRepo"}) or True),
        "gated: ask for access on the repository's page, then log in",
    ),
    "a file": (on(WEIGHTS, code(404, "EntryNotFound")), f"has no {WEIGHTS}"),
    "too many": (
        on("", lambda h, _: h.say(429, {"Retry-After": "3600"})),
        "answers 429, too many requests, and asks to wait 3600 s; a token raises the limit",
    ),
    "too many files": (
        on(WEIGHTS, lambda h, _: h.say(429, {"Retry-After": "3600"})),
        "answers 429, too many requests, and asks to wait 3600 s",
    ),
    "its own error": (on("", lambda h, _: h.say(500)), "answers 500 Internal Server Error; try again"),
    "an error of a file": (on(WEIGHTS, lambda h, _: h.say(500)), "answers 500 Internal Server Error"),
    "an error of its bytes": (
        lambda h, path: "/lfs/" in path and h.command == "GET" and bool(h.say(503) or True),
        "answers 503 Service Unavailable",
    ),
    "cut again and again": (
        lambda h, path: "/lfs/" in path and bool(h.say(200, body=b"x" * 9, cut=0) or True),
        "can't be reached",
    ),
    "a login page": (on("", lambda h, _: h.say(200, body=LOGIN_PAGE)), "isn't a hub: a login page"),
    "a login page for the weights": (
        lambda h, path: "/lfs/" in path and bool(h.say(200, body=LOGIN_PAGE) or True),
        f"{WEIGHTS} has arrived with another size than the hub (127.0.0.1) names",
    ),
    "a login page for its place": (
        on(WEIGHTS, lambda h, _: h.say(200, body=LOGIN_PAGE)), "login page or a proxy answers",
    ),
    "JSON of something else": (on("", lambda h, _: h.say(200, json=[1])), "isn't a hub"),
    "silence": (on("", lambda h, _: h.wait()), "does not answer"),
    "silence about a file": (on(WEIGHTS, lambda h, _: h.wait()), "has sent nothing"),
    "silence in place of bytes": (
        lambda h, path: "/lfs/" in path and h.command == "GET" and h.wait(), "has sent nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(hub, pushed, cache, capfd, case):
    hub.fault, expected = REFUSALS[case]
    assert expected in line(capfd)
    assert not list(cache.rglob(WEIGHTS))
    hub.fault = lambda handler, path: False  # nothing wrong was left behind
    same(find(REPO, None).fetch(), pushed)


def test_no_more_is_fetched_than_can_be_read(hub, pushed, cache, capfd):
    """What can't be read is refused by names, config and index, before its weights are fetched."""
    config, data = (pushed / "config.json").read_bytes(), (pushed / WEIGHTS).read_bytes()
    shard = "model-00001-of-00001.safetensors"
    index = "model.safetensors.index.json"
    cases = {
        "no config.json or config.yaml; 'adapter_config.json' is an adapter": {
            "adapter_config.json": b"{}",
        },
        "an adapter beside the weights": {
            "adapter_config.json": b"{}", "config.json": config, WEIGHTS: data,
        },
        "says that the weights are quantised": {
            "quantize_config.json": b"{}", "config.json": config, WEIGHTS: data,
        },
        "model_type='qwen9'": {"config.json": b'{"model_type": "qwen9"}', WEIGHTS: data},
        "not JSON": {"config.json": LOGIN_PAGE, WEIGHTS: data},
        "a shard, and pytorch_model.bin.index.json isn't": {
            "config.json": config, "pytorch_model-00001-of-00002.bin": data,
        },
        "; 'adapter_model.safetensors' is an adapter alone": {
            "config.json": config, "adapter_model.safetensors": data,
        },
        "; 'm.Q4_K_M.gguf' is for llama.cpp: give that file itself": {"m.Q4_K_M.gguf": data},
        "; 'm.gguf' is for llama.cpp": {"config.json": config, "m.gguf": data},
        "; 'consolidated.00.pth' is Meta's layout": {"consolidated.00.pth": data},
        "a shard, and model.safetensors.index.json isn't": {"config.json": config, shard: data},
        "no model.safetensors and no model.pt": {"config.yaml": b"model: {}"},
        "has no weight_map": {"config.json": config, index: b"{}", shard: data},
        "not JSON (": {"config.json": config, index: LOGIN_PAGE, shard: data},
        "which is not a file name": {
            "config.json": config, index: b'{"weight_map": {"a": "../x.safetensors"}}', shard: data,
        },
        "no such file, and 'a' is in it": {
            "config.json": config, index: b'{"weight_map": {"a": "x.safetensors"}}', shard: data,
        },
        ".metadata": {
            "config.json": b"{}", "model_and_optim/.metadata": b"x", "model_and_optim/a": data,
        },
    }  # fmt: skip
    for number, (expected, files) in enumerate(cases.items()):
        hub.repos[f"org/bad{number}"] = {"main": "c" * 40}, {"c" * 40: files}
        with pytest.raises(ConfigError) as caught:
            find(f"org/bad{number}", None).fetch()
        text = str(caught.value)
        assert expected in text
        assert "\n" not in text
        with pytest.raises(ConfigError) as again:  # now from the cache
            find(f"org/bad{number}", None).fetch()
        assert expected in str(again.value)
    assert not [path for _, path, _ in hub.asked if "/lfs/" in path]
    assert capfd.readouterr().err == ""


def test_offline(hub, pushed, cache, monkeypatch, capfd):
    folder = find(REPO, None).fetch()
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    text = line(capfd)
    assert f"{WEIGHTS} of it is not in the local hub cache, and HF_HUB_OFFLINE is set" in text
    assert "config.json of it is not in the local hub cache" in line(capfd, "org/never")
    assert len(hub.asked) == asked
    hub.close()  # the same without a network
    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    text = line(capfd)
    assert (
        f"{WEIGHTS} of it is not in the local hub cache, and the hub (127.0.0.1) can't be" in text
    )


def test_unwritable_cache(hub, pushed, cache, capfd):
    cache.parent.write_text("a file where the cache should be; root can write to any folder")
    text = line(capfd)
    assert "the hub's cache must be a folder that can be written to" in text
    assert str(cache.parent) in text


def test_too_large_for_the_disk(hub, pushed, cache, capfd, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    assert "its weights take 0.0 GB, and 0.0 are free at" in line(capfd)
    assert not list(cache.rglob(WEIGHTS))


def test_the_command_says_it_in_one_line(hub, pushed, cache, tmp_path):
    run = in_process(
        "source=checkpoint", f"source.path={REPO}", "source.revision=mian", cwd=tmp_path
    )
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        f"simlab: source.path={REPO} source.revision=mian: the repository has no such branch, tag or "
        "commit; it has main; did you mean main?"
    ]
    assert run.stdout == ""
