//! Coding agents are told of the server in their own files, which are a stranger's or the user's, and stay so.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::host::{Host, Said, finish, program, set_mode};

/// What an agent would be told: no variable of the tests' own surroundings says where its files are.
fn command(host: &Host, arguments: &[&str]) -> Command {
    let mut command = host.command(arguments);
    command.env_remove("CLAUDE_CONFIG_DIR").env_remove("CODEX_HOME");
    command
}

#[track_caller]
fn plugin(host: &Host, arguments: &[&str]) -> Said {
    finish(command(host, &[&["plugin"], arguments].concat()), b"")
}

fn entry() -> Value {
    json!({ "command": program().canonicalize().unwrap(), "args": ["mcp"] })
}

/// All files below a directory with their content, and directories with none.
fn tree(directory: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        let name = path.to_str().unwrap().to_owned();
        if entry.file_type().unwrap().is_dir() {
            found.push((name, String::new()));
            found.extend(tree(&path));
        } else {
            found.push((name, fs::read_to_string(&path).unwrap_or_default()));
        }
    }
    found.sort();
    found
}

#[test]
fn claude_in_a_project() {
    let host = Host::bare();
    host.write("agentkernel.toml", "");
    host.write("deep/x", "");
    let before = tree(&host.home());
    let planned = plugin(&host, &["install", "claude", "--dry-run"]);
    let diff = planned.expect(0);
    assert!(diff.contains("--- /dev/null\n+++ ") && diff.contains("+    \"agentkernel\": {\n"), "{diff}");
    assert!(diff.contains("+name: agentkernel\n"), "{diff}");
    assert_eq!(tree(&host.home()), before);

    // From anywhere in the project, into its root.
    let mut install = command(&host, &["plugin", "install", "claude"]);
    install.current_dir(host.project().join("deep"));
    let said = finish(install, b"");
    assert_eq!(said.expect(0).matches("created ").count(), 2, "{said:?}");
    let configuration: Value = serde_json::from_str(&host.read(".mcp.json")).unwrap();
    assert_eq!(configuration, json!({ "mcpServers": { "agentkernel": entry() } }));
    let skill = host.read(".claude/skills/agentkernel/SKILL.md");
    assert!(skill.starts_with("---\nname: agentkernel\ndescription: "));
    let installed = tree(&host.home());

    let again = plugin(&host, &["install", "claude"]);
    assert_eq!(again.expect(0), "");
    assert_eq!(again.stderr.matches("nothing to change").count(), 2, "{}", again.stderr);
    assert_eq!(tree(&host.home()), installed);

    let listed: Value = serde_json::from_str(plugin(&host, &["list", "--json"]).expect(0)).unwrap();
    let state = |plugin: &str, scope: &str, part: &str| {
        let mut all = listed.as_array().unwrap().iter();
        let found = all.find(|one| one["plugin"] == plugin && one["scope"] == scope && one["part"] == part);
        found.map(|one| one["state"].as_str().unwrap().to_owned())
    };
    assert_eq!(state("claude", "project", "server").as_deref(), Some("installed"));
    assert_eq!(state("claude", "project", "skill").as_deref(), Some("installed"));
    assert_eq!(state("mcp", "project", "server").as_deref(), Some("installed"));
    assert_eq!(state("claude", "global", "server").as_deref(), Some("not installed"));
    assert_eq!(state("mcp", "global", "server"), None, "no agent is set up here");

    // The skill needs the server.
    let kept = plugin(&host, &["remove", "mcp"]);
    kept.expect(1);
    assert!(kept.stderr.contains("plugin remove claude"), "{}", kept.stderr);
    let planned = plugin(&host, &["remove", "claude", "--dry-run"]);
    assert!(planned.expect(0).contains("+++ /dev/null\n"));
    assert_eq!(tree(&host.home()), installed);
    let said = plugin(&host, &["remove", "claude"]);
    assert_eq!(said.expect(0).matches("removed ").count(), 2, "{said:?}");
    assert_eq!(tree(&host.home()), before, "all that was added is gone, its directories included");
    plugin(&host, &["install", "claude"]).expect(0);
    plugin(&host, &["remove", "mcp", "--force"]).expect(0);
    assert!(!host.project().join(".mcp.json").exists());
    plugin(&host, &["remove", "claude"]).expect(0);
    let said = plugin(&host, &["remove", "claude"]);
    assert_eq!((said.expect(0), said.stderr.matches("nothing to change").count()), ("", 2));
}

#[test]
fn what_else_is_there_stays() {
    let host = Host::bare();
    let mine = "{\n\t\"z\": 1.50,\n\t\"mcpServers\": {\n\t\t\"other\": {\"command\": \"x\",  \"env\": {\"K\": \"v\"}}\n\t},\n\t\"a\": []\n}\n";
    host.write(".mcp.json", mine);
    set_mode(&host.project().join(".mcp.json"), 0o640);
    host.write(".claude/skills/other/SKILL.md", "mine");
    let before = tree(&host.project());
    let said = plugin(&host, &["install", "claude", "--json"]);
    let report: Value = serde_json::from_str(said.expect(0)).unwrap();
    assert_eq!((&report[0]["action"], &report[1]["action"]), (&json!("changed"), &json!("created")));
    let with = host.read(".mcp.json");
    assert!(
        with.starts_with(
            "{\n\t\"z\": 1.50,\n\t\"mcpServers\": {\n\t\t\"other\": {\"command\": \"x\",  \"env\""
        ),
        "{with}"
    );
    let mode = fs::metadata(host.project().join(".mcp.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640);

    // Words of the user's own in the skill.
    let skill = ".claude/skills/agentkernel/SKILL.md";
    let changed = host.read(skill) + "\nAlways use a sandbox.\n";
    host.write(skill, &changed);
    for verb in ["install", "remove"] {
        let said = plugin(&host, &[verb, "claude"]);
        said.expect(1);
        assert!(said.stderr.contains("kept: ") && said.stderr.contains("--force"), "{}", said.stderr);
        assert_eq!(host.read(skill), changed);
    }
    assert_eq!(host.read(".mcp.json"), mine, "the entry was taken out, and nothing else");
    plugin(&host, &["remove", "claude", "--force"]).expect(0);
    assert_eq!(tree(&host.project()), before);
}

#[test]
fn another_entry_of_our_name() {
    let host = Host::bare();
    let theirs =
        "{\"mcpServers\": {\"agentkernel\": {\"command\": \"/tmp/evil\\u001b[31m\", \"args\": [\"mcp\"]}}}";
    host.write(".mcp.json", theirs);
    for arguments in [&["install", "mcp"][..], &["remove", "mcp"], &["install", "mcp", "--dry-run"]] {
        let said = plugin(&host, arguments);
        let diff = said.expect(1);
        assert!(diff.contains("-") && diff.contains("/tmp/evil") && !diff.contains('\u{1b}'), "{diff}");
        assert!(said.stderr.contains("--force"), "{}", said.stderr);
        assert_eq!(host.read(".mcp.json"), theirs);
    }
    assert!(plugin(&host, &["list"]).expect(0).contains("differs"));
    plugin(&host, &["install", "mcp", "--force", "--dry-run"]).expect(0);
    assert_eq!(host.read(".mcp.json"), theirs);
    plugin(&host, &["install", "mcp", "--force"]).expect(0);
    let configuration: Value = serde_json::from_str(&host.read(".mcp.json")).unwrap();
    assert_eq!(configuration["mcpServers"]["agentkernel"], entry());
}

#[test]
fn what_cannot_be_merged_is_left_alone() {
    let host = Host::bare();
    for (text, place) in [("{\n  // mine\n  \"a\": 1\n}\n", ":2:3:"), ("{\"a\": ", ":1:"), ("[]", ":1:1:")] {
        host.write(".mcp.json", text);
        for arguments in [&["install", "mcp"][..], &["remove", "mcp"], &["install", "mcp", "--force"]] {
            let said = plugin(&host, arguments);
            said.expect(1);
            assert!(said.stderr.contains(&format!(".mcp.json{place}")), "{}", said.stderr);
            assert!(said.stderr.contains("hint: ") && said.stderr.contains("by hand"), "{}", said.stderr);
            assert_eq!(host.read(".mcp.json"), text);
        }
        assert!(plugin(&host, &["list"]).expect(0).contains("unreadable"));
    }
    let path = host.project().join(".mcp.json");
    fs::write(&path, b"{\"a\": \"\xff\"}").unwrap();
    plugin(&host, &["install", "mcp"]).expect(1);
    assert_eq!(fs::read(&path).unwrap(), b"{\"a\": \"\xff\"}");
    fs::remove_file(&path).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    assert!(plugin(&host, &["install", "mcp"]).stderr.contains("no regular file"));
    // One that cannot be changed keeps no other from being changed.
    let said = plugin(&host, &["install", "claude"]);
    said.expect(1);
    assert!(host.project().join(".claude/skills/agentkernel/SKILL.md").is_file());
}

#[test]
fn a_project_s_links_lead_nowhere() {
    let host = Host::bare();
    let outside = host.home().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "{}").unwrap();
    let before = tree(&outside);
    symlink("../outside/file", host.project().join(".mcp.json")).unwrap();
    symlink(&outside, host.project().join(".claude")).unwrap();
    for verb in ["install", "remove"] {
        for flags in [&[][..], &["--force"]] {
            let said = plugin(&host, &[&[verb, "claude"], flags].concat());
            said.expect(1);
            assert!(
                said.stderr.contains("symbolic link") && said.stderr.contains("leads out of the project")
            );
        }
    }
    assert_eq!(tree(&outside), before);
    assert!(host.project().join(".mcp.json").is_symlink());

    // One that stays in the project is fine on the way; `..` out of it is not, however it is written.
    fs::remove_file(host.project().join(".claude")).unwrap();
    fs::remove_file(host.project().join(".mcp.json")).unwrap();
    fs::create_dir(host.project().join(".agents")).unwrap();
    symlink(".agents", host.project().join(".claude")).unwrap();
    plugin(&host, &["install", "claude"]).expect(0);
    assert!(host.project().join(".agents/skills/agentkernel/SKILL.md").is_file());
    plugin(&host, &["remove", "claude"]).expect(0);
    assert!(host.project().join(".claude").is_symlink() && host.project().join(".agents").is_dir());
    symlink("../../outside", host.project().join(".agents/skills")).unwrap();
    plugin(&host, &["install", "claude"]).expect(1);
    assert_eq!(tree(&outside), before);
}

#[test]
fn every_agent_that_is_set_up() {
    let host = Host::bare();
    let home = host.home();
    let none = plugin(&host, &["install", "mcp", "--global"]);
    none.expect(1);
    assert!(none.stderr.contains("Gemini CLI") && none.stderr.contains("hint: "), "{}", none.stderr);

    // Dot files that are kept elsewhere, as many people do.
    let dotfiles = host.path().join("dotfiles");
    fs::create_dir_all(dotfiles.join("codex")).unwrap();
    fs::create_dir(home.join(".gemini")).unwrap();
    symlink(dotfiles.join("codex"), home.join(".codex")).unwrap();
    let codex = "# mine\nmodel = \"o\"\n\n[mcp_servers.other]\ncommand = \"x\" # y\n";
    fs::write(dotfiles.join("codex/config.toml"), codex).unwrap();
    let claude = "{\n  \"projects\": {\"/p\": {\"mcpServers\": {}}},\n  \"oauth\": \"secret\"\n}\n";
    fs::write(dotfiles.join("claude.json"), claude).unwrap();
    set_mode(&dotfiles.join("claude.json"), 0o600);
    symlink("../dotfiles/claude.json", home.join(".claude.json")).unwrap();

    let said = plugin(&host, &["install", "mcp", "--global"]);
    let text = said.expect(0);
    for agent in ["Claude Code", "Codex", "Gemini CLI"] {
        assert!(text.contains(agent), "{text}");
    }
    assert!(!text.contains("Cursor") && !home.join(".cursor").exists());
    let read = |path: &str| fs::read_to_string(home.join(path)).unwrap();
    let servers = |path: &str| serde_json::from_str::<Value>(&read(path)).unwrap()["mcpServers"].clone();
    assert_eq!(servers(".claude.json"), json!({ "agentkernel": entry() }));
    assert_eq!(servers(".gemini/settings.json"), json!({ "agentkernel": entry() }));
    let written = read(".codex/config.toml");
    assert!(
        written.starts_with(codex) && written.contains("\n[mcp_servers.agentkernel]\ncommand = "),
        "{written}"
    );
    assert!(home.join(".claude.json").is_symlink() && home.join(".codex").is_symlink());
    let mode = fs::metadata(dotfiles.join("claude.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let mode = fs::metadata(home.join(".gemini/settings.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "others' keys may come to stand in it");

    plugin(&host, &["remove", "mcp", "--global"]).expect(0);
    assert_eq!(read(".claude.json"), claude);
    assert_eq!(read(".codex/config.toml"), codex);
    assert!(home.join(".gemini").is_dir() && !home.join(".gemini/settings.json").exists());

    // Where variables say that an agent has its files elsewhere.
    let elsewhere = host.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let mut install = command(&host, &["plugin", "install", "claude", "--global"]);
    install.env("CLAUDE_CONFIG_DIR", &elsewhere);
    finish(install, b"").expect(0);
    assert!(
        elsewhere.join(".claude.json").is_file() && elsewhere.join("skills/agentkernel/SKILL.md").is_file()
    );
    assert_eq!(read(".claude.json"), claude);
}

#[test]
fn the_program_is_named_as_it_is_found() {
    let host = Host::bare();
    let programs = host.path().join("bin");
    fs::create_dir(&programs).unwrap();
    let installed_command = |path: &str| {
        let mut install = command(&host, &["plugin", "install", "mcp", "--force"]);
        install.env("PATH", path);
        finish(install, b"").expect(0);
        let configuration: Value = serde_json::from_str(&host.read(".mcp.json")).unwrap();
        configuration["mcpServers"]["agentkernel"]["command"].as_str().unwrap().to_owned()
    };
    symlink(program().canonicalize().unwrap(), programs.join("agentkernel")).unwrap();
    assert_eq!(installed_command(programs.to_str().unwrap()), "agentkernel");
    // Another program of that name, or one that is found in this directory only.
    fs::remove_file(programs.join("agentkernel")).unwrap();
    fs::write(programs.join("agentkernel"), "#!/bin/sh\n").unwrap();
    set_mode(&programs.join("agentkernel"), 0o755);
    let whole = program().canonicalize().unwrap().to_str().unwrap().to_owned();
    assert_eq!(installed_command(programs.to_str().unwrap()), whole);
    symlink(&whole, host.project().join("agentkernel")).unwrap();
    assert_eq!(installed_command("."), whole);
    // What was installed from there is taken away as well when the program has moved.
    symlink(&whole, host.path().join("agentkernel")).unwrap();
    let mut remove = command(&host, &["plugin", "remove", "mcp"]);
    remove.env("PATH", host.path());
    finish(remove, b"").expect(0);
    assert!(!host.project().join(".mcp.json").exists());
}

#[test]
fn a_home_directory_is_no_project() {
    let host = Host::bare();
    let mut install = command(&host, &["plugin", "install", "claude"]);
    install.current_dir(host.home());
    let said = finish(install, b"");
    said.expect(1);
    assert!(said.stderr.contains("home directory") && said.stderr.contains("--global"), "{}", said.stderr);
    let mut list = command(&host, &["plugin", "list"]);
    list.current_dir(host.home());
    let listed = finish(list, b"");
    assert!(listed.expect(0).contains("global") && !listed.expect(0).contains("project"), "{listed:?}");
}
