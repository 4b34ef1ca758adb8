// Vercel's AI SDK with its provider for OpenAI's interface. node vercel.mjs URL; prints what came as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { asks } from "./asks.mjs";

const { url, prompt, weather, story } = asks;
const local = createOpenAICompatible({ name: "local", baseURL: `${url}/v1`, supportsStructuredOutputs: true });
const ask = { model: local(asks.model), prompt, maxOutputTokens: 24, temperature: 0, maxRetries: 0 };
const tools = {
  weather: tool({
    description: weather.description,
    inputSchema: jsonSchema(weather.parameters),
    execute: async () => "Rain.",
  }),
};

const reply = (await generateText(ask)).text;
const stream = [];
for await (const text of streamText(ask).textStream) stream.push(text);
const forced = { ...ask, tools, toolChoice: { type: "tool", toolName: "weather" }, maxOutputTokens: 60 };
const prepareStep = ({ stepNumber }) => (stepNumber ? { toolChoice: "auto" } : {}); // its result goes back, then text
const two = await generateText({ ...forced, stopWhen: stepCountIs(2), prepareStep });
const streamed = await streamText(forced).toolCalls;
const form = await generateObject({ ...ask, schema: jsonSchema(story), maxOutputTokens: 60 });
const came = {
  reply,
  stream,
  tools: [two.steps[0].toolCalls[0], streamed[0]].map((made) => [made.toolName, made.input]),
  after: two.text,
  forms: [form.object],
};
console.log(JSON.stringify(came));
