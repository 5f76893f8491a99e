"""The command line in the process of a test."""

import os
import sys
from collections.abc import Callable

import pytest

from jobs.cli import main

Dare = Callable[..., tuple[int, str]]


@pytest.fixture
def dare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dare:
    """Run the command line; returns the exit code and the error line or the output."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dare", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        if exit.value.code in (0, None):
            return 0, captured.out
        message = str(exit.value.code)
        assert message.startswith("dare: ")
        assert "\n" not in message, "one line"
        secret = os.environ.get("AWS_SECRET_ACCESS_KEY")
        assert not secret or secret not in message
        return 1, message

    return run
