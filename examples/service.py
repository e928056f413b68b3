"""A service: one generator answers POST requests of plain text from many threads, as a stream.

    python examples/service.py engines/smollm2-135m
    curl --no-buffer --data "Once upon a time" http://127.0.0.1:8000/

Needs the runtime alone.
"""

from __future__ import annotations

import logging
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dflash_rt import DFlashError, Generator, RequestError

LOG = logging.getLogger("service")


class Server(ThreadingHTTPServer):
    """Threads share one generator: it takes their requests one at a time."""

    def __init__(self, generator: Generator, port: int = 8000) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.generator = generator


class Handler(BaseHTTPRequestHandler):
    """The text of a request is the prompt, that of the answer what follows it."""

    server: Server

    def do_POST(self) -> None:
        """Answer one prompt."""
        prompt = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode("utf-8", "replace")
        try:
            stream = self.server.generator.stream(prompt, max_new_tokens=64, stop=["\n\n"])
        except RequestError as error:  # raised before any work: the caller's fault
            self.send_error(HTTPStatus.BAD_REQUEST, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        try:
            with stream:  # left early, such as by a caller who hung up, the request is cancelled
                for chunk in stream:
                    self.wfile.write(chunk.text.encode("utf-8"))
        except (DFlashError, OSError) as error:  # the generator can take the next request
            LOG.error("%s", error)
            return
        stats = stream.result.stats
        LOG.info("%s: %s", stream.result.finish_reason, stats.as_dict())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Into the log instead of stderr."""
        LOG.debug(format, *args)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with Generator(sys.argv[1]) as opened, Server(opened) as server:
        server.serve_forever()
