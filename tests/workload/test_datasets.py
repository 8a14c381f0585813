import csv
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from importlib import resources

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lem.errors import DatasetError
from lem.spec.experiment import Dataset
from lem.workload import builtin
from lem.workload.datasets import load_prompts
from lem.workload.prompts import PROMPT_COLUMNS, Prompts, pick

ROWS = [{"text": "first prompt"}, {"text": "second, with a comma"}, {"text": "third „quoted“\nin two lines"}]
TEXTS = tuple(row["text"] for row in ROWS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the files that the datasets library prepares out of the user's cache."""
    import datasets

    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def texts(path, seed=0, **fields):
    return load_prompts(Dataset(path=str(path), **fields), seed).texts


def refusal(path, **fields):
    with pytest.raises(DatasetError) as caught:
        load_prompts(Dataset(path=str(path), **fields), 0)
    return str(caught.value)


# ------------------------------------------------------------------ writing files
def write_json(file, rows):
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return file


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_csv(file, rows):
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_parquet(file, rows):
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


WRITERS = {"json": write_json, "jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


# ------------------------------------------------------------------ formats
@pytest.mark.parametrize("suffix", WRITERS)
def test_file_of_rows_gives_its_prompts_in_order(tmp_path, suffix):
    prompts = load_prompts(Dataset(path=str(WRITERS[suffix](tmp_path / f"prompts.{suffix}", ROWS))), 0)
    assert prompts.texts == TEXTS
    assert (prompts.column, prompts.split, prompts.available, prompts.dropped_empty) == ("text", None, 3, 0)


@pytest.mark.parametrize("suffix", [".JSONL", ".Csv"])
def test_suffix_may_be_in_capitals(tmp_path, suffix):
    assert texts(WRITERS[suffix[1:].lower()](tmp_path / f"prompts{suffix}", ROWS)) == TEXTS


@pytest.mark.parametrize("name", ["prompts.txt", "prompts"])
def test_text_has_a_prompt_on_each_line_and_blank_lines_are_none(tmp_path, name):
    file = tmp_path / name
    # A line separator within a line is part of the prompt.
    file.write_bytes("one\n\n  two \n \t\nthree\u2028still three\r\nlast".encode())
    prompts = load_prompts(Dataset(path=str(file)), 0)
    assert prompts.texts == ("one", "  two ", "three\u2028still three", "last")
    assert prompts.dropped_empty == 2


def test_byte_order_mark_is_not_a_part_of_the_first_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n", encoding="utf-8-sig")
    assert texts(file) == ("one", "two")


def test_json_list_of_texts_is_a_list_of_prompts(tmp_path):
    assert texts(write_json(tmp_path / "prompts.json", list(TEXTS))) == TEXTS


def test_rows_may_have_no_prompt_in_their_column_and_differ_in_others(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"id": 3, "text": ""}, {"text": "b", "late": 1}]
    prompts = load_prompts(Dataset(path=str(write_jsonl(tmp_path / "prompts.jsonl", rows))), 0)
    assert (prompts.texts, prompts.dropped_empty) == (("a", "b"), 2)


def test_words_that_stand_for_missing_numbers_are_prompts_in_a_csv(tmp_path):
    rows = [{"prompt": "None"}, {"prompt": "NA"}, {"prompt": "null"}, {"prompt": ""}, {"prompt": "a word"}]
    assert texts(write_csv(tmp_path / "prompts.csv", rows)) == ("None", "NA", "null", "a word")


def test_reading_a_file_leaves_no_copy_in_the_cache(tmp_path, cache):
    texts(write_jsonl(tmp_path / "prompts.jsonl", ROWS))
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) == 0


SHAREGPT = [
    {
        "id": "a_0",
        "conversations": [
            {"from": "system", "value": "be kind"},
            {"from": "human", "value": "first question"},
            {"from": "gpt", "value": "an answer"},
            {"from": "human", "value": "second question"},
        ],
    },
    {"id": "b_0", "conversations": [{"from": "gpt", "value": "nobody asked"}]},
    {"id": "c_0", "conversations": []},
    {"id": "d_0", "conversations": [{"from": "human", "value": "another question"}]},
]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_sharegpt_conversation_gives_its_first_human_turn(tmp_path, suffix):
    prompts = load_prompts(Dataset(path=str(WRITERS[suffix](tmp_path / f"chats.{suffix}", SHAREGPT))), 0)
    assert prompts.texts == ("first question", "another question")
    assert (prompts.column, prompts.dropped_empty) == ("conversations", 2)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_messages_with_roles_give_their_first_user_turn(tmp_path, suffix):
    rows = [
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a question"}]},
        {"messages": [{"role": "user", "content": "another"}, {"role": "assistant", "content": "an answer"}]},
    ]
    prompts = load_prompts(Dataset(path=str(WRITERS[suffix](tmp_path / f"chats.{suffix}", rows))), 0)
    assert (prompts.texts, prompts.column) == (("a question", "another"), "messages")


# ------------------------------------------------------------------ files that cannot be read
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "txt"])
def test_empty_file_says_so(tmp_path, suffix):
    file = tmp_path / f"prompts.{suffix}"
    file.touch()
    assert f"{file} is empty" in refusal(file)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "txt"])
def test_file_of_blanks_holds_no_prompts(tmp_path, suffix):
    file = tmp_path / f"prompts.{suffix}"
    file.write_text(" \n\t\n\n")
    assert str(file) in refusal(file)


def test_csv_of_a_header_alone_holds_no_prompts(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,id\n")
    assert "contains no prompts" in refusal(file)


def test_prompts_that_are_all_empty_name_their_column(tmp_path):
    message = refusal(write_jsonl(tmp_path / "prompts.jsonl", [{"text": ""}, {"text": " \n"}]))
    assert "column 'text' are empty" in message


@pytest.mark.parametrize("name", ["prompts[1].jsonl", "a*b?.jsonl", "with space#%20.jsonl"])
def test_file_name_is_no_pattern(tmp_path, name):
    write_jsonl(tmp_path / "prompts1.jsonl", [{"text": "of another file"}])
    write_jsonl(tmp_path / "axbx.jsonl", [{"text": "of another file"}])
    assert texts(write_jsonl(tmp_path / name, ROWS)) == TEXTS


def test_relative_path_and_home_directory_are_understood(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("prompts.jsonl") == texts("./prompts.jsonl") == texts("~/prompts.jsonl") == TEXTS


@pytest.mark.parametrize(
    "name", ["/no/such/prompts.txt", "./prompts", "~/prompts", "data/prompts.jsonl", "prompts.csv"]
)
def test_missing_file_is_not_looked_for_on_the_hub(name):
    assert refusal(name) == f"There is no file {name}."


def test_file_and_builtin_have_no_splits(tmp_path):
    assert "has no splits" in refusal(write_jsonl(tmp_path / "prompts.jsonl", ROWS), split="train")
    assert "has no splits" in refusal("builtin:sample", split="train")


def test_nothing_named_is_refused():
    with pytest.raises(DatasetError, match="No prompts"):
        load_prompts(Dataset(), 0)


# ------------------------------------------------------------------ columns
@pytest.mark.parametrize("name", PROMPT_COLUMNS)
def test_column_is_detected_by_its_name(tmp_path, name):
    rows = [{"id": "x", "answer": "no", name: "yes"}]
    prompts = load_prompts(Dataset(path=str(write_jsonl(tmp_path / "prompts.jsonl", rows))), 0)
    assert (prompts.texts, prompts.column) == (("yes",), name)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("row", [{"id": 1, "label": "positive"}, {"body": "yes"}])
def test_only_column_of_text_is_not_taken_under_another_name(tmp_path, suffix, row):
    file = WRITERS[suffix](tmp_path / f"prompts.{suffix}", [row, row])
    assert f"the columns are {', '.join(row)}" in refusal(file)
    assert texts(file, column=list(row)[-1]) == (list(row.values())[-1],) * 2


def test_column_asked_for_wins_over_detection(tmp_path):
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"text": "no", "body": "yes"}])
    assert texts(file, column="body") == ("yes",)


def test_undetected_column_names_the_existing_ones(tmp_path):
    message = refusal(write_jsonl(tmp_path / "prompts.jsonl", [{"head": "a", "body": "b"}]))
    assert "--column" in message
    assert "head, body" in message


def test_wrong_column_names_the_existing_ones_and_the_nearest(tmp_path):
    message = refusal(write_jsonl(tmp_path / "prompts.jsonl", [{"question": "a", "id": 1}]), column="questoin")
    assert "no column 'questoin'" in message
    assert "Did you mean 'question'?" in message
    assert "question, id" in message


def test_column_that_holds_no_text_is_refused(tmp_path):
    message = refusal(write_jsonl(tmp_path / "prompts.jsonl", [{"text": 1}, {"text": 2}]))
    assert "line 1: column 'text' contains int values, not text" in message


# ------------------------------------------------------------------ sampling
NUMBERED = [{"text": f"prompt {i}" if i % 2 else " "} for i in range(40)]


def numbered(n, seed):
    return pick(NUMBERED, source="numbered", split=None, column=None, n=n, seed=seed)


def test_empty_prompts_are_dropped_before_sampling():
    for seed in range(20):
        prompts = numbered(20, seed)
        assert len(prompts.texts) == 20
        assert (prompts.available, prompts.dropped_empty) == (20, 20)


@given(st.lists(st.sampled_from(["", " ", "a", "b", "c", "d"])), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_sample_is_n_of_the_filled_prompts_in_their_order(values, n, seed):
    filled = [f"{i} {value}" for i, value in enumerate(values) if value.strip()]
    rows = [{"text": f"{i} {value}" if value.strip() else value} for i, value in enumerate(values)]
    if not filled:
        return
    drawn = pick(rows, source="rows", split=None, column=None, n=n, seed=seed).texts
    assert len(drawn) == min(n, len(filled))
    assert [text for text in filled if text in drawn] == list(drawn)


def test_sample_follows_from_the_seed_and_zero_is_a_seed():
    drawn = {seed: numbered(8, seed).texts for seed in (0, 1, 42, 2**32 - 1)}
    assert len(set(drawn.values())) == 4
    assert all(numbered(8, seed).texts == texts for seed, texts in drawn.items())


def test_sample_is_not_just_the_beginning():
    assert set(numbered(8, 0).texts) != {f"prompt {i}" for i in range(1, 16, 2)}


@pytest.mark.parametrize("n", [20, 21, 1000, None])
def test_all_are_taken_in_order_when_there_are_no_more(n):
    assert numbered(n, 5).texts == tuple(f"prompt {i}" for i in range(1, 40, 2))


def test_equal_prompts_are_kept():
    prompts = pick([{"text": "same"}] * 3, source="rows", split=None, column=None, n=None, seed=0)
    assert prompts.texts == ("same",) * 3


def test_digest_is_that_of_the_texts_in_order(tmp_path):
    def digest(*texts):
        return Prompts(texts, "source", None, None, 0, 0).sha256

    # The digest is written into every record, so it must never change.
    assert digest("a", "ü\n") == hashlib.sha256(b'"a"\n"\\u00fc\\n"\n').hexdigest()
    assert len({digest("a", "b"), digest("b", "a"), digest("ab"), digest("a\nb"), digest("a", "b", "")}) == 5
    files = [writer(tmp_path / f"prompts.{suffix}", ROWS) for suffix, writer in WRITERS.items()]
    assert {load_prompts(Dataset(path=str(file)), 0).sha256 for file in files} == {digest(*TEXTS)}


# ------------------------------------------------------------------ the aliases, on copies of their hub's layout
def readme(folder, *configs):
    """Write a dataset card; each config is a name and its splits."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": pattern} for split, pattern in splits.items()],
        }
        for name, splits in configs
    ]
    (folder / "README.md").write_text(f"---\nlicense: mit\n{yaml.safe_dump({'configs': listed})}---\n\n# A dataset\n")


def alias(name, folder):
    fields = yaml.safe_load((resources.files("lem.conf") / "dataset" / f"{name}.yaml").read_text())
    return Dataset(**{**fields, "path": str(folder)})


@pytest.fixture
def gsm8k(tmp_path):
    folder = tmp_path / "gsm8k"
    names = ("main", "socratic")
    readme(folder, *((name, {split: f"{name}/{split}-*" for split in ("train", "test")}) for name in names))
    for name in names:
        for split in ("train", "test"):
            rows = [{"question": f"{name} {split} {i}?", "answer": f"#### {i}"} for i in range(3)]
            write_parquet(folder / name / f"{split}-00000-of-00001.parquet", rows)
    return folder


@pytest.fixture
def mmlu(tmp_path):
    folder = tmp_path / "mmlu"
    splits = ("test", "validation", "dev")
    readme(folder, *((name, {split: f"{name}/{split}-*" for split in splits}) for name in ("abstract_algebra", "all")))
    for name in ("abstract_algebra", "all"):
        for split in splits:
            rows = [
                {"question": f"{name} {split} {i}", "subject": "s", "choices": ["a", "b"], "answer": 1} for i in (0, 1)
            ]
            write_parquet(folder / name / f"{split}-00000-of-00001.parquet", rows)
    return folder


@pytest.fixture
def alpaca(tmp_path):
    folder = tmp_path / "alpaca"
    readme(folder, ("default", {"train": "data/train-*"}))
    rows = [
        {"instruction": f"do {i}", "input": "", "output": "done", "text": f"Below is an instruction … do {i} … done"}
        for i in range(4)
    ]
    write_parquet(folder / "data" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet", rows)
    return folder


@pytest.fixture
def sharegpt(tmp_path):
    folder = tmp_path / "sharegpt"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    write_json(folder / "ShareGPT_V3_unfiltered_cleaned_split.json", SHAREGPT)
    other = [{"id": "x", "conversations": [{"from": "human", "value": "of another file"}]}]
    write_json(folder / "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json", other)
    (folder / "HTML_cleaned_raw_dataset").mkdir()
    write_json(folder / "HTML_cleaned_raw_dataset" / "sg_90k_part1_html_cleaned.json", [{"id": 1, "html": "<p>"}])
    return folder


@pytest.fixture
def energy_score(tmp_path):
    folder = tmp_path / "text_generation"
    readme(folder, ("default", {"train": "data/train-*"}))
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", [{"text": f"complete {i}"} for i in range(3)])
    return folder


def test_gsm8k_gives_the_questions_of_its_main_configuration(gsm8k):
    prompts = load_prompts(alias("gsm8k", gsm8k), 0)
    assert prompts.texts == ("main train 0?", "main train 1?", "main train 2?")
    assert (prompts.split, prompts.column) == ("train", "question")


def test_gsm8k_has_another_split_and_another_configuration(gsm8k):
    chosen = replace(alias("gsm8k", gsm8k), config="socratic", split="test")
    assert load_prompts(chosen, 0).texts[0] == "socratic test 0?"


def test_mmlu_gives_its_test_split_because_it_has_no_train_split(mmlu):
    prompts = load_prompts(alias("mmlu", mmlu), 0)
    assert prompts.texts == ("all test 0", "all test 1")
    assert (prompts.split, prompts.column) == ("test", "question")


def test_alpaca_gives_instructions_and_not_the_text_with_the_answer(alpaca):
    assert load_prompts(alias("alpaca", alpaca), 0).texts == ("do 0", "do 1", "do 2", "do 3")


def test_sharegpt_gives_the_human_turns_of_one_of_its_files(sharegpt):
    prompts = load_prompts(alias("sharegpt", sharegpt), 0)
    assert (prompts.texts, prompts.dropped_empty) == (("first question", "another question"), 2)


def test_ai_energy_score_gives_its_texts(energy_score):
    assert load_prompts(alias("ai-energy-score", energy_score), 0).texts == ("complete 0", "complete 1", "complete 2")


@pytest.mark.parametrize("split", ["train", "tset"])
def test_unknown_split_names_the_existing_ones(mmlu, split):
    message = refusal(mmlu, config="all", split=split)
    assert all(name in message for name in ("test", "validation", "dev", split, "--split"))


def test_default_split_that_is_not_there_names_those_that_are(mmlu):
    message = refusal(mmlu, config="all")
    assert all(name in message for name in ("test", "validation", "dev", "--split"))


@pytest.mark.parametrize("config", ["mian", None])
def test_unknown_or_missing_configuration_names_the_existing_ones(gsm8k, config):
    message = refusal(gsm8k, config=config)
    assert all(name in message for name in ("main", "socratic", "dataset.config"))


def test_wrong_column_of_a_dataset_names_the_existing_ones(alpaca):
    assert "instruction, input, output, text" in refusal(alpaca, column="prompt")


def test_missing_file_of_a_dataset_is_refused(sharegpt):
    assert "nothing.json" in refusal(sharegpt, files="nothing.json")


def test_directory_that_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal(tmp_path / "empty")


def test_changed_directory_is_read_again(energy_score):
    assert len(texts(energy_score)) == 3
    write_parquet(energy_score / "data" / "train-00000-of-00001.parquet", [{"text": "changed"}])
    assert texts(energy_score) == ("changed",)


def test_directories_of_the_same_name_are_not_taken_for_each_other(tmp_path):
    for parent in ("one", "two"):
        folder = tmp_path / parent / "prompts"
        readme(folder, ("default", {"train": "data/train-*"}))
        write_parquet(folder / "data" / "train-00000-of-00001.parquet", [{"text": f"prompt of {parent}"}])
        assert texts(folder) == (f"prompt of {parent}",)


# ------------------------------------------------------------------ the unreachable hub
@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "https://hub.invalid"}])
def test_unreachable_hub_says_so_and_names_the_prompts_that_come_with_lem(tmp_path, offline):
    # In a separate process: the hub's client reads these variables once, when imported.
    code = (
        "from lem.workload.datasets import load_prompts\n"
        "from lem.spec.experiment import Dataset\n"
        "from lem.errors import DatasetError\n"
        "try: load_prompts(Dataset(path='someone/something'), 0)\n"
        "except DatasetError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", **offline},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "someone/something is not cached on this machine, and the hub cannot be reached" in done.stdout
    assert "-d sample" in done.stdout
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ the prompts that come with lem
def test_sample_has_300_distinct_prompts_of_mixed_lengths():
    prompts = load_prompts(Dataset(path="builtin:sample"), 0)
    assert len(set(prompts.texts)) == prompts.available == 300
    assert all(text.strip() == text for text in prompts.texts)
    assert (prompts.column, prompts.dropped_empty) == ("text", 0)
    words = sorted(len(text.split()) for text in prompts.texts)
    assert words[0] < 15
    assert words[-1] > 150


def test_rows_of_the_sample_say_their_kind():
    assert all(set(row) == {"text", "kind"} for row in builtin.read("builtin:sample"))


def test_alias_sample_is_the_one_that_comes_with_lem():
    fields = yaml.safe_load((resources.files("lem.conf") / "dataset" / "sample.yaml").read_text())
    assert len(load_prompts(Dataset(**fields), 0).texts) == 300


def test_unknown_builtin_names_the_existing_ones():
    assert "the built-in datasets are sample" in refusal("builtin:samples")
