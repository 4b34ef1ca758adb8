"""Clients that people use, run against `mlx-gemma4 serve`: a reply, a stream, a tool's call, a form.

    pip install litellm langchain-openai langchain-anthropic instructor 'pydantic-ai-slim[openai]' llm
    pip install llama-index-llms-openai-like  # perhaps with a Python of its own: it may want an older openai
    npm install --prefix benchmarks/clients --no-save openai @anthropic-ai/sdk ai @ai-sdk/openai-compatible zod
    python benchmarks/clients.py [--url http://127.0.0.1:8080] [NAME ...]

In: the clients that are installed (or those named), and a server of the built-in model, started here unless `--url`
says where one is. Out: a table of what came. The built-in model calls no tool by itself, so a call is required, and the
tool's result is sent back where the client says how. Checked: a stream has several pieces and is, put together, the
text of a whole reply (both greedy); calls and forms keep to their schemas. Exit status 1 where something did not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from server_load import served

MODEL, PROMPT = "gemma4-demo", "Tell me a story about a fox."
ASK: list[Any] = [{"role": "user", "content": PROMPT}]
FEW: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
MORE: dict[str, Any] = {"max_tokens": 60, "temperature": 0}
JAVASCRIPT = Path(__file__).parent / "clients"


class Weather(BaseModel, extra="forbid"):
    """Tells the weather of a city."""

    city: Literal["Paris", "Rome"]


class Story(BaseModel, extra="forbid"):
    """What a story is about."""

    animal: Literal["fox", "wolf"]
    brave: bool


PARAMETERS = Weather.model_json_schema()
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CALL = {"type": "function", "function": {"name": "weather"}}


@dataclass
class Came:
    """What a client got, as the client hands it over."""

    version: str
    reply: str = ""
    again: list[str] = field(default_factory=list)  # the reply by other ways
    stream: list[str | None] = field(default_factory=list)
    tools: list[tuple[str, Any]] | None = field(default_factory=list)  # name and arguments; None: it can't require one
    after: str | None = None  # the reply to the tool's result
    forms: list[Any] = field(default_factory=list)

    def row(self) -> list[str]:
        """Say what came of each; "-" is a failure."""
        for name, arguments in self.tools or []:
            (Weather if name == "weather" else Story).model_validate(arguments)
        for form in self.forms:
            Story.model_validate(form)
        stream = [text for text in self.stream if text]
        same = {"".join(stream), *self.again} == {self.reply}
        called = "yes" if self.after is None else "yes, and its result"
        return [
            "yes" if self.reply.strip() else "-",
            f"{len(stream)} pieces" if len(stream) > 2 and same else "-",
            "offered" if self.tools is None else called if self.tools and self.after != "" else "-",
            "yes" if self.forms else "-",
        ]


def litellm(url: str, came: Came) -> None:
    """LiteLLM by all three interfaces; its provider for OpenAI's does everything, the other two a reply."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks for its list of prices
    completion = import_module("litellm").completion
    local = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none", "messages": ASK}
    came.reply = completion(**local, **FEW).choices[0].message.content
    for provider in ("anthropic", "ollama_chat"):
        other = {**local, "model": f"{provider}/{MODEL}", "api_base": url}
        came.again.append(completion(**other, **FEW).choices[0].message.content)
    came.stream = [chunk.choices[0].delta.content for chunk in completion(**local, **FEW, stream=True)]
    made = completion(**local, tools=TOOLS, tool_choice=CALL, **MORE)
    (call,) = made.choices[0].message.tool_calls
    came.tools = [(call.function.name, json.loads(call.function.arguments))]
    history = [*ASK, made.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    came.after = completion(**{**local, "messages": history}, tools=TOOLS, **FEW).choices[0].message.content
    came.forms = [json.loads(completion(**local, response_format=Story, **MORE).choices[0].message.content)]


def langchain_openai(url: str, came: Came) -> None:
    chat = partial(import_module("langchain_openai").ChatOpenAI, model=MODEL, base_url=f"{url}/v1", api_key="none")
    langchain(chat, came)
    came.again = [chat(**FEW, use_responses_api=True).invoke(PROMPT).text]
    came.forms += [chat(**MORE).with_structured_output(Story, method="function_calling").invoke(PROMPT)]


def langchain_anthropic(url: str, came: Came) -> None:
    chat = import_module("langchain_anthropic").ChatAnthropic
    langchain(partial(chat, model=MODEL, base_url=url, api_key="none"), came)


def langchain(chat: Callable[..., Any], came: Came) -> None:
    """What all chat models of LangChain's do."""
    messages, few, more = import_module("langchain_core.messages"), chat(**FEW), chat(**MORE)
    came.reply = few.invoke(PROMPT).text
    came.stream = [chunk.text for chunk in few.stream(PROMPT)]
    said = more.bind_tools(TOOLS, tool_choice="weather").invoke(PROMPT)
    came.tools = [(call["name"], call["args"]) for call in said.tool_calls]
    result = messages.ToolMessage("Rain.", tool_call_id=said.tool_calls[0]["id"])
    came.after = few.bind_tools(TOOLS).invoke([messages.HumanMessage(PROMPT), said, result]).text
    came.forms = [more.with_structured_output(Story).invoke(PROMPT)]


def instructor(url: str, came: Came) -> None:
    module = import_module("instructor")
    client = import_module("openai").OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    given = {"model": MODEL, "messages": ASK, "max_retries": 0}
    kinds = module.Mode.TOOLS, module.Mode.RESPONSES_TOOLS, module.Mode.JSON_SCHEMA
    by_tool, by_responses, by_schema = (module.from_openai(client, mode=kind) for kind in kinds)
    plain = by_tool.create(response_model=None, **given, **FEW)
    came.reply = plain.choices[0].message.content
    chunks = by_tool.create(response_model=None, stream=True, **given, **FEW)
    came.stream = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    came.tools = [("weather", by_tool.create(response_model=Weather, **given, **MORE))]
    came.tools += [("weather", by_responses.create(response_model=Weather, **given, **MORE))]
    came.forms = [by_schema.create(response_model=Story, **given, **MORE)]
    came.forms += list(by_tool.create_partial(response_model=Story, **given, **MORE))[-1:]


def pydantic_ai_slim(url: str, came: Came) -> None:
    module, models = import_module("pydantic_ai"), import_module("pydantic_ai.models.openai")
    provider = import_module("pydantic_ai.providers.openai").OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    model = models.OpenAIChatModel(MODEL, provider=provider)
    plain = module.Agent(model, model_settings=FEW)
    came.reply = plain.run_sync(PROMPT).output
    responses = models.OpenAIResponsesModel(MODEL, provider=provider)
    came.again = [module.Agent(responses, model_settings=FEW).run_sync(PROMPT).output]
    came.stream = list(plain.run_stream_sync(PROMPT).stream_text(delta=True, debounce_by=None))
    output = module.ToolOutput(Story, name="story")
    came.tools = [("story", module.Agent(model, output_type=output, model_settings=MORE).run_sync(PROMPT).output)]
    native = module.NativeOutput(Story)
    came.forms = [module.Agent(model, output_type=native, model_settings=MORE).run_sync(PROMPT).output]


def llama_index(url: str, came: Came) -> None:
    given = {"model": MODEL, "api_base": f"{url}/v1", "api_key": "none", "is_chat_model": True}
    made = partial(import_module("llama_index.llms.openai_like").OpenAILike, **given, is_function_calling_model=True)
    message, few, more = import_module("llama_index.core.llms").ChatMessage, made(**FEW), made(**MORE)
    ask = [message(role="user", content=PROMPT)]
    came.reply = few.chat(ask).message.content
    came.again = [few.complete(PROMPT).text]
    came.stream = [part.delta for part in few.stream_chat(ask)]
    functions = import_module("llama_index.core.tools").FunctionTool
    tool = functions.from_defaults(lambda city: "Rain.", name="weather", fn_schema=Weather)
    said = more.chat_with_tools([tool], chat_history=ask, tool_required=True)
    calls = more.get_tool_calls_from_response(said)
    came.tools = [(call.tool_name, call.tool_kwargs) for call in calls]
    result = message(role="tool", content="Rain.", additional_kwargs={"tool_call_id": calls[0].tool_id})
    came.after = few.chat_with_tools([tool], chat_history=[*ask, said.message, result]).message.content
    by_schema = made(**MORE, should_use_structured_outputs=True)
    came.forms = [model.as_structured_llm(Story).chat(ask).raw for model in (more, by_schema)]


def llm(url: str, came: Came) -> None:
    """`llm` with its extra-openai-models.yaml. It can't require a call: a tool is offered, and the reply is text."""
    with tempfile.TemporaryDirectory() as folder:
        extra: dict[str, Any] = {"model_id": "gemma", "model_name": MODEL, "api_base": f"{url}/v1"}
        extra |= {"supports_tools": True, "supports_schema": True}
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps([extra]))  # JSON is YAML
        os.environ["LLM_USER_PATH"] = folder
        module = import_module("llm")
        model = module.get_model("gemma")
        came.reply = model.prompt(PROMPT, stream=False, **FEW).text()
        came.stream = list(model.prompt(PROMPT, **FEW))
        command = [sys.executable, "-m", "llm", "-m", "gemma", "-n", "-o", "max_tokens", "24", "-o", "temperature", "0"]
        came.again = [subprocess.check_output([*command, PROMPT], text=True).removesuffix("\n")]
        weather = module.Tool(name="weather", input_schema=PARAMETERS, implementation=lambda city: "Rain.")
        assert model.chain(PROMPT, tools=[weather], options=FEW).text()
        came.tools = None
        came.forms = [json.loads(model.prompt(PROMPT, schema=Story, stream=False, **MORE).text())]


def javascript(file: str, url: str, came: Came) -> None:
    """The client that a file of `clients/` runs under Node."""
    done = subprocess.run(["node", str(JAVASCRIPT / file), url], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr.strip()
    vars(came).update(json.loads(done.stdout))


FUNCTIONS = [litellm, langchain_openai, langchain_anthropic, instructor, pydantic_ai_slim]
CLIENTS: dict[str, Callable[[str, Came], None]] = {  # by package
    **{function.__name__.replace("_", "-"): function for function in FUNCTIONS},
    "llama-index-llms-openai-like": llama_index,
    "llm": llm,
    "npm openai": partial(javascript, "openai.mjs"),
    "npm @anthropic-ai/sdk": partial(javascript, "anthropic.mjs"),
    "npm ai": partial(javascript, "vercel.mjs"),
}


def version_of(name: str) -> str | None:
    """The version of a client that is installed."""
    if name.startswith("npm "):
        file = JAVASCRIPT / "node_modules" / name.removeprefix("npm ") / "package.json"
        return str(json.loads(file.read_text())["version"]) if file.exists() else None
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def main() -> None:
    """Run the clients that there are, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIENTS)}")
    parser.add_argument("--url", help="a server of the built-in model that runs already")
    options = parser.parse_args()
    versions = {name: version for name in options.names or CLIENTS if (version := version_of(name))}
    failed = not versions
    print("| client | version | reply | stream | tool's call | form |\n| --- | --- | --- | --- | --- | --- |")
    with nullcontext((None, options.url)) if options.url else served(None) as (_, url):
        for name, version in versions.items():
            came, row = Came(version), ["-"] * 4
            try:
                CLIENTS[name](url, came)
                row = came.row()
            except Exception as error:  # whatever a client raises is what came
                print(f"{type(error).__name__}: {error}\n{came}", file=sys.stderr)
            failed |= "-" in row
            print(f"| {' | '.join([name, version, *row])} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
