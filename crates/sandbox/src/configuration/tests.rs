//! What configurations say, and what is said about their mistakes.

use proptest::prelude::*;

use super::document::KEYS;
use super::*;

fn parse(text: &str) -> Result<Configuration, ConfigurationError> {
    Configuration::parse(text, Path::new("p/agentkernel.toml"))
}

/// The error's text, and its hint on a second line, without the path that all begin with.
fn said(text: &str) -> String {
    let error = match parse(text) {
        Ok(configuration) => panic!("{text:?} was taken as {configuration:?}"),
        Err(error) => error,
    };
    let message = error.to_string();
    let message = message.strip_prefix("p/agentkernel.toml:").expect("names the file");
    error.hint().map_or_else(|| message.to_owned(), |hint| format!("{message}\n{hint}"))
}

#[test]
fn everything_that_can_be_said() {
    let text = r#"
        [sandbox]
        name = "shop"
        base_image = "python:3.12"
        init_script = """
make deps
"""
        workspace = "ro"
        [resources]
        vcpus = 0x10
        memory_mb = 4_096
        disk_mb = 64
        [security]
        profile = "permissive"
        mount_cwd = true
        require_hardware = true
        network = false
        commands = { allow = ["git", "make *"], block = ["git push"] }
        [security.domains]
        block = ["ads.example"]
        allow = ["b.example"]
        allowlist_only = true
        [network]
        mode = "none"
        allow = ["*.Example.com:443", "10.0.0.0/8"]
        deny = ["x.example.com/udp"]
        ports = ["8080:80", "[::1]:0:53/udp"]
        [[files]]
        source = "./config//settings.json"
        dest = "/etc/app/./settings.json"
        [[files]]
        source = "run.sh"
        dest = "/usr/local/bin/run"
        mode = "0755"
        [[files]]
        source = "key"
        dest = "/key"
        mode = 0o600
        [env]
        PORT = "8080"
        "a b" = ""
        [api]
        api_key_env = "AGENTKERNEL_KEY"
    "#;
    let file = |source: &str, destination: &str, mode| InjectedFile {
        source: source.into(),
        destination: destination.into(),
        mode,
    };
    let rule = |text: &str| text.parse::<NetworkRule>().unwrap();
    let expected = Configuration {
        name: Some("shop".into()),
        image: Some("python:3.12".into()),
        init_script: Some("make deps\n".into()),
        workspace: Some(WorkspaceMode::Ro),
        mount_cwd: true,
        vcpus: Some(16),
        memory_mib: Some(4096),
        disk_mib: Some(64),
        profile: Some(Profile::Permissive),
        require_hardware: true,
        network: Some(NetworkMode::None),
        allow: vec![rule("*.example.com:443"), rule("10.0.0.0/8"), rule("b.example")],
        deny: vec![rule("x.example.com/udp"), rule("ads.example")],
        ports: vec!["127.0.0.1:8080:80".parse().unwrap(), "[::1]:0:53/udp".parse().unwrap()],
        commands: CommandPolicy {
            allow: vec!["git".into(), "make *".into()],
            block: vec!["git push".into()],
        },
        files: vec![
            file("config/settings.json", "/etc/app/settings.json", 0o644),
            file("run.sh", "/usr/local/bin/run", 0o755),
            file("key", "/key", 0o600),
        ],
        environment: vec![("PORT".into(), "8080".into()), ("a b".into(), String::new())],
        build: BuildDefaults::default(),
        api_key: Some(ApiKeySource::Variable("AGENTKERNEL_KEY".into())),
    };
    assert_eq!(parse(text).unwrap(), expected);
    assert_eq!(parse("").unwrap(), Configuration::default());
    assert_eq!(parse("sandbox.runtime = 'golang'").unwrap().image.as_deref(), Some("golang:1.23-alpine"));
}

#[test]
fn no_key_is_without_effect() {
    let table = |table: &str| KEYS.iter().find(|(name, _)| *name == table).unwrap().1;
    assert!(table("").iter().all(|name| *name == "env" || KEYS.iter().any(|(table, _)| table == name)));
    for (table, keys) in KEYS {
        for key in keys {
            let text = match table {
                "files" => {
                    let others = ["source = 's'\n", "dest = '/d'\n"].concat();
                    let others = others.lines().filter(|line| !line.starts_with(key));
                    format!("[[files]]\n{key} = 1979-05-27\n{}", others.collect::<Vec<_>>().join("\n"))
                }
                "" => format!("{key} = 1979-05-27"),
                _ => format!("{table}.{key} = 1979-05-27"),
            };
            let said = said(&text);
            assert!(said.contains(key) && said.ends_with("not a date or time"), "{said}");
        }
    }
}

#[test]
fn unknown_keys() {
    for (text, expected) in [
        ("[sandbox]\n\n  vcpu = 1", "3:3: unknown key `sandbox.vcpu`\n`vcpus` is a key of [resources]"),
        ("[resources]\nvcpu = 1", "2:1: unknown key `resources.vcpu`\ndid you mean `vcpus`?"),
        ("[resources]\nmemory = 1", "2:1: unknown key `resources.memory`\ndid you mean `memory_mb`?"),
        ("[resource]\nvcpus = 1", "1:2: unknown table [resource]\ndid you mean `resources`?"),
        ("name = 'x'", "1:1: unknown key `name`\n`name` is a key of [sandbox]"),
        (
            "[zzz]",
            "1:2: unknown table [zzz]\nthe tables are sandbox, resources, security, network, build, files, env, api",
        ),
        (
            "[network]\nq = 1",
            "2:1: unknown key `network.q`\nthe keys of [network] are mode, allow, deny, ports",
        ),
        (
            "security = { commands = { alow = [] } }",
            "1:27: unknown key `security.commands.alow`\ndid you mean `allow`?",
        ),
        ("[[files]]\nsoruce = 'x'", "2:1: unknown key `files.soruce`\ndid you mean `source`?"),
        ("[sandbox]\n\"é\" = 1; ", "2:7: string values must be quoted, expected literal string"),
        (
            "[sandbox]\n'é\u{202e}\\' = 1",
            "2:1: unknown key `sandbox.é\\u{202e}\\\\`\nthe keys of [sandbox] are name, image, base_image, runtime, init_script, workspace",
        ),
        // The first in the file, not in the alphabet.
        (
            "[sandbox]\nzz = 1\naa = 1",
            "2:1: unknown key `sandbox.zz`\nthe keys of [sandbox] are name, image, base_image, runtime, init_script, workspace",
        ),
    ] {
        assert_eq!(said(text), expected);
    }
    for later in ["[agent]", "[secrets]", "[ssh]"] {
        let expected =
            format!("1:2: this version does not have {later} yet\nremove it; a later version will have it");
        assert_eq!(said(later), expected);
    }
    assert_eq!(
        said("security.mount_home = true"),
        "1:10: there is no `security.mount_home` any more\n\
         choose a `profile`, which decides it: permissive, moderate or restrictive"
    );
}

#[test]
fn values() {
    const MODE: &str = "`files.mode` must be an octal number from \"0\" to \"0777\"\n\
        write \"0644\", or 0o644 without quotes";
    const SOURCE: &str =
        "name a file beneath the configuration's own directory, relative to it, without `..`";
    const DEST: &str = "give the file's whole path in the guest, from `/` on, without `..`";
    let file = |line: &str| format!("[[files]]\nsource = 's'\ndest = '/d'\n{line}");
    for (text, expected) in [
        ("sandbox = 1".into(), "1:11: `sandbox` must be a table, not a whole number".to_owned()),
        ("[[sandbox]]".into(), "1:1: `sandbox` must be a table, not a list".into()),
        ("[files]".into(), "1:1: `files` must be a list of tables, not a table".into()),
        ("files = [1]".into(), "1:10: an element of `files` must be a table, not a whole number".into()),
        ("[sandbox]\nname = true".into(), "2:8: `sandbox.name` must be a string, not true or false".into()),
        (
            "sandbox.name = '-x\\'".into(),
            "1:16: `-x\\\\` is not a sandbox name\n\
             use 1 to 63 ASCII letters, digits, - and _, with a letter or digit at both ends"
                .into(),
        ),
        (
            "[sandbox]\nimage = 'a'\nbase_image = 'b'".into(),
            "3:1: `sandbox.base_image` is another name for `sandbox.image`: give one of them".into(),
        ),
        (
            "[sandbox]\nruntime = 'go'\nbase_image = 'b'".into(),
            "2:1: `sandbox.runtime` and `sandbox.image` both choose the image: give one of them".into(),
        ),
        ("sandbox.image = ''".into(), "1:17: `` is no name of an image".into()),
        ("sandbox.runtime = 'pyton'".into(), "1:19: `pyton` is no runtime\ndid you mean `python`?".into()),
        (
            "sandbox.runtime = 'cobol-85'".into(),
            "1:19: `cobol-85` is no runtime\nthere are node, rust, go, python, ruby, java, dotnet, php, elixir, lua, \
             terraform, c, base; `image` takes any other"
                .into(),
        ),
        (
            "sandbox.workspace = 'cwo'".into(),
            "1:21: `sandbox.workspace` must be one of cow, rw, ro, none, not `cwo`\ndid you mean `cow`?".into(),
        ),
        (
            "sandbox.workspace = 'cow'\nsecurity.mount_cwd = false".into(),
            "2:10: `security.mount_cwd = false` contradicts `sandbox.workspace`\ngive one of them".into(),
        ),
        (
            "sandbox.workspace = 'none'\nsecurity.mount_cwd = true".into(),
            "2:10: `security.mount_cwd = true` contradicts `sandbox.workspace`\ngive one of them".into(),
        ),
        ("resources.vcpus = 65".into(), "1:19: `resources.vcpus` must be from 1 to 64, not 65".into()),
        ("resources.vcpus = 0".into(), "1:19: `resources.vcpus` must be from 1 to 64, not 0".into()),
        ("resources.vcpus = -1".into(), "1:19: `resources.vcpus` must be from 1 to 64, not -1".into()),
        ("resources.vcpus = 1.5".into(), "1:19: `resources.vcpus` must be a whole number, not a fraction".into()),
        (
            "resources.memory_mb = 127".into(),
            "1:23: `resources.memory_mb` must be from 128 to 16777216, not 127".into(),
        ),
        (
            "resources.disk_mb = 99999999999999999999".into(),
            "1:21: `resources.disk_mb` must be from 64 to 16777216, not 99999999999999999999".into(),
        ),
        (
            "security.profile = 'moderat'".into(),
            "1:20: `security.profile` must be one of permissive, moderate, restrictive, not `moderat`\n\
             did you mean `moderate`?"
                .into(),
        ),
        (
            "security.commands.allow = ['a', 1]".into(),
            "1:33: an element of `security.commands.allow` must be a string, not a whole number".into(),
        ),
        (
            "security.commands.block = [' ']".into(),
            "1:28: a pattern without words matches no command".into(),
        ),
        (
            format!("security.commands.block = ['{}']", "x".repeat(257)),
            "1:28: a pattern has at most 256 bytes".into(),
        ),
        (
            format!("security.commands.block = [{}]", "'x',".repeat(257)),
            "1:1052: `security.commands.block` has more than 256 patterns".into(),
        ),
        ("\n[[files]]\ndest = '/d'".into(), "2:1: `files.source` is missing here".into()),
        ("[[files]]\nsource = 's'".into(), "1:1: `files.dest` is missing here".into()),
        (
            format!("{}\n{}", file(""), file("")),
            "7:8: two files cannot both become `/d`".into(),
        ),
        (file("mode = 644"), format!("4:8: {MODE}")),
        (file("mode = '1777'"), format!("4:8: {MODE}")),
        (file("mode = '+644'"), format!("4:8: {MODE}")),
        (file("mode = ''"), format!("4:8: {MODE}")),
        ("env.A = 1".into(), "1:9: `env.A` must be a string, not a whole number\nput quotes around it".into()),
        ("env.'A=' = ''".into(), "1:5: `A=` cannot be the name of a variable".into()),
        ("env.'' = ''".into(), "1:5: `` cannot be the name of a variable".into()),
        ("env.A = \"\\u0000\"".into(), "1:9: a variable cannot hold a NUL byte".into()),
        ("sandbox.name = 'a'\nsandbox.name = 'b'".into(), "2:9: duplicate key".into()),
    ] {
        assert_eq!(said(&text), expected, "{text}");
    }
    for source in ["", ".", "..", "/etc/passwd", "a/../../b", "a/..", "a/", "a/.", "a\\u0000"] {
        let written = source.replace("\\u0000", "\\0");
        let expected = format!("2:10: `files.source` cannot be `{written}`\n{SOURCE}");
        assert_eq!(said(&format!("[[files]]\nsource = \"{source}\"\ndest = '/d'")), expected);
    }
    for dest in ["", "/", "d", "/a/", "/a/../b", "/.."] {
        let expected = format!("3:8: `files.dest` cannot be `{dest}`\n{DEST}");
        assert_eq!(said(&format!("[[files]]\nsource = 's'\ndest = '{dest}'")), expected);
    }
}

#[test]
fn a_workspace_under_a_profile() {
    use Profile::{Moderate, Permissive, Restrictive};
    use WorkspaceMode::{Cow, None, Ro, Rw};
    for (text, expected) in [
        ("", [Rw, Cow, None]),
        ("sandbox.workspace = 'ro'", [Ro; 3]),
        ("security.mount_cwd = false", [None; 3]),
        ("security.mount_cwd = true", [Rw, Cow, Cow]),
        ("security.mount_cwd = true\nsandbox.workspace = 'ro'", [Ro; 3]),
        ("security.mount_cwd = false\nsandbox.workspace = 'none'", [None; 3]),
    ] {
        let configuration = parse(text).unwrap();
        let modes = [Permissive, Moderate, Restrictive].map(|profile| configuration.workspace_mode(profile));
        assert_eq!(modes, expected, "{text}");
    }
}

#[test]
fn only_small_regular_text_files_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agentkernel.toml");
    let said = || {
        let error = Configuration::load(&path).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot read {}", path.display()));
        let reason = std::error::Error::source(&error).expect("has a reason").to_string();
        let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir(&path));
        reason
    };
    assert_eq!(said(), "No such file or directory (os error 2)");
    std::fs::create_dir(&path).unwrap();
    assert_eq!(said(), "it is not a regular file");
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert_eq!(said(), "it is a symbolic link, which is not followed");
    let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert_eq!(said(), "it is not a regular file");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    assert_eq!(said(), "it is not a regular file");
    std::fs::write(&path, "#".repeat((1 << 20) + 1)).unwrap();
    assert_eq!(said(), "it is larger than 1024 KiB");
    std::fs::write(&path, b"# a\n\xff\n").unwrap();
    assert_eq!(said(), "line 2 is not UTF-8 text");
    std::fs::write(&path, "#".repeat(1 << 20)).unwrap();
    assert_eq!(Configuration::load(&path).unwrap(), Configuration::default());
    std::fs::write(&path, "sandbox.nam = ''").unwrap();
    let error = Configuration::load(&path).unwrap_err();
    assert_eq!(error.to_string(), format!("{}:1:9: unknown key `sandbox.nam`", path.display()));
}

#[test]
fn depth_and_size_do_no_harm() {
    let count = 200_000;
    for text in [
        "a.".repeat(count) + "a = 1",
        format!("[{}a]", "a.".repeat(count)),
        format!("env.a = {}", "[".repeat(count)),
        format!("env.a = {}", "{a=".repeat(count)),
        format!("{} = 1", "a".repeat(count)),
        format!("sandbox.name = '{}'", "a".repeat(count)),
        "[[files]]\n".repeat(100_000),
        // As deep as the parser lets anything be, which must not be too deep for a small stack.
        format!("env.a = {}1{}", format!("{{{}a = ", "a.".repeat(7)).repeat(78), "}".repeat(78)),
        format!("env.a = {}", format!("{{{}a = ", "a.".repeat(7)).repeat(79)),
        format!("env.a = {}1{}", format!("{{{}a = ", "a.".repeat(78)).repeat(78), "}".repeat(78)),
    ] {
        let error = parse(&text).unwrap_err();
        assert!(error.to_string().len() < 300, "{error}");
    }
    assert_eq!(
        parse(&"\n".repeat((1 << 20) + 1)).unwrap_err().to_string(),
        "p/agentkernel.toml:1:1: the file is larger than 1024 KiB"
    );
}

/// Lines that are mostly right.
fn line() -> impl Strategy<Value = String> {
    let table = proptest::sample::select(KEYS.map(|(table, _)| table).to_vec());
    let key =
        proptest::sample::select(KEYS.iter().flat_map(|(_, keys)| keys.iter().copied()).collect::<Vec<_>>());
    let value = prop_oneof![
        Just("\"none\"".to_owned()),
        Just("true".to_owned()),
        Just("false".to_owned()),
        Just("[]".to_owned()),
        Just("[{}]".to_owned()),
        Just("{}".to_owned()),
        "[0-9]{1,5}",
        "\"[a-z/.]{0,6}\"",
    ];
    prop_oneof![
        (table.clone(), key.clone(), value).prop_map(|(table, key, value)| match table {
            "" => format!("{key} = {value}"),
            table => format!("{table}.{key} = {value}"),
        }),
        table.prop_map(|table| format!("[{table}]")),
        "\\PC{0,12}",
    ]
}

proptest! {
    #[test]
    fn whatever_is_written_is_taken_or_its_place_is_named(lines in proptest::collection::vec(line(), 0..6)) {
        let text = lines.join("\n");
        match parse(&text) {
            Ok(configuration) => {
                for file in &configuration.files {
                    prop_assert!(file.source.components().all(|part| matches!(part, Component::Normal(_))));
                    prop_assert!(file.destination.is_absolute() && file.mode <= 0o777);
                }
            }
            Err(ConfigurationError::Content { line, column, message, hint, .. }) => {
                let written = text.split('\n').nth(line - 1);
                prop_assert!(written.is_some_and(|written| column <= written.chars().count() + 1), "{line}:{column}");
                prop_assert!(!message.is_empty() && !message.chars().any(char::is_control));
                prop_assert!(!hint.is_some_and(|hint| hint.chars().any(char::is_control)));
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}

#[test]
fn builds_have_defaults() {
    let text = "[build]\ndockerfile = 'docker/Dockerfile.dev'\ncontext = './'\ntarget = 'test'\nno_cache = true\n\
                args = { VERSION = '3', EMPTY = '' }";
    let read = Configuration::parse(text, Path::new("agentkernel.toml")).unwrap();
    let expected = BuildDefaults {
        dockerfile: Some("docker/Dockerfile.dev".into()),
        context: Some(PathBuf::new()),
        target: Some("test".into()),
        arguments: vec![("VERSION".into(), "3".into()), ("EMPTY".into(), String::new())],
        no_cache: true,
    };
    assert_eq!(read.build, expected);
    let hint = "name a place beneath the configuration's own directory, relative to it, without `..`";
    for (text, expected) in [
        ("build.context = '/etc'", "1:17: `build.context` cannot be `/etc`"),
        ("build.context = 'a/../..'", "1:17: `build.context` cannot be `a/../..`"),
        ("build.dockerfile = '../Dockerfile'", "1:20: `build.dockerfile` cannot be `../Dockerfile`"),
        ("build.dockerfile = ''", "1:20: `build.dockerfile` cannot be ``"),
    ] {
        assert_eq!(said(text), format!("{expected}\n{hint}"));
    }
    assert_eq!(
        said("build.args = { V = 3 }"),
        "1:20: `build.args.V` must be a string, not a whole number\nput quotes around it"
    );
    assert_eq!(said("build.args = { 'a=b' = '' }"), "1:16: `a=b` cannot be the name of a build argument");
}

#[test]
fn keys_of_the_server_are_taken_but_never_shown() {
    const SECRET: &str = "s3cr3t-!~\u{e9}";
    let configuration = parse("api.api_key = 's3cr3t!'").unwrap();
    let Some(ApiKeySource::Key(key)) = &configuration.api_key else { panic!("{configuration:?}") };
    assert_eq!(key.expose(), "s3cr3t!");
    assert!(!format!("{configuration:?} {configuration:#?}").contains("s3cr3t"));
    let rule = "a key has 1 to 1024 visible ASCII characters, no spaces";
    let name = "`api.api_key_env` must be the name of a variable: ASCII letters, digits and _";
    let itself = "the key itself would be `api_key`";
    for (text, expected) in [
        ("[api]\napi_ky = 'a'".into(), "2:1: unknown key `api.api_ky`\ndid you mean `api_key`?".to_owned()),
        (
            "[api]\nzzz = 'a'".into(),
            "2:1: unknown key `api.zzz`\nthe keys of [api] are api_key, api_key_env".into(),
        ),
        ("api_key = 'a'".into(), "1:1: unknown key `api_key`\n`api_key` is a key of [api]".into()),
        ("api = 's'".into(), "1:7: `api` must be a table, not a string".into()),
        ("api.api_key = 1".into(), "1:15: `api.api_key` must be a string, not a whole number".into()),
        (
            "[api]\napi_key_env = 'A'\napi_key = 's3cr3t'".into(),
            "2:1: `api.api_key_env` contradicts `api.api_key`\ngive one of them".into(),
        ),
        ("api.api_key = ''".into(), format!("1:15: `api.api_key`: {rule}")),
        (format!("api.api_key = '{SECRET}'"), format!("1:15: `api.api_key`: {rule}")),
        ("api.api_key = 's3cr3t key'".into(), format!("1:15: `api.api_key`: {rule}")),
        (format!("api.api_key = '{}'", "s".repeat(1025)), format!("1:15: `api.api_key`: {rule}")),
        ("api.api_key_env = ''".into(), format!("1:19: {name}\n{itself}")),
        ("api.api_key_env = '1A'".into(), format!("1:19: {name}\n{itself}")),
        (format!("api.api_key_env = '{SECRET}'"), format!("1:19: {name}\n{itself}")),
        ("api.api_key_env = '$A'".into(), format!("1:19: {name}\nleave out the `$`")),
    ] {
        assert_eq!(said(&text), expected, "{text}");
    }
}

#[test]
fn networks() {
    use NetworkMode::{None as Nothing, Public};
    for (text, expected) in [
        ("", None),
        ("security.network = true", Some(Public)),
        ("security.network = false", Some(Nothing)),
        ("security.network = 'public'", Some(Public)),
        ("network.mode = 'none'", Some(Nothing)),
        ("network.mode = 'public'\nsecurity.network = true", Some(Public)),
        ("security.domains.allowlist_only = true", Some(Nothing)),
        ("security.domains.allowlist_only = false", None),
        ("security.domains.allowlist_only = true\nsecurity.network = false", Some(Nothing)),
    ] {
        assert_eq!(parse(text).unwrap().network, expected, "{text}");
    }
    let many = format!("network.ports = [{}]", "'0:1',".repeat(65));
    for (text, expected) in [
        (
            "network.mode = 'none'\nsecurity.network = true",
            "2:10: `security.network` contradicts `network.mode`\ngive one of them",
        ),
        (
            "network.mode = 'public'\nsecurity.domains.allowlist_only = true",
            "2:18: `security.domains.allowlist_only` contradicts `network.mode`\n\
             an allow-list is mode \"none\" with what is allowed: give one of them",
        ),
        (
            "security.network = true\nsecurity.domains.allowlist_only = true",
            "2:18: `security.domains.allowlist_only` contradicts `security.network`\n\
             an allow-list is mode \"none\" with what is allowed: give one of them",
        ),
        (
            "network.mode = 'publik'",
            "1:16: `network.mode` must be one of none, public, not `publik`\ndid you mean `public`?",
        ),
        ("security.network = 'lan'", "1:20: `security.network` must be one of none, public, not `lan`"),
        ("security.network = 1", "1:20: `security.network` must be true or false, not a whole number"),
        (
            "[network]\nallow = [\n  'a.example',\n  'https://b.example',\n]",
            "4:3: `network.allow`: `https://b.example` is no rule: leave out what stands before the name: example.com\n\
             a rule is NAME, *.NAME, an address or a range, each with :PORT and /udp if wanted: \"*.example.com:443\"",
        ),
        (
            "[security.domains]\nblock = ['a.*.b']",
            "2:10: `security.domains.block`: `a.*.b` is no rule: an asterisk stands for what comes first only: \
             *.example.com\n\
             a rule is NAME, *.NAME, an address or a range, each with :PORT and /udp if wanted: \"*.example.com:443\"",
        ),
        (
            "[network]\nports = ['80']",
            "2:10: `network.ports`: `80` publishes no port: say which port of this machine leads there: \
             0:80 picks a free one\n\
             a port is [BIND:]HOST:GUEST, with /udp if wanted: \"8080:80\"",
        ),
        ("network.ports = [80]", "1:18: an element of `network.ports` must be a string, not a whole number"),
        (&many, "1:402: `network.ports` has more than 64 elements"),
    ] {
        assert_eq!(said(text), expected, "{text}");
    }
}
