"""What SECURITY.md says of the code: nothing that is read from a file is run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from qprune import plainyaml
from qprune.tasks.weights import WeightsError, load_weights

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for folder in ("qprune", "kernels") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.loads", "shelve.open", "numpy.load", "np.load", "zipfile.ZipFile", "shutil.unpack_archive", "torch.jit.load", "joblib.load",
}  # fmt: skip


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def places(name: str) -> dict[str, ast.Call]:
    return {str(path.relative_to(ROOT)): call for path in MODULES for found, call in calls(path) if found == name}


def test_nothing_runs_what_it_reads() -> None:
    found = {(str(path.relative_to(ROOT)), name) for path in MODULES for name, _ in calls(path)}
    assert not [where for where in found if where[1] in FORBIDDEN]
    assert not [where for where in found if where[1].rpartition(".")[2] == "extractall"]
    # methods called extract are of distributions and of networks
    assert {where for where, _ in found if (where, "tarfile.open") in found} == {"qprune/tasks/archive.py"}
    assert ("qprune/tasks/archive.py", "archive.extract") not in found


def test_pickles_of_weights_are_read_without_objects() -> None:
    (where, call), *others = places("torch.load").items()
    assert where == "qprune/tasks/weights.py" and not others
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}["weights_only"] == "True"


def test_yaml_has_one_safe_loader() -> None:
    (where, call), *others = places("yaml.load").items()
    assert where == "qprune/plainyaml.py" and not others and ast.unparse(call.args[1]) == "_Loader"
    assert issubclass(plainyaml._Loader, yaml.SafeLoader)
    for text in ("!!python/object/apply:os.system [true]", "!!python/name:os.system", "!!binary aGk=", "!!set {a}", "2001-01-01"):
        with pytest.raises(ValueError, match=r"."):
            plainyaml.value_of(text)


def test_programs_are_run_by_kernels_alone() -> None:
    """A compiler, and tools that show what it made."""
    found = {str(path.relative_to(ROOT)) for path in MODULES for name, _ in calls(path) if name.startswith("subprocess.")}
    assert found == {"kernels/cpu/build.py", "kernels/aot/sass.py"}


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_harmful_file_of_weights(zipped: bool, tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "weights.pth"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "extra": Harmful(mark)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="holds more than tensors and plain values, which is not opened because it could run code"):
        load_weights(nn.Linear(2, 2), file)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "the file does what it is here for"


def test_names_in_files_are_imported_only_where_a_run_is_gone_on_with(tmp_path: Path) -> None:
    """A report of a folder whose options name a module does not import it."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    (tmp_path / "options.yaml").write_text("data: evil:loaders\nmodel: evil:net\n")
    (tmp_path / "metrics.jsonl").write_text('{"phase": "float", "seed": 0, "epoch": 0, "loss": 1.0}\n')
    code = f"from qprune.report import write_report; from pathlib import Path; write_report(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"], cwd=tmp_path, check=False)
    assert done.returncode == 0 and (tmp_path / "report.html").exists()
