"""check_gpu.py: steps one after the other, cut off in time, and never without a GPU."""

from __future__ import annotations

import check_gpu
import pytest
import torch

SCRIPT = check_gpu


def test_bad_input_is_one_line(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA GPU" in refused(["--out", str(tmp_path / "run")])
    assert "minutes=0.0" in refused(["--minutes", "0"])
    assert "workers=0" in refused(["--workers", "0"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [False, True])
def test_steps_run_in_order_and_an_endless_one_is_interrupted(
    failing, tmp_path, refused, monkeypatch, capsys
):
    """The tests begin beside the warm-up; what comes after them waits until it has ended."""
    mark = tmp_path / "warm"
    wait = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('told')"
    steps = {
        "tests": (0.5, ["-c", "print('short')"]),
        "timed": (
            0.5,
            ["-c", f"import pathlib; assert pathlib.Path({str(mark)!r}).exists(); print('timed')"],
        ),
        "endless": (0.1, ["-c", wait if failing else "print('end')"]),
    }
    warm = ["-c", f"import time, pathlib; time.sleep(0.5); pathlib.Path({str(mark)!r}).write_text('')"]
    monkeypatch.setattr(check_gpu, "STEPS", steps)
    monkeypatch.setattr(check_gpu, "WARM", [warm])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    arguments = ["--minutes", "0.4", "--out", str(tmp_path / "run")]
    assert check_gpu.main(arguments) == int(failing)
    said = capsys.readouterr().out
    assert said.index("short") < said.index("timed") < said.index("endless")
    assert ("told" in said and "FAILED (124)" in said) == failing
    assert "already holds tests.log" in refused(arguments)
