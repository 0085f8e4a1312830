// The client library that is published on npm, as it is, against a live server: sdk.mjs URL [KEY]

import assert from "node:assert/strict";

import { AgentKernel, NotFoundError } from "agentkernel";

const [baseUrl, apiKey] = process.argv.slice(2);
const client = new AgentKernel({ baseUrl, apiKey, timeout: 120_000 });

assert.equal(await client.health(), "ok");
assert.equal((await client.run(["echo", "hello"])).output, "hello\n");
assert.equal((await client.run(["sh", "-c", "id -u; exit 3"], { profile: "restrictive" })).output.trim() !== "", true);

const events = [];
for await (const event of client.runStream(["sh", "-c", "echo one; echo two >&2; exit 3"])) events.push(event);
assert.deepEqual(events.map((event) => event.type), ["started", "output", "output", "done"]);
assert.deepEqual(new Set(events.slice(1, 3).map((event) => event.data.data + event.data.stream)), new Set(["one\nstdout", "two\nstderr"]));
assert.equal(events[3].data.exit_code, 3);

const { results } = await client.batchRun([{ command: ["echo", "a"] }, { command: ["echo", "b"] }]);
assert.deepEqual(results.map((result) => [result.output, result.error]), [["a\n", null], ["b\n", null]]);

const made = await client.createSandbox("node-sdk", { vcpus: 1, memory_mb: 512, profile: "moderate" });
assert.deepEqual([made.name, made.status, made.backend, made.memory_mb], ["node-sdk", "running", "qemu", 512]);
assert.deepEqual((await client.listSandboxes()).map((sandbox) => sandbox.name), ["node-sdk"]);
assert.deepEqual(await client.getSandbox("node-sdk"), await client.getSandboxByUuid(made.uuid));

const told = await client.execInSandbox("node-sdk", ["sh", "-c", "echo $COLOUR; pwd; id -u"], {
  env: ["COLOUR=red"], workdir: "/var", sudo: true,
});
assert.equal(told.output, "red\n/var\n0\n");

await client.writeFile("node-sdk", "tmp/deep/text", "grüße\n");
assert.deepEqual(await client.readFile("node-sdk", "tmp/deep/text"), { content: "grüße\n", encoding: "utf8", size: 8 });
await client.writeFile("node-sdk", "tmp/binary", "AP8A", { encoding: "base64" });
assert.deepEqual(await client.readFile("node-sdk", "tmp/binary"), { content: "AP8A", encoding: "base64", size: 3 });
assert.equal((await client.writeFiles("node-sdk", { "/tmp/many/a": "1", "/tmp/many/b": "2" })).written, 2);
await client.deleteFile("node-sdk", "tmp/binary");
await assert.rejects(client.readFile("node-sdk", "tmp/binary"), NotFoundError);

const command = await client.execDetached("node-sdk", ["sh", "-c", "echo out; echo err >&2; sleep 1000"]);
assert.equal(command.status, "running");
let logs = {};
while (!logs.stdout) logs = await client.detachedLogs("node-sdk", command.id);
assert.equal(logs.stdout, "out\n");
assert.deepEqual((await client.detachedList("node-sdk")).map((known) => known.id), [command.id]);
await client.detachedKill("node-sdk", command.id);
assert.deepEqual((await client.detachedStatus("node-sdk", command.id)).exit_code, 137);

assert.ok("expires_at" in (await client.extendTtl("node-sdk", { by: "1h" })));
assert.ok((await client.getSandboxLogs("node-sdk")).some((entry) => entry.event === "created"));

await client.execInSandbox("node-sdk", ["sh", "-c", "echo before > /tmp/state"]);
const taken = await client.takeSnapshot({ sandbox: "node-sdk", name: "node-snapshot" });
assert.deepEqual([taken.name, taken.sandbox], ["node-snapshot", "node-sdk"]);
assert.deepEqual(await client.listSnapshots(), [await client.getSnapshot("node-snapshot")]);
await client.execInSandbox("node-sdk", ["sh", "-c", "echo after > /tmp/state"]);
assert.equal((await client.restoreSnapshot("node-snapshot")).status, "running");
assert.equal((await client.execInSandbox("node-sdk", ["cat", "/tmp/state"])).output, "before\n");
await client.deleteSnapshot("node-snapshot");
assert.deepEqual(await client.listSnapshots(), []);

await client.removeSandbox("node-sdk");
await assert.rejects(client.getSandbox("node-sdk"), NotFoundError);
const session = await client.sandbox("node-session", { memory_mb: 512 });
assert.equal((await session.run(["echo", "in"])).output, "in\n");
await session.remove();
assert.deepEqual(await client.listSandboxes(), []);
console.log("ok");
