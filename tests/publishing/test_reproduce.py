# SPDX-License-Identifier: Apache-2.0
"""The recorded command names what was used, without the folders of the machine."""

from __future__ import annotations

import shlex

import pytest

from optimum_calibprune.publishing.reproduce import command, public_config
from optimum_calibprune.records import BaseModel, CalibPruneConfig, CalibrationSource


def test_files_are_named_without_their_folders_even_odd_ones() -> None:
    given = ("gsm8k", "/home/me/lang=en/part.parquet", "notes=/home/me/notes.txt:code")
    config = CalibPruneConfig("/home/me/model", sources=given, samples=8, length=64)
    base = BaseModel("model")
    opened = [
        CalibrationSource("gsm8k", "math", path="/site-packages/gsm8k.jsonl"),
        CalibrationSource("part", "general", path="/home/me/lang=en/part.parquet"),
        CalibrationSource("notes", "code", path="/home/me/notes.txt"),
    ]
    line = command(config, base, opened, CalibrationSource("text", "general", path="/home/me/text.txt"))
    assert line.endswith(
        "--perplexity-text text.txt --sources gsm8k part=part.parquet:general notes=notes.txt:code --output DIR"
    )
    assert "/home" not in line + public_config(config, base, opened).to_json()


def test_sparsity_by_module_is_written_so_that_a_shell_leaves_it_alone() -> None:
    config = CalibPruneConfig("pocket", sparsity={"*.mlp.*": 0.7, "*.o_proj": "dense", "*": "2:4"})
    words = shlex.split(command(config, BaseModel("pocket"), []))
    assert words[words.index("--sparsity") + 1] == "*.mlp.*=70%,*.o_proj=dense,*=2:4"
    assert "--sparsity '*.mlp.*=" in command(config, BaseModel("pocket"), [])


def test_an_allocation_is_written_where_it_is_not_the_default() -> None:
    assert "--allocation owl" in command(CalibPruneConfig("pocket", allocation="owl"), BaseModel("pocket"), [])
    assert "--allocation" not in command(CalibPruneConfig("pocket"), BaseModel("pocket"), [])


def test_pickles_are_allowed_where_they_were() -> None:
    config, base = CalibPruneConfig("me/model"), BaseModel("me/model", "abc")
    assert "prune me/model --revision abc --allow-pickle --sparsity" in command(config, base, [], allow_pickle=True)
    assert "--allow-pickle" not in command(config, base, [])


def test_data_in_memory_cannot_be_named_and_the_command_says_so() -> None:
    config = CalibPruneConfig("pocket", sources=("notes",))
    line = command(config, BaseModel("pocket"), [CalibrationSource("notes", "math")])
    assert line.endswith("--output DIR  # with sources in memory: notes")
    assert "--sources" not in line


def test_a_name_cannot_end_the_comment_that_it_stands_in() -> None:
    with pytest.raises(ValueError, match="one line of printable characters"):
        CalibrationSource("notes\nrm -r .", "math")


def test_a_published_calibration_set_is_one_name_at_its_commit() -> None:
    config = CalibPruneConfig("pocket", sources=("hub:me/set", "gsm8k"))
    opened = [CalibrationSource(f"set-{c}", c, "me/set", c, revision="abc") for c in ("code", "math")]
    line = command(config, BaseModel("pocket"), [*opened, CalibrationSource("gsm8k", "math", "openai/gsm8k")])
    assert line.endswith("--sources hub:me/set@abc gsm8k --output DIR")
