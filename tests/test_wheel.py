"""What is built is complete: an editable install finds files that the wheel may have left out."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "eval", "recipes", "train")

NOT_SHIPPED = {"eval/judges/base_completions.jsonl", "eval/judges/contrast_labels.jsonl"}
"""What a script of the repository reads, and nothing that is installed."""

IMPORT_ALL = """
import importlib, sys
from pathlib import Path

site = Path(sys.argv[1])
for path in sorted((site / "equipoise").rglob("*.py")):
    if path.name == "__main__.py":
        continue
    name = ".".join(path.relative_to(site).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert Path(module.__file__).is_relative_to(site), (name, module.__file__)
    print(name)
"""


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def files(folder: Path) -> set[str]:
    """Everything under the folder that belongs into the wheel; READMEs are for who reads the repository."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder.parent)) for path in found if path.suffix != ".md"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Python and site-packages of a fresh environment with the wheel in it.

    The dependencies are those of the environment that runs the tests: its folder is put on the path without its `.pth`
    files, so that its editable install of equipoise stays out.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("equipoise-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    purelib = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(run(python, "-c", purelib, cwd=folder).stdout.strip())
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python, site


def test_the_wheel_has_every_file(installed: tuple[Path, Path]) -> None:
    for folder in FOLDERS:
        assert files(installed[1] / "equipoise" / folder) == files(ROOT / folder) - NOT_SHIPPED


def test_the_wheel_brings_nothing_but_equipoise_and_its_licence(installed: tuple[Path, Path]) -> None:
    assert {path.name for path in installed[1].iterdir()} >= {"equipoise"}
    assert not {path.name for path in installed[1].iterdir()} & {*FOLDERS, "tests", "scripts"}
    (licence,) = installed[1].glob("equipoise-*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()


def test_every_module_of_the_wheel_can_be_imported(installed: tuple[Path, Path], tmp_path: Path) -> None:
    python, site = installed
    imported = run(python, "-c", IMPORT_ALL, site, cwd=tmp_path).stdout.split()
    assert {"equipoise.train.run", "equipoise.recipes", "equipoise.data.sources"} <= set(imported)


def test_the_command_line_of_the_wheel_works_anywhere(installed: tuple[Path, Path], tmp_path: Path) -> None:
    python, _ = installed
    printed = run(python, "-m", "equipoise.train", "recipe=tsdi", "--cfg", "job", cwd=tmp_path).stdout
    assert list(yaml.safe_load(printed)["stages"]) == ["helpful", "safe", "token_bias"]
    refused = run(python, "-m", "equipoise.train", "recipe=tsdi", "modle=hub", cwd=tmp_path, code=2)
    assert "did you mean 'model'?" in refused.stderr
    count = "from equipoise.data.sources import load_samples; print(len(load_samples().safety_pairs))"
    assert int(run(python, "-c", count, cwd=tmp_path).stdout) >= 13 * 24
