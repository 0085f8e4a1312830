"""Runs every command of docs/api.md against a live server, in their order: page.py PAGE URL

What `#=>` says after a command must be in its output. Every route of the server's description must be on the page.
"""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

PAGE, URL = sys.argv[1:]
PLACE = "http://127.0.0.1:18888"

text = Path(PAGE).read_text().replace("\\\n", " ")
lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
asked, variables = [], {}
commands = []
for line in lines:
    if line.startswith("#=> "):
        commands[-1][1].append(line[4:])
    elif line.strip():
        commands.append((line, []))

shell = subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
for command, expected in commands:
    asked += re.findall(r"curl (.*)", command)
    shell.stdin.write(command.replace(PLACE, URL) + "\nprintf '\\n--end %s--\\n' $?\n")
    shell.stdin.flush()
    output = ""
    while not (end := re.search(r"\n--end (\d+)--\n$", output)):
        line = shell.stdout.readline()
        assert line, output
        output += line
    assert end.group(1) == "0", f"{command}\n{output}"
    missing = [part for part in expected if part not in output]
    assert not missing, f"{command}\nis to say {missing}:\n{output}"
    if not expected and "-X DELETE" in command:
        assert '"success":true' in output, f"{command}\n{output}"
shell.stdin.close()
shell.wait()

routes = json.load(urllib.request.urlopen(f"{URL}/openapi.json"))["paths"]
for path, item in routes.items():
    pattern = re.compile(f"^{re.escape(PLACE)}{re.sub(r'[{].*?[}]', '[^ ?]+', path.replace('-', '.'))}$".replace("\\/", "/"))
    for method in item:
        for words in asked:
            named = re.search(r"-X (\w+)", words)
            found = named.group(1) if named else "POST" if " -d " in words else "GET"
            place = re.search(r"http://[^ ?)]*", words).group(0)
            if found.lower() == method and pattern.match(place):
                break
        else:
            raise SystemExit(f"{method.upper()} {path} is not on the page")
print("ok")
