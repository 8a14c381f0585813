"""The splits of a directory without a card, compared with those that `datasets` finds."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from lem.workload import folder


def by_the_library(where: Path) -> dict[str, list[Path]]:
    """Return the data files of each split as `datasets` assigns them."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    try:
        patterns = get_data_patterns(str(where))
    except EmptyDatasetError:
        return {}
    found: dict[str, set[Path]] = {}
    for split, some in patterns.items():
        for pattern in some:
            with suppress(FileNotFoundError):  # not every pattern matches a file
                found.setdefault(str(split), set()).update(map(Path, resolve_pattern(pattern, str(where))))
    data = set(folder._data_files(where))
    return {split: sorted(paths & data) for split, paths in found.items()}


TREES = [
    ["a.csv", "b.csv"],
    ["train.csv", "test.csv", "other.csv"],
    ["Train.csv", "TEST.csv"],
    ["my-train.csv", "training_2.csv", "dev.jsonl", "val-1.jsonl", "evaluation.csv", "x.eval.csv"],
    ["trainer.csv", "constrain.csv", "testament.csv", "contest.csv"],
    ["train/a.csv", "b.csv"],
    ["train/a.csv", "test.csv", "below/testing 3/deep/x.csv"],
    ["below/my.valid/x.csv", "below/x_train_y/z.csv", "latest/y.csv"],
    ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/odd-00000-of-00001-x.parquet"],
    ["data/train-00000-of-00002.parquet", "data/other.parquet"],
    ["other/train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"],
    ["data/a_b-00000-of-00001.csv.gz", "data/a-00000-of-00001.csv"],
    ["train.png", "a.csv"],
    ["README.md", "train-config.json", "config.json", "a.json"],
    ["README.md", "config.json"],
    [".train.csv", ".train/a.csv", "__train/a.csv", "__test.csv", "b.csv"],
    ["train", "test.csv"],
    ["testtrain.csv", "test train.csv"],
    ["dev/train.csv", "train/dev.csv"],
    ["eval.1/ü.txt", "tränen.txt"],
    ["a[test].csv", "train*.csv"],
    [],
]


@pytest.mark.parametrize("names", TREES, ids=" ".join)
def test_splits_are_those_of_the_library(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\na\n")
    assert folder._splits(tmp_path) == by_the_library(tmp_path.resolve())


def test_splits_with_links_are_those_of_the_library(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.csv").write_text("text\na\n")
    where = tmp_path / "set"
    where.mkdir()
    (where / "a.csv").write_text("text\na\n")
    (where / "test").symlink_to(tmp_path / "elsewhere")
    (where / "again").symlink_to(where)
    (where / "b.csv").symlink_to(tmp_path / "elsewhere" / "x.csv")
    assert folder._splits(where) == by_the_library(where) == {"train": [where / "a.csv", where / "b.csv"]}


def test_a_split_of_numbered_parts_may_have_any_name(tmp_path):
    (tmp_path / "data").mkdir()
    part = tmp_path / "data" / "a-b-00000-of-00001.csv"
    part.write_text("text\na\n")
    assert folder._splits(tmp_path) == {"a-b": [part]}


def test_files_that_only_some_versions_of_the_library_look_for_change_nothing(tmp_path):
    for name in ("a.csv", "log.eval", "task.toml"):
        (tmp_path / name).write_text("text\na\n")
    assert folder._splits(tmp_path) == {"train": [tmp_path / "a.csv"]}
