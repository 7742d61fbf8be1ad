// The Anthropic SDK for Node: messages, streams, a required tool call and its result, count_tokens, errors.
import Anthropic from "@anthropic-ai/sdk";
import assert from "node:assert";

const [url, model] = process.argv.slice(2);
const client = new Anthropic({ baseURL: url.replace(/\/v1$/, ""), apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { model, messages, max_tokens: 120, temperature: 0 };
const whole = await client.messages.create(options);
const text = whole.content[0].text;
assert.ok(text.length > 0);
assert.equal(whole.stop_reason, "end_turn");
const chat = await fetch(url + "/chat/completions", {
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify(options),
});
assert.equal(text, (await chat.json()).choices[0].message.content);
const { input_tokens } = await client.messages.countTokens({ model, messages });
assert.equal(input_tokens, whole.usage.input_tokens + (whole.usage.cache_read_input_tokens ?? 0));
let joined = "";
for await (const event of await client.messages.create({ ...options, stream: true })) {
  if (event.type === "content_block_delta") joined += event.delta.text;
}
assert.equal(joined, text);
const stream = client.messages.stream(options);
joined = "";
stream.on("text", (piece) => (joined += piece));
const final = await stream.finalMessage();
assert.equal(joined, text);
assert.equal(final.usage.output_tokens, whole.usage.output_tokens);
const input_schema = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ name: "weather", description: "The weather in a city", input_schema }];
const asked = [{ role: "user", content: "How is the weather in Oslo?" }];
const request = { ...options, messages: asked, tools, tool_choice: { type: "any", disable_parallel_tool_use: true } };
const called = await client.messages.stream(request).finalMessage();
const call = called.content.find((block) => block.type === "tool_use");
assert.equal(called.stop_reason, "tool_use");
assert.deepEqual(Object.keys(call.input), ["city"]);
const told = await client.messages.create({
  ...options,
  tools,
  tool_choice: { type: "none" },
  messages: [
    ...asked,
    { role: "assistant", content: called.content },
    { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "Rain." }] },
  ],
});
assert.ok(told.content[0].text);
await assert.rejects(client.messages.create({ ...options, model: "no-such-model" }), Anthropic.NotFoundError);
console.log("anthropic (node) ok");
