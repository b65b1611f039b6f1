"""Which process has something, and whether it still runs, as far as another one can say."""

import getpass
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Who this process is, in JSON values by which others find out whether it runs."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        user = str(os.getuid())
    pid = os.getpid()
    return {
        "user": user,
        "host": socket.gethostname(),
        "pid": pid,
        "boot": boot(),
        "room": room(),
        "started": _started(pid),
    }


def lives(owner: Mapping[str, Any]) -> bool | None:
    """Whether an owner runs; None if that cannot be said from here."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or (owner.get("boot"), owner.get("room")) != (boot(), room()):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = _started(pid)
    return started is None or started == owner.get("started")


def boot() -> str:
    """What no other machine has, nor this one after it was started again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return f"{uuid.getnode():x}"


def room() -> str:
    """Within which a process's id means the same: a container has its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; "" if it is over, None if nobody says."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if state in "ZX" else fields[18]
