"""Files of prompts as people have them: each gives exactly its prompts, or is refused with its file and line.

A file must never give prompts other than those that its author meant, so there is no third outcome.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lem.errors import BadInput, DatasetError
from lem.quantities import one_line
from lem.spec.experiment import Dataset
from lem.workload import content
from lem.workload.datasets import load_prompts
from tests.conftest import SIMULATED

AB = ("a prompt", "another, longer one")
ROWS = [{"text": text} for text in AB]
JSON = json.dumps(ROWS).encode()
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b'id,text\n1,a prompt\n2,"another, longer one"\n'
TEXT = "\n".join(AB).encode()


def zstd(data):
    import pyarrow

    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def parquet(rows=ROWS, **types):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(types) if types else None)
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def empty_parquet(**types):
    import pyarrow

    return parquet([], **(types or {"text": pyarrow.string()}))


def two_columns_parquet():
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"]), out)
    return out.getvalue()


def broken_text_parquet(data):
    """A column of text that is not UTF-8."""
    import pyarrow
    import pyarrow.parquet

    good = pyarrow.array([b"fine", data], pyarrow.binary())
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": good.view(pyarrow.string())}), out)
    return out.getvalue()


# The files that are read: name, content, prompts.
READ = [
    # ------------------------------------------------------ kinds by suffix
    ("p.json", JSON, AB),
    ("p.jsonl", JSONL, AB),
    ("p.ndjson", JSONL, AB),
    ("p.JSONLINES", JSONL, AB),
    ("p.csv", CSV, AB),
    ("p.tsv", b"id\ttext\n1\ta prompt\n2\tanother, longer one\n", AB),
    ("p.txt", TEXT, AB),
    ("p.TEXT", TEXT, AB),
    ("p.parquet", parquet, AB),
    # ------------------------------------------------------ kinds by content
    ("p", TEXT, AB),
    ("p", JSONL, AB),
    ("p", JSON, AB),
    ("p", parquet, AB),
    (".hidden", TEXT, AB),
    ("really_parquet.txt", parquet, AB),
    ("a_list.jsonl", JSON, AB),
    ("lines.json", JSONL, AB),
    # ------------------------------------------------------ compressed, by name and by content
    ("p.jsonl.gz", gzip.compress(JSONL), AB),
    ("p.csv.gz", gzip.compress(CSV), AB),
    ("p.tsv.gz", gzip.compress(b"id\ttext\n1\ta prompt\n2\tanother, longer one\n"), AB),
    ("p.txt.bz2", bz2.compress(TEXT), AB),
    ("p.ndjson.xz", lzma.compress(JSONL), AB),
    ("p.jsonl.zst", lambda: zstd(JSONL), AB),
    ("p.parquet.gz", lambda: gzip.compress(parquet()), AB),
    ("p.gz", gzip.compress(JSONL), AB),
    ("compressed_all_the_same.jsonl", gzip.compress(JSONL), AB),
    ("compressed_all_the_same.txt", bz2.compress(TEXT), AB),
    ("not_compressed.jsonl.gz", JSONL, AB),
    # ------------------------------------------------------ text
    ("p.txt", b"a prompt\r\nanother, longer one\r\n", AB),
    ("p.txt", b"\xef\xbb\xbfa prompt\nanother, longer one", AB),
    ("p.txt", "a\u2028b\x0bc\n".encode(), ("a\u2028b\x0bc",)),
    ("p.txt", b'{"a": 1} is JSON\nplain\n', ('{"a": 1} is JSON', "plain")),
    ("p.txt", b'What does [1, 2] mean?\n[1, 2]\n', ("What does [1, 2] mean?", "[1, 2]")),
    ("p.txt", b"[1, 2, 3]\n", ("[1, 2, 3]",)),
    ("p.txt", b'{"a": 1}\nplain\nmore\n', ('{"a": 1}', "plain", "more")),
    ("p.txt", b"<b>bold</b>\n- a point\nquestion: why?\n", ("<b>bold</b>", "- a point", "question: why?")),
    ("p.txt", b"First question, then text\nHello, you\n", ("First question, then text", "Hello, you")),
    ("p.txt", b"'\"`,;\t|\n", ("'\"`,;\t|",)),
    # ------------------------------------------------------ JSON
    ("p.json", json.dumps(AB).encode(), AB),
    ("p.jsonl", "".join(json.dumps(text) + "\n" for text in AB).encode(), AB),
    ("p.jsonl", b"\xef\xbb\xbf" + JSONL, AB),
    ("p.jsonl", b"\n\n" + JSONL.replace(b"\n", b"\r\n\r\n"), AB),
    ("p.jsonl", '{"text": "a\u2028b"}\n{"text": "c"}'.encode(), ("a\u2028b", "c")),
    ("p.jsonl", rb'{"text": "\ud83d\ude00"}', ("😀",)),
    ("p.jsonl", b'{"prompt": "v", "data": [{"x": 1}]}', ("v",)),
    ("p.json", b'{\n "text": "one row"\n}', ("one row",)),
    ("p.json", b'{"messages": [{"role": "user", "content": "hi"}]}', ("hi",)),
    ("p.json", b'{"text": "one row", "tags": ["x", "y"]}', ("one row",)),
    ("p.jsonl", b'{"text": "12"}\n{"text": "NaN", "x": NaN}\n', ("12", "NaN")),
    # ------------------------------------------------------ CSV
    ("p.csv", b"id;prompt\n1;Hello, how are you\n2;b\n", ("Hello, how are you", "b")),
    ("p.csv", b"id\tprompt\n1\tHello, how; are you\n", ("Hello, how; are you",)),
    ("p.csv", b"id|prompt\n1|a,b;c\n", ("a,b;c",)),
    ("p.csv", b"prompt;answer\nHello, you, there;fine\n", ("Hello, you, there",)),
    ("p.csv", b"prompt\n12345\n007\n", ("12345", "007")),
    ("p.csv", b"prompt\n1.50\ntrue\n2026-01-01\nnan\n", ("1.50", "true", "2026-01-01", "nan")),
    ("p.csv", b"\n\nprompt\none\n\n", ("one",)),
    ("p.csv", b'"prompt"\n"in\ntwo lines"\n"a ""word"""\n', ("in\ntwo lines", 'a "word"')),
    ("p.csv", b"\xef\xbb\xbfprompt,x\r\na,1\r\n", ("a",)),
    ("p.csv", b",text\n0,a\n1,b\n", ("a", "b")),
    ("p.csv", b"id, text\n1,a\n", ("a",)),
    ("p.csv", b'id, text\n1, "a, b"\n2, "c"\n', ("a, b", "c")),
    ("p.csv", b'id,text\n1,"a, ""b"""\n2," ""c"""\n', ('a, "b"', ' "c"')),
    ("p.csv", b"prompt\n" + b"x" * 200_000 + b"\n", ("x" * 200_000,)),
    ("p.csv", b"prompt\none; two\tthree|four\n", ("one; two\tthree|four",)),
    ("p.csv", b"id,text\r1,a\r2,b\r", ("a", "b")),
    ("p.csv", "id,text\r\n1,a\u2028b\r\n2,c".encode(), ("a\u2028b", "c")),
    # ------------------------------------------------------ Parquet
    ("p.parquet", lambda: parquet([{"text": None}, {"text": "a"}]), ("a",)),
    ("p.parquet", lambda: parquet([{"text": "a", "vector": [1.0]}]), ("a",)),
]  # fmt: skip

# The files that are refused, and what the message says after the file's name.
REFUSED = [
    # ------------------------------------------------------ unknown kinds
    ("p.yaml", b"- text: a\n", " is not a known kind of file"),
    ("p.md", b"# a\n", " is not a known kind of file"),
    ("p.toml.gz", gzip.compress(b"a = 1\n"), " is not a known kind of file"),
    ("p.xlsx", b"PK\x03\x04...", " is not a known kind of file"),
    ("p.v2", TEXT, " is not a known kind of file"),
    ("p.arrow", b"ARROW1", " is not a known kind of file"),
    ("p.tar.gz", gzip.compress(TEXT), " is not a known kind of file"),
    ("p.csv", b"PK\x03\x04...", " is a zip archive"),
    ("p", b"PK\x03\x04...", " is a zip archive"),
    ("p.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", " is a Git LFS pointer"),
    ("p.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", " is a Git LFS pointer"),
    # ------------------------------------------------------ contents that contradict the suffix
    ("p.txt", JSONL, " contains JSON, not text; rename it to .jsonl"),
    ("p.txt", JSON, " contains JSON, not text; rename it to .json"),
    ("p.txt", b'{\n  "text": "a"\n}\n', " contains JSON, not text"),
    ("p.csv", JSONL, " contains JSON, not CSV"),
    ("p.txt", CSV, " begins with a line of column names"),
    ("p.txt", b"id;prompt\n1;a\n", " begins with a line of column names"),
    ("p", b"id\tprompt\n1\ta\n", " begins with a line of column names"),
    ("p.txt", b"prompt\nHello, you\n", " begins with a line of column names"),
    ("p", b'"question"\n"Who?"\n', " begins with a line of column names"),
    ("p.txt", JSONL + b'{"text": \n', " has lines of JSON; lem would run this source text as prompts"),
    ("p", JSONL + b'{"text": \n', " has lines of JSON"),
    ("p.txt", b'// rows\n{"text": "a"}\n', " has lines of JSON"),
    ("p.csv", b'{"id": 1}\n{"id": 2}\nplain\n', " has lines of JSON"),
    ("p.txt", json.dumps(ROWS, indent=1).encode()[:-5], " begins like JSON, but line 6 cannot be read"),
    ("p", b'[\n{"text": "a"},\n]\n', " begins like JSON, but line 3 cannot be read"),
    ("p.txt", b"[\n[1],\n[2]\n]\n", " begins like JSON, but is not a list of rows"),
    ("p.txt", b"[{'text': 'a'}]\n", " begins like JSON, but line 1 cannot be read"),
    ("p", b"- text: a\n- text: b\n", " begins like YAML"),
    ("p.txt", b"---\nprompts:\n  - a\n", " begins like YAML"),
    ("p.txt", b"<!DOCTYPE html>\n<html>\n", " begins like HTML or XML"),
    ("p", b"\n<?xml version='1.0'?>\n<a/>\n", " begins like HTML or XML"),
    ("p.txt", b"%PDF-1.4\n%\xe2\xe3\n", " is a PDF document"),
    ("p.txt", b"{\\rtf1\\ansi a}", " is an RTF document"),
    ("p.parquet", JSONL, " cannot be read as Parquet"),
    ("p.jsonl", b"plain text\n", ", line 1 cannot be read as JSON"),
    ("p.jsonl", b"- text: yaml\n", ", line 1 cannot be read as JSON"),
    ("p.jsonl", b"<!DOCTYPE html>\n<html>\n", ", line 1 cannot be read as JSON"),
    # ------------------------------------------------------ empty and cut off
    ("p.json", b"", " is empty"),
    ("p.txt.gz", gzip.compress(b""), " is empty"),
    ("p.txt", b" \n\t\n", ": all prompts in column 'text' are empty"),
    ("p.jsonl", b" \n\n", " contains no prompts"),
    ("p.json", b"[]", " contains no prompts"),
    ("p.csv", b"\n \n", " contains no prompts"),
    ("p.csv", b"prompt\n", " contains no prompts"),
    ("p.parquet", empty_parquet, " contains no prompts"),
    ("p.parquet", lambda: parquet()[:-20], " cannot be read as Parquet"),
    ("p.parquet", b"PAR1", " cannot be read as Parquet"),
    ("p.jsonl.gz", gzip.compress(JSONL)[:-12], " cannot be unpacked as gzip"),
    ("p.jsonl.gz", b"\x1f\x8b\x08\x00garbage", " cannot be unpacked as gzip"),
    ("p.txt.bz2", bz2.compress(TEXT)[:-5], " cannot be unpacked as bz2"),
    ("p.txt.xz", lzma.compress(TEXT)[:-5], " cannot be unpacked as xz"),
    ("p.txt.xz", b"\xfd7zXZ\x00garbage", " cannot be unpacked as xz"),
    ("p.txt.zst", b"\x28\xb5\x2f\xfdgarbage", " cannot be unpacked as zstd"),
    ("p.json", JSON[:-5], ", line 1 cannot be read as JSON"),
    ("p.json", json.dumps(ROWS, indent=1).encode()[:-5], ", line 6 cannot be read as JSON"),
    # ------------------------------------------------------ rows
    ("p.jsonl", b'{"text": "a"}\n\n{"text": \n', ", line 3 cannot be read as JSON"),
    ("p.jsonl", b'{"text": "a"}\nno json\n', ", line 2 cannot be read as JSON"),
    ("p.jsonl", b'{"text": "a"} {"text": "b"}\n', ", line 1 cannot be read as JSON"),
    ("p.jsonl", b'{"text": "a"}\n{"id": 3}\n', ", line 2 has no 'text'"),
    ("p.jsonl", b'{"text": "a"}\n7\n', ", line 2 is neither an object nor a string"),
    ("p.jsonl", b'{"text": "a"}\n[1]\n', ", line 2 is neither an object nor a string"),
    ("p.jsonl", b'{"text": "a"}\n{"text": 5}\n', ", line 2: column 'text' contains int values"),
    ("p.jsonl", b'{"text": ["a"]}\n', ": column 'text' contains list values"),
    ("p.json", b'[{"text": "a"}, {"prompt": "b"}]', ", item 2 has no 'text'"),
    ("p.json", b'[["a"]]', ", item 1 is neither an object nor a string"),
    ("p.json", b"[" * 100_000, ", line 1 cannot be read as JSON"),
    ("p.jsonl", b'{"text": ' + b"9" * 5000 + b"}", ", line 1 cannot be read as JSON"),
    ("p.parquet", lambda: parquet([{"text": 1}]), ", row 1: column 'text' contains int values"),
    ("p.parquet", lambda: parquet([{"text": b"bytes"}]), ", row 1: column 'text' contains bytes values"),
    ("p.csv", b"prompt\nHello, how are you\n", ", line 2 has 2 fields, but line 1 has 1"),
    ("p.csv", b"id,prompt\n1,a\n2\n", ", line 3 has 1 field, but line 1 has 2"),
    ("p.csv", b'id,prompt\n1,"a\nb"\n2,c,d\n', ", line 4 has 3 fields, but line 1 has 2"),
    ("p.csv", b'id,prompt\n1,a\n2, "b"\n', ", line 3 has a space before a quote"),
    ("p.csv", b'prompt\n"[{""role"": ""user"", ""content"": ""a""}]"\n', ", line 2: column 'prompt' contains a conv"),
    ("p.txt", b'a\n[{"from": "human", "value": "b"}]\n', ", line 2: column 'text' contains a conversation"),
    ("p.parquet", two_columns_parquet, " has more than one column named 'text'"),
    ("p.csv", b"prompt,prompt\na,b\n", ", line 1 names two columns 'prompt'"),
    ("p.csv", b'prompt\n"never closed\n', ", line 2 cannot be read as CSV"),
    ("p.csv", b'prompt\n"a" b\n', ", line 2 cannot be read as CSV"),
    ("p.tsv", b"id\ttext\n1\ta\tb\n", ", line 2 has 3 fields, but line 1 has 2 (separated by tabs)"),
    # ------------------------------------------------------ columns
    ("no_header.csv", b"Tell me a joke\nAnd another\n", "If its first line is already a prompt"),
    ("no_header.csv", b"1,Tell me a joke\n2,And another\n", "If its first line is already a prompt"),
    ("labels.csv", b"id,label\n1,positive\n", "the columns are id, label"),
    ("labels.jsonl", b'{"id": 1, "label": "positive"}\n', "the columns are id, label"),
    ("labels.parquet", lambda: parquet([{"id": 1, "label": "positive"}]), "the columns are id, label"),
    # ------------------------------------------------------ documents
    ("p.json", b'{"version": "1", "data": [{"question": "a"}]}', "contains rows in the list 'data'"),
    ("p.json", b'{"prompts": ["a", "b"]}', "contains rows in the list 'prompts'"),
    ("p.json", b'{"text": "title", "rows": [{"text": "a"}]}', "contains rows in the list 'rows'"),
    ("p.json", b'{"version": "1", "data": {"rows": []}}', "the columns are version, data"),
    ("p.json", b'{"text": {"0": "a", "1": "b"}}', ": column 'text' contains dict values"),
    ("p.jsonl", b'{"version": "1", "data": [{"question": "a"}]}', "the columns are version, data"),
    # ------------------------------------------------------ encodings
    ("p.txt", "fine\ncaf\xe9\n".encode("latin-1"), ", line 2 is not in UTF-8 but probably in Windows-1252"),
    ("p.csv", "prompt\nna\xefve\n".encode("cp1252"), ", line 2 is not in UTF-8 but probably in Windows-1252"),
    ("p.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"), ", line 1 is not in UTF-8 but probably in Windows-1252"),
    ("p.json", '["caf\xe9"]'.encode("latin-1"), ", line 1 is not in UTF-8 but probably in Windows-1252"),
    ("p.txt", "Объясни мне квантовую механику\n".encode("cp1251"), ", line 1 is not in UTF-8 but probably in cp1251"),
    ("p.txt", "量子力学をわかりやすく説明してください\n".encode("shift_jis"), "convert the file with iconv -f CP932"),
    ("p.txt", "请用简单的语言解释量子力学\n".encode("gb18030"), "probably in gb18030"),
    ("p.txt", "one\n量子力学\n".encode("iso2022_jp"), ", line 2 is not in UTF-8 but probably in ISO-2022-JP"),
    ("p.csv", "prompt\n안녕하세요\n".encode("iso2022_kr"), "probably in ISO-2022-KR"),
    ("p.txt", "one\ntwo\n".encode("utf-16"), ", line 1 is not in UTF-8 but probably in UTF-16"),
    ("p.csv", "prompt\ntwo\n".encode("utf-16-le"), ", line 1 is not in UTF-8 but probably in UTF-16"),
    ("p.jsonl", '{"text": "a"}\n'.encode("utf-32"), ", line 1 is not in UTF-8 but probably in UTF-32"),
    ("p.txt", b"one\n" + b"text " * 20 + b"\x00\n", ", line 2 is not text: it contains a zero byte"),
    # ------------------------------------------------------ lone surrogates, the same in every format
    ("p.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', ", line 2: U+D800 is only half of a character"),
    ("p.json", b'[{"text": "a \\udc00 b"}]', ", item 1: U+DC00 is only half of a character"),
    ("p.txt", b"one\n\xed\xa0\x80\n", ", line 2: U+D800 is only half of a character"),
    ("p.csv", b"prompt\n\xed\xa0\x80\n", ", line 2: U+D800 is only half of a character"),
    ("p.parquet", lambda: broken_text_parquet(b"\xed\xa0\x80"), ", row 2: U+D800 is only half of a character"),
    ("p.parquet", lambda: broken_text_parquet(b"caf\xe9"), ", row 2 is not in UTF-8"),
]  # fmt: skip


def written(folder: Path, name: str, data) -> Path:
    file = folder / name
    file.write_bytes(data() if callable(data) else data)
    return file


def names(cases):
    return [f"{name}-{i}" for i, (name, *_) in enumerate(cases)]


@pytest.mark.parametrize(("name", "data", "texts"), READ, ids=names(READ))
def test_odd_file_gives_its_prompts(tmp_path, name, data, texts):
    assert load_prompts(Dataset(path=str(written(tmp_path, name, data))), 0).texts == texts


@pytest.mark.parametrize(("name", "data", "reason"), REFUSED, ids=names(REFUSED))
def test_odd_file_is_refused_with_its_line(tmp_path, name, data, reason):
    file = written(tmp_path, name, data)
    with pytest.raises(DatasetError) as caught:
        load_prompts(Dataset(path=str(file)), 0)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert reason in message
    assert message.isprintable()
    assert len(message.replace(str(file), "")) < 400


def test_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "MOST_BYTES", 1 << 20)
    file = written(tmp_path, "p.txt.gz", gzip.compress(b"a" * (3 << 20)))
    assert "unpacks to more than" in refusal(file)


def test_an_odd_file_runs_nothing(lem, tmp_path):
    for number, (name, data, _) in enumerate(REFUSED[::5]):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = written(folder, name, data)
        finished = lem("experiment", *SIMULATED[:4], "-y", "-p", str(file))
        assert (finished.code, finished.out) == (2, ""), name
        (line,) = finished.err.splitlines()
        assert line.startswith(f"Error: {file}")
        assert line.isprintable()
        assert [entry.name for entry in folder.iterdir()] == [name]
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------ written prompts are read back
def as_csv(texts, delimiter):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([["id", "prompt"], *enumerate(texts)])
    return out.getvalue().encode()


WRITERS = {
    "p.csv": lambda texts: as_csv(texts, ","),
    "semicolons.csv": lambda texts: as_csv(texts, ";"),
    "p.tsv": lambda texts: as_csv(texts, "\t"),
    "bars.csv.gz": lambda texts: gzip.compress(as_csv(texts, "|")),
    "p.jsonl": lambda texts: "\n".join(json.dumps({"prompt": t}, ensure_ascii=False) for t in texts).encode(),
    "p.json": lambda texts: json.dumps([{"id": i, "prompt": t} for i, t in enumerate(texts)]).encode(),
    "list.json.xz": lambda texts: lzma.compress(json.dumps(texts).encode()),
    "p.parquet": lambda texts: parquet([{"prompt": t} for t in texts]),
}
UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@pytest.mark.parametrize("name", WRITERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(texts=st.lists(UNICODE.filter(str.strip), min_size=1, max_size=5))
def test_any_text_that_is_written_is_read_unchanged(tmp_path, name, texts):
    file = written(tmp_path, name, WRITERS[name](texts))
    assert load_prompts(Dataset(path=str(file)), 0).texts == tuple(texts)


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "json", "jsonl", "parquet", "gz", "zst", ""])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.binary(min_size=1, max_size=200) | st.sampled_from([JSON, JSONL, CSV, TEXT]).flatmap(
    lambda whole: st.integers(1, len(whole)).map(lambda end: whole[:end])))  # fmt: skip
def test_any_bytes_are_read_or_refused_in_a_line(tmp_path, suffix, data):
    file = written(tmp_path, f"p.{suffix}".rstrip("."), data)
    texts, message = (), ""
    try:
        texts = load_prompts(Dataset(path=str(file)), 0).texts
    except DatasetError as error:
        message = str(error)
    assert bool(texts) != bool(message)
    assert not message or message.startswith(str(file))
    assert "\n" not in message


# ------------------------------------------------------------------ directories
def refusal(path, **fields):
    with pytest.raises(DatasetError) as caught:
        load_prompts(Dataset(path=str(path), **fields), 0)
    return str(caught.value)


def tree(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        written(folder, name, data)
    return folder


CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n---\n"
HEADLESS_CARD = CARD.replace(b"jsonl\n", b"csv\n  names: [id, text]\n")
# The files of a directory, the requested split, and the files that are read.
DIRECTORIES = [
    ({"a.jsonl": JSONL}, None, ["a.jsonl"]),
    ({"a.jsonl": JSONL[:21], "b.ndjson": JSONL[21:], "README.md": b"# About\n"}, None, ["a.jsonl", "b.ndjson"]),
    ({"a.jsonl.gz": gzip.compress(JSONL), "LICENSE": b"MIT"}, None, ["a.jsonl.gz"]),
    ({"train.csv": b"text\nno\n", "test.csv": CSV}, "test", ["test.csv"]),
    ({"data/train.csv": CSV, "data/test.csv": b"text\nno\n"}, None, ["data/train.csv"]),
    ({"p.csv": b"id;text\n1;a prompt\n2;another, longer one\n"}, None, ["p.csv"]),
    ({"p.txt": TEXT, ".hidden.csv": CSV}, None, ["p.txt"]),
    ({"p.jsonl": JSONL, "dataset_infos.json": b"{}"}, None, ["p.jsonl"]),
    ({"a.jsonl": JSONL, "b.txt": b"of another file", "README.md": CARD}, None, ["a.jsonl"]),
    ({"a.csv": CSV.replace(b"id,text\n", b""), "README.md": HEADLESS_CARD}, None, ["a.csv"]),
]


@pytest.mark.parametrize(("files", "split", "read"), DIRECTORIES)
def test_directory_says_which_of_its_files_were_read(tmp_path, files, split, read):
    prompts = load_prompts(Dataset(path=str(tree(tmp_path, files)), split=split), 0)
    assert prompts.texts == AB
    assert [Path(name).name if Path(name).is_absolute() else name for name in prompts.files] == read


ODD_DIRECTORIES = [
    ({}, {}, "contains no file of prompts"),
    ({"notes.md": b"# a\n", "LICENSE": b"MIT"}, {}, "contains no file of prompts"),
    ({"a.csv": CSV, "b.txt": TEXT}, {}, "contains files of several formats (a.csv, b.txt)"),
    ({"a.csv": CSV, "more/b.jsonl": JSONL}, {}, "contains files of several formats (a.csv, more/b.jsonl)"),
    ({"train.csv": CSV, "other.csv": CSV}, {}, "would not be read: other.csv"),
    ({"train.csv": CSV}, {"split": "test"}, "has no split 'test', only train"),
    ({"a.csv": CSV}, {"files": "*.txt"}, "contains no file that matches *.txt"),
    ({"a.csv": CSV}, {"files": "/etc/passwd"}, "contains no file that matches /etc/passwd"),
    ({"a.csv": CSV}, {"files": "a.csv", "split": "test"}, "has no split 'test'"),
    ({"a.jsonl": JSONL, "b.jsonl": b'{"text": "a"}\n{"text": 5}\n'}, {}, "b.jsonl, line 2: column 'text' contains int"),
    ({"a.jsonl": JSONL, "b.jsonl": b'{"prompt": "a"}\n'}, {}, "b.jsonl, line 1 has no 'text'"),
    ({"a.csv": CSV, "b.csv": "text\ncaf\xe9\n".encode("latin-1")}, {}, "b.csv, line 2 is not in UTF-8"),
    ({"a.jsonl": b'{"text": "a"}\n{"id": 1}\n', "README.md": CARD}, {}, "a.jsonl, line 2 has no 'text'"),
    ({"a.jsonl": JSONL, "README.md": CARD}, {"config": "other"}, "Choose one with dataset.config"),
    ({"a.jsonl": JSONL, "README.md": b"---\nconfigs: [\n---\n"}, {}, "README.md cannot be read"),
    ({"state.json": b"{}", "dataset_info.json": b"{}"}, {}, "state.json is not a file of a saved dataset: it lists no"),
    ({"state.json": b'{"_data_files": [{"filename": "../../x"}]}'}, {}, "x cannot be read as Arrow"),
]


@pytest.mark.parametrize(("files", "fields", "reason"), ODD_DIRECTORIES)
def test_odd_directory_is_refused(tmp_path, files, fields, reason):
    message = refusal(tree(tmp_path, files), **fields)
    assert reason in message
    assert message.isprintable()


@pytest.mark.parametrize("closed", ["", "below"])
def test_directory_that_may_not_be_read_is_refused(tmp_path, monkeypatch, closed):
    folder = tree(tmp_path / "set", {"a.csv": CSV, "below/b.csv": CSV})
    scandir = os.scandir

    def guarded(path):
        if Path(path) == folder / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert refusal(folder) == f"{folder / closed} cannot be read: Permission denied."


def test_files_of_a_directory_can_be_chosen_by_a_pattern(tmp_path):
    folder = tree(tmp_path, {"a.csv": CSV, "b.txt": TEXT})
    assert load_prompts(Dataset(path=str(folder), files="*.txt"), 0).files == ("b.txt",)


def test_saved_dataset_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    prompts = load_prompts(Dataset(path=str(tmp_path / "saved")), 0)
    assert (prompts.texts, prompts.split, len(prompts.files)) == (AB, None, 2)
    assert "has no splits" in refusal(tmp_path / "saved", split="train")
    assert "leave out dataset.config" in refusal(tmp_path / "saved", config="main")


def test_saved_dataset_with_splits_is_read(tmp_path):
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list([{"text": "no"}])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    prompts = load_prompts(Dataset(path=str(tmp_path / "saved")), 0)
    assert (prompts.texts, prompts.split) == (AB, "train")
    assert prompts.files[0].startswith("train/")
    assert load_prompts(Dataset(path=str(tmp_path / "saved"), split="test"), 0).texts == ("no",)
    assert "has no split 'tset', only train, test" in refusal(tmp_path / "saved", split="tset")


# ------------------------------------------------------------------ paths
@pytest.mark.parametrize("name", ["x" * 300 + ".txt", "/" + "y/" * 3000 + "p.txt", "./p\0.txt"])
def test_path_that_no_file_can_have_is_not_there(name):
    assert refusal(name) == f"There is no file {one_line(name)}."


def test_pipe_is_refused_because_it_can_be_read_only_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is not a regular file" in refusal(tmp_path / "pipe.txt")


def test_name_that_begins_with_a_tilde_is_a_file(tmp_path, monkeypatch):
    written(tmp_path, "~p.txt", TEXT)
    monkeypatch.chdir(tmp_path)
    assert load_prompts(Dataset(path="./~p.txt"), 0).texts == AB
    with pytest.raises(BadInput, match=r"there is no user p\.txt.*write \./~p\.txt"):
        load_prompts(Dataset(path="~p.txt"), 0)


@pytest.mark.parametrize("home", ["/proc/nohome", "/dev/null"])
def test_local_prompts_need_no_home_directory(tmp_path, home):
    tree(tmp_path, {"p.jsonl": JSONL, "card/a.jsonl": JSONL, "card/README.md": CARD, "plain/a.csv": CSV})
    code = (
        "from lem.workload.datasets import load_prompts\n"
        "from lem.spec.experiment import Dataset\n"
        "for path in ('p.jsonl', 'card', 'plain'): print(len(load_prompts(Dataset(path=path), 0).texts))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HOME": home, "PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["2", "2", "2"], done.stderr
