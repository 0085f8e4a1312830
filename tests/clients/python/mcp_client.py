"""The official MCP client of PyPI, over stdio or streamable HTTP: mcp_client.py stdio PROGRAM | http URL KEY"""

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import httpx2
from mcp import Client, ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client

TOOLS = set("""
    sandbox_run sandbox_create sandbox_exec sandbox_list sandbox_remove sandbox_start sandbox_stop sandbox_file_read
    sandbox_file_write sandbox_write_files sandbox_exec_detach sandbox_exec_status sandbox_exec_logs sandbox_exec_kill
    sandbox_exec_list sandbox_diff sandbox_apply sandbox_fork snapshot_take snapshot_list snapshot_restore
    snapshot_delete
""".split())


def server(program, *flags):
    # The variables of this process are not all the client's to give.
    return StdioServerParameters(command=program, args=["mcp", *flags], env=dict(os.environ))


@contextlib.asynccontextmanager
async def session(kind, where, *rest):
    async with contextlib.AsyncExitStack() as stack:
        if kind == "stdio":
            streams = await stack.enter_async_context(stdio_client(server(where, *rest)))
        else:
            client = httpx2.AsyncClient(headers={"authorization": f"Bearer {rest[0]}"}, timeout=120)
            await stack.enter_async_context(client)
            streams = await stack.enter_async_context(streamable_http_client(where, http_client=client))
        session = await stack.enter_async_context(ClientSession(*streams[:2]))
        await session.initialize()
        yield session


async def call(session, tool, arguments, **options):
    """What a tool gives, and what it says."""
    result = await session.call_tool(tool, arguments, **options)
    text = result.content[0].text
    assert not result.is_error, f"{tool}: {text}"
    return result.structured_content, text


async def refused(session, tool, arguments, *words):
    """That a tool refuses, in these words."""
    result = await session.call_tool(tool, arguments)
    assert result.is_error and all(word in result.content[0].text for word in words), f"{tool}: {result}"


async def given_up(session, calls, left):
    """That of calls that are cancelled, the last of which says when it is up, so many sandboxes are left."""
    began = asyncio.Event()

    async def running(number, _, message):
        if message == "up":
            began.set()

    tasks = [asyncio.create_task(session.call_tool(*words, progress_callback=running)) for words in calls]
    await asyncio.wait_for(began.wait(), 60)
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    deadline = time.monotonic() + 30
    while len((await call(session, "sandbox_list", {}))[0]["sandboxes"]) > left:
        assert time.monotonic() < deadline, "the sandbox of a cancelled request is there"
        await asyncio.sleep(0.1)


async def all_tools(session):
    tools = (await session.list_tools()).tools
    assert {tool.name for tool in tools} == TOOLS, {tool.name for tool in tools} ^ TOOLS
    for tool in tools:
        assert tool.description and tool.input_schema["type"] == "object", tool
        assert tool.input_schema.get("additionalProperties") is False, tool.name
        assert tool.output_schema["type"] == "object" and tool.annotations, tool.name

    # A command that fails is an answer.
    data, text = await call(session, "sandbox_run", {"command": ["sh", "-c", "echo out; echo err >&2; exit 3"]})
    assert (data["exit_code"], data["stdout"], data["stderr"]) == (3, "out\n", "err\n") and "[exit code 3]" in text, text
    data, text = await call(session, "sandbox_run", {"command": ["nothing-of-that-name"]})
    assert data["exit_code"] == 127 and "did not start" in text, text
    data, text = await call(session, "sandbox_run", {"command": ["sh", "-c", "yes é | head -c 300000; echo; echo last"]})
    assert data["omitted_bytes"] > 200_000 and len(text) < 40_000 and "bytes left out" in text, len(text)
    assert "\ufffd" not in text and "last\n" in text, text[-200:]

    told = []

    async def progress(number, _, message):
        told.append((number, message))

    words = ["sh", "-c", "for i in 1 2 3; do echo line $i; sleep 0.5; done"]
    await call(session, "sandbox_run", {"command": words}, progress_callback=progress)
    numbers, messages = [number for number, _ in told], [message for _, message in told]
    assert numbers == sorted(numbers) and "line 2" in messages, told

    Path("given").write_text("as it was\n")
    info, _ = await call(session, "sandbox_create", {"name": "agent", "memory_mb": 512, "labels": {"of": "tests"}})
    assert (info["status"], info["labels"], info["workspace"]) == ("running", {"of": "tests"}, "cow"), info
    listed, _ = await call(session, "sandbox_list", {})
    assert [sandbox["name"] for sandbox in listed["sandboxes"]] == ["agent"], listed
    named = {"name": "agent"}
    await call(session, "sandbox_file_write", named | {"path": "given", "content": "as it is now\n"})
    await call(session, "sandbox_write_files", named | {"files": {"new/a": "1\n", "/tmp/b": "2\n"}})
    read, _ = await call(session, "sandbox_file_read", named | {"path": "given"})
    assert read == {"content": "as it is now\n", "encoding": "utf8", "size": 13}, read
    _, text = await call(session, "sandbox_exec", named | {"command": ["cat", "given", "new/a", "/tmp/b"]})
    assert text == "as it is now\n1\n2\n[exit code 0]", text
    await refused(session, "sandbox_file_read", named | {"path": "../etc/passwd"}, "path-invalid")
    await refused(session, "sandbox_file_read", named | {"path": "none"}, "file-not-found")

    # Kept apart, looked at, taken.
    assert Path("given").read_text() == "as it was\n"
    diff, text = await call(session, "sandbox_diff", named)
    assert {file["path"] for file in diff["files"]} >= {"given", "new/a"} and "+as it is now" in text, text
    tried, _ = await call(session, "sandbox_apply", named | {"dry_run": True})
    assert not Path("new").exists() and tried["complete"], tried
    taken, _ = await call(session, "sandbox_apply", named | {"paths": ["given"]})
    assert taken["applied"] == ["given"] and Path("given").read_text() == "as it is now\n", taken
    await call(session, "sandbox_apply", named)
    assert Path("new/a").read_text() == "1\n"
    _, text = await call(session, "sandbox_diff", named)
    assert text == "nothing was changed", text
    await call(session, "sandbox_run", {"command": ["sh", "-c", "echo last > by-run"]})
    _, text = await call(session, "sandbox_diff", {})
    assert "+last" in text, text
    await call(session, "sandbox_apply", {})
    assert Path("by-run").read_text() == "last\n"

    command, _ = await call(session, "sandbox_exec_detach", named | {"command": ["sh", "-c", "echo out; sleep 1000"]})
    identified = named | {"id": command["id"]}
    while "out\n" not in (logs := (await call(session, "sandbox_exec_logs", identified))[0])["stdout"]:
        await asyncio.sleep(0.1)
    assert logs["stderr"] == "", logs
    assert (await call(session, "sandbox_exec_status", identified))[0]["status"] == "running"
    listed, _ = await call(session, "sandbox_exec_list", named)
    assert [known["id"] for known in listed["commands"]] == [command["id"]], listed
    assert (await call(session, "sandbox_exec_kill", identified))[0]["exit_code"] == 137

    await call(session, "sandbox_exec", named | {"command": ["sh", "-c", "echo before > /tmp/state"]})
    await call(session, "snapshot_take", {"sandbox": "agent", "name": "agent-before"})
    forked, _ = await call(session, "sandbox_fork", named | {"as": "try", "count": 2})
    assert [sandbox["name"] for sandbox in forked["sandboxes"]] == ["try-1", "try-2"], forked
    await call(session, "sandbox_exec", named | {"command": ["sh", "-c", "echo after > /tmp/state"]})
    for name in ("try-1", "try-2"):
        data, _ = await call(session, "sandbox_exec", {"name": name, "command": ["cat", "/tmp/state"]})
        assert data["output"] == "before\n", data
        await call(session, "sandbox_remove", {"name": name})
    await call(session, "snapshot_restore", {"name": "agent-before"})
    assert (await call(session, "sandbox_file_read", named | {"path": "/tmp/state"}))[0]["content"] == "before\n"
    listed, _ = await call(session, "snapshot_list", {})
    assert [snapshot["name"] for snapshot in listed["snapshots"]] == ["agent-before"], listed
    await call(session, "snapshot_delete", {"name": "agent-before"})
    assert (await call(session, "sandbox_stop", named | {"grace": "1s"}))[0]["status"] == "stopped"
    await refused(session, "sandbox_exec", named | {"command": ["true"]}, "not-running")
    assert (await call(session, "sandbox_start", named))[0]["status"] == "running"

    # What is not granted.
    await refused(session, "sandbox_run", {"command": ["true"], "profile": "permissive"}, "not-granted")
    await refused(session, "sandbox_run", {"command": ["true"], "workspace": "rw"}, "not-granted")
    await refused(session, "sandbox_run", {"command": ["true"], "volumes": ["/etc:/x"]}, "not-granted")
    await refused(session, "sandbox_run", {"command": ["true"], "image": "/etc"}, "not-granted")
    await refused(session, "sandbox_run", {"command": ["true"], "nope": 1}, "unknown field `nope`")
    await refused(session, "sandbox_exec", {"name": "nobody", "command": ["true"]}, "not-found")

    # A request that is given up leaves nothing.
    inside = ("sandbox_exec", named | {"command": ["sleep", "1001"]})
    await given_up(session, [inside, ("sandbox_run", {"command": ["sh", "-c", "echo up; sleep 1000"]})], 1)
    deadline = time.monotonic() + 30
    look = named | {"command": ["sh", "-c", "ps ax | grep '[s]leep 1001' || true"]}
    while (said := (await call(session, "sandbox_exec", look))[0]["output"]):
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.1)
    await call(session, "sandbox_remove", named)


async def newest(kind, where, *rest):
    """The same client by its other door, which speaks the newest protocol: it has no sessions."""
    async with contextlib.AsyncExitStack() as stack:
        if kind == "stdio":
            transport = server(where)
        else:
            client = httpx2.AsyncClient(headers={"authorization": f"Bearer {rest[0]}"}, timeout=120)
            transport = streamable_http_client(where, http_client=await stack.enter_async_context(client))
        opened = await stack.enter_async_context(Client(transport))
        assert opened.session.protocol_version > "2026", opened.session.protocol_version
        assert {tool.name for tool in (await opened.list_tools()).tools} == TOOLS
        data, _ = await call(opened, "sandbox_run", {"command": ["sh", "-c", "exit 3"]})
        assert data["exit_code"] == 3, data
        await given_up(opened, [("sandbox_run", {"command": ["sh", "-c", "echo up; sleep 1000"]})], 0)


async def main():
    async with session(*sys.argv[1:]) as opened:
        await all_tools(opened)
    await newest(*sys.argv[1:])
    if sys.argv[1] == "stdio":
        async with session("stdio", sys.argv[2], "--profile", "restrictive") as opened:
            data, _ = await call(opened, "sandbox_run", {"command": ["sh", "-c", "pwd; ls given"]})
            assert data["exit_code"] != 0, data
            for more in ({"profile": "moderate"}, {"network": "public"}, {"workspace": "cow"}, {"allow": ["a.example"]}):
                await refused(opened, "sandbox_run", {"command": ["true"]} | more, "not-granted")
    print("ok")


asyncio.run(main())
