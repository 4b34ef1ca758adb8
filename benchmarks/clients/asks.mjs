// What the programs beside this one ask, as benchmarks/clients.py does in Python.
export const asks = {
  url: process.argv[2],
  model: "gemma4-demo",
  prompt: "Tell me a story about a fox.",
  weather: {
    name: "weather",
    description: "Tells the weather of a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
  story: {
    type: "object",
    properties: { animal: { type: "string", enum: ["fox", "wolf"] }, brave: { type: "boolean" } },
    required: ["animal", "brave"],
    additionalProperties: false,
  },
};
