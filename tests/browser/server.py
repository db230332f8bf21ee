"""A private JupyterLab for tests: its own folders, port and token, on 127.0.0.1 alone; gone when the block ends."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds for the server to answer
FOLDERS = {
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "IPYTHONDIR": "ipython",
}
SETTINGS = {
    # the question about news covers the first plot; switching it off on the command line alone does not suffice
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell stays in the page
}
FLAGS = (
    "--no-browser",
    "--allow-root",
    "--ServerApp.ip=127.0.0.1",
    "--ServerApp.port_retries=0",
    "--expose-app-in-browser",  # window.jupyterapp: commands and the kernel's state, from the page
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
    "--ServerApp.websocket_compression_options=None",
)


@dataclass(frozen=True)
class Server:
    """Where it answers, its token, and the folder whose notebooks it opens."""

    base: str
    token: str
    root: Path

    def url(self, notebook: str) -> str:
        """The page of one notebook and nothing else."""
        return f"{self.base}/lab/tree/{notebook}?token={self.token}&reset"

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            urllib.request.urlopen(f"{self.base}/api/status?token={self.token}", timeout=1).close()
        except (urllib.error.URLError, OSError):
            return False
        return True

    def shut_down(self) -> None:
        """Asks it to stop itself and its kernels."""
        request = urllib.request.Request(
            f"{self.base}/api/shutdown", method="POST", headers={"Authorization": f"token {self.token}"}
        )
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(request, timeout=5).close()


@contextlib.contextmanager
def jupyterlab(root: Path) -> Iterator[Server]:
    """A server for the notebooks in `root`. Whatever Jupyter writes beside them goes into a folder that is deleted."""
    with tempfile.TemporaryDirectory(prefix="jupyterlab-", ignore_cleanup_errors=True) as private:
        server = Server(f"http://127.0.0.1:{_free_port()}", secrets.token_hex(8), root)
        log = Path(private, "server.log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                _command(server), stdout=out, stderr=subprocess.STDOUT, env=_environment(Path(private)),
                start_new_session=True,
            )  # fmt: skip
        try:
            _wait_until_up(server, process, log)
            yield server
        finally:
            _stop(server, process)


def _command(server: Server) -> list[str]:
    port = server.base.rpartition(":")[2]
    return [
        sys.executable, "-m", "jupyterlab", *FLAGS, f"--ServerApp.port={port}", f"--ServerApp.root_dir={server.root}",
        f"--IdentityProvider.token={server.token}",
    ]  # fmt: skip


def _environment(private: Path) -> dict[str, str]:
    env = {**os.environ, "JUPYTER_PLATFORM_DIRS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY)}
    for name, folder in FOLDERS.items():
        env[name] = str(private / folder)
        (private / folder).mkdir()
    for plugin, values in SETTINGS.items():
        path = private / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return env


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_until_up(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    waited, step = 0.0, 0.1
    while not server.answers():
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(step)  # waiting for the process to end is the pause between two questions
            raise RuntimeError(f"JupyterLab ended with code {code}:\n{log.read_text()[-3000:]}")
        waited += step
        if waited > PATIENCE:
            raise TimeoutError(f"JupyterLab does not answer after {waited:.0f} s:\n{log.read_text()[-3000:]}")


def _stop(server: Server, process: subprocess.Popen[bytes]) -> None:
    server.shut_down()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the kernels go with it
        process.wait()
