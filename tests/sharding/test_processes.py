"""Clusters of real processes on this machine, which represent several hosts, including processes that die."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from sharding import ClusterError
from sharding.processes import links
from sharding.processes.leader import STRANGERS, differences
from sharding.processes.membership import Membership, membership
from sharding.processes.secret import VARIABLE
from tests.quick import QUICK

ROOT = Path(__file__).parents[2]
P1 = ROOT / "tests" / "golden" / "P1"
LIMIT = 30
"""Seconds within which the others must end after a process died."""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Processes:
    """One command run by several processes, each with `devices` devices."""

    def __init__(
        self,
        count: int,
        devices: int,
        *arguments: str,
        own: dict[int, tuple[str, ...]] | None = None,
        env: dict[int, dict[str, str]] | None = None,
    ) -> None:
        address = free_address()
        self.running = []
        for i in range(count):
            place = ("--coordinator-address", address, "--num-processes", str(count), "--process-id", str(i))
            self.running.append(
                subprocess.Popen(
                    [sys.executable, "-m", *arguments, *place, *(own or {}).get(i, ())],
                    cwd=ROOT,
                    env=os.environ
                    | {
                        "JAX_PLATFORMS": "cpu",
                        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
                        "JAX_COMPILATION_CACHE_DIR": os.environ["XDG_CACHE_HOME"],
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
                    }
                    | (env or {}).get(i, {}),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def outcomes(self, timeout: float = 120, stdin: str = "") -> list[Outcome]:
        """The outcome of each process; kills all processes after the timeout."""
        deadline = time.monotonic() + timeout
        try:
            ends = []
            for process in self.running:
                out, err = process.communicate(stdin, timeout=max(1, deadline - time.monotonic()))
                ends.append(Outcome(process.returncode, out, err))
            return ends
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.running:
            process.kill()


GENERATE = ("gptoss_jax.generate", "--model", str(P1), "--dtype", "float32")


def requests(folder: Path) -> Path:
    golden = np.load(P1 / "golden.npz")
    lines = [
        {"id": "greedy", "prompt_tokens": golden["greedy0_prompt"].tolist(), "max_tokens": 8, "ignore_eos": True},
        {
            "id": "drawn",
            "prompt_tokens": [1, 2, 3],
            "max_tokens": 8,
            "temperature": 1,
            "seed": 7,
            "ignore_eos": True,
        },
    ]
    path = folder / "in.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def tokens(path: Path) -> dict[str, list[int]]:
    return {line["id"]: line["token_ids"] for line in map(json.loads, path.read_text().splitlines())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """The tokens of a single process without a mesh."""
    folder = tmp_path_factory.mktemp("alone")
    command = (*GENERATE, "--batch", str(requests(folder)), "--output", str(folder / "out.jsonl"))
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    return tokens(folder / "out.jsonl")


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (2, 1, None),
        pytest.param(2, 4, None, marks=pytest.mark.slow),
        pytest.param(4, 2, None, marks=pytest.mark.long),
        pytest.param(4, 2, "data=2,expert=2,tensor=2", marks=pytest.mark.slow),
    ],
)
def test_several_processes_generate_the_tokens_of_one(
    tmp_path: Path, alone: dict[str, list[int]], count: int, devices: int, mesh: str | None
) -> None:
    output = tmp_path / "out.jsonl"
    batch = ("--batch", str(requests(tmp_path)), "--output", str(output))
    secret = {i: {VARIABLE: "a secret of all processes"} for i in range(count)}
    flags = ("--mesh", mesh) if mesh else ()
    ends = Processes(count, devices, *GENERATE, *batch, *flags, env=secret).outcomes(300)
    assert [end.code for end in ends] == [0] * count, ends
    assert tokens(output) == alone
    golden = np.load(P1 / "golden.npz")["greedy0_tokens"][:8].tolist()
    assert alone["greedy"] == golden
    assert [end.out for end in ends] == [""] * count
    assert [end.err for end in ends[1:]] == [""] * (count - 1)


@pytest.mark.slow
def test_structured_output_over_two_processes(tmp_path: Path) -> None:
    asked = [
        {"id": "regex", "prompt": "What is 17 + 25?", "structured_outputs": {"regex": "[0-9]{3}"}},
        {
            "id": "json",
            "prompt": "3 - 5",
            "n": 2,
            "temperature": 1,
            "seed": 3,
            "structured_outputs": {"json": {"enum": [1, "b"]}},
        },
        {"id": "free", "prompt": "What is 17 + 25?"},
        {
            "id": "call",
            "prompt": "What is 17 + 25?",
            "tools": [
                {
                    "name": "get_time",
                    "strict": True,
                    "parameters": {"properties": {"zone": {"enum": ["UTC"]}}, "required": ["zone"]},
                }
            ],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, asked)))
    command = ("gptoss_jax.generate", "--dtype", "float32", "--max-new-tokens", "120", "--max-num-seqs", "4")
    batch = (*command, "--batch", str(tmp_path / "in.jsonl"), "--output")
    ends = Processes(2, 1, *batch, str(tmp_path / "two.jsonl")).outcomes(300)
    assert [end.code for end in ends] == [0, 0], ends
    subprocess.run([sys.executable, "-m", *batch, str(tmp_path / "one.jsonl")], cwd=ROOT, check=True)
    assert tokens(tmp_path / "two.jsonl") == tokens(tmp_path / "one.jsonl")
    lines = {line["id"]: line for line in map(json.loads, (tmp_path / "two.jsonl").read_text().splitlines())}
    texts = {name: line["text"] for name, line in lines.items()}
    [call] = lines["call"]["messages"][0]["tool_calls"]
    assert call["function"]["name"] == "get_time"
    assert json.loads(call["function"]["arguments"])["zone"] == "UTC"
    assert len(texts["regex"]) == 3
    assert json.loads(texts["json"]) in (1, "b")
    assert texts["free"] == "17 + 25 = 42"


@pytest.mark.slow
def test_four_processes_of_two_devices() -> None:
    prompt = np.load(P1 / "golden.npz")["greedy0_prompt"].tolist()
    expected = np.load(P1 / "golden.npz")["greedy0_tokens"][:4].tolist()
    flags = ("--prompt-tokens", ",".join(map(str, prompt)), "--json", "--max-new-tokens", "4")
    ends = Processes(4, 2, *GENERATE, *flags).outcomes()
    assert [end.code for end in ends] == [0] * 4, ends
    assert json.loads(ends[0].out)["token_ids"] == expected
    assert [(end.out, end.err) for end in ends[1:]] == [("", "")] * 3


@pytest.mark.slow
def test_batch_resumes_and_chat_answers(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    batch = (*GENERATE, "--batch", str(requests(tmp_path)), "--output", str(output))
    output.write_text(json.dumps({"id": "greedy", "finish_reason": "stop"}) + "\n")
    ends = Processes(2, 2, *batch).outcomes()
    assert [end.code for end in ends] == [0, 0], ends
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["greedy", "drawn"]
    ends = Processes(2, 2, *batch).outcomes()
    assert [end.code for end in ends] == [0, 0], ends
    assert "2 of 2 requests" in ends[0].err
    chat = Processes(2, 2, "gptoss_jax.chat", "--max-new-tokens", "8")
    ends = chat.outcomes(stdin="hello\n/reset\nhello\n")
    assert [end.code for end in ends] == [0, 0], ends
    first, second = ends[0].out[: len(ends[0].out) // 2], ends[0].out[len(ends[0].out) // 2 :]
    assert first == second != ""
    assert ends[1].out == ends[1].err == ""


LONG = (*GENERATE, "--max-new-tokens", "2000", "--prompt-tokens", "1,2,3", "--json")


def decoding(folder: Path) -> Processes:
    """Two processes during a long generation."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    more = {"prompt_tokens": [1, 2, 3], "ignore_eos": True}
    lines = [{"id": "short", "max_tokens": 2} | more, {"id": "long", "max_tokens": 2000} | more]
    source.write_text("\n".join(json.dumps(line) for line in lines))
    processes = Processes(2, 1, *GENERATE, "--batch", str(source), "--output", str(output))
    deadline = time.monotonic() + 120
    while not output.exists() or not output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return processes


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.long),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_death_of_a_process_ends_the_others(tmp_path: Path, victim: int, number: signal.Signals) -> None:
    processes = decoding(tmp_path)
    gone, other = processes.running[victim], processes.running[1 - victim]
    gone.send_signal(number)
    try:
        _, error = other.communicate(timeout=LIMIT)
    finally:
        processes.kill()
    assert other.returncode == 1
    assert f"error: process {victim} is gone: " in error
    assert "Check failure" not in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.5, 1.5, 2.5, 3.5, 4.5, 6])
@pytest.mark.parametrize("victim", [0, 1])
def test_death_of_a_process_at_any_time_ends_the_others(victim: int, delay: float) -> None:
    processes = Processes(2, 1, *LONG)
    gone, other = processes.running[victim], processes.running[1 - victim]
    time.sleep(delay)
    assert gone.poll() is None
    gone.kill()
    try:
        out, error = other.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        # The victim had not connected yet, so the other waits for it.
        assert delay < 2
        return
    finally:
        processes.kill()
    assert other.returncode == 1, error
    assert out == ""
    assert error.count("error: ") == 1
    assert f"error: process {victim} is gone: " in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_interrupting_process_0_ends_all(tmp_path: Path) -> None:
    processes = decoding(tmp_path)
    for process in reversed(processes.running):  # A terminal sends the signal to all processes.
        process.send_signal(signal.SIGINT)
    ends = processes.outcomes(LIMIT)
    assert [end.code for end in ends] == [130, 130], ends
    assert ends[0].err.endswith("interrupted\n")
    assert ends[1].err == ""


PROTOCOL = """
import sys
from sharding.processes import cluster
from sharding.processes import follower
from sharding.processes import leader
from sharding.processes import links
from sharding.processes import process
from sharding.processes import current, start
from sharding.processes.membership import membership
from sharding.processes.secret import cluster_secret
from sharding.errors import ClusterError
links.SILENCE_SECONDS = 2.0
links.PING_SECONDS = cluster.PING_SECONDS = 0.3
cluster.END_SECONDS = leader.END_SECONDS = follower.END_SECONDS = 1.0
report = process.report
address, count, process, body = sys.argv[2], int(sys.argv[4]), int(sys.argv[6]), sys.argv[7]
try:
    cluster = start(membership(address, count, process), 5, cluster_secret(None))
    exec(body)
    code, why = cluster.exit_code, ""
except ClusterError as error:
    code, why = 2, str(error)
    if process == 0:
        report(why)
current().end(code, why)
"""


class ClusterProcesses(Processes):
    """Processes of a cluster without jax; each runs its own body, and has its own secret, if any."""

    def __init__(
        self,
        bodies: list[str],
        counts: list[int] | None = None,
        ids: list[int] | None = None,
        secrets: list[str | None] | None = None,
        address: str = "",
    ) -> None:
        address = address or free_address()
        self.running = []
        for i, body in enumerate(bodies):
            count, process = (counts or [len(bodies)] * len(bodies))[i], (ids or list(range(len(bodies))))[i]
            flags = ("--coordinator-address", address, "--num-processes", str(count), "--process-id", str(process))
            self.running.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROTOCOL, *flags, body],
                    cwd=ROOT,
                    env=os.environ | ({VARIABLE: secret} if secrets and (secret := secrets[i]) else {}),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )


def test_broadcasts_of_any_size() -> None:
    body = "print(len(cluster.broadcast('\u00e9' * 30_000_000)), file=sys.stderr)"
    ends = ClusterProcesses([body, body.replace("'\u00e9' * 30_000_000", "")]).outcomes(30)
    assert [(end.code, end.err) for end in ends] == [(0, "30000000\n")] * 2


def test_differing_facts_are_grouped() -> None:
    same = {"dtype": "bfloat16", "version": 1}
    assert differences({0: same, 1: same}) == ""
    other = {"dtype": "bfloat16", "version": 2, "more": [1]}
    text = differences({0: same, 1: other, 2: other, 3: same, 4: other})
    assert text == (
        "version: processes 0, 3 has 1, processes 1-2, 4 has 2; "
        "more: processes 0, 3 has none, processes 1-2, 4 has [1]"
    ).replace("3 has", "3 have").replace("4 has", "4 have")


@pytest.mark.parametrize(
    ("counts", "ids", "expected"),
    [
        ([2, 3], [0, 1], "--num-processes: process 0 has 2, process 1 has 3"),
        ([3, 3, 3], [0, 1, 1], "--process-id: 1 is used by two processes"),
        ([3, 3], [0, 1], "process 2 did not connect to"),
    ],
)
def test_contradicting_processes_are_rejected(counts: list[int], ids: list[int], expected: str) -> None:
    ends = ClusterProcesses(["cluster.agree({})"] * len(ids), counts, ids).outcomes(30)
    assert [end.code for end in ends] == [2] * len(ids), ends
    assert all(expected in end.err for end in ends), ends


@pytest.mark.parametrize(
    ("secrets", "leader", "follower"),
    [
        (["of all processes", "of all processes"], "", ""),
        (["of process 0 only", "of process 1 only"], "process 1 at 127.0.0.1 has another", "has another"),
        (
            ["of process 0 only", None],
            "process 1 at 127.0.0.1 has no secret",
            "has a secret, but this process has none",
        ),
        (
            [None, "of process 1 only"],
            "process 1 at 127.0.0.1 has a secret",
            "has no secret, but this process has one",
        ),
    ],
)
def test_secrets_must_be_the_same(secrets: list[str | None], leader: str, follower: str) -> None:
    address = free_address()
    ends = ClusterProcesses(["cluster.agree({})"] * 2, secrets=secrets, address=address).outcomes(30)
    assert [end.code for end in ends] == ([2, 2] if leader else [0, 0]), ends
    for end, line in zip(ends, (leader, follower), strict=True):
        assert end.err.count("\n") == bool(line), ends
        assert line in end.err
        assert end.err.startswith("error: --cluster-secret-file: " if line else "")
        assert "only" not in end.err
    assert not follower or f"process 0 at {address} " in ends[1].err


@pytest.mark.parametrize("secrets", [["of all processes"] * 2, ["of process 0 only", "of process 1 only"]])
def test_processes_connect_on_all_interfaces_with_a_secret(secrets: list[str | None]) -> None:
    address = free_address().replace(
        "127.0.0.1", "0.0.0.0"
    )  # Not a loopback address; Linux connects to this host.
    ends = ClusterProcesses(["cluster.agree({})"] * 2, secrets=secrets, address=address).outcomes(30)
    if secrets[0] == secrets[1]:
        assert ends == [Outcome(0, "", "")] * 2
    else:
        assert [end.code for end in ends] == [2, 2]
        assert "process 1 at 127.0.0.1 has another secret" in ends[0].err


def test_strangers_do_not_keep_processes_out() -> None:
    address = free_address()
    host, port = address.split(":")
    secret: list[str | None] = ["of all processes"]
    leader = ClusterProcesses(["cluster.agree({})"], [2], [0], secret, address)
    strangers = [links.connect(host, int(port), 5)]
    strangers += [socket.create_connection((host, int(port))) for _ in range(STRANGERS + 72)]
    for stranger, part in zip(strangers, [b"GET / HTTP/1.1\r\n\r\n", b"gptoss\r\n\x02", b"g"] * 20, strict=False):
        with contextlib.suppress(OSError):  # Older ones are closed for newer ones.
            stranger.sendall(part)
    follower = ClusterProcesses(["cluster.agree({})"], [2], [1], secret, address)
    ends = leader.outcomes(30) + follower.outcomes(30)
    assert ends == [Outcome(0, "", "")] * 2
    for stranger in strangers:
        stranger.close()


def test_secret_files_of_commands_must_be_the_same(tmp_path: Path) -> None:
    files = [tmp_path / "first", tmp_path / "second"]
    for file in files:
        file.write_text(f"secret in the file {file.name}\n")
        file.chmod(0o600)
    own = {i: ("--cluster-secret-file", str(file)) for i, file in enumerate(files)}
    ends = Processes(2, 1, *LONG, own=own).outcomes(60)
    assert [end.code for end in ends] == [2, 2], ends
    assert ends[0].err == (
        "error: --cluster-secret-file: process 1 at 127.0.0.1 has another secret than process 0\n"
    )
    assert "has another secret than this process\n" in ends[1].err
    assert ends[1].err.count("\n") == 1


def test_unreachable_process_0() -> None:
    (end,) = ClusterProcesses(["pass"], [2], [1]).outcomes(30)
    assert end.code == 2
    assert "process 0 does not answer at 127.0.0.1:" in end.err


@pytest.mark.parametrize("victim", [0, 1])
def test_unresponsive_process_counts_as_dead(victim: int) -> None:
    processes = ClusterProcesses(["cluster.agree({}); import time; time.sleep(60)"] * 3)
    time.sleep(1.5)
    processes.running[victim].send_signal(signal.SIGSTOP)
    others = [p for i, p in enumerate(processes.running) if i != victim]
    try:
        for process in others:
            _, error = process.communicate(timeout=10)
            assert process.returncode == 1
            assert error == f"error: process {victim} is gone: no sign of life for 2 s\n"
    finally:
        processes.kill()


def test_failure_names_its_process() -> None:
    failing = "raise ClusterError('no such directory')"
    ends = ClusterProcesses(
        ["cluster.agree({}); import time; time.sleep(60)", f"cluster.agree({{}}); {failing}"]
    ).outcomes(20)
    assert [end.code for end in ends] == [2, 2]
    assert [end.err for end in ends] == ["error: process 1: no such directory\n"] * 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("h:1", None, None), "--coordinator-address: expected --num-processes and --process-id as well"),
        (("h:1", 2, None), "--coordinator-address and --num-processes: expected --process-id as well"),
        ((None, 2, 1), "expected --coordinator-address as well"),
        (("h", 2, 1), "--coordinator-address: expected HOST:PORT, found 'h'"),
        (("h:x", 2, 1), "--coordinator-address: expected HOST:PORT, found 'h:x'"),
        (("h:1", 2, 2), "--process-id: expected 0 to 1 (--num-processes 2), found 2"),
        (("h:1", 2, -1), "--process-id: expected 0 to 1"),
        (("h:1", 0, 0), "--num-processes: expected 1 or more, found 0"),
        (("h:1", 65537, 0), "--num-processes: expected 65536 or fewer, found 65537"),
        (("h:1", 1, 1), "--process-id: expected 0 to 0"),
    ],
)
def test_contradicting_flags(values: tuple[str | None, int | None, int | None], expected: str) -> None:
    with pytest.raises(ClusterError) as caught:
        membership(*values)
    assert expected in str(caught.value)


SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}


def test_slurm_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert membership() == Membership("node07:61440", 2, 1, ())
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_LOCALID", "5")
    assert membership() == Membership("node07:61440", 16, 1, (5,))
    assert membership(num_processes=1) is None
    assert membership("h:1", 2, 0) == Membership("h:1", 2, 0)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert membership() is None


def test_detected_processes_need_a_secret() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", *LONG], cwd=ROOT, env=os.environ | SLURM, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: --cluster-secret-file: expected a secret that all processes share, ")
    assert ended.stderr.count("\n") == 1
    assert "other hosts can connect to node07" in ended.stderr


def test_single_pod_is_not_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert membership() is None


def test_different_flags_are_named() -> None:
    ends = Processes(2, 1, *LONG, own={1: ("--temperature", "0.5", "--mesh", "expert=2")}).outcomes()
    assert [end.code for end in ends] == [2, 2], ends
    for end in ends:
        assert "--temperature: process 0 has 0.0, process 1 has 0.5" in end.err
        assert "--mesh: process 0 has none, process 1 has expert=2" in end.err
        assert end.err.count("\n") == 1


def test_different_versions_are_named(tmp_path: Path) -> None:
    info = tmp_path / "flax-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flax\nVersion: 0.0.1\n")
    ends = Processes(2, 1, *LONG, env={1: {"PYTHONPATH": str(tmp_path)}}).outcomes()
    assert [end.code for end in ends] == [2, 2], ends
    assert all("process 1 has 0.0.1" in end.err and "flax: " in end.err for end in ends)


def test_different_checkpoints_are_named(tmp_path: Path) -> None:
    for file in P1.iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[-1] ^= 1
        (tmp_path / file.name).write_bytes(content)
    ends = Processes(2, 1, *LONG, own={1: ("--model", str(tmp_path))}).outcomes()
    assert [end.code for end in ends] == [2, 2], ends
    assert all("checkpoint model-00001-of-00001.safetensors: process 0 has 565008 bytes" in e.err for e in ends)


@pytest.mark.slow
def test_checkpoint_that_one_process_lacks_is_named(tmp_path: Path) -> None:
    ends = Processes(2, 1, *LONG, own={1: ("--model", str(tmp_path / "missing"))}).outcomes()
    assert [end.code for end in ends] == [2, 2], ends
    assert all("missing: no such directory" in end.err for end in ends)


def test_error_of_process_0_ends_all() -> None:
    ends = Processes(2, 1, *GENERATE, "--raw").outcomes(stdin=" ")
    assert [end.code for end in ends] == [2, 2], ends
    assert ends[0].err == "error: standard input: the prompt is empty\n"
    assert ends[1].err == "error: process 0: standard input: the prompt is empty\n"
