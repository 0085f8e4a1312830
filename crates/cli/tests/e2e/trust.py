"""Talks to two TLS servers in this machine, one signed by an authority that is to be known, one by another."""

import http.server
import os
import ssl
import subprocess
import sys
import threading
import zipfile

WHEEL = "thing-1.0-py3-none-any.whl"
with zipfile.ZipFile("/tmp/wheel", "w") as wheel:
    wheel.writestr("thing.py", "")
    wheel.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    wheel.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr("thing-1.0.dist-info/RECORD", "")


def content(name):
    with open(name, "rb") as file:
        return file.read()


PAGES = {
    "/hello": b"hello",
    "/" + WHEEL: content("/tmp/wheel"),
    "/thing": b'{"name": "thing", "dist-tags": {"latest": "1.2.3"}, "versions": {"1.2.3":'
    b' {"name": "thing", "version": "1.2.3", "dist": {}}}}',
    "/repository/info/refs": b"0123456789012345678901234567890123456789\trefs/heads/main\n",
    "/repository/HEAD": b"ref: refs/heads/main\n",
    "/list.crl": content("list.crl"),
}


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        page = PAGES.get(self.path.split("?")[0])
        self.send_response(200 if page else 404)
        self.send_header("Content-Length", str(len(page or b"")))
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        pass


def serve(name):
    server = Server(("127.0.0.1", 0), Pages)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(name + ".server")
    # The handshake in the connection's own thread: a client that waits holds up nobody.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return "https://localhost:%d" % server.server_address[1]


NODE = "require('https').get('URL/hello', r => r.pipe(process.stdout)).on('error', e => { throw e })"
PYTHON = "import urllib.request; print(urllib.request.urlopen('URL/hello').read())"
# With nothing but what lies in the file system.
BARE = ["env", "-i", "HOME=/tmp", "PATH=" + os.environ["PATH"]]
CLIENTS = {
    "python": ["/usr/bin/python3", "-c", PYTHON],
    "pip": ["/usr/bin/python3", "-m", "pip", "--retries=0", "download", "--no-deps", "-d", "/tmp/PORT", "URL/" + WHEEL],
    "node": ["node", "-e", NODE],
    "npm": ["npm", "view", "thing", "version", "--registry=URL/", "--fetch-retries=0"],
    "git": ["git", "ls-remote", "URL/repository"],
    "curl": ["curl", "-sSf", "URL/hello"],
    # Compiled a little only, which is quicker where a processor is emulated.
    "java": ["keytool", "-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC", "-printcrl", "-file", "URL/list.crl"],
    "bare curl": BARE + ["curl", "-sSf", "URL/hello"],
    "bare git": BARE + ["git", "ls-remote", "URL/repository"],
}
SAID = {"pip": "Saved", "npm": "1.2.3", "git": "refs/heads/main", "bare git": "refs/heads/main", "java": "X.509 CRL"}

urls = [serve("known"), serve("unknown")]
for name, words in CLIENTS.items():
    outcome = []
    for url in urls:
        words_now = [word.replace("URL", url).replace("PORT", url[-5:]) for word in words]
        ended = subprocess.run(words_now, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        text = ended.stdout.decode(errors="replace")
        good = ended.returncode == 0 and SAID.get(name, "hello") in text
        refused = ended.returncode != 0 and "certif" in text.lower()
        outcome.append("works" if good else "refused" if refused else "fails: " + text)
    print(name + ":", *outcome)
    sys.stdout.flush()
