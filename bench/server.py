"""The section of the bench about the HTTP API, beside the command line and the supervisor."""

import contextlib
import http.client
import json
import re
import shutil
import socket
import statistics
import subprocess
import threading
import time
from urllib.parse import urlsplit

from docker import BUSYBOX, LIMIT, fail, run
from measure import MIB, say, summary, timed

# Clients that listen and hear nothing.
LISTENERS = 1000
# Commands in temporary sandboxes at once.
AT_ONCE = 32
# What wrk does: seconds, connections, threads.
WRK_SECONDS, WRK_CONNECTIONS, WRK_THREADS = 10, 64, 2
EXECS = 50


class Client:
    """One connection that is kept."""

    def __init__(self, url):
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LIMIT)
        self.connection.connect()
        self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self, method, path, body=None):
        headers = {"content-type": "application/json"} if body is not None else {}
        self.connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            fail(f"{method} {path} was answered with {answer.status}: {text[:200]}")
        return json.loads(text)["data"]

    def timed(self, *request):
        """Wall time of a request, ms, and its answer."""
        begun = time.perf_counter()
        answer = self.call(*request)
        return (time.perf_counter() - begun) * 1e3, answer


@contextlib.contextmanager
def served(agentkernel):
    """A server for the bench's project; its URL and process."""
    words = agentkernel.command("serve", "--port", "0", "--quiet")
    process = subprocess.Popen(words, cwd=agentkernel.project, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.terminate()
        process.wait(LIMIT)


def resident(process):
    text = open(f"/proc/{process.pid}/status").read()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text).group(1)) << 10


def section_server(agentkernel, engines, options):
    """the HTTP API: POST /run beside run, exec beside the supervisor's, many clients"""
    raw = {name: [] for name in ("http_run", "cli_run", "http_exec", "supervisor_exec", "agent_exec")}
    with served(agentkernel) as (url, process):
        client = Client(url)
        true = {"command": ["true"]}
        cli = agentkernel.run_command("true")
        run(cli, cwd=agentkernel.project)
        client.call("POST", "/run", true)
        for number in range(options.iterations):
            say(f"POST /run and run, {number + 1} of {options.iterations}")
            milliseconds, answer = client.timed("POST", "/run", true)
            if answer["exit_code"] != 0:
                fail(f"POST /run: {answer}")
            raw["http_run"].append(milliseconds)
            raw["cli_run"].append(timed(cli, cwd=agentkernel.project))
        client.call("POST", "/sandboxes", {"name": "bench-http", "workspace": "none"})
        try:
            command = {"command": [BUSYBOX, "true"]}
            client.call("POST", "/sandboxes/bench-http/exec", command)
            for number in range(4):
                say(f"exec over HTTP and over the supervisor, {number + 1} of 4")
                figures = agentkernel.benchmark(EXECS, BUSYBOX, "true")
                raw["supervisor_exec"] += figures["runs_ms"][1:]
                raw["agent_exec"] += figures["agent_ms"]
                for _ in range(EXECS):
                    raw["http_exec"].append(client.timed("POST", "/sandboxes/bench-http/exec", command)[0])
        finally:
            agentkernel.forget("bench-http")
        raw["wrk"] = {path: wrk(url + path) for path in ("/health", "/sandboxes")}
        raw["listeners"] = listeners(url, process)
        raw["at_once"] = at_once(url)
    return raw


def wrk(url):
    """What wrk says of a route."""
    if not shutil.which("wrk"):
        fail("wrk is not installed: scripts/install-packages bench")
    say(f"wrk on {urlsplit(url).path}")
    words = ["wrk", f"-d{WRK_SECONDS}s", f"-c{WRK_CONNECTIONS}", f"-t{WRK_THREADS}", "--latency", url]
    text = run(words).decode()
    units = {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}
    value, unit = re.search(r"99%\s+([0-9.]+)(us|ms|s|m)", text).groups()
    errors = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    sockets = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    return {
        "requests_per_second": float(re.search(r"Requests/sec:\s+([0-9.]+)", text).group(1)),
        "p99_ms": float(value) * units[unit],
        "errors": int(errors.group(1)) if errors else 0,
        "socket_errors": sum(map(int, sockets.groups())) if sockets else 0,
    }


def listeners(url, process):
    """What clients of /events take of the server's memory."""
    say(f"{LISTENERS} clients that listen")
    before = resident(process)
    host, port = urlsplit(url).hostname, urlsplit(url).port
    connections = []
    try:
        for _ in range(LISTENERS):
            connection = socket.create_connection((host, port), timeout=LIMIT)
            connection.sendall(f"GET /events HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
            connections.append(connection)
        answered = sum(connection.recv(4096).startswith(b"HTTP/1.1 200") for connection in connections)
        time.sleep(1)
        return {"of": LISTENERS, "answered": answered, "before_bytes": before, "with_bytes": resident(process)}
    finally:
        for connection in connections:
            connection.close()


def at_once(url):
    """Commands at once, each with an answer of its own."""
    say(f"{AT_ONCE} POST /run at once")
    right, threads, lock = [0], [], threading.Lock()

    def one(number):
        answer = Client(url).call("POST", "/run", {"command": ["sh", "-c", f"echo {number}"]})
        with lock:
            right[0] += answer["output"] == f"{number}\n" and answer["exit_code"] == 0

    begun = time.perf_counter()
    for number in range(AT_ONCE):
        threads.append(threading.Thread(target=one, args=(number,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return {"of": AT_ONCE, "right": right[0], "seconds": time.perf_counter() - begun}


def rows(raw):
    """Lines of the table."""
    if "http_run" not in raw:
        return
    middle = {name: statistics.median(raw[name]) for name in ("http_run", "cli_run", "http_exec", "supervisor_exec")}
    for text, name in (("POST /run, true", "http_run"), ("    run -- true, in turns", "cli_run")):
        said = summary(raw[name])
        yield f"{text:32}{said['p50']:.0f} ms (p95 {said['p95']:.0f}, p99 {said['p99']:.0f}, n={said['n']})"
    yield f"{'    of the command line':32}{middle['http_run'] / middle['cli_run']:.2f}"
    for text, name in (("exec over HTTP", "http_exec"), ("    over the supervisor", "supervisor_exec")):
        said = summary(raw[name])
        yield f"{text:32}{said['p50']:.2f} ms (p95 {said['p95']:.2f}, p99 {said['p99']:.2f}, n={said['n']})"
    yield f"{'    added':32}{middle['http_exec'] - middle['supervisor_exec']:.2f} ms"
    for path, said in raw["wrk"].items():
        yield f"{f'wrk {path}':32}{said['requests_per_second']:.0f}/s, p99 {said['p99_ms']:.1f} ms, " \
            f"{said['errors']} errors, {said['socket_errors']} of sockets"
    many = raw["listeners"]
    yield f"{'clients of /events':32}{many['answered']} of {many['of']}: {many['with_bytes'] / MIB:.0f} MiB resident, " \
        f"{many['before_bytes'] / MIB:.0f} without them"
    many = raw["at_once"]
    yield f"{'POST /run at once':32}{many['right']} of {many['of']} right, {many['seconds']:.1f} s"
