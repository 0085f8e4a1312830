"""The client library that is published on PyPI, as it is, against a live server: sdk.py URL [KEY]"""

import asyncio
import sys

from agentkernel import AgentKernel, AsyncAgentKernel
from agentkernel.errors import AgentKernelError, NotFoundError

URL, KEY = sys.argv[1], (sys.argv[2:] or [None])[0]


def synchronous():
    with AgentKernel(base_url=URL, api_key=KEY, timeout=120) as client:
        assert client.health() == "ok"
        assert client.run(["echo", "hello"]).output == "hello\n"
        assert client.run(["sh", "-c", "echo out; echo err >&2"], profile="restrictive").output == "out\nerr\n"
        assert client.run(["cat", "/proc/version"], fast=False).output.startswith("Linux version")

        events = list(client.run_stream(["sh", "-c", "echo one; echo two >&2; exit 3"]))
        assert [event.type for event in events] == ["started", "output", "output", "done"], events
        assert {(event.data["data"], event.data["stream"]) for event in events[1:3]} == {
            ("one\n", "stdout"),
            ("two\n", "stderr"),
        }
        assert events[0].data["sandbox"].startswith("run-") and events[-1].data["exit_code"] == 3

        results = client.batch_run([["echo", "a"], ["sh", "-c", "exit 4"], ["echo", "c"]]).results
        assert [result.output for result in results] == ["a\n", "", "c\n"], results
        assert all(result.error is None for result in results)

        backends = client.get_backends()
        assert backends.default_backend == "qemu" and backends.backends[0].usable, backends
        assert backends.backends[0].capabilities.snapshots and not backends.backends[0].capabilities.host_volumes

        made = client.create_sandbox("sdk", vcpus=1, memory_mb=512, profile="moderate", volumes=["sdk-volume:/data"])
        assert (made.name, made.status, made.backend, made.vcpus, made.memory_mb) == ("sdk", "running", "qemu", 1, 512)
        assert [sandbox.name for sandbox in client.list_sandboxes()] == ["sdk"]
        assert client.get_sandbox("sdk") == client.get_sandbox_by_uuid(made.uuid) == made
        try:
            client.create_sandbox("sdk")
            raise SystemExit("a name was taken twice")
        except AgentKernelError as error:
            assert "there is a sandbox called sdk already" in str(error), error

        # What there is not is said, and not left out.
        for wanted, text in (
            ({"source_url": "https://git.example/x"}, "source_url and source_ref are not known"),
            ({"secrets": ["A=b"]}, "unknown field `secrets`"),
        ):
            try:
                client.create_sandbox("other", **wanted)
                raise SystemExit(f"{wanted} was taken")
            except AgentKernelError as error:
                assert text in str(error), error
        try:
            client.list_stores()
            raise SystemExit("there are stores")
        except NotFoundError as error:
            assert "no such route" in str(error), error

        words = ["sh", "-c", "echo $COLOUR; pwd; id -u"]
        told = client.exec_in_sandbox("sdk", words, env=["COLOUR=red"], workdir="/var", sudo=True)
        assert told.output == "red\n/var\n0\n", told
        assert client.exec_in_sandbox("sdk", ["sh", "-c", "echo kept > /data/x; cat /data/x"], sudo=True).output == "kept\n"

        client.write_file("sdk", "tmp/deep/text", "grüße\n")
        read = client.read_file("sdk", "tmp/deep/text")
        assert (read.content, read.encoding, read.size) == ("grüße\n", "utf8", 8), read
        client.write_file("sdk", "/tmp/binary", "AP8A", encoding="base64")
        assert client.read_file("sdk", "/tmp/binary").content == "AP8A"
        assert client.write_files("sdk", {"/tmp/many/a": "1", "/tmp/many/b": "2"}).written == 2
        assert client.exec_in_sandbox("sdk", ["sh", "-c", "cat /tmp/many/*; wc -c < /tmp/binary"]).output == "123\n"
        client.delete_file("sdk", "tmp/binary")
        try:
            client.read_file("sdk", "tmp/binary")
            raise SystemExit("a file that was removed was read")
        except NotFoundError:
            pass

        command = client.exec_detached("sdk", ["sh", "-c", "echo out; echo err >&2; sleep 1000"])
        assert command.status == "running" and command.pid > 0 and command.exit_code is None, command
        while not (logs := client.detached_logs("sdk", command.id)).stderr:
            pass
        assert (logs.stdout, logs.stderr) == ("out\n", "err\n"), logs
        assert client.detached_logs("sdk", command.id, stream="stderr").stdout is None
        assert [known.id for known in client.detached_list("sdk")] == [command.id]
        client.detached_kill("sdk", command.id)
        ended = client.detached_status("sdk", command.id)
        assert (ended.status, ended.exit_code) == ("failed", 137), ended
        short = client.exec_detached("sdk", ["true"])
        while (short := client.detached_status("sdk", short.id)).status == "running":
            pass
        assert (short.status, short.exit_code) == ("completed", 0), short

        # It lives until it is removed: there is no end that could be moved.
        assert client.extend_ttl("sdk", by="1h") is None
        assert {entry["event"] for entry in client.get_sandbox_logs("sdk")} >= {"created", "started"}

        client.exec_in_sandbox("sdk", ["sh", "-c", "echo before > /tmp/state"])
        taken = client.take_snapshot("sdk", snapshot_name="sdk-snapshot")
        assert (taken.name, taken.sandbox, taken.backend) == ("sdk-snapshot", "sdk", "qemu"), taken
        assert client.list_snapshots() == [client.get_snapshot("sdk-snapshot")]
        client.exec_in_sandbox("sdk", ["sh", "-c", "echo after > /tmp/state"])
        assert client.restore_snapshot("sdk-snapshot").status == "running"
        assert client.exec_in_sandbox("sdk", ["cat", "/tmp/state"]).output == "before\n"
        client.delete_snapshot("sdk-snapshot")
        assert client.list_snapshots() == []

        client.remove_sandbox("sdk")
        try:
            client.get_sandbox("sdk")
            raise SystemExit("a sandbox that was removed is there")
        except NotFoundError:
            pass
        with client.sandbox("session", memory_mb=512) as session:
            assert session.run(["echo", "in"]).output == "in\n"
            assert session.write_files({"/tmp/x": "y"}).written == 1
        assert client.list_sandboxes() == []


async def asynchronous():
    async with AsyncAgentKernel(base_url=URL, api_key=KEY, timeout=120) as client:
        assert await client.health() == "ok"
        outputs = await asyncio.gather(*(client.run(["echo", str(number)]) for number in range(4)))
        assert [output.output for output in outputs] == [f"{number}\n" for number in range(4)]
        events = [event async for event in await client.run_stream(["echo", "streamed"])]
        assert [event.type for event in events] == ["started", "output", "done"], events

        made = await client.create_sandbox("async-sdk", memory_mb=512)
        assert await client.get_sandbox_by_uuid(made.uuid) == made
        told = await client.exec_in_sandbox("async-sdk", ["sh", "-c", "echo $A; pwd"], env=["A=b"], workdir="/var")
        assert told.output == "b\n/var\n", told
        assert (await client.write_files("async-sdk", {"/tmp/a": "1", "/tmp/b": "2"})).written == 2
        assert (await client.read_file("async-sdk", "tmp/a")).content == "1"
        await client.delete_file("async-sdk", "tmp/a")
        command = await client.exec_detached("async-sdk", ["sh", "-c", "echo out; sleep 1000"])
        while not (await client.detached_logs("async-sdk", command.id)).stdout:
            pass
        await client.detached_kill("async-sdk", command.id)
        assert (await client.detached_status("async-sdk", command.id)).exit_code == 137
        await client.take_snapshot("async-sdk", snapshot_name="async-snapshot")
        assert (await client.restore_snapshot("async-snapshot")).name == "async-sdk"
        await client.delete_snapshot("async-snapshot")
        await client.remove_sandbox("async-sdk")
        assert await client.list_sandboxes() == [] and await client.list_snapshots() == []


synchronous()
asyncio.run(asynchronous())
print("ok")
