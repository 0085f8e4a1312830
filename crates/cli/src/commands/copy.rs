//! `agentkernel cp`.

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use agentkernel_protocol::message::Request;
use agentkernel_sandbox::client::Sandbox;
use agentkernel_sandbox::copy::{
    CopyError, CopyLimits, CopySummary, HostSource, HostTarget, TarSource, TarTarget, copy_in, copy_out,
};
use agentkernel_sandbox::spec::{Spec, check_name};
use agentkernel_sandbox::{Problem, io, plain, problem};
use serde_bytes::ByteBuf;

use super::block_on;
use crate::arguments::CopyArguments;
use crate::{environment, ui};

/// Files, directories and links of one copy.
const ENTRIES_LIMIT: u64 = 2_000_000;
/// Bytes of one copy out of a sandbox whose own disk is smaller: mounts may hold more than the disk.
const BYTES_LIMIT: u64 = 64 << 30;

/// One end of a copy.
enum End {
    Guest { sandbox: String, path: OsString },
    Host(PathBuf),
    Tar,
}

impl End {
    /// `NAME:PATH` names a path of a guest; a path of this machine with such a beginning is written `./NAME:PATH`.
    fn parse(text: &OsStr) -> Self {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Self::Tar;
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        let split = colon.and_then(|at| Some((std::str::from_utf8(&bytes[..at]).ok()?, &bytes[at + 1..])));
        match split.filter(|(name, _)| check_name(name).is_ok()) {
            Some((name, path)) => {
                Self::Guest { sandbox: name.to_owned(), path: OsStr::from_bytes(path).to_owned() }
            }
            None => Self::Host(PathBuf::from(text)),
        }
    }
}

pub(super) fn copy(arguments: &CopyArguments) -> Result<u8, Problem> {
    let wrong = || {
        let hint = "agentkernel cp NAME:PATH PATH, or agentkernel cp PATH NAME:PATH";
        plain("usage", "one of the two, and only one, is a path in a sandbox", Some(hint))
    };
    let summary = match (End::parse(&arguments.source), End::parse(&arguments.target)) {
        (End::Guest { sandbox, path }, target @ (End::Host(_) | End::Tar)) => out(&sandbox, &path, target)?,
        (source @ (End::Host(_) | End::Tar), End::Guest { sandbox, path }) => into(source, &sandbox, &path)?,
        _ => return Err(wrong()),
    };
    if !arguments.quiet {
        let CopySummary { files, directories, symlinks, skipped, bytes } = summary;
        let plural = |count: u64, word: &str| match count {
            1 => format!("1 {word}"),
            _ => format!("{count} {}", word.replace("directory", "directorie") + "s"),
        };
        let mut parts = vec![plural(files, "file")];
        if directories > 0 {
            parts.push(plural(directories, "directory"));
        }
        if symlinks > 0 {
            parts.push(plural(symlinks, "link"));
        }
        let mut text = format!("copied {}, {}", parts.join(", "), ui::size(bytes));
        if skipped > 0 {
            text.push_str(&format!("; left out {}", plural(skipped, "device node, FIFO or socket")));
        }
        ui::note(&text);
    }
    Ok(0)
}

/// A path of the guest as its agent wants it: absolute, from where commands start.
fn absolute(spec: &Spec, path: &OsStr) -> ByteBuf {
    let ends_open = path.as_bytes().ends_with(b"/");
    let mut whole = spec.defaults.directory.join(path).into_os_string();
    if ends_open && !whole.as_bytes().ends_with(b"/") {
        whole.push("/");
    }
    ByteBuf::from(whole.as_bytes())
}

/// The name a thing has in its copy; empty if only what is in it is meant (`PATH/.`).
fn name_of(path: &Path) -> OsString {
    if path.as_os_str().as_bytes().ends_with(b"/.") || path == Path::new(".") {
        return OsString::new();
    }
    match path.file_name() {
        Some(name) => name.to_owned(),
        // `..` and `/` have a name that must be looked up.
        None => path
            .canonicalize()
            .ok()
            .and_then(|path| path.file_name().map(OsStr::to_owned))
            .unwrap_or_default(),
    }
}

fn open(name: &str) -> Result<(Sandbox, Spec), Problem> {
    let sandbox = Sandbox::open(environment::home()?.find(name)?)?;
    let spec = Spec::load(sandbox.directory().path())?;
    Ok((sandbox, spec))
}

fn out(name: &str, path: &OsStr, target: End) -> Result<CopySummary, Problem> {
    let (sandbox, spec) = open(name)?;
    let limits = CopyLimits { entries: ENTRIES_LIMIT, bytes: BYTES_LIMIT.max(spec.disk_mib << 20) };
    let name = name_of(Path::new(path));
    block_on(async {
        let stream = sandbox.guest(Request::CopyOut { path: absolute(&spec, path) }).await?;
        let result = match target {
            End::Host(path) => copy_out(stream, HostTarget::new(&path, &name), limits).await,
            _ if std::io::stdout().is_terminal() => {
                let hint = Some("redirect it, or pipe it into tar");
                return Err(plain("usage", "a tar archive is not for a terminal", hint));
            }
            _ => copy_out(stream, TarTarget::new(std::io::stdout(), &name), limits).await,
        };
        explain(result, &sandbox).await
    })?
}

fn into(source: End, name: &str, path: &OsStr) -> Result<CopySummary, Problem> {
    let (sandbox, spec) = open(name)?;
    let name = match &source {
        End::Host(path) => {
            // Said here, before anything is asked of the guest.
            path.symlink_metadata().map_err(io(format!("read {}", path.display())))?;
            name_of(path)
        }
        _ => OsString::new(),
    };
    let request = Request::CopyIn {
        path: absolute(&spec, path),
        name: ByteBuf::from(name.as_bytes()),
        user: spec.defaults.user.clone(),
    };
    block_on(async {
        let stream = sandbox.guest(request).await?;
        let result = match source {
            End::Host(path) => copy_in(stream, HostSource::new(&path)).await,
            _ => copy_in(stream, TarSource::new(std::io::stdin())).await,
        };
        explain(result, &sandbox).await
    })?
}

async fn explain(result: Result<CopySummary, CopyError>, sandbox: &Sandbox) -> Result<CopySummary, Problem> {
    match result {
        Ok(summary) => Ok(summary),
        Err(CopyError::Broken) => Err(sandbox.failure().await),
        Err(error) => Err(problem("copy", &error, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_as_tars_and_cps_do() {
        for (path, name) in [("a/b", "b"), ("a/b/", "b"), ("a/.", ""), (".", ""), ("/x/./y", "y")] {
            assert_eq!(name_of(Path::new(path)), name, "{path}");
        }
        assert!(matches!(End::parse("dev:/x".as_ref()), End::Guest { sandbox, .. } if sandbox == "dev"));
        assert!(matches!(End::parse("./dev:/x".as_ref()), End::Host(_)));
        assert!(matches!(End::parse("/a:b".as_ref()), End::Host(_)));
        assert!(matches!(End::parse("-".as_ref()), End::Tar));
    }
}
