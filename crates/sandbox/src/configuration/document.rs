//! The configuration as a tree of spanned values: every key is known, every value of its type, or the place is named.

use std::ops::RangeInclusive;

use toml::Spanned;
use toml::de::{DeTable, DeValue};
use toml_parser::lexer::TokenKind;

use super::nearest::{nearest, shown};

/// The tables and their keys; `[env]` and `[build.args]` have whatever keys they like.
pub(super) const KEYS: [(&str, &[&str]); 10] = [
    ("", &["sandbox", "resources", "security", "network", "build", "files", "env", "api"]),
    ("sandbox", &["name", "image", "base_image", "runtime", "init_script", "workspace"]),
    ("resources", &["vcpus", "memory_mb", "disk_mb"]),
    ("security", &["profile", "mount_cwd", "require_hardware", "network", "commands", "domains"]),
    ("security.commands", &["allow", "block"]),
    ("security.domains", &["allow", "block", "allowlist_only"]),
    ("network", &["mode", "allow", "deny", "ports"]),
    ("build", &["dockerfile", "context", "target", "args", "no_cache"]),
    ("files", &["source", "dest", "mode"]),
    ("api", &["api_key", "api_key_env"]),
];

/// Keys of later versions.
const LATER: [&str; 3] = ["agent", "secrets", "ssh"];

/// Keys of 0.18 that profiles have replaced.
const REPLACED: [&str; 3] = ["security.mount_home", "security.pass_env", "security.read_only"];

/// Something wrong at a place of the text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mistake {
    /// Offset into the text, bytes.
    pub(super) at: usize,
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

impl Mistake {
    pub(super) fn new(at: usize, message: impl Into<String>) -> Self {
        Self { at, message: message.into(), hint: None }
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// Most parts of a dotted key.
const MOST_PARTS: usize = 8;

/// Refuses long dotted keys. The parser bounds brackets and the parts of each key, but not their product: 80 tables, each
/// in a key of 80 parts, are a tree too deep for a small stack when it is freed, even if there is a mistake in it.
fn check_depth(text: &str) -> Result<(), Mistake> {
    let mut parts = 1;
    for token in toml_parser::Source::new(text).lex() {
        match token.kind() {
            TokenKind::Dot => parts += 1,
            TokenKind::Whitespace
            | TokenKind::Atom
            | TokenKind::BasicString
            | TokenKind::LiteralString
            | TokenKind::MlBasicString
            | TokenKind::MlLiteralString => {}
            _ => parts = 1,
        }
        if parts > MOST_PARTS {
            return Err(Mistake::new(token.span().start(), format!("a key has at most {MOST_PARTS} parts")));
        }
    }
    Ok(())
}

/// Parses the text and makes sure that all its keys are known.
pub(super) fn parse(text: &str) -> Result<Spanned<DeTable<'_>>, Mistake> {
    check_depth(text)?;
    let root = DeTable::parse(text).map_err(|error| {
        Mistake::new(error.span().map_or(0, |span| span.start), shown_whole(error.message()))
    })?;
    check_keys(root.get_ref(), "")?;
    Ok(root)
}

/// The parser's own words, of which some are on several lines.
fn shown_whole(message: &str) -> String {
    message.lines().map(shown).collect::<Vec<_>>().join(" ")
}

/// Finds the first key of the text that is not known. The depth is that of [`KEYS`].
fn check_keys(table: &DeTable<'_>, path: &str) -> Result<(), Mistake> {
    let Some((_, known)) = KEYS.iter().find(|(table, _)| *table == path) else { return Ok(()) };
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in entries {
        let name = key.get_ref().as_ref();
        let full = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        if !known.contains(&name) {
            return Err(unknown(key.span().start, path, name, &full, value.get_ref()));
        }
        match value.get_ref() {
            DeValue::Table(table) => check_keys(table, &full)?,
            DeValue::Array(array) => {
                for table in array.iter().filter_map(|value| value.get_ref().as_table()) {
                    check_keys(table, &full)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn unknown(at: usize, path: &str, name: &str, full: &str, value: &DeValue<'_>) -> Mistake {
    let is_table = path.is_empty() && value.is_table();
    let what = if is_table { format!("[{}]", shown(name)) } else { format!("`{}`", shown(full)) };
    if LATER.contains(&full) {
        return Mistake::new(at, format!("this version does not have {what} yet"))
            .hint("remove it; a later version will have it");
    }
    if REPLACED.contains(&full) {
        return Mistake::new(at, format!("there is no {what} any more"))
            .hint("choose a `profile`, which decides it: permissive, moderate or restrictive");
    }
    let kind = if is_table { "table" } else { "key" };
    let mistake = Mistake::new(at, format!("unknown {kind} {what}"));
    let keys_of = |(table, keys): &(&'static str, &'static [&'static str])| {
        let table = *table;
        keys.iter().map(move |key| (table, *key))
    };
    let elsewhere = || KEYS.iter().filter(|(table, _)| !table.is_empty() && *table != path).flat_map(keys_of);
    let belongs = |(table, key): (&str, &str)| format!("`{key}` is a key of [{table}]");
    if let Some(exact) = elsewhere().find(|(_, key)| *key == name) {
        return mistake.hint(belongs(exact));
    }
    let known = KEYS.iter().find(|(table, _)| *table == path).map_or(&[][..], |(_, keys)| keys);
    if let Some(near) = nearest(name, known.iter().copied()) {
        return mistake.hint(format!("did you mean `{near}`?"));
    }
    let near = nearest(name, elsewhere().map(|(_, key)| key));
    match near.and_then(|near| elsewhere().find(|(_, key)| *key == near)) {
        Some(near) => mistake.hint(belongs(near)),
        None if path.is_empty() => mistake.hint(format!("the tables are {}", known.join(", "))),
        None => mistake.hint(format!("the keys of [{path}] are {}", known.join(", "))),
    }
}

/// A name and its string.
pub(super) type Entry<'d> = (Spanned<&'d str>, Spanned<&'d str>);

/// One table, which may be absent; its values are asked for by key and type.
#[derive(Clone, Copy)]
pub(super) struct Table<'d> {
    /// Its name, empty for the whole document.
    path: &'static str,
    /// Where it is, for what it lacks.
    at: usize,
    table: Option<&'d DeTable<'d>>,
}

impl<'d> Table<'d> {
    pub(super) fn root(document: &'d Spanned<DeTable<'d>>) -> Self {
        Self { path: "", at: 0, table: Some(document.get_ref()) }
    }

    fn get(&self, key: &str) -> Option<(&'d Spanned<std::borrow::Cow<'d, str>>, &'d Spanned<DeValue<'d>>)> {
        let known = KEYS.iter().any(|(table, keys)| *table == self.path && keys.contains(&key));
        debug_assert!(known, "{key} is missing in KEYS");
        self.table?.get_key_value(key)
    }

    /// A key's full name.
    pub(super) fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'d DeValue<'d>) -> Option<T>,
    ) -> Result<Option<Spanned<T>>, Mistake> {
        let Some((_, value)) = self.get(key) else { return Ok(None) };
        match read(value.get_ref()) {
            Some(read) => Ok(Some(Spanned::new(value.span(), read))),
            None => Err(wrong_type(&self.name(key), expected, value)),
        }
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<Spanned<&'d str>>, Mistake> {
        self.typed(key, "a string", DeValue::as_str)
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<Spanned<bool>>, Mistake> {
        self.typed(key, "true or false", DeValue::as_bool)
    }

    /// A whole number of a range.
    pub(super) fn number(&self, key: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, Mistake> {
        let Some(found) = self.typed(key, "a whole number", DeValue::as_integer)? else { return Ok(None) };
        let integer = found.get_ref();
        match u64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let (name, written) = (self.name(key), shown(&integer.to_string()));
                let (start, end) = range.into_inner();
                let message = format!("`{name}` must be from {start} to {end}, not {written}");
                Err(Mistake::new(found.span().start, message))
            }
        }
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&self, key: &str, words: &[(&str, T)]) -> Result<Option<T>, Mistake> {
        let Some(found) = self.string(key)? else { return Ok(None) };
        let written = *found.get_ref();
        if let Some((_, chosen)) = words.iter().find(|(word, _)| *word == written) {
            return Ok(Some(*chosen));
        }
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let message =
            format!("`{}` must be one of {}, not `{}`", self.name(key), known.join(", "), shown(written));
        let mistake = Mistake::new(found.span().start, message);
        Err(match nearest(written, known) {
            Some(near) => mistake.hint(format!("did you mean `{near}`?")),
            None => mistake,
        })
    }

    /// A list of strings, empty if the key is absent.
    pub(super) fn strings(&self, key: &str) -> Result<Vec<Spanned<&'d str>>, Mistake> {
        let Some(array) = self.typed(key, "a list of strings", DeValue::as_array)? else {
            return Ok(Vec::new());
        };
        let strings = array.get_ref().iter().map(|value| match value.get_ref().as_str() {
            Some(string) => Ok(Spanned::new(value.span(), string)),
            None => Err(wrong_type(&format!("an element of `{}`", self.name(key)), "a string", value)),
        });
        strings.collect()
    }

    /// A table in this one, empty if it is absent.
    pub(super) fn table(&self, key: &str, path: &'static str) -> Result<Self, Mistake> {
        let table = self.typed(key, "a table", DeValue::as_table)?;
        let at = self.get(key).map_or(self.at, |(key, _)| key.span().start);
        Ok(Self { path, at, table: table.map(Spanned::into_inner) })
    }

    /// The tables of a list, as `[[key]]` writes them.
    pub(super) fn tables(&self, key: &str, path: &'static str) -> Result<Vec<Self>, Mistake> {
        let expected = "a list of tables";
        let Some(array) = self.typed(key, expected, DeValue::as_array)? else { return Ok(Vec::new()) };
        let tables = array.get_ref().iter().map(|value| match value.get_ref().as_table() {
            Some(table) => Ok(Self { path, at: value.span().start, table: Some(table) }),
            None => Err(wrong_type(&format!("an element of `{}`", self.name(key)), "a table", value)),
        });
        tables.collect()
    }

    /// A string without which the table is incomplete.
    pub(super) fn required(&self, key: &str) -> Result<Spanned<&'d str>, Mistake> {
        let missing = || Mistake::new(self.at, format!("`{}` is missing here", self.name(key)));
        self.string(key)?.ok_or_else(missing)
    }

    /// The value itself, where several types are fine.
    pub(super) fn value(&self, key: &str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.get(key).map(|(_, value)| value)
    }

    /// Where the key is written, or its table.
    pub(super) fn place(&self, key: &str) -> usize {
        self.get(key).map_or(self.at, |(key, _)| key.span().start)
    }

    /// All names and values of a table whose keys are free; the values must be strings.
    pub(super) fn entries(&self) -> Result<Vec<Entry<'d>>, Mistake> {
        let mut entries: Vec<_> = self.table.into_iter().flat_map(|table| table.iter()).collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        let entries = entries.into_iter().map(|(key, value)| {
            let name = key.get_ref().as_ref();
            match value.get_ref().as_str() {
                Some(string) => Ok((Spanned::new(key.span(), name), Spanned::new(value.span(), string))),
                None => {
                    let mistake = wrong_type(&format!("`{}`", shown(&self.name(name))), "a string", value);
                    Err(match value.get_ref() {
                        DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) => {
                            mistake.hint("put quotes around it")
                        }
                        _ => mistake,
                    })
                }
            }
        });
        entries.collect()
    }
}

pub(super) fn wrong_type(name: &str, expected: &str, value: &Spanned<DeValue<'_>>) -> Mistake {
    let found = match value.get_ref() {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    };
    let name = if name.contains('`') { name.to_owned() } else { format!("`{name}`") };
    Mistake::new(value.span().start, format!("{name} must be {expected}, not {found}"))
}
