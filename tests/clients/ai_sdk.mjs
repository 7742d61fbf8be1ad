// Vercel AI SDK: generateText, streamText, generateObject.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText } from "ai";
import assert from "node:assert";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "sleb", baseURL: url, supportsStructuredOutputs: true });
const options = { model: provider(name), prompt: "What is the capital of France?", temperature: 0, maxOutputTokens: 24 };
const whole = await generateText(options);
let text = "";
for await (const part of streamText(options).textStream) text += part;
assert.ok(text.length > 0);
assert.equal(text, whole.text);
const schema = z.object({ country: z.string(), capital: z.string() });
const { object } = await generateObject({ ...options, schema, maxOutputTokens: 200 });
assert.ok(typeof object.capital === "string");
console.log("Vercel AI SDK ok");
