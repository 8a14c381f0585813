"""The preview of the prompts before a run: the counts, and the first prompts as the model receives them."""

from __future__ import annotations

import yaml

from lem.studies import preview


def comments(finished):
    return [line.removeprefix("# ") for line in finished.out.splitlines() if line.startswith("#")]


def test_dry_run_shows_the_first_prompts_as_they_are_sent(lem, tmp_path):
    (tmp_path / "p.txt").write_text("one two three four five\n\n\nsix\x1b[31m\nseven\neight\n")
    asked = ("experiment", "-m", "tiny", "-p", "p.txt", "--dry-run")
    said = comments(lem(*asked, "max_input_tokens=3", "-n", "4"))
    assert said[1:4] == [
        "prompts: 6 read from p.txt, column text, 2 of them empty and dropped; all others used; 2 cut to 3 tokens",
        "the first prompts as they are sent:",
        '  3 tokens, cut: "<s>one two"',
    ]
    chat = comments(lem(*asked, "chat_template=true", "-n", "1"))
    assert chat[1].endswith("; 1 of 4 drawn")
    assert chat[3].split(": ", 1)[1].startswith('"<s>user: ')
    assert chat[3].endswith('\\nassistant: "')
    assert "\x1b" not in "".join(said)


def test_dry_run_of_a_directory_names_the_files_that_would_be_read(lem, tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "set" / name).write_text('{"text": "of ' + name + '"}\n')
    finished = lem("experiment", "-m", "any", "-d", "./set", "backend=simulated", "--dry-run")
    assert "prompts: 2 read from ./set (a.jsonl, b.jsonl), column text; all used" in comments(finished)
    assert '  2 words: "of a.jsonl"' in comments(finished)
    assert yaml.safe_load(finished.out)["dataset"]["path"] == "./set"


def test_run_says_how_many_prompts_were_read_dropped_and_cut(lem, tmp_path):
    (tmp_path / "p.txt").write_text("one two three four five\n\nsix\n")
    asked = ("experiment", "-m", "any", "-p", "p.txt", "backend=simulated", "energy=none", "max_input_tokens=3", "-y")
    finished = lem(*asked, "-c", "2")
    assert "Prompts: 3 read from p.txt, column text, 1 of them empty and dropped; all others used." in finished.err
    assert "2 of 2 from p.txt, seed 42 · 3 read, 1 empty and dropped, 1 cut" in " ".join(finished.out.split())
    (row,) = yaml.safe_load(lem("results", "list", "--json").out)
    assert [row[f"prompts_{name}"] for name in ("read", "empty", "cut")] == [3, 1, 1]


def test_name_of_a_source_paints_nothing(lem, tmp_path):
    (tmp_path / "p\x1b[31m.txt").write_text("one\n")
    asked = ("experiment", "-m", "any", "-p", "p\x1b[31m.txt", "backend=simulated", "--dry-run")
    assert "prompts: 1 read from p\\x1b[31m.txt, column text; all used" in comments(lem(*asked))


def test_long_prompt_is_shown_by_its_beginning_and_its_end():
    text = "a" * 300 + "b" * 300
    assert preview.shown(text) == f'"{"a" * 200}" … 340 more characters … "{"b" * 60}"'
    assert preview.shown("\u202e\x9b\0") == '"\\u202e\\x9b\\u0000"'
