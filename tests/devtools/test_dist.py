"""What is released holds what it needs and nothing else."""

import configparser
import tarfile
import zipfile
from pathlib import Path

import pytest

from devtools import dist
from rkv_sglang import __version__

NAME = f"rkv_sglang-{__version__}"
# Everything of the package's folder is a part of it.
OWN = {
    str(path.relative_to(dist.ROOT))
    for folder in (dist.ROOT / "rkv_sglang", dist.ROOT / "rkv_sglang" / "patching" / "patches")
    for path in folder.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
EGG = {"PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return dist.build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_is_the_package_and_its_data(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        assert set(wheel.namelist()) == OWN | {f"{NAME}.dist-info/{name}" for name in METADATA}
        assert {"rkv_sglang/patching/patches/0.5.23/pristine.json", "rkv_sglang/py.typed"} <= OWN
        for name in OWN:
            assert wheel.read(name) == (dist.ROOT / name).read_bytes(), name
        points = configparser.ConfigParser()
        points.read_string(wheel.read(f"{NAME}.dist-info/entry_points.txt").decode())
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    assert dict(points["sglang.srt.plugins"]) == {"rkv_sglang": "rkv_sglang.integration.plugin:register"}
    assert dict(points["console_scripts"]) == {"rkv-sglang": "rkv_sglang.cli:main"}
    # An installer must not put another SGLang in the place of a user's own.
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert required and not any("sglang" in line for line in required)


def test_the_source_distribution_is_what_the_wheel_is_made_of(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        files = {member.name for member in archive.getmembers() if member.isfile()}
        assert not [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
    beside = {*dist.FILES, "MANIFEST.in", "PKG-INFO", "setup.cfg"} | {f"rkv_sglang.egg-info/{name}" for name in EGG}
    assert files == {f"{NAME}/{name}" for name in OWN | beside}
