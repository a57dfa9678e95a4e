"""A model behind OpenAI's chat completions API, on this machine, that says what it was told to say."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

# An answer, or the tools to call: their names and arguments.
Turn = str | list[tuple[str, dict[str, Any]]]


class ChatServer:
    """``turns`` are said in their order, the last again and again. ``requests`` has what was asked."""

    def __init__(self, turns: list[Turn]) -> None:
        self.turns = list(turns)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    def tool_messages(self) -> list[str]:
        """What the model was last told of the tools it called."""
        messages = self.requests[-1]["messages"] if self.requests else []
        return [str(message["content"]) for message in messages if message["role"] == "tool"]

    def message(self) -> tuple[dict[str, Any], str]:
        turn = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        if isinstance(turn, str):
            return {"role": "assistant", "content": turn}, "stop"
        calls = [
            {
                "index": n,
                "id": f"call_{len(self.requests)}_{n}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for n, (name, arguments) in enumerate(turn)
        ]
        return {"role": "assistant", "content": None, "tool_calls": calls}, "tool_calls"


@contextlib.contextmanager
def chat_server(*turns: Turn) -> Iterator[ChatServer]:
    model = ChatServer(list(turns))

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            model.headers.append(dict(self.headers))
            self.answer("application/json", b'{"object": "list", "data": [{"id": "m", "object": "model"}]}')

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            model.requests.append(asked)
            model.headers.append(dict(self.headers))
            message, finish = model.message()
            base = {"id": "c", "created": 1, "model": "m"}
            if not asked.get("stream"):
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                choice = {"index": 0, "message": message, "finish_reason": finish}
                said = {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
                self.answer("application/json", json.dumps(said).encode())
                return
            chunks = [
                {"index": 0, "delta": message, "finish_reason": None},
                {"index": 0, "delta": {}, "finish_reason": finish},
            ]
            lines = [{**base, "object": "chat.completion.chunk", "choices": [chunk]} for chunk in chunks]
            body = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
            self.answer("text/event-stream", body.encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    model.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield model
    finally:
        server.shutdown()
        server.server_close()
