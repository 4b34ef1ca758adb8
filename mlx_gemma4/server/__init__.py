"""The server: OpenAI's and Anthropic's HTTP interfaces over one loaded model, and a page to chat in a browser.

app.py           routes, who may ask, and errors of all requests
settings.py      the settings, as `serve` has them
endpoint.py      what an endpoint is; sends what a job makes, whole or as events
fields.py        types of request bodies (pydantic), and errors that name a field
options.py       fields that several endpoints share -> `ReplyOptions` and messages
completions.py   /v1/chat/completions, /v1/completions
responses.py     /v1/responses
anthropic.py     /v1/messages
engine.py        worker threads that make replies in turns, and the bounded queue before them
wire.py          bodies in, errors and server-sent events out
metrics.py       counters, as Prometheus reads them
openapi.py       the OpenAPI document, from the endpoints' models
page/            the page
"""
