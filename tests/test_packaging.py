"""The wheel holds pipelines and weights, and works from where it is installed."""

import subprocess
import sys
import zipfile

import pytest


@pytest.mark.packaging
@pytest.mark.slow
def test_a_wheel_installed_elsewhere_restores_a_photo(repository, photo, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, repository]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("pipelines/diffbir.py", "weights/nano/model_index.json", "py.typed"):
        assert f"milo_latent/{name}" in names
    assert not any(name.startswith(("tests/", "notebooks/", "pipelines/")) for name in names)
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    path = "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    run = path + "from milo_latent.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-I", "-c", run, site, "restore", photo, "--steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert photo.with_name("photo_restored.png").stat().st_size > 0
