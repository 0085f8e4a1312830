#!/usr/bin/env python3
"""Measures agentkernel, and Docker and Podman beside it on the same machine in the same run.

    make bench                              (as root, because Docker's daemon needs it)
    bench/bench.py --without-docker
    bench/bench.py --only list,exec         some of the sections: --help lists them

Prints a table and writes every single figure to bench-results/<time>.json. What is compared takes turns (A B A B), so
that a busy moment of the host meets both. Docker's daemon is one of our own: its data, sockets and containers lie in a
temporary directory, its bridge and firewall rules in a network namespace that only it is in, and it is gone afterwards,
also after Ctrl-C. The same goes for Podman. So is agentkernel's state: it lies in the build's directory, where kernel and
templates are kept for the next time.

What is called cold is booted (`--cold`). Everything else begins with a template, as it does for whoever uses agentkernel.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

import network
import server
import warm
from docker import BUSYBOX, LIMIT, ROOT, Docker, adopt_orphans, fail, run, target_directory, why_no_bridge
from measure import MIB, PYTHON, say, smaps, summary, timed
from podman import Podman

STREAM_BLOCKS = 1024
# What `list` meets.
LISTED = 1000
# How many live at once, how large, how many are started at a time.
ALIVE, ALIVE_MEMORY, ALIVE_STARTING = 20, "256M", 2
# The large workspace: directories, files in each, bytes of a file.
DIRECTORIES, FILES, FILE_BYTES = 500, 100, 1024
# The large image: layers, files in each, bytes of a file. The large build context: files, bytes of each.
LAYERS, LAYER_FILES, LAYER_FILE_BYTES = 3, 1600, 64 << 10
CONTEXT_FILES, CONTEXT_FILE_BYTES = 50, 100 << 20


class Engines(NamedTuple):
    """What is measured beside agentkernel; None where it is not."""

    docker: Docker | None
    podman: Podman | None
    # Why there is no default network of Docker's, if so.
    bridge_problem: str | None

    def processes(self):
        """Those that all of theirs descend from."""
        return [engine.process.pid for engine in (self.docker, self.podman) if engine]


# ---- agentkernel ----------------------------------------------------------------------------------------------------


class Agentkernel:
    """The program, with a state directory of its own."""

    def __init__(self, program, project, state):
        self.program, self.project, self.state = program, project, state

    def __enter__(self):
        # What an interrupted bench left there.
        self.remove_all()
        return self

    def __exit__(self, *_):
        self.remove_all()
        reap_ended()

    def remove_all(self):
        command = [self.program, "rm", "--force", "--all"]
        subprocess.run(command, capture_output=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
        self.forget_snapshots()

    def forget(self, name):
        """Removes a sandbox, if it is there."""
        subprocess.run(self.command("rm", "--force", name), capture_output=True, timeout=LIMIT, stdin=subprocess.DEVNULL)

    def forget_snapshots(self):
        listed = subprocess.run(
            self.command("snapshot", "list", "--json"), capture_output=True, timeout=LIMIT, stdin=subprocess.DEVNULL
        )
        if names := [snapshot["name"] for snapshot in json.loads(listed.stdout or "[]")]:
            subprocess.run(self.command("snapshot", "rm", *names), capture_output=True, timeout=LIMIT)

    def command(self, *words):
        return [self.program, *words]

    def call(self, *words, **options):
        return run(self.command(*words), cwd=self.project, **options)

    def run_command(self, *words, cold=False, image=None):
        flags = [*(["--cold"] if cold else []), *(["--image", image] if image else [])]
        return self.command("run", "--quiet", *flags, "--", *words)

    def exec_command(self, name, *words, user=None):
        return self.command("exec", "--quiet", *(("--user", user) if user else ()), name, "--", *words)

    def benchmark(self, count, *words, cold=False):
        """Figures of `count` executions in one machine."""
        flags = ["--json", "--count", str(count), "--workspace", "none", *(["--cold"] if cold else [])]
        return json.loads(self.call("benchmark", *flags, "--", *words))

    @contextlib.contextmanager
    def sandbox(self, name, *flags, directory=None):
        """A live sandbox, removed afterwards."""
        run(self.command("create", name, "--quiet", *flags), cwd=directory or self.project)
        try:
            yield name
        finally:
            self.forget(name)


def reap_ended():
    """Supervisors whose client is gone are children of ours, as they would be init's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass


def descendants(process):
    for task in Path(f"/proc/{process}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from descendants(child)


def holdings(agentkernel, apart):
    """What this bench and all it started hold, without the trees of the processes `apart`: Docker's daemon, Podman."""
    reap_ended()
    foreign = {process for root in apart for process in (root, *descendants(root))}
    processes = [child for child in descendants(os.getpid()) if child not in foreign]
    descriptors = 0
    for process in (os.getpid(), *processes):
        with contextlib.suppress(OSError):
            descriptors += len(os.listdir(f"/proc/{process}/fd"))
    files, size = 0, 0
    for inner, directories, names in os.walk(agentkernel.state):
        for name in (*directories, *names):
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(inner, name)).st_blocks * 512
                files += 1
    return {"processes": len(processes), "descriptors": descriptors, "state_files": files, "state_bytes": size}


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


# A section measures some figures and returns them raw. Times in ms.


def section_cold(agentkernel, engines, options):
    """a machine booted for one command"""
    docker = engines.docker
    raw = {"run_true": [], "docker_run_true": [], "docker_run_true_default": [], "run_python": [], "start_booted": []}
    with_bridge = docker and docker.bridge
    inside = {"cwd": agentkernel.project}
    say("warming up: disk template, page cache")
    run(agentkernel.run_command("true", cold=True), **inside)
    if docker:
        run(docker.run_command("true"))
    if with_bridge:
        run(docker.run_command("true", network=True))
    for number in range(options.rounds):
        say(f"run --cold -- true, {number + 1} of {options.rounds}")
        raw["run_true"].append(timed(agentkernel.run_command("true", cold=True), **inside))
        if docker:
            raw["docker_run_true"].append(timed(docker.run_command("true")))
        if with_bridge:
            raw["docker_run_true_default"].append(timed(docker.run_command("true", network=True)))
    for number in range(max(3, options.rounds // 2)):
        say(f"run --cold -- python3 -c pass, {number + 1}")
        raw["run_python"].append(timed(agentkernel.run_command(PYTHON, "-c", "pass", cold=True), **inside))
        raw["start_booted"].append(agentkernel.benchmark(1, BUSYBOX, "true", cold=True)["start_ms"])
    return raw


def section_exec(agentkernel, engines, options):
    """a static program in a live sandbox: from a process, from a client that stays, on the agent's own stream"""
    docker = engines.docker
    names = ("exec_process", "docker_exec_process", "exec_true", "agent_true", "start")
    raw = {name: [] for name in (*names, "client_start", "docker_client_start")}
    raw |= {"machine_rss_bytes": [], "supervisor_rss_bytes": []}
    container = None
    if docker:
        container = run(docker.command("run", "-d", "--network", "none", docker.IMAGE, "sleep", "86400")).decode().strip()
        run(docker.command("exec", container, "true"))
    with agentkernel.sandbox("exec", "--workspace", "none") as name:
        ours = agentkernel.exec_command(name, BUSYBOX, "true")
        run(ours)
        for number in range(50):
            say(f"exec, a process each, {number + 1} of 50")
            raw["exec_process"].append(timed(ours))
            raw["client_start"].append(timed([agentkernel.program, "--version"]))
            if docker:
                raw["docker_exec_process"].append(timed(docker.command("exec", container, "/bin/busybox", "true")))
                raw["docker_client_start"].append(timed([docker.client, "--version"]))
    for number in range(4):
        say(f"exec, {number + 1} of 4")
        figures = agentkernel.benchmark(50, BUSYBOX, "true")
        # The first one loads the program into the guest.
        raw["exec_true"] += figures["runs_ms"][1:]
        raw["agent_true"] += figures["agent_ms"]
        raw["start"].append(figures["start_ms"])
        raw["machine_rss_bytes"].append(figures["machine_rss_bytes"])
        raw["supervisor_rss_bytes"].append(figures["supervisor_rss_bytes"])
    if docker:
        run(docker.command("rm", "-f", container))
    return raw


def section_python(agentkernel, engines, options):
    """python3 in a live machine, for the first time and then; where templates are made, it has run before"""
    raw = {"python_booted_first": [], "python_first": [], "python_second": []}
    for number in range(3):
        say(f"python3 in a live machine, {number + 1} of 3")
        raw["python_booted_first"].append(agentkernel.benchmark(1, PYTHON, "-c", "pass", cold=True)["runs_ms"][0])
        runs = agentkernel.benchmark(10, PYTHON, "-c", "pass")["runs_ms"]
        raw["python_first"].append(runs[0])
        raw["python_second"].append(runs[1])
    return raw


def section_stream(agentkernel, engines, options):
    """1 GiB of output"""
    say("1 GiB of output")
    return {"stream": stream(agentkernel)}


def section_list(agentkernel, engines, options):
    """list, where there are 1000 sandboxes"""
    say(f"{LISTED} sandboxes")
    agentkernel.call("create", "list-0", "--no-start", "--workspace", "none")
    original = agentkernel.state / "sandboxes/list-0"
    spec = json.loads((original / "spec.json").read_text())
    copies = [original]
    try:
        for number in range(1, LISTED):
            # All but the disk, which `list` does not look at.
            copies.append(original.with_name(f"list-{number}"))
            shutil.copytree(original, copies[-1], ignore=shutil.ignore_patterns("disk.ext4"))
            own = spec | {"name": copies[-1].name, "uuid": str(uuid.uuid4())}
            (copies[-1] / "spec.json").write_text(json.dumps(own))
        listed = json.loads(agentkernel.call("list", "--json"))
        if len(listed) != LISTED:
            fail(f"list shows {len(listed)} of {LISTED} sandboxes")
        return {"list": [timed(agentkernel.command("list")) for _ in range(20)]}
    finally:
        for copy in copies:
            shutil.rmtree(copy, ignore_errors=True)


def section_churn(agentkernel, engines, options):
    """sandboxes made, used and removed one after the other: what stays behind"""
    raw = {"churn_create": [], "churn_exec": [], "churn_remove": [], "holdings": []}
    apart = engines.processes()

    def once():
        create = agentkernel.command("create", "churn", "--quiet", "--workspace", "none")
        raw["churn_create"].append(timed(create, cwd=agentkernel.project))
        raw["churn_exec"].append(timed(agentkernel.exec_command("churn", BUSYBOX, "true")))
        raw["churn_remove"].append(timed(agentkernel.command("rm", "--force", "churn")))

    # The first one makes the template that the others begin with.
    once()
    raw["holdings"].append(holdings(agentkernel, apart))
    for number in range(options.churn):
        say(f"created, used, removed: {number + 1} of {options.churn}")
        once()
        if (number + 1) % 10 == 0 or number + 1 == options.churn:
            raw["holdings"].append(holdings(agentkernel, apart))
    return raw


def section_live(agentkernel, engines, options):
    """20 sandboxes of one template alive at once: what they take of the memory"""
    names = [f"live-{number}" for number in range(ALIVE)]
    flags = ("--quiet", "--workspace", "none", "--memory", ALIVE_MEMORY, "--vcpus", "1")
    create = lambda name: timed(agentkernel.command("create", name, *flags), cwd=agentkernel.project)
    say(f"{ALIVE} at once")
    # Makes the template of such machines.
    create("live")
    agentkernel.forget("live")
    with ThreadPoolExecutor(ALIVE_STARTING) as pool:
        started = list(pool.map(create, names))
    # Every one of them works.
    executed = [timed(agentkernel.exec_command(name, BUSYBOX, "true")) for name in names]
    stats = json.loads(agentkernel.call("stats", "--json"))
    if sorted(stat["name"] for stat in stats) != sorted(names):
        fail(f"stats shows {len(stats)} of {ALIVE} sandboxes")
    processes = [(info["machine_pid"], info["supervisor_pid"]) for info in json.loads(agentkernel.call("list", "--json"))]
    proportional = [smaps(machine).get("Pss", 0) + smaps(supervisor).get("Pss", 0) for machine, supervisor in processes]
    removed = timed(agentkernel.command("rm", "--force", *names))
    left = json.loads(agentkernel.call("list", "--json"))
    if left:
        fail(f"{len(left)} sandboxes were not removed")
    live = {"create_ms": started, "exec_ms": executed, "remove_all_ms": removed, "stats": stats}
    return {"live": live | {"proportional_bytes": proportional}}


def make_project(directory):
    """A git repository of many small files, all different."""
    for number in range(DIRECTORIES):
        inner = directory / f"part-{number // 25}" / f"module-{number}"
        inner.mkdir(parents=True)
        for file in range(FILES):
            line = f"def function_{number}_{file}(argument): return argument + {number * FILES + file}\n"
            (inner / f"file_{file}.py").write_text((line * (FILE_BYTES // len(line) + 1))[:FILE_BYTES])
    git = ["git", "-C", directory, "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0"]
    run([*git, "init", "--quiet"])
    run([*git, "add", "."])
    run([*git, "commit", "--quiet", "--message", "all"])


def section_files(agentkernel, engines, options):
    """git status and grep -r over 50 000 files: in the workspace, and on the guest's own disk"""
    say(f"a workspace of {DIRECTORIES * FILES} files")
    raw = {}
    copy = "/var/tmp/copy"
    with contextlib.ExitStack() as stack:
        project = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-files.", dir=agentkernel.state.parent)))
        make_project(project)
        name = stack.enter_context(agentkernel.sandbox("files", "--workspace", "cow", directory=project))

        def work(place, directory, time_of):
            for kind, words, codes in (
                ("git_status", ("git", "-C", directory, "status", "--porcelain"), (0,)),
                # Found nowhere: 1.
                ("grep", ("grep", "-r", "nowhere to be found", directory), (1,)),
            ):
                say(f"{kind} in the {place}, {time_of}")
                figures = raw.setdefault(f"{kind}_{place}_{time_of}", [])
                figures.append(timed(agentkernel.exec_command(name, *words), codes=codes))

        def as_root(*words):
            run(agentkernel.exec_command(name, *words, user="root"))

        # What both need, so that neither pays for loading it.
        run(agentkernel.exec_command(name, "git", "--version"))
        run(agentkernel.exec_command(name, "grep", "--version"))
        work("workspace", project, "first")
        work("workspace", project, "second")
        say("a copy on the guest's own disk")
        run(agentkernel.exec_command(name, "cp", "-a", project, copy))
        as_root("sh", "-c", "sync; echo 3 > /proc/sys/vm/drop_caches")
        run(agentkernel.exec_command(name, "git", "--version"))
        run(agentkernel.exec_command(name, "grep", "--version"))
        work("disk", copy, "first")
        work("disk", copy, "second")
        # The workspace's caches were dropped too: filled again, and then both in turns.
        work("workspace", project, "refilled")
        for _ in range(5):
            work("workspace", project, "again")
            work("disk", copy, "again")
    return raw


def section_demo(agentkernel, engines, options):
    """make demo, a second time"""
    say("make demo, again")
    run([ROOT / "scripts/demo"])
    return {"demo_again": [timed([ROOT / "scripts/demo"])]}


def section_build(agentkernel, engines, options):
    """images: built again, built with one file changed, ten steps of `true`; a large image unpacked, a large context"""
    docker = engines.docker
    names = ("build_again", "build_changed", "build_one", "build_ten")
    raw = {name: [] for name in (*names, *(f"docker_{name}" for name in names), "flatten", "tar_extract")}
    with tempfile.TemporaryDirectory(prefix="bench-build.", dir=agentkernel.state.parent) as directory:
        directory = Path(directory)
        context = directory / "context"
        context.mkdir()
        (context / "first").write_text("first")
        steps = "FROM bench-base\nCOPY first /first\n" + "".join(f"RUN echo {number} > /{number}\n" for number in range(3))
        (context / "Dockerfile").write_text(steps + "COPY last /last\n")
        ten = directory / "ten"
        one = directory / "one"
        for place, count in ((one, 1), (ten, 10)):
            place.mkdir()
            (place / "Dockerfile").write_text("FROM bench-base\n" + "RUN true\n" * count)
        base = directory / "base.tar"
        write_image(base, "bench-base", [busybox_layer()])
        agentkernel.call("images", "load", base)
        if docker:
            run(docker.command("load", "-i", str(base)))

        def ours(place, *flags):
            return agentkernel.command("build", "-q", "-t", "bench-built", *flags, place)

        def theirs(place, *flags):
            return ["env", "DOCKER_BUILDKIT=1", *docker.command("build", "-q", "--network", "none", *flags, str(place))]

        def both(name, place, *flags):
            raw[name].append(timed(ours(place, *flags)))
            if docker:
                raw[f"docker_{name}"].append(timed(theirs(place, *flags)))

        (context / "last").write_text("for the first time")
        for command in [ours(context), *([theirs(context)] if docker else [])]:
            run(command)
        for number in range(options.rounds):
            say(f"builds, {number + 1} of {options.rounds}")
            (context / "last").write_text(str(number))
            both("build_changed", context)
            both("build_again", context)
        (context / "last").write_text("and once more")
        plain = agentkernel.command("build", "--progress", "plain", "-t", "bench-built", context)
        done = subprocess.run(plain, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT, check=True)
        steps = sum(line.startswith("[") and "] FROM " not in line for line in done.stderr.splitlines())
        raw["build_changed_steps"] = steps - done.stderr.count("CACHED")
        for number in range(3):
            say(f"ten steps of true, {number + 1} of 3")
            both("build_one", one, "--no-cache")
            both("build_ten", ten, "--no-cache")
        for prefix in ("", "docker_"):
            pairs = zip(raw[f"{prefix}build_ten"], raw[f"{prefix}build_one"])
            raw[f"{prefix}build_further"] = [(ten - one) / 9 for ten, one in pairs]

        for number in range(3):
            say(f"a large image, {number + 1} of 3")
            # New ones each time: root file systems are kept by content.
            layers = [large_layer(uuid.uuid4().hex) for _ in range(LAYERS)]
            archive = directory / "large.tar"
            write_image(archive, f"bench-large-{number}", layers)
            # As a user meets it: it is in the store, compressed or not, and a sandbox of it is wanted.
            agentkernel.call("images", "load", archive)
            unpacked = directory / "unpacked"
            unpacked.mkdir()
            extract = ["sh", "-c", 'for layer in "$@"; do tar -xf "$layer" -C "$0"; done', unpacked]
            for index, layer in enumerate(layers):
                (directory / f"layer-{index}.tar").write_bytes(layer)
                extract.append(directory / f"layer-{index}.tar")
            create = ["create", "large", "--no-start", "--workspace", "none", "--quiet", "--image", f"bench-large-{number}"]
            raw["flatten"].append(timed(agentkernel.command(*create), cwd=agentkernel.project))
            raw["tar_extract"].append(timed(extract))
            agentkernel.call("rm", "large")
            agentkernel.call("images", "rm", f"bench-large-{number}")
            shutil.rmtree(unpacked)
        # `images prune` leaves for an hour what was just made.
        for made in (agentkernel.state / "cache/images").glob("*"):
            made.unlink()

        say("a large build context")
        large = directory / "large"
        large.mkdir()
        (large / "Dockerfile").write_text("FROM bench-base\nCOPY . /context\n")
        for number in range(CONTEXT_FILES):
            with open(large / f"{number}", "wb") as file:
                file.truncate(CONTEXT_FILE_BYTES)
        builder = subprocess.Popen(ours(large), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        # What wait4 tells would include the memory of this process, of which the other one was forked.
        most = 0
        while builder.poll() is None:
            most = max(most, status_of(builder.pid, "VmHWM") or 0)
            time.sleep(0.02)
        if builder.returncode != 0:
            fail(f"a build of a large context ended with {builder.returncode}")
        raw["build_context_peak_bytes"] = most
        for name in ("bench-built", "bench-base"):
            agentkernel.call("images", "rm", name)
    agentkernel.call("images", "prune")
    return raw


def busybox_layer():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("bin", "tmp"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        archive.add(BUSYBOX, "bin/busybox")
        for name in ("sh", "true"):
            info = tarfile.TarInfo(f"bin/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(info)
    return content.getvalue()


def large_layer(seed):
    """A layer of files that are all different and do not compress."""
    content = io.BytesIO()
    random = Random(seed)
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number in range(LAYER_FILES):
            info = tarfile.TarInfo(f"usr/lib/{seed}/{number % 40}/{number}")
            info.size = LAYER_FILE_BYTES
            archive.addfile(info, io.BytesIO(random.randbytes(LAYER_FILE_BYTES)))
    return content.getvalue()


def write_image(path, name, layers):
    """An archive as `docker save` writes it."""
    diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    members = [("config.json", json.dumps(config).encode())]
    members += [(f"{index}/layer.tar", layer) for index, layer in enumerate(layers)]
    manifest = {"Config": "config.json", "RepoTags": [f"{name}:latest"], "Layers": [name for name, _ in members[1:]]}
    with tarfile.open(path, "w") as archive:
        for member, content in [*members, ("manifest.json", json.dumps([manifest]).encode())]:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


SECTIONS = {
    section.__name__.removeprefix("section_"): section
    for section in (
        warm.section_warm,
        warm.section_stages,
        warm.section_fork,
        warm.section_restored,
        section_cold,
        section_exec,
        section_python,
        section_stream,
        section_list,
        section_churn,
        section_live,
        section_files,
        section_demo,
        section_build,
        network.section_network,
        server.section_server,
    )
}
# Those that measure Docker, or Podman, too.
BESIDE_DOCKER, BESIDE_PODMAN = ("warm", "cold", "exec", "build", "network"), ("warm",)
# From how many figures on the percentiles say more than the extremes.
PERCENTILES_FROM = 20


def guest_binary(target):
    built = list((target / "release/build").glob("agentkernel-machine-*/out/agentkernel-guest"))
    if not built:
        fail("the guest's binary is not where the build leaves it")
    return max(built, key=lambda path: path.stat().st_mtime).stat().st_size


def spread(values, unit="ms"):
    if not values:
        return "-"
    said = summary(values)
    shown = ("p50", "p95", "p99") if len(values) >= PERCENTILES_FROM else ("p50", "least", "most")
    digits = 0 if said["p50"] >= 100 else 1
    middle, second, third = (f"{said[name]:.{digits}f}" for name in shown)
    extent = f"p95 {second}, p99 {third}" if len(values) >= PERCENTILES_FROM else f"{second}-{third}"
    return f"{middle} {unit} ({extent}, n={len(values)})"


def mib(value):
    return f"{value / MIB:.1f} MiB" if value else "-"


def table(result):
    raw = result["raw"]
    docker = result["docker"]
    rows = [
        ("warm: run -- true", "warm_true", "docker_run_default"),
        ("    docker run --network none", "warm_true", "docker_run_none"),
        ("    podman run", "warm_true", "podman_run_default"),
        ("    podman run --network none", "warm_true", "podman_run_none"),
        ("    run --cold -- true, in turns", "warm_cold", "docker_run_default"),
        ("warm: run -- python3 -c pass", "warm_python", "docker_python_default"),
        ("    docker run --network none", "warm_python", "docker_python_none"),
        ("fork, 512 MiB", "fork", None),
        ("    first exec in the child", "fork_first_exec", None),
        ("    both: until a command has run", "fork_ready", None),
        ("    the parent stood still", "fork_still", None),
        ("    exec in the parent, afterwards", "fork_parent_exec", None),
        ("exec, a process: booted machine", "exec_in_booted", None),
        ("    begun with a template", "exec_in_template", None),
        ("    a fork", "exec_in_fork", None),
        ("    restored from a snapshot", "exec_in_snapshot", None),
        ("exec, one client: booted machine", "client_exec_booted", None),
        ("    begun with a template", "client_exec_template", None),
        ("cold: run -- true", "run_true", "docker_run_true_default"),
        ("    docker run --network none", "run_true", "docker_run_true"),
        ("cold: run -- python3 -c pass", "run_python", None),
        ("machine start, booted", "start_booted", None),
        ("machine start, with a template", "start", None),
        ("exec of a static true, a process", "exec_process", "docker_exec_process"),
        ("the same inside one client", "exec_true", "docker_exec_process"),
        ("the same on the agent's stream", "agent_true", None),
        ("python3 -c pass, booted, first", "python_booted_first", None),
        ("python3 -c pass, live, first", "python_first", None),
        ("python3 -c pass, live, second", "python_second", None),
        ("the client alone, --version", "client_start", "docker_client_start"),
        (f"list, {LISTED} sandboxes", "list", None),
        ("build, nothing changed", "build_again", "docker_build_again"),
        ("build, last COPY changed", "build_changed", "docker_build_changed"),
        ("build, one RUN true", "build_one", "docker_build_one"),
        ("build, ten RUN true", "build_ten", "docker_build_ten"),
        ("    each further one", "build_further", "docker_build_further"),
        ("300 MiB image: root fs / tar -x", "flatten", "tar_extract"),
        ("connect to a server on the host", "connect", "connect_inside"),
        ("one after the other: create", "churn_create", None),
        ("one after the other: exec", "churn_exec", None),
        ("one after the other: rm", "churn_remove", None),
    ]
    before, after = result["host_load"]
    yield f"host {result['host_kernel']}, {result['host_processors']} processors, load {before:.1f} before and {after:.1f} " \
        f"after; {result['date']}"
    yield f"agentkernel: {result['accelerator']}, guest kernel {result['guest_kernel']}, {result['vcpus']} vCPUs, " \
        f"{result['memory_mib']} MiB; {result['qemu']}"
    if docker:
        yield f"docker: {docker}, runc, overlay2; other than `docker run`: without a network; image: one static busybox"
    if result["podman"]:
        yield f"podman: {result['podman']}, {Podman.RUNTIME}, overlay, netavark, as root; the same image"
    for name, problem in result["network_problems"].items():
        if problem:
            yield f"{name}'s default network cannot work here and was not measured: {problem}"
    yield f"Times are median (least-most), or median, p95 and p99 of {PERCENTILES_FROM} and more."
    yield ""
    yield from comparison("agentkernel", "Docker, Podman", rows, raw)
    if "grep_workspace_first" in raw:
        yield ""
        yield from comparison("workspace", "the guest's own disk", list(file_rows()), raw)
        yield f"{DIRECTORIES * FILES} files of {FILE_BYTES} bytes, git's own besides; workspace copy-on-write"
    yield ""
    if "stages" in raw:
        yield from warm.stage_rows(raw["stages"])
        yield ""
    if ten := raw.get("ten_children"):
        seconds, still = ten["fork_ms"] / 1e3, ten["still_ms"]
        yield f"{f'{warm.CHILDREN} children of one parent':32}{seconds:.1f} s, it stood still for {still:.0f} ms"
        for name, text in (("idle", "idle"), ("after_exec", "after one command")):
            private, proportional = ([child[key] / MIB for child in ten[name]] for key in ("private_bytes", "pss_bytes"))
            yield f"{f'    {text}: private':32}{spread(private, 'MiB')}, each"
            yield f"{'    with a part of the shared':32}{spread(proportional, 'MiB')}, each"
    if "download" in raw:
        for text, name in (("", "download"), (", QEMU's user network", "download_plain"), (", Docker", "download_docker")):
            yield f"{f'200 MiB{text}':32}{spread(raw[name], 'MiB/s')}"
    yield from network.rows(raw)
    yield from server.rows(raw)
    if "machine_rss_bytes" in raw:
        yield f"{'memory: machine, resident':32}{mib(statistics.median(raw['machine_rss_bytes']))}"
        yield f"{'memory: supervisor':32}{mib(statistics.median(raw['supervisor_rss_bytes']))}"
    if live := raw.get("live"):
        machines = [stat["machine_memory_bytes"] / MIB for stat in live["stats"]]
        supervisors = [stat["supervisor_memory_bytes"] / MIB for stat in live["stats"]]
        yield f"{f'{ALIVE} at once: create':32}{spread(live['create_ms'])}, {ALIVE_STARTING} at a time"
        yield f"{'    exec in each':32}{spread(live['exec_ms'])}"
        yield f"{'    memory: machine':32}{spread(machines, 'MiB')}"
        yield f"{'    memory: supervisor':32}{spread(supervisors, 'MiB')}"
        yield f"{'    memory: all':32}{sum(machines) + sum(supervisors):.0f} MiB resident, " \
            f"{sum(live['proportional_bytes']) / MIB:.0f} MiB with shared pages counted once"
        yield f"{'    rm of all':32}{live['remove_all_ms'] / 1e3:.1f} s"
    if "build_context_peak_bytes" in raw:
        yield f"{'memory: build of a 5 GB context':32}{mib(raw['build_context_peak_bytes'])}"
    if "holdings" in raw:
        first, last = raw["holdings"][0], raw["holdings"][-1]
        said = ", ".join(f"{key.replace('_', ' ')} {first[key]} -> {last[key]}" for key in first)
        yield f"{'left by ' + str(len(raw['churn_create']) - 1) + ' sandboxes':32}{said}"
    yield f"{'guest binary':32}{mib(result['guest_binary_bytes'])}"
    if streamed := raw.get("stream"):
        speed = streamed["bytes"] / MIB / streamed["seconds"]
        whole = "whole" if streamed["whole"] else "DAMAGED"
        grown = mib(streamed["grown_bytes"])
        yield f"{'1 GiB of output':32}{whole}, {speed:.0f} MiB/s, host processes grew by {grown}"
    if "demo_again" in raw:
        yield f"{'make demo, again':32}{raw['demo_again'][0] / 1e3:.1f} s"
    yield ""
    yield f"{'reach':66}{'measured':>12}"
    for goal in result["reach"]:
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[goal["met"]]
        value = "-" if goal["value"] is None else f"{goal['value']:.2f}"
        yield f"{goal['goal']:66}{value:>12}  {verdict}"


def comparison(ours, theirs, rows, raw):
    """Lines of what was measured of `rows`: text, name of our figures, name of theirs if there are any."""
    yield f"{'':36}{ours:40}{theirs:40}ratio"
    for text, name, other in rows:
        if name not in raw:
            continue
        compared = raw.get(other) or []
        # Only there for what it is compared with.
        if not compared and text.strip().startswith(("docker", "podman")):
            continue
        ratio = f"{statistics.median(raw[name]) / statistics.median(compared):.2f}" if compared else "-"
        yield f"{text:36}{spread(raw[name]):40}{spread(compared):40}{ratio}"


def file_rows():
    for kind, text in (("git_status", "git status"), ("grep", "grep -r")):
        for time_of, said in (("first", "first"), ("second", "second"), ("again", "again, in turns")):
            yield f"{text}, {said}", f"{kind}_workspace_{time_of}", f"{kind}_disk_{time_of}"


def reach(raw, guest_bytes, where):
    def middle(*names):
        values = [value for name in names for value in raw.get(name) or []]
        return statistics.median(values) if values else None

    def divide(ours, theirs):
        return middle(*ours) / middle(*theirs) if middle(*ours) and middle(*theirs) else None

    def left(*keys):
        return sum(raw["holdings"][-1][key] - raw["holdings"][0][key] for key in keys)

    streamed = raw.get("stream")
    seconds = lambda name: middle(name) / 1e3
    repeated = lambda kind, place: [f"{kind}_{place}_{time_of}" for time_of in ("second", "again")]
    rounds = len(raw.get("churn_create", ())) - 1
    still, ten = raw.get("fork_still"), raw.get("ten_children")
    private = lambda: max(child["private_bytes"] for child in ten["idle"]) / MIB
    goals = [
        ("warm", f"warm run -- true / docker run, {where}", "<=", 0.5,
            lambda: divide(["warm_true"], ["docker_run_default"])),
        ("warm", f"warm run -- true / docker run --network none, {where}", "<=", 0.5,
            lambda: divide(["warm_true"], ["docker_run_none"])),
        ("warm", f"warm run -- python3 / docker run, {where}", "<=", 1.5,
            lambda: divide(["warm_python"], ["docker_python_default"])),
        ("warm", f"warm run -- python3 / docker run --network none, {where}", "<=", 1.5,
            lambda: divide(["warm_python"], ["docker_python_none"])),
        ("fork", f"fork of 512 MiB until a command has run, s, {where}", "<=", 0.5, lambda: seconds("fork_ready")),
        ("fork", f"the forked sandbox stood still, ms, {where}", "<=", 150, lambda: middle("fork_still")),
        ("fork", "    the same, p95", "<=", 150, lambda: summary(still)["p95"]),
        ("fork", f"private memory of {warm.CHILDREN} idle children, the most, MiB", "<=", 60, private),
        ("restored", f"exec: restored from a snapshot / booted, {where}", "<=", 1.1,
            lambda: divide(["exec_in_snapshot"], ["exec_in_booted"])),
        ("restored", f"exec: a fork / booted, {where}", "<=", 1.1, lambda: divide(["exec_in_fork"], ["exec_in_booted"])),
        ("restored", f"exec inside one client: template / booted, {where}", "<=", 1.1,
            lambda: divide(["client_exec_template"], ["client_exec_booted"])),
        ("cold", f"cold run -- true / docker run, {where}", "<=", 10,
            lambda: divide(["run_true"], ["docker_run_true_default"])),
        ("cold", f"cold run -- true / docker run --network none, {where}", "<=", 10,
            lambda: divide(["run_true"], ["docker_run_true"])),
        ("exec", f"exec / docker exec, processes, {where}", "<=", 0.3,
            lambda: divide(["exec_process"], ["docker_exec_process"])),
        ("exec", f"exec inside one client / docker exec, {where}", "<=", 0.2,
            lambda: divide(["exec_true"], ["docker_exec_process"])),
        ("exec", "exec through the control socket / on the agent's stream", "<=", 1.2,
            lambda: divide(["exec_true"], ["agent_true"])),
        ("python", f"python3 -c pass, second time, s, {where}", "<=", 0.5, lambda: seconds("python_second")),
        ("stream", "1 GiB of output: MiB the host's processes grew by", "<=", 64, lambda: streamed["grown_bytes"] / MIB),
        ("stream", "1 GiB of output: arrived whole (1 = yes)", ">=", 1, lambda: float(streamed["whole"])),
        ("list", f"list of {LISTED} sandboxes, ms", "<=", 50, lambda: middle("list")),
        ("churn", f"processes and descriptors left by {rounds} sandboxes", "<=", 0, lambda: left("processes", "descriptors")),
        ("churn", f"files left in the state directory by {rounds} sandboxes", "<=", 0, lambda: left("state_files")),
        ("churn", f"MiB left in the state directory by {rounds} sandboxes", "<=", 0, lambda: left("state_bytes") / MIB),
        ("files", f"git status, warm: workspace / own disk, {where}", "<=", 1.3,
            lambda: divide(repeated("git_status", "workspace"), repeated("git_status", "disk"))),
        ("files", f"grep -r, warm: workspace / own disk, {where}", "<=", 1.3,
            lambda: divide(repeated("grep", "workspace"), repeated("grep", "disk"))),
        ("build", f"build again, nothing changed / docker build, {where}", "<=", 0.2,
            lambda: divide(["build_again"], ["docker_build_again"])),
        ("build", "build with the last COPY changed: steps done again", "<=", 1, lambda: raw["build_changed_steps"]),
        ("build", f"ten RUN true / docker build, {where}", "<=", 1, lambda: divide(["build_ten"], ["docker_build_ten"])),
        ("server", f"POST /run / run -- true, warm, {where}", "<=", 1.15, lambda: divide(["http_run"], ["cli_run"])),
        ("server", f"exec over HTTP, added to the supervisor's, ms, {where}", "<=", 2,
            lambda: middle("http_exec") - middle("supervisor_exec")),
        ("server", f"{server.LISTENERS} clients of /events, MiB resident", "<=", 100,
            lambda: raw["listeners"]["with_bytes"] / MIB),
        ("server", "wrk, /health and /sandboxes: errors", "<=", 0,
            lambda: float(sum(said["errors"] + said["socket_errors"] for said in raw["wrk"].values()))),
        ("server", f"{server.AT_ONCE} POST /run at once: right", ">=", server.AT_ONCE, lambda: float(raw["at_once"]["right"])),
        ("build", "300 MiB image to a root file system / tar -x", "<=", 2, lambda: divide(["flatten"], ["tar_extract"])),
        ("build", "builder's memory on a context of 5 GB, MiB", "<=", 300, lambda: raw["build_context_peak_bytes"] / MIB),
        ("network", f"download of 200 MiB / QEMU's own user network, {where}", ">=", 0.5,
            lambda: divide(["download"], ["download_plain"])),
        ("network", f"{network.CONNECTIONS} connections at once: lost", "<=", 0,
            lambda: raw["connections"]["of"] - raw["connections"]["whole"]),
        ("network", f"connect: added to the guest's own, ms, {where}", "<=", 2,
            lambda: middle("connect") - middle("connect_inside")),
        ("demo", "make demo, again, s", "<=", 10, lambda: seconds("demo_again")),
        (None, "guest binary, MiB", "<=", 2, lambda: guest_bytes / MIB),
    ]
    for section, name, relation, bound, measure in goals:
        if section and section not in raw["sections"]:
            continue
        value = measure()
        met = None if value is None else value <= bound if relation == "<=" else value >= bound
        yield {"goal": f"{name} {relation} {bound}", "bound": bound, "value": value, "met": met}


def are_figures(values):
    return isinstance(values, list) and bool(values) and all(isinstance(value, (int, float)) for value in values)


def chosen(text):
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"there is no section {name!r}: {', '.join(SECTIONS)}")
    return names


def main():
    sections = "\n".join(f"  {name:8} {section.__doc__}" for name, section in SECTIONS.items())
    parser = argparse.ArgumentParser(
        description="Measures agentkernel, and Docker and Podman beside it.",
        epilog=f"sections:\n{sections}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--without-docker", action="store_true", help="leave Docker and Podman out; needs no root")
    parser.add_argument("--only", type=chosen, default=list(SECTIONS), metavar="SECTION,...", help="these sections")
    parser.add_argument("--iterations", type=int, default=50, help="warm starts, forks, execs in turns (default 50)")
    parser.add_argument("--rounds", type=int, default=10, help="cold starts and builds of each kind (default 10)")
    parser.add_argument("--churn", type=int, default=50, help="sandboxes made, used and removed (default 50)")
    options = parser.parse_args()
    options.iterations, options.churn = max(1, options.iterations), max(1, options.churn)
    options.rounds = max(2, options.rounds)
    beside = lambda names: not options.without_docker and any(name in options.only for name in names)
    with_docker, with_podman = beside(BESIDE_DOCKER), beside(BESIDE_PODMAN)
    if with_docker and os.geteuid() != 0:
        fail("Docker's daemon needs root: call this as root, or with --without-docker")
    for needed in (BUSYBOX, PYTHON):
        if not Path(needed).exists():
            fail(f"{needed} is missing: scripts/install-packages demo bench")
    if "files" in options.only and not shutil.which("git"):
        fail("git is missing, which makes the workspace of many files and is run in it")
    target = target_directory()
    program = target / "release/agentkernel"
    if not program.exists():
        fail("build first: cargo build --release --locked -p agentkernel")
    # SIGTERM ends this as Ctrl-C does: with everything cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    adopt_orphans()
    state = target / "bench-state"
    state.mkdir(mode=0o700, exist_ok=True)
    os.environ["AGENTKERNEL_HOME"] = str(state)

    with contextlib.ExitStack() as stack:
        alone = os.open(state, os.O_RDONLY)
        stack.callback(os.close, alone)
        try:
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail("another bench is running: two at once would measure each other")
        project = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench.", dir=target))
        agentkernel = stack.enter_context(Agentkernel(program, project, state))
        engines = Engines(None, None, None)
        if with_docker:
            problem = why_no_bridge()
            podman = stack.enter_context(Podman()) if with_podman else None
            engines = Engines(stack.enter_context(Docker(bridge=problem is None)), podman, problem)
        say("the kernel")
        agentkernel.call("setup")
        figures = agentkernel.benchmark(1, BUSYBOX, "true")
        raw, load = {"sections": {}}, os.getloadavg()[0]
        for name in options.only:
            begun, before = time.perf_counter(), os.getloadavg()
            raw |= SECTIONS[name](agentkernel, engines, options)
            raw["sections"][name] = {"seconds": time.perf_counter() - begun, "load": [before, os.getloadavg()]}
        docker_version = engines.docker.version() if engines.docker else None
        podman_version = engines.podman.version() if engines.podman else None
        load = [load, os.getloadavg()[0]]
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
        "qemu": run(["qemu-system-x86_64", "--version"]).decode().splitlines()[0],
        "docker": docker_version,
        "podman": podman_version,
        "network_problems": {
            "docker": engines.bridge_problem,
            "podman": engines.podman.network_problem if engines.podman else None,
        },
        "guest_binary_bytes": size,
        "summary": {name: summary(values) for name, values in raw.items() if are_figures(values)},
        "raw": raw,
        "reach": list(reach(raw, size, where)),
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
