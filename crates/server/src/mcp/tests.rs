//! The door as a peer sees it, line by line; and the list of tools, which is frozen in `mcp-tools.json`.

use std::collections::BTreeSet;
use std::time::Duration;

use agentkernel_image::registry::RegistryOptions;
use agentkernel_sandbox::options::Surroundings;
use agentkernel_sandbox::spec::HostUser;
use agentkernel_sandbox::state::Home;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, ReadHalf, WriteHalf, split};
use tokio::task::JoinHandle;

use super::service::{MESSAGE, serve};
use crate::engine::{Engine, Grants, Limits, Settings};
use crate::http;

/// Longest wait for an answer that needs no machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// An engine with an empty state directory.
fn engine() -> (Engine, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().canonicalize().unwrap();
    let project = path.join("project");
    std::fs::create_dir(&project).unwrap();
    let user = HostUser { name: "somebody".into(), uid: 1000, gid: 1000, home: path.clone() };
    let settings = Settings {
        home: Home::open(&path.join("state")).unwrap(),
        program: path.join("program"),
        surroundings: Surroundings {
            user,
            current_directory: project,
            environment: Vec::new(),
            certificates: None,
        },
        configuration: None,
        registry: RegistryOptions::default(),
        grants: Grants::default(),
        limits: Limits { runs: 1, queue: 1, sandboxes: 1 },
    };
    (Engine::new(settings), directory)
}

/// A peer that writes what it likes.
struct Peer {
    lines: BufReader<ReadHalf<DuplexStream>>,
    to: WriteHalf<DuplexStream>,
    served: JoinHandle<Result<(), String>>,
    _directory: TempDir,
}

impl Peer {
    /// One that has said nothing yet.
    fn silent() -> Self {
        let (engine, directory) = engine();
        let (here, there) = tokio::io::duplex(64 << 10);
        let (reader, writer) = split(there);
        let served =
            tokio::spawn(
                async move { serve(engine, reader, writer).await.map_err(|problem| problem.message) },
            );
        let (reader, to) = split(here);
        Self { lines: BufReader::new(reader), to, served, _directory: directory }
    }

    /// One that has introduced itself.
    async fn new() -> Self {
        let mut peer = Self::silent();
        let client = json!({ "name": "test", "version": "1" });
        let hello = json!({ "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client });
        let answer = peer.ask("initialize", hello).await;
        assert_eq!(answer["result"]["serverInfo"]["name"], "agentkernel", "{answer}");
        peer.say(br#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#).await;
        peer
    }

    async fn say(&mut self, line: &[u8]) {
        self.to.write_all(line).await.unwrap();
        self.to.write_all(b"\n").await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = String::new();
        tokio::time::timeout(PATIENCE, self.lines.read_line(&mut line)).await.unwrap().unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    /// Sends a request and waits for the answer with its id.
    async fn ask(&mut self, method: &str, params: Value) -> Value {
        let request = json!({ "jsonrpc": "2.0", "id": 7, "method": method, "params": params });
        self.say(request.to_string().as_bytes()).await;
        loop {
            let message = self.hear().await;
            if message["id"] == 7 {
                return message;
            }
        }
    }

    async fn call(&mut self, tool: &str, arguments: Value) -> Value {
        self.ask("tools/call", json!({ "name": tool, "arguments": arguments })).await
    }

    /// Leaves, and waits for the server to notice.
    async fn leave(self) -> Result<(), String> {
        drop(self.to);
        drop(self.lines);
        tokio::time::timeout(PATIENCE, self.served).await.unwrap().unwrap()
    }
}

async fn tools() -> Vec<Value> {
    let mut peer = Peer::new().await;
    let answer = peer.ask("tools/list", json!({})).await;
    peer.leave().await.unwrap();
    answer["result"]["tools"].as_array().unwrap_or_else(|| panic!("{answer}")).clone()
}

fn name(tool: &Value) -> String {
    tool["name"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_tools_are_as_frozen() {
    let mut tools = tools().await;
    tools.sort_by_key(name);
    let text = serde_json::to_string_pretty(&tools).unwrap() + "\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/mcp-tools.json");
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let frozen = std::fs::read_to_string(path).unwrap_or_default();
    assert!(frozen == text, "the tools changed: run with UPDATE_SCHEMA=1 and look at the difference");
    for tool in &tools {
        let (name, schema) = (name(tool), &tool["inputSchema"]);
        assert_eq!(schema["type"], "object", "{name}");
        assert_eq!(schema["additionalProperties"], false, "{name}: what it does not know is refused");
        assert_eq!(tool["outputSchema"]["type"], "object", "{name}");
        assert!(!tool.to_string().contains("\"format\":\"uint"), "{name}: formats that there are not");
        assert!(tool["description"].as_str().is_some_and(|text| text.len() > 10), "{name}");
        let described = |schema: &Value| schema["description"].is_string();
        let properties = schema["properties"].as_object();
        for (property, schema) in properties.into_iter().flatten() {
            assert!(described(schema), "{name}: {property} has no description");
        }
        // Agents decide by these whether they must ask somebody first.
        for hint in ["readOnlyHint", "openWorldHint"] {
            let read_only = tool["annotations"]["readOnlyHint"] == true;
            let said = tool["annotations"][hint].is_boolean() || (hint == "readOnlyHint" && !read_only);
            assert!(said, "{name}: {hint}");
        }
    }
}

#[tokio::test]
async fn the_skill_names_tools_that_there_are() {
    let known: BTreeSet<String> = tools().await.iter().map(name).collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/src/commands/plugin/skill.md");
    let skill = std::fs::read_to_string(path).unwrap();
    let words = skill.split(|character: char| !(character.is_ascii_alphanumeric() || character == '_'));
    let named: BTreeSet<String> = words
        .filter(|word| word.starts_with("sandbox_") || word.starts_with("snapshot_"))
        .map(str::to_owned)
        .collect();
    assert!(named.len() > 5, "{named:?}");
    assert!(named.is_subset(&known), "{:?} are no tools", named.difference(&known).collect::<Vec<_>>());
}

/// Each tool's route of the HTTP API, in the order of [`crate::http`]'s groups.
const ROUTES: [(&str, &str, &str); 22] = [
    ("sandbox_run", "post", "/run"),
    ("sandbox_create", "post", "/sandboxes"),
    ("sandbox_list", "get", "/sandboxes"),
    ("sandbox_remove", "delete", "/sandboxes/{name}"),
    ("sandbox_start", "post", "/sandboxes/{name}/start"),
    ("sandbox_stop", "post", "/sandboxes/{name}/stop"),
    ("sandbox_fork", "post", "/sandboxes/{name}/fork"),
    ("sandbox_exec", "post", "/sandboxes/{name}/exec"),
    ("sandbox_exec_detach", "post", "/sandboxes/{name}/exec/detach"),
    ("sandbox_exec_list", "get", "/sandboxes/{name}/exec/detached"),
    ("sandbox_exec_status", "get", "/sandboxes/{name}/exec/detached/{id}"),
    ("sandbox_exec_logs", "get", "/sandboxes/{name}/exec/detached/{id}/logs"),
    ("sandbox_exec_kill", "delete", "/sandboxes/{name}/exec/detached/{id}"),
    ("sandbox_file_read", "get", "/sandboxes/{name}/files/{path}"),
    ("sandbox_file_write", "put", "/sandboxes/{name}/files/{path}"),
    ("sandbox_write_files", "post", "/sandboxes/{name}/files"),
    ("sandbox_diff", "get", "/sandboxes/{name}/diff"),
    ("sandbox_apply", "post", "/sandboxes/{name}/apply"),
    ("snapshot_take", "post", "/snapshots"),
    ("snapshot_list", "get", "/snapshots"),
    ("snapshot_restore", "post", "/snapshots/{name}/restore"),
    ("snapshot_delete", "delete", "/snapshots/{name}"),
];

#[tokio::test]
async fn what_a_tool_does_a_route_does() {
    let known: BTreeSet<String> = tools().await.iter().map(name).collect();
    let listed = ROUTES.iter().map(|(tool, ..)| (*tool).to_owned()).collect();
    assert_eq!(known, listed);
    let document: Value = serde_json::from_str(&http::description()).unwrap();
    for (tool, method, path) in ROUTES {
        assert!(document["paths"][path][method].is_object(), "{tool}: no {method} {path}");
    }
    // Without a name: the last run's.
    assert!(document["paths"]["/last/diff"]["get"].is_object());
    assert!(document["paths"]["/last/apply"]["post"].is_object());
}

#[tokio::test]
async fn what_is_no_message_does_no_harm() {
    let mut peer = Peer::new().await;
    let lines: [&[u8]; 8] = [
        b"",
        b"garbage",
        b"{",
        b"null",
        b"[[[[[[[[[[",
        b"\xff\xfe\x00",
        br#"{"jsonrpc":"2.0","id":1,"method":"no/such/method","params":{}}"#,
        br#"{"jsonrpc":"2.0","id":{},"method":"tools/call","params":[]}"#,
    ];
    for line in lines {
        peer.say(line).await;
    }
    // Deeper than what reads it may go.
    peer.say(&vec![b'['; 200_000]).await;
    let answer = peer.call("sandbox_list", json!({})).await;
    assert_eq!(answer["result"]["structuredContent"]["sandboxes"], json!([]), "{answer}");
    peer.leave().await.unwrap();
}

#[tokio::test]
async fn a_line_that_is_too_long_is_passed_over() {
    let mut peer = Peer::new().await;
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..=MESSAGE / piece.len() {
        peer.to.write_all(&piece).await.unwrap();
    }
    peer.say(b"").await;
    let answer = peer.call("sandbox_list", json!({})).await;
    assert_eq!(answer["result"]["structuredContent"]["sandboxes"], json!([]), "{answer}");
    peer.leave().await.unwrap();
}

#[tokio::test]
async fn what_is_not_known_is_refused() {
    let mut peer = Peer::new().await;
    let refused =
        |answer: &Value| answer["error"]["message"].is_string() || answer["result"]["isError"] == true;
    for (tool, arguments) in [
        ("no_such_tool", json!({})),
        ("sandbox_list", json!({ "nonsense": 1 })),
        ("sandbox_run", json!({ "command": ["true"], "nonsense": true })),
        ("sandbox_run", json!({})),
        ("sandbox_run", json!({ "command": "true" })),
        ("sandbox_run", json!({ "command": [] })),
        ("sandbox_run", json!({ "command": ["true"], "vcpus": -1 })),
        ("sandbox_run", json!({ "command": ["true"], "profile": "boundless" })),
        ("sandbox_exec", json!({ "name": "none", "command": ["true"] })),
        ("sandbox_file_read", json!({ "name": "../../etc", "path": "/etc/passwd" })),
        ("sandbox_file_write", json!({ "name": "none", "path": "/x", "content": "?", "encoding": "base64" })),
        ("sandbox_exec_logs", json!({ "name": "none", "id": "0", "stream": "stdin" })),
        ("sandbox_diff", json!({})),
        ("sandbox_apply", json!({ "name": "none" })),
        ("sandbox_fork", json!({ "name": "none", "as": "copy", "count": 70000 })),
        ("snapshot_restore", json!({ "name": "none" })),
        ("snapshot_delete", json!({ "name": "none", "force": true })),
    ] {
        let answer = peer.call(tool, arguments.clone()).await;
        assert!(refused(&answer), "{tool} {arguments}: {answer}");
    }
    // What went wrong is said with its code, for agents to act on.
    let answer = peer.call("sandbox_exec", json!({ "name": "none", "command": ["true"] })).await;
    let text = answer["result"]["content"][0]["text"].as_str().unwrap();
    assert!(text.contains("none") && text.contains("(not-found)"), "{text}");
    // And which parameter it was.
    let answer = peer.call("sandbox_list", json!({ "nonsense": 1 })).await;
    assert!(answer.to_string().contains("nonsense"), "{answer}");
    peer.leave().await.unwrap();
}

#[tokio::test]
async fn a_peer_may_leave_at_any_time() {
    Peer::silent().leave().await.unwrap();
    Peer::new().await.leave().await.unwrap();
    let mut peer = Peer::new().await;
    let request = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call",
        "params": { "name": "sandbox_list", "arguments": {} } });
    peer.say(request.to_string().as_bytes()).await;
    peer.leave().await.unwrap();
    let mut peer = Peer::new().await;
    peer.to.write_all(br#"{"jsonrpc":"2.0","id":1,"met"#).await.unwrap();
    peer.leave().await.unwrap();
    // One that speaks something else.
    let mut peer = Peer::silent();
    peer.say(b"GET / HTTP/1.1").await;
    let _ = peer.leave().await;
}
