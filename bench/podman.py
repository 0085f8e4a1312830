"""Podman as root, with an image and directories of its own: for the bench.

It has no daemon, but it keeps things in places of the system: /run, /var/lib, /etc/cni, a bridge, firewall rules. Here it
runs in a network, mount and process namespace in which these are others. A process that does nothing holds them; they are
gone when it is, and so is all that runs there.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from docker import Docker, fail, make_root, run, with_loopback

# Runs in the namespaces and then holds them: `unshare` sees to it that nothing spreads from there. INIT is their init, and
# leaves the reaping of orphans (conmon is one) to the kernel.
HOLD = """
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /dev/shm
mkdir /run/upper /run/work
mount -t overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work overlay /etc
exec "$0" -c "$1"
"""
INIT = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("held", flush=True)
sys.stdin.read()
"""
UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
# Only what podman tells the processes it starts as well: they do not see this, and must find the same container.
CONFIGURATION = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "{runtime}"
tmp_dir = "{own}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{own}/networks"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{own}/graph"
runroot = "{own}/run"
"""


class Podman:
    """Podman with one image, a static busybox. `network_problem` says why its default network does not work here, if so."""

    IMAGE = "agentkernel-bench"
    # Docker's as well; crun refuses hosts that have both versions of control groups.
    RUNTIME = "runc"

    def __init__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="agentkernel-podman.", dir="/var/tmp"))
        self.cgroup = f"agentkernel-podman-{os.getpid()}"
        parents = [*Path("/sys/fs/cgroup").glob("*/"), Path("/sys/fs/cgroup")]
        # What conmon makes besides.
        self.foreign = [path for path in (parent / "libpod_parent" for parent in parents) if not path.exists()]
        self.foreign += [parent / self.cgroup for parent in parents]
        self.process = self.init = None
        self.network_problem = None

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self):
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        self.program = shutil.which("podman", path=path)
        if not self.program or not shutil.which(self.RUNTIME, path=path):
            fail("podman or runc is not installed: scripts/install-packages bench")
        own = self.directory
        # What podman asks for by itself is more than root may have on some hosts.
        limit = lambda which: min(1024, resource.getrlimit(which)[1] % (1 << 63))
        settings = {"own": own, "runtime": self.RUNTIME}
        settings |= {"files": limit(resource.RLIMIT_NOFILE), "processes": limit(resource.RLIMIT_NPROC)}
        (own / "containers.conf").write_text(CONFIGURATION.format(**settings))
        (own / "storage.conf").write_text(STORAGE.format(**settings))
        self.variables = [
            f"HOME={own}",
            f"PATH={path}",
            f"CONTAINERS_CONF={own}/containers.conf",
            f"CONTAINERS_STORAGE_CONF={own}/storage.conf",
        ]
        self.process = subprocess.Popen(
            [*UNSHARE, *with_loopback("sh", "-c", HOLD, sys.executable, INIT)],
            # It ends when we do, however that is.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        if self.process.stdout.readline() != b"held\n":
            fail(f"namespaces for podman cannot be made: {self.process.stderr.read().decode(errors='replace')}")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.init = int(children.read_text())
        run(self.command("import", "--quiet", make_root(own), self.IMAGE))
        run(self.run_command("true"))
        tried = subprocess.run(self.run_command("true", network=True), capture_output=True, stdin=subprocess.DEVNULL)
        if tried.returncode != 0:
            self.network_problem = tried.stderr.decode(errors="replace").strip()[-500:]

    def command(self, *words):
        # These add 3 ms or so.
        inside = ["nsenter", "--net", "--mount", "--pid", "--target", str(self.init)]
        return [*inside, "env", "--ignore-environment", *self.variables, self.program, *map(str, words)]

    def version(self):
        return run(self.command("version", "--format", "{{.Client.Version}}")).decode().strip()

    def run_command(self, *words, network=False):
        flags = ["--rm", "--cgroup-parent", f"/{self.cgroup}", *([] if network else ["--network", "none"])]
        return self.command("run", *flags, self.IMAGE, *words)

    def __exit__(self, *_):
        if self.process:
            if self.init and self.process.poll() is None:
                subprocess.run(self.command("rm", "--all", "--force"), capture_output=True, stdin=subprocess.DEVNULL)
            self.process.stdin.close()
            self.process.terminate()
            self.process.wait()
            self.process.stdout.close()
            self.process.stderr.close()
        Docker.reap()
        for path in self.foreign:
            Docker.remove_empty(path)
        shutil.rmtree(self.directory, ignore_errors=True)
