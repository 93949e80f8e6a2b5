"""qprune report on folders of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import qprune
from test_compare import page_content
from test_report import fake_result
from test_study_analysis import result_of

from qprune.compare.page import compare_page
from qprune.plainyaml import dumped
from qprune.study.page import study_page
from qprune.training import TrainOptions

STUDY = {"kind": "study", **result_of()}
COMPARISON = {"kind": "compare", **page_content()}


def write(folder: Path, result: Any = None, options: dict[str, Any] | None = None) -> Path:
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if options is not None:
        (folder / "options.yaml").write_bytes(dumped(options))
    return folder


def refused(folder: Path) -> str:
    done = qprune("report", str(folder))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (folder / "report.html").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("result", "page"),
    [pytest.param(STUDY, study_page(STUDY), id="study"), pytest.param(COMPARISON, compare_page(COMPARISON), id="comparison")],
)
def test_a_report_is_written_again(result: dict[str, Any], page: str, tmp_path: Path) -> None:
    done = qprune("report", str(write(tmp_path, result)))
    assert (done.returncode, done.stdout) == (0, f"Report: {tmp_path / 'report.html'}\n")
    assert (tmp_path / "report.html").read_text() == page


def test_searches(tmp_path: Path) -> None:
    assert qprune("report", str(write(tmp_path, fake_result(), {"budget": "w3a3"}))).returncode == 0
    assert "Bit search: " in (tmp_path / "report.html").read_text()
    (tmp_path / "result.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"phase": "float", "seed": 0, "epoch": 0, "loss": 2.0, "accuracy": 0.5}\n')
    assert qprune("report", str(tmp_path)).returncode == 0
    assert "This run is unfinished" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("result", "options", "message"),
    [
        pytest.param(None, None, "holds neither result.json nor metrics.jsonl", id="empty"),
        pytest.param(None, {"kind": "bits"}, "holds a study that has not reported yet; qprune study --config ", id="study"),
        pytest.param(None, {"methods": ["zur"]}, "holds a comparison that has not reported yet; qprune compare --config ", id="comparison"),
        pytest.param(None, TrainOptions().as_dict(), "holds a training of qprune train, which has no report", id="unfinished-training"),
        pytest.param({"kind": "train"}, None, "holds a training of qprune train, which has no report", id="training"),
        pytest.param({**STUDY, "points": 3}, None, "result.json is damaged (", id="damaged-study"),
        pytest.param({**COMPARISON, "rows": [{}]}, None, "result.json is damaged (KeyError: ", id="damaged-comparison"),
        pytest.param({"kind": "else"}, None, "is not the result of a run", id="else"),
        pytest.param([1], None, "is not the result of a run", id="list"),
    ],
)
def test_refused(result: Any, options: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    assert message in refused(write(tmp_path, result, options))


def test_the_command_that_a_refusal_names_exists(tmp_path: Path) -> None:
    words = refused(write(tmp_path, None, {"kind": "widths", "ratios": [0.5, 1.0]})).partition("qprune study ")[2].split(" writes")[0]
    done = qprune("study", *words.split(), "--print-config")
    assert done.returncode == 0 and "kind: widths" in done.stdout
