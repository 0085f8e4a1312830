#!/usr/bin/env python3
"""Builds every case with agentkernel and with Docker, and compares what comes out, entry by entry and key by key. Then
carries images from each to the other and to skopeo, and runs them there.

    tests/differential/differential.py            all of them; as root, because Docker's daemon needs it
    tests/differential/differential.py copy env   those whose names contain one of the words; `interchange` is the second part

The program is the build's own (debug). Docker's daemon is one of our own, as in bench/bench.py. Exits with 1 if anything
differs that `cases.py` does not justify, if a justification is out of date, or docs/dockerfile.md does not list them.
"""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench")]

from docker import BUSYBOX, Docker, adopt_orphans, fail, run, target_directory  # noqa: E402
from cases import CASES  # noqa: E402

KEYS = ["Env", "Cmd", "Entrypoint", "WorkingDir", "User", "ExposedPorts", "Volumes", "Labels", "StopSignal"]
KEYS += ["Healthcheck", "OnBuild", "Shell"]
APPLETS = "sh cat chmod chown cp cut echo env false find grep id ln ls mkdir mkfifo mknod mv pwd rm rmdir sleep sort stat touch true wc"


class Daemon(Docker):
    """Docker with the base image of the cases."""

    def load_image(self):
        pass

    def build(self, tag, dockerfile, context, flags):
        environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
        words = self.command("build", "-q", "--network", "none", "-t", tag, "-f", str(dockerfile), *flags, str(context))
        done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, env=environment, timeout=300)
        return None if done.returncode == 0 else done.stderr.decode(errors="replace")[-1500:]


def base_image(directory):
    """An archive as `docker save` writes it: a static busybox, users, and a few objects that are easily lost."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w", format=tarfile.PAX_FORMAT) as archive:

        def add(name, kind=tarfile.REGTYPE, content=b"", mode=0o644, link="", xattrs=None):
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.linkname, info.size, info.mtime = kind, mode, link, len(content), 1_000_000_000
            info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
            archive.addfile(info, io.BytesIO(content))

        for name in ("bin", "dev", "etc", "home", "home/app", "proc", "root", "sys", "usr", "usr/local"):
            add(name, tarfile.DIRTYPE, mode=0o700 if name == "root" else 0o755)
        add("tmp", tarfile.DIRTYPE, mode=0o1777)
        add("bin/busybox", content=Path(BUSYBOX).read_bytes(), mode=0o755)
        for applet in APPLETS.split():
            add(f"bin/{applet}", tarfile.SYMTYPE, link="busybox", mode=0o777)
        add("etc/passwd", content=b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
        add("etc/group", content=b"root:x:0:\nusers:x:100:app\napp:x:1000:\n")
        add("lnk", tarfile.SYMTYPE, link="usr/local", mode=0o777)
        # cap_net_raw+ep, as `setcap` stores it.
        capability = bytes([1, 0, 0, 2, 0, 0x20, 0, 0]) + bytes(12)
        text = capability.decode("latin-1").encode("utf-8", "surrogateescape").decode("utf-8")
        add("capable", content=b"x", mode=0o755, xattrs={"security.capability": text})
        add("linked", content=b"one")
        add("linked2", tarfile.LNKTYPE, link="linked")
    layer = layer.getvalue()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    config = json.dumps(config).encode()
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": ["base:latest"], "Layers": ["layer.tar"]}]).encode()
    path = directory / "base.tar"
    with tarfile.open(path, "w") as archive:
        for member, content in ((name, config), ("layer.tar", layer), ("manifest.json", manifest)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def flatten(path):
    """Entries and configuration of the only image in an archive."""
    with tarfile.open(path) as archive:
        [image] = json.load(archive.extractfile("manifest.json"))
        config = json.load(archive.extractfile(image["Config"]))
        entries = {}
        for number, name in enumerate(image["Layers"]):
            content = archive.extractfile(name).read()
            if content[:2] == b"\x1f\x8b":
                content = gzip.decompress(content)
            apply(entries, number, content)
    links = {}
    for name, entry in entries.items():
        links.setdefault(entry.pop("inode"), []).append(name)
    for names in links.values():
        for name in names:
            if len(names) > 1 and entries[name]["type"] != "directory":
                entries[name]["links"] = sorted(names)
    return entries, config


def apply(entries, number, content):
    """Lays one layer over what is there."""
    own = set()
    with tarfile.open(fileobj=io.BytesIO(content)) as layer:
        for info in layer:
            name = "/" + info.name.strip("/").removeprefix("./")
            if name in ("/", "/."):
                continue
            parent, _, last = name.rpartition("/")
            if last == ".wh..wh..opq":
                remove(entries, parent, own, below=True)
                continue
            if last.startswith(".wh."):
                remove(entries, f"{parent}/{last[4:]}", own)
                continue
            entry = describe(layer, info, number, entries)
            if entry["type"] != "directory" or entries.get(name, {}).get("type") != "directory":
                remove(entries, name, own)
            entries[name] = entry
            own.add(name)


def remove(entries, name, own, below=False):
    for other in [other for other in entries if other.startswith(f"{name}/") or (other == name and not below)]:
        if other not in own:
            del entries[other]


def describe(layer, info, number, entries):
    if info.islnk():
        return dict(entries["/" + info.linkname.strip("/").removeprefix("./")])
    kinds = {tarfile.DIRTYPE: "directory", tarfile.SYMTYPE: "link", tarfile.CHRTYPE: "char", tarfile.BLKTYPE: "block"}
    kind = kinds.get(info.type, "fifo" if info.type == tarfile.FIFOTYPE else "file")
    entry = {"type": kind, "owner": f"{info.uid}:{info.gid}", "inode": (number, info.name)}
    if kind != "link":
        entry["mode"] = oct(info.mode & 0o7777)
    if kind == "link":
        entry["target"] = info.linkname
    if kind in ("char", "block"):
        entry["device"] = (info.devmajor, info.devminor)
    if kind == "file":
        content = layer.extractfile(info).read()
        entry["size"], entry["content"] = len(content), hashlib.sha256(content).hexdigest()[:16]
        entry["text"] = content[:200]
    xattrs = {k: v for k, v in info.pax_headers.items() if k.startswith("SCHILY.xattr.")}
    if xattrs:
        entry["xattrs"] = sorted(xattrs.items())
    return entry


def settings(config):
    """What the image says, without what says nothing and without our own labels."""
    own = config.get("config") or {}
    labels = {k: v for k, v in (own.get("Labels") or {}).items() if not k.startswith("agentkernel.")}
    said = {key: own.get(key) for key in KEYS} | {"Labels": labels}
    said |= {key: config.get(key) for key in ("architecture", "os", "author")}
    return {key: value for key, value in said.items() if value}


def compare(ours, theirs, justified):
    """Lines about what differs, or does no longer."""
    different = {}
    for what, left, right in (("", ours[0], theirs[0]), ("config ", settings(ours[1]), settings(theirs[1]))):
        for name in sorted({*left, *right}):
            if left.get(name) != right.get(name):
                different[f"{what}{name}"] = f"{shown(left.get(name))}, Docker: {shown(right.get(name))}"
    lines = [f"{name}: {how}" for name, how in different.items() if name not in justified]
    return lines + [f"{name} is the same: its justification is out of date" for name in justified if name not in different]


def shown(entry):
    return {k: v for k, v in entry.items() if k != "text"} if isinstance(entry, dict) else entry


def check_golden(case, ours):
    lines = []
    for path, expected in case["golden"].items():
        entry = ours[0].get(path, {})
        found = {"link": f"-> {entry.get('target')}", "directory": "/"}.get(entry.get("type"), entry.get("text", b"").decode())
        if found != expected:
            lines.append(f"{path}: {found!r}, should be {expected!r}")
    for label, expected in case.get("labels", {}).items():
        found = settings(ours[1]).get("Labels", {}).get(label)
        if found != expected:
            lines.append(f"label {label}: {found!r}, should be {expected!r}")
    return lines


def write_context(case, directory):
    context = directory / "context"
    context.mkdir(parents=True)
    for name, value in case["context"].items():
        path = context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            path.mkdir(exist_ok=True)
        elif isinstance(value, tuple) and value[0] == "->":
            path.symlink_to(value[1])
        else:
            text, mode = value if isinstance(value, tuple) else (value, 0o644)
            path.write_text(text)
            path.chmod(mode)
    if "setup" in case:
        subprocess.run(["sh", "-ec", case["setup"]], cwd=context, check=True)
    return context


class Agentkernel:
    def __init__(self, program, state):
        self.program = program
        self.environment = {**os.environ, "AGENTKERNEL_HOME": str(state)}

    def call(self, *words, cwd=None):
        words = [str(word) for word in (self.program, *words)]
        return subprocess.run(words, capture_output=True, env=self.environment, stdin=subprocess.DEVNULL, cwd=cwd, timeout=400)

    def must(self, *words):
        done = self.call(*words)
        if done.returncode != 0:
            fail(f"agentkernel {' '.join(map(str, words))}: {done.stderr.decode(errors='replace')}")
        return done.stdout

    def build(self, tag, dockerfile, context, flags, cwd):
        done = self.call("build", "-q", "-t", tag, "-f", dockerfile, *flags, context, cwd=cwd)
        return None if done.returncode == 0 else done.stderr.decode(errors="replace")[-1500:]


@contextlib.contextmanager
def served(case):
    """The Dockerfile and flags of a case, with a server for what it fetches, if it fetches anything."""
    if "served" not in case:
        yield case["dockerfile"], []
        return

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = case["served"].get(self.path.split("?")[0].lstrip("/"))
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        yield case["dockerfile"].replace("SERVER", f"http://{place}"), ["--allow", place]
        server.shutdown()


def one(case, agentkernel, docker, scratch):
    """What differs in one case."""
    with served(case) as (dockerfile, network):
        return compared(case, dockerfile, network, agentkernel, docker, scratch)


def compared(case, whole, network, agentkernel, docker, scratch):
    directory = Path(tempfile.mkdtemp(dir=scratch))
    context = write_context(case, directory)
    flags = case.get("flags", [])
    golden = "golden" in case
    results = []
    for tag, text in [*case.get("first", {}).items(), ("result", whole)]:
        dockerfile = directory / f"{tag}.Dockerfile"
        if tag == "result" and (context / "Dockerfile.dockerignore").exists():
            dockerfile = context / "Dockerfile"
        dockerfile.write_text(text)
        own = flags if tag == "result" else []
        if problem := agentkernel.build(tag, dockerfile, context, [*own, *network], directory):
            return [f"agentkernel cannot build {tag}: {problem}"]
        # Secrets are read relative to where the command was typed.
        theirs = [flag.replace("src=context", f"src={context}") for flag in own]
        if not golden and (problem := docker.build(tag, dockerfile, context, theirs)):
            return [f"Docker cannot build {tag}: {problem}"]
    done = agentkernel.call("images", "save", "result", "-o", directory / "ours.tar")
    if done.returncode:
        return [done.stderr.decode(errors="replace")]
    ours = flatten(directory / "ours.tar")
    if golden:
        results = check_golden(case, ours)
    else:
        run(docker.command("save", "result", "-o", str(directory / "theirs.tar")))
        results = compare(ours, flatten(directory / "theirs.tar"), case.get("differences", {}))
    shutil.rmtree(directory)
    return results


TRAVELLER = """FROM base
ENV WHO=me
RUN echo "built for $WHO" > /said && mkdir -p /gone/x && chown app /said && chmod 640 /said
RUN rm -r /gone
USER app
WORKDIR /home/app
ENTRYPOINT ["/bin/sh", "-c", "id -u; pwd; echo $WHO $0; cat /said; ls -d /gone || echo gone"]
CMD ["argument"]
"""
SAID = "1000\n/home/app\nme argument\nbuilt for me\ngone\n"


def interchange(agentkernel, docker, scratch):
    """An image of each, read by the others: what it holds, and what it says when it is run."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    context = directory / "context"
    context.mkdir()
    dockerfile = directory / "Dockerfile"
    dockerfile.write_text(TRAVELLER)
    for problem in (agentkernel.build("ours", dockerfile, context, [], directory), docker.build("theirs", dockerfile, context, [])):
        yield "the traveller is built", problem, None
    ours, theirs, again = directory / "ours.tar", directory / "theirs.tar", directory / "again.tar"
    agentkernel.must("images", "save", "ours", "-o", ours)
    run(docker.command("save", "theirs", "-o", str(theirs)))

    run(docker.command("load", "-i", str(ours)))
    yield "ours, run by Docker", run(docker.command("run", "--rm", "--network", "none", "agentkernel-ours")).decode(), SAID
    agentkernel.must("images", "load", theirs)
    yield "Docker's, run by agentkernel", agentkernel.must("run", "--image", "theirs").decode(), SAID

    store = scratch / "state/images"
    inspected = json.loads(run(["skopeo", "inspect", "--config", f"oci:{store}:docker.io/library/agentkernel-ours:latest"]))
    yield "our store, inspected by skopeo", inspected["config"]["Entrypoint"][0], "/bin/sh"
    run(["skopeo", "copy", "--quiet", f"oci:{store}:docker.io/library/agentkernel-ours:latest", f"docker-archive:{again}:ours:latest"])
    yield "our store, copied by skopeo", "; ".join(compare(flatten(again), flatten(ours), {})), ""
    run(["skopeo", "copy", "--quiet", f"docker-archive:{theirs}", f"oci:{directory / 'layout'}:carried"])
    agentkernel.must("images", "load", directory / "layout", "--tag", "carried")
    yield "a layout of skopeo's, run by agentkernel", agentkernel.must("run", "--image", "carried").decode(), SAID
    agentkernel.must("images", "prune")
    run(["skopeo", "copy", "--quiet", f"oci:{store}:docker.io/library/theirs:latest", f"oci:{directory / 'pruned'}"])


def other_engine(agentkernel, docker, scratch):
    """`--engine docker`: Docker's image runs in a sandbox, and goes where it is removed."""
    context = Path(tempfile.mkdtemp(dir=scratch))
    (context / "Dockerfile").write_text("FROM base\nCOPY Dockerfile /said\nCMD cat /said\n")
    directory = Path(docker.client).parent
    agentkernel.environment |= {"DOCKER_HOST": f"unix://{docker.socket}", "PATH": f"{directory}:{os.environ['PATH']}"}
    agentkernel.must("build", "-t", "made", "--engine", "docker", context)
    yield "Docker's engine, run", agentkernel.must("run", "--image", "made").decode(), "FROM base\nCOPY Dockerfile /said\nCMD cat /said\n"
    labels = json.loads(run(docker.command("image", "inspect", "--format", "{{json .Config.Labels}}", "agentkernel-made")))
    yield "its labels", labels["agentkernel.name"], "made"
    agentkernel.must("images", "rm", "made")
    listed = run(docker.command("images", "-q", "agentkernel-made")).decode()
    yield "removed here, removed there", listed, ""
    agentkernel.must("build", "-t", "made", "--engine", "docker", context)
    reachable = agentkernel.environment["DOCKER_HOST"]
    agentkernel.environment["DOCKER_HOST"] = f"unix://{context}/nowhere"
    yield "out of reach: nothing is forgotten", agentkernel.call("images", "sync").returncode, 1
    agentkernel.environment["DOCKER_HOST"] = reachable
    yield "in reach: all is there", agentkernel.must("images", "sync").decode(), ""
    run(docker.command("rmi", "agentkernel-made"))
    yield "gone there: forgotten here", agentkernel.must("images", "sync").decode(), "made\n"


def check_documents(cases):
    """Differences that docs/dockerfile.md does not have, word for word."""
    text = (ROOT / "docs/dockerfile.md").read_text()
    lines = [f"| {case['name']} | `{what}` | {why} |" for case in cases for what, why in case.get("differences", {}).items()]
    return [f"docs/dockerfile.md lacks: {line}" for line in lines if line not in text]


def main():
    wanted = sys.argv[1:]
    cases = [case for case in CASES if not wanted or any(word in case["name"] for word in wanted)]
    if os.geteuid() != 0:
        fail("Docker's daemon needs root")
    target = target_directory()
    program = target / "debug/agentkernel"
    if not program.exists():
        fail("build first: cargo build --locked -p agentkernel")
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = []

    def report(name, result, problems):
        print(f"{name:28} {'differs' if problems else result}", flush=True)
        for line in problems:
            print(f"    {line}", flush=True)
        failed.extend([name] if problems else [])

    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="differential.", dir=target)))
        agentkernel = Agentkernel(program, scratch / "state")
        (scratch / "state").mkdir(mode=0o700)
        archive = base_image(scratch)
        agentkernel.must("images", "load", archive)
        docker = stack.enter_context(Daemon())
        run(docker.command("load", "-i", str(archive)))
        print(f"{len(cases)} cases, Docker {docker.version()}, BuildKit", flush=True)
        for case in cases:
            result = "as the reference has it" if "golden" in case else "same"
            if justified := case.get("differences"):
                result = f"same but for {', '.join(justified)}"
            report(case["name"], result, one(case, agentkernel, docker, scratch))
        if not wanted or "interchange" in wanted:
            for name, found, expected in [
                *interchange(agentkernel, docker, scratch), *other_engine(agentkernel, docker, scratch)
            ]:
                report(name, "same", [] if found == expected else [f"{found!r}, should be {expected!r}"])
        report("documents", "complete", check_documents(CASES))
        report("sandboxes", "none left", [str(path) for path in (scratch / "state/sandboxes").glob("[!.]*")])
    print(f"{len(failed)} differ" + (f": {', '.join(failed)}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
