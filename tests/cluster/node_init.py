"""First process of the node: joins its control group, enters its namespaces, mounts, and runs containerd and kubelet.

Run as a program of its own (`node_init.py outside FILE`), hence only the standard library here.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
# Written by containerd, CNI and kubelet at fixed places: inside the node these are its own, empty directories.
PRIVATE_DIRECTORIES = ["/run/containerd", "/run/mount", "/run/netns", "/var/lib/cni", "/var/lib/kubelet", "/var/log"]
# The kubelet sets these for the whole machine: inside the node they are plain files.
_TUNABLES = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def _is_v2() -> bool:
    return (_CGROUPS / "cgroup.controllers").exists()


def _v1_hierarchies() -> list[str]:
    """The controllers of each mounted cgroup v1 hierarchy, e.g. `cpu,cpuacct` or `name=systemd`."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    names = [line.split(":", 2)[1] for line in lines]
    return [name for name in names if name and (_CGROUPS / name.removeprefix("name=")).is_dir()]


def cgroup_roots(name: str) -> list[Path]:
    """The directories of control group `name`: one under cgroup v2, one per hierarchy under v1."""
    if _is_v2():
        return [_CGROUPS / name]
    return [_CGROUPS / hierarchy.removeprefix("name=") / name for hierarchy in _v1_hierarchies()]


def outside(configuration: str) -> None:
    """Join the node's control group and go on, as the same process, in new namespaces."""
    for root in cgroup_roots(json.loads(Path(configuration).read_text())["cgroup"]):
        root.mkdir(exist_ok=True)
        for inherited in ("cpuset.cpus", "cpuset.mems"):  # v1: empty in a new group, and then nobody may enter
            if not _is_v2() and (root / inherited).exists():
                (root / inherited).write_text((root.parent / inherited).read_text())
        (root / "cgroup.procs").write_text(str(os.getpid()))
    flags = ["--mount", "--cgroup", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
    os.execvp("unshare", ["unshare", *flags, sys.executable, __file__, "inside", configuration])


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _mount_cgroups() -> None:
    """Show the node its own control group as the root."""
    subprocess.run(["umount", "--recursive", str(_CGROUPS)], check=True)
    if Path("/proc/self/cgroup").read_text().startswith("0::"):
        _mount("-t", "cgroup2", "cgroup2", str(_CGROUPS))
        (_CGROUPS / "init").mkdir()  # under v2 a group that hands out controllers holds no process itself
        (_CGROUPS / "init" / "cgroup.procs").write_text(str(os.getpid()))
        available = (_CGROUPS / "cgroup.controllers").read_text().split()
        (_CGROUPS / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in available))
        return
    hierarchies = [line.split(":", 2)[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    _mount("-t", "tmpfs", "-o", "mode=755", "cgroup", str(_CGROUPS))
    for hierarchy in filter(None, hierarchies):
        named = hierarchy.startswith("name=")
        target = _CGROUPS / hierarchy.removeprefix("name=")
        target.mkdir()
        _mount("-t", "cgroup", "-o", f"none,{hierarchy}" if named else hierarchy, "cgroup", str(target))
        for controller in hierarchy.split(",") if "," in hierarchy else []:
            (_CGROUPS / controller).symlink_to(hierarchy)


def inside(configuration: str) -> None:
    """As process 1 of the node: mounts, then containerd and the kubelet, until either ends."""
    plan = json.loads(Path(configuration).read_text())
    home, log = Path(plan["home"]), Path(plan["log"])
    _mount_cgroups()
    _mount("--make-rshared", "/")  # of this namespace only: it was made private
    for directory in PRIVATE_DIRECTORIES:
        own = home / "private" / directory.lstrip("/")
        own.mkdir(parents=True, exist_ok=True)
        _mount("--bind", str(own), directory)
    for tunable, value in _TUNABLES.items():
        if Path("/proc/sys", tunable).exists():
            own = home / "sys" / tunable
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(value + "\n")
            _mount("--bind", str(own), f"/proc/sys/{tunable}")
    children = {_start(plan["containerd"], log / "containerd.log"): "containerd"}
    while not Path(plan["socket"]).exists():
        time.sleep(0.05)
    children[_start(plan["kubelet"], log / "kubelet.log")] = "kubelet"
    while True:  # process 1 also reaps what its grandchildren leave
        pid, status = os.wait()
        if pid in children:
            sys.exit(f"{children[pid]} ended with {os.waitstatus_to_exitcode(status)}: the node is down")


def _start(command: list[str], log: Path) -> int:
    with log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output).pid


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    {"outside": outside, "inside": inside}[sys.argv[1]](sys.argv[2])
