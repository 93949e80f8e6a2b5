"""The command line as a user types it: exit codes, one-line errors, tables."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from qprune import cli
from qprune.commands import shared

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--float-epochs", "1", "--search-epochs", "1", "--finetune-epochs", "1", "--batch-size", "256"]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def qprune(*words: str) -> Done:
    """The command line in this process: starting Python and torch takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["qprune", *words])
        patch.setattr(shared, "console", Console(file=out, width=100, soft_wrap=True))
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
            cli.main()
    code = stop.value.code
    return Done(code if isinstance(code, int) else int(bool(code)), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, started as a user starts it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    words = [sys.executable, "-m", "qprune", "search", *SHORT, "--threads", "1", "--out", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0, done.stderr
    for text in ("train float", "search", "fine-tune", "train uniform", "test accuracy", "uniform w3a3", "search time:", "Report:"):
        assert text in done.stdout, done.stdout
    return folder


def test_search_then_report_and_cost(run_folder: Path) -> None:
    (run_folder / "report.html").unlink()
    assert qprune("report", str(run_folder)).returncode == 0
    assert (run_folder / "report.html").stat().st_size > 10_000
    words = ("cost", "--policy", str(run_folder / "policy.json"), "--input-shape", "1x16x16")
    done = qprune(*words)
    assert done.returncode == 0, done.stderr
    assert "layer1.0.conv1" in done.stdout and "total" in done.stdout


def test_cost_reproduces_a_published_number() -> None:
    done = qprune("cost", "--model", "resnet20", "--preactivation", "--num-classes", "100", "--bits", "w4a4")
    assert "674.6 M" in done.stdout
    assert "41,798.6 M" in qprune("cost", "--model", "resnet20", "--preactivation", "--num-classes", "100").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("search --model nope", "model: 'nope' is unknown; expected one of resnet8", id="model"),
        pytest.param("search --budget w0", "is not a budget", id="budget"),
        pytest.param("search --budget w9a9", "w9a9", id="budget-bits"),
        pytest.param("search --w-bits 2,9", "w_bits: ", id="bits"),
        pytest.param("search --w-bits 2,2", "(2, 2)", id="twice"),
        pytest.param("search --method nope", "method: 'nope' is unknown", id="method"),
        pytest.param("search --out /proc/nothing", "cannot write /proc/nothing", id="unwritable"),
        pytest.param("cost --bits 4", "expected a uniform policy like w4a4, got '4'", id="cost-bits"),
        pytest.param("cost --input-shape 3x32", "expected channels x height x width", id="shape"),
        pytest.param("cost --policy nowhere.json", "cannot read the policy nowhere.json", id="no-policy"),
        pytest.param("report nowhere", "nowhere", id="no-run"),
    ],
)
def test_mistakes_are_one_line(words: str, message: str) -> None:
    done = qprune(*words.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_policy_of_another_network(run_folder: Path) -> None:
    done = qprune("cost", "--policy", str(run_folder / "policy.json"))
    assert done.returncode == 2
    assert "made for another network" in done.stderr


def test_infeasible_budget_says_what_the_cheapest_costs(tmp_path: Path) -> None:
    done = qprune("search", "--budget", "0.01%", *SHORT, "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "no policy meets the budget" in done.stderr and "the cheapest policy needs" in done.stderr


def test_a_second_run_does_not_overwrite(run_folder: Path) -> None:
    done = qprune("search", "--out", str(run_folder))
    assert done.returncode == 2 and "--overwrite" in done.stderr


def test_help_names_the_commands() -> None:
    done = qprune("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("search", "train", "cost", "report"))


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    shared.console.print("Report: runs/[bold]x[/red] :smile:")
    assert capsys.readouterr().out == "Report: runs/[bold]x[/red] :smile:\n"
