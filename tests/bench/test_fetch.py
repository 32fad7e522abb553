"""Fetching, without a network: Python packages from a local folder, Debian and npm packages from shell scripts that stand in
for the tools."""

import io
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import fetch
from jactus_kernels import JactusError


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache of its own, and a pip that sees only the folder it returns."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("JACTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def write_wheel(folder, name="toy_data", version="1.0"):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/rows.txt", "one")
        wheel.writestr(f"{name}/large.bin", "two")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_a_package_is_fetched_once_and_only_the_files_asked_for(offline, monkeypatch):
    write_wheel(offline)
    folder = fetch.package("toy-data==1.0", "wheel", only=["toy_data/rows.txt"])
    assert [f.name for f in folder.rglob("*") if f.is_file()] == ["rows.txt"]
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: pytest.fail("fetched twice"))
    assert fetch.package("toy-data==1.0", "wheel", only=["toy_data/rows.txt"]) == folder
    assert set(fetch.cache_folder().iterdir()) == {folder, Path(f"{folder}.lock")}  # nothing half-done is left


def test_a_failed_pip_says_what_to_do_and_leaves_nothing(offline, monkeypatch):
    with pytest.raises(JactusError, match=r"cannot fetch toy-data==1\.0.*network.*JACTUS_CACHE"):
        fetch.package("toy-data==1.0")
    write_wheel(offline)
    monkeypatch.setitem(fetch.SHA256, "toy-data==1.0", "0" * 64)
    with pytest.raises(JactusError, match="another archive"):
        fetch.package("toy-data==1.0")
    assert [f.suffix for f in fetch.cache_folder().iterdir()] == [".lock"]


@pytest.mark.parametrize("requirement,kind", [("toy-data", "wheel"), ("toy-data>=1", "wheel"), ("a==1", "egg")])
def test_inexact_requirements_are_refused(requirement, kind):
    with pytest.raises(JactusError, match="name==version"):
        fetch.package(requirement, kind)


def test_a_build_that_raises_leaves_no_cache_entry(offline):
    def build(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.cached("model", build)
    assert [f.suffix for f in fetch.cache_folder().iterdir()] == [".lock"]


def test_whoever_comes_while_an_entry_is_built_waits_for_it(offline):
    built = []

    def build(folder):
        built.append(folder)
        time.sleep(0.2)
        (folder / "weights").write_text("")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fetch.cached("model", build), range(2))
    assert (len(built), first) == (1, second)
    assert (first / "weights").exists()


def test_source_archives_are_unpacked_and_bad_ones_refused(tmp_path):
    write_tar(tmp_path / "toy-1.0.tar.gz", "toy-1.0/setup.py", "toy-1.0/data/a.txt")
    fetch.unpack(tmp_path / "toy-1.0.tar.gz", tmp_path / "out", lambda name: "/data/" in name)
    assert [f.name for f in (tmp_path / "out").rglob("*") if f.is_file()] == ["a.txt"]
    with pytest.raises(JactusError, match="none of the files"):
        fetch.unpack(tmp_path / "toy-1.0.tar.gz", tmp_path / "none", lambda name: False)
    cut = tmp_path / "cut-1.0.tar.gz"
    cut.write_bytes((tmp_path / "toy-1.0.tar.gz").read_bytes()[:60])
    with pytest.raises(JactusError, match="cannot be unpacked"):
        fetch.unpack(cut, tmp_path / "cut")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A cache of its own, and a PATH whose only tools are the shell scripts that the returned function writes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("JACTUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(folder))

    def write(**scripts):
        for name, script in scripts.items():
            file = folder / name.replace("_", "-")
            file.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
            file.chmod(0o755)

    return write


def write_tar(file, *names):
    with tarfile.open(file, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_debian_and_npm_packages_are_fetched_once_and_only_the_files_asked_for(tools, tmp_path):
    write_tar(tmp_path / "files.tar", "./usr/share/toy/a.gz", "./usr/share/doc/toy")
    write_tar(tmp_path / "toy.tgz", "package/src/0.json", "package/index.js")
    tools(
        apt_get=f'echo "$@" >> {tmp_path}/asked; echo deb > toy_1-2_all.deb',
        dpkg_deb=f'test -f "$2" && cat {tmp_path}/files.tar',
        npm=f'echo "$@" >> {tmp_path}/asked; cp {tmp_path}/toy.tgz toy-1.0.tgz',
    )
    for _ in range(2):
        assert files(fetch.package("toy==1-2", "deb", ["*/toy/*.gz"])) == ["usr/share/toy/a.gz"]
        assert files(fetch.package("toy==1.0", "npm", ["package/src/*"])) == ["package/src/0.json"]
    apt, npm = (tmp_path / "asked").read_text().splitlines()
    assert apt.startswith("download ")
    assert apt.endswith(" toy=1-2")
    assert npm.startswith("pack ")
    assert npm.endswith(" toy@1.0")


@pytest.mark.parametrize("kind,tool", [("deb", "apt-get"), ("npm", "npm")])
def test_a_missing_tool_is_named_and_a_path_advised(tools, kind, tool):
    with pytest.raises(JactusError, match=rf"cannot fetch toy==1: there is no `{tool}`.*path"):
        fetch.package("toy==1", kind)
    assert [f.suffix for f in fetch.cache_folder().iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "kind,script,advice",
    [
        ("deb", "echo 'E: Unable to locate package toy' >&2; exit 100", "apt-get update.*Apt-get said: E: Unable"),
        ("deb", "echo 'E: Failed to fetch' >&2; exit 100", "apt-config dump.*JACTUS_CACHE.*said: E: Failed"),
        ("deb", "true", "JACTUS_CACHE.*said: nothing"),
        ("npm", "echo 'npm error code E404' >&2; exit 1", "npm config list.*Npm said: npm error code E404"),
        ("npm", "echo other > toy.tgz", "another archive"),
    ],
)
def test_a_failed_fetch_says_what_to_do_and_leaves_nothing(tools, monkeypatch, kind, script, advice):
    monkeypatch.setitem(fetch.SHA256, "toy==1", "0" * 64)
    tools(apt_get=script, npm=script)
    with pytest.raises(JactusError, match=f"cannot fetch toy==1: .*{advice}"):
        fetch.package("toy==1", kind)
    assert [f.suffix for f in fetch.cache_folder().iterdir()] == [".lock"]
