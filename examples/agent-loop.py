#!/usr/bin/env python3
"""What a coding agent does with agentkernel, without the agent: it finds a failing test, mends the code in a sandbox, looks
at the difference and takes it over.

    python3 -m venv venv && venv/bin/pip install mcp
    venv/bin/python examples/agent-loop.py [PROGRAM]

The project is one of its own, in a temporary directory. PROGRAM is agentkernel, unless it is on the PATH."""

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

AVERAGE = '''def average(numbers):
    return sum(numbers) / (len(numbers) + 1)
'''
TEST = '''import unittest

from average import average


class AverageTest(unittest.TestCase):
    def test_average(self):
        self.assertEqual(average([1, 2, 3]), 2)
'''
RUN_TESTS = ["python3", "-B", "-m", "unittest", "--quiet"]
SANDBOX = {"name": "agent-loop"}


def step(title):
    print(f"\n== {title}", flush=True)


def show(text):
    print("\n".join(f"   {line}" for line in text.splitlines()), flush=True)


async def call(session, tool, **arguments):
    """Calls a tool; what it answers as data. A command that fails is an answer too, with its exit code."""
    result = await session.call_tool(tool, arguments)
    if result.is_error:
        raise SystemExit(f"error: {tool}: {result.content[0].text}")
    return result.structured_content


async def run_tests(session):
    ran = await call(session, "sandbox_exec", **SANDBOX, command=RUN_TESTS, timeout="2m")
    show(f"{ran['output']}[exit code {ran['exit_code']}]")
    return ran["exit_code"]


async def mend(session, project):
    step("The tests, in the sandbox: they see the project")
    if await run_tests(session) == 0:
        raise SystemExit("error: the test should fail")

    step("The code, read and mended in the sandbox")
    file = await call(session, "sandbox_file_read", **SANDBOX, path="average.py")
    mended = file["content"].replace("(len(numbers) + 1)", "len(numbers)")
    await call(session, "sandbox_file_write", **SANDBOX, path="average.py", content=mended)
    show(mended)

    step("The tests again")
    if await run_tests(session) != 0:
        raise SystemExit("error: the test should pass")

    step("What was changed; the host's file is as it was")
    diff = await call(session, "sandbox_diff", **SANDBOX)
    show(diff["unified"])
    assert (project / "average.py").read_text() == AVERAGE

    step("It is taken over")
    applied = await call(session, "sandbox_apply", **SANDBOX, paths=["average.py"])
    show(f"applied: {', '.join(applied['applied'])}")
    assert (project / "average.py").read_text() == mended


async def main():
    program = sys.argv[1] if len(sys.argv) > 1 else "agentkernel"
    with tempfile.TemporaryDirectory(prefix="agent-loop-") as directory:
        project = Path(directory)
        (project / "average.py").write_text(AVERAGE)
        (project / "test_average.py").write_text(TEST)
        # A client gives its server few variables of its own accord: not where agentkernel has its state.
        server = StdioServerParameters(command=program, args=["mcp"], cwd=project, env=dict(os.environ))
        async with stdio_client(server) as streams, ClientSession(*streams) as session:
            await session.initialize()
            step("A sandbox that sees the project copy-on-write, and no network")
            made = await call(session, "sandbox_create", **SANDBOX, network="none", memory_mb=512)
            show(f"{made['name']} is {made['status']}, workspace {made['workspace']}, network {made['network']}")
            try:
                await mend(session, project)
            finally:
                step("The sandbox is removed")
                show((await call(session, "sandbox_remove", **SANDBOX))["done"])


asyncio.run(main())
