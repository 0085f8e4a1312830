//! Whether sandboxes that begin with the same memory differ where they must: `doctor --fork-check`.
//!
//! ```text
//! template ──► origin ──► fork-a, fork-b
//!     └──────► sibling
//! ```
//! Real sandboxes of the `host` image are started and forked, asked for what no two machines may share, and removed. A
//! program that lives through the fork watches for the generation file to change.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agentkernel_protocol::message::{Exec, ExecInput, ExecOutput};
use serde::Serialize;
use serde_bytes::ByteBuf;

use crate::client::{self, Life, Sandbox, Warmth};
use crate::executions::exit_code;
use crate::fork;
use crate::launch::{self, Request};
use crate::lifecycle;
use crate::problem::{Problem, plain};
use crate::state::{Home, SandboxDirectory, random_word};

/// How far a guest's clock may be from the host's.
const CLOCK_LIMIT: Duration = Duration::from_secs(1);
/// What a program that lives through the fork has to see within this time.
const WATCH_SECONDS: u32 = 20;

/// Says one word a line: what, `=`, the word.
const PROBE: &str = "\
echo clock=$(date +%s%N)
echo urandom=$(od -An -N16 -tx1 /dev/urandom | tr -d ' ')
echo machine-id=$(cat /etc/machine-id)
echo boot-id=$(cat /proc/sys/kernel/random/boot_id)
echo hostname=$(hostname)
echo generation=$(cat /run/agentkernel/generation)
[ -x /usr/bin/python3 ] && /usr/bin/python3 -c '
import os, random, ssl, uuid
print(f\"getrandom={os.getrandom(16).hex()}\")
print(f\"python-random={random.getrandbits(128):x}\")
print(f\"python-uuid={uuid.uuid4()}\")
print(f\"python-ssl={ssl.RAND_bytes(16).hex()}\")'
true";

/// Waits for the generation to change and leaves what it is then.
const WATCHER: &str = "\
old=$(cat /run/agentkernel/generation)
echo ready > /tmp/watching
while [ \"$(cat /run/agentkernel/generation)\" = \"$old\" ]; do sleep 0.05; done
cat /run/agentkernel/generation > /tmp/seen";

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// Whether it is as it must be.
    pub passed: bool,
    /// What was found.
    pub detail: String,
}

/// What one sandbox says of itself.
struct Answer {
    sandbox: String,
    words: BTreeMap<String, String>,
    /// When it was asked and when it had answered.
    asked: (SystemTime, SystemTime),
}

/// Starts and forks sandboxes like those of `request`, compares them, and removes them.
///
/// # Errors
/// If they cannot be started, forked or asked.
pub async fn fork_check(home: &Home, request: Request, program: &Path) -> Result<Vec<Check>, Problem> {
    let mut made = Vec::new();
    let result = compare(home, request, program, &mut made).await;
    for directory in made {
        let _ = lifecycle::remove(&directory, true).await;
    }
    result
}

async fn compare(
    home: &Home,
    request: Request,
    program: &Path,
    made: &mut Vec<SandboxDirectory>,
) -> Result<Vec<Check>, Problem> {
    let word = random_word()[..6].to_owned();
    let name = |what: &str| format!("fork-check-{word}-{what}");
    let mut sandboxes = Vec::new();
    for what in ["origin", "sibling"] {
        let request = Request { name: Some(name(what)), ..request.clone() };
        let spec = launch::settle(home, request, &mut |_| {})?.spec;
        let held = client::create(home, &spec, Life::Persistent, None)?;
        made.push(held.directory.clone());
        sandboxes.push(client::start(held, program, Warmth::Warm).await?.live_on().await?);
    }
    let origin = sandboxes[0].directory().clone();
    sandboxes[0].detach(exec(WATCHER), false).await?;
    wait_for(&sandboxes[0], "/tmp/watching").await?;
    let names = [name("fork-a"), name("fork-b")];
    let forked = fork::fork(&origin, &names, program).await?;
    made.extend(forked.children.iter().cloned());
    for child in &forked.children {
        sandboxes.push(Sandbox::open(child.clone())?);
    }
    let mut answers = Vec::new();
    for sandbox in &sandboxes {
        answers.push(ask(sandbox).await?);
    }
    let mut checks: Vec<Check> = vec![Check {
        name: "pause".to_owned(),
        passed: true,
        detail: format!("the origin stood still for {} ms", forked.still.as_millis()),
    }];
    checks.extend(distinct(&answers));
    checks.push(clocks(&answers));
    for child in &sandboxes[2..] {
        let name = child.directory().name();
        let seen = wait_for(child, "/tmp/seen").await;
        let now = answers.iter().find(|answer| answer.sandbox == name);
        let now = now.and_then(|answer| answer.words.get("generation").cloned()).unwrap_or_default();
        checks.push(Check {
            name: format!("generation seen in {name}"),
            passed: seen.as_ref().is_ok_and(|seen| *seen == now && !now.is_empty()),
            detail: seen.unwrap_or_else(|problem| problem.message),
        });
    }
    let (code, _) = run(&sandboxes[0], "test ! -e /tmp/seen").await?;
    checks.push(Check {
        name: "generation kept in the origin".to_owned(),
        passed: code == 0,
        detail: if code == 0 { "unchanged" } else { "changed" }.to_owned(),
    });
    Ok(checks)
}

/// Each word must be everywhere, and nowhere the same.
fn distinct(answers: &[Answer]) -> Vec<Check> {
    let names: std::collections::BTreeSet<&String> =
        answers.iter().flat_map(|answer| answer.words.keys()).filter(|name| *name != "clock").collect();
    let check = |name: &String| {
        let words: Vec<&str> =
            answers.iter().map(|answer| answer.words.get(name).map_or("", String::as_str)).collect();
        let missing = words.iter().any(|word| word.is_empty());
        let different: std::collections::BTreeSet<&&str> = words.iter().collect();
        let passed = !missing && different.len() == words.len();
        let detail = match (missing, passed) {
            (true, _) => "missing in one of them".to_owned(),
            (false, true) => format!("{} different ones", words.len()),
            (false, false) => format!("the same in several: {}", words.join(" ")),
        };
        Check { name: name.clone(), passed, detail }
    };
    names.into_iter().map(check).collect()
}

fn clocks(answers: &[Answer]) -> Check {
    let apart = |answer: &Answer| -> Option<Duration> {
        let clock = Duration::from_nanos(answer.words.get("clock")?.parse().ok()?);
        let (before, after) = answer.asked;
        let (before, after) =
            (before.duration_since(UNIX_EPOCH).ok()?, after.duration_since(UNIX_EPOCH).ok()?);
        Some(before.saturating_sub(clock).max(clock.saturating_sub(after)))
    };
    let worst = answers.iter().map(apart).collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().max());
    Check {
        name: "clock".to_owned(),
        passed: worst.is_some_and(|worst| worst <= CLOCK_LIMIT),
        detail: match worst {
            Some(worst) => format!("at most {} ms from the host's", worst.as_millis()),
            None => "a sandbox does not tell the time".to_owned(),
        },
    }
}

async fn ask(sandbox: &Sandbox) -> Result<Answer, Problem> {
    let before = SystemTime::now();
    let (_, text) = run(sandbox, PROBE).await?;
    let words = text.lines().filter_map(|line| line.split_once('='));
    let words = words.map(|(name, word)| (name.to_owned(), word.to_owned())).collect();
    Ok(Answer { sandbox: sandbox.directory().name(), words, asked: (before, SystemTime::now()) })
}

/// Waits for a file and returns what is in it.
async fn wait_for(sandbox: &Sandbox, path: &str) -> Result<String, Problem> {
    let rounds = WATCH_SECONDS * 20;
    let script =
        format!("for i in $(seq {rounds}); do test -s {path} && exec cat {path}; sleep 0.05; done; exit 1");
    match run(sandbox, &script).await? {
        (0, text) => Ok(text.trim().to_owned()),
        _ => Err(plain("fork-check", format!("{path} did not come within {WATCH_SECONDS} s"), None)),
    }
}

fn exec(script: &str) -> Exec {
    Exec {
        arguments: ["/bin/sh", "-c", script].map(ByteBuf::from).to_vec(),
        environment: vec![(ByteBuf::from("PATH"), ByteBuf::from("/usr/sbin:/usr/bin:/sbin:/bin"))],
        directory: ByteBuf::from("/"),
        user: String::new(),
        terminal: None,
        timeout_ms: Some(120_000),
        stop_signal: None,
        root: None,
    }
}

/// Exit code and standard output.
async fn run(sandbox: &Sandbox, script: &str) -> Result<(u8, String), Problem> {
    let mut execution = sandbox.exec(exec(script)).await?;
    let _ = execution.input.send(&ExecInput::StdinEnd).await;
    let mut text = Vec::new();
    loop {
        match execution.output.next().await {
            Ok(ExecOutput::Stdout(bytes)) if text.len() < 64 << 10 => text.extend_from_slice(&bytes),
            Ok(ExecOutput::Exited(exit)) => {
                return Ok((exit_code(&exit), String::from_utf8_lossy(&text).into_owned()));
            }
            Ok(ExecOutput::Failed { message, .. }) => return Err(plain("fork-check", message, None)),
            Ok(_) => {}
            Err(_) => return Err(sandbox.failure().await),
        }
    }
}
