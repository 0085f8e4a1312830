//! Which accelerator a machine can use on this host, and why.
//!
//! A `/dev/kvm` that opens is not enough: there are hosts whose KVM is a paravirtual one without hardware behind it, on
//! which an ordinary guest kernel hangs for ever. So the processor must show `vmx` or `svm` as well. Looking is apart
//! from judging: [`Probe::read`] looks, [`judge`] is a pure function.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// How the machine's processors are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Hardware virtualisation through `/dev/kvm`.
    Kvm,
    /// QEMU's emulation in software: works everywhere, slower, and a weaker wall.
    Tcg,
}

impl Accelerator {
    /// The name QEMU and users know it by.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What was chosen and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Detection {
    /// The accelerator to use.
    pub accelerator: Accelerator,
    /// Why, in words for a user.
    pub reason: String,
    /// Whether hardware virtualisation can be used now (what `require_hardware` asks).
    pub hardware_usable: bool,
    /// What a user can do to get hardware virtualisation.
    pub remedy: Option<String>,
}

/// How opening `/dev/kvm` went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceProbe {
    /// It opened, and its API has this version.
    Api(i32),
    /// There is none.
    Missing,
    /// It is there, but not for this user.
    Denied,
    /// It cannot be used for another reason.
    Failed(String),
}

/// What a host shows about virtualisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// How opening `/dev/kvm` went.
    pub device: DeviceProbe,
    /// The processor's flags have `vmx` or `svm`.
    pub processor: bool,
    /// The module `kvm_pvm` is loaded.
    pub paravirtual: bool,
}

/// The version of KVM's API; it has not changed since Linux 2.6.22.
const KVM_API: i32 = 12;

/// Looks at this host and decides.
#[must_use]
pub fn detect() -> Detection {
    judge(&Probe::read())
}

impl Probe {
    /// Opens `/dev/kvm`, asks for its version, and reads `/proc/cpuinfo` and `/sys/module`. Starts no guest and waits for
    /// nothing.
    #[must_use]
    pub fn read() -> Self {
        let processor = crate::atomic::read(Path::new("/proc/cpuinfo"), 16 << 20).unwrap_or_default();
        Self {
            device: probe_device(Path::new("/dev/kvm")),
            processor: has_virtualisation_flag(&String::from_utf8_lossy(&processor)),
            paravirtual: Path::new("/sys/module/kvm_pvm").exists(),
        }
    }
}

fn probe_device(path: &Path) -> DeviceProbe {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(device) => match api_version(&device) {
            Ok(version) => DeviceProbe::Api(version),
            Err(error) => DeviceProbe::Failed(error.to_string()),
        },
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => DeviceProbe::Missing,
            io::ErrorKind::PermissionDenied => DeviceProbe::Denied,
            _ => DeviceProbe::Failed(error.to_string()),
        },
    }
}

/// `ioctl(KVM_GET_API_VERSION)`.
#[allow(unsafe_code)]
fn api_version(device: &File) -> Result<i32, Errno> {
    struct GetApiVersion;
    // SAFETY: KVM_GET_API_VERSION (0xAE00) takes no argument and writes to no memory; its result is its return value.
    unsafe impl rustix::ioctl::Ioctl for GetApiVersion {
        type Output = i32;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> rustix::ioctl::Opcode {
            rustix::ioctl::opcode::none(0xAE, 0)
        }
        fn as_ptr(&mut self) -> *mut std::ffi::c_void {
            std::ptr::null_mut()
        }
        unsafe fn output_from_ptr(
            output: rustix::ioctl::IoctlOutput,
            _: *mut std::ffi::c_void,
        ) -> rustix::io::Result<Self::Output> {
            Ok(output)
        }
    }
    // SAFETY: see above; a device of another kind refuses the request without side effects.
    unsafe { rustix::ioctl::ioctl(device, GetApiVersion) }
}

fn has_virtualisation_flag(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == "flags")
        .is_some_and(|(_, flags)| flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// What helps where there is nothing to repair.
const NO_HARDWARE: &str =
    "commands run, more slowly; for speed use a host with VT-x or AMD-V, or switch nested virtualisation on";

/// Decides from what was seen.
#[must_use]
pub fn judge(probe: &Probe) -> Detection {
    let emulation = |reason: String, remedy: Option<&str>| Detection {
        accelerator: Accelerator::Tcg,
        reason,
        hardware_usable: false,
        remedy: Some(remedy.unwrap_or(NO_HARDWARE).to_owned()),
    };
    match &probe.device {
        DeviceProbe::Missing if probe.processor => emulation(
            "there is no /dev/kvm, though the processor can virtualise".to_owned(),
            Some("load the module: sudo modprobe -a kvm_intel kvm_amd"),
        ),
        DeviceProbe::Missing => {
            emulation("there is no /dev/kvm, and the processor shows neither vmx nor svm".to_owned(), None)
        }
        DeviceProbe::Failed(error) => emulation(format!("/dev/kvm cannot be used: {error}"), None),
        DeviceProbe::Api(version) if *version != KVM_API => {
            emulation(format!("/dev/kvm has API version {version}, not {KVM_API}"), None)
        }
        DeviceProbe::Api(_) | DeviceProbe::Denied if probe.paravirtual => emulation(
            "/dev/kvm is a paravirtual KVM (kvm_pvm), on which ordinary guest kernels hang".to_owned(),
            None,
        ),
        DeviceProbe::Api(_) | DeviceProbe::Denied if !probe.processor => emulation(
            "/dev/kvm has no hardware behind it: the processor shows neither vmx nor svm".to_owned(),
            None,
        ),
        DeviceProbe::Denied => emulation(
            "/dev/kvm may not be opened by this user".to_owned(),
            Some("join the group kvm: sudo usermod -aG kvm \"$USER\", then log in again"),
        ),
        DeviceProbe::Api(_) => Detection {
            accelerator: Accelerator::Kvm,
            reason: "/dev/kvm works, and the processor virtualises".to_owned(),
            hardware_usable: true,
            remedy: None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kvm_with_hardware_behind_it_is_used() {
        use DeviceProbe::{Api, Denied, Failed, Missing};
        let table = [
            // device, processor, paravirtual -> hardware, a word of the reason, a word of the remedy
            (Api(12), true, false, true, "works", None),
            (Api(12), false, false, false, "neither vmx nor svm", Some("nested")),
            (Api(12), true, true, false, "kvm_pvm", Some("nested")),
            (Api(12), false, true, false, "kvm_pvm", Some("nested")),
            (Api(11), true, false, false, "version 11", Some("nested")),
            (Denied, true, false, false, "may not", Some("group kvm")),
            (Denied, true, true, false, "kvm_pvm", Some("nested")),
            (Denied, false, false, false, "neither", Some("nested")),
            (Missing, true, false, false, "no /dev/kvm", Some("modprobe")),
            (Missing, false, false, false, "no /dev/kvm", Some("nested")),
            (Failed("broken".to_owned()), true, false, false, "broken", Some("nested")),
        ];
        for (device, processor, paravirtual, hardware, reason, remedy) in table {
            let probe = Probe { device, processor, paravirtual };
            let judged = judge(&probe);
            assert_eq!(judged.hardware_usable, hardware, "{probe:?}");
            assert_eq!(judged.accelerator == Accelerator::Kvm, hardware, "{probe:?}");
            assert!(judged.reason.contains(reason), "{probe:?}: {judged:?}");
            assert_eq!(judged.remedy.is_some(), remedy.is_some(), "{probe:?}: {judged:?}");
            assert!(judged.remedy.unwrap_or_default().contains(remedy.unwrap_or_default()));
        }
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        assert!(has_virtualisation_flag("processor: 0\nflags\t\t: fpu svm\n"));
        assert!(has_virtualisation_flag("flags\t: vmx\n"));
        assert!(!has_virtualisation_flag("flags\t: svm_lock\nbugs\t: vmx svm\n"));
    }
}
