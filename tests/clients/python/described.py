"""Asks a live server whatever its description permits, and much that it does not: described.py URL KEY

No answer may be a 5xx, a status or a type that the description does not name, or a body that is not as it says. Left out:
the WebSocket, which this tool does not speak; streams of events without an end; what runs long by design.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from agentkernel import AgentKernel

URL, KEY = sys.argv[1:]

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth"
# What starts a machine takes a second, all else a moment.
SLOW = ["/run", "/run/stream", "/batch/run", "/sandboxes"]


def ask(*words, configuration=None):
    configured = ["--config-file", configuration] if configuration else []
    command = [Path(sys.executable).parent / "schemathesis", *configured, "run", f"{URL}/openapi.json", "--header",
        f"Authorization: Bearer {KEY}", "--checks", CHECKS, "--seed", "1", "--request-timeout", "120", "--no-color", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\n{done.stderr}")
    print(done.stdout[-1200:])


left_out = [word for path in ("/events", "/sandboxes/{name}/exec/ws", *SLOW) for word in ("--exclude-path", path)]
ask("--phases", "examples,coverage,fuzzing", "--max-examples", "10", *left_out)
# Mostly what is no request: each that is one starts a machine.
included = [word for path in SLOW for word in ("--include-path", path)]
ask("--phases", "fuzzing", "--mode", "negative", "--max-examples", "12", *included)

# Much of it again, about a sandbox that is there.
with AgentKernel(base_url=URL, api_key=KEY, timeout=120) as client, tempfile.TemporaryDirectory() as directory:
    client.create_sandbox("described", memory_mb=512)
    command = client.exec_detached("described", ["sleep", "1000"])
    configuration = Path(directory, "schemathesis.toml")
    configuration.write_text(f'[parameters]\n"path.name" = "described"\n"path.id" = "{command.id}"\n')
    paths = "^/sandboxes/{name}/(exec$|exec/detach|files|logs|stats|diff|apply|pause|resume)"
    words = ["--phases", "coverage,fuzzing", "--max-examples", "10", "--include-path-regex", paths]
    ask(*words, configuration=configuration)

    # All that is told, where there is something to tell of.
    client.take_snapshot("described", snapshot_name="described")
    client.run(["sh", "-c", "echo new > new.txt"])
    left_out = [word for path in ("/events", "/sandboxes/{name}/exec/ws") for word in ("--exclude-path", path)]
    words = ["--phases", "coverage,fuzzing", "--mode", "positive", "--max-examples", "3", "--include-method", "GET"]
    ask(*words, *left_out, configuration=configuration)
    client.delete_snapshot("described")
    client.remove_sandbox("described")
print("ok")
