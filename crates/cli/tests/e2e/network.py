"""A small world beside the sandbox's: `here DIRECTORY` is this machine in it, `there` everything else.

There are a public address, cloud metadata, private addresses and a name server (dnsmasq), all of which answer.
"""
import os
import socket
import subprocess
import sys
import threading

THERE = ["203.0.113.7", "169.254.169.254", "10.0.0.1", "192.168.7.1", "100.64.0.9"]
ZONE = {"good.zone": "203.0.113.7", "meta.zone": "169.254.169.254", "inner.zone": "10.0.0.1",
        "secret.denied": "203.0.113.7", "other.example": "203.0.113.7"}


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def serve(address):
    """Says which address was reached."""
    server = socket.create_server((address, 80), backlog=128)

    def accept():
        while True:
            client, _ = server.accept()
            client.sendall(client.getsockname()[0].encode())
            client.close()
    threading.Thread(target=accept, daemon=True).start()


def here(directory):
    with open(directory + "/resolv.conf", "w") as file:
        file.write("nameserver 203.0.113.7\n")
    subprocess.run(["mount", "--bind", directory + "/resolv.conf", "/etc/resolv.conf"], check=True)
    there = subprocess.Popen(["unshare", "--net", sys.executable, __file__, "there", directory],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert there.stdout.readline() == "born\n"
    ip("link", "set", "lo", "up")
    ip("link", "add", "outward", "type", "veth", "peer", "name", "inward")
    ip("link", "set", "inward", "netns", str(there.pid))
    ip("address", "add", "203.0.113.2/24", "dev", "outward")
    ip("link", "set", "outward", "up")
    ip("route", "add", "default", "via", "203.0.113.7")
    serve("0.0.0.0")
    there.stdin.write("linked\n")
    there.stdin.flush()
    assert there.stdout.readline() == "ready\n"
    print("ready", flush=True)
    sys.stdin.read()
    there.stdin.close()
    there.wait()


def there(directory):
    print("born", flush=True)
    assert sys.stdin.readline() == "linked\n"
    ip("link", "set", "lo", "up")
    ip("link", "set", "inward", "up")
    for address in THERE:
        ip("address", "add", address + ("/24" if address == THERE[0] else "/32"), "dev", "inward")
        serve(address)
    arguments = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
                 "--log-queries", "--log-facility=" + directory + "/queries", "--pid-file=" + directory + "/pid",
                 "--addn-hosts=" + directory + "/hosts", "--cname=alias.zone,secret.denied"]
    arguments += ["--host-record=%s,%s" % record for record in ZONE.items()]
    names = subprocess.Popen(arguments)
    import time
    while not os.path.exists(directory + "/pid"):
        assert names.poll() is None
        time.sleep(0.01)
    print("ready", flush=True)
    sys.stdin.read()
    names.terminate()
    names.wait()


if sys.argv[1] == "here":
    here(sys.argv[2])
else:
    there(sys.argv[2])
