// ollama's package for Node: chat, generate, streams, a schema, the list and the description of models, errors.
import { Ollama } from "ollama";
import assert from "node:assert";

const [url, model] = process.argv.slice(2);
const client = new Ollama({ host: url.replace(/\/v1$/, "") });
const options = { temperature: 0, num_predict: 120 };
const prompt = "What is the capital of France?";
const messages = [{ role: "user", content: prompt }];
const { models } = await client.list();
assert.ok(models.some(({ name }) => name === model || name.startsWith(model + ":")));
assert.ok((await client.show({ model })).capabilities.includes("completion"));
const whole = await client.chat({ model, messages, options });
const text = whole.message.content;
assert.ok(text.length > 0 && whole.eval_count > 0 && whole.total_duration > 0);
const plain = await fetch(url + "/chat/completions", {
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify({ model, messages, temperature: 0, max_tokens: 120 }),
});
assert.equal(text, (await plain.json()).choices[0].message.content);
let joined = "";
let last;
for await (const part of await client.chat({ model, messages, options, stream: true })) {
  joined += part.message.content;
  last = part;
}
assert.equal(joined, text);
assert.ok(last.done && last.done_reason === "stop");
assert.equal((await client.generate({ model, prompt, options })).response, text);
joined = "";
for await (const part of await client.generate({ model, prompt, options, stream: true })) joined += part.response;
assert.equal(joined, text);
const format = {
  type: "object",
  properties: { country: { type: "string" }, capital: { type: "string" } },
  required: ["country", "capital"],
};
const typed = JSON.parse((await client.chat({ model, messages, options, format })).message.content);
assert.ok("country" in typed && "capital" in typed);
await assert.rejects(client.chat({ model: "no-such-model", messages }), { name: "ResponseError", status_code: 404 });
console.log("ollama (node) ok");
