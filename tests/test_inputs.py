import numpy as np
import pytest
from conftest import write_olmo
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from simlab import compose
from simlab.config import ConfigError, InputsConfig
from simlab.experiment import prepare
from simlab.inputs import make_tokens

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
    ],
)
def test_unusable_texts(values, match):
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
