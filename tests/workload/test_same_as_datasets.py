"""Local files, which `lem` reads itself: the prompts are those that the library `datasets` reads."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lem.errors import DatasetError
from lem.spec.experiment import Dataset
from lem.workload.datasets import load_prompts
from lem.workload.prompts import text_of


def lines(*rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(**columns) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


PLAIN = lines({"prompt": "first"}, {"prompt": "second"})
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bye"}]
FILES = {
    "plain.jsonl": PLAIN,
    "nested.jsonl": lines({"prompt": "a", "more": {"deep": [1, {"x": None}]}}, {"prompt": "b", "more": {"deep": []}}),
    "turns.jsonl": lines({"messages": TURNS}, {"messages": TURNS[:1]}),
    "nulls.jsonl": lines({"prompt": "a", "id": None}, {"prompt": None, "id": 2}, {"prompt": "c", "id": None}),
    "other-types.jsonl": lines({"prompt": "a", "id": 1}, {"prompt": "b", "id": 2.5}),
    "line-separators.jsonl": lines({"prompt": "a\u2028b\u0085c\x0bd"}, {"prompt": "e\r\nf\tg"}),
    "windows.jsonl": PLAIN.replace(b"\n", b"\r\n"),
    "empty-lines.jsonl": b"\n" + PLAIN.replace(b"\n", b"\n\n"),
    "no-last-newline.jsonl": PLAIN[:-1],
    "unicode.jsonl": lines({"prompt": "ünï 漢字 🙂 \u200b \ufeff"}, {"prompt": "\\u00e9 é"}),
    "escapes.jsonl": b'{"prompt": "\\u00e9 \\ud83d\\ude42 \\n \\\\ \\/"}\n',
    "huge-ints.jsonl": lines({"prompt": "a", "id": 2**63 - 1}, {"prompt": "b", "id": -(2**63)}),
    "array.json": json.dumps([{"prompt": "a"}, {"prompt": "b\nc"}], indent=2).encode(),
    "lines.json": PLAIN,
    "quotes.csv": b'prompt,id\n"a ""b"", c",1\n"two\nlines",2\nplain,3\n',
    "windows.csv": b"prompt,id\r\na,1\r\nb,2\r\n",
    "one-column.csv": b"prompt\nfirst\nsecond\n",
    "unicode.csv": "prompt,id\nünï 漢字 🙂,1\na\u2028b,2\n".encode(),
    "mark.csv": b"\xef\xbb\xbfprompt,id\na,1\nb,2\n",
    "empty-fields.csv": b"prompt,id\na,\n,2\nc,3\n",
    "prompts.txt": "one\n\ntwo  \n ünï 漢字\n".encode(),
    "no-last-newline.txt": b"one\ntwo",
    "windows.txt": b"one\r\ntwo\r\n",
    "plain.parquet": parquet(prompt=["a", None, "ünï"], other=[[1], [], None]),
    "turns.parquet": parquet(conversations=[[{"from": "human", "value": "hi"}], [{"from": "gpt", "value": "no"}]]),
    "large.parquet": parquet(prompt=pa.array(["a", "b"], pa.large_string())),
    "plain.jsonl.gz": gzip.compress(PLAIN),
    "plain.jsonl.bz2": bz2.compress(PLAIN),
    "plain.jsonl.xz": lzma.compress(PLAIN),
    "table.csv.gz": gzip.compress(b"prompt,id\na,1\nb,2\n"),
    "prompts.txt.gz": gzip.compress(b"one\ntwo\n"),
}
BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "txt": "text", "parquet": "parquet"}


def by_the_library(files: list[Path], cache: Path) -> list[str]:
    """Return the prompts that the library reads, in order, without empty ones."""
    import datasets

    datasets.disable_progress_bars()
    kind = next(BUILDERS[suffix[1:]] for suffix in files[0].suffixes if suffix[1:] in BUILDERS)
    # Not to guess numbers and missing values in text is an option of pandas, through which the library reads CSV.
    options = {"keep_default_na": False} if kind == "csv" else {}
    names = [str(file) for file in files]
    rows = datasets.load_dataset(kind, data_files=names, split="train", cache_dir=str(cache), **options)
    column = next(name for name in ("text", "prompt", "conversations", "messages") if name in rows.column_names)
    return [text for row in rows if (text := text_of(row[column])) is not None and text.strip()]


@pytest.mark.parametrize("name", FILES)
def test_prompts_of_a_file_are_those_of_the_library(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(FILES[name])
    found = load_prompts(Dataset(path=str(file)), 0).texts
    assert list(found) == by_the_library([file], tmp_path / "cache")
    assert found


@pytest.mark.parametrize("names", [("b.jsonl", "a.jsonl"), ("b.csv", "below/a.csv"), ("1.parquet", "2.parquet")])
def test_prompts_of_a_directory_are_those_of_the_library(tmp_path, names):
    folder = tmp_path / "set"
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = {
            "jsonl": lines({"prompt": f"of {name}"}),
            "csv": f"prompt,id\nof {name},{i}\n".encode(),
            "parquet": parquet(prompt=[f"of {name}"]),
        }
        (folder / name).write_bytes(content[name.rpartition(".")[2]])
    found = load_prompts(Dataset(path=str(folder)), 0)
    assert list(found.texts) == by_the_library([folder / name for name in found.files], tmp_path / "cache")
    assert set(found.files) == set(names)


# What the library turns into something else, or reads with options only, is refused or read as it was written.
@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.jsonl", lines({"prompt": "a"}, {"id": 2}), "line 2 has no 'prompt'"),
        ("mixed.jsonl", lines({"prompt": "a"}, {"prompt": 3}), "contains int values, not text"),
        ("key.json", json.dumps({"version": 1, "data": [{"prompt": "a"}]}).encode(), "rows in the list 'data'"),
        ("short.csv", b"prompt,id\na,1\nb\n", "line 3 has 1 field, but line 1 has 2"),
        ("half.jsonl", b'{"prompt": "\\ud83d"}\n', "U+D83D is only half of a character"),
    ],
)
def test_files_in_which_prompts_are_not_certain_are_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        load_prompts(Dataset(path=str(tmp_path / name)), 0)
    assert sentence in str(caught.value)


def test_text_in_a_table_that_looks_like_a_number_or_a_missing_value_stays_text(tmp_path):
    (tmp_path / "t.csv").write_text("prompt\n007\nNA\nnull\n1e5\n")
    assert load_prompts(Dataset(path=str(tmp_path / "t.csv")), 0).texts == ("007", "NA", "null", "1e5")


def test_integers_larger_than_arrow_holds_do_not_matter_beside_prompts(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(lines({"prompt": "a", "id": 10**40}, {"prompt": "b", "id": 1}))
    assert load_prompts(Dataset(path=str(tmp_path / "t.jsonl")), 0).texts == ("a", "b")


def test_a_byte_order_mark_and_zstd_are_read(tmp_path):
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + PLAIN)
    (tmp_path / "t.jsonl.zst").write_bytes(bytes(pa.Codec("zstd").compress(PLAIN)))
    for name in ("mark.jsonl", "t.jsonl.zst"):
        assert load_prompts(Dataset(path=str(tmp_path / name)), 0).texts == ("first", "second")
