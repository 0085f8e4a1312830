"""The Dockerfiles that are built by both. Each case exercises something of its own.

`context`: files by path; a value is text, or (text, mode), or ("->", target), or None for an empty directory.
`setup`: a shell script run in a copy of the context, for what Python's words above cannot make.
`flags`: given to both builds. `first`: Dockerfiles built before, by name. `differences`: what has to differ, and why.
`served`: files by path of a server on this machine, which `SERVER` in the Dockerfile stands for.
`golden`: what Docker 20.10 cannot build; entries and configuration as the Dockerfile reference has them.
"""

TREE = {
    "a.txt": "a\n",
    "b.txt": ("b\n", 0o600),
    "run.sh": ("#!/bin/sh\necho run\n", 0o755),
    "dir/c.txt": "c\n",
    "dir/sub/d.txt": ("d\n", 0o640),
    "dir/link": ("->", "c.txt"),
    "dir/empty": None,
    "link": ("->", "dir/c.txt"),
    "dangling": ("->", "nowhere"),
}


def case(name, dockerfile, context=TREE, **options):
    return {"name": name, "dockerfile": dockerfile, "context": context, **options}


CASES = [
    case("copy-file", "FROM base\nCOPY a.txt /x\nCOPY b.txt run.sh /y/\n"),
    case("copy-file-into-directory", "FROM base\nRUN mkdir /there\nCOPY a.txt /there\nCOPY b.txt /there/renamed\n"),
    case("copy-directory", "FROM base\nCOPY dir /new\nCOPY dir /tmp\nCOPY dir/ /slash/\n"),
    case("copy-over-existing", "FROM base\nRUN mkdir -m 711 -p /old/sub && echo x > /old/c.txt && echo k > /old/keep\nCOPY dir /old\n"),
    case("copy-everything", "FROM base\nCOPY . /all\n"),
    case("copy-wildcards", "FROM base\nCOPY *.txt /t/\nCOPY dir/*.txt dir/s?b /u/\n"),
    case("copy-link-followed", "FROM base\nCOPY link /l\nCOPY dir /d\n"),
    case("copy-through-link", "FROM base\nCOPY a.txt /lnk/inside.txt\nCOPY dir /lnk/deep/er\n"),
    case("copy-relative", "FROM base\nWORKDIR /w/x\nCOPY a.txt .\nCOPY a.txt b\nCOPY dir ./sub\nCOPY a.txt ../up\n"),
    case("copy-chown", "FROM base\nCOPY --chown=app a.txt /1/\nCOPY --chown=app:users dir /2/\nCOPY --chown=7 a.txt /3\nCOPY --chown=7:8 a.txt /4/5/6\n"),
    case(
        "copy-chmod",
        "FROM base\nCOPY --chmod=4711 a.txt /1\nCOPY --chmod=0600 dir /2\n",
        differences={"/1": "this Docker loses the set-id bits; later ones keep them"},
    ),
    case("copy-modes", "FROM base\nCOPY m /m\n", {}, setup="mkdir -m 1777 -p m/sticky; echo x > m/set; chmod 6755 m/set; echo r > m/none; chmod 000 m/none"),
    case(
        "copy-special",
        "FROM base\nCOPY s /s\n",
        {"s/a": "a"},
        setup="mkfifo s/fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"s/socket\")'",
        differences={
            "/s/fifo": "this Docker drops it without a word; here it is copied",
            "/s/socket": "this Docker makes an empty file of it; here it is left out",
        },
    ),
    case("copy-hard-links", "FROM base\nCOPY h /h\n", {}, setup="mkdir h; echo x > h/one; ln h/one h/two"),
    case("copy-odd-names", "FROM base\nCOPY odd /odd\n", {"odd/with space": "1", "odd/ünï": "2", "odd/" + "n" * 200: "3", "odd/-dash": "4"}),
    case("copy-json", 'FROM base\nCOPY ["a b", "c", "/d e/"]\n', {"a b": "1", "c": "2"}),
    case("copy-from-stage", "FROM base AS one\nRUN mkdir -p /o/p && echo s > /o/p/s && chown -R 1000:100 /o && chmod 750 /o/p\nFROM base\nCOPY --from=one /o /o\nCOPY --from=0 /o/p/s /file\nCOPY --from=one --chown=3:4 /o/p /own\n"),
    case("copy-from-image", "FROM base\nCOPY --from=base /etc/passwd /p\nCOPY --from=base /capable /capable2\n"),
    case("copy-from-links", "FROM base AS one\nRUN ln -s /etc/passwd /abs && ln -s abs /rel && mkdir /d && ln -s ../abs /d/l\nFROM base\nCOPY --from=one /rel /followed\nCOPY --from=one /d /kept\n"),
    case("add-tar", "FROM base\nADD t.tar /t\nADD t.tar.gz /gz/\nADD t.tar.xz /xz\nADD t.tar.bz2 /bz2\nADD a.txt /plain\n", {"a.txt": "a"}, setup="mkdir -p s/d; echo x > s/d/f; chmod 640 s/d/f; ln -s f s/d/l; ln s/d/f s/d/h; tar --owner=5 --group=6 --numeric-owner -cf t.tar -C s .; gzip -k t.tar; xz -k t.tar; bzip2 -k t.tar; rm -r s"),
    case("add-tar-over-link", "FROM base\nADD t.tar /\n", {}, setup="mkdir -p s/lnk; echo x > s/lnk/in; tar --owner=0 --group=0 -cf t.tar -C s lnk; rm -r s"),
    case("add-url", "FROM base\nRUN mkdir /there\nADD SERVER/a.txt /named\nADD SERVER/d/b.bin?q /there\nADD SERVER/t.tar.gz a.txt /new/\nADD --chown=7:8 SERVER/a.txt /own/\n", {"a.txt": "local"}, served={"a.txt": b"a", "d/b.bin": b"b" * 5000, "t.tar.gz": b"\x1f\x8b no archive"}),
    case("stages-skipped", "FROM base AS no\nRUN exit 1\nFROM base AS yes\nRUN echo y > /y\nFROM yes\nRUN echo z > /z\n"),
    case("target", "FROM base AS one\nRUN echo 1 > /one\nFROM base AS two\nRUN exit 1\n", flags=["--target", "one"]),
    case("stage-of-stage", "FROM base AS one\nENV A=1\nWORKDIR /one\nUSER app\nFROM one AS two\nENV B=$A\nRUN echo $A$B > /tmp/ab\nFROM two\nLABEL l=$B\n"),
    case("arg-from", "ARG IMAGE=nothing\nARG TAG\nFROM ${IMAGE:-x}${TAG:+:$TAG}\nARG IMAGE\nRUN echo \"$IMAGE-$TAG\" > /arg\n", flags=["--build-arg", "IMAGE=base", "--build-arg", "TAG=latest"]),
    case("arg-scope", "FROM base AS one\nARG A=a\nENV E=$A\nFROM base\nRUN echo \"[$A][$E]\" > /none\nARG A=b C\nRUN echo \"[$A][$C]\" > /some\n", flags=["--build-arg", "C=c"]),
    case("arg-and-env", "FROM base\nARG X=arg\nENV X=env\nRUN echo $X > /x\nARG X=later\nRUN echo $X > /y\n", flags=["--build-arg", "X=given"]),
    case("arg-inherited", "FROM base AS one\nARG A=a\nENV E=e\nFROM one\nRUN echo [$A] > /x\nLABEL l=$A$E\n"),
    case("arg-empty", "FROM base\nENV X=e\nARG X\nARG Y=\nRUN echo [$X][${Y-unset}] > /x\nLABEL l=$X\n"),
    case("env-forms", "FROM base\nENV A=1 B=\"two words\" C='$A' D=a\\ b E=${A}x\nENV F one two  three\nENV A=2 G=$A\nRUN env | grep -v -e HOSTNAME -e PWD -e SHLVL -e USER -e LOGNAME -e agentkernel-certificates | sort > /env\n"),
    case("bundle", "FROM base\nCOPY a /etc/ssl/certs/ca-certificates.crt\nCOPY a /etc/ssl/ca-bundle.pem\nRUN true\nRUN echo x > /x && mkdir /etc/new\n"
         "RUN echo more >> /etc/ssl/ca-bundle.pem; chmod 600 /etc/ssl/certs/ca-certificates.crt\n"
         "RUN cd /etc/ssl/certs && echo all > new && mv new ca-certificates.crt; rm ../ca-bundle.pem\n"
         "COPY a /etc/pki/tls/cert.pem\nRUN rm -r /etc/ssl && mv /etc/pki/tls/cert.pem /moved\n", {"a": "not ended"}),
    case("bundle-kept", "FROM base\nCOPY a /etc/ssl/certs/ca-certificates.crt\nCOPY a /etc/ssl/ca-bundle.pem\nRUN echo more >> /etc/ssl/ca-bundle.pem; chmod 600 /etc/ssl/certs/ca-certificates.crt; cp /etc/ssl/certs/ca-certificates.crt /copy\n", {"a": "ended\n"}),
    case("expansion", "FROM base\nENV A=val E=\nLABEL a=${A:-d} b=${N:-d} c=${E:-d} d=${A:+p} e=${N:+p} f=\"${A}\" g='$A' h=\\$A i=${N:-${A}}\nWORKDIR /w/$A\nCOPY ${A:+a}.txt ./$A.txt\nEXPOSE ${P:-80}\nVOLUME /v/$A\nSTOPSIGNAL ${S:-SIGINT}\n"),
    case("labels", 'FROM base\nLABEL one=1 two="2 2" "three three"=3\nLABEL one=changed multi="a\\\nb"\nLABEL old style value\n'),
    case("cmd-entrypoint", 'FROM base\nCMD ["base"]\nENTRYPOINT ["e", "f"]\nCMD shell form "x"\n'),
    case("entrypoint-resets-cmd", "FROM parent\nENTRYPOINT exec top\n", first={"parent": 'FROM base\nENTRYPOINT ["a"]\nCMD ["b"]\n'}),
    case("cmd-empty", "FROM base\nCMD []\nENTRYPOINT []\n"),
    case("shell", 'FROM base\nSHELL ["/bin/sh", "-e", "-c"]\nRUN false || echo $0 $- > /s\nCMD x y\n'),
    case("healthcheck", 'FROM base\nHEALTHCHECK --interval=1m30s --timeout=2s --start-period=500ms --retries=5 CMD ["true"]\n'),
    case("healthcheck-none", "FROM parent\nHEALTHCHECK NONE\n", first={"parent": "FROM base\nHEALTHCHECK CMD true\n"}),
    case("onbuild", "FROM parent\nRUN echo after > /after\n", first={"parent": "FROM base\nONBUILD COPY a.txt /on\nONBUILD RUN echo $(cat /on) > /build\nONBUILD ENV X=y\n"}),
    case("onbuild-kept", "FROM base\nONBUILD RUN echo x\nONBUILD COPY . /\n"),
    case("user", "FROM base\nRUN chmod 777 /tmp && echo root > /tmp/0\nUSER app\nRUN id > /tmp/1 && echo $HOME >> /tmp/1\nUSER 1000:100\nRUN id -g > /tmp/2\nUSER 4242\nRUN id -u > /tmp/3\nUSER root\n"),
    case("workdir", "FROM base\nWORKDIR /a/b\nWORKDIR c\nWORKDIR ../d\nRUN pwd > pwd\nUSER app\nWORKDIR /home/app/new/er\nWORKDIR /tmp\n"),
    case("workdir-existing", "FROM base\nRUN mkdir -m 700 /e && chown 1000 /e\nWORKDIR /e\nRUN touch x\n"),
    case("volume-then-write", 'FROM base\nVOLUME /v /w\nVOLUME ["/x y"]\nRUN mkdir -p /v && echo kept > /v/f\n'),
    case("expose", "FROM base\nEXPOSE 80 81/udp 90-92\nEXPOSE 80/tcp\n"),
    case("maintainer", "FROM base\nMAINTAINER Me <me@example.org>\n"),
    case("dockerignore", "FROM base\nCOPY . /all\n", {**TREE, ".dockerignore": "# c\n*.txt\n!a.txt\ndir/*\n!dir/sub\n**/d.txt\n", "deep/x/y.txt": "y", "deep/x/y.md": "m"}),
    case("dockerignore-own", "FROM base\nCOPY . /all\n", {**TREE, ".dockerignore": "*", "Dockerfile.dockerignore": "b.txt\nDockerfile*\n"}),
    case("escape", "# escape=`\nFROM base\nRUN echo one `\n  two > /e\nENV P=C:\\x `\n  Q=`$P\n"),
    case("comments", "# first\n\nFROM base\n# between\nRUN echo a \\\n# inside\n\n  b \\\n  # indented\n  c > /abc\n"),
    case("whiteouts", "FROM base\nRUN mkdir -p /d/e && touch /d/1 /d/2 /d/e/3 /f && ln -s 1 /d/l\nRUN rm /d/1 /f && rm -r /d/e\nRUN rm -r /etc/group\n"),
    case("opaque", "FROM base\nRUN mkdir -p /d/e && touch /d/1 /d/e/2\nRUN rm -r /d && mkdir /d && touch /d/new\n"),
    case("replaced", "FROM base\nRUN mkdir -p /d/e && touch /f && ln -s f /l\nRUN rm -r /d && echo file > /d && rm /f && mkdir /f && rm /l && mkdir /l\n"),
    case("rename", "FROM base\nRUN mkdir -p /d/e && echo x > /d/e/f\nRUN mv /d /moved && mv /etc/passwd /etc/pw && cp /etc/pw /etc/passwd\n"),
    case("attributes", "FROM base\nRUN echo x > /a && echo y > /b && mkdir /c\nRUN chmod 4750 /a && chown 5:6 /b && chmod 1777 /c && chmod 711 /tmp\n"),
    case("kinds", "FROM base\nRUN ln -s /nowhere '/sym link' && mkfifo -m 640 /fifo && echo x > /h1 && ln /h1 /h2 && mkdir /h && ln /h1 /h/3 && mknod /null c 1 3\n"),
    case("capabilities", "FROM base\nRUN cp -a /capable /copied; mv /capable /moved\n"),
    case("run-exec", 'FROM base\nRUN ["/bin/sh", "-c", "echo exec > /x"]\nRUN ["touch", "/a b"]\n'),
    case(
        "run-mounts",
        "FROM base\nRUN --mount=type=cache,target=/c --mount=type=tmpfs,target=/t --mount=type=bind,source=dir,target=/b echo $(ls /b) > /seen && touch /c/x /t/y\n",
        differences=dict.fromkeys(["/b", "/c", "/t"], "this Docker leaves the directories it mounted on; later ones remove them"),
    ),
    case(
        "run-secret",
        "FROM base\nRUN --mount=type=secret,id=s cat /run/secrets/s | wc -c > /size\n",
        {**TREE, "secret": "12345"},
        flags=["--secret", "id=s,src=context/secret"],
        differences=dict.fromkeys(["/run", "/run/secrets"], "this Docker leaves the directories it mounted on; later ones remove them"),
    ),
    case("heredoc-run", "FROM base\nRUN <<EOF\necho one > /1\necho $HOME > /2\nEOF\nRUN cat <<A <<-B > /3\na $PATH\nA\n\tb\nB\n", golden={"/1": "one\n", "/2": "/root\n", "/3": "b\n"}),
    case("heredoc-copy", "FROM base\nENV X=val\nCOPY <<one <<'two' /h/\n$X\none\n$X\ntwo\n", golden={"/h/one": "val\n", "/h/two": "$X\n"}),
    case("copy-exclude", "FROM base\nCOPY --exclude=*.txt --exclude=sub dir /e\n", golden={"/e/link": "-> c.txt", "/e/empty": "/"}),
    case("expansion-patterns", "FROM base\nENV F=a/b.tar.gz\nLABEL p=${F#*/} q=${F%%.*} r=${F/a/x}\n", golden={}, labels={"p": "b.tar.gz", "q": "a/b", "r": "x/b.tar.gz"}),
    case(
        "debian",
        "FROM scratch\nADD debian.tar /\nRUN rm -rf /usr/share/doc /usr/share/locale && mv /etc/skel /etc/moved && chown -R 33:33 /srv /opt\n"
        "RUN find / -xdev -perm -4000 | sort > /set-id && ln /bin/sh /bin/linked && perl -e 'print qq(perl\\n)' > /perl\n",
        {},
        setup="mmdebstrap --quiet --variant=essential --mode=root bookworm debian.tar",
    ),
]
