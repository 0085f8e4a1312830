"""The section of the bench about the network: beside Docker's bridge and QEMU's own user network."""

import contextlib
import re
import statistics
import subprocess
import sys
import time

import plain_qemu
from docker import BUSYBOX, fail, run
from measure import MIB, PYTHON, say

DOWNLOAD = 200 * MIB
CONNECTIONS, CONNECTION_BYTES = 100, MIB
CONNECTS = 200

# Serves /N with N bytes; prints its port. The bytes differ from block to block, so that one that is lost is missed.
SERVER = r"""
import http.server, sys
BLOCK = bytes(range(256)) * 4096
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        size = int(self.path.strip("/") or 0)
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("Connection", "close")
        self.end_headers()
        sent = 0
        while sent < size:
            block = sent.to_bytes(8, "big") + BLOCK[8:]
            sent += self.wfile.write(block[: size - sent])
    def log_message(self, *_):
        pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024
server = Server((sys.argv[1], 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""

# Downloads, and prints how long that took by the guest's own clock, s. Both ends of it are busybox's.
WGET = "read -r a _ </proc/uptime; {busybox} wget -q -O /dev/null http://{host}:{port}/{size} || exit 1; " \
    "read -r b _ </proc/uptime; echo $a $b"

# Opens connections at once, each of which loads as much; prints how many came whole, and the seconds.
MANY = r"""
import hashlib, socket, sys, threading, time
host, port, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
BLOCK = bytes(range(256)) * 4096
expected = hashlib.sha256()
for start in range(0, size, len(BLOCK)):
    expected.update((start.to_bytes(8, "big") + BLOCK[8:])[: size - start])
begin, whole = threading.Barrier(count), []
def load():
    begin.wait()
    with socket.create_connection((host, port), timeout=120) as connection:
        connection.sendall(f"GET /{size} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        data = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    whole.append(hashlib.sha256(data.split(b"\r\n\r\n", 1)[1]).digest() == expected.digest())
threads = [threading.Thread(target=load) for _ in range(count)]
begun = time.perf_counter()
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sum(whole), time.perf_counter() - begun)
"""

# Connects to the host's server and to one in the guest itself, in turns; prints both times, ms.
LATENCY = r"""
import socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
own = socket.create_server(("127.0.0.1", 0), backlog=1024)
def connect(target):
    begun = time.perf_counter()
    connection = socket.create_connection(target)
    took = (time.perf_counter() - begun) * 1e3
    connection.close()
    return took
for _ in range(count):
    inside = connect(own.getsockname())
    own.accept()[0].close()
    print(connect((host, port)), inside)
"""

HOST = "192.0.0.1"


@contextlib.contextmanager
def served(address, *before):
    """A server at an address; its port. `before`: what it is started with."""
    server = subprocess.Popen([*before, sys.executable, "-c", SERVER, address], stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline().strip()
        if not line:
            fail(f"the server at {address} did not start")
        yield int(line)
    finally:
        server.kill()
        server.wait()


def speed(said):
    begun, ended = map(float, said.split()[-2:])
    return DOWNLOAD / MIB / max(0.01, ended - begun)


def section_network(agentkernel, engines, options):
    """downloads, connections: beside QEMU's own user network and Docker's bridge"""
    rounds = options.rounds
    raw = {"download": [], "download_plain": [], "download_docker": [], "connect": [], "connect_inside": []}
    accelerator = agentkernel.benchmark(1, BUSYBOX, "true")["accelerator"]
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(served("127.0.0.1"))
        sandbox = stack.enter_context(
            agentkernel.sandbox("network", "--workspace", "none", "--allow", f"127.0.0.1:{port}")
        )
        ours = agentkernel.exec_command(
            sandbox, BUSYBOX, "sh", "-c", WGET.format(busybox=BUSYBOX, host=HOST, port=port, size=DOWNLOAD)
        )
        plain = WGET.format(busybox=BUSYBOX, host=plain_qemu.HOST, port=port, size=DOWNLOAD)
        docker, theirs = engines.docker, None
        if docker and docker.bridge:
            theirs = stack.enter_context(in_container(docker))
        for number in range(rounds):
            say(f"downloads, {number + 1} of {rounds}")
            raw["download"].append(speed(run(ours).decode()))
            raw["download_plain"].append(speed(plain_qemu.run_script(agentkernel.state, plain, accelerator)))
            if theirs:
                raw["download_docker"].append(speed(run(theirs).decode()))
        say(f"{CONNECTIONS} connections at once")
        words = (PYTHON, "-c", MANY, HOST, str(port), str(CONNECTIONS), str(CONNECTION_BYTES))
        whole, seconds = run(agentkernel.exec_command(sandbox, *words)).decode().split()
        raw["connections"] = {"whole": int(whole), "of": CONNECTIONS, "seconds": float(seconds)}
        say(f"{CONNECTS} connections one after the other")
        words = (PYTHON, "-c", LATENCY, HOST, str(port), str(CONNECTS))
        for line in run(agentkernel.exec_command(sandbox, *words)).decode().splitlines():
            outside, inside = map(float, line.split())
            raw["connect"].append(outside)
            raw["connect_inside"].append(inside)
    return raw


@contextlib.contextmanager
def in_container(docker):
    """The command that downloads in a container on Docker's bridge, from a server at the host's end of that."""
    container = run(docker.command("run", "-d", docker.IMAGE, "sleep", "86400")).decode().strip()
    inside = ["nsenter", "--net", "--target", str(docker.process.pid)]
    try:
        deadline = time.monotonic() + 10
        while not (found := re.search(r"inet ([0-9.]+)", run([*inside, "ip", "-4", "addr", "show", "docker0"]).decode())):
            if time.monotonic() > deadline:
                fail("Docker's bridge has no address")
            time.sleep(0.1)
        gateway = found.group(1)
        with served(gateway, *inside) as port:
            words = WGET.format(busybox="/bin/busybox", host=gateway, port=port, size=DOWNLOAD)
            yield docker.command("exec", container, "sh", "-c", words)
    finally:
        run(docker.command("rm", "-f", container))


def rows(raw):
    """Lines of the table that no pair of times makes."""
    if "connections" not in raw:
        return
    many = raw["connections"]
    yield f"{'connections at once':32}{many['whole']} of {many['of']} whole, {many['seconds']:.1f} s"
    added = statistics.median(raw["connect"]) - statistics.median(raw["connect_inside"])
    yield f"{'connect, added by the network':32}{added:.2f} ms"
