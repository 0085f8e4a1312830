//! The client library that is published in Cargo's registry, as it is, against a live server: agentkernel-clients URL [KEY]

use std::collections::HashMap;
use std::time::Duration;

use agentkernel_sdk::{
    AgentKernel, BatchCommand, CreateSandboxOptions, DetachedStatus, Error, ExecOptions, RunOptions,
    SecurityProfile, TakeSnapshotOptions,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().expect("a URL");
    let mut builder = AgentKernel::builder().base_url(url).timeout(Duration::from_secs(120));
    if let Some(key) = arguments.next() {
        builder = builder.api_key(key);
    }
    let client = builder.build()?;

    assert_eq!(client.health().await?, "ok");
    assert_eq!(client.run(&["echo", "hello"], None).await?.output, "hello\n");
    let options = RunOptions { profile: Some(SecurityProfile::Restrictive), ..RunOptions::default() };
    assert_eq!(client.run(&["echo", "apart"], Some(options)).await?.output, "apart\n");
    let commands = ["a", "b"].map(|word| BatchCommand { command: vec!["echo".into(), word.into()] });
    let results = client.batch_run(commands.into()).await?.results;
    let outputs: Vec<_> = results.iter().map(|result| result.output.as_deref()).collect();
    assert_eq!(outputs, [Some("a\n"), Some("b\n")]);
    let backends = client.get_backends().await?;
    assert_eq!(backends.default_backend.as_deref(), Some("qemu"));

    let options = CreateSandboxOptions { memory_mb: Some(512), ..CreateSandboxOptions::default() };
    let made = client.create_sandbox("rust-sdk", Some(options)).await?;
    assert_eq!((made.name.as_str(), made.status.as_str()), ("rust-sdk", "running"));
    assert_eq!(client.list_sandboxes().await?.len(), 1);
    assert_eq!(client.get_sandbox("rust-sdk").await?.uuid, made.uuid);
    assert_eq!(client.get_sandbox_by_uuid(made.uuid.as_deref().unwrap()).await?.name, "rust-sdk");
    let options =
        ExecOptions { env: vec!["COLOUR=red".into()], workdir: Some("/var".into()), sudo: Some(true) };
    let told = client.exec_in_sandbox("rust-sdk", &["sh", "-c", "echo $COLOUR; pwd; id -u"], Some(options)).await?;
    assert_eq!(told.output, "red\n/var\n0\n");

    client.write_file("rust-sdk", "tmp/deep/text", "text\n", None).await?;
    let read = client.read_file("rust-sdk", "tmp/deep/text").await?;
    assert_eq!((read.content.as_str(), read.encoding.as_str(), read.size), ("text\n", "utf8", 5));
    let files = HashMap::from([("/tmp/a".to_owned(), "1".to_owned())]);
    assert_eq!(client.write_files("rust-sdk", files).await?.written, 1);
    client.delete_file("rust-sdk", "tmp/a").await?;
    assert!(matches!(client.read_file("rust-sdk", "tmp/a").await, Err(Error::NotFound(_))));

    let command = client.exec_detached("rust-sdk", &["sh", "-c", "echo out; sleep 1000"], None).await?;
    assert_eq!(command.status, DetachedStatus::Running);
    while client.detached_logs("rust-sdk", &command.id, None).await?.stdout.as_deref() != Some("out\n") {}
    assert_eq!(client.detached_list("rust-sdk").await?.len(), 1);
    client.detached_kill("rust-sdk", &command.id).await?;
    assert_eq!(client.detached_status("rust-sdk", &command.id).await?.exit_code, Some(137));
    assert!(!client.get_sandbox_logs("rust-sdk").await?.is_empty());
    client.extend_ttl("rust-sdk", "1h").await?;

    let options = TakeSnapshotOptions { sandbox: "rust-sdk".into(), name: Some("rust-snapshot".into()) };
    assert_eq!(client.take_snapshot(options).await?.sandbox, "rust-sdk");
    assert_eq!(client.list_snapshots().await?.len(), 1);
    assert_eq!(client.get_snapshot("rust-snapshot").await?.name, "rust-snapshot");
    assert_eq!(client.restore_snapshot("rust-snapshot").await?.name, "rust-sdk");
    client.delete_snapshot("rust-snapshot").await?;
    client.remove_sandbox("rust-sdk").await?;
    assert!(matches!(client.get_sandbox("rust-sdk").await, Err(Error::NotFound(_))));

    let said = client.with_sandbox("rust-session", None, |sandbox| async move {
        sandbox.run(&["echo", "in"]).await
    });
    assert_eq!(said.await?.output, "in\n");
    assert!(client.list_sandboxes().await?.is_empty());
    println!("ok");
    Ok(())
}
