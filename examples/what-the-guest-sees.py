#!/usr/bin/env python3
"""Says what a program can see of the machine it runs on.

    agentkernel run -- /usr/bin/python3 what-the-guest-sees.py

Run it without agentkernel as well and compare. --json prints the same as one JSON object, --compare HOST GUEST prints
two such objects side by side, --write FILE leaves a file behind.
"""

import json
import os
import platform
import pwd
import sys
from pathlib import Path


def field(path, name):
    """The value of the first `name: value` line of a file below /proc."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return "unknown"


def memory():
    kib = int(field("/proc/meminfo", "MemTotal").split()[0])
    return f"{kib / 2**20:.1f} GiB"


def reach(path):
    """Whether the content of a file or directory can be had."""
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            return f"readable, {len(list(path.iterdir()))} entries"
        with path.open("rb") as file:
            return f"readable, {len(file.read())} bytes"
    except FileNotFoundError:
        return "not there"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def user():
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = "?"
    return f"{name} ({os.getuid()})"


def interfaces():
    try:
        return ", ".join(sorted(os.listdir("/sys/class/net"))) or "none"
    except FileNotFoundError:
        return "none"


def processes():
    """Programs, and the kernel's own threads, which have no command line."""
    programs, threads = 0, 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", name, "cmdline").read_bytes()
        except OSError:
            continue
        programs, threads = (programs + 1, threads) if words else (programs, threads + 1)
    return f"{programs}, and {threads} of the kernel"


def facts():
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "host name": platform.node(),
        "processor": field("/proc/cpuinfo", "model name"),
        "processors": str(os.cpu_count()),
        "memory": memory(),
        "processes": processes(),
        "network": interfaces(),
        "user": user(),
        "python": platform.python_version(),
        "this directory": os.getcwd(),
        ".env in it": reach(".env"),
        "~/.ssh": reach("~/.ssh"),
        "/etc/shadow": reach("/etc/shadow"),
        "/etc/passwd": reach("/etc/passwd"),
        "/var/log": reach("/var/log"),
    }


def cell(text, width):
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= width else text[: width - 3] + "..."


def compare(host, guest, width=38):
    yield f"{'':16}{'this host':{width + 2}}the guest"
    for name in host:
        left, right = cell(host[name], width), cell(guest.get(name, ""), width)
        yield f"{name:16}{left:{width + 2}}{right}"


def main(arguments):
    if arguments[:1] == ["--compare"]:
        host, guest = (json.loads(Path(name).read_text()) for name in arguments[1:3])
        print("\n".join(compare(host, guest)))
        return
    seen = facts()
    if "--json" in arguments:
        print(json.dumps(seen))
    else:
        print("\n".join(f"{name:16}{value}" for name, value in seen.items()))
    if "--write" in arguments:
        name = arguments[arguments.index("--write") + 1]
        Path(name).write_text(f"written by Linux {platform.release()} on {platform.node()}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
