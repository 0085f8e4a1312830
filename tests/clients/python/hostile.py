"""What no client should send, sent to a live server: hostile.py URL KEY-OR-EMPTY FILE-OF-THE-HOST PRIVATE-PATH...

Each is answered with a clear error, costs the server little, and leaves it as it was.
"""

import http.client
import json
import socket
import sys
import time
from urllib.parse import urlsplit

URL, KEY, ONLY_ON_THE_HOST, *PRIVATE = sys.argv[1:]
HOST, PORT = urlsplit(URL).hostname, urlsplit(URL).port
JSON = {"content-type": "application/json"}


def ask(method, path, body=None, headers=JSON, key=KEY):
    """Status and answer of a request, the path sent as it is."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=60)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in (dict(headers) | ({"x-api-key": key} if key else {})).items():
        connection.putheader(name, value)
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.getheader("x-request-id"), answer.getheaders()
    return answer.status, json.loads(text)


def refused(status, code, *request, words=(), **options):
    found, answer = ask(*request, **options)
    assert (found, answer["success"], answer["code"]) == (status, False, code), (request, found, answer)
    assert all(word in answer["error"] for word in words), answer
    told = json.dumps(answer)
    assert not any(path in told for path in PRIVATE), told
    return answer


def raw(text, wait=60):
    """What comes back for these bytes, until the server closes or is silent."""
    with socket.create_connection((HOST, PORT), timeout=wait) as connection:
        connection.sendall(text)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
                if b"\r\n\r\n" in answer and b'"request_id"' in answer:
                    break
        except TimeoutError:
            pass
        return answer


def head(path, *lines, method="POST"):
    key = [f"x-api-key: {KEY}"] if KEY else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: localhost", *key, *lines, "", ""]).encode()


def bodies():
    refused(400, "json", "POST", "/run", b"{")
    refused(400, "json", "POST", "/run", b"\xff\xfe")
    refused(400, "json", "POST", "/run", [])
    refused(400, "json", "POST", "/run", b"[" * 100_000)
    refused(400, "json", "POST", "/run", {"command": "true"}, words=["expected a sequence"])
    refused(400, "json", "POST", "/run", {"command": ["true"], "imge": "x"}, words=["unknown field `imge`", "`image`"])
    refused(400, "json", "POST", "/sandboxes", {"name": "x", "secrets": ["A=b"]}, words=["unknown field `secrets`"])
    refused(400, "json", "POST", "/sandboxes", {"name": "x", "vcpus": -1})
    refused(400, "vcpus", "POST", "/sandboxes", {"name": "x", "vcpus": 4_000_000_000})
    refused(400, "memory-size", "POST", "/sandboxes", {"name": "x", "memory_mb": 1 << 60})
    refused(400, "memory-size", "POST", "/sandboxes", {"name": "x", "memory_mb": 1})
    refused(400, "disk-size", "POST", "/sandboxes", {"name": "x", "disk_mb": 1 << 60})
    refused(400, "usage", "POST", "/run", {"command": []})
    refused(400, "usage", "POST", "/run", {"command": ["a\0b"]}, words=["NUL"])
    refused(400, "usage", "POST", "/run", {"command": ["true"] * 5000}, words=["more than 4096"])
    refused(400, "usage", "POST", "/run", {"command": ["true"], "timeout": "soon"})
    refused(400, "usage", "POST", "/run", {"command": ["true"], "env": ["HOME"]}, words=["has no value"])
    refused(400, "usage", "POST", "/run", {"command": ["true"], "allow": ["http://x"]})
    refused(400, "usage", "POST", "/run", {"command": ["true"], "workdir": "../x"})
    refused(400, "backend-unknown", "POST", "/run", {"command": ["true"], "backend": "docker"})
    for name in ("", "-x", "a/b", "..", "x" * 64, "é"):
        refused(400, "name-invalid", "POST", "/sandboxes", {"name": name})
    refused(415, "media-type", "POST", "/run", b'{"command": ["true"]}', headers={"content-type": "text/plain"})
    refused(415, "media-type", "POST", "/run", b'{"command": ["true"]}', headers={})
    refused(405, "method", "PUT", "/run", {})
    refused(404, "route", "GET", "/nothing")
    refused(404, "not-found", "GET", "/sandboxes/nobody")
    refused(404, "not-found", "GET", "/sandboxes/%2e%2e")
    refused(404, "not-found", "GET", "/sandboxes/..%2fx")
    refused(400, "query", "GET", "/audit?limit=x")
    # A command that is not there is no failure of the request.
    status, answer = ask("POST", "/run", {"command": ["nothing-of-that-name"]})
    assert (status, answer["data"]["exit_code"]) == (200, 127), answer

    # Larger than it may be: said before it is sent.
    begun = time.monotonic()
    answer = raw(head("/run", "content-type: application/json", f"content-length: {1 << 40}"), wait=10)
    assert b" 413 " in answer and b"body-too-large" in answer and time.monotonic() - begun < 5, answer
    # Also where it is read before it is known what it is for.
    for path, line in (("/run", "idempotency-key: large"), ("/mcp", "accept: application/json, text/event-stream")):
        lines = "content-type: application/json", f"content-length: {1 << 40}", line
        begun = time.monotonic()
        answer = raw(head(path, *lines), wait=10)
        assert b" 413 " in answer and b"body-too-large" in answer and time.monotonic() - begun < 5, answer
    # Two lengths, or one and pieces: only one server's reading of it.
    for lines in (["content-length: 2", "content-length: 3"], ["content-length: 1", "transfer-encoding: chunked"]):
        answer = raw(head("/run", "content-type: application/json", *lines) + b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n", wait=5)
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1, answer
    # Of unknown length: said as soon as it is too much.
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = b""
    with socket.create_connection((HOST, PORT), timeout=30) as connection:
        connection.sendall(head("/run", "content-type: application/json", "transfer-encoding: chunked"))
        try:
            for _ in range(200):
                connection.sendall(chunk)
        except OSError:
            pass
        try:
            answer = connection.recv(4096)
        except OSError:
            pass
    assert not answer or b" 413 " in answer, answer
    # Heads that are none, or without an end.
    assert b" 400 " in raw(b"NONSENSE\r\n\r\n", wait=5)
    assert b" 431 " in raw(b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n", wait=5)
    assert not raw(b"\0" * 1000, wait=5).startswith(b"HTTP/1.1 2")
    healthy()


def slow():
    """A body that does not arrive, and a head that does not: both are given up, and neither keeps another waiting."""
    with socket.create_connection((HOST, PORT), timeout=60) as body, socket.create_connection((HOST, PORT), timeout=60) as top:
        body.sendall(head("/run", "content-type: application/json", "content-length: 100") + b"{")
        top.sendall(b"GET /health HTTP/1.1\r\nhost: local")
        healthy()
        begun = time.monotonic()
        answer = body.recv(4096)
        assert b" 408 " in answer and b'"slow"' in answer and 25 < time.monotonic() - begun < 40, answer
        assert top.recv(4096)[:12] in (b"", b"HTTP/1.1 408"), "a head without an end is waited for"


def files():
    """Paths are the guest's, whatever they look like."""
    status, answer = ask("POST", "/sandboxes", {"name": "hostile", "memory_mb": 512})
    assert status == 201, answer
    for path, code in (
        ("/../../etc/passwd", "path-invalid"),
        ("/tmp/%2e%2e/etc/passwd", "path-invalid"),
        ("/tmp/..%2f..%2fetc/passwd", "path-invalid"),
        ("/tmp/x%00y", "path-invalid"),
        ("/" + "x" * 5000, "path-invalid"),
        ("/%ff", "path"),
    ):
        refused(400, code, "GET", f"/sandboxes/hostile/files{path}")
    # What only the host has, by a link of the guest's: looked up inside, where it is not.
    status, answer = ask("POST", "/sandboxes/hostile/exec", {"command": ["ln", "-s", ONLY_ON_THE_HOST, "/tmp/x-link"]})
    assert answer["data"]["exit_code"] == 0, answer
    for path in ("/tmp/x-link", "//tmp//x-link", ONLY_ON_THE_HOST):
        refused(404, "file-not-found", "GET", f"/sandboxes/hostile/files{path}")
    refused(409, "is-a-directory", "GET", "/sandboxes/hostile/files/etc")
    refused(409, "not-a-file", "GET", "/sandboxes/hostile/files/dev/zero")
    refused(409, "is-a-directory", "DELETE", "/sandboxes/hostile/files/etc")
    # Something of ours is mounted there: written, and not removed.
    assert ask("PUT", "/sandboxes/hostile/files/etc/hosts", {"content": "127.0.0.1 localhost\n"})[0] == 200
    refused(403, "file-refused", "DELETE", "/sandboxes/hostile/files/etc/hosts")
    assert ask("DELETE", "/sandboxes/hostile/files/tmp/x-link")[0] == 200
    refused(404, "file-not-found", "DELETE", "/sandboxes/hostile/files/tmp/x-link")
    refused(400, "usage", "PUT", "/sandboxes/hostile/files/tmp/x", {"content": "?", "encoding": "base64"})
    many = {"files": {"/tmp/../x": "1"}}
    refused(400, "path-invalid", "POST", "/sandboxes/hostile/files", many, words=["/tmp/../x: "])
    refused(413, "file-too-large", "PUT", "/sandboxes/hostile/files/tmp/x", {"content": "x" * ((16 << 20) + 1)})
    status, answer = ask("PUT", "/sandboxes/hostile/files/tmp/x", {"content": "x" * (16 << 20)})
    assert status == 200, answer
    status, answer = ask("DELETE", "/sandboxes/hostile")
    assert (status, answer["success"]) == (200, True), answer


def keys():
    """Ten thousand requests with a wrong key: refused, each as fast as the other, and nothing else happens."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=60)
    begun = time.monotonic()
    for number in range(10_000):
        connection.request("GET", "/sandboxes", headers={"authorization": f"Bearer {number:0{len(KEY)}}"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 401 and answer.getheader("www-authenticate") == "Bearer", answer.status
    assert time.monotonic() - begun < 60
    refused(401, "unauthorized", "GET", "/sandboxes", key="")
    # Nor is anything kept of what they make up.
    for number in range(100):
        refused(401, "unauthorized", f"M{number}", f"/made-up/{number}", key="")
    connection.request("GET", "/metrics", headers={"x-api-key": KEY})
    told = connection.getresponse().read().decode()
    assert "made-up" not in told and 'method="M' not in told and 'method="other"' in told, told
    refused(401, "unauthorized", "POST", "/mcp", {}, key="")
    status, answer = ask("GET", "/sandboxes")
    assert (status, answer["data"]) == (200, []), answer


def places():
    """Without a key no page of the web drives the server, whatever name it is reached by."""
    for headers in (
        {"host": "evil.example"},
        {"host": "localhost.evil.example"},
        {"host": f"evil.example:{PORT}"},
        {"host": "localhost", "origin": "http://evil.example"},
        {"host": "localhost", "origin": "null"},
        # A page that a sandbox serves on a published port, and one that needs no origin to ask.
        {"host": f"localhost:{PORT}", "origin": "http://localhost:8080"},
        {"host": "localhost", "sec-fetch-site": "cross-site"},
        {"host": "localhost", "sec-fetch-site": "same-site"},
    ):
        for path in ("/health", "/run", "/mcp", "/last/apply", "/sandboxes/x/stop"):
            refused(403, "not-local", "POST", path, {"command": ["true"]}, headers=JSON | headers)
    # By another address of this machine, or in the request's own line.
    assert b" 403 " in raw(b"GET http://evil.example/health HTTP/1.1\r\nhost: localhost\r\n\r\n", wait=5)
    for host in ("localhost", f"127.0.0.1:{PORT}", f"[::1]:{PORT}"):
        assert ask("GET", "/health", headers={"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"})[0] == 200
    # A page may send a form, but no JSON without asking first, and that is not answered.
    refused(415, "media-type", "POST", "/run", b"a=b", headers={"content-type": "application/x-www-form-urlencoded"})
    refused(405, "method", "OPTIONS", "/run", headers={"origin": f"http://{HOST}:{PORT}"})


def healthy():
    status, answer = ask("GET", "/health")
    assert (status, answer) == (200, {"success": True, "data": "ok"}), answer


if KEY:
    keys()
    slow()
else:
    places()
    bodies()
    files()
healthy()
print("ok")
