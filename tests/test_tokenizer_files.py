"""The files beside a tokenizer.json change ids as in transformers, or are refused by name."""

import inspect
import json

import pytest
import transformers
from conftest import write_olmo
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from simlab import compose
from simlab.checkpoints.untrusted import tokenizer_files
from simlab.checkpoints.untrusted.tokenizer import encode
from simlab.config import ConfigError
from simlab.experiment import prepare

TEXT = "The quick brown fox jumps over </s> the lazy dog."


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A byte-level BPE that knows <s> and </s>."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>"]
    made.train_from_iterator([TEXT] * 9, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    made.save(str(path))
    return path


def written(original, folder, single="$A", **files):
    """A folder of the tokenizer, its post-processor and files beside it; the tokenizer.json there."""
    own = Tokenizer.from_file(str(original))
    at = [(name, own.token_to_id(name)) for name in ("<s>", "</s>")]
    own.post_processor = processors.TemplateProcessing(single=single, special_tokens=at)
    own.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder / "tokenizer.json"


def ids(path, special=None):
    encoded = encode(path, TEXT, 1000, special)
    around = (encoded.before, encoded.after) if special is not False else ([], [])
    return around[0] + encoded.ids + around[1]


NEXT = 60  # the first id that the vocabulary doesn't have
SPECIAL = {
    "lstrip": True,
    "rstrip": False,
    "single_word": False,
    "normalized": False,
    "special": True,
}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"additional_special_tokens": ["brown", "zebra"]}},
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "fox"}}},
        {"tokenizer_config": {"pad_token": "quick", "odd_token": "brown", "mask_token": "fox"}},
        {"tokenizer_config": {"bos_token": {"__type": "AddedToken", "content": "fox", "lstrip": True}}},
        {"tokenizer_config": {"added_tokens_decoder": {NEXT: SPECIAL | {"content": "quick"}}}},
        # Flags of a token that the tokenizer.json has.
        {"tokenizer_config": {"added_tokens_decoder": {1: SPECIAL | {"content": "</s>"}}}},
        {"tokenizer_config": {"additional_special_tokens": ["fox"]}, "added_tokens": {"quick": NEXT}},
        {"special_tokens_map": {"pad_token": "dog", "unk_token": {"content": "fox", "rstrip": True}}},
        # Where the config has a list of tokens, the map isn't read.
        {"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": {"pad_token": "dog"}},
    ],
)  # fmt: skip
def test_ids_are_transformers(tmp_path, original, files):
    path = written(original, tmp_path, "<s> $A </s>", **files)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ids(path) == theirs(TEXT).input_ids
    if (
        "added_tokens_decoder" not in files.get("tokenizer_config", {})
        or "special_tokens_map" not in files
    ):
        assert ids(path) != Tokenizer.from_file(str(path)).encode(TEXT).ids  # negative control


CLASSES = ["GPT2TokenizerFast", "GPTNeoXTokenizerFast", "Qwen2Tokenizer"]


@pytest.mark.parametrize("kind", [None, "LlamaTokenizerFast", *CLASSES])
@pytest.mark.parametrize("single", ["<s> $A", "$A </s>"])
def test_classes(tmp_path, original, kind, single):
    """What a class does by default: the ids are transformers', or the difference is refused."""
    path = written(original, tmp_path, single, tokenizer_config={"tokenizer_class": kind})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if kind == "GPTNeoXTokenizerFast":
        with pytest.raises(ConfigError, match=r"GPTNeoXTok.* without add_.*special_tokens=false"):
            ids(path)
        assert ids(path, False) == theirs(TEXT).input_ids
    else:
        assert ids(path) == theirs(TEXT).input_ids


@pytest.mark.parametrize("config", [{"model_type": "olmo"}, {"tokenizer_class": CLASSES[1]}])
def test_the_class_of_a_model(tmp_path, original, config):
    """transformers takes it from config.json where no tokenizer_config.json names one."""
    path = written(original, tmp_path, "<s> $A", config={"model_type": "llama"} | config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ids(path, False) == theirs(TEXT).input_ids
    with pytest.raises(ConfigError, match=r"GPTNeoXTokenizer.* without add_bos_token"):
        ids(path)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_parameter_of_a_class_is_listed(kind):
    theirs = inspect.signature(getattr(transformers, kind).__init__).parameters
    known = {
        *tokenizer_files.USED_KEYS,
        *tokenizer_files.FIXED_KEYS,
        *tokenizer_files.INDIFFERENT_KEYS,
    }
    assert set(theirs) - known == {"self", "kwargs"}


REFUSED = [
    ({"tokenizer_config": {"add_prefix_space": True}}, r"add_prefix_space=true, but .* puts no space"),
    ({"tokenizer_config": {"add_bos_token": False}}, r"add_bos_token=false, but .* a token before"),
    ({"tokenizer_config": {"add_eos_token": True}}, r"add_eos_token=true, but .* puts no token after"),
    ({"tokenizer_config": {"split_special_tokens": True}}, r"split_special_tokens=True: not supported"),
    ({"tokenizer_config": {"auto_map": {"AutoTokenizer": ["t.T", None]}}}, "auto_map"),
    ({"tokenizer_config": {"fast_tokenizer_files": ["tokenizer.4.0.json"]}}, "fast_tokenizer_files"),
    ({"tokenizer_config": {"added_tokens_decoder": {260: {"content": "quick"}}}}, "'quick' .* id 260"),
    ({"added_tokens": {"quick": 260}}, f"'quick' has the id 260, but .* {NEXT}"),
    ({"added_tokens": {"fox": "a"}}, "added_tokens.json: 'a': not a token's id"),
    ({"special_tokens_map": {"pad_token": 3}}, "pad_token=3: not a token"),
    ({"tokenizer_config": {"added_tokens_decoder": {2: {"content": "a", "lstrip": 1}}}}, "lstrip=1"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "match"), REFUSED)
def test_refused_by_name(tmp_path, original, files, match):
    with pytest.raises(ConfigError, match=match) as caught:
        ids(written(original, tmp_path, "<s> $A", **files))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_prefix_space_matters(tmp_path, original, kind):
    """Negative control: transformers puts that space."""
    config = {"tokenizer_class": kind, "add_prefix_space": True}
    path = written(original, tmp_path, tokenizer_config=config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT).input_ids != Tokenizer.from_file(str(path)).encode(TEXT).ids
    with pytest.raises(ConfigError, match="add_prefix_space=true"):
        ids(path)


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json"])
def test_another_tokenizer_is_no_bytes(tmp_path, file):
    """A text needs it; random ids don't."""
    write_olmo(tmp_path / "m")
    (tmp_path / "m" / file).write_text("{}")
    source = ["source=checkpoint", f"source.path={tmp_path / 'm'}", "seeds=0"]
    with pytest.raises(ConfigError, match=f"{file}: .*tokenizer.json only.*save_pretrained"):
        prepare(compose([*source, "inputs=text", "inputs.prompt='The quick brown fox'"]))
    assert prepare(compose([*source, "inputs.length=8"])).tokens.shape[1] == 8
