//! The supervisor: one process per live sandbox, parent of its machine, server of its files and clients.
//!
//! ```text
//!            spawn                 HELLO answered            configured
//! starting ────────► booting ────────────────► configuring ────────────► running
//!     │                 │                           │                      │ lease ends, stop, SIGTERM, deadline,
//!     │                 │                           │                      │ machine dies
//!     └─────────────────┴───────────────────────────┴──────────────────────┴──► ending ──► removed, or resting
//! ```
//! It is started with its lease (a socket whose other end the client holds) as standard input and its locked lock file
//! as standard output, so no descriptor numbers need be trusted. The machine is started from the main thread, which
//! lives as long as the process: parent-death signals fire on thread exit. Before the machine's first byte is read the
//! process confines itself; every thread started later inherits that.
//!
//! However it ends, the machine is ended too: in order if the sandbox is to stay, at once if it goes. If this process
//! itself is killed, the parent-death signal kills the machine, and the client, or any later command's sweep, puts the
//! directory right. A sandbox that rests and has a deadline keeps this process, without its lock, to wait for that.

mod clients;
mod clock;
mod confine;
mod detached;
mod machine;
mod network;
mod relay;
mod session;
mod still;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

pub use agentkernel_network::Proxy;

use crate::problem::{Problem, io, os, plain};
use crate::spec::Spec;
use crate::state::SandboxDirectory;

/// Name of the control socket in the sandbox's directory.
pub(crate) const CONTROL_SOCKET: &str = "control.sock";

/// Runs the supervisor of the sandbox in `directory` until the sandbox is gone or rests. `program` is the one with the
/// hidden verbs: ours; `proxy` is the one of the host's environment.
///
/// # Errors
/// What made the start fail; the holder of the lease was told the same.
pub fn main(directory: PathBuf, program: &Path, proxy: Option<Proxy>) -> Result<(), Problem> {
    // A session of its own: neither Ctrl-C at the terminal nor its end is for the supervisor.
    let _ = rustix::process::setsid();
    let inherited = Inherited::take()?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    raise_descriptor_limit();
    let sandbox = SandboxDirectory::open(directory)?;
    std::env::set_current_dir(sandbox.path()).map_err(io(format!("enter {}", sandbox.path().display())))?;
    let spec = Spec::load(sandbox.path())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(32)
        .thread_keep_alive(std::time::Duration::from_secs(60))
        .build()
        .map_err(io("start the supervisor"))?;
    let result = runtime.block_on(session::run(spec, &sandbox, program, proxy, inherited));
    // Threads that serve files may still wait for the disk; the machine they worked for is gone.
    runtime.shutdown_background();
    match result {
        Ok(session::End::Gone) => Ok(()),
        Ok(session::End::Resting) => crate::deadline::reap(sandbox.path().to_owned()),
        Err(problem) => Err(problem),
    }
}

/// Takes as many descriptors as the host allows: the guest's open files are descriptors of this process.
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
}

/// What the client handed over.
struct Inherited {
    lease: std::os::unix::net::UnixStream,
    lock: File,
}

impl Inherited {
    fn take() -> Result<Self, Problem> {
        let clone = |fd: std::os::fd::BorrowedFd<'_>| -> Result<OwnedFd, Problem> {
            fd.try_clone_to_owned().map_err(io("take over the lease"))
        };
        let lease = std::os::unix::net::UnixStream::from(clone(std::io::stdin().as_fd())?);
        let lock = File::from(clone(std::io::stdout().as_fd())?);
        if lease.local_addr().is_err() || !lock.metadata().is_ok_and(|metadata| metadata.is_file()) {
            let hint = "this verb is for agentkernel itself";
            return Err(plain("usage", "a supervisor is started by agentkernel run", Some(hint)));
        }
        let null = File::options().read(true).write(true).open("/dev/null").map_err(io("open /dev/null"))?;
        rustix::stdio::dup2_stdin(&null).map_err(os("let go of standard input"))?;
        rustix::stdio::dup2_stdout(&null).map_err(os("let go of standard output"))?;
        Ok(Self { lease, lock })
    }
}
