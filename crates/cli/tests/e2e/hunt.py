"""As guest root: looks for a marker in every way the guest offers; prints each find."""
import os, subprocess, sys

marker, home, state, secret = sys.argv[1].encode(), *sys.argv[2:]
found = []

def look(path, limit=1 << 20):
    try:
        with open(path, "rb") as file:
            if marker in file.read(limit):
                found.append(path)
    except OSError:
        pass

print("control:", "the workspace is readable" if os.path.exists("hunt.py") else "the workspace is missing")
for path in ("/etc/shadow", "/etc/gshadow", "/etc/shadow-"):
    try:
        if open(path, "rb").read():
            found.append(path)
    except OSError:
        pass
for path in ("/etc/agentkernel-test-secret", secret, "../private.txt", "../../etc-like"):
    look(path)
for root in (home, state, "/root", "/etc/ssh"):
    for directory, _, names in os.walk(root):
        for name in names:
            if name != "hunt.py":
                look(os.path.join(directory, name))
# Mounts of its own: every file system again, elsewhere, without what lies above it.
os.makedirs("/mnt/hunt", exist_ok=True)
subprocess.run(["mount", "--bind", "/", "/mnt/hunt"], stderr=subprocess.DEVNULL)
for path in (home + "/.ssh/id_ed25519", home + "/private.txt", "/etc/agentkernel-test-secret", "/etc/shadow"):
    look("/mnt/hunt" + path)
    try:
        if path.endswith("shadow") and open("/mnt/hunt" + path, "rb").read():
            found.append("/mnt/hunt" + path)
    except OSError:
        pass
for kind in ("9p", "virtiofs"):
    for tag in ("host", "root", "workspace", "home"):
        if subprocess.run(["mount", "-t", kind, tag, "/mnt/hunt"], stderr=subprocess.DEVNULL).returncode == 0:
            found.append(f"{kind} mount of {tag}")
# Every block device from its first to its last byte that holds data.
for name in os.listdir("/sys/block"):
    try:
        device = os.open("/dev/" + name, os.O_RDONLY)
    except OSError:
        continue
    block, tail = os.read(device, 64 << 20), b""
    if marker in block:
        found.append("/dev/" + name)
    os.close(device)
# Handles of the kind that ignore paths, and processes that might hold something open.
for pid in os.listdir("/proc"):
    if pid.isdigit() and pid != str(os.getpid()):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if target.startswith("/") and not target.startswith("/dev"):
                    look(f"/proc/{pid}/fd/{fd}")
            look(f"/proc/{pid}/root{home}/private.txt")
            look(f"/proc/{pid}/root/etc/agentkernel-test-secret")
        except OSError:
            pass
print("\n".join(found) if found else "nothing found")
