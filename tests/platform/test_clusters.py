"""The cluster launcher's files: what Ray's own check takes, and what it does not look at."""

import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from cafemed import paths

PROJECT = paths.PROJECT_DIR
AWS = PROJECT / "ray_cluster.yaml"
OWN = PROJECT / "platform/clusters/own_machines.yaml"
DOCKERFILE = PROJECT / "platform/docker/Dockerfile"
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def checked(content: dict[str, Any]) -> dict[str, Any]:
    """What Ray makes of a cluster file, after its own check."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(content))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("path", [AWS, OWN], ids=["aws", "own"])
def test_ray_takes_the_file_and_would_not_take_any(path: Path):
    content = read(path)
    checked(content)
    with pytest.raises(Exception, match="max_worker"):
        checked({**content, "max_worker": 3})


def test_aws_has_a_head_without_trials_and_workers_with_and_without_gpus():
    content = checked(read(AWS))
    kinds = content["available_node_types"]
    assert kinds[content["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {name: kind for name, kind in kinds.items() if name != content["head_node_type"]}
    gpus = {name: kind["resources"].get("GPU", 0) for name, kind in workers.items()}
    assert sorted(gpus.values())[0] == 0
    assert max(gpus.values()) > 1
    for kind in workers.values():
        assert kind["min_workers"] == 0
        assert kind["max_workers"] > 0
        assert kind["resources"]["CPU"] > 0
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(kind["max_workers"] for kind in workers.values()) == content["max_workers"]
    images = {kind["node_config"]["ImageId"] for kind in kinds.values()}
    assert len(images) == 1
    assert content["provider"]["region"] in " ".join(content["initialization_commands"])


def test_own_machines_are_all_kept():
    content = checked(read(OWN))
    [kind] = content["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(content["provider"]["worker_ips"])


def test_both_files_start_the_same_container_and_the_same_ray():
    aws, own = read(AWS), read(OWN)
    for key in ("cluster_name", "docker", "file_mounts", "setup_commands", *STARTS):
        assert aws[key] == own[key], key


@pytest.mark.parametrize("path", [AWS, OWN], ids=["aws", "own"])
def test_every_node_gets_the_token_and_asks_for_it(path: Path):
    content = read(path)
    assert content["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for key in STARTS:
        [start] = [command for command in content[key] if "exec ray start" in command]
        assert "export RAY_AUTH_MODE=token &&" in start
    assert not re.search(r"\bray stop\b", yaml.safe_dump(content))


@pytest.mark.parametrize("path", [AWS, OWN], ids=["aws", "own"])
def test_the_workers_look_where_the_head_listens(path: Path):
    head, worker = (" ".join(read(path)[key]) for key in STARTS)
    [port] = re.findall(r"--port=(\d+)", head)
    assert f"--address=$RAY_HEAD_IP:{port}" in worker
    # The head's process must not be reached from elsewhere: jobs come through an ssh tunnel.
    assert "--dashboard-host=127.0.0.1" in head


@pytest.mark.parametrize("path", [AWS, OWN], ids=["aws", "own"])
def test_the_storage_is_mounted_where_the_image_looks(path: Path):
    content, image = read(path), DOCKERFILE.read_text()
    [volume] = [o for o in content["docker"]["run_options"] if o.startswith("--volume")]
    outside, inside = volume.removeprefix("--volume ").split(":")
    assert f"CAFEMED_HOME={inside} " in image
    assert any(f"mountpoint -q {outside}" in c for c in content["initialization_commands"])
    [folder] = re.findall(r"^WORKDIR (\S+)$", image, re.MULTILINE)
    [home] = re.findall(r"\bHOME=(\S+)", image)
    for key in STARTS:
        assert any(f"cd {folder.replace(home, '~')} &&" in command for command in content[key])


# Two "machines" in a network of their own, each with its own home, and a third with another
# token. All processes are in a process namespace that ends with this script.
SCRIPT = """
import os, pathlib, subprocess, sys, time
import yaml
from ray.autoscaler._private.util import prepare_config

file, folder, project = sys.argv[1:]
content = yaml.safe_load(open(file))
IP = "192.0.2.10"
for words in ("link set lo up", f"addr add {IP}/24 dev lo", f"route add default dev lo src {IP}"):
    subprocess.check_call(["ip", *words.split()])

def machine(name, token):
    home = pathlib.Path(folder, name)
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text(token)
    (home / "cafemed").symlink_to(project)
    alone = {"type": "local", "head_ip": IP, "worker_ips": []}
    config = prepare_config({"cluster_name": "c", "provider": alone, "auth": {}})
    (home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))
    return home

def run(home, commands):
    for command in commands:
        env = {**os.environ, "HOME": str(home), "RAY_HEAD_IP": IP}
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
        if done.returncode:
            return done.stdout + done.stderr
    return "started"

def pid(home):
    return int((home / "ray.pid").read_text())

def count():
    ask = f"import ray; ray.init('{IP}:6379', logging_level=50);"
    ask += "print(sum(n['Alive'] for n in ray.nodes()))"
    env = {**os.environ, "HOME": str(head), "RAY_AUTH_MODE": "token"}
    return int(subprocess.check_output([sys.executable, "-c", ask], env=env, text=True))

head, worker, stranger = machine("head", "a" * 64), machine("worker", "a" * 64), \
    machine("stranger", "b" * 64)
starts = content["head_start_ray_commands"], content["worker_start_ray_commands"]
assert (said := run(head, starts[0])) == "started", said
assert (said := run(worker, starts[1])) == "started", said
for _ in range(60):
    if count() == 2:
        break
    time.sleep(0.5)
assert count() == 2
# Started again, a node's old process is ended first.
old = pid(worker)
assert (said := run(worker, starts[1])) == "started", said
left = pathlib.Path(f"/proc/{old}/cmdline")
assert pid(worker) != old and not (left.exists() and left.read_text())
# A node with another token does not join, and the launcher is told why.
short = [command.replace("timeout 120", "timeout 20") for command in starts[1]]
said = run(stranger, short)
assert "uthenticat" in said, said
print("nodes:", count(), "refused:", said.strip().splitlines()[-1])
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_start_commands_make_a_cluster_that_refuses_other_tokens():
    alone = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("ip") or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("this user may not make namespaces of his own")
    # A short path: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="cm", dir="/tmp") as folder:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [*alone, sys.executable, "-c", SCRIPT, str(AWS), folder, str(PROJECT)],
            env=kept
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "RAY_TMPDIR": folder,
                "RAY_USAGE_STATS_ENABLED": "0",
            },
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes: 2 refused: " in done.stdout
