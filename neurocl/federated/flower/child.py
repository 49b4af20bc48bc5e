"""``python -m neurocl.federated.flower.child superlink|supernode ...``: Flower's commands, tied to who started them.

They end when their parent does, however it ends. In front of a SuperLink stands a guard: Flower serves clients,
applications and control on one port, and without an account system whoever reaches it may register keys and start runs.
"""

from __future__ import annotations

import hmac
import os
import sys
from typing import Any

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.superlink import extensions
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

PARENT, SECRET = "NEUROCL_FLOWER_PARENT", "NEUROCL_FLOWER_SECRET"
HEADER = "x-neurocl-secret"
# What clients need, and what asks for a token of its own.
OPEN = ("/v1/fleet/", "/v1/runtime/", "/health")
# Flower cuts arrays into pieces of 5 MB.
LARGEST_REQUEST = 64 << 20


class Guard:
    """Refuses requests that are too large, and everything but the clients' paths to those without the secret."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self.app = app
        self.secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            size = headers.get(b"content-length", b"" if scope["method"] == "POST" else b"0")
            known = hmac.compare_digest(headers.get(HEADER.encode(), b""), self.secret)
            status = 0
            if not size.isdigit() or int(size) > LARGEST_REQUEST:
                status = 413
            elif not known and not scope["path"].startswith(OPEN):
                status = 403
            if status:
                await send({"type": "http.response.start", "status": status, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
        await self.app(scope, receive, send)


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    start_parent_process_monitor(int(os.environ[PARENT]))
    name = sys.argv.pop(1)
    if name == "superlink":
        from flwr.superlink.cli.flower_superlink import flower_superlink

        guard = Middleware(Guard, secret=os.environ.pop(SECRET))
        middleware: Any = lambda: (guard,)  # noqa: E731
        extensions.get_middleware = middleware
        flower_superlink()
    else:
        from flwr.supernode.cli.flower_supernode import flower_supernode

        flower_supernode()


if __name__ == "__main__":
    main()
