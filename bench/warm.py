"""Sections of the bench about machines that go on from a saved one: warm starts, forks, restored snapshots."""

import contextlib
import json
import re
import statistics
import subprocess
import tarfile
import time
from pathlib import Path

from docker import BUSYBOX, LIMIT, fail, run
from measure import PYTHON, say, smaps, timed

FORKED_MEMORY = "512M"
CHILDREN = 10
# How long after a fork its children are taken to be idle, s.
SETTLING = 5
PYTHON_IMAGE = "agentkernel-bench-python"
# What `--verbose` prints: seconds since the process began, and what had happened then.
SAID = re.compile(r"([0-9.]+)s +DEBUG (.+)")
CLIENT = {
    "the sandbox is made": "made",
    "the sandbox is up": "up",
    "the command has ended": "ended",
    "the changes are taken": "taken",
    "the sandbox is gone": "gone",
}
SUPERVISOR = {
    "the supervisor is up": "supervising",
    "the machine's process is jailed": "jailed",
    "the agent greets": "greeted",
    "the guest is configured": "configured",
}
# Stages of `run -- true` in their order: name, what happens in it.
STAGES = [
    ("made", "client: settings, the template found, its disk copied"),
    ("supervising", "supervisor: its files opened"),
    ("jailed", "a process in its jail, to be QEMU"),
    ("restored", "QEMU with the template, until its agent answers"),
    ("configured", "guest: randomness, clock, names, file systems"),
    ("handed_over", "supervisor: its start, and its word to the client"),
    ("command", "the command, from the request to its exit code"),
    ("changes", "changes of the workspace"),
    ("removed", "machine ended, sandbox removed"),
    ("exit", "client: its start and end"),
]


def section_warm(agentkernel, engines, options):
    """run, from a template: beside docker run and podman run, with their default networks and without one"""
    docker, podman = engines.docker, engines.podman
    python = (PYTHON, "-c", "pass")
    if docker:
        say("a Python image")
        load_python(docker)
    inside = {"cwd": agentkernel.project}
    bridge = docker and docker.bridge
    measured = {
        "warm_true": (agentkernel.run_command("true"), inside),
        "docker_run_default": bridge and (docker.run_command("true", network=True), {}),
        "docker_run_none": docker and (docker.run_command("true"), {}),
        "podman_run_default": podman and not podman.network_problem and (podman.run_command("true", network=True), {}),
        "podman_run_none": podman and (podman.run_command("true"), {}),
        "warm_python": (agentkernel.run_command(*python, image="host"), inside),
        "docker_python_default": bridge and (docker.run_command(*python, network=True, image=PYTHON_IMAGE), {}),
        "docker_python_none": docker and (docker.run_command(*python, image=PYTHON_IMAGE), {}),
    }
    measured = {name: call for name, call in measured.items() if call}
    raw = {name: [] for name in (*measured, "warm_cold")}
    say("warming up: templates, page cache")
    for command, where in measured.values():
        run(command, **where)
    for number in range(options.iterations):
        say(f"warm starts, {number + 1} of {options.iterations}")
        for name, (command, where) in measured.items():
            raw[name].append(timed(command, **where))
        if number % 10 == 0:
            raw["warm_cold"].append(timed(agentkernel.run_command("true", cold=True), **inside))
    return raw


def load_python(docker):
    """An image of Debian's Python as it is on this host: interpreter, standard library, the shared libraries of both."""
    program = Path(PYTHON).resolve()
    library = Path("/usr/lib", program.name)
    libraries = set()
    for file in (program, *library.glob("lib-dynload/*.so")):
        for word in run(["ldd", file]).decode().split():
            if word.startswith("/"):
                libraries.add(word)
    archive = docker.directory / "python.tar"
    with tarfile.open(archive, "w", dereference=True) as tar:
        tar.add(program, PYTHON)
        tar.add(program, program)
        tar.add(library, library)
        for name in sorted(libraries):
            tar.add(name, name)
    run(docker.command("import", str(archive), PYTHON_IMAGE))
    archive.unlink()


def section_fork(agentkernel, engines, options):
    """forks of a live sandbox of 512 MiB: until a command has run in the child, how long the parent stood still, memory"""
    raw = {"fork": [], "fork_first_exec": [], "fork_ready": [], "fork_still": [], "fork_parent_exec": []}
    with agentkernel.sandbox("parent", "--memory", FORKED_MEMORY, "--workspace", "none") as parent:
        run(agentkernel.exec_command(parent, BUSYBOX, "true"))
        # The first one is not counted, as with what it is compared with.
        for number in range(options.iterations + 1):
            say(f"forks, {number} of {options.iterations}")
            begun = time.perf_counter()
            said = fork(agentkernel, parent, "--as", "child")
            forked = time.perf_counter()
            run(agentkernel.exec_command("child", BUSYBOX, "true"))
            ended = time.perf_counter()
            agentkernel.call("rm", "--force", "child")
            executed = timed(agentkernel.exec_command(parent, BUSYBOX, "true"))
            if number:
                raw["fork"].append((forked - begun) * 1e3)
                raw["fork_first_exec"].append((ended - forked) * 1e3)
                raw["fork_ready"].append((ended - begun) * 1e3)
                raw["fork_still"].append(stood_still(said))
                raw["fork_parent_exec"].append(executed)
        raw |= ten_children(agentkernel, parent)
    return raw


def fork(agentkernel, parent, *flags):
    """Forks; returns what was said about it."""
    command = agentkernel.command("fork", parent, *flags)
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
    if done.returncode != 0:
        fail(f"fork ended with {done.returncode}: {done.stderr.strip()}")
    return done.stderr


def stood_still(said):
    if not (found := re.search(r"stood still for (\d+) ms", said)):
        fail(f"fork does not say how long the parent stood still: {said.strip()}")
    return float(found.group(1))


def ten_children(agentkernel, parent):
    say(f"{CHILDREN} children of one parent")
    names = [f"ten-{number}" for number in range(1, CHILDREN + 1)]
    try:
        begun = time.perf_counter()
        still = stood_still(fork(agentkernel, parent, "--as", "ten", "--count", str(CHILDREN)))
        took = (time.perf_counter() - begun) * 1e3
        time.sleep(SETTLING)
        idle = memory_of(agentkernel, names)
        for name in names:
            run(agentkernel.exec_command(name, BUSYBOX, "true"))
        time.sleep(SETTLING)
        used = memory_of(agentkernel, names)
    finally:
        subprocess.run(agentkernel.command("rm", "--force", *names), capture_output=True, timeout=LIMIT)
    return {"ten_children": {"fork_ms": took, "still_ms": still, "idle": idle, "after_exec": used}}


def memory_of(agentkernel, names):
    """What the machines of these sandboxes take of the host's memory, each."""
    machines = {info["name"]: info["machine_pid"] for info in json.loads(agentkernel.call("list", "--json"))}
    memory = []
    for name in names:
        sums = smaps(machines[name])
        if not sums:
            fail(f"the memory of {name}'s machine cannot be read")
        private = sums["Private_Clean"] + sums["Private_Dirty"]
        memory.append({"private_bytes": private, "pss_bytes": sums["Pss"], "rss_bytes": sums["Rss"]})
    return memory


def section_restored(agentkernel, engines, options):
    """exec in machines that were booted, began with a template, are a fork, were restored from a snapshot: in turns"""
    kinds = ("booted", "template", "fork", "snapshot")
    raw = {f"exec_in_{kind}": [] for kind in kinds}
    raw |= {"client_exec_booted": [], "client_exec_template": []}
    with contextlib.ExitStack() as stack:
        stack.enter_context(agentkernel.sandbox("booted", "--workspace", "none", "--cold"))
        stack.enter_context(agentkernel.sandbox("template", "--workspace", "none"))
        stack.callback(agentkernel.forget, "snapshot")
        stack.callback(agentkernel.forget, "fork")
        fork(agentkernel, "template", "--as", "fork")
        agentkernel.call("snapshot", "take", "template", "bench")
        stack.callback(agentkernel.forget_snapshots)
        agentkernel.call("snapshot", "restore", "bench", "--as", "snapshot")
        commands = {kind: agentkernel.exec_command(kind, BUSYBOX, "true") for kind in kinds}
        # What was restored, or booted, loads the program first.
        for command in commands.values():
            run(command)
        for number in range(options.iterations):
            say(f"exec in four kinds of machines, {number + 1} of {options.iterations}")
            for kind, command in commands.items():
                raw[f"exec_in_{kind}"].append(timed(command))
    for number in range(4):
        say(f"exec from one client, {number + 1} of 4")
        for kind, cold in (("booted", True), ("template", False)):
            # The first one loads the program into the guest.
            raw[f"client_exec_{kind}"] += agentkernel.benchmark(50, BUSYBOX, "true", cold=cold)["runs_ms"][1:]
    return raw


def section_stages(agentkernel, engines, options):
    """where the milliseconds of a warm run -- true go"""
    command = agentkernel.command("--verbose", "run", "--quiet", "--", "true")
    run(command, cwd=agentkernel.project)
    stages = {name: [] for name, _ in STAGES}
    totals = []
    for number in range(min(20, options.iterations)):
        say(f"stages of run -- true, {number + 1}")
        begun = time.perf_counter()
        done = subprocess.run(
            command, cwd=agentkernel.project, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT
        )
        total = (time.perf_counter() - begun) * 1e3
        times = told(done.stderr)
        if done.returncode != 0 or not all(name in times for name in (*CLIENT.values(), *SUPERVISOR.values())):
            fail(f"run --verbose does not tell all stages: {done.stderr.strip()}")
        totals.append(total)
        for name, value in stages_of(times, total).items():
            stages[name].append(value)
    return {"stages": {"total_ms": totals, "stages_ms": stages}}


def told(said):
    """Times of what happened, ms: each since the process that says it began."""
    times = {}
    for line in said.splitlines():
        if found := SAID.search(line):
            for words, name in (CLIENT | SUPERVISOR).items():
                if found.group(2).startswith(words):
                    times[name] = float(found.group(1)) * 1e3
    return times


def stages_of(times, total):
    """The stages of one run; they add up to the whole."""
    return {
        "made": times["made"],
        "supervising": times["supervising"],
        "jailed": times["jailed"] - times["supervising"],
        "restored": times["greeted"] - times["jailed"],
        "configured": times["configured"] - times["greeted"],
        "handed_over": times["up"] - times["made"] - times["configured"],
        "command": times["ended"] - times["up"],
        "changes": times["taken"] - times["ended"],
        "removed": times["gone"] - times["taken"],
        "exit": total - times["gone"],
    }


def stage_rows(stages):
    """Lines of the table of stages: medians, and their shares."""
    whole = statistics.median(stages["total_ms"])
    yield f"{'stages of a warm run -- true, medians':66}{'ms':>8}{'share':>8}"
    for name, what in STAGES:
        middle = statistics.median(stages["stages_ms"][name])
        yield f"  {what:64}{middle:8.1f}{middle / whole:8.0%}"
    yield f"  {'all of it':64}{whole:8.1f}"
