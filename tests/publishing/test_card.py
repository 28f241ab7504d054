# SPDX-License-Identifier: Apache-2.0
"""The card is a pure function of the RunRecord: the whole text is compared with a golden file."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from optimum_calibprune import pocket
from optimum_calibprune.publishing.card import PICTURES, render, retention_table, starved_experts
from optimum_calibprune.publishing.markup import code, is_repo_id, link, one_line, prose
from optimum_calibprune.publishing.readme import has_own_text, updated
from optimum_calibprune.records import (
    CalibrationSource,
    CapabilityReport,
    CapabilityRetention,
    RunRecord,
    Sparsity,
    Untouched,
)
from tests.publishing.run_record import example


GOLDEN = Path(__file__).parent / "golden_card.md"


@pytest.fixture
def run() -> RunRecord:
    return example()


def test_the_record_survives_json(run: RunRecord) -> None:
    assert RunRecord.from_json(run.to_json()) == run


def test_the_whole_card_is_as_it_was_approved(run: RunRecord) -> None:
    """After a change that is meant, write `render(example(), "me/tiny-60", pictures=PICTURES)` to golden_card.md and read the difference."""
    assert render(run, "me/tiny-60", pictures=PICTURES) == GOLDEN.read_text(encoding="utf-8")


def test_sparsity_by_module_is_named_by_its_share_and_listed(run: RunRecord) -> None:
    asked = Sparsity.parse("*.gate_proj=dense,*.mlp.*=60.2%,*=50%")
    left = Untouched("model.layers.0.mlp.gate_proj.weight", (16, 8), "left dense, as asked by '*.gate_proj'")
    prune = replace(run.prune, pattern=asked, untouched=(*run.prune.untouched, left))
    by_module = replace(run, config=replace(run.config, sparsity=asked), prune=prune)
    text = render(by_module)
    assert RunRecord.from_json(by_module.to_json()) == by_module
    assert "# someone/tiny at 40.1%\n" in text, "154 of 384 weights, those left dense among them"
    assert f"pruned to 40.1% sparsity (`{asked}`) with SparseGPT" in text
    folded = text.partition("<details><summary>Sparsity by module</summary>")[2].partition("</details>")[0]
    assert f"\n\nThe first pattern that fits a module's name says its sparsity: `{asked}`.\n\n| module " in folded
    assert "- `model.layers.0.mlp.gate_proj.weight`: left dense, as asked by '\\*.gate_proj'\n" in folded


def test_numbers_in_narrow_cells_stay_on_one_line(run: RunRecord) -> None:
    rows = [line for line in render(run).splitlines() if line.startswith(("| general ", "| **total** ", "| `c4` "))]
    assert len(rows) == 3
    assert not [row for row in rows if re.search(r"\d %|\d to \d", row)]
    assert all("\u00a0%" in row for row in rows)
    assert "\u00a0" not in str(retention_table(run)), "a terminal has room"


def test_owl_is_named_with_what_it_asked_of_the_modules(run: RunRecord) -> None:
    up, down = run.prune.layers
    prune = replace(run.prune, layers=(replace(up, zeros_asked=64), replace(down, zeros_asked=90)))
    text = render(replace(run, config=replace(run.config, allocation="owl"), prune=prune))
    assert (
        "weights are zero (61.33 %). Blocks with more outliers lose less (OWL, arXiv:2310.05175): of a matrix 50.0 % to "
        "70.3 % were asked, in total as many as without it.\n\nHessians that" in text
    )


def test_the_metadata_is_valid_and_claims_nothing_of_the_base(run: RunRecord) -> None:
    data = ModelCard(render(run)).data
    assert data.base_model == "someone/tiny"
    assert data.license == "mit"
    assert data.datasets == ["allenai/c4"]
    (c4,) = data.calibprune["calibration"]
    assert c4 == {"dataset": "allenai/c4", "config": "en", "split": "train", "revision": "fedcba9876543210"}
    assert {"calibprune", "sparse"} <= set(data.tags)
    assert {r.metric_name: (r.dataset_type, r.metric_type, r.metric_value) for r in data.eval_results} == {
        "easy_facts (300 items, 5 shots)": ("some/facts", "accuracy", 0.7),
        "hard_facts (100 items, 0 shots)": ("some/facts", "acc", 0.3),
        "functions (2 items, 3 shots)": ("calibprune/functions", "pass@1", 0.1),
    }
    older = ModelCard(render(replace(run, tasks=()))).data  # a record of the first release names no tasks
    assert {r.metric_name: r.metric_value for r in older.eval_results} == {
        "general (400 items)": 0.6,
        "code (2 items)": 0.1,
    }


def test_a_task_says_how_it_was_measured_and_of_an_older_run_only_what_is_known(run: RunRecord) -> None:
    older = json.loads(run.to_json())
    for task in older["tasks"]:
        for name in ("shots", "data", "chance", "repo", "retention", "interval"):
            del task[name]
    text = render(RunRecord.from_json(json.dumps(older)))
    assert "| `easy_facts` | general | accuracy |  | 90.0 | 70.0 |  | 300 |" in text
    assert "name: easy_facts (300 items)\n" in text
    assert "some/facts" not in text
    text = render(run)
    linked = "[some/facts](https://huggingface.co/datasets/some/facts), test |"
    assert f"| `easy_facts` | general | accuracy | 5 | 90.0 | 70.0 | 77.8 (72.0 to 83.0) | 300 of {linked}" in text
    assert f"| `hard_facts` | general | acc | 0 | 30.0 | 30.0 | at chance | 100 of {linked}" in text
    assert "| 20.0 (0.0 to 50.0) | 2 of functions.jsonl |" in text


def test_a_section_without_data_does_not_appear(run: RunRecord) -> None:
    assert "retention.png" not in render(run)
    bare = replace(run, capabilities=None, perplexity=None, tasks=(), prune=replace(run.prune, method="magnitude"))
    text = render(bare)
    assert "## Citation" in text
    assert "The method of pruning" not in text
    assert "By task" not in text
    assert "What was kept" not in text
    assert "## Perplexity" not in text
    assert "None" not in text
    assert "\n\n\n\n" not in text


def test_a_local_base_model_is_no_hub_link(run: RunRecord) -> None:
    text = render(replace(run, base=replace(run.base, name="my-model", revision=None)))
    assert "base_model" not in text
    assert "https://huggingface.co/my-model" not in text


def test_text_that_the_model_wrote_says_so_and_how(run: RunRecord) -> None:
    pool = {"sampling": "t_initial 0.7, t_final 0.7", "documents": "12", "seed": "3", "windows": "8"}
    written = CalibrationSource("notes", "code", written="proposals", pool=pool)
    text = render(replace(run, sources=(run.sources[0], written)))
    row = next(line for line in text.splitlines() if line.startswith("| `notes` "))
    assert "| written by the model: t_initial 0.7, t_final 0.7, documents 12, seed 3 |" in row
    assert "| the model's own text |" in row


def test_undefined_retention_says_so(run: RunRecord) -> None:
    at_chance = CapabilityRetention("math", 4, 0.25, 0.25, 0.25, None, None, None)
    report = CapabilityReport((at_chance,), None, None, None, {"code": "nobody asked"})
    text = render(replace(run, capabilities=report))
    assert "undefined: dense is at chance" in text
    assert "Not measured:\n\n- code: nobody asked" in text
    assert ["math", "25.0 %", "25.0 %", "undefined: dense is at chance", ""] in retention_table(
        replace(run, capabilities=report)
    )


def test_the_python_lines_run(run: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(pocket.MODEL, tmp_path / "model")
    text = render(run, str(tmp_path / "model"))
    exec(compile(text.split("```python\n")[1].split("```")[0], "card", "exec"), {})
    assert "The capital of France is" in capsys.readouterr().out


def test_links_lead_to_repos_at_their_commits(run: RunRecord) -> None:
    links = [token.attrs["href"] for token in inline(render(run, pictures=PICTURES)) if token.type == "link_open"]
    assert links == [
        "https://huggingface.co/someone/tiny",
        *["https://huggingface.co/datasets/some/facts"] * 2,
        "https://huggingface.co/datasets/allenai/c4/tree/fedcba9876543210",
    ]
    images = [token.attrs["src"] for token in inline(render(run, pictures=PICTURES)) if token.type == "image"]
    assert images == list(PICTURES)


def inline(text: str) -> Iterator[Token]:
    """The tokens of a card's body, as a Markdown renderer finds them."""
    parsed = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    for token in parsed:
        yield token
        yield from token.children or ()


EVIL = (
    "<script>alert(1)</script> \\| <b> \\\\| <i>\n\n# Owned\n\n[a](https://evil.example) ![b](https://evil.example/b.png) | c | `d` **e** $f$\n"
    "```\n<img src=x onerror=alert(1)>\n\n---\nlicense: owned\n---\n@someone \u202e <!-- {{ run }} {% raw %} ../../etc/passwd \x1b[31m"
)


def hostile(run: RunRecord, text: str) -> RunRecord:
    """A run in which everything that others choose is `text`."""
    source = CalibrationSource(text.split("\n")[0], "code", repo=text, subset=text, revision=text, licence=text)
    local = replace(source, name="local", repo=None, path=text)
    layers = [replace(layer, module=text, why=text, rescue=text) for layer in run.prune.layers]
    untouched = (Untouched(text, (1, 1), text),)
    retained = tuple(
        replace(entry, capability=f"{entry.capability} {text}") for entry in run.capabilities.capabilities
    )
    measured = replace(
        run.capabilities, capabilities=retained, worst=retained[1].capability, not_measured={text: text}
    )
    profiles = (
        replace(run.profiles[0], name=source.name),
        replace(run.profiles[1], name="local"),
    )
    return replace(
        run,
        command=f"optimum-cli calibprune prune {shlex.quote(text)}",
        base=replace(run.base, name=text, revision=text, licence=text, language=(text,)),
        sources=(source, local),
        profiles=profiles,
        mix=replace(run.mix, shares={source.name: 0.5, "local": 0.5}, note=text),
        prune=replace(run.prune, layers=tuple(layers), untouched=untouched),
        fingerprint=text,
        capabilities=measured,
        tasks=tuple(
            replace(task, task=text, capability=text, metric=text, data=text, repo=text) for task in run.tasks
        ),
        perplexity=replace(run.perplexity, text=text, reason=text),
        versions={text: text},
        hardware={text: text},
        seconds={text: 1.0},
    )


def test_nothing_that_others_choose_becomes_markup(run: RunRecord) -> None:
    text = render(hostile(run, EVIL), EVIL, pictures=PICTURES)
    found = list(inline(text))
    assert {token.attrs["href"] for token in found if token.type == "link_open"} == set()
    assert [token.attrs["src"] for token in found if token.type == "image"] == list(PICTURES)
    allowed = re.compile(r"\s*(<!-- optimum-calibprune [^<>]* -->|</?details>|<summary>[\w ]*</summary>|\s)*\s*")
    markup = [token.content for token in found if token.type in ("html_block", "html_inline")]
    assert [content for content in markup if not allowed.fullmatch(content)] == []
    headings = [found[i + 1].content for i, token in enumerate(found) if token.type == "heading_open"]
    plain = [
        found[i + 1].content
        for i, token in enumerate(inline(render(run, pictures=PICTURES)))
        if token.type == "heading_open"
    ]
    assert len(headings) == len(plain)
    assert "Owned" not in headings
    assert not re.search("[\u202e\x1b]", text)
    strong = [found[i + 1].content for i, token in enumerate(found) if token.type == "strong_open"]
    assert [text.split()[0] for text in strong] == ["code", "total", "47.5"]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    structure = re.compile(r"(?<!\\)(?:\\\\)*\|")  # to some renderers a bar after two backslashes ends a cell
    cells = {len(structure.findall(row)) for row in rows}
    assert cells == {len(re.findall(r"\|", row)) for row in render(run).splitlines() if row.startswith("| ")}


@pytest.mark.parametrize("name", ["a|b", r"a\|<b>", r"a\\|<b>", r"\\\|<b>|", r"a\b"])
def test_every_bar_in_code_follows_one_backslash(name: str) -> None:
    text = code(name)
    assert all(len(run) == 1 for run in re.findall(r"(\\*)\|", text)), text
    assert text.count("|") == name.count("|")
    assert text.strip("`").replace("\\|", "|").replace(" ", "") == name, "and nothing is lost"


def test_hostile_names_stay_values_in_the_metadata_and_strings_in_the_code(run: RunRecord) -> None:
    text = render(hostile(run, EVIL), EVIL)
    data = ModelCard(text).data
    assert data.license == one_line(EVIL)
    assert data.language == [one_line(EVIL)]
    assert data.datasets is None, "nor is that of its source"
    assert data.base_model is None, "it is no repository's name"
    assert "owned" not in data.to_dict()
    code = next(token.content for token in inline(text) if token.type == "fence" and token.info == "python")
    (first, *_) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.args]
    assert isinstance(first.args[0], ast.Constant)
    shown = next(token.content for token in inline(text) if token.type == "fence" and token.info == "bash")
    assert shlex.split(shown)[:3] == ["optimum-cli", "calibprune", "prune"]
    assert len(shlex.split(shown)) == 4


@pytest.mark.parametrize("name", ["../../etc", "a/../b", "a/b/c", "a b", "a/b?x=1", "a/b#c", "-a", "", "a\nb"])
def test_a_name_that_is_no_repository_is_no_link(name: str) -> None:
    assert "](" not in link(name)
    assert not is_repo_id(name)


def test_a_readme_keeps_the_users_text_and_metadata(run: RunRecord) -> None:
    card = render(run)
    assert updated(None, card) == updated("", card) == updated(card, card) == card
    mine = "---\ntags:\n- mine\n- sparse\nlicense: gpl-3.0\nwidget: [a]\n---\n# Mine\n"
    both = updated(mine, card)
    assert updated(both, card) == both
    assert updated(both, render(replace(run, peak_memory=0))).replace("0.00 GiB", "1.00 GiB") == both
    assert has_own_text(mine)
    assert has_own_text(both)
    assert not has_own_text(card)
    data = ModelCard(both).data.to_dict()
    assert data["license"] == "mit"
    assert data["widget"] == ["a"]
    assert data["tags"] == ["calibprune", "pruned", "sparse", "sparsegpt", "mine"]
    assert both.split("\n---\n", 1)[1].startswith("\n# Mine\n\n<!-- optimum-calibprune draws")
    with pytest.raises(ValueError, match="is no YAML; mend it first"):
        updated("---\na: [\n---\n", card)


def test_a_readme_keeps_metadata_however_it_is_written(run: RunRecord) -> None:
    card = render(run)
    mine = "---\r\nabout: one --- two ---\r\ntags: mine\r\n--- \r\n# Mine\n\n---\nmore: text\n---\n"
    both = updated(mine, card)
    data = ModelCard(both).data.to_dict()
    assert (data["about"], data["tags"][-1]) == ("one --- two ---", "mine")
    assert both.split("\n---\n", 1)[1].startswith("\n# Mine\n\n---\nmore: text\n---\n\n<!-- optimum-calibprune draws")
    assert updated("---\n---\n# Mine\n", card).split("\n---\n", 1)[1].startswith("\n# Mine\n")
    assert ModelCard(updated("---\ntags: 5\n---\n", card)).data.tags[-1] == 5
    local = render(replace(run, sources=tuple(replace(source, repo=None) for source in run.sources)))
    assert "calibprune:" not in updated(both, local), "the data sets of another run"


@pytest.mark.parametrize("text", ["me@evil.example", "@someone", "www.evil.example", "xx://evil.example"])
def test_what_renderers_link_by_themselves_is_code(text: str) -> None:
    assert prose(f"see {text}") == f"`see {text}`"


def test_what_is_no_link_stays_text_and_backslashes_begin_no_formula() -> None:
    assert prose("pass@1") == "pass@1"
    assert prose("\\(x\\)") == "&#92;(x&#92;)"


def of_experts(run: RunRecord, count: int, starved: int) -> RunRecord:
    """A run whose layers are those of `count` experts, the first `starved` of which saw too few tokens."""
    up, down = run.prune.layers
    layers = [
        replace(
            layer,
            module=layer.module.replace("mlp.", f"mlp.experts.{expert}."),
            relative_error=expert / 1000,
            routed=expert,
            starved=expert < starved,
            rescue="",
        )
        for expert in range(count)
        for layer in (up, down)
    ]
    return replace(run, prune=replace(run.prune, layers=tuple(layers)))


def test_the_experts_of_a_layer_share_a_row(run: RunRecord) -> None:
    text = render(of_experts(run, 256, 0))
    rows = [line for line in text.splitlines() if "experts" in line]
    assert rows == [
        "| `model.layers.0.mlp.experts.*.up_proj`, 256 experts | 16 x 8 | 20480 | 19712 | 0.1275 (at most 0.2550) |",
        "| `model.layers.0.mlp.experts.*.down_proj`, 256 experts | 8 x 16 | 19712 | 19712 | 0.1275 (at most 0.2550) |",
    ]


def test_starved_experts_are_counted_and_the_first_of_them_named(run: RunRecord) -> None:
    assert starved_experts(run) == ""
    assert starved_experts(of_experts(run, 4, 2)) == (
        "2 of 4 experts were sent too few tokens for one of their matrices, which was pruned for all tokens of its layer: "
        "model.layers.0.mlp.experts.0, model.layers.0.mlp.experts.1."
    )
    text = render(of_experts(run, 1500, 1200))
    assert "1,200 of 1,500 experts were sent too few tokens" in text
    assert "`model.layers.0.mlp.experts.9`, and 1,190 more." in text
