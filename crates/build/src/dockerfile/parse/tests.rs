use proptest::prelude::*;

use super::*;

fn kinds(text: &str) -> Vec<Kind> {
    let file = Dockerfile::parse(format!("FROM scratch\n{text}").as_bytes());
    let file = file.unwrap_or_else(|error| panic!("{error}"));
    file.stages[0].instructions.iter().map(|instruction| instruction.kind.clone()).collect()
}

fn only(text: &str) -> Kind {
    let kinds = kinds(text);
    assert_eq!(kinds.len(), 1, "{kinds:?}");
    kinds.into_iter().next().unwrap()
}

fn texts(words: &[Word]) -> Vec<&str> {
    words.iter().map(|word| word.text.as_str()).collect()
}

#[test]
fn stages_arguments_and_directives() {
    let text = "\u{feff}# syntax=docker/dockerfile:1.7\r\n# escape=`\r\n# comment\r\nARG TAG=3 OTHER\r\n\r\n\
                from --platform=$P alpine:$TAG as Base\r\nRUN a `\r\n  # dropped\r\n\r\n  b\r\nFROM base\r\nrun c\r\n";
    let file = Dockerfile::parse(text.as_bytes()).unwrap();
    assert_eq!((file.escape, file.stages.len()), ('`', 2));
    let Kind::Arg(arguments) = &file.arguments[0].kind else { panic!() };
    assert_eq!((arguments[0].1.as_ref().unwrap().text.as_str(), arguments[1].1.is_none()), ("3", true));
    let base = &file.stages[0];
    assert_eq!((base.name.as_deref(), base.image.text.as_str()), (Some("base"), "alpine:$TAG"));
    assert_eq!(base.place, Place { line: 6, column: 1 });
    let Kind::Run(run) = &base.instructions[0].kind else { panic!() };
    assert_eq!(run.command, Command::Shell("a   b".into()));
    assert_eq!(base.instructions[0].place.line, 7);
}

#[test]
fn documents() {
    let kinds = kinds(
        "RUN <<EOF\n#!/bin/sh\necho $A\nEOF\nRUN cat <<-'ONE' 3<<TWO > x\n\tbody\n\tONE\n$two\nTWO\n\
         COPY <<a.txt <<\"b.txt\" other /d/\n$A\na.txt\n$B\nb.txt\nRUN echo '<<EOF'",
    );
    let Kind::Run(run) = &kinds[0] else { panic!() };
    assert_eq!((run.heredocs[0].content.as_str(), run.heredocs[0].expand), ("#!/bin/sh\necho $A\n", true));
    let Kind::Run(run) = &kinds[1] else { panic!() };
    let heredocs: Vec<_> =
        run.heredocs.iter().map(|doc| (doc.text(), doc.expand, doc.opening.as_str())).collect();
    assert_eq!(heredocs, [("body\n".into(), false, "<<-'ONE'"), ("$two\n".into(), true, "3<<TWO")]);
    let Kind::Copy(copy) = &kinds[2] else { panic!() };
    let names: Vec<_> = copy
        .sources
        .iter()
        .map(|source| match source {
            TransferSource::Document(doc) => (doc.name.as_str(), doc.expand),
            TransferSource::Path(word) => (word.text.as_str(), true),
        })
        .collect();
    assert_eq!(names, [("a.txt", true), ("b.txt", false), ("other", true)]);
    let Kind::Run(run) = &kinds[3] else { panic!() };
    assert!(run.heredocs.is_empty());
}

#[test]
fn instructions() {
    let Kind::Env(pairs) = only(r#"ENV A=1 B="x y" C=a\ b"#) else { panic!() };
    let pairs: Vec<_> = pairs.iter().map(|(name, value)| (name.text.as_str(), value.text.as_str())).collect();
    assert_eq!(pairs, [("A", "1"), ("B", "\"x y\""), ("C", r"a\ b")]);
    let Kind::Env(pairs) = only("ENV PATH  /bin:/x y ") else { panic!() };
    assert_eq!((pairs[0].0.text.as_str(), pairs[0].1.text.as_str()), ("PATH", "/bin:/x y"));
    let Kind::Copy(copy) =
        only("COPY --from=x --chown=a:b --chmod=755 --link --exclude=*.o --exclude=y a b /c/")
    else {
        panic!()
    };
    assert!(copy.link && copy.sources.len() == 2);
    assert_eq!(texts(&copy.exclude), ["*.o", "y"]);
    let Kind::Add(add) = only(r#"ADD --checksum=sha256:00 ["a b", "/c"]"#) else { panic!() };
    assert_eq!((add.destination.text.as_str(), add.checksum.unwrap().text.as_str()), ("/c", "sha256:00"));
    assert_eq!(only(r#"CMD ["a", "b"]"#), Kind::Cmd(Command::Exec(vec!["a".into(), "b".into()])));
    assert_eq!(only("CMD [a, b]"), Kind::Cmd(Command::Shell("[a, b]".into())));
    assert_eq!(only("ENTRYPOINT"), Kind::Entrypoint(Command::Shell(String::new())));
    let Kind::Healthcheck(check) = only("HEALTHCHECK --interval=1m30s --retries=4 CMD curl x") else {
        panic!()
    };
    assert_eq!((check.interval, check.retries), (90 * SECOND, 4));
    assert_eq!(check.command, Some(Command::Shell("curl x".into())));
    let Kind::Healthcheck(check) = only("HEALTHCHECK none") else { panic!() };
    assert_eq!(check.command, None);
    let Kind::Expose(ports) = only("EXPOSE 80 81/udp $X") else { panic!() };
    assert_eq!(texts(&ports), ["80", "81/udp", "$X"]);
    let Kind::Volume(paths) = only(r#"VOLUME ["/a b"]"#) else { panic!() };
    assert_eq!(texts(&paths), ["/a b"]);
    let Kind::Onbuild(inner) = only("ONBUILD  run x") else { panic!() };
    assert_eq!(inner.text, "run x");
    let Kind::Run(run) = only(
        "RUN --mount=type=cache,target=/c,sharing=locked,uid=5 --mount=type=secret,id=s,env=S,required \
         --mount=target=/b,rw,from=x,src=/y --mount=type=tmpfs,dst=/t,size=2m --network=none make",
    ) else {
        panic!()
    };
    assert_eq!(run.network.unwrap().text, "none");
    assert!(matches!(&run.mounts[0].kind, MountKind::Cache { sharing: Sharing::Locked, uid: 5, .. }));
    assert!(
        matches!(&run.mounts[1].kind, MountKind::Secret { required: true, variable: Some(name), .. } if name == "S")
    );
    assert!(matches!(&run.mounts[2].kind, MountKind::Bind { writable: true, from: Some(_), .. }));
    assert!(matches!(&run.mounts[3].kind, MountKind::Temporary { size: Some(2097152) }));
}

#[test]
fn errors_tell_where() {
    for (text, expected) in [
        ("", "D:1:1: there is no FROM"),
        ("# x\n", "D:1:1: there is no FROM\n    # x\n    ^"),
        ("RUN x\nFROM y", "D:1:1: nothing but ARG may stand before the first FROM\n    RUN x\n    ^"),
        ("FROM x\n  RUM y", "D:2:3: unknown instruction `RUM`\n      RUM y\n      ^"),
        ("FROM x y", "D:1:8: FROM takes one image\n    FROM x y\n           ^"),
        ("FROM x AS 1", "D:1:11: `1` cannot be a stage's name\n    FROM x AS 1\n              ^"),
        ("FROM x AS a\nFROM y AS A", "D:2:1: two stages are called `a`\n    FROM y AS A\n    ^"),
        ("FROM x\nRUN", "D:2:1: RUN needs an argument\n    RUN\n    ^"),
        ("FROM x\nRUN <<E\nx", "D:2:5: the document `E` does not end\n    RUN <<E\n        ^"),
        (
            "FROM x\nCOPY --form=a \\\n  b c",
            "D:2:6: COPY has no flag --form\n    COPY --form=a \\\n         ^",
        ),
        ("FROM x\nCOPY \\\n  a", "D:3:3: COPY needs a source and a destination\n      a\n      ^"),
        ("FROM x\nENV a=1 b", "D:2:9: `b` is no NAME=VALUE\n    ENV a=1 b\n            ^"),
        (
            "FROM x\nRUN --mount=type=cach,target=/x y",
            "D:2:5: `cach` is no type of a mount\n    RUN --mount=type=cach,target=/x y\n        ^",
        ),
        (
            "FROM x\nRUN --mount=type=cache,taget=/x y",
            "D:2:5: a mount of type cache has no option `taget`\n    RUN --mount=type=cache,taget=/x y\n        ^",
        ),
        ("FROM x\nSHELL sh -c", "D:2:7: SHELL needs a list of words\n    SHELL sh -c\n          ^"),
        ("FROM x\nONBUILD FROM y", "D:2:9: FROM cannot follow ONBUILD\n    ONBUILD FROM y\n            ^"),
        (
            "FROM x\nHEALTHCHECK --interval=x CMD y",
            "D:2:13: --interval is a time, at least 1ms\n    HEALTHCHECK --interval=x CMD y\n                ^",
        ),
        (
            "# syntax=other/frontend\nFROM x",
            "D:1:10: the frontend other/frontend is not supported\n    # syntax=other/frontend\n             ^",
        ),
        ("# escape=x\nFROM x", "D:1:10: the escape character cannot be `x`\n    # escape=x\n             ^"),
    ] {
        let error = Dockerfile::parse(text.as_bytes()).unwrap_err();
        assert_eq!(error.render("D"), expected, "{text}");
        assert!(error.hint.is_some(), "{text}");
    }
    let hint = |text: &str| Dockerfile::parse(text.as_bytes()).unwrap_err().hint.unwrap_or_default();
    assert_eq!(hint("FROM x\nRUM y"), "did you mean RUN?");
    assert_eq!(hint("FROM x\nRUN"), "write: RUN COMMAND");
    assert!(hint("FROM x\nCOPY --nothing=a b c").starts_with("there are --from, --chown"));
    assert_eq!(hint("FROM x\nCOPY --form=a b c"), "did you mean --from?");
    assert_eq!(hint("FROM x\nRUN --mount=type=cache,taget=/x y"), "did you mean target?");
    let error = Dockerfile::parse(b"FROM x\nRUN \xff").unwrap_err();
    assert_eq!(error.render("D"), "D:2:5: this is not UTF-8 text\n    RUN \u{fffd}\n        ^");
}

proptest! {
    #[test]
    fn nothing_panics(
        parts in prop::collection::vec(prop_oneof![
            Just("FROM x AS y\n".to_owned()), Just("RUN --mount=type=cache,target=/x a \\\n".to_owned()),
            Just("COPY <<A <<-B /x\n".to_owned()), Just("A\n".to_owned()), Just("ENV a=\"$b\" c='d'\n".to_owned()),
            Just("HEALTHCHECK --timeout=1s CMD [\"x\"]\n".to_owned()), Just("ONBUILD ".to_owned()),
            Just("# escape=`\n".to_owned()), "[ -~é\\n\\t]{0,20}",
        ], 0..12),
    ) {
        let text = parts.concat();
        if let Err(error) = Dockerfile::parse(text.as_bytes()) {
            prop_assert!(!error.message.is_empty());
            prop_assert!(error.hint.as_ref().is_some_and(|hint| !hint.is_empty()), "{error}");
            let _ = error.render("Dockerfile");
        }
    }
}
