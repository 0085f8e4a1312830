//! `agentkernel images`.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use agentkernel_image::registry::{RegistryOptions, Transfer};
use agentkernel_sandbox::build::ImageBuilder;
use agentkernel_sandbox::images::{ImageInfo, Images, archive_output, format_size};
use agentkernel_sandbox::state::Home;
use agentkernel_sandbox::{Problem, io, plain};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::arguments::{ImagesVerb, RegistryArguments};
use crate::{environment, ui};

/// Digits of an id that tell images apart for people.
const SHORT_ID: usize = 12;

pub(super) fn images(verb: &ImagesVerb) -> Result<u8, Problem> {
    let images = Images::open(&environment::home()?)?;
    match verb {
        ImagesVerb::List { json, quiet } => return list(&images, *json, *quiet),
        ImagesVerb::Load { source, tag, json } => load(&images, source, tag.as_deref(), *json)?,
        ImagesVerb::Save { images: names, output } => {
            let mut writer = archive_output(output)?;
            let saved = images.save(names, &mut writer);
            let saved = saved.and_then(|()| writer.flush().map_err(io("write the archive")));
            if saved.is_err() && output.as_os_str() != "-" {
                // Half an archive is worse than none.
                let _ = std::fs::remove_file(output);
            }
            saved?;
        }
        ImagesVerb::Pull { names, registry } => {
            let mut pulled = Vec::new();
            for name in names {
                pulled.push(pull(&images, name, registry)?);
            }
            if registry.json {
                ui::json(&json!({ "pulled": pulled }));
            } else {
                ui::data(&pulled.iter().map(|name| format!("{name}\n")).collect::<String>());
            }
        }
        ImagesVerb::Push { image, to, registry } => {
            let bars = Bars::new(!registry.quiet, "pushing");
            let options = options(registry.insecure)?;
            let digest =
                super::block_on(images.push(image, to.as_deref(), &options, &|step| bars.show(step)))??;
            bars.clear();
            if registry.json {
                ui::json(&json!({ "pushed": to.as_ref().unwrap_or(image), "digest": digest }));
            } else {
                ui::data(&format!("{digest}\n"));
            }
        }
        ImagesVerb::Tag { image, name } => images.tag(image, name)?,
        ImagesVerb::Inspect { image, json } => inspect(&images, image, *json)?,
        ImagesVerb::Rm { images: names, force } => {
            let mut failed = false;
            for name in names {
                match images.remove(name, *force) {
                    Ok(()) => ui::data(&format!("{}\n", ui::line(name))),
                    Err(problem) => {
                        ui::error(&problem);
                        failed = true;
                    }
                }
            }
            return Ok(u8::from(failed));
        }
        ImagesVerb::Sync { json } => {
            let home = environment::home()?;
            let gone = ImageBuilder::open(&home, &environment::program()?)?.sync()?;
            if *json {
                ui::json(&json!({ "gone": gone }));
            } else {
                ui::data(&gone.iter().map(|name| format!("{name}\n")).collect::<String>());
            }
        }
        ImagesVerb::Prune { dry_run, json } => {
            let pruned = images.prune(*dry_run)?;
            if *json {
                ui::json(&pruned);
            } else {
                let bytes = pruned.blobs.bytes + pruned.root_file_system_bytes;
                let what = if *dry_run { "would free" } else { "freed" };
                ui::data(&format!(
                    "{what} {}: {} blobs, {} root file systems\n",
                    format_size(bytes),
                    pruned.blobs.blobs,
                    pruned.root_file_systems
                ));
            }
        }
    }
    Ok(0)
}

/// Fetches what `reference` names if it is not to be had without.
pub(super) fn ensure(home: &Home, reference: &str, quiet: bool) -> Result<(), Problem> {
    let images = Images::open(home)?;
    if images.is_here(reference) {
        return Ok(());
    }
    images.check(reference)?;
    if !quiet {
        ui::note(&format!("image {} is not here: pulling it", ui::line(reference)));
    }
    let pulled = pull(&images, reference, &RegistryArguments { insecure: false, json: false, quiet });
    pulled.map(drop).map_err(|mut problem| {
        if let Some(near) = images.nearest(reference) {
            problem.hint = Some(format!("did you mean {near}?"));
        }
        problem
    })
}

fn pull(images: &Images, name: &str, registry: &RegistryArguments) -> Result<String, Problem> {
    let bars = Bars::new(!registry.quiet, "pulling");
    let options = options(registry.insecure)?;
    let pulled = super::block_on(images.pull(name, &options, &|step| bars.show(step)))?;
    bars.clear();
    pulled
}

pub(super) fn options(insecure: bool) -> Result<RegistryOptions, Problem> {
    let directory = match std::env::var_os("DOCKER_CONFIG").filter(|value| !value.is_empty()) {
        Some(directory) => PathBuf::from(directory),
        None => environment::home_directory()?.join(".docker"),
    };
    Ok(RegistryOptions {
        docker_config: Some(directory.join("config.json")),
        helper_path: std::env::var_os("PATH"),
        insecure,
        ..RegistryOptions::default()
    })
}

/// A bar for each layer that moves, on a terminal.
pub(super) struct Bars {
    all: MultiProgress,
    verb: &'static str,
    layers: Mutex<BTreeMap<usize, ProgressBar>>,
}

impl Bars {
    pub(super) fn new(wanted: bool, verb: &'static str) -> Self {
        let target = if wanted { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { all: MultiProgress::with_draw_target(target), verb, layers: Mutex::default() }
    }

    pub(super) fn show(&self, step: Transfer) {
        if step.is_present {
            return;
        }
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = layers.entry(step.layer).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new(step.size));
            let template = "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            let id: String = step.digest.hex().chars().take(SHORT_ID).collect();
            bar.with_prefix(format!("{} {id} {}/{}", self.verb, step.layer, step.layers))
        });
        bar.set_position(step.bytes);
    }

    pub(super) fn clear(&self) {
        let _ = self.all.clear();
    }
}

fn list(images: &Images, json: bool, quiet: bool) -> Result<u8, Problem> {
    let all = images.list()?;
    let damaged: Vec<_> = all.iter().filter(|image| image.problem.is_some()).collect();
    if json {
        ui::json(&all);
    } else if quiet {
        ui::data(&all.iter().map(|image| format!("{}\n", image.name)).collect::<String>());
    } else {
        let rows = all.iter().map(|image| {
            let created = image.created.as_deref().unwrap_or("-");
            // The day is enough for a list.
            let created = created.split('T').next().unwrap_or("-");
            vec![
                ui::line(&image.name),
                short_id(image),
                ui::line(created),
                format_size(image.size_bytes),
                if image.used_by.is_empty() { "-".into() } else { image.used_by.join(", ") },
            ]
        });
        ui::table(&["NAME", "ID", "CREATED", "SIZE", "USED BY"], rows);
        let (blobs, unpacked) = images.disk_bytes()?;
        if blobs + unpacked > 0 {
            ui::note(&format!(
                "on the disk: {} of layers, each once, and {} of root file systems made of images",
                format_size(blobs),
                format_size(unpacked)
            ));
        }
    }
    for image in &damaged {
        let message =
            format!("image {} cannot be used: {}", image.name, image.problem.as_deref().unwrap_or(""));
        ui::error(&plain("image", message, Some("load, pull or build it again, or remove it")));
    }
    let records = images.damaged_records()?;
    for problem in &records {
        ui::error(problem);
    }
    Ok(u8::from(!damaged.is_empty() || !records.is_empty()))
}

fn short_id(image: &ImageInfo) -> String {
    let id = image.image_id.as_deref().and_then(|id| id.strip_prefix("sha256:")).unwrap_or("-");
    id.chars().take(SHORT_ID).collect()
}

fn load(images: &Images, source: &str, tag: Option<&str>, json: bool) -> Result<(), Problem> {
    let mut status = ui::Status::new(true);
    let spooled = if source == "-" { Some(spool(images)?) } else { None };
    let source = spooled.as_ref().map_or(source.to_owned(), |spooled| spooled.path());
    let names = images.load(&source, tag, &mut |text| status.say(text))?;
    status.clear();
    if json {
        ui::json(&json!({ "loaded": names }));
    } else {
        ui::data(&names.iter().map(|name| format!("{name}\n")).collect::<String>());
    }
    Ok(())
}

/// An archive from stdin: its index may stand at its end, so it is kept first, in a file without a name.
struct Spooled(std::fs::File);

impl Spooled {
    fn path(&self) -> String {
        format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.0))
    }
}

fn spool(images: &Images) -> Result<Spooled, Problem> {
    let mut file = images.scratch()?;
    let mut stdin = std::io::stdin().lock().take(u64::MAX);
    std::io::copy(&mut stdin, &mut file).map_err(io("read the archive from stdin"))?;
    Ok(Spooled(file))
}

fn inspect(images: &Images, name: &str, json: bool) -> Result<(), Problem> {
    let details = images.inspect(name)?;
    if json {
        ui::json(&details);
        return Ok(());
    }
    let config = details.configuration.get("config").cloned().unwrap_or_default();
    let words = |key: &str| match config.get(key) {
        Some(serde_json::Value::Array(words)) => {
            words.iter().filter_map(|word| word.as_str()).collect::<Vec<_>>().join(" ")
        }
        Some(serde_json::Value::String(word)) => word.clone(),
        Some(serde_json::Value::Object(keys)) => keys.keys().cloned().collect::<Vec<_>>().join(" "),
        _ => String::new(),
    };
    let info = &details.info;
    let mut rows = vec![
        ("names", details.names.join(", ")),
        ("id", info.image_id.clone().unwrap_or_default()),
        ("digest", info.digest.clone().unwrap_or_default()),
        ("created", info.created.clone().unwrap_or_default()),
        ("size", format!("{} in {} layers", format_size(info.size_bytes), details.layers.len())),
        ("used by", info.used_by.join(", ")),
        ("user", words("User")),
        ("directory", words("WorkingDir")),
        ("entrypoint", words("Entrypoint")),
        ("command", words("Cmd")),
        ("ports", words("ExposedPorts")),
        ("volumes", words("Volumes")),
    ];
    rows.extend(info.labels.iter().map(|(key, value)| ("label", format!("{key}={value}"))));
    if let Some(serde_json::Value::Array(variables)) = config.get("Env") {
        rows.extend(variables.iter().filter_map(|word| word.as_str()).map(|word| ("env", word.to_owned())));
    }
    rows.retain(|(_, value)| !value.is_empty());
    ui::data(
        &rows.iter().map(|(name, value)| format!("{name:<11} {}\n", ui::line(value))).collect::<String>(),
    );
    Ok(())
}
