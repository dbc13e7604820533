"""From folders to the page: what is found, what is refused, what is shown."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from anchorctx.cli.main import main
from anchorctx.errors import UserError
from anchorctx.layout import PackedLayout, Pattern
from anchorctx.records.results import Result, append_results, read_results
from anchorctx.report.collect import collect
from anchorctx.report.numbers import number
from anchorctx.report.page import render_page
from anchorctx.report.sections import comparison, evaluations, inputs, precision, reuse, ruler, training
from anchorctx.report.series import by_model

from .fixtures import (
    ARMS,
    LENGTHS,
    TASKS,
    make_evaluation,
    make_packed,
    make_precision,
    make_project,
    make_reuse,
    make_run,
    reuse_rows,
)

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "mine")


class Check(html.parser.HTMLParser):
    """Every element is closed in order, ids are unique, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_a_page_has_every_section_and_needs_no_network(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "deep" / "report.html"
    assert main(["report", str(project), f"out={out}", "pretraining_length=4096"]) == 0
    assert f"report: {out}" in capsys.readouterr().out
    page = out.read_text()
    check = Check()
    check.feed(page)
    assert check.open == [] and len(set(check.ids)) == len(check.ids)
    assert [link for link in check.links if not link.startswith("#")] == ["data:,"]
    assert not re.search(r"https?://|@import|url\(", page)
    sections = ("retrieval", "perplexity", "ruler", "lm-eval", "needle", "comparison", "precision", "kvcomm",
                "training", "speed", "data", "pattern", "provenance")  # fmt: skip
    assert [i for i in check.ids if i != "theme"] == list(sections)
    assert [link[1:] for link in check.links if link.startswith("#")] == list(sections)
    assert "after: what was found." in page and "pretraining length" in page
    first = page
    assert main(["report", str(project), f"out={out}", "pretraining_length=4096"]) == 0
    assert out.read_text() == first  # the same folders, the same file
    assert len(first) < 800_000
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_each_kind_of_folder_makes_a_page_alone(tmp_path: Path):
    made = {
        "training": make_run(tmp_path / "run", steps=3),
        "data": make_packed(tmp_path / "set" / "fff").parent,
        "ruler": make_evaluation(tmp_path / "eval", "m", 0.5),
        "precision": make_precision(tmp_path / "precision", "m"),
        "kvcomm": make_reuse(tmp_path / "reuse", "m"),
    }
    for section, folder in made.items():
        page = render_page("alone", collect([str(folder)]))
        assert f'<section id="{section}">' in page and '<section id="provenance">' in page


def test_charts_and_tables_hold_the_rows(project: Path):
    material = collect([str(project)])
    section = evaluations.build_retrieval(material)
    assert section is not None
    figure, table = section.blocks
    assert figure.chart.legend == [("before", 0, "line"), ("after", 1, "line")]  # type: ignore[union-attr]  # oldest first
    assert figure.chart.svg.count("<circle") == 2 * len(LENGTHS)  # type: ignore[union-attr]
    assert [cell.text for cell in table.rows[1]][0] == "after"  # type: ignore[union-attr]
    found = {row.result.context["length"]: row.result for row in material.rows
             if row.model == "after" and row.result.metric == "retrieval_accuracy"}  # fmt: skip
    for length, cell in zip(LENGTHS, table.rows[1][1:], strict=True):  # type: ignore[union-attr]
        assert cell.sort == found[length].value and f"{found[length].value:.3f} (" in cell.text

    scores = ruler.build(material)
    assert scores is not None and len(scores.blocks) == 4
    average = scores.blocks[-1].rows[-1]  # type: ignore[union-attr]
    means = [sum(r.result.value for r in material.rows if r.model == "after" and r.result.context.get("task") in TASKS
                 and r.result.context.get("length") == n) / len(TASKS) for n in LENGTHS]  # fmt: skip
    assert [cell.sort for cell in average[2:]] == pytest.approx(means)
    partial = [row for row in material.rows if row.result.context.get("task") != "ruler_vt" or row.model == "before"]
    material.rows = partial
    again = ruler.build(material)
    assert again is not None and [cell.text for cell in again.blocks[-1].rows[-1]][2:] == ["–"] * 4  # type: ignore[union-attr]


def test_data_shows_the_account_and_the_mixture(project: Path):
    section = inputs.build_data(collect([str(project)]))
    assert section is not None
    account, mixture = section.blocks[2:]
    assert [cell.sort for cell in account.rows[0]] == ["packed", 9, 410, 36, 3, 128, 360, 7]  # type: ignore[union-attr]
    assert "too short: 36 tokens" in account.caption  # type: ignore[union-attr]
    assert [cell.text for cell in mixture.rows[1]] == ["books", "74", "25.0 %", "20.0 %", "2.10"]  # type: ignore[union-attr]


def test_tokens_dropped_for_one_reason_are_those_of_all_sets(tmp_path: Path):
    for name in ("one", "two"):
        make_packed(tmp_path / name / f"{name}123")
    section = inputs.build_data(collect([str(tmp_path)]))
    assert section is not None and "too short: 72 tokens" in section.blocks[2].caption  # type: ignore[union-attr]


def test_the_data_of_a_run_without_its_packed_set(tmp_path: Path):
    make_packed(tmp_path / "packed" / "abc")
    manifest = json.loads((tmp_path / "packed" / "abc" / "manifest.json").read_text())
    run = make_run(tmp_path / "run", steps=3)
    (run / "manifest.json").write_text(json.dumps({"command": "train", "config": {}, "data": manifest}))
    section = inputs.build_data(collect([str(run)]))
    assert section is not None and "run's rows: 3 rows of 128 tokens" in section.lead


def test_the_pattern_is_the_layouts(project: Path):
    material = collect([str(project)])
    layout = PackedLayout((0, 1, 40, 100, 128), anchor_len=1)
    material.layouts = {project / "packed" / "abc123": Pattern.anchor.apply(layout)}
    section = inputs.build_pattern(material)
    assert section is not None and "3 documents" in section.lead
    whole, close = (figure.chart.svg for figure in section.blocks)  # type: ignore[union-attr]
    assert whole.count("<path") == 1 + 4 + 1  # causal, anchor and documents, anchor's band
    index = range(31, 49)
    keys = [0, 1, 2, 3, *index]
    allowed = layout.allowed_array()
    assert close.count("fill:var(--s2)") == sum(bool(allowed[q, 0]) for q in index)
    assert len(re.findall(r"fill:var\(--s[15]\)", close)) == sum(
        bool(allowed[q, k]) for q in index for k in keys if k > 0
    )
    assert close.count("fill:var(--left-out)") == sum(not allowed[q, k] for q in index for k in keys if k <= q)


# -- manifests -------------------------------------------------------------------------------------------------------


def test_rows_of_different_manifests_are_no_series(project: Path):
    path = project / "eval" / "after" / "results.jsonl"
    row = next(row for row in read_results(path) if row.metric == "retrieval_accuracy")
    append_results(path, [dataclasses.replace(row, manifest="0123456789ab")])
    with pytest.raises(
        UserError, match=r"retrieval_accuracy of after has rows of different manifests.*0123456789ab.*label="
    ):
        render_page("t", collect([str(project)]))
    (project / "eval" / "after" / "results.jsonl").write_text("")
    append_results(path, [dataclasses.replace(row, manifest="0123456789ab")])
    page = render_page("t", collect([str(project)]))  # one manifest again, though it is not at hand
    assert "0123456789ab" in page and "A question mark" in page


def test_a_study_does_not_mix_manifests(project: Path):
    path = project / "precision" / "results.jsonl"
    row = next(iter(read_results(path)))
    append_results(path, [dataclasses.replace(row, manifest="0123456789ab")])
    with pytest.raises(UserError, match="the precision study of after has rows of different manifests"):
        precision.build(collect([str(project)]))


def test_equal_labels_in_two_folders_are_told_apart(tmp_path: Path):
    for name, skill in (("one", 0.2), ("two", 0.8)):
        make_evaluation(tmp_path / name / "eval", "exported", skill)
    material = collect([str(tmp_path / "one"), str(tmp_path / "two")])
    assert list(by_model(material.rows, "perplexity")) == ["exported · one", "exported · two"]
    section = comparison.build(material)
    assert section is not None and "exported · one" in section.lead
    alone = collect([str(tmp_path)])  # one folder: the same label twice is a mistake
    with pytest.raises(UserError, match="different manifests"):
        by_model(alone.rows, "perplexity")


def test_each_evaluation_may_have_a_manifest_of_its_own(tmp_path: Path):
    """As `anchorctx eval` writes them: a hash for each evaluation of each model, kept under manifests/."""
    folder = make_evaluation(tmp_path / "eval", "m", 0.5)
    facts = json.loads((folder / "manifest.json").read_text())
    rows = list(read_results(folder / "results.jsonl"))
    (folder / "results.jsonl").unlink()
    (folder / "manifests").mkdir()
    for day, model in enumerate(("m", "n")):
        for row in rows:
            context = row.context | {"model": model}
            mark = f"{row.metric}-{'ruler' if 'length' in context else 'other'}-{model}"
            append_results(folder / "results.jsonl", [dataclasses.replace(row, manifest=mark, context=context)])
            kept = {"hash": mark, "identity": {}, "first_measured": facts | {"created": f"2026-11-2{day}T08:00"}}
            (folder / "manifests" / f"{mark}.json").write_text(json.dumps(kept))
    page = render_page("t", collect([str(folder)]))
    assert "A question mark" not in page and "lm_eval-ruler-n" in page and "2026-11-21 08:00" in page
    assert "mean of 24 cells" in page and "task mmlu" not in page and "lm eval, mmlu, acc" in page


def test_checkpoints_and_other_text_are_compared_where_that_makes_sense(project: Path):
    path = project / "eval" / "after" / "results.jsonl"
    rows = list(read_results(path))
    path.unlink()
    for row in rows:
        context = row.context | {"checkpoints": ["a", "b"]}
        context |= {"tokens": 5} if row.metric == "perplexity" else {}
        append_results(path, [dataclasses.replace(row, context=context)])
    section = comparison.build(collect([str(project)]))
    assert section is not None
    compared = [line[0].text for line in section.blocks[0].rows]  # type: ignore[union-attr]
    assert "retrieval accuracy, length 4,096" in compared and "perplexity" not in compared


def test_of_a_cell_measured_twice_the_later_counts(project: Path):
    path = project / "eval" / "after" / "results.jsonl"
    row = next(row for row in read_results(path) if row.metric == "perplexity")
    append_results(path, [dataclasses.replace(row, value=1.5)])
    (found,) = by_model(collect([str(project)]).rows, "perplexity")["after"]
    assert found.value == 1.5


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs at least one folder"),
        (["{root}/nothing"], "is not a folder"),
        (["{root}/empty"], "holds no metrics.jsonl, results.jsonl or packed set"),
        (["{root}/mine", "{root}/mine"], "names a folder twice"),
        (["{root}/mine", "runs=[a]"], "given twice"),
        (["{root}/mine", "out={root}/empty"], "is a folder: name a file"),
        (["{root}/mine", "row=99"], "row=99 is not in the packed set, which has 3 rows"),
        (["{root}/mine", "pattern=star"], "pattern=star is unknown: choose full"),
        (["{root}/mine", "outt=x"], "did you mean 'out'"),
    ],
)
def test_mistakes_are_one_sentence(project: Path, words: list[str], message: str, capsys: pytest.CaptureFixture):
    root = project.parent
    (root / "empty").mkdir()
    before = sorted(path for path in root.rglob("*"))
    given = [word.format(root=root) for word in words]
    if not any(word.startswith("out=") for word in given):
        given.append(f"out={root / 'report.html'}")
    assert main(["report", *given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(path for path in root.rglob("*")) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run/metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n', r"metrics.jsonl:2 is no row of metrics"),
        ("run/metrics.jsonl", "[1]\n", r"metrics.jsonl:1 is no row"),
        ("run/manifest.json", "{", "manifest.json is not of the form that anchorctx writes .Invalid JSON"),
        ("run/manifest.json", "[]", "is not of the form that anchorctx writes .Input should be an object"),
        ("eval/after/results.jsonl", "nonsense\n", r"results.jsonl:1 is no result row"),
    ],
)
def test_unreadable_files_are_named(project: Path, file: str, content: str, message: str):
    (project / file).write_text(content)
    with pytest.raises(UserError, match=message):
        collect([str(project)])


def test_a_run_that_is_being_written_ends_in_half_a_line(project: Path):
    path = project / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 121, "tok')
    (run,) = collect([str(project)]).runs
    assert run.rows[-1]["step"] == 120


def test_names_are_escaped(tmp_path: Path):
    make_evaluation(tmp_path / "eval", "<script>alert(1)</script> & co", 0.5)
    page = render_page("<b>", collect([str(tmp_path)]))
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page
    assert "<title>&lt;b&gt;" in page


def test_infinite_values_are_left_out(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tokens": 9, "train/loss": NaN}\n{"step": 6, "tokens": 10, "train/loss": Infinity}\n')
    section = training.build(collect([str(run)]))
    assert section is not None and "nan" not in section.blocks[0].chart.svg  # type: ignore[union-attr]


# -- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (4096, "4,096"), (0.93214, "0.932"), (1.2e-5, "1.2e-5"), (1e-7, "1e-7"), (7.96e5, "796,000"),
     (1.2e6, "1.2M"), (3e9, "3B"), (0.0005, "0.0005")],
)  # fmt: skip
def test_numbers_are_short(value: float, words: str):
    assert number(value) == words


def test_importing_the_report_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys, anchorctx.report.page, anchorctx.report.collect; print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_reuse_is_shown_by_arm_and_never_mixed(tmp_path: Path):
    def row(metric: str, value: float, mark: str = "one", **context: object) -> Result:
        at = {"model": "m", "task": "retrieval", "kind": "all"} | context
        return Result(metric=f"kvcomm_{metric}", value=value, unit="1", n=9, manifest=mark, context=at)

    rows = []
    for arm, kl in (("dense", 0.0), ("rotate", 0.25)):
        rows += [row("kl", kl, arm=arm, tokens="all"), row("agreement", 1 - kl, arm=arm, tokens="all")]
        rows += [row("reuse", 2 * kl, arm=arm, by=by) for by in ("calls", "tokens", "flops")]
        rows += [row("ttft", 0.125 - kl / 4, arm=arm, agent="request", quantile=q) for q in ("p50", "p95")]
        rows += [row("kv_error", kl, arm=arm, part="key", layer=i, measure="relative") for i in range(3)]
    append_results(tmp_path / "reuse" / "results.jsonl", rows)
    section = reuse.build(collect([str(tmp_path)]))
    assert section is not None
    *panels, errors, table = section.blocks
    assert [name for name, *_ in errors.chart.legend] == ["rotate"]  # type: ignore[union-attr]  # dense has no error
    titles = [re.findall(r"<title>(.*?)</title>", panel.chart.svg) for panel in panels]  # type: ignore[union-attr]
    assert titles == [
        ["dense: 0", "rotate: 0.25"],
        ["dense: calls 0 %, tokens 0 %, flops 0 %", "rotate: calls 50 %, tokens 50 %, flops 50 %"],
        ["dense: p50 125, p95 125", "rotate: p50 62.5, p95 62.5"],
    ]
    assert [cell.sort for cell in table.rows[1]] == ["rotate", 0.25, 0.75, 0.5, 0.5, 0.5, 0.0625, 0.0625]  # type: ignore[union-attr]
    append_results(tmp_path / "reuse" / "results.jsonl", [row("kl", 0.1, "two", arm="dense", tokens="all")])
    with pytest.raises(UserError, match="KV reuse of m has rows of different manifests"):
        reuse.build(collect([str(tmp_path)]))


def test_the_markdown_table_has_a_line_for_each_arm():
    lines = reuse.reuse_table(list(reuse_rows("m"))).splitlines()
    assert lines[0] == "**retrieval**" and "**copy**" in lines and lines[-1] == "* reuses everything by construction"
    assert lines[3] == "|" + "---|" * 12 and [line.split(" ")[1] for line in lines[4:9]] == list(ARMS)
    naive = "1.2 | 0.6000 | 0.500 (-0.400, -0.410 to -0.390) | 0.400 | 0.400 | 70%* | 70% | 70% | 80.0 | 110.0 | 0.0"
    assert lines[5] == f"| naive | {naive} |"
    unstarred = [row for row in reuse_rows("m") if row.context.get("arm") == "dense"]
    assert "*" not in reuse.reuse_table(unstarred).replace("**", "")
    assert "### a" in reuse.reuse_table([*reuse_rows("a"), *reuse_rows("b")])


def test_a_figure_that_is_left_over_takes_the_whole_width(project: Path):
    """Before a table, a note or the end: else half of the page beside it would be empty."""
    page = render_page("t", collect([str(project)]))
    for section in page.split("<section")[1:]:
        blocks = re.findall(
            r'<(figure|div class="table"|p class="note"|details class="conversation")( class="wide")?', section
        )
        runs: list[list[bool]] = [[]]
        for kind, wide in blocks:
            runs = [*runs[:-1], [*runs[-1], bool(wide)]] if kind == "figure" else [*runs, []]
        for run in filter(None, runs):
            assert run == [False] * (len(run) - 1) + [len(run) % 2 == 1]
