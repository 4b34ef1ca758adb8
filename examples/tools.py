"""A model that calls Python functions until it can answer: python examples/tools.py [MODEL]

The built-in demo has never seen a tool. With it, the first call is forced: it names a real function and fits its
schema, but its arguments, and what the demo makes of the result, mean nothing.
"""

import inspect
import sys
from datetime import datetime, timezone

import mlx_gemma4
from mlx_gemma4 import ReplyOptions, Session, Text, ToolCall


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def clock() -> str:
    """Tells the time in UTC."""
    return datetime.now(timezone.utc).strftime("%H:%M")


FUNCTIONS = {function.__name__: function for function in (add, clock)}


def declaration(function) -> dict:
    """Describe a function to the model; all parameters here are small numbers."""
    number = {"type": "integer", "minimum": 0, "maximum": 1000}
    names = list(inspect.signature(function).parameters)
    parameters = {"type": "object", "properties": dict.fromkeys(names, number), "required": names}
    return {"name": function.__name__, "description": function.__doc__, "parameters": parameters}


lm = mlx_gemma4.load(*sys.argv[1:])
tools = [declaration(function) for function in FUNCTIONS.values()]
free = ReplyOptions(tools=tools, max_tokens=200)
forced = ReplyOptions(tools=tools, max_tokens=200, tool_choice="add")
session = Session(lm, "Answer with the help of your tools.")

events = session.send("What is 17 and 25 together?", free if sys.argv[1:] else forced)
for _ in range(5):  # rounds of calls
    results = []
    for event in events:
        if isinstance(event, Text):
            print(event.text, end="", flush=True)
        elif isinstance(event, ToolCall) and event.name in FUNCTIONS:
            try:
                result = FUNCTIONS[event.name](**event.arguments)
            except TypeError as error:  # the model gave other arguments than the function takes
                result = {"error": str(error)}
            print(f"[{event.name}({event.arguments}) = {result}]")
            results.append(mlx_gemma4.tool_result(event.id, event.name, result))
    if not results:
        break
    events = session.send(results, free)
print()
