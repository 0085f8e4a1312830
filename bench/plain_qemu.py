"""QEMU as anybody would start it, with its own user network (`-netdev user`): the same kernel, processor and accelerator
as agentkernel's machines, a static busybox for a root file system."""

import contextlib
import json
import os
import platform
import stat
import subprocess
import tempfile
from pathlib import Path

from docker import BUSYBOX, fail

# A machine takes seconds. Now and then a kernel waits for ever, on a busy host, for an interrupt that was lost as it booted.
LIMIT, ATTEMPTS = 20, 10
PROGRAM = "qemu-system-x86_64"
# What its network calls the host.
HOST = "10.0.2.2"
MODULES = ("virtio_net",)
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
{modules}
ifconfig lo 127.0.0.1 up
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
route add default gw 10.0.2.2
echo "=== begin"
{script}
echo "=== end"
poweroff -f
"""


def newc(entries):
    """A cpio archive of the kind the kernel unpacks (newc): `entries` are names, modes, contents."""
    archive = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        archive += b"\0" * (-len(archive) % 4)
        archive += content
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)


def run_script(state, script, accelerator):
    """Boots a machine, runs a shell script in it and returns what that printed. `state`: agentkernel's state directory,
    whose kernel it is."""
    record = json.loads((state / "cache/kernel/current.json").read_text())
    directory = state / "cache/kernel" / record["directory"]
    names = [module["name"] for module in record["modules"]]
    if not all(name in names for name in MODULES):
        fail(f"the guest's kernel has no modules {', '.join(MODULES)}")
    init = INIT.format(modules="\n".join(f"insmod /{name}.ko" for name in names), script=script)
    directories = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "proc", "sys", "tmp")]
    modules = [(f"{name}.ko", stat.S_IFREG | 0o644, (directory / f"{name}.ko").read_bytes()) for name in names]
    programs = [
        ("bin/busybox", stat.S_IFREG | 0o755, Path(BUSYBOX).read_bytes()),
        ("init", stat.S_IFREG | 0o755, init.encode()),
    ]
    with tempfile.NamedTemporaryFile(suffix=".cpio") as initramfs:
        initramfs.write(newc([*directories, *modules, *programs]))
        initramfs.flush()
        is_kvm = accelerator == "kvm"
        # As agentkernel's own machines are run.
        options = "" if is_kvm else " mitigations=off init_on_alloc=0"
        command = [
            PROGRAM, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-M", "microvm,acpi=on,usb=off,pcie=off,auto-kernel-cmdline=off",
            "-accel", "kvm" if is_kvm else "tcg,thread=multi,tb-size=256",
            "-cpu", "host" if is_kvm else "max,erms=off,fsrm=off,la57=off,smap=off,pku=off",
            "-smp", str(min(4, os.cpu_count())), "-m", "1024M",
            "-kernel", directory / record["kernel"]["name"], "-initrd", initramfs.name,
            "-append", f"console=ttyS0 quiet loglevel=3 panic=-1 reboot=t no_timer_check{options}",
            "-serial", "stdio",
            "-global", "virtio-mmio.force-legacy=false",
            "-netdev", "user,id=network", "-device", "virtio-net-device,netdev=network",
        ]
        for _ in range(ATTEMPTS):
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
                break
        else:
            fail(f"the plain machine did not end within {LIMIT} s, {ATTEMPTS} times")
    said = done.stdout.decode(errors="replace").replace("\r", "")
    _, begun, rest = said.partition("=== begin\n")
    inside, ended, _ = rest.partition("=== end")
    if not begun or not ended:
        fail(f"the plain machine on {platform.machine()} did not run its script: {said[-2000:]}{done.stderr.decode()[-2000:]}")
    return inside
