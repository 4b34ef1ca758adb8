"""/v1/responses: later."""

from starlette.requests import Request
from starlette.responses import Response


async def responses(request: Request) -> Response:
    raise NotImplementedError
