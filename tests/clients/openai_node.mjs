// The OpenAI SDK for Node: chat, completions and Responses, streams, a required tool call, errors.
import OpenAI from "openai";
import assert from "node:assert";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const question = "What is the capital of France?";
const options = { model, messages: [{ role: "user", content: question }], temperature: 0, max_tokens: 24 };
const whole = await client.chat.completions.create(options);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.ok(text.length > 0);
assert.equal(text, whole.choices[0].message.content);
const completion = await client.completions.create({ model, prompt: "The capital of France is", max_tokens: 4 });
assert.ok(completion.choices[0].text);

const request = { model, input: question, temperature: 0, max_output_tokens: 24 };
const response = await client.responses.create(request);
assert.equal(response.output_text, text);
assert.ok(response.usage.output_tokens > 0);
let joined = "";
const types = [];
for await (const event of await client.responses.create({ ...request, stream: true })) {
  types.push(event.type);
  if (event.type === "response.output_text.delta") joined += event.delta;
}
assert.equal(joined, text);
assert.equal(types[0], "response.created");
assert.equal(types.at(-1), "response.completed");
assert.equal((await client.responses.stream(request).finalResponse()).output_text, text);
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", name: "weather", description: "The weather in a city", strict: true, parameters }];
const called = await client.responses.create({ ...request, max_output_tokens: 120, tools, tool_choice: "required" });
const call = called.output.find((item) => item.type === "function_call");
assert.deepEqual(Object.keys(JSON.parse(call.arguments)), ["city"]);
await assert.rejects(client.responses.create({ ...request, model: "no-such-model" }), OpenAI.NotFoundError);
console.log("openai (node) ok");
