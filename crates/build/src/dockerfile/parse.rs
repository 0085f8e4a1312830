//! Instructions from logical lines. One file though it is long: each function is one instruction, or what several share.

use std::ops::Range;

use super::expand::Lexer;
use super::lines::{self, Line};
use super::{
    Command, Dockerfile, DockerfileError, Healthcheck, Instruction, Kind, Mount, MountKind, Place, Run,
    Sharing, Stage, Transfer, TransferSource, Word,
};

const KEYWORDS: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];
const SECOND: u64 = 1_000_000_000;
const BEGIN: &str = "begin with the image to build on, such as: FROM alpine:3.20";
/// What an argument of each instruction looks like.
const EXAMPLES: [(&str, &str); 16] = [
    ("ADD", "ADD archive.tar.gz /opt/"),
    ("ARG", "ARG VERSION=3"),
    ("COPY", "COPY SOURCE... DESTINATION"),
    ("ENV", "ENV NAME=VALUE"),
    ("EXPOSE", "EXPOSE 8080"),
    ("FROM", "FROM alpine:3.20"),
    ("HEALTHCHECK", "HEALTHCHECK CMD COMMAND"),
    ("LABEL", "LABEL NAME=VALUE"),
    ("MAINTAINER", "MAINTAINER NAME"),
    ("ONBUILD", "ONBUILD RUN COMMAND"),
    ("RUN", "RUN COMMAND"),
    ("SHELL", "SHELL [\"/bin/bash\", \"-c\"]"),
    ("STOPSIGNAL", "STOPSIGNAL SIGTERM"),
    ("USER", "USER NAME"),
    ("VOLUME", "VOLUME /data"),
    ("WORKDIR", "WORKDIR /srv"),
];

pub(super) fn parse(bytes: &[u8]) -> Result<Dockerfile, DockerfileError> {
    let source = lines::decode(bytes)?;
    let lines = lines::read(&source)?;
    let mut file =
        Dockerfile { escape: lines.escape, arguments: Vec::new(), stages: Vec::new(), source: String::new() };
    if let Some(syntax) = &lines.syntax {
        check_syntax(&source, syntax)?;
    }
    for line in &lines.lines {
        let parser = Parser { source: &source, line, escape: file.escape };
        match parser.any()? {
            Parsed::From(stage) => {
                if let Some(name) = &stage.name
                    && file.stages.iter().any(|other| other.name.as_ref() == Some(name))
                {
                    return parser.fail(
                        0,
                        format!("two stages are called `{name}`"),
                        "give one of them another name",
                    );
                }
                file.stages.push(*stage);
            }
            Parsed::Instruction(instruction) => match (file.stages.last_mut(), &instruction.kind) {
                (Some(stage), _) => stage.instructions.push(*instruction),
                (None, Kind::Arg(_)) => file.arguments.push(*instruction),
                (None, _) => {
                    return parser.fail(0, "nothing but ARG may stand before the first FROM".into(), BEGIN);
                }
            },
        }
    }
    if file.stages.is_empty() {
        let place = Place { line: 1, column: 1 };
        let message = "there is no FROM".into();
        return Err(DockerfileError::new(&source, place, message, Some(BEGIN.into())));
    }
    file.source = source;
    Ok(file)
}

/// Only Docker's own frontend of version 1 is what this parser speaks.
fn check_syntax(source: &str, syntax: &Word) -> Result<(), DockerfileError> {
    let text = syntax.text.split('@').next().unwrap_or_default();
    let text = text.strip_prefix("docker.io/").unwrap_or(text);
    let known = text.strip_prefix("docker/dockerfile").is_some_and(|tag| {
        let tag = tag.strip_prefix(':').unwrap_or(if tag.is_empty() { "1" } else { "?" });
        matches!(tag, "latest" | "1" | "labs") || tag.starts_with("1.") || tag.starts_with("1-")
    });
    if known {
        return Ok(());
    }
    let message = format!("the frontend {} is not supported", syntax.text);
    let hint = Some("docker/dockerfile:1 is; other frontends are programs of their own".to_owned());
    Err(DockerfileError::new(source, syntax.place, message, hint))
}

enum Parsed {
    From(Box<Stage>),
    Instruction(Box<Instruction>),
}

/// A flag: `--name=value`.
struct Flag {
    name: String,
    value: Option<Word>,
    at: usize,
}

#[derive(Clone, Copy)]
struct Parser<'a> {
    source: &'a str,
    line: &'a Line,
    escape: char,
}

type Parse<T> = Result<T, DockerfileError>;

impl Parser<'_> {
    fn fail<T>(&self, at: usize, message: String, hint: impl Into<String>) -> Parse<T> {
        Err(self.error(at, message, hint))
    }

    fn error(&self, at: usize, message: String, hint: impl Into<String>) -> DockerfileError {
        DockerfileError::new(self.source, self.line.place(at), message, Some(hint.into()))
    }

    fn text(&self, range: &Range<usize>) -> &str {
        &self.line.text[range.clone()]
    }

    /// A range without white space at its ends.
    fn trim(&self, range: Range<usize>) -> Range<usize> {
        let text = &self.line.text[range.clone()];
        let start = range.start + (text.len() - text.trim_start().len());
        start..start.max(range.start + text.trim_end().len())
    }

    /// Words between white space, quotes or not.
    fn plain_words(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        let mut words = Vec::new();
        let mut start = None;
        for (offset, character) in self.text(range).char_indices() {
            let offset = range.start + offset;
            match (character.is_whitespace(), start) {
                (false, None) => start = Some(offset),
                (true, Some(begun)) => {
                    words.push(begun..offset);
                    start = None;
                }
                _ => {}
            }
        }
        words.extend(start.map(|begun| begun..range.end));
        words
    }

    fn any(&self) -> Parse<Parsed> {
        self.instruction(0..self.line.text.len())
    }

    fn instruction(&self, range: Range<usize>) -> Parse<Parsed> {
        let text = self.text(&range);
        let end = text.find(char::is_whitespace).unwrap_or(text.len());
        let keyword = text[..end].to_ascii_uppercase();
        let rest = self.trim(range.start + end..range.end);
        let at = range.start;
        if !KEYWORDS.contains(&keyword.as_str()) {
            let shown: String = text[..end].chars().take(40).collect();
            let hint = did_you_mean(&keyword, &KEYWORDS, "", 2);
            return self.fail(at, format!("unknown instruction `{shown}`"), hint);
        }
        if rest.is_empty() && !matches!(keyword.as_str(), "CMD" | "ENTRYPOINT") {
            return self.fail(at, format!("{keyword} needs an argument"), such_as(&keyword));
        }
        if keyword == "FROM" {
            return self.from(at, rest).map(|stage| Parsed::From(Box::new(stage)));
        }
        let kind = self.kind(&keyword, at, rest)?;
        let text = self.text(&range).to_owned();
        Ok(Parsed::Instruction(Box::new(Instruction { kind, place: self.line.place(at), text })))
    }

    fn kind(&self, keyword: &str, at: usize, rest: Range<usize>) -> Parse<Kind> {
        Ok(match keyword {
            "ADD" => Kind::Add(self.transfer(keyword, rest)?),
            "COPY" => Kind::Copy(self.transfer(keyword, rest)?),
            "ARG" => Kind::Arg(self.arguments(rest)?),
            "CMD" => Kind::Cmd(self.command(&rest)),
            "ENTRYPOINT" => Kind::Entrypoint(self.command(&rest)),
            "ENV" => Kind::Env(self.pairs(keyword, rest)?),
            "LABEL" => Kind::Label(self.pairs(keyword, rest)?),
            "EXPOSE" => {
                Kind::Expose(self.plain_words(&rest).into_iter().map(|word| self.line.word(word)).collect())
            }
            "HEALTHCHECK" => Kind::Healthcheck(self.healthcheck(rest)?),
            "MAINTAINER" => Kind::Maintainer(self.line.word(rest)),
            "ONBUILD" => {
                // Looked through now, carried out by those who build on this image.
                match self.instruction(rest.clone())? {
                    Parsed::From(_) => {
                        return self.not_triggered(rest.start, "FROM");
                    }
                    Parsed::Instruction(inner) => match inner.kind {
                        Kind::Onbuild(_) => {
                            return self.not_triggered(rest.start, "ONBUILD");
                        }
                        Kind::Maintainer(_) => {
                            return self.not_triggered(rest.start, "MAINTAINER");
                        }
                        Kind::Run(Run { heredocs, .. }) if !heredocs.is_empty() => {
                            return self.not_triggered(rest.start, "a document");
                        }
                        Kind::Copy(transfer) | Kind::Add(transfer)
                            if transfer
                                .sources
                                .iter()
                                .any(|source| matches!(source, TransferSource::Document(_))) =>
                        {
                            return self.not_triggered(rest.start, "a document");
                        }
                        _ => Kind::Onbuild(self.line.word(rest)),
                    },
                }
            }
            "RUN" => Kind::Run(self.run(at, rest)?),
            "SHELL" => match json_words(self.text(&rest)) {
                Some(words) if !words.is_empty() => Kind::Shell(words),
                _ => {
                    let hint = "write it as JSON: SHELL [\"/bin/bash\", \"-c\"]";
                    return self.fail(rest.start, "SHELL needs a list of words".into(), hint);
                }
            },
            "STOPSIGNAL" => Kind::StopSignal(self.single(keyword, rest)?),
            "USER" => Kind::User(self.single(keyword, rest)?),
            "WORKDIR" => Kind::Workdir(self.line.word(rest)),
            _ => Kind::Volume(self.list(rest)?),
        })
    }

    /// What cannot be left to those who build on the image.
    fn not_triggered<T>(&self, at: usize, what: &str) -> Parse<T> {
        self.fail(at, format!("{what} cannot follow ONBUILD"), such_as("ONBUILD"))
    }

    fn single(&self, keyword: &str, rest: Range<usize>) -> Parse<Word> {
        let words = self.plain_words(&rest);
        match words.get(1) {
            Some(second) => {
                self.fail(second.start, format!("{keyword} takes one argument"), such_as(keyword))
            }
            None => Ok(self.line.word(rest)),
        }
    }

    /// A list as JSON or as words.
    fn list(&self, rest: Range<usize>) -> Parse<Vec<Word>> {
        let place = self.line.place(rest.start);
        match json_words(self.text(&rest)) {
            Some(words) if words.is_empty() => {
                self.fail(rest.start, "the list is empty".into(), "leave the instruction out, or name a path")
            }
            Some(words) => Ok(words.into_iter().map(|text| Word { text, place }).collect()),
            None => Ok(self.plain_words(&rest).into_iter().map(|word| self.line.word(word)).collect()),
        }
    }

    fn command(&self, rest: &Range<usize>) -> Command {
        match json_words(self.text(rest)) {
            Some(words) => Command::Exec(words),
            None => Command::Shell(self.text(rest).to_owned()),
        }
    }

    /// Takes leading flags off; `known` are those of the instruction.
    fn flags(
        &self,
        keyword: &str,
        mut rest: Range<usize>,
        known: &[&str],
    ) -> Parse<(Vec<Flag>, Range<usize>)> {
        let mut flags: Vec<Flag> = Vec::new();
        while self.text(&rest).starts_with("--") {
            let (word, _) = match Lexer::new(self.escape).raw_words(self.text(&rest)).into_iter().next() {
                Some((range, word)) => (rest.start + range.start..rest.start + range.end, word),
                None => break,
            };
            let at = word.start;
            let text = self.text(&word);
            if text == "--" {
                rest = self.trim(word.end..rest.end);
                break;
            }
            let (name, value) = match text[2..].split_once('=') {
                Some((name, _)) => (name, Some(at + 2 + name.len() + 1..word.end)),
                None => (&text[2..], None),
            };
            if !known.contains(&name) {
                let shown: String = name.chars().take(40).collect();
                let hint = did_you_mean(name, known, "--", 3);
                return self.fail(at, format!("{keyword} has no flag --{shown}"), hint);
            }
            if !matches!(name, "mount" | "exclude") && flags.iter().any(|flag| flag.name == name) {
                return self.fail(at, format!("--{name} is given twice"), "leave one of them out");
            }
            let name = name.to_owned();
            flags.push(Flag { name, value: value.map(|range| self.line.word(range)), at });
            rest = self.trim(word.end..rest.end);
        }
        Ok((flags, rest))
    }

    /// A flag's value, which it must have.
    fn value(&self, flag: Flag) -> Parse<Word> {
        match flag.value {
            Some(value) if !value.text.is_empty() => Ok(value),
            _ => {
                let hint = format!("write: --{}=VALUE", flag.name);
                self.fail(flag.at, format!("--{} needs a value", flag.name), hint)
            }
        }
    }

    /// A flag that is `true` if nothing else is said.
    fn boolean(&self, flag: &Flag) -> Parse<bool> {
        match flag.value.as_ref().map(|value| value.text.to_ascii_lowercase()).as_deref() {
            None | Some("true" | "1" | "t") => Ok(true),
            Some("false" | "0" | "f") => Ok(false),
            Some(other) => {
                let hint = format!("write --{} alone, or --{}=false", flag.name, flag.name);
                self.fail(flag.at, format!("--{} is true or false, not `{other}`", flag.name), hint)
            }
        }
    }

    fn from(&self, at: usize, rest: Range<usize>) -> Parse<Stage> {
        let (flags, rest) = self.flags("FROM", rest, &["platform"])?;
        let platform = flags.into_iter().next().map(|flag| self.value(flag)).transpose()?;
        let words = self.plain_words(&rest);
        let name = match words.as_slice() {
            [_] => None,
            [_, keyword, name] if self.text(keyword).eq_ignore_ascii_case("as") => {
                Some(self.stage_name(name.clone())?)
            }
            [] => return self.fail(at, "FROM needs an image".into(), such_as("FROM")),
            [_, second, ..] => {
                let hint = "write: FROM IMAGE, or FROM IMAGE AS NAME";
                return self.fail(second.start, "FROM takes one image".into(), hint);
            }
        };
        Ok(Stage {
            image: self.line.word(words[0].clone()),
            platform,
            name,
            place: self.line.place(at),
            text: self.text(&(at..self.line.text.len())).to_owned(),
            instructions: Vec::new(),
        })
    }

    fn stage_name(&self, range: Range<usize>) -> Parse<String> {
        let name = self.text(&range).to_ascii_lowercase();
        let rest = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if name.starts_with(|first: char| first.is_ascii_lowercase()) && name.bytes().all(rest) {
            return Ok(name);
        }
        let hint = "a stage's name begins with a letter; letters, digits, `-`, `_` and `.` may follow";
        self.fail(range.start, format!("`{name}` cannot be a stage's name"), hint)
    }

    fn arguments(&self, rest: Range<usize>) -> Parse<Vec<(Word, Option<Word>)>> {
        let mut arguments = Vec::new();
        for word in self.lexed(&rest) {
            let text = self.text(&word);
            let (name, default) = match text.find('=') {
                Some(equals) => {
                    let value = self.line.word(word.start + equals + 1..word.end);
                    (word.start..word.start + equals, Some(value))
                }
                None => (word.clone(), None),
            };
            if !is_name(self.text(&name)) {
                let shown = self.text(&name).to_owned();
                let hint = "a name has letters, digits and _, and does not begin with a digit";
                return self.fail(word.start, format!("`{shown}` cannot be an argument's name"), hint);
            }
            arguments.push((self.line.word(name), default));
        }
        Ok(arguments)
    }

    /// Words between unquoted white space.
    fn lexed(&self, rest: &Range<usize>) -> Vec<Range<usize>> {
        let words = Lexer::new(self.escape).raw_words(self.text(rest)).into_iter();
        words.map(|(range, _)| rest.start + range.start..rest.start + range.end).collect()
    }

    /// `K=V` pairs, or the old form: one name, then its value up to the end.
    fn pairs(&self, keyword: &str, rest: Range<usize>) -> Parse<Vec<(Word, Word)>> {
        let words = self.lexed(&rest);
        let Some(first) = words.first() else { return Ok(Vec::new()) };
        if !self.text(first).contains('=') {
            let value = self.trim(first.end..rest.end);
            if value.is_empty() {
                let name = self.text(first);
                let hint = format!("write: {keyword} {name}=VALUE");
                return self.fail(first.start, format!("{keyword} {name} has no value"), hint);
            }
            return Ok(vec![(self.line.word(first.clone()), self.line.word(value))]);
        }
        let pair = |word: &Range<usize>| match self.text(word).find('=') {
            Some(0) => {
                self.fail(word.start, format!("{keyword} has a value without a name"), such_as(keyword))
            }
            Some(equals) => {
                let name = self.line.word(word.start..word.start + equals);
                Ok((name, self.line.word(word.start + equals + 1..word.end)))
            }
            None => {
                let shown = self.text(word).to_owned();
                let hint = "put a value with spaces between quotes";
                self.fail(word.start, format!("`{shown}` is no NAME=VALUE"), hint)
            }
        };
        words.iter().map(pair).collect()
    }

    fn transfer(&self, keyword: &str, rest: Range<usize>) -> Parse<Transfer> {
        let known: &[&str] = match keyword {
            "COPY" => &["from", "chown", "chmod", "link", "parents", "exclude"],
            _ => &["chown", "chmod", "link", "exclude", "checksum", "keep-git-dir", "unpack"],
        };
        let (flags, rest) = self.flags(keyword, rest, known)?;
        let place = self.line.place(rest.start);
        let words: Vec<Word> = match json_words(self.text(&rest)) {
            Some(words) => words.into_iter().map(|text| Word { text, place }).collect(),
            None => self.plain_words(&rest).into_iter().map(|word| self.line.word(word)).collect(),
        };
        let Some((destination, sources)) = words.split_last().filter(|(_, sources)| !sources.is_empty())
        else {
            let hint = format!("write: {keyword} SOURCE... DESTINATION");
            return self.fail(rest.start, format!("{keyword} needs a source and a destination"), hint);
        };
        let document = |word: &Word| {
            let found = self.line.heredocs.iter().find(|heredoc| heredoc.place == word.place);
            found.map_or_else(
                || TransferSource::Path(word.clone()),
                |found| TransferSource::Document(found.clone()),
            )
        };
        let mut transfer = Transfer {
            sources: sources.iter().map(document).collect(),
            destination: destination.clone(),
            from: None,
            owner: None,
            mode: None,
            link: false,
            parents: None,
            exclude: Vec::new(),
            checksum: None,
            keep_git_directory: None,
            unpack: None,
        };
        for flag in flags {
            let switch = |flag: &Flag| -> Parse<Option<Word>> {
                let word = Word { text: format!("--{}", flag.name), place: self.line.place(flag.at) };
                Ok(self.boolean(flag)?.then_some(word))
            };
            match flag.name.as_str() {
                "from" => transfer.from = Some(self.value(flag)?),
                "chown" => transfer.owner = Some(self.value(flag)?),
                "chmod" => transfer.mode = Some(self.value(flag)?),
                "checksum" => transfer.checksum = Some(self.value(flag)?),
                "exclude" => transfer.exclude.push(self.value(flag)?),
                "link" => transfer.link = self.boolean(&flag)?,
                "parents" => transfer.parents = switch(&flag)?,
                "keep-git-dir" => transfer.keep_git_directory = switch(&flag)?,
                _ => transfer.unpack = switch(&flag)?,
            }
        }
        Ok(transfer)
    }

    fn run(&self, at: usize, rest: Range<usize>) -> Parse<Run> {
        let (flags, rest) = self.flags("RUN", rest, &["mount", "network", "security"])?;
        if rest.is_empty() {
            return self.fail(at, "RUN needs a command".into(), such_as("RUN"));
        }
        let mut run = Run {
            command: self.command(&rest),
            heredocs: self.line.heredocs.clone(),
            mounts: Vec::new(),
            network: None,
            security: None,
        };
        for flag in flags {
            match flag.name.as_str() {
                "mount" => run.mounts.push(self.mount(flag)?),
                "network" => run.network = Some(self.value(flag)?),
                _ => run.security = Some(self.value(flag)?),
            }
        }
        Ok(run)
    }

    fn mount(&self, flag: Flag) -> Parse<Mount> {
        let at = flag.at;
        let place = self.line.place(at);
        let value = self.value(flag)?;
        let mut options: Vec<(String, Option<Word>)> = Vec::new();
        for part in csv(&value.text) {
            let (key, given) = match part.split_once('=') {
                Some((key, given)) => (key, Some(Word { text: given.to_owned(), place })),
                None => (part.as_str(), None),
            };
            let key = match key.to_ascii_lowercase().as_str() {
                "dst" | "destination" => "target".to_owned(),
                "src" => "source".to_owned(),
                "ro" => "readonly".to_owned(),
                "rw" => "readwrite".to_owned(),
                other => other.to_owned(),
            };
            options.push((key, given));
        }
        let kind = options.iter().find(|(key, _)| key == "type").and_then(|(_, given)| given.clone());
        let kind = kind.map_or_else(|| "bind".to_owned(), |kind| kind.text.to_ascii_lowercase());
        let known: &[&str] = match kind.as_str() {
            "bind" => &["type", "target", "source", "from", "readwrite", "readonly"],
            "cache" => &[
                "type",
                "target",
                "source",
                "from",
                "id",
                "sharing",
                "mode",
                "uid",
                "gid",
                "readonly",
                "readwrite",
            ],
            "tmpfs" => &["type", "target", "size"],
            "secret" => &["type", "target", "id", "env", "required", "mode", "uid", "gid"],
            "ssh" => &["type", "target", "id", "required", "mode", "uid", "gid"],
            other => {
                let hint = "there are bind, cache, tmpfs, secret and ssh";
                return self.fail(at, format!("`{other}` is no type of a mount"), hint);
            }
        };
        if let Some((key, _)) = options.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            let hint = did_you_mean(key, known, "", 3);
            return self.fail(at, format!("a mount of type {kind} has no option `{key}`"), hint);
        }
        let text = |name: &str| {
            options.iter().rev().find(|(key, _)| key == name).and_then(|(_, given)| given.clone())
        };
        let switch = |name: &str| -> Parse<bool> {
            let Some((_, given)) = options.iter().rev().find(|(key, _)| key == name) else {
                return Ok(false);
            };
            match given.as_ref().map(|given| given.text.to_ascii_lowercase()).as_deref() {
                None | Some("true" | "1") => Ok(true),
                Some("false" | "0") => Ok(false),
                Some(other) => {
                    let hint = format!("write {name} alone, or {name}=false");
                    self.fail(at, format!("`{name}` is true or false, not `{other}`"), hint)
                }
            }
        };
        let number = |name: &str, radix: u32| -> Parse<Option<u32>> {
            let Some(given) = text(name) else { return Ok(None) };
            match u32::from_str_radix(&given.text, radix) {
                Ok(number) => Ok(Some(number)),
                Err(_) => {
                    let hint = if radix == 8 { "in octal digits: mode=0755" } else { "such as uid=1000" };
                    self.fail(at, format!("`{name}` is a number, not `{}`", given.text), hint)
                }
            }
        };
        let (uid, gid) = (number("uid", 10)?.unwrap_or(0), number("gid", 10)?.unwrap_or(0));
        let kind = match kind.as_str() {
            "bind" => MountKind::Bind {
                from: text("from"),
                source: text("source"),
                writable: switch("readwrite")? && !switch("readonly")?,
            },
            "cache" => MountKind::Cache {
                id: text("id"),
                from: text("from"),
                source: text("source"),
                sharing: match text("sharing").map(|word| word.text).as_deref() {
                    None | Some("shared") => Sharing::Shared,
                    Some("private") => Sharing::Private,
                    Some("locked") => Sharing::Locked,
                    Some(other) => {
                        let hint = "there are shared, private and locked";
                        return self.fail(at, format!("a cache cannot be `{other}`"), hint);
                    }
                },
                mode: number("mode", 8)?,
                uid,
                gid,
                read_only: switch("readonly")?,
            },
            "tmpfs" => {
                let size = text("size").map(|size| match bytes_of(&size.text) {
                    Some(bytes) => Ok(bytes),
                    None => {
                        let message = format!("`size` is a number of bytes, not `{}`", size.text);
                        self.fail(at, message, "such as size=64m")
                    }
                });
                MountKind::Temporary { size: size.transpose()? }
            }
            "secret" => MountKind::Secret {
                id: text("id"),
                variable: text("env").map(|word| word.text),
                required: switch("required")?,
                mode: number("mode", 8)?.unwrap_or(0o400),
                uid,
                gid,
            },
            _ => MountKind::Ssh,
        };
        let target = text("target");
        let needs = !matches!(kind, MountKind::Secret { .. } | MountKind::Ssh);
        if needs && target.as_ref().is_none_or(|target| target.text.is_empty()) {
            return self.fail(at, "this mount needs a target".into(), "write: target=/path");
        }
        Ok(Mount { kind, target, place })
    }

    fn healthcheck(&self, rest: Range<usize>) -> Parse<Healthcheck> {
        let known = ["interval", "timeout", "start-period", "start-interval", "retries"];
        let (flags, rest) = self.flags("HEALTHCHECK", rest, &known)?;
        let words = self.plain_words(&rest);
        let first = words.first().map(|word| self.text(word).to_ascii_uppercase());
        let mut check = Healthcheck {
            command: None,
            interval: 0,
            timeout: 0,
            start_period: 0,
            start_interval: 0,
            retries: 0,
        };
        match (first.as_deref(), words.as_slice()) {
            (Some("NONE"), [_]) if flags.is_empty() => return Ok(check),
            (Some("CMD"), [keyword, _, ..]) => {
                check.command = Some(self.command(&self.trim(keyword.end..rest.end)));
            }
            _ => {
                let hint = "write: HEALTHCHECK NONE, or HEALTHCHECK [--interval=30s] CMD COMMAND";
                return self.fail(rest.start, "HEALTHCHECK needs CMD and a command".into(), hint);
            }
        }
        for flag in flags {
            let (at, name) = (flag.at, flag.name.clone());
            let value = self.value(flag)?;
            if name == "retries" {
                match value.text.parse() {
                    Ok(retries) => check.retries = retries,
                    Err(_) => return self.fail(at, "--retries is a number".into(), "such as --retries=3"),
                }
                continue;
            }
            let time = match duration(&value.text) {
                Some(time) if time == 0 || time >= SECOND / 1000 => time,
                _ => {
                    let message = format!("--{name} is a time, at least 1ms");
                    return self.fail(at, message, "such as 30s or 1m30s");
                }
            };
            match name.as_str() {
                "interval" => check.interval = time,
                "timeout" => check.timeout = time,
                "start-period" => check.start_period = time,
                _ => check.start_interval = time,
            }
        }
        Ok(check)
    }
}

/// The hint for a word that is none of `known`, each shown after `prefix`: the nearest of them, or all.
fn did_you_mean(word: &str, known: &[&str], prefix: &str, distance: usize) -> String {
    let near = known.iter().min_by_key(|known| strsim::damerau_levenshtein(known, word));
    match near.filter(|known| strsim::damerau_levenshtein(known, word) <= distance) {
        Some(near) => format!("did you mean {prefix}{near}?"),
        None => {
            let all: Vec<String> = known.iter().map(|known| format!("{prefix}{known}")).collect();
            format!("there are {}", all.join(", "))
        }
    }
}

/// The hint that shows how an instruction is written.
fn such_as(keyword: &str) -> String {
    let example = EXAMPLES.iter().find(|(known, _)| *known == keyword);
    format!("write: {}", example.map_or(keyword, |(_, example)| example))
}

/// A JSON list of texts; anything else is no list, as for Docker.
fn json_words(text: &str) -> Option<Vec<String>> {
    if !text.starts_with('[') { None } else { serde_json::from_str(text).ok() }
}

fn is_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_') && text.bytes().all(inner)
}

/// Fields between commas; a quoted one may hold commas.
fn csv(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    for character in text.chars() {
        match character {
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            _ => {
                if let Some(field) = fields.last_mut() {
                    field.push(character);
                }
            }
        }
    }
    fields
}

/// A number of bytes, with `k`, `m`, `g` or `t` after it.
fn bytes_of(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let text = text.trim_end_matches("ib").trim_end_matches('b');
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let factor: u64 = match &text[digits.len()..] {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// Nanoseconds of a time as Go writes it: `1h2m3.5s`.
fn duration(text: &str) -> Option<u64> {
    if text == "0" {
        return Some(0);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|character: char| !character.is_ascii_digit() && character != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        let unit =
            rest[digits..].find(|character: char| character.is_ascii_digit()).unwrap_or(rest.len() - digits);
        let factor = match &rest[digits..digits + unit] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        total += number * factor;
        rest = &rest[digits + unit..];
    }
    (!text.is_empty() && total.is_finite() && total < 9e18).then_some(total as u64)
}

#[cfg(test)]
mod tests;
