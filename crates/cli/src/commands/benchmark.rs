//! `agentkernel benchmark`: one machine, its start, and one command many times in it.

use std::os::unix::ffi::OsStrExt;
use std::time::Instant;

use agentkernel_protocol::message::Exec;
use agentkernel_sandbox::{Problem, plain, setup};
use serde::Serialize;
use serde_bytes::ByteBuf;

use super::execute::{Captured, Ended, Sink, Source, execute};
use super::{block_on, launch as starting};
use crate::arguments::BenchmarkArguments;
use crate::{environment, ui};

/// Figures in milliseconds unless their name says otherwise.
#[derive(Serialize)]
struct Figures {
    accelerator: String,
    kernel: String,
    vcpus: u32,
    memory_mib: u64,
    start_ms: f64,
    command: Vec<String>,
    runs_ms: Vec<f64>,
    first_ms: f64,
    median_ms: f64,
    machine_rss_bytes: Option<u64>,
    supervisor_rss_bytes: Option<u64>,
}

pub(super) fn benchmark(arguments: &BenchmarkArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let launch = starting::settle(&home, &arguments.sandbox, arguments.json)?;
    let exec = Exec {
        arguments: arguments.command.iter().map(|word| ByteBuf::from(word.as_bytes())).collect(),
        environment: launch
            .environment
            .iter()
            .map(|(name, value)| (ByteBuf::from(name.as_bytes()), ByteBuf::from(value.as_bytes())))
            .collect(),
        directory: ByteBuf::from(launch.directory.as_os_str().as_bytes()),
        user: launch.user.clone(),
        terminal: None,
        timeout_ms: Some(600_000),
    };
    let figures = block_on(async {
        let begun = Instant::now();
        let mut lease = starting::start(&home, &launch, arguments.json).await?;
        let start_ms = milliseconds(begun);
        let mut runs_ms = Vec::new();
        for _ in 0..arguments.count {
            let begun = Instant::now();
            let mut captured = Captured::default();
            let ended =
                execute(&mut lease, exec.clone(), Source::Nothing, Sink::Capture(&mut captured)).await?;
            runs_ms.push(milliseconds(begun));
            check(&ended, &captured)?;
        }
        let memory = lease.memory();
        lease.release();
        let mut sorted = runs_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let installation = setup::installation(&home)?;
        Ok::<_, Problem>(Figures {
            accelerator: installation.accelerator,
            kernel: installation.kernel_release,
            vcpus: launch.spec.vcpus,
            memory_mib: launch.spec.memory_mib,
            start_ms,
            command: arguments.command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
            first_ms: runs_ms.first().copied().unwrap_or_default(),
            median_ms: sorted.get(sorted.len() / 2).copied().unwrap_or_default(),
            runs_ms,
            machine_rss_bytes: memory.machine,
            supervisor_rss_bytes: memory.supervisor,
        })
    })??;
    if arguments.json {
        ui::json(&figures);
    } else {
        ui::data(&format!(
            "start {:.0} ms, first {:.1} ms, median of {} {:.1} ms ({}, kernel {})\n",
            figures.start_ms,
            figures.first_ms,
            arguments.count,
            figures.median_ms,
            figures.accelerator,
            figures.kernel,
        ));
    }
    Ok(0)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn check(ended: &Ended, captured: &Captured) -> Result<(), Problem> {
    if ended.code() == 0 {
        return Ok(());
    }
    let said = match ended {
        Ended::NotStarted { message, .. } => message.clone(),
        _ => String::from_utf8_lossy(&captured.stderr).trim().to_owned(),
    };
    Err(plain("benchmark", format!("the command failed with {}: {said}", ended.code()), None))
}
