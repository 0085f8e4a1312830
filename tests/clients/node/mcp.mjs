// The official MCP client of npm, over stdio or streamable HTTP: mcp.mjs stdio PROGRAM | http URL KEY

import assert from "node:assert/strict";
import { readFile, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";

import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

const [kind, where, key] = process.argv.slice(2);
const PATIENCE = 240_000;

function connection() {
  if (kind === "stdio") return new StdioClientTransport({ command: where, args: ["mcp"], env: process.env });
  return new StreamableHTTPClientTransport(new URL(where), { requestInit: { headers: { authorization: `Bearer ${key}` } } });
}

async function connect() {
  const client = new Client({ name: "tests", version: "1" });
  const transport = connection();
  await client.connect(transport);
  // Knows what tools give from now on, and holds them to it.
  const { tools } = await client.listTools();
  return { client, transport, tools };
}

const { client, transport, tools } = await connect();
assert.equal(client.getServerVersion().name, "agentkernel");
assert.match(client.getInstructions(), /sandbox_run/);
assert.equal(tools.length, 22);
assert(tools.every((tool) => tool.outputSchema && tool.inputSchema.additionalProperties === false));

const request = (name, args, options) => client.callTool({ name, arguments: args }, undefined, { timeout: PATIENCE, ...options });

async function call(name, args, options) {
  const result = await request(name, args, options);
  assert(!result.isError, `${name}: ${JSON.stringify(result)}`);
  return result.structuredContent;
}

async function refused(name, args, words) {
  const result = await request(name, args);
  assert(result.isError && words.test(result.content[0].text), `${name}: ${JSON.stringify(result)}`);
}

async function until(what, condition) {
  for (const deadline = Date.now() + 60_000; !(await condition()); await sleep(100)) assert(Date.now() < deadline, what);
}

const sh = (script) => ["sh", "-c", script];

const failed = await call("sandbox_run", { command: sh("echo out; echo err >&2; exit 7") });
assert.deepEqual([failed.exit_code, failed.stdout, failed.stderr], [7, "out\n", "err\n"]);
const long = await call("sandbox_run", { command: sh("echo first; yes | head -c 200000; echo last") });
assert(long.output.startsWith("first\n") && long.output.endsWith("last\n") && long.omitted_bytes > 100_000);

const named = { name: "node" };
await writeFile("shared", "as it was\n");
await call("sandbox_create", { ...named, memory_mb: 512, ttl: "1h" });
const told = [];
const slow = sh("for i in 1 2 3; do echo line $i; sleep 0.5; done");
await call("sandbox_exec", { ...named, command: slow }, { onprogress: ({ progress, message }) => told.push([progress, message]) });
assert(told.length > 1 && told.some(([, message]) => message === "line 2"), JSON.stringify(told));
assert(told.every(([progress], index) => index === 0 || progress > told[index - 1][0]));

await call("sandbox_file_write", { ...named, path: "shared", content: "as it is\n" });
await call("sandbox_file_write", { ...named, path: "/tmp/bytes", content: "AP8A", encoding: "base64" });
assert.deepEqual(await call("sandbox_file_read", { ...named, path: "/tmp/bytes" }), { content: "AP8A", encoding: "base64", size: 3 });
await call("sandbox_write_files", { ...named, files: { "by-node/a": "1\n" } });
const diff = await call("sandbox_diff", named);
assert(diff.unified.includes("+as it is") && diff.files.length >= 2, JSON.stringify(diff));
assert.equal(await readFile("shared", "utf8"), "as it was\n");
assert((await call("sandbox_apply", named)).complete);
assert.equal(await readFile("shared", "utf8"), "as it is\n");
assert.equal(await readFile("by-node/a", "utf8"), "1\n");

const detached = await call("sandbox_exec_detach", { ...named, command: sh("echo begun; exec sleep 1000") });
const known = { ...named, id: detached.id };
await until("its output", async () => (await call("sandbox_exec_logs", known)).stdout === "begun\n");
assert.equal((await call("sandbox_exec_logs", { ...known, stream: "stderr" })).stdout, undefined);
assert.equal((await call("sandbox_exec_status", known)).status, "running");
assert.equal((await call("sandbox_exec_list", named)).commands.length, 1);
assert.equal((await call("sandbox_exec_kill", known)).status, "failed");

await call("sandbox_exec", { ...named, command: sh("echo before > /tmp/state") });
await call("snapshot_take", { sandbox: "node", name: "node-before" });
await call("sandbox_exec", { ...named, command: sh("echo after > /tmp/state") });
assert.equal((await call("sandbox_fork", { ...named, as: "node-fork" })).sandboxes[0].name, "node-fork");
assert.equal((await call("snapshot_restore", { name: "node-before", as: "node-then" })).name, "node-then");
const state = async (name) => (await call("sandbox_exec", { name, command: ["cat", "/tmp/state"] })).output;
assert.deepEqual([await state("node-fork"), await state("node-then"), await state("node")], ["after\n", "before\n", "after\n"]);
assert.equal((await call("snapshot_list", {})).snapshots.length, 1);
await call("snapshot_delete", { name: "node-before" });
for (const name of ["node-fork", "node-then"]) await call("sandbox_remove", { name });

await refused("sandbox_run", { command: ["true"], profile: "permissive" }, /not-granted/);
await refused("sandbox_create", { name: "no/name" }, /name/);
await refused("sandbox_exec", { name: "nobody", command: ["true"] }, /not-found/);
await refused("sandbox_exec", { ...named, command: ["true"], nonsense: 1 }, /unknown field `nonsense`/);

// Given up, by a word or by leaving, nothing of it is left.
const names = async (asked) => (await asked.callTool({ name: "sandbox_list", arguments: {} })).structuredContent.sandboxes.map(({ name }) => name);
const giveUp = new AbortController();
const up = ({ message }) => message === "up" && giveUp.abort("enough");
await assert.rejects(request("sandbox_run", { command: sh("echo up; sleep 1000") }, { signal: giveUp.signal, onprogress: up }));
await until("its end", async () => (await names(client)).join() === "node");

let gone = () => {};
const left = new Promise((resolve) => (gone = resolve));
const lost = request("sandbox_run", { command: sh("echo up; sleep 1000") }, { onprogress: ({ message }) => message === "up" && gone() })
  // The server may still have said that it was given up.
  .then((result) => assert(result.isError), () => {});
await left;
if (kind === "http") await transport.terminateSession();
await client.close();
await lost;

const { client: next } = await connect();
await until("the end of what the one who left began", async () => (await names(next)).join() === "node");
await next.callTool({ name: "sandbox_remove", arguments: named });
await next.close();
console.log("ok");
