"""A Docker daemon of one's own, and what goes with it: for the bench and for the tests that hold builds against Docker."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUSYBOX = "/bin/busybox"
LIMIT = 600
PR_SET_CHILD_SUBREAPER = 36


def fail(text):
    sys.exit(f"error: {text}")


def run(command, codes=(0,), **options):
    """Runs a command that must end with one of `codes`; returns what it printed."""
    done = subprocess.run(command, capture_output=True, timeout=LIMIT, stdin=subprocess.DEVNULL, **options)
    if done.returncode not in codes:
        said = done.stderr.decode(errors="replace").strip()[-2000:]
        fail(f"{' '.join(map(str, command))} ended with {done.returncode}: {said}")
    return done.stdout


def target_directory():
    metadata = run(["cargo", "metadata", "--format-version", "1", "--no-deps", "--locked"], cwd=ROOT)
    return Path(json.loads(metadata)["target_directory"])


def adopt_orphans():
    """Processes that the death of their parents orphans become ours, to be counted, ended and reaped."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def with_loopback(*command):
    """A command in a new network namespace: whoever expects a loopback finds one."""
    return ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


# What comes before a command that is to have a /run of its own; it is in a mount namespace.
OWN_RUN = ["sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh"]


def why_no_bridge():
    """What keeps Docker's default network from being made in a namespace here; None if nothing does."""
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    tried = "ip link add bench0 type bridge && iptables --table nat --append POSTROUTING --jump MASQUERADE"
    command = ["unshare", "--net", *with_loopback("sh", "-c", tried)]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=LIMIT, env=path)
    except FileNotFoundError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.decode(errors="replace").strip()


def make_root(directory):
    """An archive of a root file system with one static busybox in it."""
    root = directory / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for name in ("true", "sleep", "sh"):
        (root / "bin" / name).symlink_to("busybox")
    archive = directory / "root.tar"
    run(["tar", "--create", "--file", archive, "--directory", root, "."])
    return archive


class Docker:
    """A daemon of our own with one image: a static busybox. Its data, sockets and containers lie in a temporary directory;
    it is gone when this is left. It makes no bridge and no firewall rule; or, with `bridge`, those of Docker's default
    network, in a network namespace that only it and its containers are in, and with a /run of its own. Such a namespace
    has no name: it goes with the last process in it."""

    IMAGE = "agentkernel-bench"

    def __init__(self, bridge=False):
        self.bridge = bridge
        self.directory = Path(tempfile.mkdtemp(prefix="agentkernel-docker.", dir="/var/tmp"))
        self.socket = self.directory / "docker.sock"
        self.process = None
        self.log = None
        self.cgroup = f"agentkernel-{os.getpid()}"
        # What dockerd makes outside the directories it is given.
        outside = () if bridge else (Path("/run/docker"), Path("/run/containerd"))
        self.foreign = [path for path in outside if not path.exists()]

    def __enter__(self):
        try:
            self.start()
            self.load_image()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self):
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        program, self.client = (shutil.which(name, path=path) for name in ("dockerd", "docker"))
        if not program or not self.client:
            fail("docker.io is not installed: scripts/install-packages test bench")
        self.log = open(self.directory / "log", "wb")
        # Not the machine's configuration, which may set the same options.
        (self.directory / "daemon.json").write_text("{}")
        own = self.directory
        network = [] if self.bridge else ["--bridge=none", "--iptables=false"]
        self.process = subprocess.Popen(
            [
                *(["unshare", "--net", "--mount", *with_loopback(*OWN_RUN)] if self.bridge else []),
                program,
                *("--data-root", own / "data", "--exec-root", own / "exec", "--pidfile", own / "pid"),
                *("--host", f"unix://{self.socket}", "--config-file", own / "daemon.json"),
                *network,
                *("--ip6tables=false", "--storage-driver=overlay2"),
                *("--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{self.cgroup}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env={"PATH": path, "HOME": str(own)},
            # Ctrl-C is for us; we end the daemon in order.
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while subprocess.run(self.command("version"), capture_output=True, stdin=subprocess.DEVNULL).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                fail(f"dockerd did not start: {(own / 'log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)

    def command(self, *words):
        return ["env", f"HOME={self.directory}", self.client, "--host", f"unix://{self.socket}", *words]

    def load_image(self):
        run(self.command("import", str(make_root(self.directory)), self.IMAGE))

    def version(self):
        return run(self.command("version", "--format", "{{.Server.Version}}")).decode().strip()

    def run_command(self, *words, network=False, image=IMAGE):
        return self.command("run", "--rm", *([] if network else ["--network", "none"]), image, *words)

    def __exit__(self, *_):
        """Containers, daemon, what it left running, mounts, files: all of it, in this order."""
        if self.process and self.process.poll() is None:
            listed = subprocess.run(self.command("ps", "-aq"), capture_output=True, stdin=subprocess.DEVNULL)
            if containers := listed.stdout.decode().split():
                subprocess.run(self.command("rm", "-f", *containers), capture_output=True, stdin=subprocess.DEVNULL)
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.log:
            self.log.close()
        self.reap()
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in sorted((mount for mount in mounts if mount.startswith(f"{self.directory}/")), reverse=True):
            subprocess.run(["umount", "--lazy", mount], capture_output=True)
        for path in [*Path("/sys/fs/cgroup").glob(f"*/{self.cgroup}"), Path("/sys/fs/cgroup", self.cgroup), *self.foreign]:
            self.remove_empty(path)
        shutil.rmtree(self.directory, ignore_errors=True)

    @staticmethod
    def remove_empty(directory):
        """Removes a tree of empty directories (control groups are such); one that is in use stays."""
        for inner, _, _ in os.walk(directory, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(inner)

    @staticmethod
    def reap():
        """Waits for what the daemon left to us; ends it if it does not end by itself."""
        deadline = time.monotonic() + 5
        while True:
            try:
                reaped, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if reaped == 0:
                time.sleep(0.05)
                if time.monotonic() > deadline:
                    for child in Path("/proc/thread-self/children").read_text().split():
                        os.kill(int(child), signal.SIGKILL)
