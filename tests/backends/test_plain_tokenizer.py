"""Tokenizers that are loaded without transformers, compared with those that transformers loads."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lem.backends import plain_tokenizer
from lem.backends.checkpoint import tokenizer_of
from lem.workload import builtin, tiny
from lem.workload.models import find

TEXTS = [
    "a prompt", "", " ", "  two  spaces ", "line\nline\r\n\ttab", "<s>already</s>there", "ünïcödé 漢字 🙂 \u200b",
    "</s>", "<pad><extra> 1234567890", "x" * 5000, "\x00\x1b[31m", "don't , stop .",
    *(row["text"] for row in builtin.read("builtin:sample")),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny.path(), tmp_path / "model")


def change(file, **values):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def both(folder):
    """Return the tokens and texts of all prompts, without transformers and with it."""
    plain = plain_tokenizer.load(find(str(folder)))
    assert plain is not None
    theirs = tokenizer_of(str(folder), revision=None, trust_remote_code=False)
    answers = []
    for tokenizer in (plain, theirs):
        ids = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
        answers.append((ids, [tokenizer.decode(each, clean_up_tokenization_spaces=False) for each in ids]))
    return answers


def trained(kind):
    """Return a small tokenizer of a kind that models use, with a few special tokens."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    model, trainer = {
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
        "unigram": (models.Unigram(), trainers.UnigramTrainer),
        "wordlevel": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer),
    }[kind]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace() if kind != "unigram" else pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.WordPiece() if kind != "unigram" else decoders.Metaspace()
    options = {"unk_token": "<unk>"} if kind == "unigram" else {}
    rows = [row["text"] for row in builtin.read("builtin:sample")]
    tokenizer.train_from_iterator(rows, trainer(vocab_size=500, special_tokens=special, show_progress=False, **options))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_the_built_in_tokenizer_is_that_of_transformers(folder):
    plain, theirs = both(folder)
    assert plain == theirs


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "wordlevel"])
def test_tokenizers_of_other_kinds_are_those_of_transformers(folder, kind):
    trained(kind).save(str(folder / "tokenizer.json"))
    plain, theirs = both(folder)
    assert plain == theirs


@pytest.mark.parametrize(
    "options",
    [
        {"add_bos_token": False, "add_eos_token": True},
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"},
        {
            "clean_up_tokenization_spaces": True,
            "model_max_length": 5,
            "truncation_side": "left",
            "padding_side": "left",
        },
        {"pad_token": "</s>", "unk_token": None, "additional_special_tokens": ["<s>", "<pad>"]},
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": True, "normalized": False}},
    ],
    ids=lambda options: " ".join(options),
)
def test_options_that_change_nothing_change_nothing(folder, options):
    change(folder / "tokenizer_config.json", **options)
    plain, theirs = both(folder)
    assert plain == theirs


def test_described_tokens_change_nothing(folder):
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    described = {str(token["id"]): {name: token[name] for name in token if name != "id"} for token in added}
    change(folder / "tokenizer_config.json", added_tokens_decoder=described)
    change(folder / "special_tokens_map.json", bos_token="<s>", eos_token={"content": "</s>", "lstrip": False})
    plain, theirs = both(folder)
    assert plain == theirs


def test_padding_and_truncation_in_the_file_are_left_out(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))
    plain, theirs = both(folder)
    assert plain == theirs


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": None}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("tokenizer_config.json", {"bos_token": "<new>"}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<new>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<new>"}}),
        ("tokenizer_config.json", {"image_token": "<s>"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "<s>", "special": False}}}),
        ("special_tokens_map.json", {"mask_token": "<new>"}),
        ("added_tokens.json", {"<new>": 4095}),
        ("tokenizer.json", {"post_processor": None}),
        ("config.json", {"model_type": "mistral"}),
        ("config.json", {"model_type": "arctic"}),
        ("config.json", {"model_type": "unheard-of"}),
        ("config.json", {"auto_map": {"AutoConfig": "a.B"}}),
    ],
)
def test_tokenizers_that_transformers_might_change_are_left_to_it(folder, file, values):
    assert plain_tokenizer.load(find(str(folder))) is not None
    change(folder / file, **values)
    assert plain_tokenizer.load(find(str(folder))) is None


def test_without_tokenizer_json_the_tokenizer_is_left_to_transformers(folder):
    (folder / "tokenizer.json").unlink()
    assert plain_tokenizer.load(find(str(folder))) is None


def test_a_large_vocabulary_is_left_to_transformers(folder, monkeypatch):
    monkeypatch.setattr(plain_tokenizer, "LARGEST_VOCABULARY", 1000)
    assert plain_tokenizer.load(find(str(folder))) is None


def test_a_transformers_with_another_layout_leaves_all_to_it(folder, monkeypatch):
    monkeypatch.setattr("lem.backends.transformers_source._assigned", lambda *_: None)
    for cached in ("_names", "_expressions"):
        monkeypatch.setattr(
            f"lem.backends.transformers_source.{cached}",
            getattr(plain_tokenizer.transformers_source, cached).__wrapped__,
        )
    assert plain_tokenizer.load(find(str(folder))) is None
