//! `agentkernel snapshot`.

use agentkernel_sandbox::Problem;
use agentkernel_sandbox::inspect::SandboxInfo;
use agentkernel_sandbox::snapshots::{self, Restoring, Snapshot};

use super::{block_on, inspect};
use crate::arguments::SnapshotVerb;
use crate::{environment, ui};

pub(super) fn snapshot(verb: &SnapshotVerb) -> Result<u8, Problem> {
    let home = environment::home()?;
    home.sweep();
    match verb {
        SnapshotVerb::Take { sandbox, name, json } => {
            let directory = home.find(sandbox)?;
            let mut status = ui::Status::new(!json);
            status.say("taking a snapshot ...");
            let taken = block_on(snapshots::take(&directory, name))?;
            status.clear();
            let (snapshot, still) = taken?;
            if *json {
                ui::json(&snapshot);
                return Ok(0);
            }
            ui::data(&format!("{name}\n"));
            ui::note(&match snapshot.memory {
                true => format!(
                    "{} with memory, {}; it stood still for {} ms",
                    snapshot.sandbox,
                    ui::size(snapshot.bytes),
                    still.as_millis()
                ),
                false => format!("{} is stopped: its disk, {}", snapshot.sandbox, ui::size(snapshot.bytes)),
            });
        }
        SnapshotVerb::List { json } => {
            let all = snapshots::list(&home)?;
            if *json { ui::json(&all) } else { show(&all) }
        }
        SnapshotVerb::Restore { name, new, disk_only, json } => {
            let restoring = Restoring { new_name: new.clone(), disk_only: *disk_only };
            let mut status = ui::Status::new(!json);
            status.say("restoring ...");
            let restored = block_on(snapshots::restore(&home, name, &restoring, &environment::program()?))?;
            status.clear();
            let info = SandboxInfo::of(&restored?)?;
            if *json {
                ui::json(&info);
            } else {
                ui::data(&format!("{}\n", info.name));
                inspect::note_ports(&home.find(&info.name)?)?;
                ui::note(&format!("{} is {}", info.name, info.status));
            }
        }
        SnapshotVerb::Rm { names } => {
            let mut failed = false;
            for name in names {
                match snapshots::remove(&home, name) {
                    Ok(()) => ui::data(&format!("{name}\n")),
                    Err(problem) => {
                        ui::error(&problem);
                        failed = true;
                    }
                }
            }
            return Ok(u8::from(failed));
        }
    }
    Ok(0)
}

fn show(all: &[Snapshot]) {
    let rows = all.iter().map(|snapshot| {
        let what = if snapshot.memory { "memory and disk" } else { "disk" };
        let size = ui::size(snapshot.bytes);
        vec![
            snapshot.name.clone(),
            ui::line(&snapshot.sandbox),
            what.to_owned(),
            size,
            snapshot.created_at.clone(),
        ]
    });
    ui::table(&["NAME", "SANDBOX", "HOLDS", "SIZE", "TAKEN"], rows);
}
