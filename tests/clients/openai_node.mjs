// The OpenAI SDK for Node: chat, stream, completions.
import OpenAI from "openai";
import assert from "node:assert";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { model, messages, temperature: 0, max_tokens: 24 };
const whole = await client.chat.completions.create(options);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...options, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.ok(text.length > 0);
assert.equal(text, whole.choices[0].message.content);
const completion = await client.completions.create({ model, prompt: "The capital of France is", max_tokens: 4 });
assert.ok(completion.choices[0].text);
console.log("openai (node) ok");
