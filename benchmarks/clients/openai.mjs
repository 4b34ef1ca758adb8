// OpenAI's client for JavaScript: chat completions and responses. node openai.mjs URL; prints what came as JSON.
import OpenAI from "openai";
import { asks } from "./asks.mjs";

const { url, model, prompt, weather, story } = asks;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const ask = { model, messages: [{ role: "user", content: prompt }], max_tokens: 24, temperature: 0 };
const tools = [{ type: "function", function: weather }];
const schema = { type: "json_schema", json_schema: { name: "story", schema: story, strict: true } };

const reply = (await client.chat.completions.create(ask)).choices[0].message.content;
const stream = [];
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true }))
  if (chunk.choices[0]?.delta.content) stream.push(chunk.choices[0].delta.content);
const forced = { ...ask, tools, tool_choice: { type: "function", function: { name: "weather" } }, max_tokens: 60 };
const said = (await client.chat.completions.create(forced)).choices[0].message;
const call = said.tool_calls[0];
const streamed = await client.chat.completions.stream(forced).finalChatCompletion(); // puts arguments together
const again = streamed.choices[0].message.tool_calls[0].function;
const result = { role: "tool", tool_call_id: call.id, content: "Rain." };
const after = await client.chat.completions.create({ ...ask, tools, messages: [...ask.messages, said, result] });
const form = await client.chat.completions.parse({ ...ask, response_format: schema, max_tokens: 60 });
const responses = await client.responses.create({ model, input: prompt, max_output_tokens: 24, temperature: 0 });
const came = {
  reply,
  stream,
  tools: [call.function, again].map((made) => [made.name, JSON.parse(made.arguments)]),
  after: after.choices[0].message.content,
  forms: [JSON.parse(form.choices[0].message.content)],
  again: [responses.output_text],
};
console.log(JSON.stringify(came));
