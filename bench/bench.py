#!/usr/bin/env python3
"""Measures agentkernel, and Docker beside it on the same machine in the same run.

    make bench            (as root, because Docker's daemon needs it)
    bench/bench.py --without-docker

Prints a table and writes every single figure to bench-results/<time>.json. What is compared takes turns (A B A B), so
that a busy moment of the host meets both. Docker's daemon is one of our own: its data, sockets and containers lie in a
temporary directory, it makes no bridge and no firewall rule, and it is gone afterwards, also after Ctrl-C.
"""

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUSYBOX = "/bin/busybox"
PYTHON = "/usr/bin/python3"
LIMIT = 600
MIB = 1 << 20
STREAM_BLOCKS = 1024
PR_SET_CHILD_SUBREAPER = 36


def fail(text):
    sys.exit(f"error: {text}")


def run(command, **options):
    """Runs a command that must succeed; returns what it printed."""
    done = subprocess.run(command, capture_output=True, timeout=LIMIT, stdin=subprocess.DEVNULL, **options)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-2000:]
        fail(f"{' '.join(map(str, command))} ended with {done.returncode}: {said}")
    return done.stdout


def timed(command, **options):
    """Wall time of a command, ms."""
    begun = time.perf_counter()
    run(command, **options)
    return (time.perf_counter() - begun) * 1e3


def target_directory():
    metadata = run(["cargo", "metadata", "--format-version", "1", "--no-deps", "--locked"], cwd=ROOT)
    return Path(json.loads(metadata)["target_directory"])


# ---- Docker ---------------------------------------------------------------------------------------------------------


class Docker:
    """A daemon of our own with one image: a static busybox."""

    IMAGE = "agentkernel-bench"

    def __init__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="agentkernel-bench-docker.", dir="/var/tmp"))
        self.socket = self.directory / "docker.sock"
        self.process = None
        self.log = None
        self.cgroup = f"agentkernel-bench-{os.getpid()}"
        # What dockerd makes outside the directories it is given.
        self.foreign = [path for path in map(Path, ("/run/docker", "/run/containerd")) if not path.exists()]
        # Processes that its death orphans become ours, to be ended and reaped.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

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
            fail("docker.io is not installed: scripts/install-packages bench")
        self.log = open(self.directory / "log", "wb")
        # Not the machine's configuration, which may set the same options.
        (self.directory / "daemon.json").write_text("{}")
        own = self.directory
        self.process = subprocess.Popen(
            [
                program,
                *("--data-root", own / "data", "--exec-root", own / "exec", "--pidfile", own / "pid"),
                *("--host", f"unix://{self.socket}", "--config-file", own / "daemon.json"),
                *("--bridge=none", "--iptables=false", "--ip6tables=false", "--storage-driver=overlay2"),
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
        root = self.directory / "root"
        (root / "bin").mkdir(parents=True)
        shutil.copy(BUSYBOX, root / "bin/busybox")
        for name in ("true", "sleep", "sh"):
            (root / "bin" / name).symlink_to("busybox")
        archive = self.directory / "root.tar"
        run(["tar", "--create", "--file", archive, "--directory", root, "."])
        run(self.command("import", str(archive), self.IMAGE))

    def version(self):
        return run(self.command("version", "--format", "{{.Server.Version}}")).decode().strip()

    def run_command(self, *words):
        return self.command("run", "--rm", "--network", "none", self.IMAGE, *words)

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


# ---- agentkernel ----------------------------------------------------------------------------------------------------


class Agentkernel:
    def __init__(self, program, project):
        self.program, self.project = program, project

    def run_command(self, *words):
        return [self.program, "run", "--quiet", "--", *words]

    def benchmark(self, count, *words):
        """Figures of `count` executions in one machine."""
        flags = ["--json", "--count", str(count), "--workspace", "none"]
        return json.loads(run([self.program, "benchmark", *flags, "--", *words], cwd=self.project))


def status_of(process, name):
    """A value of /proc/PID/status in bytes, 0 if the process is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0


def supervisor_of(client):
    for task in Path(f"/proc/{client}/task").iterdir():
        for child in (task / "children").read_text().split():
            return int(child)
    return None


# Runs in the guest: waits for a line, then writes blocks that all differ.
WRITER = """
import os, sys
print("ready", file=sys.stderr, flush=True)
sys.stdin.readline()
fill = bytes(range(256)) * 4096
for block in range(%d):
    data = memoryview(block.to_bytes(8, "big") + fill[8:])
    while data:
        data = data[os.write(1, data):]
"""


def expected_digest():
    digest, fill = hashlib.sha256(), bytes(range(256)) * 4096
    for block in range(STREAM_BLOCKS):
        digest.update(block.to_bytes(8, "big"))
        digest.update(memoryview(fill)[8:])
    return digest.hexdigest()


def stream(agentkernel):
    """1 GiB through `run`: whether it arrived whole, how fast, and what the host's processes grew by."""
    command = [agentkernel.program, "run", "--quiet", "--workspace", "none", "--", PYTHON, "-c", WRITER % STREAM_BLOCKS]
    pipe = subprocess.PIPE
    client = subprocess.Popen(command, cwd=agentkernel.project, stdin=pipe, stdout=pipe, stderr=pipe)
    timer = threading.Timer(LIMIT, client.kill)
    timer.start()
    try:
        if (said := client.stderr.readline()) != b"ready\n":
            fail(f"the stream's program did not start: {said + client.stderr.read()}")
        time.sleep(0.5)
        processes = {"client": client.pid, "supervisor": supervisor_of(client.pid)}
        idle = {name: status_of(process, "VmRSS") for name, process in processes.items()}
        peak = dict(idle)
        stopped = threading.Event()

        def watch():
            while not stopped.wait(0.01):
                for name, process in processes.items():
                    peak[name] = max(peak[name], status_of(process, "VmRSS"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        begun = time.perf_counter()
        client.stdin.write(b"go\n")
        client.stdin.close()
        digest, length = hashlib.sha256(), 0
        while data := client.stdout.read1(MIB):
            digest.update(data)
            length += len(data)
        seconds = time.perf_counter() - begun
        stopped.set()
        watcher.join()
        code = client.wait()
    finally:
        timer.cancel()
        if client.poll() is None:
            client.terminate()
            client.wait()
    return {
        "bytes": length,
        "exit_code": code,
        "whole": code == 0 and digest.hexdigest() == expected_digest(),
        "seconds": seconds,
        "idle_rss_bytes": idle,
        "peak_rss_bytes": peak,
        "grown_bytes": sum(peak.values()) - sum(idle.values()),
    }


# ---- the run --------------------------------------------------------------------------------------------------------


def measure(agentkernel, docker, rounds):
    """Every figure, raw. Times in ms."""
    raw = {name: [] for name in ("run_true", "run_python", "exec_true", "start", "python_first", "python_second")}
    raw |= {name: [] for name in ("docker_run_true", "docker_exec_true", "client_start", "docker_client_start")}
    raw |= {"machine_rss_bytes": [], "supervisor_rss_bytes": []}
    inside = {"cwd": agentkernel.project}
    say("warming up: kernel, disk template, page cache")
    run([agentkernel.program, "setup"])
    run(agentkernel.run_command("true"), **inside)
    if docker:
        run(docker.run_command("true"))

    for number in range(rounds):
        say(f"run -- true, {number + 1} of {rounds}")
        raw["run_true"].append(timed(agentkernel.run_command("true"), **inside))
        if docker:
            raw["docker_run_true"].append(timed(docker.run_command("true")))
    for number in range(max(3, rounds // 2)):
        say(f"run -- python3 -c pass, {number + 1}")
        raw["run_python"].append(timed(agentkernel.run_command(PYTHON, "-c", "pass"), **inside))

    container = None
    if docker:
        container = run(docker.command("run", "-d", "--network", "none", docker.IMAGE, "sleep", "86400")).decode().strip()
        run(docker.command("exec", container, "true"))
    for number in range(4):
        say(f"exec, {number + 1} of 4")
        figures = agentkernel.benchmark(50, BUSYBOX, "true")
        # The first one loads the program into the guest.
        raw["exec_true"] += figures["runs_ms"][1:]
        raw["start"].append(figures["start_ms"])
        raw["machine_rss_bytes"].append(figures["machine_rss_bytes"])
        raw["supervisor_rss_bytes"].append(figures["supervisor_rss_bytes"])
        raw["client_start"] += [timed([agentkernel.program, "--version"]) for _ in range(5)]
        if docker:
            raw["docker_exec_true"] += [timed(docker.command("exec", container, "true")) for _ in range(12)]
            raw["docker_client_start"] += [timed([docker.client, "--version"]) for _ in range(5)]
    for number in range(3):
        say(f"python3 in a live machine, {number + 1} of 3")
        runs = agentkernel.benchmark(10, PYTHON, "-c", "pass")["runs_ms"]
        raw["python_first"].append(runs[0])
        raw["python_second"].append(runs[1])
    say("1 GiB of output")
    raw["stream"] = stream(agentkernel)
    return raw, figures


def say(text):
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text} ...", end="", file=sys.stderr, flush=True)


def guest_binary(target):
    built = list((target / "release/build").glob("agentkernel-machine-*/out/agentkernel-guest"))
    if not built:
        fail("the guest's binary is not where the build leaves it")
    return max(built, key=lambda path: path.stat().st_mtime).stat().st_size


def demo_again():
    """The demo a second time, s; skipped nowhere: a failing demo fails the bench."""
    run([ROOT / "scripts/demo"])
    return timed([ROOT / "scripts/demo"]) / 1e3


def spread(values, unit="ms"):
    if not values:
        return "-"
    digits = 0 if statistics.median(values) >= 100 else 1
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} {unit} ({low}-{high}, n={len(values)})"


def mib(value):
    return f"{value / MIB:.1f} MiB" if value else "-"


def table(result):
    raw = result["raw"]
    docker = result["docker"]
    ratio = lambda ours, theirs: f"{statistics.median(ours) / statistics.median(theirs):.2f}" if theirs else "-"
    rows = [
        ("cold: run -- true", raw["run_true"], "docker run --rm", raw["docker_run_true"]),
        ("cold: run -- python3 -c pass", raw["run_python"], "", []),
        ("machine start, until ready", raw["start"], "", []),
        ("exec of a static true, live", raw["exec_true"], "docker exec", raw["docker_exec_true"]),
        ("python3 -c pass, live, first", raw["python_first"], "", []),
        ("python3 -c pass, live, second", raw["python_second"], "", []),
        ("the client alone, --version", raw["client_start"], "docker --version", raw["docker_client_start"]),
    ]
    before, after = result["host_load"]
    yield f"host {result['host_kernel']}, {result['host_processors']} processors, load {before:.1f} before and {after:.1f} " \
        f"after; {result['date']}"
    yield f"agentkernel: {result['accelerator']}, guest kernel {result['guest_kernel']}, {result['vcpus']} vCPUs, " \
        f"{result['memory_mib']} MiB"
    if docker:
        yield f"docker: {docker}, runc, overlay2, no network; image: one static busybox"
    yield "Times are median (least-most). An exec is timed inside one client; docker exec starts one each time."
    yield ""
    yield f"{'':32}{'agentkernel':34}{'Docker':34}ratio"
    for name, ours, _, theirs in rows:
        yield f"{name:32}{spread(ours):34}{spread(theirs) if theirs else '-':34}{ratio(ours, theirs)}"
    yield f"{'memory: machine':32}{mib(statistics.median(raw['machine_rss_bytes']))}"
    yield f"{'memory: supervisor':32}{mib(statistics.median(raw['supervisor_rss_bytes']))}"
    yield f"{'guest binary':32}{mib(result['guest_binary_bytes'])}"
    streamed = raw["stream"]
    speed = streamed["bytes"] / MIB / streamed["seconds"]
    whole = "whole" if streamed["whole"] else "DAMAGED"
    yield f"{'1 GiB of output':32}{whole}, {speed:.0f} MiB/s, host processes grew by {mib(streamed['grown_bytes']) or '0'}"
    yield f"{'make demo, again':32}{result['demo_again_s']:.1f} s"
    yield ""
    yield f"{'reach':58}{'measured':>12}"
    for goal in result["reach"]:
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[goal["met"]]
        value = "-" if goal["value"] is None else f"{goal['value']:.2f}"
        yield f"{goal['goal']:58}{value:>12}  {verdict}"


def reach(raw, guest_bytes, demo_s, where):
    middle = lambda name: statistics.median(raw[name]) if raw[name] else None
    divide = lambda ours, theirs: middle(ours) / middle(theirs) if raw[theirs] else None
    streamed = raw["stream"]
    goals = [
        (f"cold run -- true / docker run, {where}", "<=", 10, divide("run_true", "docker_run_true")),
        (f"exec / docker exec, {where}", "<=", 0.2, divide("exec_true", "docker_exec_true")),
        ("guest binary, MiB", "<=", 2, guest_bytes / MIB),
        (f"python3 -c pass, second time, s, {where}", "<=", 0.5, middle("python_second") / 1e3),
        ("1 GiB of output: MiB the host's processes grew by", "<=", 64, streamed["grown_bytes"] / MIB),
        ("1 GiB of output: arrived whole (1 = yes)", ">=", 1, float(streamed["whole"])),
        ("make demo, again, s", "<=", 10, demo_s),
    ]
    for name, relation, bound, value in goals:
        met = None if value is None else value <= bound if relation == "<=" else value >= bound
        yield {"goal": f"{name} {relation} {bound}", "bound": bound, "value": value, "met": met}


def main():
    parser = argparse.ArgumentParser(description="Measures agentkernel, and Docker beside it.")
    parser.add_argument("--without-docker", action="store_true", help="leave the comparison out; needs no root")
    parser.add_argument("--rounds", type=int, default=10, help="cold starts of each kind (default 10)")
    options = parser.parse_args()
    if not options.without_docker and os.geteuid() != 0:
        fail("Docker's daemon needs root: call this as root, or with --without-docker")
    for needed in (BUSYBOX, PYTHON):
        if not Path(needed).exists():
            fail(f"{needed} is missing: scripts/install-packages demo bench")
    target = target_directory()
    program = target / "release/agentkernel"
    if not program.exists():
        fail("build first: cargo build --release --locked -p agentkernel")
    # SIGTERM ends this as Ctrl-C does: with everything cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    with contextlib.ExitStack() as stack:
        project = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench.", dir=target))
        agentkernel = Agentkernel(program, project)
        docker = None if options.without_docker else stack.enter_context(Docker())
        load = os.getloadavg()[0]
        raw, figures = measure(agentkernel, docker, max(2, options.rounds))
        docker_version = docker.version() if docker else None
        load = [load, os.getloadavg()[0]]
    say("make demo, again")
    demo_s = demo_again()
    size = guest_binary(target)
    where = f"{figures['accelerator']}"
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ"),
        "host_kernel": platform.release(),
        "host_processors": os.cpu_count(),
        "host_load": load,
        "accelerator": figures["accelerator"],
        "guest_kernel": figures["kernel"],
        "vcpus": figures["vcpus"],
        "memory_mib": figures["memory_mib"],
        "docker": docker_version,
        "guest_binary_bytes": size,
        "demo_again_s": demo_s,
        "raw": raw,
        "reach": list(reach(raw, size, demo_s, where)),
    }
    if sys.stderr.isatty():
        print("\r\x1b[2K", end="", file=sys.stderr)
    print("\n".join(table(result)))
    results = ROOT / "bench-results"
    results.mkdir(exist_ok=True)
    path = results / f"{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nraw figures: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
