"""Reads prompts from a local file (JSON, JSON lines, CSV, Parquet, or one prompt per line), which may be compressed.

A file's suffix states its format. If the content contradicts the suffix, or if the suffix is unknown, the file is
rejected, because otherwise raw JSON or CSV could be run as prompts.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lem.errors import DatasetError
from lem.workload.content import COMPRESSED, data_of, half_a_character, text_of
from lem.workload.prompts import PROMPT_COLUMNS, Row, Rows, choose_column

KINDS = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
SUFFIXES = (*KINDS, *COMPRESSED)
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# The first bytes of Parquet files.
PARQUET = b"PAR1"
# The beginning of markup, of JSON (or a Python list) with rows that span several lines, and of YAML.
MARKUP = re.compile(r"\s*<(!doctype\s|html\b|\?xml\b)", re.IGNORECASE)
LIKE_JSON = re.compile(r"""\s*(\[\s*\{\s*["'][^"'\n]+["']\s*:|\{\s*\n\s*["'][^"'\n]+["']\s*:|\[\s*\n\s*["'{\[])""")
LIKE_YAML = re.compile(rf"""(---\s*\n)?\s*(-\s+["']?({"|".join(PROMPT_COLUMNS)})["']?:\s|prompts:\s*\n\s*-\s)""")
KNOWN = "json, jsonl (ndjson), csv, tsv, parquet and txt, also with .gz, .bz2, .xz or .zst"
WITHOUT_HEADER = "If its first line is already a prompt, add a header line such as 'prompt' above it."


def kind_of(name: str) -> str | None:
    """Return the format that a file name's suffix names; "" if there is no suffix, None if the suffix is unknown."""
    path = Path(name.lower())
    path = path.with_suffix("") if path.suffix in COMPRESSED else path
    return KINDS.get(path.suffix) if path.suffix else ""


def read(path: Path, column: str | None = None) -> Rows:
    """Return the rows of a file, each with its location for messages.

    Args:
        path: the file.
        column: the requested column, which helps to detect the delimiter of a CSV file.

    Raises:
        DatasetError: the file is empty, of an unknown format, not in UTF-8, or malformed; the message gives the line,
            if it is known.
    """
    kind = kind_of(path.name)
    if kind is None:
        raise DatasetError(
            f"{path} is not a known kind of file ({KNOWN}). "
            "Convert it, or rename it to .txt if each of its lines is a prompt."
        )
    data = data_of(path)
    if data.startswith(PARQUET) or kind == "parquet":
        return _parquet(path, data, column)
    text = text_of(path, data)
    kind = _checked_kind(path, text, kind)
    if kind == "csv":
        return _csv(path, text, column)
    if kind == "text":
        return Rows(str(path), "line", [{"text": line} for line in _lines(text)])
    return _json(path, text, kind, column)


# ------------------------------------------------------------------ content against suffix
def _checked_kind(path: Path, text: str, kind: str) -> str:
    """Return a file's format; raise `DatasetError` if a file that should be text or CSV contains something else."""
    if kind not in ("text", "csv", ""):
        return kind
    if found := _json_kind(text):
        if kind == "":
            return found
        raise DatasetError(f"{path} contains JSON, not {_called(kind)}; rename it to .{found}.")
    if what := _like_no_text(text):
        raise DatasetError(
            f"{path} {what}; lem would run this source text as prompts. Convert the file to one prompt per line, or to "
            "JSON lines."
        )
    if kind != "csv" and _is_table(text):
        raise DatasetError(
            f"{path} begins with a line of column names, which would be run as a prompt; rename the file to .csv, or "
            "remove that line."
        )
    return kind or "text"


def _called(kind: str) -> str:
    return "CSV" if kind == "csv" else "text"


def _json_kind(text: str) -> str | None:
    """Return `jsonl` if each line is a JSON row, `json` if the whole text is a row or list of rows, otherwise None."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    lines = [line for line in text.split("\n") if line.strip()]
    if all(line.lstrip().startswith("{") for line in lines) and all(isinstance(_tried(x), dict) for x in lines):
        return "jsonl"
    whole = _tried(text)
    rows = whole if isinstance(whole, list) else [whole]
    return "json" if rows and all(isinstance(row, (dict, str)) for row in rows) else None


def _like_no_text(text: str) -> str | None:
    """Return why a text does not look like prompts (it looks like markup, YAML or JSON); None if it may be prompts."""
    if MARKUP.match(text):
        return "begins like HTML or XML"
    if LIKE_YAML.match(text):
        return "begins like YAML"
    if LIKE_JSON.match(text):
        return f"begins like JSON, {_fault_of_json(text)}"
    lines = [line for line in text.split("\n") if line.strip()]
    of_json = {number: row for number, line in enumerate(lines) if isinstance(row := _tried_row(line), dict)}
    is_mostly_json = len(of_json) > 1 and 2 * len(of_json) >= len(lines)
    if is_mostly_json or any(name in row for row in of_json.values() for name in PROMPT_COLUMNS):
        return "has lines of JSON"
    return None


def _fault_of_json(text: str) -> str:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"but line {error.lineno} cannot be read as JSON"
    except (ValueError, RecursionError) as error:
        return f"but cannot be read: {error}"
    return "but is not a list of rows"


def _tried_row(line: str) -> Any:
    return _tried(line) if line.lstrip().startswith("{") else None


def _tried(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_table(text: str) -> bool:
    """Return whether a text looks like a table: a header with a prompt column, then a line with as many fields."""
    first = text.split("\n", 2)[:2]
    if len(first) < 2 or not first[1].strip():
        return False
    if first[0].strip().strip('"') in PROMPT_COLUMNS:
        return True
    for delimiter in DELIMITERS:
        try:
            names, fields = csv.reader(first, delimiter=delimiter, strict=True)
        except (csv.Error, ValueError):  # ValueError: the line is empty
            continue
        words = [name.strip() for name in names]
        if len(words) == len(fields) > 1 and set(words) & set(PROMPT_COLUMNS) and all(map(str.isidentifier, words)):
            return True
    return False


def _lines(text: str) -> list[str]:
    """Split a text only at line ends, not at other Unicode line separators."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


# ------------------------------------------------------------------ JSON
def _json(path: Path, text: str, kind: str, column: str | None) -> Rows:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DatasetError(f"{path} contains no prompts; it is blank.")
    is_list = text.lstrip().startswith("[")
    if not is_list and (kind == "jsonl" or (len(lines) > 1 and isinstance(_tried(lines[0][1]), dict | str))):
        values = [_parsed(path, line, number) for number, line in lines]
        rows = Rows(str(path), "line", values, [number for number, _ in lines])
    else:
        whole = _parsed(path, text)
        rows = Rows(str(path), "item", whole if isinstance(whole, list) else [whole])
        if kind == "json" and isinstance(whole, dict):
            _refuse_document(path, whole, column)
    return Rows(rows.name, rows.unit, [_as_row(rows, i) for i in range(len(rows))], rows.numbers)


def _parsed(path: Path, text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place, reason = line or error.lineno, f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, or thousands of nested brackets
        place, reason = line or 1, str(error)
    raise DatasetError(f"{path}, line {place} cannot be read as JSON: {reason}.")


def _as_row(rows: Rows, i: int) -> Row:
    value: Any = rows[i]
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise DatasetError(f"{rows.place(i)} is neither an object nor a string, but {json.dumps(value)[:40]}.")
    return value


def _refuse_document(path: Path, whole: Row, column: str | None) -> None:
    """Reject a JSON document that contains its rows in a nested list, because its other values are not prompts."""
    of_prompts = {column} if column else set(PROMPT_COLUMNS)
    is_row = any(isinstance(whole.get(name), str) for name in of_prompts)
    for name, value in whole.items():
        of_objects = isinstance(value, list) and any(isinstance(each, dict) for each in value)
        of_texts = isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
        if name not in of_prompts and (of_objects or (of_texts and not is_row)):
            raise DatasetError(
                f"{path} is not a list of rows but a document that contains rows in the list '{name}'; convert it to "
                f"JSON lines with jq -c '.[{json.dumps(name)}][]'."
            )


# ------------------------------------------------------------------ CSV
def _csv(path: Path, text: str, column: str | None) -> Rows:
    csv.field_size_limit(sys.maxsize)
    delimiter = _delimiter(path, text, column)
    records = _records(path, text, delimiter)
    if re.search(f'{re.escape(delimiter)} +"', text):
        records = _with_spaced_quotes(path, text, delimiter, records)
    header = [name.strip() or f"column {i}" for i, name in enumerate(records[0][1], start=1)]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DatasetError(f"{path}, line {records[0][0]} names two columns '{twice}'; rename one of them.")
    choose_column(header, column, str(path), f" {WITHOUT_HEADER}")
    for line, fields in records[1:]:
        if fields and len(fields) != len(header):
            raise DatasetError(
                f"{path}, line {line} has {_fields(len(fields))}, but line {records[0][0]} has {len(header)} "
                f"(separated by {DELIMITERS[delimiter]}); put text that contains the separator in quotes or, if each "
                "line is a prompt, rename the file to .txt."
            )
    # An empty line is an empty prompt.
    rows = [dict(zip(header, fields or [""] * len(header), strict=True)) for _, fields in records[1:]]
    return Rows(str(path), "line", rows, [line for line, _ in records[1:]])


def _fields(count: int) -> str:
    return f"{count} field{'' if count == 1 else 's'}"


def _with_spaced_quotes(
    path: Path, text: str, delimiter: str, records: list[tuple[int, list[str]]]
) -> list[tuple[int, list[str]]]:
    """Return the records of a CSV file in which spaces precede some quotes.

    A strict parser reads a quote after a space as text. If the header also has spaces after its separators, the
    spaces after separators are skipped in all lines. If the header has none, the author's intention is unknown.

    Raises:
        DatasetError: the author's intention is unknown, and skipping the spaces would change a record.
    """
    spaced = _records(path, text, delimiter, skips_spaces=True)
    if any(name.startswith(" ") for name in records[0][1][1:]):
        return spaced
    by_line = dict(spaced)
    for line, fields in records:
        if any(field.lstrip(" ").startswith('"') for field in fields) and by_line.get(line) != fields:
            raise DatasetError(f"{path}, line {line} has a space before a quote; remove the space.")
    return records


def _records(path: Path, text: str, delimiter: str, *, skips_spaces: bool = False) -> list[tuple[int, list[str]]]:
    """Return the records, each with the number of its first line, starting with the first record that is not blank."""
    lines = _physical_lines(text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=skips_spaces)
    records: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for fields in reader:
            if records or any(field.strip() for field in fields):
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(f"{path}, line {line} cannot be read as CSV: {error}.") from None
    if not records:
        raise DatasetError(f"{path} contains no prompts; it is blank.")
    return records


def _physical_lines(text: str) -> Iterator[str]:
    """Yield a text's lines, with their line ends; io.StringIO would use four bytes of memory per character."""
    if "\n" not in text:
        text = text.replace("\r", "\n")
    start = 0
    while (end := text.find("\n", start) + 1) > 0:
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _delimiter(path: Path, text: str, column: str | None) -> str:
    """Return the delimiter of a CSV or TSV file.

    A TSV file has tabs. In a CSV file, the delimiter is the one that gives the header a prompt column or, failing that,
    the largest number of columns.
    """
    if path.name.lower().removesuffix(path.suffix if path.suffix in COMPRESSED else "").endswith(".tsv"):
        return "\t"
    wanted = {column} if column else set(PROMPT_COLUMNS)
    headers = {delimiter: _header(text, delimiter) for delimiter in DELIMITERS}
    return max(headers, key=lambda each: (bool(wanted & set(headers[each])), len(headers[each])))


def _header(text: str, delimiter: str) -> list[str]:
    reader = csv.reader(_physical_lines(text), delimiter=delimiter, strict=True)
    try:
        return next(([name.strip() for name in fields] for fields in reader if any(map(str.strip, fields))), [])
    except csv.Error:
        return []


# ------------------------------------------------------------------ Parquet
def _parquet(path: Path, data: bytes, column: str | None) -> Rows:
    """Return the rows with only the prompt column, because other columns may hold images or vectors."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = list(file.schema_arrow.names)
        chosen = choose_column(names, column, str(path)) if file.metadata.num_rows else None
        # Without threads, because they would need the interpreter to release parts of `data`, even while it is exiting.
        table = file.read([chosen] if chosen else [], use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    return arrow_rows(str(path), table)


def arrow_rows(name: str, table: Any) -> Rows:
    """Return the rows of an Arrow table, or raise `DatasetError` if its text is not UTF-8."""
    rows: list[Row] = []
    for batch in table.to_batches():
        try:
            rows += batch.to_pylist()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{name}, row {_first_wrong(batch) + len(rows)}{_not_text(error)}") from None
    return Rows(name, "row", rows)


def _first_wrong(batch: Any) -> int:
    for i in range(len(batch)):
        try:
            batch.slice(i, 1).to_pylist()
        except UnicodeDecodeError:
            return i + 1
    return len(batch)


def _not_text(error: UnicodeDecodeError) -> str:
    try:
        return f": {half_a_character(error.object.decode('utf-8', 'surrogatepass'))}"
    except UnicodeDecodeError:
        return " is not in UTF-8."


def together(parts: Sequence[Rows]) -> Rows:
    """Return the rows of several files, each with its own location."""
    places = [part.place(i) for part in parts for i in range(len(part))]
    return Rows(parts[0].name, "row", [row for part in parts for row in part], places=places)
