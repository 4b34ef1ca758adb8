"""The server: OpenAI's and Anthropic's HTTP interfaces over one loaded model, and a page to chat in a browser.

app.py           routes, and what every request passes: sizes, keys, hosts, errors
engine.py        worker threads that answer requests in turns, and the bounded queue before them
wire.py          bodies in, errors and server-sent events out
fields.py        reads a request's fields and names the one that is wrong
options.py       fields that several endpoints share -> `chat.ReplyOptions`
completions.py   /v1/chat/completions, /v1/completions
responses.py     /v1/responses
anthropic.py     /v1/messages
metrics.py       counters, as Prometheus reads them
openapi.py       what the endpoints take and give, as an OpenAPI document
page/            the page
"""
