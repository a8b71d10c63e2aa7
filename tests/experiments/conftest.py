"""What the tests of the scripts share: a text to train on, and how bad input must be answered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """Path of 200 small Python functions, 5 KB."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"".join(b"def f%d(x):\n    return x + %d\n\n" % (i, i * i) for i in range(200)))
    return str(path)


@pytest.fixture
def refused(request, capsys) -> Callable[[list[str]], str]:
    """Calls the script under test (`SCRIPT` of the module): exit code 2; returns its one line on stderr."""
    script: ModuleType = request.module.SCRIPT

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert script.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        return error

    return run


@pytest.fixture
def refused_and_nothing_written(refused, tmp_path, monkeypatch) -> Callable[[list[str]], str]:
    """`refused`, called in an empty folder that must stay empty."""

    def run(arguments: list[str]) -> str:
        monkeypatch.chdir(tmp_path)
        error = refused(arguments)
        assert list(tmp_path.iterdir()) == []
        return error

    return run


@pytest.fixture
def not_written_over(refused, tmp_path, monkeypatch) -> Callable[[str, list[str]], None]:
    """A benchmark on what passes for a GPU refuses a folder with rows of this name, and leaves them alone."""

    def run(file: str, arguments: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        (tmp_path / file).write_text("mine")
        assert f"already holds {file}" in refused([*arguments, "--out", str(tmp_path)])
        assert (tmp_path / file).read_text() == "mine"

    return run
