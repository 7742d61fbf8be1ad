// Vercel AI SDK over Responses (its OpenAI provider's default), chat completions and Anthropic's messages.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, streamText, tool } from "ai";
import assert from "node:assert";
import { z } from "zod";

const [baseURL, name] = process.argv.slice(2);
const prompt = "What is the capital of France?";
const plain = await fetch(baseURL + "/chat/completions", {
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify({ model: name, messages: [{ role: "user", content: prompt }], temperature: 0, max_tokens: 24 }),
});
const greedy = (await plain.json()).choices[0].message.content;
const schema = z.object({ country: z.string(), capital: z.string() });
const weather = tool({ description: "The weather in a city", inputSchema: z.object({ city: z.string() }) });
const openai = createOpenAI({ baseURL, apiKey: "none" });
const providers = {
  responses: openai,
  chat: openai.chat,
  compatible: createOpenAICompatible({ name: "sleb", baseURL, supportsStructuredOutputs: true, includeUsage: true }),
  messages: createAnthropic({ baseURL, apiKey: "none" }),
};
for (const [kind, provider] of Object.entries(providers)) {
  const options = { model: provider(name), prompt, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
  const whole = await generateText(options);
  assert.equal(whole.text, greedy, kind);
  assert.ok(whole.usage.inputTokens > 0 && whole.usage.outputTokens > 0, kind);
  const stream = streamText(options);
  let text = "";
  for await (const part of stream.textStream) text += part;
  assert.equal(text, greedy, kind);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens, kind);
  const { object } = await generateObject({ ...options, schema, maxOutputTokens: 200 });
  assert.ok(typeof object.capital === "string", kind);
  const called = await generateText({ ...options, tools: { weather }, toolChoice: "required", maxOutputTokens: 200 });
  assert.equal(called.finishReason, "tool-calls", kind);
  assert.equal(typeof called.toolCalls[0].input.city, "string", kind);
  await assert.rejects(generateText({ ...options, model: provider("no-such-model") }), (error) => {
    return APICallError.isInstance(error) && error.statusCode === 404 && error.message.includes("no-such-model");
  });
}
console.log("Vercel AI SDK ok");
