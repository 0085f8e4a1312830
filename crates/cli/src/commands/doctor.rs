//! `agentkernel doctor`: findings with remedies, and whether forks differ where they must.

use std::fmt::Write as _;

use agentkernel_sandbox::setup::{self, Finding, Status};
use agentkernel_sandbox::state::Home;
use agentkernel_sandbox::{Problem, fork_check, templates, trust};

use super::{block_on, launch as starting};
use crate::arguments::{DoctorArguments, SandboxArguments, WorkspaceMode};
use crate::{environment, ui};

pub(super) fn doctor(arguments: &DoctorArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    if arguments.fork_check {
        return check_forks(arguments.json);
    }
    let mut findings = setup::findings(&home, &environment::program()?);
    findings.push(trust::finding(environment::certificates().as_deref()));
    findings.push(of_templates(&home));
    if arguments.json {
        ui::json(&findings);
    } else {
        let mut text = String::new();
        for finding in &findings {
            let mark = match finding.status {
                Status::Ok => "ok     ",
                Status::Warning => "warning",
                Status::Failure => "FAILED ",
            };
            let _ = writeln!(text, "{mark}  {}: {}", finding.name, finding.detail);
            if let Some(remedy) = &finding.remedy {
                let _ = writeln!(text, "         remedy: {remedy}");
            }
        }
        ui::data(&text);
    }
    Ok(u8::from(findings.iter().any(|finding| finding.status == Status::Failure)))
}

/// The templates there are: none is no trouble, the first start of each combination makes one.
fn of_templates(home: &Home) -> Finding {
    let all = templates::list(home).unwrap_or_default();
    let sum: u64 = all.iter().map(|template| template.bytes).sum();
    let mut detail = match all.len() {
        0 => "none yet: the first start of an image makes one".to_owned(),
        count => format!("{count}, {}", ui::size(sum)),
    };
    for template in &all {
        let image = ui::line(&template.image);
        let size = ui::size(template.memory_mb << 20);
        let _ = write!(detail, "; {image} ({} CPUs, {size}, {})", template.vcpus, ui::size(template.bytes));
        if let Some(reason) = &template.outdated {
            let _ = write!(detail, " outdated: {}", ui::line(reason));
        }
    }
    let outdated = all.iter().any(|template| template.outdated.is_some());
    let remedy = outdated.then(|| "agentkernel gc removes outdated ones; they are not used".to_owned());
    Finding { name: "templates".to_owned(), status: Status::Ok, detail, remedy }
}

fn check_forks(json: bool) -> Result<u8, Problem> {
    let home = environment::home()?;
    home.sweep();
    let sandbox = SandboxArguments {
        image: Some("host".to_owned()),
        workspace: Some(WorkspaceMode::None),
        memory: Some(512),
        ..SandboxArguments::default()
    };
    let mut status = ui::Status::new(!json);
    status.say("starting and forking sandboxes ...");
    let mut request = starting::request(&home, &sandbox, &[], true)?;
    // What a project has its own sandboxes do is no matter here.
    (request.init_script, request.files) = (None, Vec::new());
    let checks = block_on(fork_check(&home, request, &environment::program()?))?;
    status.clear();
    let checks = checks?;
    if json {
        ui::json(&checks);
    } else {
        let mut text = String::new();
        for check in &checks {
            let mark = if check.passed { "ok     " } else { "FAILED " };
            let _ = writeln!(text, "{mark}  {}: {}", check.name, ui::line(&check.detail));
        }
        ui::data(&text);
    }
    Ok(u8::from(checks.iter().any(|check| !check.passed)))
}
