"""What is reported during a run, and how seldom."""

from __future__ import annotations

import io
import json
import os

from lem.runner.progress import Event, PipeReport
from lem.studies.display import Lines, Outcomes, Rate, StudyLines, bars


def sent(events, period_s):
    reading, writing = os.pipe()
    report = PipeReport(writing, period_s=period_s)
    for event in events:
        report(event)
    os.close(writing)
    with os.fdopen(reading) as lines:
        return [json.loads(line) for line in lines]


def test_the_first_and_the_last_of_a_phase_are_always_sent():
    events = [Event("load"), *(Event("measured", i, 100, i * 3) for i in range(101))]
    lines = sent(events, period_s=3600)
    assert [(line["phase"], line["done"]) for line in lines] == [("load", 0), ("measured", 0), ("measured", 100)]
    assert lines[-1]["output_tokens"] == 300


def test_without_a_period_everything_is_sent():
    assert len(sent([Event("measured", i, 10) for i in range(11)], period_s=0)) == 11


def test_a_reader_that_is_gone_disturbs_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    report = PipeReport(writing, period_s=0)
    for i in range(3):
        report(Event("measured", i, 3))
    os.close(writing)


def test_the_rate_counts_from_the_beginning_of_its_phase():
    now_s = [0.0]
    rate = Rate(clock_s=lambda: now_s[0])
    rate(Event("load"))
    now_s[0] = 100.0
    assert rate(Event("measured", 0, 40)) == ""
    now_s[0] = 110.0
    assert rate(Event("measured", 20, 40, 500)) == "2 prompts/s  50 tokens/s  10 s left"
    now_s[0] = 120.0
    assert rate(Event("measured", 40, 40, 1000)) == "2 prompts/s  50 tokens/s"


def test_without_a_terminal_a_line_for_each_tenth():
    stream = io.StringIO()
    show = Lines(stream)
    show(Event("load"))
    for i in range(1001):
        show(Event("measured", i, 1000))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Loading the model"
    assert len(lines) == 12
    assert lines[-1].startswith("Prompts 1000/1000")
    assert "\x1b" not in stream.getvalue()


def test_every_phase_that_has_ended_has_a_full_bar(capsys):
    with bars() as show:
        for phase in ("load", "idle_before", "load", "idle_loaded"):
            show(Event(phase))
        show(Event("measured", 0, 2))
        show(Event("measured", 2, 2))
    shown = capsys.readouterr().err.splitlines()
    assert [line.partition("  ")[0] for line in shown] == [
        "Idle, unloaded", "Loading the model", "Idle, loaded", "Prompts",
    ]  # fmt: skip
    assert all(" 1/1 " in line or " 2/2 " in line for line in shown), shown


def test_a_batch_reports_how_many_have_ended_and_failed():
    stream = io.StringIO()
    show = StudyLines(stream, Outcomes(2, set()), at_once=2)
    first, second = show.begin(0, "a.yaml"), show.begin(1, "b.yaml")
    second(Event("load"))
    first(Event("load"))
    show.end(1, "failed: no", failed=True)
    show.end(0, "completed", failed=False)
    assert stream.getvalue().splitlines() == [
        "[1/2] a.yaml",
        "[2/2] b.yaml",
        "[2] Loading the model",
        "[1] Loading the model",
        "[2/2] b.yaml: failed: no (1 of 2 ended, 1 failed)",
        "[1/2] a.yaml: completed (2 of 2 ended, 1 failed)",
    ]


def test_a_run_that_is_tried_again_counts_once_and_those_that_need_not_run_count_as_ended():
    stream = io.StringIO()
    show = StudyLines(stream, Outcomes(3, {0}), at_once=1)
    for number, failed in ((1, True), (2, True), (1, True), (2, False)):
        show.begin(number, "a.yaml")
        show.end(number, "over", failed=failed)
    assert [line.rpartition("(")[2] for line in stream.getvalue().splitlines() if "over" in line] == [
        "2 of 3 ended, 1 failed)",
        "3 of 3 ended, 2 failed)",
        "3 of 3 ended, 2 failed)",
        "3 of 3 ended, 1 failed)",
    ]
