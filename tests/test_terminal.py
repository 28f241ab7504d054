# SPDX-License-Identifier: Apache-2.0
"""What a command prints cannot steer the terminal; each task has a bar of its own."""

from __future__ import annotations

import pytest
import tqdm

from optimum_calibprune.terminal import progress, say, table


def test_control_characters_of_a_name_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    say(table([["name", "value"], ["\x1b[2J\x1b]0;owned\x07evil\x9b31m\r", "\x00é\tb"]]))
    say("\x1b[31mred", to_stderr=True)
    shown = capsys.readouterr()
    assert "[2J]0;ownedevil31m" in shown.out
    assert "é\tb\n" in shown.out
    assert not [c for c in shown.out + shown.err if (ord(c) < 32 and c not in "\n\t") or 126 < ord(c) < 160]


def test_tasks_of_one_size_have_a_bar_each(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options: object) -> None:
            super().__init__(**{**options, "disable": True})
            self.total, self.n, self.steps = options["total"], 0, []
            bars.append(self)

        def update(self, n: float = 1) -> None:
            self.steps.append(n)
            self.n += n

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with progress(lambda: None) as show:
        for task in "abc":
            for done in (0, 2, 4):
                show(done, 4, f"evaluate: {task}")
    assert [bar.steps for bar in bars] == [[0, 2, 2]] * 3
