"""The benchmarks run: every target once, without timing, its correctness check included; and the tables read what they are given."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qprune import cli
from qprune.benchmarks import (
    against,
    bench,
    cases,
    machine,
    measure,
    mixing,
    rows,
    selection,
    table,
)
from qprune.benchmarks.rows import Row
from qprune.commands import shared

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    Row("a step", 101.5, "ms", {"float": 1.3, "branches": 0.11}, {"float": 1.35, "branches": 1 / 3}, {"qprune": 101.5, "float": 78.0}),
    Row("an operation", 0.0301, "ms", {"compile": 1.2, "eager": 0.05}, {"compile": 1.0}, {"qprune": 0.0301}, band=(0.03, 0.0302)),
    Row("a load", 14.0, "s", target={"value": 60.0}),
    Row("no target", 2.0, "MiB"),
    Row("bandwidth", 2.0, "ms", bytes=8_000_000, flops=4_000_000_000, memory={"qprune": 3 << 20}),
    Row("not built", 0.0, "", skipped="mixed_depthwise is missing"),
]
RATES = {"name": "a machine", "copy": 16e9, "matmul": 8e12}


def qprune(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qprune", "bench", *words])
        patch.setattr(shared, "console", Console(file=out, width=200))
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    code = stop.value.code
    return code if isinstance(code, int) else int(bool(code)), out.getvalue(), err.getvalue()


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed: the rows and rates above instead."""
    monkeypatch.setattr(bench, "_rows", lambda request, quick, whole: iter(ROWS))
    monkeypatch.setattr(bench.rates, "measure", lambda device, quick=False: {k: v for k, v in RATES.items() if k != "name"})


def test_every_target_runs_once() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "103 passed" in result.stdout


def test_one_file_is_one_module() -> None:
    code = (
        "import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('benchmarks', run_name='__main__')\nexcept SystemExit: pass\n"
    )
    code += "print(sorted(name for name in sys.modules if name.startswith('benchmarks.') and name != 'benchmarks.__main__'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_wrong_results_are_not_timed() -> None:
    case = mixing.CASES[2].smaller()
    want = cases.reference(case, "both")
    right = cases.call(case, "eager", "both")()
    cases.check(case, "eager", right, want)
    with pytest.raises(measure.WrongResultError, match="dx differs"):
        cases.check(case, "eager", tuple(t * (1.01 if i == 1 else 1.0) for i, t in enumerate(right)), want)


@pytest.mark.parametrize("kernel", selection.KERNELS[1:])
def test_a_wrong_implementation_of_any_operation_is_found(kernel: str) -> None:
    case, direction, _ = selection.of(kernel, "cpu")[-1]
    want = cases.reference(case.smaller(), direction)
    for i in range(len(want)):
        wrong = [t + (0.3 * t.abs().mean() if i == j else 0.0) for j, t in enumerate(want)]
        with pytest.raises(measure.WrongResultError, match="differs"):
            cases.check(case, "qprune", wrong, want)


def test_backward_alone_is_the_second_half_of_both() -> None:
    case = mixing.CASES[2].smaller()
    both, backward = (cases.call(case, "qprune", direction)() for direction in ("both", "backward"))
    assert len(both) == 4 and len(backward) == 3
    assert all(torch.equal(a, b) for a, b in zip(both[1:], backward, strict=True))


@pytest.mark.parametrize("error", [measure.WrongResultError("eager: dx differs"), RuntimeError("out of resource: shared memory\nmore")])
def test_a_case_that_fails_has_no_time_and_costs_no_other(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def of_case(case: Any, direction: str, *rest: Any) -> Any:
        if direction == "both":
            raise error
        yield ROWS[0]

    monkeypatch.setattr(bench.rows, "of_case", of_case)
    code, out, err = qprune("--kernel", "mix_quantize", "--shapes", "4x8", "--direction", "both,forward",
                            "--out", str(tmp_path / "cpu.json"), "--threads", "1")  # fmt: skip
    assert code == 1 and "not timed: weight 4x8, K=5, forward + backward: " in err and str(error).splitlines()[0] in err
    assert "a step" in out and err.splitlines()[-1].endswith(str(error).splitlines()[0])
    found = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [row["failed"] for row in found] == [True, False] and found[0]["value"] == 0.0


def test_table_and_json(fixed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "cpu.json"
    code, _, _ = qprune("--markdown", "--out", str(out), "--threads", str(torch.get_num_threads()))
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("| case"))
    assert header == (
        "| case | qprune | 20 to 80 % | GB/s | of copy | TFLOP/s | of matmul | memory | float | eager | branches | compile | target | met |"
    )
    assert "| a step | 102 ms |  |  |  |  |  |  | 1.30 |  | 0.11 |  | float ≤ 1.35, branches ≤ 0.333 | yes |" in lines
    assert "| an operation | 0.0301 ms | 0.03 to 0.0302 |  |  |  |  |  |  | 0.05 |  | 1.20 | compile ≤ 1.00 | no |" in lines
    assert "| bandwidth | 2.00 ms |  | 4.00 | 25% | 2.00 | 25% | 3.00 MiB |  |  |  |  |  |  |" in lines
    assert any(line.startswith("| not built | skipped: mixed_depthwise is missing |") for line in lines)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["command"].startswith("qprune bench --markdown") and content["complete"]
    assert content["machine"]["torch"] == torch.__version__ and content["machine"]["commit"]
    assert [row["met"] for row in content["rows"]] == [True, False, True, None, None, None]
    assert content["rows"][4]["of_copy"] == 0.25 and content["rows"][4]["of_matmul"] == 0.25
    console = Console(width=100, record=True, file=io.StringIO())
    for part in table.rich_tables(ROWS, {**machine.describe("cpu"), "rates": RATES}):
        console.print(part)
    text = console.export_text()
    assert "an operation" in text and "0.0301 ms" in text and "25%" in text


def test_against_an_older_run(fixed: None, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    qprune("--out", str(old), "--threads", "1")
    content = json.loads(old.read_text())
    content["rows"][0]["value"] = content["rows"][0]["values"]["qprune"] = 90.0
    content["rows"][1] |= {"value": 0.0303, "band": [0.0301, 0.0306]}
    content["machine"]["device"] = "another machine"
    old.write_text(json.dumps(content))
    code, out, _ = qprune("--against", str(old), "--threads", "1")
    assert code == 0
    step = next(line for line in out.splitlines() if "a step" in line and "+12.8%" in line)
    assert "slower" in step and "90.0 ms" in step
    assert any("within noise" in line and "-0.7%" in line for line in out.splitlines())
    assert "differ in device" in " ".join(out.split())


@pytest.mark.parametrize("band, verdict", [((9.9, 10.1), "faster"), ((8.0, 12.0), "within noise")])
def test_only_changes_beyond_the_noise_count(band: tuple[float, float], verdict: str) -> None:
    old = dataclasses.replace(Row("x", 10.0, "ms", values={"qprune": 10.0}), band=band).as_dict()
    new = dataclasses.replace(Row("x", 9.5, "ms", values={"qprune": 9.5}), band=(9.4, 9.6)).as_dict()
    assert [line[-1] for line in against.compare([old], [new])] == [verdict]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kernel nope", "--kernel: expected some of training, mix_quantize, multi, mixed_conv2d, depthwise, int8, got 'nope'"),
        ("--kernel mix_quantize --shapes 4xx4", "--shapes: expected a network (resnet18"),
        ("--kernel mixed_conv2d --shapes 8x3x8x8", "for a convolution, got '8x3x8x8'"),
        ("--kernel mixed_conv2d --shapes 8x4x8x8:4x3x3/1g4", "a convolution that is not depthwise, got"),
        ("--kernel mixed_conv2d --shapes 8x4x8x8:6x3x3/1g4", "that the groups divide, got"),
        ("--kernel depthwise --shapes resnet18", "such as mobilenetv2, got 'resnet18'"),
        ("--kernel multi --shapes vgg", "--shapes: expected one of resnet18"),
        ("--kernel training --shapes resnet18", "--shapes: expected resnet20 for training"),
        ("--w-bits 2,x", "--w-bits: expected numbers like 2,4,8, got '2,x'"),
        ("--a-bits 9", "--a-bits: expected bits from 0 (pruned), 1 … 8, 32 (float), got 9"),
        ("--dtype fp8", "--dtype: expected some of fp32, bf16, fp16, got 'fp8'"),
        ("--direction sideways", "--direction: expected some of forward, backward, both, got 'sideways'"),
        ("--baselines tvm", "--baselines: expected some of eager"),
        ("--batch -1", "--batch: expected a positive number, got -1"),
        ("--device tpu", "--device: expected some of cpu, cuda, got 'tpu'"),
        ("--against nowhere.json", "--against: expected a JSON file written by --out, got nowhere.json"),
    ],
)
def test_mistakes_are_one_line(words: str, message: str) -> None:
    code, _, err = qprune(*words.split())
    assert code == 2 and message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_one_line() -> None:
    code, _, err = qprune("--device", "cuda")
    assert code == 2 and "--device: expected cpu, since torch sees no CUDA device, got cuda" in err


def test_a_user_measures_a_shape_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    words = (
        "--kernel mix_quantize,mixed_conv2d,int8 --shapes 2x4x6x6:8x3x3/2 --quick --baselines eager --direction both,forward --threads 1"
    )
    code, _, err = qprune(*words.split(), "--kernel", "mixed_conv2d,int8", "--out", str(out))
    assert code == 0, err
    found = json.loads(out.read_text())["rows"]
    assert [(row["kernel"], row["direction"]) for row in found] == [
        ("mixed_conv2d", "both"),
        ("mixed_conv2d", "forward"),
        ("int8", "forward"),
    ]
    for row in found:
        assert row["value"] > 0 and row["ratios"]["eager"] > 0 and row["rounds"] == 3 and row["of_copy"] > 0 and row["of_matmul"] > 0
    assert found[0]["memory"]["qprune-library"] > 0 and set(found[0]["values"]) == {"eager", "qprune-library", "qprune-fused"}


def test_time_runs_out(monkeypatch: pytest.MonkeyPatch, fixed: None, tmp_path: Path) -> None:
    code, _, err = qprune("--seconds", "1e-9", "--out", str(tmp_path / "x.json"), "--threads", "1")
    assert code == 0 and "stopped after 1e-09 s" in err
    content = json.loads((tmp_path / "x.json").read_text())
    assert len(content["rows"]) == 1 and not content["complete"]


def test_rounds_alternate_and_ratios_are_paired() -> None:
    order: list[str] = []
    timings = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, least=0.0)
    assert order[4:] == ["a", "b", "b", "a", "a", "b"]
    assert all(len(seconds) == 3 for seconds in timings.rounds.values())
    paired = measure.Timings({"a": [2.0, 20.0, 4.0], "b": [1.0, 10.0, 3.0]})
    assert paired.ratio("a", "b") == 2.0 and paired.fastest(["a", "b"]) == "b"


def test_of_several_variants_the_fastest_is_shown() -> None:
    timings = measure.Timings(
        {"qprune-library": [3.0] * 3, "qprune-fused": [2.0] * 3, "compile-eager": [4.0] * 3, "compile-reference": [8.0] * 3}
    )
    row = rows.timed("x", timings)
    assert row.value == 2000.0 and row.variant == {"qprune": "qprune-fused", "compile": "compile-eager"}
    assert row.ratios["compile"] == 0.5 and row.ratios["compile-reference"] == 0.25
    assert table.cells(row)["qprune"] == "2000 ms (fused)"


def test_a_gpu_clock_adds_up_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """elapsed_time is float32 milliseconds: after an hour a microsecond would be lost."""

    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time, Event.now = Event.now, Event.now + 1800.0

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return float(torch.tensor((other.time - self.time) * 1e3, dtype=torch.float32))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = measure.clock("cuda")
    assert [clock(), clock(), clock()] == [0.0, 1800.0, 3600.0]


def test_kept_bytes_counts_each_storage_once() -> None:
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    assert measure.kept_bytes(lambda: (x * w) * (x * w).exp(), [w]) == 3 * x.nbytes
