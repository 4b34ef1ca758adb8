// Anthropic's client for JavaScript. node anthropic.mjs URL; prints what came as JSON.
import Anthropic from "@anthropic-ai/sdk";
import { betaTool } from "@anthropic-ai/sdk/helpers/beta/json-schema";
import { asks } from "./asks.mjs";

const { url, model, prompt, weather, story } = asks;
const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const ask = { model, messages: [{ role: "user", content: prompt }], max_tokens: 24, temperature: 0 };
const tools = [{ name: weather.name, description: weather.description, input_schema: weather.parameters }];

const reply = (await client.messages.create(ask)).content[0].text;
const stream = [];
await client.messages.stream(ask).on("text", (text) => stream.push(text)).finalMessage();
const forced = { ...ask, tools, tool_choice: { type: "tool", name: "weather" }, max_tokens: 60 };
const said = await client.messages.create(forced);
const call = said.content.find((block) => block.type === "tool_use");
const streamed = await client.messages.stream(forced).finalMessage(); // puts arguments together
const again = streamed.content.find((block) => block.type === "tool_use");
const result = { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "Rain." }] };
const history = [...ask.messages, { role: "assistant", content: said.content }, result];
const after = await client.messages.create({ ...ask, tools, messages: history });
const run = (made) => ran.push([weather.name, made]) && "Rain.";
const ran = []; // by a runner, which sends the result back by itself
const runnable = betaTool({ name: weather.name, description: "Tells.", inputSchema: weather.parameters, run });
await client.beta.messages.toolRunner({ ...forced, tools: [runnable], max_iterations: 2 }).runUntilDone();
const format = { type: "json_schema", schema: story };
const form = await client.messages.create({ ...ask, output_config: { format }, max_tokens: 60 });
const came = {
  reply,
  stream,
  tools: [...[call, again].map((made) => [made.name, made.input]), ...ran],
  after: after.content[0].text,
  forms: [JSON.parse(form.content[0].text)],
};
console.log(JSON.stringify(came));
