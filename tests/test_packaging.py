"""The wheel and the sdist hold what a run needs, wherever it is started."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
YAMLS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "properties").rglob("*.yaml"))


def build(kind: str, out: Path) -> Path:
    """Builds from a copy of what git knows, so that nothing lying about gets in."""
    source = out / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    if kind == "wheel":
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), "."]
    else:
        hook = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
        command = [sys.executable, "-c", hook, str(out)]
    subprocess.run(command, check=True, cwd=source)
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_has_properties_tools_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"recbole_mm/{name}" for name in YAMLS} <= set(names)
    assert "dataset_tools/__main__.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


@pytest.mark.slow
def test_the_sdist_has_properties_and_tests_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = archive.getnames()
    inside = [name.split("/", 1)[1] for name in names if "/" in name]
    assert set(YAMLS) <= set(inside)
    assert len(inside) == len(set(inside))


@pytest.mark.slow
def test_an_installed_wheel_runs_from_any_directory(wheel: Path, tmp_path: Path) -> None:
    """The other packages are those of this environment; ours comes from the wheel."""
    place = tmp_path / "env"
    venv.create(place, system_site_packages=False, with_pip=True)
    python = place / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    others = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(others)}
    site = next((place / "lib").glob("python*/site-packages"))
    environment["PYTHONPATH"] = os.pathsep.join([str(site), *others])
    flags = ["--model=Pop", "--dataset=mm-demo", "--show_progress=False", "--result_file=r.json"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [place / "bin" / "recbole-mm", *flags], check=True, cwd=elsewhere, env=environment
    )
    where = "import recbole_mm, dataset_tools; print(recbole_mm.__file__)"
    found = subprocess.run(
        [python, "-c", where], check=True, capture_output=True, cwd=elsewhere, env=environment
    )
    assert found.stdout.decode().startswith(str(site))
    assert (elsewhere / "r.json").is_file()
