use super::*;

#[test]
fn the_library_keeps_images_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let home = Home::open(&directory.path().join("home")).unwrap();
    let context = directory.path().join("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY Dockerfile /\n").unwrap();
    // No step needs a machine, so no program is started.
    let open = || ImageBuilder::open(&home, Path::new("/nowhere")).unwrap();
    let mut builder = open();
    for name in ["tools", "base"] {
        let image = builder.build(name, &context, None).unwrap();
        assert_eq!(builder.get(name), Some(&image));
        assert_eq!((&image.name[..], image.labels["agentkernel.name"].as_str()), (name, name));
        assert!(image.image_id.starts_with("sha256:") && image.size_bytes > 0);
    }
    let names =
        |builder: &ImageBuilder| builder.list().iter().map(|image| image.name.clone()).collect::<Vec<_>>();
    assert_eq!((names(&builder), names(&open())), (vec!["base".into(), "tools".into()], names(&builder)));
    assert!(builder.exists("tools") && !builder.exists("other"));
    assert_eq!(builder.resolve_image("tools"), "agentkernel-tools");
    assert_eq!(builder.resolve_image("other:1"), "other:1");

    std::fs::write(context.join("failing"), "FROM scratch\nCOPY gone /\n").unwrap();
    let before = builder.get("tools").cloned();
    builder.build("tools", &context, Some(Path::new("failing"))).unwrap_err();
    assert_eq!((builder.get("tools"), open().get("tools")), (before.as_ref(), before.as_ref()));

    assert!(builder.sync().unwrap().is_empty());
    builder.images.store().untag(&"agentkernel-base".parse().unwrap()).unwrap();
    assert_eq!(builder.sync().unwrap(), ["base"]);
    builder.delete("tools").unwrap();
    assert_eq!(builder.delete("tools").unwrap_err().message, "Image 'tools' not found");
    assert!(names(&builder).is_empty() && names(&open()).is_empty());
    assert_eq!(builder.resolve_image("tools"), "tools");
}

#[test]
fn names() {
    for good in ["a", "my-tools", "a.b_c-d", "x__y", &"n".repeat(128)] {
        assert!(check_name(good).is_ok(), "{good}");
    }
    for (bad, message) in [
        ("", "Image name cannot be empty"),
        ("a/b", "Image name can only contain alphanumeric characters, hyphens, underscores, and dots"),
        ("ä", "Image name can only contain alphanumeric characters, hyphens, underscores, and dots"),
        ("name:tag", "Image name can only contain alphanumeric characters, hyphens, underscores, and dots"),
        ("a/../b", "Image name can only contain alphanumeric characters, hyphens, underscores, and dots"),
        ("My", "Image name has upper-case letters"),
        ("-x", "Image name has separators where there must be none"),
        ("x-", "Image name has separators where there must be none"),
        ("a..b", "Image name has separators where there must be none"),
        (&"n".repeat(129), "Image name is longer than 128 characters"),
    ] {
        let problem = check_name(bad).unwrap_err();
        assert_eq!(problem.message, message, "{bad}");
        assert!(problem.hint.is_some());
    }
    assert_eq!(check_name("Tools:1").unwrap_err().hint.unwrap(), "a built image has no tags: -t tools");
}
