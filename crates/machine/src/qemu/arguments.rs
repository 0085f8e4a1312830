//! QEMU's command line, and the descriptors it names.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::clock::Clock;
use super::{Disk, DiskDurability, MachineConfig, NetworkCard};
use crate::accelerator::Accelerator;
use crate::jail::{Argument, FIRST_DESCRIPTOR};

/// The name under which the guest finds the agent's port.
pub const AGENT_PORT: &str = "org.agentkernel.agent";

/// What QEMU is told is the file behind a restored machine's memory; what it gets instead is decided outside the jail.
const MEMORY_PATH: &str = "/memory";
/// The set of descriptors that the state of devices is written to.
pub(super) const DEVICES_SET: &str = "/dev/fdset/100";

/// QEMU's sockets, from the first descriptor on.
pub(super) const SOCKETS: [&str; 3] = ["qmp", "agent", "console"];
/// The one that follows: its network's.
pub(super) const NETWORK: &str = "network";
/// Where it writes the state of its devices.
pub(super) const DEVICES: &str = "devices";
/// Its disks, numbered.
pub(super) const DISK: &str = "disk";
/// What it holds open, numbered.
pub(super) const HELD: &str = "held";

/// Translated code kept, in MiB. QEMU's own choice grows with the guest's memory up to 1 GiB.
const TRANSLATION_MIB: u32 = 256;

/// Kernel options for every guest.
const KERNEL_OPTIONS: &[&str] = &[
    "console=ttyS0",
    // A serial line is slow: only errors are worth their time.
    "quiet",
    "loglevel=3",
    // A panic ends the machine at once, by the one reset that needs no firmware and that QEMU takes for an exit.
    "panic=-1",
    "reboot=t",
    // The timer's wiring is QEMU's; checking it costs 50 ms.
    "no_timer_check",
    // Self-tests of ciphers are for kernels that do not come from a distribution.
    "cryptomgr.notests",
    // Landlock is for the programs that confine themselves, in the guest as elsewhere. The others of a distribution's kernel
    // have no policy here and only cost each system call its time.
    "lsm=landlock,yama",
    "audit=0",
    // Entropy from the first moment on, where the processor has it. There is no device for it: what its driver has read ahead
    // would be the same in all machines of a template. The agent gives the kernel the host's, each time.
    "random.trust_cpu=on",
];

/// Kernel options under emulation, which has no speculation that a guest's processes could watch each other by.
const EMULATION_OPTIONS: &[&str] = &[
    "mitigations=off",
    // Debian's kernel clears each page twice otherwise.
    "init_on_alloc=0",
];

/// All that QEMU can emulate, but for what only costs time there: string instructions that are advertised as fast and are
/// not, a fifth level of page tables, and a protection of the guest's kernel that ends a block of translated code each time
/// it touches a program's memory. And but for its random numbers: an emulated one draws them from a generator in QEMU's memory,
/// which all have in common that go on as one saved process.
const EMULATED_PROCESSOR: &str = "max,erms=off,fsrm=off,la57=off,smap=off,pku=off,rdrand=off,rdseed=off";

/// A command line in the making.
pub(super) struct Plan {
    arguments: Vec<Argument>,
    descriptors: Vec<OwnedFd>,
    kernel_options: Vec<String>,
}

impl Plan {
    pub(super) fn new(config: &MachineConfig) -> Self {
        let mut kernel_options: Vec<String> =
            KERNEL_OPTIONS.iter().map(|&option| option.to_owned()).collect();
        let (accelerator, processor) = match config.accelerator {
            Accelerator::Kvm => ("kvm".to_owned(), "host"),
            Accelerator::Tcg => {
                kernel_options.extend(EMULATION_OPTIONS.iter().map(|&option| option.to_owned()));
                (format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}"), EMULATED_PROCESSOR)
            }
        };
        kernel_options.extend(config.kernel_arguments.iter().cloned());
        let mut plan = Self { arguments: Vec::new(), descriptors: Vec::new(), kernel_options };
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            plan.text(flag);
        }
        plan.option("-display", "none");
        // Distribution kernels find virtio over ACPI only: Debian's ignores virtio devices named on its command line.
        plan.option(
            "-M",
            "microvm,acpi=on,usb=off,pcie=off,auto-kernel-cmdline=off,suppress-vmdesc=on,memory-backend=memory",
        );
        let size = config.memory_mib;
        plan.option(
            "-object",
            &match &config.restore {
                // Shared with nobody, but for whoever copies it when the machine is saved.
                None => format!("memory-backend-memfd,id=memory,size={size}M,share=on"),
                // What the machine writes is its own; what it does not is shared with all that are restored of it.
                Some(_) => {
                    format!("memory-backend-file,id=memory,size={size}M,share=off,mem-path={MEMORY_PATH}")
                }
            },
        );
        plan.option("-accel", &accelerator);
        plan.option("-cpu", processor);
        plan.option("-smp", &config.vcpus.to_string());
        plan.option("-m", &format!("{}M", config.memory_mib));
        plan.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        plan.option("-global", "virtio-mmio.force-legacy=false");
        plan
    }

    fn text(&mut self, text: &str) {
        self.arguments.push(Argument::Text(text.to_owned()));
    }

    fn option(&mut self, name: &str, value: &str) {
        self.text(name);
        self.text(value);
    }

    /// Passes a descriptor on; its number in QEMU.
    fn descriptor(&mut self, descriptor: OwnedFd) -> usize {
        self.descriptors.push(descriptor);
        FIRST_DESCRIPTOR as usize + self.descriptors.len() - 1
    }

    /// Comes first: a process that is saved is known by these numbers.
    pub(super) fn sockets(&mut self, qmp: OwnedFd, stream: OwnedFd, serial: OwnedFd) {
        for (name, socket) in SOCKETS.into_iter().zip([qmp, stream, serial]) {
            let number = self.descriptor(socket);
            self.option("-chardev", &format!("socket,id={name},fd={number}"));
        }
        self.option("-mon", "chardev=qmp,mode=control");
        self.option("-serial", "chardev:console");
        self.option("-device", "virtio-serial-device,max_ports=2");
        self.option("-device", &format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
    }

    pub(super) fn boot(&mut self, kernel: OwnedFd, initramfs: OwnedFd, clock: Option<Clock>) {
        if let Some(clock) = clock {
            self.kernel_options.push(format!("tsc_early_khz={}", clock.khz));
            if clock.invariant {
                self.kernel_options.push("tsc=reliable".to_owned());
            }
        }
        for (name, file) in [("-kernel", kernel), ("-initrd", initramfs)] {
            self.descriptor(file);
            self.text(name);
            self.arguments.push(Argument::Reopen(self.descriptors.len() - 1));
        }
        let options = self.kernel_options.join(" ");
        self.option("-append", &options);
    }

    /// In place of [`Self::boot`]: goes on where a saved machine stopped. Its kernel is in its memory.
    pub(super) fn restore(&mut self, devices: OwnedFd) {
        let number = self.descriptor(devices);
        // `xen-save-devices-state` leaves the section of that name out.
        self.option("-global", "migration.send-configuration=off");
        self.option("-incoming", &format!("fd:{number}"));
    }

    /// The card needs no offloads: its cable carries plain frames, and one frame is as long as it may be. A machine that was
    /// restored has nothing to announce to a network that knows it. Comes second, for the same reason as the sockets.
    pub(super) fn network(&mut self, card: NetworkCard) {
        let NetworkCard { cable, address, mtu } = card;
        let number = self.descriptor(cable.into());
        self.option("-netdev", &format!("stream,id=network,server=off,addr.type=fd,addr.str={number}"));
        let address = address.map(|byte| format!("{byte:02x}")).join(":");
        let off = [
            "csum",
            "gso",
            "guest_csum",
            "guest_tso4",
            "guest_tso6",
            "guest_ecn",
            "guest_ufo",
            "host_tso4",
            "host_tso6",
            "host_ecn",
            "host_ufo",
            "guest_announce",
        ];
        let off = off.map(|feature| format!("{feature}=off")).join(",");
        self.option(
            "-device",
            &format!("virtio-net-device,netdev=network,mac={address},host_mtu={mtu},mrg_rxbuf=on,{off}"),
        );
        self.option("-global", "migration.announce-rounds=0");
    }

    /// Where the state of the devices goes when the machine is saved.
    pub(super) fn devices(&mut self, devices: OwnedFd) {
        let number = self.descriptor(devices);
        let set = DEVICES_SET.trim_start_matches("/dev/fdset/");
        self.option("-add-fd", &format!("fd={number},set={set}"));
    }

    pub(super) fn disks(&mut self, disks: Vec<Disk>) {
        for (index, disk) in disks.into_iter().enumerate() {
            let number = self.descriptor(disk.file.into());
            let read_only = if disk.read_only { "on" } else { "off" };
            let no_flush = if disk.durability == DiskDurability::Scratch { "on" } else { "off" };
            let common =
                format!("read-only={read_only},discard=unmap,cache.direct=off,cache.no-flush={no_flush}");
            self.option("-add-fd", &format!("fd={number},set={index}"));
            self.option(
                "-blockdev",
                &format!(
                    "driver=file,node-name=file{index},filename=/dev/fdset/{index},locking=off,aio=threads,{common}"
                ),
            );
            self.option("-blockdev", &format!("driver=raw,node-name=disk{index},file=file{index},{common}"));
            // Left to itself QEMU stops the whole machine when the host's disk is full; the guest can bear an error.
            let errors = "werror=report,rerror=report";
            self.option(
                "-device",
                &format!("virtio-blk-device,drive=disk{index},serial={},{errors}", disk.serial),
            );
        }
    }

    pub(super) fn finish(mut self, inherit: Vec<OwnedFd>) -> (Vec<Argument>, Vec<OwnedFd>) {
        self.descriptors.extend(inherit);
        (self.arguments, self.descriptors)
    }
}

/// What `blockdev-reopen` is to be told so that a flush of the guest reaches the host in a machine that was started with
/// scratch disks only; of each disk its index and whether it is read-only.
pub(super) fn flushed(disks: &[(usize, bool)]) -> serde_json::Value {
    let both = |(index, is_read_only): &(usize, bool)| {
        let common = serde_json::json!({
            "read-only": is_read_only,
            "discard": "unmap",
            "cache": { "direct": false, "no-flush": false },
        });
        let node = |more: serde_json::Value| {
            let mut node = common.clone();
            if let (Some(node), serde_json::Value::Object(more)) = (node.as_object_mut(), more) {
                node.extend(more);
            }
            node
        };
        let file = format!("file{index}");
        [
            node(serde_json::json!({
                "driver": "file", "node-name": file, "filename": format!("/dev/fdset/{index}"),
                "locking": "off", "aio": "threads",
            })),
            node(serde_json::json!({ "driver": "raw", "node-name": format!("disk{index}"), "file": file })),
        ]
    };
    let options: Vec<serde_json::Value> = disks.iter().flat_map(both).collect();
    serde_json::json!({ "options": options })
}

/// What QEMU reads: itself, its loader and libraries, its firmware.
pub(super) fn readable(program: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        ["/usr/lib", "/usr/lib64", "/usr/share/qemu", "/usr/share/seabios", "/etc/ld.so.cache"]
            .into_iter()
            .map(PathBuf::from)
            .collect();
    // Hosts that have not merged /lib into /usr.
    paths.extend(["/lib", "/lib64"].map(PathBuf::from).into_iter().filter(|path| !path.is_symlink()));
    // An installation elsewhere brings its own.
    if let Some(prefix) =
        program.parent().and_then(Path::parent).filter(|prefix| *prefix != Path::new("/usr"))
    {
        paths.extend(["lib", "lib64", "share/qemu", "share/seabios"].map(|folder| prefix.join(folder)));
    }
    paths.retain(|path| path.exists());
    paths
}

pub(super) fn devices(accelerator: Accelerator) -> Vec<PathBuf> {
    let mut devices = vec![PathBuf::from("/dev/null"), PathBuf::from("/dev/urandom")];
    if accelerator == Accelerator::Kvm {
        devices.push(PathBuf::from("/dev/kvm"));
    }
    devices
}

#[cfg(test)]
mod tests {
    /// Guards that a sandbox that is to stay does not lose what its guest has synced.
    #[test]
    fn both_nodes_of_a_durable_disk_are_opened_anew_with_flushes() {
        let options = super::flushed(&[(0, false), (2, true)]);
        let nodes = options["options"].as_array().expect("a list");
        let names: Vec<_> = nodes.iter().filter_map(|node| node["node-name"].as_str()).collect();
        assert_eq!(names, ["file0", "disk0", "file2", "disk2"]);
        assert!(nodes.iter().all(|node| node["cache"]["no-flush"] == false));
        assert_eq!((&nodes[0]["filename"], &nodes[1]["file"]), (&"/dev/fdset/0".into(), &"file0".into()));
        assert_eq!((&nodes[1]["read-only"], &nodes[3]["read-only"]), (&false.into(), &true.into()));
    }
}
