"""A terminal over a WebSocket, as docs/api.md has it: terminal.py URL"""

import asyncio
import json
import struct
import sys
import time
import urllib.request
from socket import SO_LINGER, SOL_SOCKET

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

URL = sys.argv[1]
PLACE = f"{URL.replace('http', 'ws', 1)}/sandboxes/dev/exec/ws"


async def until(socket, text):
    """Reads what the terminal shows until a text is there."""
    shown = ""
    while text not in shown:
        message = await asyncio.wait_for(socket.recv(), 60)
        assert isinstance(message, bytes), message
        shown += message.decode()
    return shown


async def last(socket):
    while isinstance(message := await asyncio.wait_for(socket.recv(), 60), bytes):
        pass
    return json.loads(message)


def ask(body):
    request = urllib.request.Request(f"{URL}/sandboxes/dev/exec", json.dumps(body).encode(), {"content-type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())["data"]


async def main():
    async with connect(PLACE) as socket:
        await socket.send(json.dumps({"command": ["sh"], "env": ["PS1=ready "], "rows": 30, "cols": 100}))
        await until(socket, "ready ")
        await socket.send(b"stty size; echo $TERM\n")
        assert "30 100\r\n" in await until(socket, "xterm-256color\r\n")
        await socket.send(json.dumps({"resize": {"rows": 50, "cols": 120}}))
        await socket.send(b"stty size; tty\n")
        assert "50 120\r\n" in await until(socket, "/dev/pts/")
        await socket.send(b"echo grown; sleep 1000\n")
        await until(socket, "grown\r\n")
        # As typed: the terminal makes a signal of it.
        await socket.send(b"\x03")
        await until(socket, "ready ")
        # More than the guest takes at once.
        await socket.send(b"wc -c > /tmp/count; echo counted\n")
        for _ in range(20):
            await socket.send(b"x" * 1023 + b"\n")
        await socket.send(b"\x04")
        await until(socket, "counted\r\n")
        await socket.send(b"exit $(($(cat /tmp/count) / 1024))\n")
        assert await last(socket) == {"exit_code": 20}
    # A shell where nothing is said; closed, it is killed.
    async with connect(PLACE) as socket:
        await socket.send("{}")
        await socket.send(b"sleep 1002\n")
        await until(socket, "sleep 1002")
        while ask({"command": ["sh", "-c", "ps ax | grep '[s]leep 1002' | wc -l"]})["stdout"] != "1\n":
            await asyncio.sleep(0.1)
    while ask({"command": ["sh", "-c", "ps ax | grep '[s]leep 1002' | wc -l"]})["stdout"] != "0\n":
        await asyncio.sleep(0.1)
    for first in ("nonsense", '{"nope": 1}', '{"command": "sh"}'):
        async with connect(PLACE) as socket:
            await socket.send(first)
            assert (await last(socket))["code"] == "json"
    async with connect(PLACE) as socket:
        await socket.send(json.dumps({"command": ["nothing-of-that-name"]}))
        assert (await last(socket))["code"] == "not-started"
    # Whoever goes while the command takes nothing more of what was typed leaves nothing either.
    async with connect(PLACE, close_timeout=1) as socket:
        await socket.send(json.dumps({"command": ["sh", "-c", "stty raw -echo; echo full; exec sleep 1003"]}))
        await until(socket, "full")
        for _ in range(512):
            try:
                await asyncio.wait_for(socket.send(b"x" * 65536), 1)
            except TimeoutError:
                break
        else:
            raise SystemExit("32 MiB are taken for whom nobody reads")
        # As if its machine had gone: what was not sent yet is not waited for.
        linger = struct.pack("ii", 1, 0)
        socket.transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, linger)
        socket.transport.abort()
    deadline = time.monotonic() + 60
    while ask({"command": ["sh", "-c", "ps ax | grep '[s]leep 1003' | wc -l"]})["stdout"] != "0\n":
        assert time.monotonic() < deadline, "the command of who is gone is there"
        await asyncio.sleep(0.5)
    # A page of the web opens no terminal: its browser says whose it is.
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://localhost:3000", 403)):
        try:
            async with connect(PLACE, origin=origin):
                raise SystemExit(f"{origin} opened a terminal")
        except InvalidStatus as error:
            assert error.response.status_code == status, error
    async with connect(PLACE, origin=URL) as socket:
        await socket.send(json.dumps({"command": ["true"]}))
        assert await last(socket) == {"exit_code": 0}
    for place, status in ((PLACE.replace("/dev/", "/nobody/"), 404), (f"{PLACE}/x", 404)):
        try:
            async with connect(place):
                raise SystemExit(f"{place} was opened")
        except InvalidStatus as error:
            assert error.response.status_code == status, error
    print("ok")


asyncio.run(main())
