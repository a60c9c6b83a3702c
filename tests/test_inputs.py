import json
import sys

import numpy as np
import pytest
from conftest import write_olmo
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from simlab import compose
from simlab.checkpoints.untrusted import tokenizer as child
from simlab.config import ConfigError, InputsConfig
from simlab.experiment import prepare
from simlab.inputs import make_tokens
from simlab.report.console import announce

TEXT = "The capital of France is Paris. Größe: 3 µm.\n" * 40


def text(vocab=256, tokenizer=None, **values):
    config = InputsConfig(**{"kind": "text", "batch": None, "length": None} | values)
    return make_tokens(config, vocab, 0, tokenizer)


def test_random_ids_are_uniform_and_reproducible():
    config = InputsConfig("random", 50, 200)
    ids = make_tokens(config, 10, 3, None)
    assert ids.shape == (50, 200)
    assert np.array_equal(ids, make_tokens(config, 10, 3, None))
    assert not np.array_equal(ids, make_tokens(config, 10, 4, None))
    counts = np.bincount(ids.flatten(), minlength=10)
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9  # χ² with 9 degrees of freedom, 0.1 %


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_zipf_frequencies(exponent):
    ids = make_tokens(InputsConfig("zipf", 100, 1000, exponent), 20, 0, None)
    p = np.arange(1, 21) ** -exponent
    expected = 100_000 * p / p.sum()
    counts = np.bincount(ids.flatten(), minlength=20)
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # χ² with 19, 0.1 %
    if exponent:  # negative control: a uniform draw is far off
        assert ((5000 - expected) ** 2 / expected).sum() > 1000


def test_bytes_where_there_is_no_tokenizer(tmp_path):
    (tmp_path / "t").write_text(TEXT)
    ids = text(path=str(tmp_path / "t"), batch=2, length=30)
    assert bytes(ids.flatten().tolist()) == TEXT.encode()[:60]
    assert bytes(text(prompt="Größe").flatten().tolist()) == "Größe".encode()


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "t").write_bytes("Größe".encode("utf-8-sig"))
    assert bytes(text(path=str(tmp_path / "t")).flatten().tolist()) == "Größe".encode()


def test_only_the_first_bytes_of_a_file_are_read(tmp_path):
    """64 bytes per token, wherever that cuts a letter."""
    (tmp_path / "t").write_bytes(b"x" + "ö".encode() * 100)
    ids = text(path=str(tmp_path / "t"), batch=1, length=2)
    assert bytes(ids.flatten().tolist()) == b"x\xc3"


def test_shape_follows_the_text(tmp_path):
    (tmp_path / "t").write_text(TEXT)  # 1920 bytes
    assert text(path=str(tmp_path / "t")).shape == (4, 256)
    assert text(path=str(tmp_path / "t"), length=700).shape == (2, 700)
    assert text(path=str(tmp_path / "t"), batch=30).shape == (30, 64)
    assert text(prompt="The capital of France is").shape == (1, 24)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "abc", "length": 4}, r"inputs\.length=4: the text has only 3 bytes"),
        ({"prompt": "abc", "batch": 4}, r"inputs\.batch=4: the text has only 3 bytes"),
        ({"path": "/nowhere/x"}, "No such file"),
        ({"path": "/"}, "not a file"),
        ({"path": "Größe".encode("latin-1")}, r"byte 2 is 0xf6: not UTF-8"),
        ({"path": "Größe".encode("utf-16")}, "UTF-16, not UTF-8"),
        ({"path": "Größe".encode("utf-32")}, "UTF-32, not UTF-8"),
        ({"path": "Paris".encode("utf-16-be")}, "byte 0 is 0: not UTF-8"),
        ({"path": "Größe".encode()[:3]}, "byte 2 is 0xc3: not UTF-8"),  # cut at its end
    ],
)
def test_unusable_texts(tmp_path, values, match):
    if isinstance(data := values.get("path"), bytes):
        (tmp_path / "t").write_bytes(data)
        values = {"path": str(tmp_path / "t")}
    with pytest.raises(ConfigError, match=match):
        text(**values)


def test_ids_beyond_the_vocabulary():
    with pytest.raises(ConfigError, match=r"vocab_size=100: the text has the id 122"):
        text(vocab=100, prompt="zebra")


@pytest.fixture
def tokenizer(tmp_path):
    """A byte-level BPE whose special tokens would show if anything were added."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=61, special_tokens=["<s>"]))
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_the_checkpoints_own_tokenizer(tmp_path, tokenizer):
    write_olmo(tmp_path / "m")
    tokenizer.rename(tmp_path / "m" / "tokenizer.json")
    config = ["source=checkpoint", f"source.path={tmp_path / 'm'}", "seeds=0", "inputs=text"]
    ready = prepare(compose([*config, "inputs.prompt='The capital of France is'"]))
    own = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    expected = own.encode("The capital of France is", add_special_tokens=False).ids
    assert ready.tokens[0].tolist() == expected
    assert (ready.config.inputs.batch, ready.config.inputs.length) == tuple(ready.tokens.shape)


def begins(path, single):
    """Give a tokenizer.json a post-processor."""
    own = Tokenizer.from_file(str(path))
    at = [("<s>", own.token_to_id("<s>"))]
    own.post_processor = processors.TemplateProcessing(single=single, special_tokens=at)
    own.save(str(path))


@pytest.mark.parametrize("single", ["<s> $A", "$A <s>", "<s> $A <s>", "$A"])
def test_special_tokens_are_transformers(tmp_path, tokenizer, single):
    import transformers

    begins(tokenizer, single)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for prompt in ("The capital of France is", "<s> of <s>"):
        assert text(prompt=prompt, tokenizer=tokenizer)[0].tolist() == theirs(prompt).input_ids
        plain = text(prompt=prompt, tokenizer=tokenizer, special_tokens=False)[0].tolist()
        assert plain == theirs(prompt, add_special_tokens=False).input_ids


def test_every_sequence_begins_with_them(tokenizer):
    plain = text(prompt=TEXT, tokenizer=tokenizer, special_tokens=False, batch=2, length=4)
    begins(tokenizer, "<s> $A <s>")
    with_bos = text(prompt=TEXT, tokenizer=tokenizer, special_tokens=True, batch=2, length=5)
    assert (with_bos[:, 0] == Tokenizer.from_file(str(tokenizer)).token_to_id("<s>")).all()
    assert (with_bos[:, 1:] == plain).all(), "the text goes on, and doesn't end"
    with pytest.raises(ConfigError, match=r"inputs.length=1: the tokenizer's own 1 tokens"):
        text(prompt=TEXT, tokenizer=tokenizer, length=1)
    begins(tokenizer, " ".join(["<s>"] * 300 + ["$A"]))
    with pytest.raises(ConfigError, match=r"inputs.length=256: the tokenizer's own 300 tokens"):
        text(prompt=TEXT, tokenizer=tokenizer)
    begins(tokenizer, "$A <s>")
    with pytest.raises(ConfigError, match=r"true: .*tokenizer.json puts none before a text"):
        text(prompt=TEXT, tokenizer=tokenizer, special_tokens=True)
    with pytest.raises(ConfigError, match=r"true: there is no tokenizer.json"):
        text(prompt=TEXT, special_tokens=True)


@pytest.mark.parametrize(
    ("single", "length", "told"),
    [
        ("<s> $A <s>", None, "with <s> first and <s> last, forward"),
        ("<s> $A <s>", 3, "1 × 3 text tokens with <s> first, forward"),  # cut before its end
        ("$A <s>", None, "with <s> last, forward"),
        ("$A", None, "text tokens, forward"),
    ],
)
def test_the_header_names_special_tokens(tmp_path, tokenizer, capsys, single, length, told):
    write_olmo(tmp_path / "m")
    begins(tokenizer, single)
    tokenizer.rename(tmp_path / "m" / "tokenizer.json")
    config = ["source=checkpoint", f"source.path={tmp_path / 'm'}", "seeds=0", "inputs=text"]
    size = [f"inputs.length={length}", "inputs.batch=1"] if length else []
    ready = prepare(compose([*config, *size, "inputs.prompt='The capital of France is'"]))
    announce(ready.config, 0, ready.unit, ready.engines, ready.reason, special=ready.special)
    assert told in " ".join(capsys.readouterr().out.split())


def test_tokenizer_truncation_and_padding_are_ignored(tokenizer):
    own = Tokenizer.from_file(str(tokenizer))
    plain = text(prompt="The capital of France is Paris", tokenizer=tokenizer).shape
    own.enable_truncation(2)
    own.enable_padding(length=200)
    own.save(str(tokenizer))
    assert text(prompt="The capital of France is Paris", tokenizer=tokenizer).shape == plain
    assert plain[1] > 2


def test_random_ids_stay_in_the_tokenizers_vocabulary(tokenizer):
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    ids = make_tokens(InputsConfig("random", 20, 500), 10_000, 0, tokenizer)
    assert ids.max() == size - 1


def test_a_broken_tokenizer_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a readable"):
        text(prompt="a", tokenizer=tmp_path / "tokenizer.json")


def edited(path, model=(), **changes):
    """The file with parts of it replaced."""
    values = json.loads(path.read_text())
    values["model"] |= dict(model)
    path.write_text(json.dumps(values | changes))
    return path


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def test_dropout_of_a_tokenizer_is_off(tokenizer):
    """It is for training, and random: the same seed would give other tokens each time."""
    plain = text(prompt=TEXT, tokenizer=tokenizer)
    edited(tokenizer, {"dropout": 0.5})
    own = Tokenizer.from_file(str(tokenizer))
    assert own.encode(TEXT).ids != own.encode(TEXT).ids  # negative control
    assert np.array_equal(text(prompt=TEXT, tokenizer=tokenizer), plain)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        # It made a process abort after it had taken 3 GB.
        ({"normalizer": {"type": "Sequence", "normalizers": [replace("a", "a" * 100)] * 6}},
         r"can't encode the text \(it needs more than 128 MiB of memory\)"),
        ({"model": {"continuing_subword_prefix": "é" * 50}}, "not a readable.*out of range"),  # panics
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "can't encode.*non-zero"),  # so too
        ({"normalizer": replace("a", "")}, "makes no tokens of it"),
    ],
)  # fmt: skip
def test_hostile_tokenizers_are_one_line(tokenizer, changes, match):
    with pytest.raises(ConfigError, match=match) as caught:
        text(prompt="a" * 50, tokenizer=edited(tokenizer, **changes))
    assert str(caught.value).isprintable()


def test_a_tokenizer_that_takes_too_long(tokenizer, monkeypatch):
    """By its processor time where the system holds that, else by the clock."""
    monkeypatch.setattr(child, "SECONDS", 0.1)
    monkeypatch.setattr(child, "SECONDS_OF_FILE", 0.0)
    monkeypatch.setattr(child, "SECONDS_OF_TEXT", 0.0)
    slow = {"type": "Sequence", "normalizers": [replace("a", "b"), replace("b", "a")] * 5000}
    with pytest.raises(ConfigError, match=r"can't encode the text \(it takes longer than 0\.1 s"):
        text(prompt="a" * 60_000, tokenizer=edited(tokenizer, normalizer=slow))
    monkeypatch.setattr(child, "SECONDS", 100)
    monkeypatch.setattr(child, "BUSY", 0.01)
    with pytest.raises(ConfigError, match="takes longer than 1 s"):
        text(prompt="a" * 60_000, tokenizer=tokenizer)
