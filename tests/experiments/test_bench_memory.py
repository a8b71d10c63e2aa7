"""bench_memory.py: a small measurement end to end; one line for bad input."""

from __future__ import annotations

import json

import bench_memory
import pytest

SCRIPT = bench_memory

BAD = {
    "text": (["--lengths", "256,x"], "lengths='256,x'"),
    "zero": (["--lengths", "0,1,2"], "lengths='0,1,2'"),
    "order": (["--lengths", "3,2,1"], "ascending"),
    "two": (["--lengths", "3,4"], "three or more"),
    "long": (["--lengths", "3,4,200000"], "131072"),
    "preset": (["--preset", "huge"], "preset='huge'"),
    "device": (["--device", "abacus"], "device='abacus'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, refused_and_nothing_written):
    arguments, expected = BAD[name]
    assert expected in refused_and_nothing_written(arguments)


def test_rows_hold_what_was_measured_and_are_never_overwritten(tmp_path, refused, monkeypatch, capsys):
    """The line through the first two points is exact there; 4 -> 8 -> 12 MiB is linear, 13 is 1/12 above."""

    class Done:
        def __init__(self, command, **options):
            self.stdout = {"100": "noise\n4.0", "200": "8.0", "300": "13.0"}[
                command[command.index("--one") + 1]
            ]

    monkeypatch.setattr(bench_memory.subprocess, "run", Done)
    arguments = ["--lengths", "100,200,300", "--out", str(tmp_path)]
    assert bench_memory.main(arguments) == 0
    content = (tmp_path / "memory.json").read_text()
    assert [row["over_linear"] for row in json.loads(content)["rows"]] == [1, 1, round(13 / 12, 4)]
    assert "already holds" in refused(arguments)
    assert (tmp_path / "memory.json").read_text() == content
