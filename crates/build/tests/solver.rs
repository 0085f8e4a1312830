//! Whole builds without a machine: what is copied where, what is built and what is not, what the configuration says. Steps
//! are only noted; what they do is held against real machines elsewhere.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use agentkernel_build::cache::Cache;
use agentkernel_build::configuration::Configuration;
use agentkernel_build::dockerfile::Dockerfile;
use agentkernel_build::executor::{
    Base, Executor, Failure, LayerSource, LayerTarget, Machine, Step, StepEnd,
};
use agentkernel_build::ignore::IgnoreFile;
use agentkernel_build::{BuildError, Context, Event, OnEvent, Options, build};
use agentkernel_image::{
    Descriptor, Digest, FileSystem, LayerItem, Metadata, NodeKind, RootFileSystem, Store,
};

/// Steps that were run; each leaves a file `/ran-N`.
type Steps = Rc<RefCell<Vec<Step>>>;

/// Addresses that were fetched; what is there is what is before the last `?`.
type Fetched = Rc<RefCell<Vec<String>>>;

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
    steps: Steps,
    fetched: Fetched,
    options: Options,
}

struct Noted {
    store: Store,
    cache: PathBuf,
    steps: Steps,
    fetched: Fetched,
}

struct NotedMachine(Steps);

impl Executor for Noted {
    type Machine = NotedMachine;

    fn image(&mut self, name: &str, _: OnEvent<'_>) -> Result<Base, Failure> {
        let image = self.store.find(name).map_err(|error| Failure::new(error.to_string()))?;
        let configuration = serde_json::from_slice(&self.store.read_blob(&image.image_id).unwrap()).unwrap();
        Ok(Base { configuration, layers: image.layers.into_iter().zip(image.diff_ids).collect() })
    }

    fn fetch(&mut self, address: &str, target: &mut fs::File, _: OnEvent<'_>) -> Result<(), Failure> {
        self.fetched.borrow_mut().push(address.to_owned());
        if address.contains("refused") {
            return Err(Failure { message: "it is refused".into(), hint: Some("--allow it".into()) });
        }
        target.write_all(address.split('?').next().unwrap().as_bytes()).unwrap();
        Ok(())
    }

    fn root_file_system(&mut self, layers: &[(Descriptor, Digest)]) -> Result<PathBuf, Failure> {
        Ok(RootFileSystem::of_layers(&self.store, layers, &self.cache, &mut |_| {}).unwrap())
    }

    fn start(&mut self, root: &Path) -> Result<NotedMachine, Failure> {
        assert!(root.exists());
        Ok(NotedMachine(self.steps.clone()))
    }
}

impl Machine for NotedMachine {
    fn put_layer(&mut self, _layer: u32, source: &mut dyn LayerSource) -> Result<(), Failure> {
        while source.next_item().unwrap().is_some() {
            let mut buffer = [0; 100];
            while source.read(&mut buffer).unwrap() > 0 {}
        }
        Ok(())
    }

    fn take_layer(&mut self, _layer: u32, target: &mut dyn LayerTarget) -> Result<(), Failure> {
        let path = format!("ran-{}", self.0.borrow().len()).into_bytes();
        let kind = NodeKind::File(0);
        target.item(LayerItem::Node { path, metadata: Metadata::default(), kind }).unwrap();
        Ok(())
    }

    fn run(&mut self, step: &Step, output: &mut dyn FnMut(&[u8])) -> Result<StepEnd, Failure> {
        self.0.borrow_mut().push(step.clone());
        output(b"said\n");
        let fails = step.arguments.last().is_some_and(|last| last == "exit 3");
        Ok(StepEnd { code: if fails { 3 } else { 0 }, out_of_memory: false })
    }
}

/// What a build made: files by path as `mode owner content`, and the configuration.
struct Made {
    files: BTreeMap<String, String>,
    configuration: Configuration,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("context")).unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        Self {
            directory,
            store,
            steps: Steps::default(),
            fetched: Fetched::default(),
            options: Options::default(),
        }
    }

    fn write(&self, path: &str, content: &str, mode: u32) {
        let path = self.directory.path().join("context").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Builds, and names the result `name`. Tells how many steps were taken from the cache.
    fn try_build(&self, name: &str, text: &str) -> Result<(Made, usize), String> {
        let file = Dockerfile::parse(text.as_bytes()).map_err(|error| error.to_string())?;
        let root = self.directory.path().join("context");
        let ignore = fs::read(root.join(".dockerignore")).unwrap_or_default();
        let context = Context::open(&root, IgnoreFile::parse(&ignore).unwrap()).unwrap();
        let cache = Cache::open(&self.directory.path().join("steps")).unwrap();
        let writing = self.store.writing().unwrap();
        let mut executor = Noted {
            store: self.store.clone(),
            cache: self.directory.path().join("cache"),
            steps: self.steps.clone(),
            fetched: self.fetched.clone(),
        };
        let mut cached = 0;
        let mut on_event = |event: Event<'_>| cached += usize::from(matches!(event, Event::Cached));
        let manifest = build(&file, &context, &self.options, &writing, &cache, &mut executor, &mut on_event);
        let manifest = manifest.map_err(|error| match error {
            BuildError::Run { at, code } => format!("{code}: {at} {}", at.hint.clone().unwrap_or_default()),
            other => other.to_string(),
        })?;
        let image = writing.tag(manifest, &name.parse().unwrap()).unwrap();
        let configuration = serde_json::from_slice(&self.store.read_blob(&image.image_id).unwrap()).unwrap();
        let mut system = FileSystem::new();
        for layer in &image.layers {
            system.add_layer(&self.store, &layer.digest).unwrap();
        }
        Ok((Made { files: files(&system), configuration }, cached))
    }

    fn build(&self, text: &str) -> Made {
        self.try_build("test", text).unwrap_or_else(|error| panic!("{error}")).0
    }

    fn commands(&self) -> Vec<String> {
        self.steps.borrow_mut().drain(..).map(|step| step.arguments.last().unwrap().clone()).collect()
    }
}

fn files(system: &FileSystem) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    let mut pending = vec![(String::new(), system.root())];
    while let Some((path, node)) = pending.pop() {
        for (name, child) in system.children(node) {
            pending.push((format!("{path}/{}", String::from_utf8_lossy(name)), child));
        }
        let metadata = system.metadata(node);
        let content = match system.kind(node) {
            NodeKind::File(size) => {
                let mut content = vec![0; size as usize];
                system.read_at(node, &mut content, 0).unwrap();
                String::from_utf8_lossy(&content).into_owned()
            }
            NodeKind::Symlink(target) => format!("-> {}", String::from_utf8_lossy(&target)),
            NodeKind::Directory => "/".into(),
            other => format!("{other:?}"),
        };
        files.insert(path, format!("{:o} {}:{} {content}", metadata.mode, metadata.user, metadata.group));
    }
    files.remove("");
    files
}

fn assert_files(made: &Made, expected: &[(&str, &str)]) {
    let expected: BTreeMap<String, String> =
        expected.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
    assert_eq!(made.files, expected);
}

#[test]
fn files_go_where_docker_puts_them() {
    let fixture = Fixture::new();
    fixture.write("a.txt", "a", 0o640);
    fixture.write("b.txt", "b", 0o755);
    fixture.write("dir/inner/c", "c", 0o600);
    fs::set_permissions(
        fixture.directory.path().join("context/dir/inner"),
        fs::Permissions::from_mode(0o700),
    )
    .unwrap();
    fixture.write("dir/d", "d", 0o644);
    let context = fixture.directory.path().join("context");
    std::os::unix::fs::symlink("dir/d", context.join("link")).unwrap();
    std::os::unix::fs::symlink("d", context.join("dir/relative")).unwrap();
    fs::hard_link(context.join("dir/d"), context.join("dir/e")).unwrap();

    let made = fixture
        .build("FROM scratch\nCOPY a.txt /x\nCOPY *.txt /all/\nCOPY --chmod=4711 --chown=7:8 a.txt /own/er/");
    assert_files(
        &made,
        &[
            ("/x", "640 0:0 a"),
            ("/all", "755 0:0 /"),
            ("/all/a.txt", "640 0:0 a"),
            ("/all/b.txt", "755 0:0 b"),
            ("/own", "755 7:8 /"),
            ("/own/er", "755 7:8 /"),
            ("/own/er/a.txt", "4711 7:8 a"),
        ],
    );
    // Of a directory its content goes; a link that is named is followed, one within stays.
    let made =
        fixture.build("FROM scratch\nWORKDIR /w\nCOPY dir sub\nCOPY link ./\nCOPY --exclude=inner dir /e");
    assert_files(
        &made,
        &[
            ("/w", "755 0:0 /"),
            ("/w/sub", "755 0:0 /"),
            ("/w/sub/d", "644 0:0 d"),
            ("/w/sub/e", "644 0:0 d"),
            ("/w/sub/relative", "777 0:0 -> d"),
            ("/w/sub/inner", "700 0:0 /"),
            ("/w/sub/inner/c", "600 0:0 c"),
            ("/w/link", "644 0:0 d"),
            ("/e", "755 0:0 /"),
            ("/e/d", "644 0:0 d"),
            ("/e/e", "644 0:0 d"),
            ("/e/relative", "777 0:0 -> d"),
        ],
    );
    // An archive is unpacked as it is; through links of the image; from stage to stage with owners.
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    header.set_mode(0o777);
    header.set_uid(0);
    header.set_gid(0);
    archive.append_link(&mut header, "bin", "usr/bin").unwrap();
    fs::write(context.join("links.tar"), archive.into_inner().unwrap()).unwrap();
    let made = fixture.build(
        "FROM scratch AS base\nCOPY --chown=3:4 dir/inner /usr/bin\nADD links.tar a.txt /\n\
         FROM base\nCOPY a.txt /bin/\nCOPY --from=base /usr /copy\nCOPY --from=0 /usr/bin/c /one\n",
    );
    assert_files(
        &made,
        &[
            ("/a.txt", "640 0:0 a"),
            ("/bin", "777 0:0 -> usr/bin"),
            ("/copy", "755 0:0 /"),
            ("/copy/bin", "755 3:4 /"),
            ("/copy/bin/c", "600 3:4 c"),
            ("/one", "600 3:4 c"),
            ("/usr", "755 3:4 /"),
            ("/usr/bin", "755 3:4 /"),
            ("/usr/bin/a.txt", "640 0:0 a"),
            ("/usr/bin/c", "600 3:4 c"),
        ],
    );
    let made = fixture.build("FROM scratch\nARG X=y\nCOPY <<a <<'b' /d/\n$X \\$X\na\n$X\nb\n");
    assert_files(&made, &[("/d", "755 0:0 /"), ("/d/a", "644 0:0 y $X\n"), ("/d/b", "644 0:0 $X\n")]);
    fixture.write(".dockerignore", "*\n!dir/inner\n", 0o644);
    let made = fixture.build("FROM scratch\nCOPY . /\n");
    assert_files(&made, &[("/dir", "755 0:0 /"), ("/dir/inner", "700 0:0 /"), ("/dir/inner/c", "600 0:0 c")]);
}

#[test]
fn mistakes_are_told_with_their_place() {
    let fixture = Fixture::new();
    fixture.write("a", "a", 0o644);
    fixture.write("b", "b", 0o644);
    fixture.write("d/c", "c", 0o644);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        fixture.directory.path().join("context/socket"),
        rustix::fs::FileType::Socket,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    for (text, expected) in [
        ("FROM scratch\nCOPY nothing /", "Dockerfile:2:6: `nothing` is not in the build context"),
        ("FROM scratch\nCOPY ../../etc/passwd /", "Dockerfile:2:6: `etc/passwd` is not in the build context"),
        ("FROM scratch\nCOPY *.x /", "Dockerfile:2:6: nothing matches `*.x`"),
        (
            "FROM scratch\nCOPY a b /x",
            "Dockerfile:2:1: /x is to take several files, so it has to be a directory",
        ),
        ("FROM scratch\nCOPY a /x\nCOPY d /x", "Dockerfile:3:1: cannot copy a directory over the file /x"),
        ("FROM scratch\nCOPY socket /x", "`socket` is a socket, which no image holds"),
        ("FROM scratch\nCOPY --from=gone / /", "Dockerfile:2:13: Image 'gone' not found"),
        (
            "FROM scratch\nCOPY --from=later / /\nFROM scratch AS later\nFROM scratch\nCOPY --from=0 / /",
            "the stage `later` is not built before this one",
        ),
        // Two stages that need each other; one that needs itself.
        (
            "FROM b AS a\nFROM a AS b",
            "Dockerfile:1:6: the stage `b` is not built before this one, and as an image: Image 'b' not found",
        ),
        (
            "FROM scratch AS a\nCOPY --from=b / /\nFROM a AS b\nFROM b",
            "Dockerfile:2:13: the stage `b` is not built before this one",
        ),
        ("FROM scratch AS a\nRUN --mount=from=a,target=/x y", "the stage `a` is not built before this one"),
        ("FROM alpine AS alpine", "Dockerfile:1:6: Image 'alpine' not found"),
        ("FROM scratch\nCOPY --chown=who a /", "there is no user called `who` in the image"),
        ("FROM scratch\nCOPY --chmod=u+x a /", "`u+x` is no mode"),
        ("FROM scratch\nCOPY --parents a /", "Dockerfile:2:6: --parents is not supported"),
        ("FROM scratch\nCOPY a https://x.example/y /", "Dockerfile:2:8: COPY takes nothing from addresses"),
        (
            "FROM scratch\nADD git@x.example:y.git /",
            "Dockerfile:2:5: ADD of the git repository git@x.example:y.git",
        ),
        ("FROM scratch\nADD https://x.example/y.git#main:d /d", "Dockerfile:2:5: ADD of the git repository"),
        ("FROM scratch\nADD --keep-git-dir a /", "Dockerfile:2:5: --keep-git-dir is not supported"),
        ("FROM scratch\nADD https://refused.example/y /", "Dockerfile:2:5: it is refused"),
        (
            "FROM scratch\nADD https://x.example /d/",
            "Dockerfile:2:5: the address does not tell what the file",
        ),
        (
            "FROM scratch\nWORKDIR /d\nADD https://x.example /d",
            "Dockerfile:3:1: the address does not tell what the file is called",
        ),
        (
            "FROM scratch\nADD https://x.example/a https://x.example/b /x",
            "Dockerfile:2:1: /x is to take several",
        ),
        (
            "FROM scratch\nADD --checksum=sha256:0 a /",
            "Dockerfile:2:16: --checksum is about an address, not a file",
        ),
        (
            "FROM scratch\nADD --checksum=sha256:0 https://x.example/y a /",
            "Dockerfile:2:16: --checksum is about one address",
        ),
        (
            "FROM scratch\nADD --checksum=md5:0 https://x.example/y /",
            "Dockerfile:2:16: `md5:0` is no checksum",
        ),
        ("FROM scratch\nRUN --mount=type=ssh x", "a mount of type ssh is not supported"),
        ("FROM scratch\nRUN --mount=type=secret,id=s,required x", "the secret `s` was not given"),
        ("FROM scratch\nRUN --network=host x", "--network=host is not supported"),
        ("FROM --platform=linux/arm64 scratch", "Dockerfile:1:17: the platform linux/arm64 is not supported"),
        ("FROM scratch\nEXPOSE 80 x", "Dockerfile:2:11: `x` is no port"),
        ("FROM scratch\nSTOPSIGNAL FOO", "`FOO` is no signal"),
        ("FROM scratch\nENV A=\"${B:?give B}\"", "Dockerfile:2:7: B: give B"),
        ("FROM $NONE", "the image's name is empty"),
        ("FROM scratch\nRUN exit 3", "3: Dockerfile:2:1: the command ended with exit code 3"),
    ] {
        let error = fixture.try_build("test", text).map(drop).unwrap_err();
        assert!(error.contains(expected), "{text}\n{error}");
    }
    assert!(fixture.store.list().unwrap().is_empty(), "nothing half-built has a name");
    let error = fixture.try_build("test", "FROM scratch\nRUN exit 3").map(drop).unwrap_err();
    assert!(error.ends_with("it said last: said"), "{error}");
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut child = std::process::Command::new("gzip")
        .args(["-n", "-c"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let feeder = std::thread::spawn(move || input.write_all(&bytes).unwrap());
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    output.stdout
}

/// An archive is one by its form, whatever it holds: what is refused must not pass for a file to be copied.
#[test]
fn archives_that_mean_harm_are_refused() {
    use tar::EntryType;
    let fixture = Fixture::new();
    let pack = |entries: &[(&str, EntryType, &str, &[u8])]| {
        let mut archive = Vec::new();
        for (name, kind, link, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(content.len() as u64);
            if let Some(gnu) = header.as_gnu_mut().filter(|_| *kind == EntryType::GNUSparse) {
                gnu.set_real_size(10 << 30);
            }
            header.set_cksum();
            archive.extend_from_slice(header.as_bytes());
            archive.extend_from_slice(content);
            archive.resize(archive.len().next_multiple_of(512), 0);
        }
        archive.resize(archive.len() + 1024, 0);
        archive
    };
    let file = EntryType::Regular;
    let write = |archive: &[u8]| {
        fs::write(fixture.directory.path().join("context/a.tar"), archive).unwrap();
    };
    let cases = [
        (pack(&[("../x", file, "", b"x")]), "cannot be unpacked: tar entry \"../x\" leads out"),
        (pack(&[("ok", file, "", b"x"), ("a/../../x", file, "", b"x")]), "leads out"),
        (pack(&[("h", EntryType::Link, "../../etc/passwd", b"")]), "leads out"),
        (pack(&[("h", EntryType::Link, "/etc/passwd", b"")]), "links to what it does not hold: etc/passwd"),
        (pack(&[("s", EntryType::GNUSparse, "", b"")]), "a sparse file"),
        (
            pack(&[("l", EntryType::Symlink, "/../../tmp", b""), ("l/x", file, "", b"x")]),
            "is not a directory",
        ),
        (pack(&[(".wh.x", file, "", b"x")]), "`d/.wh.x` is a name that no image can hold"),
        (pack(&[("f", file, "", &[b'x'; 5000])])[..2000].to_vec(), "unexpected end of file"),
    ];
    for (archive, expected) in cases {
        write(&archive);
        let error = fixture.try_build("test", "FROM scratch\nADD a.tar /d/\n").map(drop).unwrap_err();
        assert!(error.contains("Dockerfile:2:") && error.contains(expected), "{expected}: {error}");
        write(&gzip(&archive));
        let error = fixture.try_build("test", "FROM scratch\nADD a.tar /d/\n").map(drop).unwrap_err();
        assert!(error.contains(expected), "compressed, {expected}: {error}");
    }
    assert!(fixture.store.list().unwrap().is_empty());
    // Of a name that comes twice the last counts; devices and links that lead nowhere are only data.
    write(&pack(&[
        ("a", file, "", b"first"),
        ("/abs", EntryType::Symlink, "../../../etc/passwd", b""),
        ("a", file, "", b"last"),
    ]));
    let made = fixture.build("FROM scratch\nADD a.tar /d/\n");
    assert_files(
        &made,
        &[("/d", "755 0:0 /"), ("/d/a", "644 0:0 last"), ("/d/abs", "644 0:0 -> ../../../etc/passwd")],
    );
}

#[test]
fn only_what_is_needed_is_built_and_only_what_changed() {
    let mut fixture = Fixture::new();
    fixture.write("first", "1", 0o644);
    fixture.write("last", "1", 0o644);
    let text = "FROM scratch AS unneeded\nRUN unneeded\nFROM scratch AS tools\nRUN tools\n\
                FROM scratch\nCOPY first /\nRUN one\nCOPY --from=tools /ran-1 /\nRUN two\nCOPY last /\n";
    let (first, cached) = fixture.try_build("test", text).unwrap();
    assert_eq!((fixture.commands(), cached), (vec!["tools".into(), "one".into(), "two".into()], 0));
    let (again, cached) = fixture.try_build("test", text).unwrap();
    assert_eq!((fixture.commands().len(), cached), (0, 6));
    assert_eq!(again.files, first.files);
    // Times count for nothing, content for everything.
    fixture.write("first", "1", 0o644);
    fixture.write("last", "2", 0o644);
    let (_, cached) = fixture.try_build("test", text).unwrap();
    assert_eq!((fixture.commands().len(), cached), (0, 5));
    fixture.write("first", "1", 0o600);
    fixture.try_build("test", text).unwrap();
    assert_eq!(fixture.commands(), ["one", "two"]);
    fixture.options.target = Some("Unneeded".into());
    fixture.try_build("test", text).unwrap();
    assert_eq!(fixture.commands(), ["unneeded"]);
    fixture.options = Options { no_cache: true, ..Options::default() };
    fixture.try_build("test", text).unwrap();
    assert_eq!(fixture.commands(), ["tools", "one", "two"]);
}

#[test]
fn a_stage_of_many_layers_goes_on_over_a_root_file_system_of_those_before() {
    let fixture = Fixture::new();
    fixture.write("f", "f", 0o644);
    let runs: String = (0..130).map(|number| format!("RUN step {number}\n")).collect();
    fixture.build(&format!("FROM scratch\n{runs}"));
    let lowers: Vec<usize> = fixture.steps.borrow().iter().map(|step| step.lower.len()).collect();
    assert_eq!((lowers.len(), lowers.iter().filter(|lower| **lower == 0).count()), (130, 3));
    assert!(lowers.iter().all(|lower| *lower <= 60), "{lowers:?}");
    // And where what is too much was copied.
    fixture.steps.borrow_mut().clear();
    let copies: String = (0..70).map(|number| format!("COPY f /f{number}\n")).collect();
    fixture.build(&format!("FROM scratch\n{copies}RUN last\n"));
    assert_eq!(fixture.steps.borrow()[0].lower.len(), 0);
}

#[test]
fn mounts_that_differ_are_steps_that_differ_and_linked_layers_know_nothing_of_the_image() {
    let mut fixture = Fixture::new();
    fixture.write("f", "f", 0o644);
    fixture.options.secrets = BTreeMap::from([("a".into(), b"1".to_vec()), ("b".into(), b"2".to_vec())]);
    for mount in
        ["type=secret,id=a", "type=secret,id=b", "type=cache,target=/c,id=a", "type=cache,target=/c,id=b"]
    {
        fixture.build(&format!("FROM scratch\nRUN --mount={mount} same\n"));
    }
    assert_eq!(fixture.commands().len(), 4);
    std::os::unix::fs::symlink("real", fixture.directory.path().join("context/link")).unwrap();
    let made = fixture
        .build("FROM scratch\nWORKDIR /real\nCOPY . /\nCOPY f /link/through\nCOPY --link f /link/own\n");
    assert_eq!(made.files["/real/through"], "644 0:0 f");
    assert_eq!(made.files["/link"], "755 0:0 /");
    assert_eq!(made.files["/link/own"], "644 0:0 f");
}

#[test]
fn arguments_and_the_environment_reach_where_they_should() {
    let mut fixture = Fixture::new();
    fixture.options.arguments =
        BTreeMap::from([("GIVEN".into(), "g".into()), ("BASE".into(), "scratch".into())]);
    let made = fixture.build(
        "ARG BASE=other\nARG META=m\nFROM $BASE AS one\nARG META\nARG GIVEN=default OWN=o\nENV A=$META-$GIVEN B='$A'\nENV C=$A\n\
         RUN env\nFROM one\nRUN env\nSHELL [\"/bin/x\", \"-y\"]\nRUN third\nARG TARGETARCH\nLABEL arch=$TARGETARCH",
    );
    let steps = fixture.steps.borrow();
    let environment = |index: usize| -> BTreeMap<&str, &str> {
        steps[index].environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    };
    let first = environment(0);
    let wanted = [("A", "m-g"), ("B", "$A"), ("C", "m-g"), ("GIVEN", "g"), ("META", "m"), ("OWN", "o")];
    assert_eq!(wanted.map(|(name, _)| (name, first[name])), wanted);
    assert!(first["PATH"].contains("/bin"));
    // Both go on in a stage that begins with this one.
    assert_eq!((environment(1)["OWN"], environment(1)["A"]), ("o", "m-g"));
    assert_eq!(steps[2].arguments, ["/bin/x", "-y", "third"]);
    assert_eq!(made.configuration.config.labels["arch"], "amd64");
    assert_eq!(made.configuration.config.env[1..], ["A=m-g", "B=$A", "C=m-g"]);
}

#[test]
fn the_configuration_says_what_was_asked_for() {
    let mut fixture = Fixture::new();
    fixture.options.labels = BTreeMap::from([("own".into(), "label".into())]);
    fixture.options.arguments = BTreeMap::from([("SOURCE_DATE_EPOCH".into(), "86400".into())]);
    fixture.write("f", "f", 0o644);
    let base = "FROM scratch\nUSER a:b\nWORKDIR /w\nWORKDIR x/../y\nEXPOSE 80 90-91/udp\nVOLUME /v /u\n\
                VOLUME [\"/j\"]\nSTOPSIGNAL SIGINT\nHEALTHCHECK --interval=5s --retries=3 CMD check it\n\
                ENTRYPOINT [\"/e\"]\nCMD sh -x\nMAINTAINER me\nLABEL a=b \"c d\"='e f'\nONBUILD COPY f /\nONBUILD ENV X=y";
    // The user is looked up where WORKDIR has to make something.
    let base = base.replace("USER a:b\nWORKDIR /w\n", "WORKDIR /w\nUSER 5:6\n");
    let (made, _) = fixture.try_build("base", &base).unwrap();
    let config = &made.configuration.config;
    assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("5:6", "/w/y"));
    assert_eq!(config.exposed_ports.keys().collect::<Vec<_>>(), ["80/tcp", "90/udp", "91/udp"]);
    assert_eq!(config.volumes.keys().collect::<Vec<_>>(), ["/j", "/u", "/v"]);
    assert_eq!(config.stop_signal, "SIGINT");
    assert_eq!(config.healthcheck.as_ref().unwrap().test, ["CMD-SHELL", "check it"]);
    assert_eq!(config.entrypoint.as_deref().unwrap(), ["/e"]);
    assert_eq!(config.cmd.as_deref().unwrap(), ["/bin/sh", "-c", "sh -x"]);
    assert_eq!(config.labels["c d"], "e f");
    assert_eq!(config.on_build, ["COPY f /", "ENV X=y"]);
    assert_eq!(made.configuration.author.as_deref(), Some("me"));
    assert_eq!(made.configuration.created.as_deref(), Some("1970-01-02T00:00:00Z"));
    assert_eq!(made.files["/w/y"], "755 5:6 /");
    let layers = made.configuration.history.iter().filter(|step| !step.empty_layer).count();
    assert_eq!(layers, made.configuration.rootfs.diff_ids.len());

    let (made, _) = fixture.try_build("child", "FROM base\nENTRYPOINT other").unwrap();
    let config = &made.configuration.config;
    assert_eq!((made.files["/f"].as_str(), &config.env[1..]), ("644 0:0 f", ["X=y".to_owned()].as_slice()));
    assert_eq!((config.cmd.as_ref(), config.on_build.len()), (None, 0));

    fixture.options.arguments.insert("SOURCE_DATE_EPOCH".into(), "yesterday".into());
    let error = fixture.try_build("child", "FROM base\n").map(drop).unwrap_err();
    assert!(error.contains("SOURCE_DATE_EPOCH is `yesterday`"), "{error}");
    fixture.options.arguments.insert("SOURCE_DATE_EPOCH".into(), "86400".into());

    // Twice the same, byte for byte, with nothing taken from the cache.
    fixture.options.no_cache = true;
    let id = |fixture: &Fixture| fixture.store.find("child").unwrap().digest;
    let before = id(&fixture);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    fixture.write("f", "f", 0o644);
    fixture.try_build("base", &base).unwrap();
    fixture.try_build("child", "FROM base\nENTRYPOINT other").unwrap();
    assert_eq!(id(&fixture), before);
}

#[test]
fn what_is_at_addresses_becomes_files() {
    let mut fixture = Fixture::new();
    fixture.write("a", "a", 0o644);
    let digest = |text: &str| Digest::of(text.as_bytes());
    let text = "FROM scratch\nWORKDIR /there\nARG HOST=x.example\nADD http://$HOST/f?1 /named\nADD http://x.example/d/f /there\n\
                ADD --chown=3:4 --chmod=644 http://x.example/t.tar.gz?token a /new/\n";
    let (made, _) = fixture.try_build("test", text).unwrap();
    for (path, expected) in [
        ("/named", "600 0:0 http://x.example/f"),
        ("/there/f", "600 0:0 http://x.example/d/f"),
        ("/new/t.tar.gz", "644 3:4 http://x.example/t.tar.gz"),
        ("/new/a", "644 3:4 a"),
    ] {
        assert_eq!(made.files.get(path).map(String::as_str), Some(expected), "{:?}", made.files);
    }
    assert_eq!(fixture.fetched.borrow_mut().drain(..).count(), 3);
    // Without a checksum it is fetched again, and the same content is the same step.
    let (again, cached) = fixture.try_build("test", text).unwrap();
    assert_eq!((fixture.fetched.borrow_mut().drain(..).count(), cached), (3, 4));
    assert_eq!(again.files, made.files);
    let (_, cached) = fixture.try_build("test", &text.replace("f?1", "f?2")).unwrap();
    assert_eq!((fixture.fetched.borrow_mut().drain(..).count(), cached), (3, 4));

    // With one it is fetched once, whatever the address is by then.
    let right = digest("http://x.example/f");
    let text = "FROM scratch\nARG SUM\nADD --checksum=$SUM http://x.example/f?1 /\n";
    fixture.options.arguments.insert("SUM".into(), right.to_string());
    fixture.build(text);
    assert_eq!(fixture.fetched.borrow_mut().drain(..).count(), 1);
    let (made, cached) = fixture.try_build("test", &text.replace("http://x", "https://other.x")).unwrap();
    assert_eq!((fixture.fetched.borrow().len(), cached), (0, 1));
    assert_eq!(made.files["/f"], "600 0:0 http://x.example/f");
    fixture.options.no_cache = true;
    fixture.build(text);
    assert_eq!(fixture.fetched.borrow_mut().drain(..).count(), 1);
    let wrong = digest("other");
    fixture.options.arguments.insert("SUM".into(), wrong.to_string());
    let error = fixture.try_build("wrong", text).map(drop).unwrap_err();
    let expected = format!("Dockerfile:3:16: what was fetched has the digest {right}, not {wrong}");
    assert!(error.starts_with(&expected), "{error}");
    assert_eq!(fixture.store.list().unwrap().len(), 1, "nothing wrong has a name");
}
