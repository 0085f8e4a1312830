//! What merging does to texts, and to what it has nothing to do with.

use proptest::prelude::*;

use super::*;

fn json() -> Entry {
    Entry { format: Format::Json, command: "agentkernel".into() }
}

fn toml() -> Entry {
    Entry { format: Format::Toml, command: "/opt/it's \"here\"/agentkernel".into() }
}

/// Puts the entry in, sees that it is there, and that all of `text` is back when it is taken out.
#[track_caller]
fn there_and_back(entry: &Entry, text: &str) -> String {
    assert_eq!(entry.state(text), Ok(State::Missing));
    let with = entry.put(text).unwrap();
    assert_eq!(entry.state(&with), Ok(State::Installed), "{with}");
    assert_eq!(entry.put(&with).as_deref(), Ok(with.as_str()), "a second time changes nothing");
    assert_eq!(entry.take(&with).unwrap().as_deref(), Some(text));
    with
}

#[test]
fn a_new_file() {
    for text in ["", "\n", "{}", "{ }\n"] {
        let with = json().put(text).unwrap();
        let value: Value = serde_json::from_str(&with).unwrap();
        let entry = serde_json::json!({ "command": "agentkernel", "args": ["mcp"] });
        assert_eq!(value, serde_json::json!({ "mcpServers": { "agentkernel": entry } }));
        assert_eq!(json().take(&with), Ok(None));
    }
    let expected = "{\n  \"mcpServers\": {\n    \"agentkernel\": {\n      \"command\": \"agentkernel\",\n      \
                    \"args\": [\"mcp\"]\n    }\n  }\n}\n";
    assert_eq!(json().put("").unwrap(), expected);
    let codex = Entry { format: Format::Toml, ..json() };
    let expected = "[mcp_servers.agentkernel]\ncommand = \"agentkernel\"\nargs = [\"mcp\"]\n";
    assert_eq!(codex.put("").unwrap(), expected);
    assert_eq!(codex.take(expected), Ok(None));
}

#[test]
fn everything_else_stays_as_it_is_written() {
    let four = "{\n    \"z\": [1,2,  3.50],\n    \"mcpServers\": {\n        \"b\": { \"command\": \"b\" }\n    },\n    \
                \"a\": \"\\u00e9\"\n}";
    let with = there_and_back(&json(), four);
    assert!(with.contains("        \"agentkernel\": {\n            \"command\": \"agentkernel\","), "{with}");
    assert!(
        with.starts_with("{\n    \"z\": [1,2,  3.50],\n") && with.ends_with("\"a\": \"\\u00e9\"\n}"),
        "{with}"
    );
    let tabs = "{\n\t\"projects\": {\n\t\t\"/p\": {\"mcpServers\": {\"agentkernel\": {}}}\n\t}\n}\n";
    let with = there_and_back(&json(), tabs);
    assert!(with.contains("\n\t\"mcpServers\": {\n\t\t\"agentkernel\": {\n\t\t\t\"command\""), "{with}");
    let windows = "{\r\n  \"a\": 1\r\n}\r\n";
    let with = there_and_back(&json(), windows);
    assert!(with.matches('\n').count() == with.matches("\r\n").count(), "{with:?}");
    // What is all on one line says the same afterwards, on more lines.
    let line = r#"{"a":1,"mcpServers":{"b":{}}}"#;
    let with = json().put(line).unwrap();
    let back: Value = serde_json::from_str(&json().take(&with).unwrap().unwrap()).unwrap();
    assert_eq!(back, serde_json::from_str::<Value>(line).unwrap());
}

#[test]
fn codex() {
    let text = "# mine\nmodel = \"o\"   # best\n\n[mcp_servers.other]\ncommand = 'x'\n\n[tui]\ntheme = \"dark\"\n# end\n";
    let with = there_and_back(&toml(), text);
    assert!(with.contains("[mcp_servers.agentkernel]\ncommand = "), "{with}");
    there_and_back(&toml(), "model = \"o\"\n");
    there_and_back(&toml(), "mcp_servers = { other = { command = \"x\" } }\n");
    let text =
        "[mcp_servers.agentkernel]\ncommand = \"agentkernel\"\nargs = [\"mcp\", \"--verbose\"]\n[a]\nb = 1\n";
    assert_eq!(toml().state(text), Ok(State::Differs));
    let with = toml().put(text).unwrap();
    assert_eq!(toml().state(&with), Ok(State::Installed));
    assert!(with.contains("[a]\nb = 1\n"), "{with}");
}

#[test]
fn what_stands_under_our_name() {
    let state = |entry: &str| json().state(&format!("{{\"mcpServers\":{{\"agentkernel\":{entry}}}}}"));
    for (entry, expected) in [
        (r#"{"args":["mcp"],"command":"agentkernel"}"#, State::Installed),
        (r#"{"args":["mcp"],"command":"/opt/bin/agentkernel"}"#, State::Elsewhere),
        (r#"{"args":["mcp"],"command":"./agentkernel"}"#, State::Differs),
        (r#"{"args":["mcp"],"command":"/tmp/evil"}"#, State::Differs),
        (r#"{"args":["mcp"],"command":"agentkernel","env":{"A":"1"}}"#, State::Differs),
        (r#"{"args":["mcp","-x"],"command":"agentkernel"}"#, State::Differs),
        (r#"{"args":"mcp","command":"agentkernel"}"#, State::Differs),
        (r#"{"url":"http://127.0.0.1:18888/mcp"}"#, State::Differs),
        ("null", State::Differs),
    ] {
        assert_eq!(state(entry), Ok(expected), "{entry}");
    }
}

#[test]
fn what_is_not_understood_is_left_alone() {
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    for (text, place) in [
        ("{\n  // mine\n  \"a\": 1\n}", Some((2, 3))),
        ("{\n  \"a\": 1,\n}", Some((3, 1))),
        ("{\"a\": 1} x", Some((1, 10))),
        ("\u{feff}{}", Some((1, 1))),
        ("[]", Some((1, 1))),
        ("nul", Some((1, 3))),
        (r#"{"mcpServers": []}"#, None),
        // Readers disagree on which of the two counts.
        (r#"{"mcpServers": {}, "mcpServers": {"b": {}}}"#, None),
        (r#"{"mcpServers": {"agentkernel": 1, "agentkernel": 2}}"#, None),
        (&deep, Some((1, 132))),
    ] {
        let mistake = json().put(text).unwrap_err();
        assert_eq!(mistake.place, place, "{text:.60}: {mistake:?}");
        assert!(mistake.message.len() < 200 && !mistake.message.contains(" at line"), "{mistake:?}");
    }
    for (text, place) in
        [("a = \n", Some((1, 5))), ("a = 1\n[b\n", Some((2, 3))), ("mcp_servers = 3\n", None)]
    {
        assert_eq!(toml().put(text).unwrap_err().place, place, "{text}");
        assert!(toml().take(text).is_err());
    }
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            object(inner).prop_map(Value::from),
        ]
    })
}

fn object(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Map<String, Value>> {
    let key = prop_oneof![Just("mcpServers".to_owned()), Just("agentkernel".to_owned()), "\\PC{0,6}"];
    proptest::collection::vec((key, value), 0..5).prop_map(|pairs| pairs.into_iter().collect())
}

/// White space that changes nothing, so that every way to write a value comes up.
fn written(value: &Value, how: u8) -> String {
    match how {
        0 => value.to_string(),
        1 => serde_json::to_string_pretty(value).unwrap() + "\n",
        2 => serde_json::to_string_pretty(value).unwrap().replace('\n', "\r\n"),
        _ => format!(" \n{} \n\n", serde_json::to_string_pretty(value).unwrap().replace("  ", "\t")),
    }
}

proptest! {
    #[test]
    fn nothing_but_the_entry_changes(root in object(value()), servers in object(value()), has in any::<bool>(), how in 0..4_u8) {
        let mut root = root;
        let mut servers = servers;
        servers.remove(NAME);
        root.remove(JSON_TABLE);
        // An empty table of servers is as none: who emptied it cannot be told afterwards.
        if has && !servers.is_empty() {
            root.insert(JSON_TABLE.into(), servers.into());
        }
        let value = Value::Object(root.clone());
        // Within strings as well, the tabs of the last form would be no JSON.
        let text = written(&value, how);
        let Ok(Value::Object(root)) = serde_json::from_str(&text) else { return Ok(()) };
        let with = json().put(&text).unwrap();
        let mut expected = root.clone();
        let entry = serde_json::json!({ "command": "agentkernel", "args": ["mcp"] });
        let servers = expected.entry(JSON_TABLE).or_insert_with(|| Map::new().into());
        servers.as_object_mut().unwrap().insert(NAME.into(), entry);
        prop_assert_eq!(&serde_json::from_str::<Value>(&with).unwrap(), &Value::from(expected));
        match json().take(&with).unwrap() {
            Some(back) => prop_assert_eq!(serde_json::from_str::<Value>(&back).unwrap(), Value::from(root)),
            None => prop_assert!(root.is_empty()),
        }
    }

    #[test]
    fn no_text_makes_it_panic(text in "[\\[\\]{}:,\"a/\\\\ \n0-9mcpServers=#.']{0,60}") {
        for entry in [json(), toml()] {
            let _ = entry.state(&text);
            let _ = entry.take(&text);
            if let Ok(with) = entry.put(&text) {
                prop_assert_eq!(entry.state(&with), Ok(State::Installed));
            }
        }
    }
}
