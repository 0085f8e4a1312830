//! Templates: machines that were booted once, for others to begin with.
//!
//! ```text
//! HOME/templates/KEY/         a saved machine; KEY says of what: image, size, kernel, program
//! HOME/templates/KEY.lock     held exclusively by who makes or removes it, shared by who begins with it
//! HOME/templates/KEY.used     when it was used last
//! ```
//! The first start of a combination boots an ordinary temporary sandbox that is nobody's, runs a few programs in it so
//! that they are in its memory, saves it, and ends it. Every start, the first included, then goes on from a private copy:
//! the machine takes on an identity and is furnished before anything of the user's runs. A template holds no secret, no
//! name and no file of a project.
//!
//! A template is good as long as everything it was made of is the same: program, kernel, QEMU and size, the image, the
//! bundles of certificates, and for the `host` image every file of the host that its guest has looked at. It is not synced to the disk, so one that a former boot of
//! the host made is not used either. The emulator's process is saved as well, with what it has translated, so that others go
//! on as it; its libraries must be the same then, too. Whatever is wrong with one, it is made again: it only saves time.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use agentkernel_protocol::message::{Exec, ExecInput, ExecOutput};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::client::{self, Life, Sandbox, Warmth};
use crate::configuration::{CommandPolicy, Profile};
use crate::deadline::{Clocks, unix_ms};
use crate::disk;
use crate::exports::Exports;
use crate::files::table;
use crate::network::NetworkSpec;
use crate::problem::{Problem, io, plain};
use crate::saved::{self, Draft, Fingerprint, From, SavedMachine};
use crate::spec::{Defaults, Image, Spec, fresh_machine_id, new_uuid};
use crate::state::{Home, SandboxDirectory, TEMPLATE, TEMPLATE_PREFIX, private_file, random_word, replace};
use crate::trust;

/// What a template is of, in its directory.
const ABOUT: &str = "about.json";
/// How long another's making of the same template is waited for.
const PATIENCE: Duration = Duration::from_secs(90);
/// Most bytes that all templates take together; the ones used longest ago go first.
const BYTES_LIMIT: u64 = 6 << 30;
/// Most templates.
const COUNT_LIMIT: usize = 64;
/// How long one program of the warming up may take, milliseconds.
const WARM_UP_MS: u64 = 10_000;
/// What is run so that it is in the template's memory, as far as it is there. What most commands need.
const WARM_UP: &[&[&str]] = &[&["/bin/true"], &["/bin/sh", "-c", ":"]];
/// The same with the host's own programs.
const WARM_UP_HOST: &[&[&str]] =
    &[&["/usr/bin/python3", "-c", "pass"], &["/bin/bash", "-c", ":"], &["/bin/ls", "/"]];

/// Programs that are looked for in the directories of `PATH`, so that the guest knows where there are none of them.
const LOOKED_FOR: &str =
    "true sh bash ls cat git make env python python3 pip node npm npx cargo rustc go java ruby php perl";

/// Raised with every change of what is done in a template before it is saved.
const RECIPE: u32 = 6;

/// What a template was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    fingerprint: Fingerprint,
    image: String,
    /// Directories of the host besides the usual ones, or what tells the image's file from another.
    detail: String,
    /// The authorities that its guest trusts.
    authorities: trust::State,
    /// Boot of the host.
    boot_id: String,
    /// What was done before it was saved.
    recipe: u32,
}

impl About {
    fn of(home: &Home, spec: &Spec) -> Result<Self, Problem> {
        let (image, detail) = match &spec.image {
            Image::Host { toolchains, .. } => ("host".to_owned(), format!("{toolchains:?}")),
            Image::Disk { path, name } => {
                use std::os::unix::fs::MetadataExt;
                let data = fs::metadata(path).map_err(io(format!("read {}", path.display())))?;
                (name.clone(), format!("{} {} {}", path.display(), data.ino(), data.len()))
            }
        };
        let fingerprint = Fingerprint::now(home, spec)?;
        let authorities = trust::State::now(spec.certificates.as_deref());
        Ok(Self { fingerprint, image, detail, authorities, boot_id: Clocks::now().boot_id, recipe: RECIPE })
    }

    /// Names the directory. The image's name is for people: its content is what counts.
    fn key(&self) -> String {
        let mut named = self.clone();
        named.image.clear();
        let text = serde_json::to_vec(&named).unwrap_or_default();
        agentkernel_image::Digest::of(&text).hex()[..24].to_owned()
    }
}

/// A template, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TemplateInfo {
    /// Name of its directory.
    pub key: String,
    /// The image.
    pub image: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mb: u64,
    /// Bytes it takes on the disk.
    pub bytes: u64,
    /// When it was used last, RFC 3339.
    pub used_at: String,
    /// Why it is not used any more, if so.
    pub outdated: Option<String>,
}

/// A template somebody begins with; it is not removed as long as this lives.
pub(crate) struct Template {
    directory: PathBuf,
    _lock: File,
}

impl Template {
    /// Sees to it that nobody uses it again.
    pub(crate) fn discard(self) {
        remove(&self.directory);
    }
}

/// Sees to it that a template that did not work is made again.
pub(crate) fn forget(home: &Home, directory: &Path) {
    if directory.parent() == Some(&home.templates()) {
        remove(directory);
    }
}

/// Removes a template from sight at once. Whoever began with it goes on: its files live as long as they are open.
fn remove(directory: &Path) {
    let hidden = directory.with_file_name(format!(".old-{}", random_word()));
    if fs::rename(directory, &hidden).is_ok() {
        let _ = fs::remove_dir_all(&hidden);
    }
}

/// Orders the sandbox, which never ran, to begin with a template, made if there is none, and gives it the disk that
/// belongs to it. `None` if it is better booted.
///
/// # Errors
/// If the disk is full. Everything else that goes wrong with a template only means that there is none.
pub(crate) async fn begin(sandbox: &SandboxDirectory, program: &Path) -> Result<Option<Template>, Problem> {
    let spec = Spec::load(sandbox.path())?;
    let Some(template) = ensure(sandbox.home(), &spec, program).await? else { return Ok(None) };
    let used = disk::copy(&template.directory.join(disk::FILE_NAME), &sandbox.path().join(disk::FILE_NAME))
        .and_then(|_| saved::order(sandbox.path(), &template.directory, From::Template));
    match used {
        Ok(()) => Ok(Some(template)),
        Err(problem) => {
            let _ = fs::remove_file(sandbox.path().join(disk::FILE_NAME));
            Err(problem)
        }
    }
}

/// Finds or makes the template of such sandboxes; `None` if it cannot be made.
///
/// # Errors
/// If the state directory cannot be written, or there is no kernel.
pub(crate) async fn ensure(home: &Home, spec: &Spec, program: &Path) -> Result<Option<Template>, Problem> {
    let about = About::of(home, spec)?;
    let key = about.key();
    let directory = home.templates().join(&key);
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let lock = lock_file(&directory)?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_ok() {
            if is_good(&directory, &about) {
                let _ = fs::write(directory.with_extension("used"), b"");
                return Ok(Some(Template { directory, _lock: lock }));
            }
            let _ = rustix::fs::flock(&lock, FlockOperation::Unlock);
            if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                // Another may have made it in between.
                if !is_good(&directory, &about) {
                    remove(&directory);
                    if let Err(problem) = make(home, spec, &about, &directory, program).await {
                        tracing::warn!("no template was made: {}", problem.message);
                        return Ok(None);
                    }
                    prune(home, false);
                }
                rustix::fs::flock(&lock, FlockOperation::LockShared)
                    .map_err(|error| io("use a template")(error.into()))?;
                if is_good(&directory, &about) {
                    return Ok(Some(Template { directory, _lock: lock }));
                }
                // The host changes faster than templates are made.
                return Ok(None);
            }
        }
        if tokio::time::Instant::now() > deadline {
            return Ok(None);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn lock_file(directory: &Path) -> Result<File, Problem> {
    let path = directory.with_extension("lock");
    private_file().create(true).truncate(false).open(&path).map_err(io(format!("open {}", path.display())))
}

/// Whether the template is whole and everything it was made of is the same.
fn is_good(directory: &Path, about: &About) -> bool {
    why_outdated(directory, about).is_none()
}

fn why_outdated(directory: &Path, about: &About) -> Option<String> {
    let made: Option<About> =
        fs::read(directory.join(ABOUT)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let Some(made) = made else { return Some("it is not whole".to_owned()) };
    if made.recipe != RECIPE {
        return Some("it was made in another way".to_owned());
    }
    if made.boot_id != about.boot_id {
        return Some("the host was restarted".to_owned());
    }
    if let Some(what) = made.fingerprint.difference(&about.fingerprint) {
        return Some(format!("it was made with {what}"));
    }
    let saved = match SavedMachine::open(directory) {
        Ok(saved) => saved,
        Err(problem) => return Some(problem.message),
    };
    if !saved.has_current_code() {
        return Some("a library of the emulator was changed".to_owned());
    }
    let made_seconds = i64::try_from(saved.record.saved_unix_ms / 1000).unwrap_or(i64::MAX);
    match saved.table(Exports::HOST) {
        Ok(table) if !table::is_current(&table, Path::new("/"), made_seconds) => {
            Some("programs of the host have changed".to_owned())
        }
        _ => None,
    }
}

/// A machine like those of `spec`, and nobody's.
fn blank(spec: &Spec) -> Spec {
    let created_unix_ms = unix_ms();
    let name = format!("{TEMPLATE_PREFIX}{}", &random_word()[..8]);
    Spec {
        name,
        uuid: new_uuid(created_unix_ms),
        created_unix_ms,
        image: spec.image.clone(),
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        disk_mib: spec.disk_mib,
        read_only_root: false,
        require_hardware: spec.require_hardware,
        profile: Profile::Moderate,
        workspace: None,
        mounts: Vec::new(),
        defaults: Defaults::default(),
        commands: CommandPolicy::default(),
        files: Vec::new(),
        init_script: None,
        labels: std::collections::BTreeMap::new(),
        machine_id: fresh_machine_id(),
        certificates: spec.certificates.clone(),
        network: NetworkSpec::default(),
    }
}

async fn make(home: &Home, spec: &Spec, about: &About, target: &Path, program: &Path) -> Result<(), Problem> {
    let draft = Draft::new(&home.templates())?;
    let path = spec.defaults.environment.iter().find(|(name, _)| name.0 == "PATH");
    let path = path.map(|(_, value)| value.0.clone()).unwrap_or_default();
    save(home, &blank(spec), &path, program, draft.path()).await?;
    let text = serde_json::to_vec(about).map_err(|error| plain("template", error.to_string(), None))?;
    replace(&draft.path().join(ABOUT), &text).map_err(io("make a template"))?;
    draft.keep(target)
}

/// Boots a machine and saves it into `draft`.
async fn save(home: &Home, blank: &Spec, path: &OsStr, program: &Path, draft: &Path) -> Result<(), Problem> {
    let held = client::create(home, blank, Life::Temporary, None)?;
    fs::write(held.directory.path().join(TEMPLATE), b"").map_err(io("make a template"))?;
    let lease = client::start(held, program, Warmth::Cold).await?;
    let is_host = matches!(blank.image, Image::Host { .. });
    for words in WARM_UP.iter().chain(if is_host { WARM_UP_HOST } else { &[] }) {
        // What is not there, or does not work, is not warmed up.
        let words: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
        let _ = run(lease.sandbox(), &words).await;
    }
    let script = "IFS=:; path=$1; names=$2; for directory in $path; do IFS=' '; for name in $names; do \
        test -x \"$directory/$name\"; done; done";
    let words = ["/bin/sh", "-c", script, "sh"].map(OsStr::new);
    let _ = run(lease.sandbox(), &[&words[..], &[path, OsStr::new(LOOKED_FOR)]].concat()).await;
    let saved = saved::save_process(lease.sandbox(), draft).await;
    lease.release();
    saved.map(drop)
}

async fn run(sandbox: &Sandbox, words: &[&OsStr]) -> Result<(), Problem> {
    let exec = Exec {
        arguments: words.iter().map(|word| ByteBuf::from(word.as_encoded_bytes())).collect(),
        environment: vec![(ByteBuf::from("PATH"), ByteBuf::from("/usr/sbin:/usr/bin:/sbin:/bin"))],
        directory: ByteBuf::from("/"),
        user: String::new(),
        terminal: None,
        timeout_ms: Some(WARM_UP_MS),
        stop_signal: None,
        root: None,
    };
    let mut execution = sandbox.exec(exec).await?;
    let _ = execution.input.send(&ExecInput::StdinEnd).await;
    while let Ok(output) = execution.output.next().await {
        if matches!(output, ExecOutput::Exited(_) | ExecOutput::Failed { .. }) {
            break;
        }
    }
    Ok(())
}

/// All templates, the one used last first.
///
/// # Errors
/// If there is no kernel to compare them with.
pub fn list(home: &Home) -> Result<Vec<TemplateInfo>, Problem> {
    let mut all = Vec::new();
    for (key, directory, used) in directories(home) {
        let about: Option<About> =
            fs::read(directory.join(ABOUT)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let Some(about) = about else { continue };
        let now = About {
            boot_id: Clocks::now().boot_id,
            fingerprint: current_fingerprint(home, &about.fingerprint)?,
            ..about.clone()
        };
        let used_ms = used.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        all.push(TemplateInfo {
            key,
            vcpus: about.fingerprint.vcpus,
            memory_mb: about.fingerprint.memory_mib,
            bytes: saved::directory_bytes(&directory),
            used_at: crate::deadline::rfc3339(u64::try_from(used_ms).unwrap_or(u64::MAX)),
            outdated: why_outdated(&directory, &now),
            image: about.image,
        });
    }
    Ok(all)
}

/// What the fingerprint of a machine of that size would be now.
fn current_fingerprint(home: &Home, old: &Fingerprint) -> Result<Fingerprint, Problem> {
    let kernel = agentkernel_machine::kernel::load(&home.cache(), None)
        .map_err(|error| crate::problem::problem("kernel", &error, error.hint()))?;
    Ok(Fingerprint::sized(&kernel, old.vcpus, old.memory_mib, old.disk_mib))
}

/// Keys and directories of all templates, the one used last first, and when that was.
fn directories(home: &Home) -> Vec<(String, PathBuf, SystemTime)> {
    let entries = fs::read_dir(home.templates()).into_iter().flatten().flatten();
    let mut all: Vec<_> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .filter(|(key, _)| !key.starts_with('.'))
        .map(|(key, path)| {
            let time = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
            let used = time(&path.with_extension("used")).max(time(&path)).unwrap_or(SystemTime::UNIX_EPOCH);
            (key, path, used)
        })
        .collect();
    all.sort_by_key(|(_, _, used)| std::cmp::Reverse(*used));
    all
}

/// Removes templates that are outdated or beyond the bounds, and what interrupted work left; returns their number. Those
/// that somebody is beginning with stay for now.
pub(crate) fn prune(home: &Home, dry_run: bool) -> usize {
    let outdated: Vec<String> = list(home)
        .unwrap_or_default()
        .into_iter()
        .filter(|template| template.outdated.is_some())
        .map(|template| template.key)
        .collect();
    let (mut sum, mut kept, mut removed) = (0_u64, 0, 0);
    for (key, directory, _) in directories(home) {
        let bytes = saved::directory_bytes(&directory);
        let fits = sum + bytes <= BYTES_LIMIT && kept < COUNT_LIMIT;
        if fits && !outdated.contains(&key) {
            (sum, kept) = (sum + bytes, kept + 1);
            continue;
        }
        let lock = lock_file(&directory).ok();
        let free = lock
            .as_ref()
            .is_some_and(|lock| rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok());
        if free {
            removed += 1;
            if !dry_run {
                remove(&directory);
                let _ = fs::remove_file(directory.with_extension("used"));
            }
        }
    }
    removed + sweep(home, dry_run)
}

/// Removes what interrupted work left: half-made templates, locks and marks without one.
fn sweep(home: &Home, dry_run: bool) -> usize {
    let mut found = saved::sweep_drafts(&home.templates(), dry_run);
    for entry in fs::read_dir(home.templates()).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        // What is being removed, and locks and marks of what is gone. A lock is there before its template is.
        let is_stray = path.extension().is_some() && !path.with_extension("").exists();
        let age = entry.metadata().and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
        let is_old = age.is_some_and(|age| age > Duration::from_secs(600));
        if !(name.starts_with(".old-") || is_stray && is_old) {
            continue;
        }
        found += 1;
        if !dry_run {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let _ = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
    found
}

/// Makes the template of sandboxes like `spec` if there is none; false if it could not be made.
///
/// # Errors
/// As for a start.
pub async fn warm(home: &Home, spec: &Spec, program: &Path) -> Result<bool, Problem> {
    Ok(ensure(home, spec, program).await?.is_some())
}
