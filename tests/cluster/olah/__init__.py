"""A real mirror of a hub for tests: olah, in a Python environment of its own, for it asks for a stack of its own."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.cluster import build, process, settings
from tests.cluster.hub import Hub

LOCK = Path(__file__).with_name("requirements.lock")


def python() -> Path:
    """The interpreter that has it, from the cache; installed (a minute) if the lock has changed."""
    settings.cache().mkdir(parents=True, exist_ok=True)
    with (settings.cache() / "olah.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generation = build.kept("olah", build.digest(sys.version, LOCK), _install)
        build.keep_only(generation)
    return generation / "bin" / "python"


def _install(target: Path) -> None:
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(target)], check=True)
    environment = ["--python", str(target / "bin" / "python"), "--require-hashes", "--requirement", str(LOCK)]
    subprocess.run([*uv, "pip", "install", "--quiet", *environment], check=True)


@contextlib.contextmanager
def mirroring(hub: Hub, root: Path) -> Iterator[str]:
    """The endpoint of a mirror of `hub`, that runs while the block does and keeps what it has read below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    options = [
        "[basic]",
        'host = "127.0.0.1"',
        f"port = {port}",
        f'repos-path = "{root}/repos"',
        f'hf-scheme = "{hub.scheme}"',
        f'hf-netloc = "{hub.host}:{hub.port}"',
        f'hf-lfs-netloc = "{hub.host}:{hub.cdn_port}"',
    ]
    (root / "olah.toml").write_text("\n".join(options))
    run = "from olah.server import cli; cli()"
    command = [str(python()), "-c", run, "--config", str(root / "olah.toml"), "--log-path", str(root / "logs")]

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    server = process.Server(f"olah-{port}", command, answers, environment={"PYTHONPATH": ""})
    running = process.launch(server, root / "log", root)
    try:
        process.wait_ready(server, running, root / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stop(running, signal.SIGKILL)
