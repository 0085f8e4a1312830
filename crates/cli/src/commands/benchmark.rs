//! `agentkernel benchmark`: one machine, its start, and one command many times in it.

use std::time::Instant;

use agentkernel_protocol::message::Exec;
use agentkernel_sandbox::client::Life;
use agentkernel_sandbox::{Problem, plain, setup};
use serde::Serialize;

use super::execute::{Captured, Ended, Failure, Sink, Source, execute};
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
    /// The same command on the agent's own stream, measured by the supervisor.
    agent_ms: Vec<f64>,
    agent_median_ms: f64,
    machine_rss_bytes: Option<u64>,
    supervisor_rss_bytes: Option<u64>,
}

pub(super) fn benchmark(arguments: &BenchmarkArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let launch = starting::settle(&home, &arguments.sandbox, &arguments.command, arguments.json)?;
    let exec = Exec { timeout_ms: Some(600_000), ..launch.spec.defaults.exec(&arguments.command, &[]) };
    let figures = block_on(async {
        let begun = Instant::now();
        let held = starting::create(&home, &launch, Life::Temporary, &arguments.sandbox)?;
        let mut lease = starting::start(held, arguments.json, arguments.sandbox.warmth()).await?;
        let start_ms = milliseconds(begun);
        let mut runs_ms = Vec::new();
        for _ in 0..arguments.count {
            let begun = Instant::now();
            let mut captured = Captured::default();
            let sink = Sink::Capture(&mut captured);
            let ended = match execute(lease.sandbox(), exec.clone(), Source::Nothing, sink).await {
                Ok(ended) => ended,
                Err(Failure::Broken) => return Err(lease.failure().await),
                Err(Failure::Problem(problem)) => return Err(problem),
            };
            runs_ms.push(milliseconds(begun));
            check(&ended, &captured)?;
        }
        let agent = lease.sandbox().measure(exec.clone(), arguments.count).await?;
        let agent_ms: Vec<f64> = agent.into_iter().map(|time| time as f64 / 1e6).collect();
        let memory = lease.memory();
        lease.release();
        let installation = setup::installation(&home)?;
        Ok::<_, Problem>(Figures {
            accelerator: installation.accelerator,
            kernel: installation.kernel_release,
            vcpus: launch.spec.vcpus,
            memory_mib: launch.spec.memory_mib,
            start_ms,
            command: arguments.command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
            first_ms: runs_ms.first().copied().unwrap_or_default(),
            median_ms: median(&runs_ms),
            agent_median_ms: median(&agent_ms),
            runs_ms,
            agent_ms,
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

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
