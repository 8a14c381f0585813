"""Reading back the journal of a killed process."""

from __future__ import annotations

import pytest

from lem.record import Flops
from lem.results.journal import Checkpoint, Journal, read
from tests.records import failed, phases, reading, record, requests

OPENING = record([], phases=phases()[:-1], status="interrupted")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "journal_0_a1.jsonl"


def write(file, *checkpoints, opening=OPENING):
    journal = Journal(file)
    journal.open_window(opening)
    for row, checkpoint in zip(requests(range(len(checkpoints)), cycle=opening.cycle), checkpoints, strict=True):
        journal.add([row], checkpoint)
    journal.close()


def test_rows_come_back_as_they_were(file):
    write(file, Checkpoint(0.5), Checkpoint(1.5))
    (window,) = read(file.read_bytes())
    assert window.rows == requests([0, 1])
    assert window.record == OPENING


def test_a_killed_process_is_known_up_to_its_last_batch(file):
    write(file, Checkpoint(0.5, Flops(1.0, "m"), (reading(energy_j=30.0),), 0.4), Checkpoint(1.5, Flops(2.0, "m")))
    (window,) = read(file.read_bytes())
    salvaged = window.salvaged()
    assert (salvaged.requests_completed, salvaged.input_tokens, salvaged.output_tokens) == (2, 21, 40)
    window = salvaged.phase("measured")
    assert (window.duration_s, window.energy) == (1.5, (reading(energy_j=30.0, covered_s=0.4),))
    (usable,) = window.usable()
    assert (usable.energy_j, usable.reason) == (None, "the reading covers only 0.4 of 1.5 s")
    assert salvaged.flops.total == 2.0
    cut, *others = salvaged.warnings
    assert cut.code == "window_cut"
    assert "1.1 s before" in cut.text
    assert "killed an unknown time after its last finished request" in cut.text
    assert [each.code for each in others] == ["short_window"]


@pytest.mark.parametrize(
    ("source", "resolution_s", "covered_s", "behind_s"),
    [
        ("counter", 0.1, None, 1.2),
        ("integral", 0.05, None, 1.15),
        ("replay", 0.5, None, 1.1),
        ("estimate", 1.0, 0.2, 1.3),
    ],
    ids=["a_tick", "a_sample", "a_trace", "whole_seconds"],
)
def test_a_killed_process_says_how_old_its_energy_may_be(file, source, resolution_s, covered_s, behind_s):
    read_then = reading(source=source, energy_j=30.0, resolution_s=resolution_s, covered_s=covered_s)
    write(file, Checkpoint(0.5, None, (read_then,), 0.4), Checkpoint(1.5))
    (window,) = read(file.read_bytes())
    salvaged = window.salvaged()
    assert salvaged.cut.energy_behind_s == pytest.approx(behind_s)
    assert f"{behind_s:.3g} s before" in salvaged.warnings[0].text


def test_a_killed_process_without_a_meter_says_so(file):
    write(file, Checkpoint(0.5, None, (), 0.4))
    (window,) = read(file.read_bytes())
    assert ("energy_missing", "no meter was used.") in [(w.code, w.text) for w in window.salvaged().warnings]


def test_failed_requests_of_a_killed_process_are_counted_apart(file):
    journal, (first, second) = Journal(file), requests([0, 1])
    journal.open_window(OPENING)
    journal.add([first, failed(second)], Checkpoint(0.5))
    journal.close()
    (window,) = read(file.read_bytes())
    assert window.rows == [first, failed(second)]
    it = window.salvaged()
    assert (it.requests_completed, it.requests_failed) == (1, 1)
    assert (it.input_tokens, it.output_tokens) == (first.input_tokens, first.output_tokens)


def test_a_checkpoint_whose_energy_could_not_be_read_says_why_and_is_read(file):
    lost = (reading(energy_j=None, reason="the GPU is lost"),)
    write(file, Checkpoint(0.5, None, lost, 0.4))
    (window,) = read(file.read_bytes())
    assert len(window.rows) == 1
    assert window.salvaged().phase("measured").energy == lost


def test_energy_that_no_checkpoint_tells_is_null_with_a_reason(file):
    write(file, Checkpoint(0.5))
    (window,) = read(file.read_bytes())
    (gpu,) = window.salvaged().phase("measured").energy
    assert (gpu.component, gpu.energy_j) == ("gpu", None)
    assert gpu.reason


def test_a_window_without_a_batch_is_no_window(file):
    write(file)
    (window,) = read(file.read_bytes())
    assert window.salvaged().phase("measured") is None


def test_every_beginning_of_a_journal_can_be_read(file):
    write(file, Checkpoint(0.5), Checkpoint(1.5))
    content = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        windows = read(content[:size])
        rows = sum(len(window.rows) for window in windows)
        assert rows == max(0, sum(end <= size for end in ends) - 1)


def test_a_damaged_line_is_named(file):
    write(file, Checkpoint(0.5), Checkpoint(1.5))
    lines = file.read_bytes().split(b"\n")
    lines[1] = lines[1][:20]
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read(b"\n".join(lines))


def test_rows_without_a_window_are_damage(file):
    write(file, Checkpoint(0.5))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read(file.read_bytes().split(b"\n", 1)[1])


def test_records_that_are_known_are_not_read_again(file):
    for cycle in (1, 2):
        write(file, Checkpoint(0.5), opening=record([], phases=phases()[:-1], cycle=cycle))
    known = record(requests([0]), cycle=2)
    first, second = read(file.read_bytes(), {2: known})
    assert first.record.cycle == 1
    assert second.record is known
    assert second.rows == requests([0], cycle=2)
