//! `agentkernel volume`.

use agentkernel_sandbox::{Problem, plain};

use crate::arguments::VolumeVerb;
use crate::{environment, ui};

pub(super) fn volume(verb: &VolumeVerb) -> Result<u8, Problem> {
    let home = environment::home()?;
    match verb {
        VolumeVerb::Create { name } => {
            if !home.create_volume(name)? {
                ui::note(&format!("there is a volume called {name} already"));
            }
            ui::data(&format!("{name}\n"));
        }
        VolumeVerb::List { json } => {
            let all = home.list_volumes(true)?;
            if *json {
                ui::json(&all);
            } else {
                let rows = all.iter().map(|volume| {
                    let users =
                        if volume.used_by.is_empty() { "-".into() } else { volume.used_by.join(", ") };
                    vec![volume.name.clone(), ui::size(volume.size_bytes), users]
                });
                ui::table(&["NAME", "SIZE", "USED BY"], rows);
            }
        }
        VolumeVerb::Info { name, json } => {
            let found = home.list_volumes(true)?.into_iter().find(|volume| volume.name == *name);
            let Some(volume) = found else {
                let hint = Some("agentkernel volume list shows those there are");
                return Err(plain(
                    "not-found",
                    format!("there is no volume called {}", ui::line(name)),
                    hint,
                ));
            };
            if *json {
                ui::json(&volume);
            } else {
                let rows = [
                    ("name", volume.name),
                    ("path", ui::path(&volume.path)),
                    ("size", ui::size(volume.size_bytes)),
                    ("modified", volume.modified_at),
                    ("used by", volume.used_by.join(", ")),
                ];
                ui::data(
                    &rows.iter().map(|(name, value)| format!("{name:<9} {value}\n")).collect::<String>(),
                );
            }
        }
        VolumeVerb::Rm { names } => {
            let mut failed = false;
            for name in names {
                match home.remove_volume(name) {
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
