//! What the surroundings say: the state directory, the host's user, the current directory. Read here, passed on as data.

use std::env;
use std::path::PathBuf;

use agentkernel_sandbox::options::Surroundings;
use agentkernel_sandbox::spec::HostUser;
use agentkernel_sandbox::state::Home;
use agentkernel_sandbox::supervisor::Proxy;
use agentkernel_sandbox::{Problem, plain};

/// Opens the state directory: `AGENTKERNEL_HOME`, else `~/.agentkernel`.
pub(crate) fn home() -> Result<Home, Problem> {
    let path = match env::var_os("AGENTKERNEL_HOME").filter(|value| !value.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => home_directory()?.join(".agentkernel"),
    };
    if !path.is_absolute() {
        let message = format!("AGENTKERNEL_HOME is {}, which is not an absolute path", path.display());
        return Err(plain("state-directory", message, None));
    }
    Home::open(&path)
}

/// The user's home directory, free of symlinks where that can be told.
pub(crate) fn home_directory() -> Result<PathBuf, Problem> {
    let home = env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
    let home = home.or_else(|| passwd_entry().map(|entry| entry.home));
    let home = home.ok_or_else(|| {
        plain("no-home", "no home directory is known", Some("set HOME, or AGENTKERNEL_HOME"))
    })?;
    Ok(home.canonicalize().unwrap_or(home))
}

/// The user of this process.
pub(crate) fn user() -> Result<HostUser, Problem> {
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
    let name =
        passwd_entry().map(|entry| entry.name).or_else(|| variable("LOGNAME")).or_else(|| variable("USER"));
    Ok(HostUser { name: name.unwrap_or_else(|| uid.to_string()), uid, gid, home: home_directory()? })
}

/// The current directory, free of symlinks.
pub(crate) fn current_directory() -> Result<PathBuf, Problem> {
    env::current_dir().map_err(|error| {
        let hint = Some("change to a directory that exists");
        plain("current-directory", format!("the current directory cannot be told: {error}"), hint)
    })
}

/// Who asks, and where.
pub(crate) fn surroundings() -> Result<Surroundings, Problem> {
    Ok(Surroundings {
        user: user()?,
        current_directory: current_directory()?,
        environment: env::vars_os().collect(),
        certificates: certificates(),
    })
}

/// The bundle of certificates that the user trusts, if they name one.
pub(crate) fn certificates() -> Option<PathBuf> {
    let named = env::var_os("SSL_CERT_FILE").filter(|value| !value.is_empty())?;
    // The supervisor is elsewhere.
    std::path::absolute(named).ok()
}

/// Path of this program, for the processes it starts of itself.
pub(crate) fn program() -> Result<PathBuf, Problem> {
    env::current_exe()
        .map_err(|error| plain("program", format!("the path of this program cannot be told: {error}"), None))
}

/// A directory that a variable names, if it does.
pub(crate) fn directory(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// The first program of this name on the `PATH`; whether it can be executed is not asked.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|directory| directory.join(program)).find(|path| path.is_file())
}

struct PasswdEntry {
    name: String,
    home: PathBuf,
}

fn passwd_entry() -> Option<PasswdEntry> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let text = std::fs::read_to_string("/etc/passwd").ok()?;
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        match fields[..] {
            [name, _, id, _, _, home, _] if id == uid => {
                Some(PasswdEntry { name: name.into(), home: home.into() })
            }
            _ => None,
        }
    })
}

/// The proxy that this environment names, and what is reached without it.
pub(crate) fn proxy() -> Option<Proxy> {
    let first = |names: &[&str]| {
        let values = names.iter().filter_map(|name| env::var(name).ok());
        values.map(|value| value.trim().to_owned()).find(|value| !value.is_empty())
    };
    let url = first(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])?;
    Some(Proxy { url, except: first(&["NO_PROXY", "no_proxy"]).unwrap_or_default() })
}
