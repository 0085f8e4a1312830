//! The life of one machine, from its start to its end. One file though it is long: all of it works on one state, in the
//! order of that life; what a client does in it has files of its own.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agentkernel_machine::accelerator::Accelerator;
use agentkernel_network::{Flow, Published};
use agentkernel_protocol::control::{ControlReply, Event, LeaseInput};
use agentkernel_protocol::frame;
use agentkernel_protocol::message::{
    Assemble, Configure, File, Furnish, Identity, Programs, Reply, Request, Root, Writable,
};
use agentkernel_protocol::mux::{self, Opener};
use agentkernel_protocol::record::Port;
use serde_bytes::ByteBuf;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::clients::{self, Clients, Stop};
use super::clock;
use super::confine::{Reach, confine, confine_thread};
use super::still::Still;
use super::{CONTROL_SOCKET, Inherited, Proxy, machine, network, relay};
use crate::collect;
use crate::deadline::{self, Clocks, unix_ms};
use crate::exports::{Exports, mounts};
use crate::lifecycle;
use crate::problem::{Problem, io, plain, problem};
use crate::project::WorkspaceMode;
use crate::record::Record;
use crate::saved::{self, From, Restore};
use crate::spec::{Image, Spec, new_uuid};
use crate::state::{Live, Phase, SandboxDirectory, fill_random, random_word};
use crate::trust::Authorities;

const MACHINE_ENDED: &str = "machine-ended";
/// Time between SIGTERM and SIGKILL where nobody said another.
const GRACE_MS: u32 = 10_000;
/// How much longer than its programs' grace a guest may take to write back and end.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(30);
/// Longest time between two looks at the deadline: it may be moved.
const GLANCE: Duration = Duration::from_secs(5);

/// How long an emulated machine may take before it is taken for one that hangs, and another is started; many times the
/// usual. About one kernel in some hundred waits for ever, on a busy host, for an interrupt that was lost as it booted.
const BOOT_LIMITS: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(45)];
/// How long a machine may take to go on from where it was saved; 0.1 s is usual.
const RESTORE_LIMIT: Duration = Duration::from_secs(60);

/// How long a machine may take from its start to the agent's greeting. Many times the usual 0.2 s under hardware
/// virtualisation and 1.5 s under emulation: a busy host is no error.
fn boot_deadline(accelerator: Accelerator) -> Duration {
    match accelerator {
        Accelerator::Kvm => Duration::from_secs(20),
        Accelerator::Tcg => Duration::from_secs(90),
    }
}

/// What a machine needs to be told once it greets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// Everything: it was booted.
    All,
    /// Who it is, and what it shares: it was a template.
    Furniture,
    /// Who it is: it was another sandbox.
    Identity,
}

/// What a machine is started with, however often that is tried.
struct Ground<'a> {
    program: &'a Path,
    lock: &'a std::fs::File,
    reach: &'a Reach,
    published: &'a [Published],
}

/// A machine whose agent has something to say.
struct Up {
    started: machine::Started,
    port: Port<UnixStream>,
    needs: Needs,
    /// A fresh emulator has loaded it.
    is_loaded: bool,
    epoch: u32,
    /// What a guest that was booted is told to trust.
    authorities: Vec<ByteBuf>,
}

/// What is left of the sandbox.
pub(super) enum End {
    /// Nothing.
    Gone,
    /// Its directory, which this process does not hold any more.
    Resting,
}

/// Why a machine is ended that could have lived on.
enum Wish {
    /// Whoever wanted it is gone, or done.
    LeaseEnded,
    /// It is to stop.
    Stop(Stop),
    /// Its time is up.
    Expired,
}

/// Runs the sandbox until it is to end or its machine dies; then removes it or lets it rest.
pub(super) async fn run(
    spec: Spec,
    sandbox: &SandboxDirectory,
    program: &Path,
    proxy: Option<Proxy>,
    inherited: Inherited,
) -> Result<End, Problem> {
    let Inherited { lease, lock } = inherited;
    let mut lease = Lease::new(lease)?;
    let session = Session {
        spec: Arc::new(spec),
        sandbox: sandbox.clone(),
        proxy,
        temporary: sandbox.is_temporary(),
        record: Record::open(sandbox.path()),
        live: RefCell::new(Live {
            protocol: agentkernel_protocol::VERSION,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            phase: Phase::Starting,
            supervisor: std::process::id(),
            machine: None,
            accelerator: None,
            started_unix_ms: unix_ms(),
        }),
        ending: Cell::new(false),
    };
    let outcome = session.live(program, &mut lease, &lock).await;
    match &outcome {
        Ok(_) => {}
        Err(problem) => session.record.say("died", &problem.message),
    }
    let gone = session.temporary || matches!(outcome, Ok(Wish::Expired));
    if gone {
        match &outcome {
            Err(problem) => lease.send(&Event::Failed(problem.clone())).await,
            Ok(Wish::Expired) => {
                let expired = plain("expired", "the sandbox's time is up: it was removed", None);
                lease.send(&Event::Failed(expired)).await;
            }
            Ok(_) => {}
        }
        sandbox.remove_in_place();
    } else {
        session.rest(outcome.is_ok());
        // Only now: whoever is told may start it again at once.
        drop(lock);
        if let Err(problem) = &outcome {
            lease.send(&Event::Failed(problem.clone())).await;
        }
    }
    match outcome {
        Ok(Wish::Stop(stop)) => stop.answer(ControlReply::Done).await,
        // Whoever waited was told; a sandbox that stays may still have a deadline to wait for.
        Err(problem) if gone => return Err(problem),
        Ok(_) | Err(_) => {}
    }
    Ok(if gone { End::Gone } else { End::Resting })
}

struct Session {
    spec: Arc<Spec>,
    sandbox: SandboxDirectory,
    /// Of the host's environment.
    proxy: Option<Proxy>,
    temporary: bool,
    record: Record,
    live: RefCell<Live>,
    /// The machine is being ended: its death is no news.
    ending: Cell<bool>,
}

impl Session {
    fn enter(&self, phase: Phase) -> Result<(), Problem> {
        self.live.borrow_mut().phase = phase;
        self.sandbox.write_live(&self.live.borrow()).map_err(io("write the sandbox's state"))
    }

    /// Leaves the directory as that of a stopped sandbox.
    fn rest(&self, in_order: bool) {
        if in_order {
            self.record.say("stopped", "");
        }
        crate::executions::mark_lost(self.sandbox.path());
        for name in [CONTROL_SOCKET, "live.json"] {
            let _ = std::fs::remove_file(self.sandbox.path().join(name));
        }
    }

    async fn live(&self, program: &Path, lease: &mut Lease, lock: &std::fs::File) -> Result<Wish, Problem> {
        self.enter(Phase::Starting)?;
        let listener = UnixListener::bind(CONTROL_SOCKET).map_err(io("open the control socket"))?;
        let terminate = signal(SignalKind::terminate()).map_err(io("listen to signals"))?;
        if self.proxy.as_ref().is_some_and(|proxy| !network::is_usable(proxy)) {
            let text = "the environment's proxy is not used: only those of http:// are spoken to";
            self.record.say("warning", text);
        }
        let restore = self.restore()?;
        let exports = Arc::new(Exports::open(&self.spec, &self.sandbox)?);
        let published = crate::network::publish(&self.spec, &self.sandbox)?;
        tracing::debug!("the supervisor is up");
        let reach = Reach {
            read: exports.read_roots(),
            write: exports.write_roots(),
            own: self.sandbox.path().to_owned(),
        };
        let ground = Ground { program, lock, reach: &reach, published: &published };
        let Some(up) = self.come_up(&ground, lease, restore, &exports).await? else {
            return Ok(Wish::LeaseEnded);
        };
        // The network has them.
        drop(published);
        confine(&reach).map_err(|message| {
            plain("confinement", format!("the supervisor cannot confine itself: {message}"), None)
        })?;
        tracing::debug!("the machine's process runs");
        let machine = up.started.machine.clone();
        // As long as the machine.
        let _network = up.started.network.clone();
        let wish = Rc::new(RefCell::new(None));
        let talk = self.converse(&exports, &listener, up, lease, terminate, &wish);
        let ended = tokio::select! {
            result = talk => result,
            exit = machine.wait() => {
                if self.ending.get() { Ok(()) } else { Err(machine_ended(&exit.to_string())) }
            }
        };
        let outcome = match ended {
            // A machine that dies takes its port along: its own last words explain more than the broken stream.
            Err(problem) if problem.code != MACHINE_ENDED => {
                match tokio::time::timeout(Duration::from_millis(500), machine.wait()).await {
                    Ok(exit) => Err(machine_ended(&exit.to_string())),
                    Err(_) => Err(explained(problem, machine.explain())),
                }
            }
            Err(problem) => Err(problem),
            Ok(()) => Ok(wish.borrow_mut().take().unwrap_or(Wish::LeaseEnded)),
        };
        if self.ending.get() {
            // It was asked to; what it has not written by now it never will.
            machine.stop(Duration::from_secs(5)).await;
        } else {
            // The directory may go only when nothing writes into it any more.
            end(&*machine).await;
        }
        if !self.temporary {
            self.write_back();
        }
        outcome
    }

    /// The saved machine that the sandbox goes on from, if there is one.
    fn restore(&self) -> Result<Option<Restore>, Problem> {
        // Its programs are to run on, which no boot brings back.
        let own = self.sandbox.path().join(saved::OWN).exists();
        match Restore::take(&self.sandbox) {
            // A template only saves time.
            Err(problem) if problem.code == "saved-damaged" && !own => {
                self.record.say("warning", &problem.message);
                Ok(None)
            }
            restore => restore,
        }
    }

    /// Has the machine go on from `restore`, or boots it. Nothing that the guest says is read here: this process is not
    /// confined yet.
    async fn come_up(
        &self,
        ground: &Ground<'_>,
        lease: &mut Lease,
        restore: Option<Restore>,
        exports: &Exports,
    ) -> Result<Option<Up>, Problem> {
        let Some(restore) = restore else { return self.boot(ground, lease).await };
        let (from, directory) = (restore.from, restore.directory.clone());
        let (shorter, longer) = restore.ways()?;
        let mut resumed = self.resume(ground, lease, shorter, exports).await;
        if let (Err(problem), Some(longer)) = (&resumed, longer) {
            let text =
                format!("the machine's process did not go on, its devices are loaded: {}", problem.message);
            tracing::info!("{text}");
            self.record.say("warning", &text);
            if ["machine-resume", "restore"].contains(&problem.code.as_ref()) {
                saved::forget_process(&directory);
            }
            // It may have come far enough to write.
            let disk = self.sandbox.path().join(crate::disk::FILE_NAME);
            std::fs::remove_file(&disk).map_err(io("replace the disk"))?;
            crate::disk::copy(&directory.join(crate::disk::FILE_NAME), &disk)?;
            resumed = self.resume(ground, lease, longer, exports).await;
        }
        let failed = match resumed {
            Ok(up) => return Ok(up),
            Err(problem) => problem,
        };
        if from == From::Sandbox {
            return Err(failed);
        }
        // A template only saves time. Its disk is a whole one, whatever its memory is.
        crate::templates::forget(self.sandbox.home(), &directory);
        self.record.say("warning", &format!("a template was not used: {}", failed.message));
        self.boot(ground, lease).await
    }

    /// Has a machine go on from where it was saved.
    async fn resume(
        &self,
        ground: &Ground<'_>,
        lease: &mut Lease,
        restore: Restore,
        exports: &Exports,
    ) -> Result<Option<Up>, Problem> {
        let Restore { from, machine, epoch, tables, fingerprint, flows, .. } = restore;
        exports.adopt(&tables, from)?;
        let is_loaded = machine.process.is_none();
        let epoch =
            epoch.checked_add(1).ok_or_else(|| plain("restore", "it was restored too often", None))?;
        let mut started = self.start_machine(ground, Some((machine, &fingerprint)), flows).await?;
        tracing::debug!("the machine's process is jailed");
        let mut port = Port::new(started.take_stream()?);
        port.hail(epoch).await.map_err(|error| problem("restore", &error, None))?;
        let came_up = self.wait_for(&started, &port, lease, RESTORE_LIMIT).await;
        let Some(came_up) = came_up else { return Ok(None) };
        // Nothing is read here; but a stream that has ended is no answer.
        let readable = tokio::io::Interest::READABLE;
        let has_ended =
            !came_up || port.get_ref().ready(readable).await.is_ok_and(|ready| ready.is_read_closed());
        if has_ended {
            let ended = tokio::time::timeout(Duration::from_millis(500), started.machine.wait()).await;
            let words = match ended {
                Ok(exit) => exit.to_string(),
                Err(_) => started.machine.explain().unwrap_or_else(|| "it says nothing".to_owned()),
            };
            end(&*started.machine).await;
            return Err(plain("restore", format!("the saved machine does not go on: {words}"), None));
        }
        let needs = if from == From::Template { Needs::Furniture } else { Needs::Identity };
        Ok(Some(Up { started, port, needs, is_loaded, epoch, authorities: Vec::new() }))
    }

    /// Starts the machine, again if it does not come up; `None` if nobody waits for it any more.
    async fn boot(&self, ground: &Ground<'_>, lease: &mut Lease) -> Result<Option<Up>, Problem> {
        let trusted = Authorities::read(self.spec.certificates.as_deref());
        for warning in &trusted.warnings {
            self.record.say("warning", warning);
        }
        let mut limits = BOOT_LIMITS.iter();
        loop {
            let mut started = self.start_machine(ground, None, Vec::new()).await?;
            let mut port = Port::new(started.take_stream()?);
            let epoch = 1;
            port.hail(epoch).await.map_err(|error| problem("boot", &error, None))?;
            let limit = limits.next().filter(|_| started.accelerator == Accelerator::Tcg);
            let up = |started, port| {
                let authorities = trusted.certificates.clone();
                Ok(Some(Up { started, port, needs: Needs::All, is_loaded: false, epoch, authorities }))
            };
            // The last one gets all the time there is, where its answer is read.
            let Some(limit) = limit else { return up(started, port) };
            match self.wait_for(&started, &port, lease, *limit).await {
                Some(true) => return up(started, port),
                Some(false) => {}
                None => return Ok(None),
            }
            end(&*started.machine).await;
            let text =
                format!("the machine did not come up within {} s and is started again", limit.as_secs());
            tracing::info!("{text}");
            self.record.say("warning", &text);
        }
    }

    async fn start_machine(
        &self,
        ground: &Ground<'_>,
        restore: Option<(agentkernel_machine::qemu::Restore, &saved::Fingerprint)>,
        broken: Vec<Flow>,
    ) -> Result<machine::Started, Problem> {
        let Ground { program, lock, reach, published } = *ground;
        let watched = reach.clone();
        let watchers = move || confine_thread(&watched);
        let log = self.record.console();
        let network = network::start(&self.spec, self.sandbox.path(), self.proxy.clone(), published, broken)?;
        let started =
            machine::start(&self.spec, &self.sandbox, program, lock, restore, network, log, watchers).await?;
        {
            let mut live = self.live.borrow_mut();
            live.machine = Some(started.machine.process());
            live.accelerator = Some(started.accelerator.name().to_owned());
        }
        self.enter(Phase::Starting)?;
        Ok(started)
    }

    /// Whether the machine's agent says something within the limit, or the machine ends, which is told where its words are
    /// read; `None`, and the machine is ended, if nobody waits for it any more.
    async fn wait_for(
        &self,
        started: &machine::Started,
        port: &Port<UnixStream>,
        lease: &mut Lease,
        limit: Duration,
    ) -> Option<bool> {
        tokio::select! {
            readable = port.get_ref().readable() => Some(readable.is_ok()),
            _ = started.machine.wait() => Some(true),
            () = lease.ended() => {
                end(&*started.machine).await;
                None
            }
            () = tokio::time::sleep(limit) => Some(false),
        }
    }

    /// What the machine's process wrote reaches the host's disk before the sandbox counts as stopped.
    fn write_back(&self) {
        let disk = self.sandbox.path().join(crate::disk::FILE_NAME);
        let synced = std::fs::File::open(&disk).and_then(|disk| disk.sync_all());
        if let Err(error) = synced {
            self.record.say("warning", &format!("the writable layer could not be written back: {error}"));
        }
    }

    /// Greets and configures the guest, serves clients until there is a reason to end, and ends in order.
    #[allow(clippy::too_many_arguments)]
    async fn converse(
        &self,
        exports: &Arc<Exports>,
        listener: &UnixListener,
        up: Up,
        lease: &mut Lease,
        terminate: Signal,
        wish: &RefCell<Option<Wish>>,
    ) -> Result<(), Problem> {
        let Up { started, mut port, needs, is_loaded, epoch, authorities } = up;
        let rehearse = is_loaded && started.accelerator == Accelerator::Tcg;
        let deadline = boot_deadline(started.accelerator);
        tokio::select! {
            greeting = tokio::time::timeout(deadline, port.answer()) => match greeting {
                Ok(Ok(answer)) => tracing::debug!("the agent greets, kernel {}", answer.kernel),
                Ok(Err(error)) => return Err(problem("boot", &error, None)),
                Err(_) => return Err(boot_timeout(deadline)),
            },
            () = lease.ended() => return Ok(()),
        }
        let (opener, driver) = mux::host(port.session());
        let talk = async {
            tokio::select! {
                configured = tokio::time::timeout(deadline, configure(self.configuration(needs, rehearse, authorities), exports, &opener)) => {
                    configured.map_err(|_| boot_timeout(deadline))??;
                }
                () = lease.ended() => return Ok(()),
            }
            tracing::debug!("the guest is configured");
            self.enter(Phase::Running)?;
            let how = self.live.borrow().accelerator.clone().unwrap_or_default();
            self.record.say("started", &how);
            lease.send(&Event::Ready).await;
            let (stops, stop_requests) = mpsc::channel(16);
            let clients = Arc::new(Clients::new(
                opener.clone(),
                self.spec.clone(),
                self.sandbox.path().to_owned(),
                exports.clone(),
                Still::new(
                    started.machine.clone(),
                    started.network.clone(),
                    opener.clone(),
                    epoch,
                    self.sandbox.is_template(),
                ),
                stops,
            ));
            let reason = tokio::select! {
                never = clients::accept(listener, &clients) => match never {},
                never = self.follow(&clients) => match never {},
                reason = self.reason(lease, exports, &opener, terminate, stop_requests) => reason,
            };
            let grace_ms = match &reason {
                Wish::Stop(stop) => stop.grace_ms,
                Wish::LeaseEnded | Wish::Expired => GRACE_MS,
            };
            // One that stands still can neither be asked nor listen.
            let _ = clients.still().resume().await;
            let in_order = !self.temporary && !matches!(reason, Wish::Expired);
            *wish.borrow_mut() = Some(reason);
            if in_order {
                // A full disk must not keep the guest from its own.
                if let Err(problem) = self.enter(Phase::Stopping) {
                    self.record.say("warning", &problem.message);
                }
                self.ending.set(true);
                self.shut_down(&opener, grace_ms).await;
            }
            Ok(())
        };
        tokio::select! {
            result = talk => result,
            error = driver => if self.ending.get() { Ok(()) } else { Err(broken_by_guest(&error)) },
        }
    }

    /// Shows in `live.json` whether the machine is paused.
    async fn follow(&self, clients: &Clients) -> std::convert::Infallible {
        let mut paused = clients.still().watch();
        loop {
            // The sender lives as long as the clients.
            let _ = paused.changed().await;
            let phase = if *paused.borrow_and_update() { Phase::Paused } else { Phase::Running };
            if let Err(problem) = self.enter(phase) {
                self.record.say("warning", &problem.message);
            }
            self.record.say(if phase == Phase::Paused { "paused" } else { "resumed" }, "");
            clients.still().show(phase == Phase::Paused);
        }
    }

    fn configuration(&self, needs: Needs, rehearse: bool, authorities: Vec<ByteBuf>) -> Configure {
        let spec = &self.spec;
        let assemble = (needs == Needs::All).then(|| Assemble {
            root: match &spec.image {
                Image::Host { .. } => Root::FileSystem { tag: Exports::HOST.into() },
                Image::Disk { .. } => Root::Disk { serial: machine::IMAGE_SERIAL.into() },
            },
            writable: Writable::Disk { serial: machine::WRITABLE_SERIAL.into() },
            prepare: if self.sandbox.is_template() { Exports::WORKSPACE.into() } else { String::new() },
            authorities,
            link: network::link(),
        });
        // A template is saved before it is anybody's.
        let furnish = needs != Needs::Identity && !self.sandbox.is_template();
        let furnish = furnish.then(|| self.furniture());
        Configure { assemble, identity: identity(spec), furnish, rehearse }
    }

    fn furniture(&self) -> Furnish {
        let spec = &self.spec;
        let mut files = Vec::new();
        if !lifecycle::is_initialised(self.sandbox.path()) {
            files.extend(spec.files.iter().map(|file| File {
                path: ByteBuf::from(file.path.as_os_str().as_encoded_bytes()),
                mode: file.mode,
                content: file.content.clone(),
            }));
        }
        Furnish {
            read_only: spec.read_only_root,
            process_limit: spec.process_limit(),
            mounts: mounts(spec),
            directories: spec.directories(),
            files,
        }
    }

    /// Waits until there is a reason to end.
    async fn reason(
        &self,
        lease: &mut Lease,
        exports: &Arc<Exports>,
        opener: &Opener,
        mut terminate: Signal,
        mut stops: mpsc::Receiver<Stop>,
    ) -> Wish {
        let mut leased = true;
        loop {
            tokio::select! {
                input = lease.input(), if leased => match input {
                    None => return Wish::LeaseEnded,
                    Some(LeaseInput::LiveOn) => {
                        leased = false;
                        lease.send(&Event::Ready).await;
                    }
                    Some(LeaseInput::Finish) => {
                        let event = tokio::select! {
                            event = self.finish(exports, opener) => event,
                            () = lease.ended() => return Wish::LeaseEnded,
                        };
                        lease.send(&event).await;
                        lease.ended().await;
                        return Wish::LeaseEnded;
                    }
                },
                Some(stop) = stops.recv() => return Wish::Stop(stop),
                _ = terminate.recv() => return Wish::Stop(Stop { grace_ms: GRACE_MS, client: None }),
                () = self.expiry() => return Wish::Expired,
            }
        }
    }

    /// Waits until the sandbox's time is up.
    async fn expiry(&self) {
        loop {
            let left = deadline::read(self.sandbox.path()).map(|deadline| deadline.left(&Clocks::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return;
            }
            tokio::time::sleep(left.unwrap_or(GLANCE).min(GLANCE)).await;
        }
    }

    /// Collects the changes of a copy-on-write workspace.
    async fn finish(&self, exports: &Exports, opener: &Opener) -> Event {
        let shared = self.spec.workspace.as_ref();
        if shared.is_none_or(|workspace| workspace.mode != WorkspaceMode::Cow) {
            return Event::Finished { changes: 0, problem: None };
        }
        let directory = self.sandbox.path();
        match collect::changes(opener, Programs::End, &self.spec, directory, exports).await {
            Ok(changes) => Event::Finished { changes, problem: None },
            Err(problem) => Event::Finished { changes: 0, problem: Some(problem) },
        }
    }

    /// Has the guest end its programs and write back. One that does not is ended anyhow: its journal holds what it wrote.
    async fn shut_down(&self, opener: &Opener, grace_ms: u32) {
        let limit = Duration::from_millis(u64::from(grace_ms)) + SHUTDOWN_PATIENCE;
        let ask = async {
            let mut stream = opener.open().await.ok()?;
            frame::write(&mut stream, &Request::Shutdown { grace_ms }).await.ok()?;
            frame::read::<Reply, _>(&mut stream).await.ok()
        };
        if tokio::time::timeout(limit, ask).await.is_err() {
            self.record.say("warning", "the guest did not shut down in time and was ended");
        }
    }
}

/// The guest sent what no agent of ours sends; the innermost error says what.
fn broken_by_guest(error: &dyn std::error::Error) -> Problem {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let hint = "something in the guest, which only its root can be, wrote on the agent's port; the sandbox was ended";
    plain("guest-protocol", format!("the guest broke its agent's protocol: {cause}"), Some(hint))
}

/// Adds what the console says.
fn explained(mut problem: Problem, words: Option<String>) -> Problem {
    if let Some(words) = words {
        problem.message = format!("{}; its console says: {words}", problem.message);
    }
    problem
}

fn machine_ended(reason: &str) -> Problem {
    plain(MACHINE_ENDED, format!("the machine ended: {reason}"), None)
}

fn boot_timeout(deadline: Duration) -> Problem {
    plain(
        "boot-timeout",
        format!("the machine did not start within {} s", deadline.as_secs()),
        Some("agentkernel doctor"),
    )
}

/// Serves the files, tells the machine who it is, and waits until it is ready.
async fn configure(wish: Configure, exports: &Exports, opener: &Opener) -> Result<(), Problem> {
    let wire = |error: &dyn std::error::Error| problem("guest-protocol", error, None);
    // The wish tells the time.
    let told = Instant::now();
    for export in exports.iter() {
        let mut stream = opener.open().await.map_err(|error| wire(&error))?;
        let request = Request::FileSystem { tag: export.tag.clone(), read_only: export.read_only };
        frame::write(&mut stream, &request).await.map_err(|error| wire(&error))?;
        let server = export.server.clone();
        tokio::spawn(async move {
            if let Err(error) = relay::serve_files(stream, server).await
                && !error.is_disconnect()
            {
                tracing::warn!("the guest's file requests are refused from here on: {error}");
            }
        });
    }
    let mut stream = opener.open().await.map_err(|error| wire(&error))?;
    let request = Request::Configure(Box::new(wish));
    frame::write(&mut stream, &request).await.map_err(|error| wire(&error))?;
    match frame::read::<Reply, _>(&mut stream).await.map_err(|error| wire(&error))? {
        Reply::Done if told.elapsed() <= clock::CLOSE => Ok(()),
        Reply::Done => clock::set(opener)
            .await
            .ok_or_else(|| plain("guest-setup", "the guest does not take the time".to_owned(), None)),
        Reply::Failed { message } => {
            Err(plain("guest-setup", format!("the guest cannot be set up: {message}"), None))
        }
    }
}

/// Fresh at each start and each restore.
fn identity(spec: &Spec) -> Identity {
    let mut entropy = vec![0; 64];
    fill_random(&mut entropy);
    Identity {
        hostname: spec.name.clone(),
        unix_time_ns: deadline::unix_ns(),
        entropy: ByteBuf::from(entropy),
        machine_id: spec.machine_id.clone(),
        boot_id: new_uuid(unix_ms()),
        generation: random_word(),
        hosts: ByteBuf::from(spec.hosts()),
        resolver: ByteBuf::from(spec.resolver()),
    }
}

/// Ends a machine and waits until it is gone.
async fn end(machine: &dyn agentkernel_machine::Machine) {
    machine.kill();
    let _ = tokio::time::timeout(Duration::from_secs(5), machine.wait()).await;
}

/// The connection to whoever wants this sandbox to exist.
struct Lease {
    reader: tokio::net::unix::OwnedReadHalf,
    writer: tokio::net::unix::OwnedWriteHalf,
}

impl Lease {
    fn new(stream: std::os::unix::net::UnixStream) -> Result<Self, Problem> {
        stream.set_nonblocking(true).map_err(io("take over the lease"))?;
        let (reader, writer) = UnixStream::from_std(stream).map_err(io("take over the lease"))?.into_split();
        Ok(Self { reader, writer })
    }

    /// Tells the holder; one that is gone already needs no news.
    async fn send(&mut self, event: &Event) {
        let _ = frame::write(&mut self.writer, event).await;
    }

    /// What the holder wishes next; `None` once it is gone.
    async fn input(&mut self) -> Option<LeaseInput> {
        frame::read(&mut self.reader).await.ok()
    }

    /// Waits until the holder is gone.
    async fn ended(&mut self) {
        while self.input().await.is_some() {}
    }
}
