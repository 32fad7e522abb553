"""Fetching Debian and npm packages, without a network: shell scripts stand in for the tools."""

import io
import tarfile

import pytest

from bench import fetch
from jactus_kernels import JactusError


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
