"""What deploy/ tells people to run parses, with the parsers of the commands themselves."""

import argparse
import base64
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptoss_jax.errors import UsageError
from sharding import parse_mesh
from sharding.processes.secret import VARIABLE

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SCRIPTS = [*sorted(DEPLOY.rglob("*.sh")), *sorted(DEPLOY.rglob("*.sbatch"))]
PAGES = sorted(DEPLOY.rglob("*.md"))
CHIPS = {"4x4": 16, "4x8": 32}


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each `python -m gptoss_jax.NAME ...` of a script or page: the name and the words after it."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        for found in re.finditer(r"python -m gptoss_jax\.(\w+)([^`]*)", line):
            yield found[1], _words(found[2])


def _words(text: str) -> list[str]:
    # What the shell fills in stands for some word.
    text = re.sub(r"\$\(printf %q \"\$address\"\)", "HOST:8476", text)
    text = re.sub(r"\$\{#hosts\[@\]\}|\$1\b", "1", text)
    text = re.sub(r"\s\$words\"?", " ", text)
    text = re.split(r"\s[|<>&;#]|[\])]", text)[0]
    return shlex.split(text)


def parser(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(f"gptoss_jax.{command}").flags()


def check(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> argparse.Namespace:
    try:
        options = parser(command).parse_args(words)
    except (SystemExit, UsageError) as error:
        pytest.fail(f"{command} {words}: {capsys.readouterr().err or error}")
    if options.mesh:
        parse_mesh(options.mesh)
    return options


@pytest.mark.parametrize("path", [*SCRIPTS, *PAGES], ids=lambda path: str(path.relative_to(DEPLOY)))
def test_commands_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(commands(path.read_text()))
    assert found or path.suffix == ".md"
    for command, words in found:
        check(command, words, capsys)


def test_wrong_commands_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    ((command, words),) = commands("run `python -m gptoss_jax.generate \\\n  --no-such-flag` here")
    with pytest.raises(pytest.fail.Exception, match="no-such-flag"):
        check(command, words, capsys)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text()


def test_flags_that_pages_mention_exist() -> None:
    """Of the flags in running text, those that look like ours."""
    known = {flag for name in ("generate", "chat") for flag in parser(name)._option_string_actions}
    others = {
        *("--extra", "--kill-on-bad-exit", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--gres"),
        *("--gpus-per-task", "--tpu-topology", "--no-sync", "--from-file"),
    }
    for page in PAGES:
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text())) <= known | others, page


def test_every_folder_has_a_page() -> None:
    folders = [path for path in DEPLOY.iterdir() if path.is_dir()]
    assert sorted(path.name for path in folders) == ["gke", "slurm", "ssh"]
    for folder in folders:
        page = (folder / "README.md").read_text()
        assert all(f"## {title}" in page for title in ("How it works", "Configuration", "Verification"))
        for link in re.findall(r"\]\(([^)#]+)\)", page):
            assert link.startswith("https://") or (folder / link).exists()


def test_slurm_script_asks_for_the_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DEPLOY / "slurm" / "generate.sbatch").read_text()
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    ((command, words),) = commands(text)
    mesh = parse_mesh(check(command, words, capsys).mesh)
    assert mesh["expert"] == int(settings["nodes"]) * int(settings["gpus-per-node"])
    assert settings["ntasks-per-node"] == "1"


def jobset() -> dict[str, Any]:
    (document,) = yaml.safe_load_all((DEPLOY / "gke" / "jobset.yaml").read_text())
    return document


def test_jobset(capsys: pytest.CaptureFixture[str]) -> None:
    document = jobset()
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z][a-z0-9-]*", document["metadata"]["name"])
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    tpus = container["resources"]["limits"]["google.com/tpu"]
    chips = CHIPS[pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]]
    assert job["parallelism"] == job["completions"] == chips // tpus
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert container["resources"]["requests"] == container["resources"]["limits"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    python, dash_m, module, *words = container["command"]
    assert (python, dash_m) == ("python", "-m")
    options = check(module.removeprefix("gptoss_jax."), words, capsys)
    assert parse_mesh(options.mesh)["expert"] == chips
    ((name, key),) = [
        (entry["valueFrom"]["secretKeyRef"]["name"], entry["valueFrom"]["secretKeyRef"]["key"])
        for entry in container["env"]
        if entry["name"] == VARIABLE
    ]
    page = (DEPLOY / "gke" / "README.md").read_text()
    assert f"| kubectl create secret generic {name} --from-file={key}=/dev/stdin" in page


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_slurm_script_passes_a_new_secret_to_each_job(tmp_path: Path) -> None:
    script(tmp_path / "srun", 'printenv GPTOSS_JAX_CLUSTER_SECRET; echo "$*" >&2')
    secrets = set()
    for _ in range(2):
        ended = subprocess.run(
            ["bash", DEPLOY / "slurm" / "generate.sbatch"],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        secret = ended.stdout.strip()
        assert len(base64.b64decode(secret, validate=True)) == 32
        assert "gptoss_jax.generate" in ended.stderr
        assert secret not in ended.stderr
        secrets.add(secret)
    assert len(secrets) == 2


def test_ssh_script_gives_all_hosts_one_secret(tmp_path: Path) -> None:
    """With a shell of this machine in place of ssh, which records command lines, and a script in place of python."""
    ssh = script(tmp_path / "ssh", f'echo "$*" >>{tmp_path}/lines\nshift\nexec bash -c "$*"')
    script(
        tmp_path / ".venv/bin/python",
        "while [[ $1 != --cluster-secret-file ]]; do [[ $1 != --process-id ]] || id=$2; shift; done\n"
        f'stat -c %a "$2" >{tmp_path}/$id; cat "$2" >>{tmp_path}/$id; [[ $id != 0 ]] || exit 3',
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "SSH": str(ssh), "DIRECTORY": str(tmp_path)}
    ended = subprocess.run(
        [DEPLOY / "ssh" / "run.sh", "a,b,c"], env=environment, capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, ended.stderr) == (3, "")
    ((mode, secret),) = {tuple((tmp_path / str(i)).read_text().splitlines()) for i in range(3)}
    assert mode == "600"
    assert len(base64.b64decode(secret, validate=True)) == 32
    lines = (tmp_path / "lines").read_text()
    assert lines.count("--cluster-secret-file") == 3
    assert secret not in lines
    assert not list(tmp_path.glob(".gptoss-*"))


@pytest.mark.slow
def test_ssh_script_runs_all_hosts(tmp_path: Path) -> None:
    """With a shell of this machine in place of ssh."""
    ssh = script(tmp_path / "ssh", 'shift\nexec bash -c "$*"')
    flags = (
        "--model",
        str(ROOT / "tests/golden/P1"),
        "--dtype",
        "float32",
        "--json",
        "--max-new-tokens",
        "3",
        "--prompt-tokens",
        "1,2,3",
    )
    ended = subprocess.run(
        [DEPLOY / "ssh" / "run.sh", "a,b", *flags],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "SSH": str(ssh),
            "DIRECTORY": str(ROOT),
            "COORDINATOR": "127.0.0.1:18476",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert '"finish_reason": "length"' in ended.stdout
