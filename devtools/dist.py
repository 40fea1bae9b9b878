"""Build what is released, a source distribution and from it a wheel, into ``dist/``.

Usage: ``python -m devtools.dist [FOLDER]``; ``make dist`` runs it. Both come from a copy that has only what is for
them, and the wheel from the unpacked source distribution, so that one made there by others is the same.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rkv_sglang"
# Beside the package.
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
_BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(folder: Path) -> tuple[Path, Path]:
    """Build both into a folder and return them, the source distribution first. What they replace is gone.

    Raises:
        CalledProcessError: setuptools failed; what it printed was shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        copy, unpacked = Path(name, "copy"), Path(name, "unpacked")
        # Links are followed: the patches lie at the top of a checkout and inside the package.
        shutil.copytree(ROOT / PACKAGE, copy / PACKAGE, ignore=_LEFT_OUT)
        for file in FILES:
            shutil.copy2(ROOT / file, copy / file)
        # setuptools takes it from there only.
        (copy / "MANIFEST.in").write_text("include CHANGELOG.md\n")
        sdist = _run("build_sdist", copy, folder)
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked, filter="data")
        (source,) = unpacked.iterdir()
        return sdist, _run("build_wheel", source, folder)


def _run(step: str, source: Path, folder: Path) -> Path:
    command = [sys.executable, "-c", _BUILD, step, str(folder.resolve())]
    done = subprocess.run(command, cwd=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return folder / done.stdout.splitlines()[-1]


def main(argv: list[str]) -> int:
    """Build and say what was built; returns the exit status."""
    if len(argv) > 1 or any(word.startswith("-") for word in argv):
        print("usage: python -m devtools.dist [FOLDER]", file=sys.stderr)
        return 2
    for file in build(Path(*argv) if argv else ROOT / "dist"):
        print(f"{file} ({file.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
