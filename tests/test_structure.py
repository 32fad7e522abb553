"""The house: each floor imports only floors below it, and no module takes the name of a public function."""

import ast
from pathlib import Path

import pytest

import jactus
import jactus_kernels

ROOT = Path(jactus.__file__).parent
# From the ground up; a module of the package itself ("", but config) stands on top of all of them.
FLOORS = ("options", "config", "model", "checkpoints", "calibration", "planning", "compression", "")


def floor(module):
    """The floor of a dotted name inside jactus."""
    first = module.split(".")[0]
    return FLOORS.index(first) if first in FLOORS else FLOORS.index("")


def modules():
    """Dotted name inside jactus → file."""
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}


def imports(name, tree):
    """Dotted names inside jactus that the module imports, lazily or at its top."""
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            inside = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                whole = ".".join([*inside, alias.name])
                yield whole if whole in modules() else ".".join(inside)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jactus":
            yield node.module.removeprefix("jactus").removeprefix(".")
        elif isinstance(node, ast.Import):
            yield from (a.name[7:] for a in node.names if a.name.startswith("jactus."))


def upward(name, tree):
    return [other for other in imports(name, tree) if floor(other) > floor(name)]


@pytest.mark.parametrize("name", [n for n in modules() if n != "__init__"])
def test_imports_never_run_upward(name):
    found = upward(name, ast.parse(modules()[name].read_text(encoding="utf-8")))
    assert not found, f"jactus.{name} imports {found}, which stand above it"


def test_an_upward_import_would_be_seen():
    assert upward("model.targets", ast.parse("from ..planning.plans import Plan")) == ["planning.plans"]
    assert upward("planning.plans", ast.parse("def f():\n    from ..compression import surgery")) == [
        "compression.surgery"
    ]
    assert upward("compression.surgery", ast.parse("from ..pipeline import adapt")) == ["pipeline"]
    assert upward("compression.surgery", ast.parse("from ..model.lowrank import CoreLinear")) == []


def test_the_kernels_know_nothing_of_layers_or_models():
    for path in Path(jactus_kernels.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {
            (n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level
        }
        roots |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert roots.isdisjoint({"jactus", "transformers"}), path.name


@pytest.mark.parametrize("package", [jactus, jactus_kernels], ids=lambda p: p.__name__)
def test_no_module_bears_the_name_of_a_public_function(package):
    functions = {name for name in package.__all__ if callable(getattr(package, name)) and name[0].islower()}
    assert len(functions) > 3
    taken = {path.stem for path in Path(package.__file__).parent.rglob("*.py")}
    taken |= {path.name for path in Path(package.__file__).parent.rglob("*") if path.is_dir()}
    assert not functions & taken
