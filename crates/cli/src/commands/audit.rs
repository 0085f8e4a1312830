//! `agentkernel audit`: what a sandbox's network decided.

use std::time::Duration;

use agentkernel_sandbox::deadline::rfc3339;
use agentkernel_sandbox::network::{AuditReader, Entry, Verdict, target};
use agentkernel_sandbox::{Problem, io};
use serde::Serialize;

use crate::arguments::AuditArguments;
use crate::{environment, ui};

const GLANCE: Duration = Duration::from_millis(100);

pub(super) fn audit(arguments: &AuditArguments) -> Result<u8, Problem> {
    let directory = environment::home()?.find(&arguments.name)?;
    directory.repair();
    let mut record = AuditReader::new(directory.path());
    if !arguments.json && !ui::raw_data(format!("{}\n", row(&HEADINGS)).as_bytes()) {
        return Ok(0);
    }
    loop {
        for entry in record.read().map_err(io("read the network's record"))? {
            if arguments.refused && entry.verdict != Verdict::Refused {
                continue;
            }
            let line = if arguments.json { json(&entry) } else { row(&cells(&entry)) };
            if !ui::raw_data(format!("{line}\n").as_bytes()) {
                return Ok(0);
            }
        }
        if !arguments.follow || !directory.path().exists() {
            return Ok(0);
        }
        std::thread::sleep(GLANCE);
    }
}

const HEADINGS: [&str; 6] = ["TIME", "VERDICT", "KIND", "BYTES", "WHAT", "RULE"];

/// Lines come one by one, so that columns have the width that most need.
fn row(cells: &[impl AsRef<str>; 6]) -> String {
    let [time, verdict, kind, bytes, what, rule] = cells.each_ref().map(AsRef::as_ref);
    format!("{time:<24}  {verdict:<8}{kind:<10}{bytes:<14}{what:<42}  {rule}")
}

fn cells(entry: &Entry) -> [String; 6] {
    let bytes = match (entry.sent, entry.received) {
        (None, None) => "-".to_owned(),
        (sent, received) => {
            format!("{} / {}", ui::size(sent.unwrap_or(0)), ui::size(received.unwrap_or(0)))
        }
    };
    let rule = match &entry.reason {
        Some(reason) if entry.verdict != Verdict::Refused => format!("{}: {reason}", entry.rule),
        _ => entry.rule.clone(),
    };
    [
        rfc3339(entry.unix_ms),
        ui::word(&entry.verdict),
        ui::word(&entry.kind),
        bytes,
        ui::line(&target(entry)),
        ui::line(&rule),
    ]
}

fn json(entry: &Entry) -> String {
    #[derive(Serialize)]
    struct Line<'a> {
        time: String,
        #[serde(flatten)]
        entry: &'a Entry,
    }
    serde_json::to_string(&Line { time: rfc3339(entry.unix_ms), entry }).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use agentkernel_sandbox::network::Kind;

    use super::*;

    #[test]
    fn names_of_guests_do_not_reach_the_terminal() {
        let entry = Entry {
            unix_ms: 1_000,
            name: Some("a\u{1b}[2J\n.example".into()),
            address: Some("192.0.2.1".parse().unwrap()),
            port: Some(443),
            sent: Some(2048),
            received: Some(1),
            ..Entry::new(Verdict::Ended, Kind::Tcp, "*.example")
        };
        assert_eq!(
            row(&cells(&entry)),
            "1970-01-01T00:00:01.000Z  ended   tcp       2K / 1B       \
             a\\u{1b}[2J\\n.example:443 (192.0.2.1)        *.example"
        );
        let line = json(&entry);
        assert!(line.starts_with(r#"{"time":"1970-01-01T00:00:01.000Z","sequence":0,"#), "{line}");
        assert!(!line.chars().any(char::is_control), "{line}");
    }
}
