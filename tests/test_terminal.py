# SPDX-License-Identifier: Apache-2.0
"""What a command prints cannot steer the terminal."""

from __future__ import annotations

import pytest

from optimum_calibprune.terminal import say, table


def test_control_characters_of_a_name_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    say(table([["name", "value"], ["\x1b[2J\x1b]0;owned\x07evil\x9b31m\r", "\x00é\tb"]]))
    say("\x1b[31mred", to_stderr=True)
    shown = capsys.readouterr()
    assert "[2J]0;ownedevil31m" in shown.out
    assert "é\tb\n" in shown.out
    assert not [c for c in shown.out + shown.err if (ord(c) < 32 and c not in "\n\t") or 126 < ord(c) < 160]
