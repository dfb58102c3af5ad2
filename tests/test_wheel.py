"""What an installed project brings: the wheel that `pip install .` builds and installs."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import gptoss_jax

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [path] = target.iterdir()
    return zipfile.ZipFile(path)


def test_it_installs_no_name_of_somebody_elses(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    info = f"gptoss_jax-{gptoss_jax.__version__}.dist-info"
    assert tops == {"gptoss_jax", "sharding", "pallas_kernels", info}


def test_it_holds_every_module_and_the_data_that_they_read(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("gptoss_jax", "sharding", "pallas_kernels"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert files <= names
        assert f"{package}/py.typed" in names
    presets = {f"sharding/meshes/{path.name}" for path in (ROOT / "configs" / "meshes").iterdir()}
    shapes = {f"gptoss_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.json")}
    assert len(presets) >= 3
    assert len(shapes) == 2
    assert presets | shapes <= names
    assert {f"gptoss_jax/embedded/{n}" for n in ("config.json", "model.safetensors", "tokenizer.json")} <= names
    assert "sharding/compiled/devices.json" in names


def test_it_runs_where_there_is_no_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}]\n"
        "import gptoss_jax, sharding\n"
        f"assert gptoss_jax.__file__.startswith({str(tmp_path)!r}), gptoss_jax.__file__\n"
        "from gptoss_jax import ModelConfig\n"
        "from gptoss_jax.model.shapes import shape_file\n"
        "assert sharding.parse_mesh('8-experts')['expert'] == 8\n"
        "assert ModelConfig.from_file(shape_file('gpt-oss-120b')).num_local_experts == 128\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_its_metadata(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    fields = Parser().parsestr(wheel.read(name).decode())
    assert fields["Version"] == gptoss_jax.__version__
    assert "Typing :: Typed" in fields.get_all("Classifier")
