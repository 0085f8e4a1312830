//! The other engine: Docker's own, by its command line. Its images are brought into the store as well, for sandboxes.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;

use agentkernel_build::{Event, OnEvent, Options};
use agentkernel_image::{Reference, StoredImage};
use serde::Deserialize;

use crate::images::{Images, store_problem};
use crate::problem::{Problem, io, plain};
use crate::state::{private_file, random_word};

/// What Docker says when there is no such image, whatever its version.
const GONE: [&str; 2] = ["no such image", "no such object"];

/// Says which of Docker's builders builds.
const BUILDKIT: &str = "DOCKER_BUILDKIT";
/// Most bytes of what Docker said last that are looked through for a known cause.
const KEPT: usize = 8 << 10;

/// Docker's command line program.
#[derive(Debug, Clone, Copy)]
pub(super) struct Docker<'a>(pub(super) &'a Path);

/// One image, as `docker image inspect` has it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    id: String,
    size: u64,
}

/// A file with a secret, gone with this value.
struct Secret(PathBuf);

impl Drop for Secret {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Docker<'_> {
    /// Runs `docker build` and tells what it says as it comes.
    pub(super) fn build(
        &self,
        scratch: &Path,
        reference: &str,
        context: &Path,
        dockerfile: &Path,
        options: &Options,
        on_event: OnEvent<'_>,
    ) -> Result<(), Problem> {
        // Whole paths, for Docker takes `-` for its standard input and `-x` for a flag.
        let whole = |path: &Path| std::path::absolute(path).map_err(io(format!("find {}", path.display())));
        let mut command = Command::new(self.0);
        if std::env::var_os(BUILDKIT).is_none() {
            command.env(BUILDKIT, "1");
        }
        command.args(["build", "-t", reference, "-f"]).arg(whole(dockerfile)?);
        for (key, value) in &options.labels {
            command.arg("--label").arg(format!("{key}={value}"));
        }
        for (name, value) in &options.arguments {
            command.arg("--build-arg").arg(format!("{name}={value}"));
        }
        if let Some(target) = &options.target {
            command.args(["--target", target]);
        }
        if options.no_cache {
            command.arg("--no-cache");
        }
        let mut secrets = Vec::new();
        for (id, content) in &options.secrets {
            let secret = Secret(scratch.join(format!("secret-{}", random_word())));
            let file = private_file().create_new(true).open(&secret.0);
            file.and_then(|mut file| file.write_all(content)).map_err(io("hand a secret to docker"))?;
            command.arg("--secret").arg(format!("id={id},src={}", secret.0.display()));
            secrets.push(secret);
        }
        command.arg(whole(context)?).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| self.missing(&error))?;
        let (sender, receiver) = mpsc::channel();
        let pump = |stream: Option<Box<dyn Read + Send>>| {
            let sender = sender.clone();
            stream.map(|mut stream| {
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 8 << 10];
                    while let Ok(count @ 1..) = stream.read(&mut buffer) {
                        if sender.send(buffer[..count].to_vec()).is_err() {
                            return;
                        }
                    }
                })
            })
        };
        let threads = [
            pump(child.stdout.take().map(|stream| Box::new(stream) as _)),
            pump(child.stderr.take().map(|stream| Box::new(stream) as _)),
        ];
        drop(sender);
        let mut last = Vec::new();
        for bytes in receiver {
            on_event(Event::Output(&bytes));
            last.extend_from_slice(&bytes);
            last.drain(..last.len().saturating_sub(KEPT));
        }
        for thread in threads.into_iter().flatten() {
            let _ = thread.join();
        }
        let status = child.wait().map_err(io("wait for docker"))?;
        if status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&last);
        let hint = said.contains("buildx component is missing").then_some(
            "install Docker's buildx (Debian: docker-buildx), or set DOCKER_BUILDKIT=0 for Docker's older builder",
        );
        Err(plain("build-step", format!("docker build failed: {status}"), hint))
    }

    /// Brings an image of Docker's into the store, under the same name: its record and its bytes, uncompressed.
    pub(super) fn take(&self, images: &Images, reference: &Reference) -> Result<(StoredImage, u64), Problem> {
        let name = reference.familiar();
        let answer = self.call(&["image", "inspect", "--format", "{{json .}}", &name])?;
        let inspected: Inspected = serde_json::from_slice(&answer.stdout)
            .map_err(|error| plain("docker", format!("docker's answer is not understood: {error}"), None))?;
        let mut archive = images.scratch()?;
        let output = archive.try_clone().map_err(io("take the image from docker"))?;
        let status = Command::new(self.0)
            .args(["save", &name])
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(Stdio::null())
            .status()
            .map_err(|error| self.missing(&error))?;
        if !status.success() {
            return Err(plain("docker", format!("docker save failed: {status}"), None));
        }
        archive.seek(SeekFrom::Start(0)).map_err(io("take the image from docker"))?;
        let path = format!("/proc/self/fd/{}", archive.as_raw_fd());
        let loaded = images.store().load(Path::new(&path), None, Some(reference), &mut |_| {});
        let image = loaded.map_err(store_problem)?.into_iter().next();
        let image = image.ok_or_else(|| plain("docker", "docker saved no image", None))?;
        if image.image_id.to_string() != inspected.id {
            return Err(plain("docker", "docker saved another image than it built", None));
        }
        Ok((image, inspected.size))
    }

    /// Removes an image; one that is gone already is no error.
    pub(super) fn remove(&self, reference: &str) -> Result<(), Problem> {
        match self.call(&["rmi", reference]) {
            Err(problem) if is_gone(&problem.message) => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Whether Docker has the image. An error if it does not answer: nobody knows then.
    pub(super) fn has(&self, reference: &str) -> Result<bool, Problem> {
        match self.call(&["image", "inspect", "--format", "{{.Id}}", reference]) {
            Ok(_) => Ok(true),
            Err(problem) if is_gone(&problem.message) => Ok(false),
            Err(problem) => Err(problem),
        }
    }

    fn call(&self, arguments: &[&str]) -> Result<Output, Problem> {
        let output = Command::new(self.0).args(arguments).stdin(Stdio::null()).output();
        let output = output.map_err(|error| self.missing(&error))?;
        if output.status.success() {
            return Ok(output);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = crate::printable(said.trim());
        Err(plain("docker", format!("docker {} failed: {said}", arguments.join(" ")), None))
    }

    fn missing(&self, error: &std::io::Error) -> Problem {
        let hint = Some("install docker, or leave --engine docker out: the native engine needs none");
        plain("docker", format!("cannot run {}: {error}", self.0.display()), hint)
    }
}

fn is_gone(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    GONE.iter().any(|gone| message.contains(gone))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A program that answers as Docker does in one case.
    fn answering(directory: &Path, code: u8, stderr: &str) -> PathBuf {
        let path = directory.join("docker");
        std::fs::write(&path, format!("#!/bin/sh\necho '{stderr}' >&2\nexit {code}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn gone_and_out_of_reach_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = answering(directory.path(), 1, "Error: No such image: agentkernel-x");
        assert!(!Docker(&path).has("agentkernel-x").unwrap());
        Docker(&path).remove("agentkernel-x").unwrap();
        let path = answering(directory.path(), 1, "Cannot connect to the Docker daemon");
        assert!(Docker(&path).has("agentkernel-x").unwrap_err().message.contains("Cannot connect"));
        Docker(&path).remove("agentkernel-x").unwrap_err();
        let path = answering(directory.path(), 0, "");
        assert!(Docker(&path).has("agentkernel-x").unwrap());
        let missing = directory.path().join("none");
        assert!(Docker(&missing).has("agentkernel-x").unwrap_err().hint.unwrap().contains("install docker"));
    }
}
