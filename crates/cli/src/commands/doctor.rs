//! `agentkernel doctor`: findings with remedies.

use std::fmt::Write as _;

use agentkernel_sandbox::Problem;
use agentkernel_sandbox::setup::{self, Status};

use crate::arguments::DoctorArguments;
use crate::{environment, ui};

pub(super) fn doctor(arguments: &DoctorArguments) -> Result<u8, Problem> {
    let home = environment::home()?;
    let findings = setup::findings(&home, &environment::program()?);
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
