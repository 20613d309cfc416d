#!/usr/bin/env python3
"""Build dist/gateway.pyz, the gateway in one portable file.

    python3 build_zipapp.py                 # dist/gateway.pyz, .sha256 and .cdx.json (CycloneDX)
    python3 build_zipapp.py --output DIR    # the same elsewhere
    python3 build_zipapp.py --fresh         # do not use the dependencies kept from an earlier build
    python3 build_zipapp.py --lock          # refresh .lock/*.txt after pyproject.toml changed, then build again

Needs Python 3.11 or newer with venv, and a package index for the first build. Standard library only.

What is true of every archive:

- Pure Python. A compiled file anywhere fails the build; MarkupSafe's optional speedups are the one thing left out.
- The same Python makes the same bytes from the same commit, whoever builds it, wherever and whenever: sorted entries,
  one time stamp, fixed modes, bytecode that names no path and holds no time, nothing that an installer leaves behind.
- zipimport looks for x.pyc beside x.py and takes x.py when the magic number is another Python's. So the bytecode is the
  building interpreter's and any other one from 3.11 on runs from source: correct, and slower to start.
- Bytecode is stored and the rest deflated. Importing all that http mode needs took 178 ms so, 181 with everything
  stored, 203 with everything deflated and 766 from source, at 11.6, 17.3, 5.9 and 2.2 MB (medians of 25, CPython 3.11).
- Folders have entries of their own: without them zipimport finds no packages that lack an __init__.py.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RUNTIME_LOCK = ROOT / ".lock" / "runtime.txt"
DEV_LOCK = ROOT / ".lock" / "dev.txt"
NAME = "gateway.pyz"
PROJECT = "open-mcp-gateway"

LOCK_TOOL = "uv==0.13.9"
"""Resolves the locks: it takes the hashes of all files of a version, so that they hold on every platform."""

STAMP = (1980, 1, 1, 0, 0, 0)
"""The earliest time a zip entry can bear."""

INSTALLER_FILES = {"RECORD", "WHEEL", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json"}
"""What differs between installers and machines. METADATA, entry points and licences of each package stay."""

TEST_FOLDERS = {"tests", "_tests", "__pycache__"}
COMPILED = (".so", ".pyd", ".dylib", ".dll", ".a", ".lib")
COMPILED_MAGIC = (b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
NOT_FOR_RUNNING = (".pyi", ".c", ".h", ".pyx", ".pxd", ".pyc")

# Any Python that can open the archive must be able to read this far, hence no modern syntax.
MAIN = '''\
import os
import sys

if sys.version_info < (3, 11):
    sys.exit("gateway.pyz needs Python 3.11 or newer, and this is Python %d.%d" % sys.version_info[:2])
# Packages look for their files relative to this entry, and not all of them take a path such as ./gateway.pyz.
sys.path[0] = os.path.abspath(sys.path[0])

from gateway.__main__ import run

sys.exit(run())
'''

# Runs in an interpreter of its own with nothing imported and no hash seed, because marshal's output depends on what
# else is alive in the process.
COMPILE = '''\
import py_compile, sys
for name in sys.stdin.read().splitlines():
    py_compile.compile(name, name + "c", "gateway.pyz/" + name, doraise=True, optimize=0,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
'''


class BuildError(Exception):
    """The archive can't be built; the text says why and what to do."""


def run(command: list[str], what: str, **options: Any) -> str:
    """Run a command and return its output; raise BuildError with the end of what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BuildError(f"{what} failed (exit code {done.returncode}):\n{said}")
    return str(done.stdout)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(name: str) -> str:
    """A project name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version() -> str:
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "gateway" / "__init__.py").read_text("utf-8"), re.M)
    if found is None:
        raise BuildError("gateway/__init__.py has no line __version__ = \"...\"")
    return found.group(1)


def commit() -> str:
    """The commit the tree stands at, or "unknown" when that is not exactly what lies here."""
    # A clone that belongs to another user is asked all the same: the answer must not depend on who builds.
    git = ["git", "-c", f"safe.directory={ROOT}", "-c", "core.fsmonitor=false", "-C", str(ROOT)]
    try:
        top = run([*git, "rev-parse", "--show-toplevel"], "git").strip()
        if Path(top).resolve() != ROOT or run([*git, "status", "--porcelain"], "git").strip():
            return "unknown"
        return run([*git, "rev-parse", "HEAD"], "git").strip()
    except (OSError, BuildError):
        return "unknown"


def locked() -> dict[str, str]:
    """The runtime lock as {project: version}."""
    pins = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", RUNTIME_LOCK.read_text("utf-8"), re.M)
    if not pins:
        raise BuildError(f"{RUNTIME_LOCK} names no package; make it with: python3 build_zipapp.py --lock")
    return {canonical(name): pin for name, pin in pins}


# ---------------------------------------------------------------- the build environment


def make_venv(folder: Path) -> Path:
    """Make a virtual environment with pip and return its interpreter."""
    run(
        [sys.executable, "-m", "venv", str(folder)],
        "making a virtual environment (on Debian it needs the package python3-venv)",
    )
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def cache_folder() -> Path | None:
    """Where dependencies are kept between builds; None where that can't be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open-mcp-gateway-build"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def install(folder: Path, work: Path) -> None:
    """Install the runtime lock into an empty folder: hashes checked, and wheels only, so no setup code runs."""
    python = make_venv(work / "venv")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-user"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-compile", "--no-warn-script-location"]
    run([*command, "--target", str(folder), "-r", str(RUNTIME_LOCK)], "installing .lock/runtime.txt")


def dependencies(work: Path, fresh: bool) -> Path:
    """The folder with the installed runtime lock, from an earlier build where lock and Python are the same."""
    cache = None if fresh else cache_folder()
    if cache is None:
        install(work / "installed", work)
        return work / "installed"
    key = digest(RUNTIME_LOCK.read_bytes() + Path(__file__).read_bytes() + f"{sys.version}{sys.platform}".encode())
    kept = cache / key[:32]
    if not kept.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            install(Path(scratch) / "installed", Path(scratch))
            try:
                (Path(scratch) / "installed").rename(kept)
            except OSError:
                if not kept.is_dir():  # else another build was quicker, with the same result
                    raise
    return kept


def write_locks() -> None:
    """Resolve pyproject.toml anew into .lock/, for the oldest Python that is supported.

    Without environment markers, so that the archive holds what 3.11 needs whichever Python builds it. Versions that are
    in the locks stay unless pyproject.toml forbids them; delete the files first to take the newest ones.
    """
    with tempfile.TemporaryDirectory() as scratch:
        python = make_venv(Path(scratch) / "venv")
        run([str(python), "-m", "pip", "install", "--quiet", LOCK_TOOL], f"installing {LOCK_TOOL}")
        uv = [str(python), "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet", "--python-version", "3.11"]
        uv += ["--generate-hashes", "--no-header", "--no-emit-index-url", "--no-emit-find-links"]
        RUNTIME_LOCK.parent.mkdir(exist_ok=True)
        lock = [str(path.relative_to(ROOT)) for path in (RUNTIME_LOCK, DEV_LOCK)]
        run([*uv, "--python-platform", "x86_64-manylinux_2_28", "-o", lock[0]], "resolving the runtime lock", cwd=ROOT)
        run([*uv, "--extra", "dev", "-c", lock[0], "-o", lock[1]], "resolving the dev lock", cwd=ROOT)
    print(f"wrote {', '.join(lock)}: {len(locked())} packages at run time")


# ---------------------------------------------------------------- what goes in


def owners(installed: Path) -> dict[str, str]:
    """{file: project} as the installed packages' own RECORDs tell."""
    found = {}
    for record in sorted(installed.glob("*.dist-info/RECORD")):
        project = canonical(record.parent.name.removesuffix(".dist-info").rpartition("-")[0])
        with record.open(encoding="utf-8", newline="") as lines:
            for name, *_ in csv.reader(lines):
                if not name.startswith(".."):  # programs, which go to another folder
                    found[name] = project
    return found


def wanted(name: str) -> bool:
    """Whether a file of a dependency goes into the archive."""
    *folders, last = name.split("/")
    if TEST_FOLDERS.intersection(folders) or last.endswith(NOT_FOR_RUNNING):
        return False
    if folders and folders[0].endswith(".dist-info") and last in INSTALLER_FILES:
        return False
    # With these gone markupsafe imports its own pure Python twin, _native.
    return not name.startswith("markupsafe/_speedups")


def refuse_compiled(name: str, data: bytes) -> None:
    if name.endswith(COMPILED) or re.search(r"\.so\.\d", name) or data.startswith(COMPILED_MAGIC):
        raise BuildError(f"{name} is compiled code, and the archive must run on every platform")


def collect(installed: Path) -> dict[str, bytes]:
    """Everything that goes into the archive but the bytecode, as {name: content}."""
    files: dict[str, bytes] = {}
    for name in owners(installed):
        if wanted(name):
            files[name] = (installed / name).read_bytes()
    for path in sorted((ROOT / "gateway").rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in name.split("/")):
            files[name] = path.read_bytes()
    files["LICENSE"] = (ROOT / "LICENSE").read_bytes()
    files["__main__.py"] = MAIN.encode()
    files["gateway/_build_info.py"] = (
        f'COMMIT = "{commit()}"\nLOCK_DIGEST = "{digest(RUNTIME_LOCK.read_bytes())}"\n'
    ).encode()
    for name, data in files.items():
        refuse_compiled(name, data)
    return files


def add_bytecode(files: dict[str, bytes], work: Path) -> None:
    """Put x.pyc beside each x.py."""
    stage = work / "stage"
    sources = sorted(name for name in files if name.endswith(".py"))
    for name in sources:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(files[name])
    keep = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    command = [sys.executable, "-S", "-s", "-B", "-W", "ignore", "-c", COMPILE]
    environment = {**keep, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    run(command, "compiling", cwd=stage, env=environment, input="\n".join(sources))
    for name in sources:
        files[name + "c"] = (stage / (name + "c")).read_bytes()


# ---------------------------------------------------------------- the archive


def folders_of(names: list[str]) -> set[str]:
    """The folders of these files, each with its slash."""
    return {name[: slash.end()] for name in names for slash in re.finditer("/", name)}


def write_archive(files: dict[str, bytes], target: Path) -> None:
    """Write the archive whole or not at all; a gateway that runs from the old one keeps its open file."""
    part = target.with_name(target.name + ".part")
    with part.open("wb") as out:
        out.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(out, "w") as archive:
            for name in sorted(folders_of(list(files)).union(files)):
                entry = zipfile.ZipInfo(name, STAMP)
                entry.create_system = 3  # unix, also when built elsewhere
                if name.endswith("/"):
                    entry.external_attr = 0o40755 << 16 | 0x10
                    archive.writestr(entry, b"")
                    continue
                entry.external_attr = 0o100644 << 16
                entry.compress_type = zipfile.ZIP_STORED if name.endswith(".pyc") else zipfile.ZIP_DEFLATED
                archive.writestr(entry, files[name], compresslevel=9)
    part.chmod(0o755)
    part.replace(target)


# ---------------------------------------------------------------- the bill of materials


def licence_of(metadata: Any) -> list[dict[str, Any]]:
    if metadata["License-Expression"]:
        return [{"expression": metadata["License-Expression"]}]
    named = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License :: ")]
    named = [name for name in named if name != "OSI Approved"] or [(metadata["License"] or "unknown").splitlines()[0]]
    return [{"license": {"name": name}} for name in named]


def purl(name: str, pin: str) -> str:
    return f"pkg:pypi/{name}@{pin}"


def bill(target: Path) -> dict[str, Any]:
    """The CycloneDX bill of materials of a finished archive, from what it really holds."""
    data = target.read_bytes()
    sha256 = digest(data)
    components, needs = [], {}
    with zipfile.ZipFile(target) as archive:
        for name in sorted(archive.namelist()):
            if not re.fullmatch(r"[^/]+\.dist-info/METADATA", name):
                continue
            metadata = Parser().parsestr(archive.read(name).decode("utf-8"), headersonly=True)
            project, pin = canonical(metadata["Name"]), metadata["Version"]
            reference = purl(project, pin)
            components.append(
                {
                    "type": "library",
                    "bom-ref": reference,
                    "name": project,
                    "version": pin,
                    "purl": reference,
                    "licenses": licence_of(metadata),
                }
            )
            required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
            needs[reference] = {canonical(re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0]) for r in required}
    components.sort(key=lambda c: str(c["name"]))
    known = {str(c["name"]): str(c["purl"]) for c in components}
    root = purl(PROJECT, version())
    needs[root] = set(known)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, 'sha256:' + sha256)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": PROJECT,
                "version": version(),
                "purl": root,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
                "hashes": [{"alg": "SHA-256", "content": sha256}],
            },
            "properties": [{"name": f"{PROJECT}:lock-sha256", "value": digest(RUNTIME_LOCK.read_bytes())}],
        },
        "components": components,
        "dependencies": [
            {"ref": reference, "dependsOn": sorted(known[name] for name in names if name in known)}
            for reference, names in sorted(needs.items())
        ],
    }


def check(target: Path, sbom: dict[str, Any], owner: dict[str, str]) -> None:
    """Compare archive, bill of materials and lock; raise BuildError at the first thing that is not accounted for."""
    listed = {component["name"]: component["version"] for component in sbom["components"]}
    if listed != locked():
        odd = sorted(f"{name} {pin}" for name, pin in listed.items() ^ locked().items())
        raise BuildError(f"archive and .lock/runtime.txt do not hold the same packages: {', '.join(odd)}")
    with zipfile.ZipFile(target) as archive:
        names = archive.namelist()
        for entry in archive.infolist():
            refuse_compiled(entry.filename, archive.read(entry)[:8])
    for name in names:
        source = name.removesuffix("c") if name.endswith(".pyc") else name
        ours = source.startswith("gateway/") or source in ("__main__.py", "LICENSE")
        if not ours and not name.endswith("/") and owner.get(source) not in listed:
            raise BuildError(f"{name} belongs to no package of the bill of materials")
    licensed = {
        canonical(found[1])
        for name in names
        if (found := re.match(r"([^/]+)-[^-/]+\.dist-info/.*(licen[sc]e|copying)", name, re.I))
    }
    if missing := sorted(set(listed) - licensed):
        raise BuildError(f"no licence in the archive of: {', '.join(missing)}")


# ---------------------------------------------------------------- all of it


def build(output: Path, fresh: bool) -> None:
    begin = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    target = output / NAME
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        installed = dependencies(work, fresh)
        files = collect(installed)
        add_bytecode(files, work)
        write_archive(files, target)
        sbom = bill(target)
        check(target, sbom, owners(installed))
    sha256 = digest(target.read_bytes())
    target.with_name(NAME + ".sha256").write_text(f"{sha256}  {NAME}\n", "utf-8")
    target.with_name("gateway.cdx.json").write_text(json.dumps(sbom, indent=1) + "\n", "utf-8")
    python = ".".join(map(str, sys.version_info[:3]))
    size = target.stat().st_size
    print(f"{target}: {size / 1e6:.1f} MB, {len(files)} files, {len(sbom['components'])} packages, no compiled code")
    print(f"version {version()}, commit {commit()}, bytecode of Python {python}, in {time.monotonic() - begin:.1f} s")
    print(f"sha256 {sha256}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the gateway into one portable file.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR", help="where to (default: dist)")
    parser.add_argument("--fresh", action="store_true", help="install the dependencies anew")
    parser.add_argument("--lock", action="store_true", help="refresh .lock/*.txt instead of building")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs a script has not been asked for a version yet
        print("build_zipapp.py needs Python 3.11 or newer", file=sys.stderr)
        return 2
    try:
        if options.lock:
            write_locks()
        else:
            build(options.output, options.fresh)
    except (BuildError, OSError) as error:
        print(f"build_zipapp.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
