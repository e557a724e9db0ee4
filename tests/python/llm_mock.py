"""A language model that is none: an OpenAI-compatible endpoint for tests, from the standard library.

Started by tests and by hand:

    python llm_mock.py 0              # prints `listening on PORT`, serves on 127.0.0.1 until it is killed

`POST /v1/chat/completions` answers with a JSON object made from the last user message alone, so that the
same prompt always gets the same answer and a test can tell which row an answer belongs to: text is the
message (white space folded, at most 200 characters), numbers and booleans come from its CRC-32. Which
fields there are is said by `response_format.json_schema` of the request, else by `--fields`. `GET
/v1/models` names the one model; `GET /stats` counts what happened. Faults are by request number (1, 2, ...)
and so also deterministic as long as requests come one by one.
"""

import argparse
import json
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "mock"
BROKEN = '{"summary": "cut off in the mid'
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Mock(ThreadingHTTPServer):
    """The server: its options, and the counters behind /stats."""

    daemon_threads = True
    # Tests open many connections at once; the default of 5 would make some of them wait a second.
    request_queue_size = 256

    def __init__(self, options: argparse.Namespace):
        super().__init__(("127.0.0.1", options.port), Handler)
        self.options = options
        self.lock = threading.Lock()
        outcomes = ("ok", "failed", "bad_json", "refused")
        self.stats = dict.fromkeys(("requests", *outcomes, "in_flight", "max_in_flight"), 0)

    def count(self, name: str) -> None:
        """One more of `name`."""
        with self.lock:
            self.stats[name] += 1

    def arrived(self) -> int:
        """A request has come; its number, from 1."""
        with self.lock:
            self.stats["requests"] += 1
            self.stats["in_flight"] += 1
            self.stats["max_in_flight"] = max(self.stats["max_in_flight"], self.stats["in_flight"])
            return self.stats["requests"]

    def left(self) -> None:
        """A request is about to be answered."""
        with self.lock:
            self.stats["in_flight"] -= 1


class Handler(BaseHTTPRequestHandler):
    """One connection, kept open between requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Mock

    def do_GET(self) -> None:
        if self.path == "/stats":
            with self.server.lock:
                stats = dict(self.server.stats)
            self.answer(200, stats)
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "tests"}]})
        else:
            self.fail(404, f"no such path: {self.path}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/v1/chat/completions":
            self.fail(404, f"no such path: {self.path}")
            return
        number = self.server.arrived()
        try:
            status, reply = self.complete(number, body)
        finally:
            self.server.left()
        self.answer(status, reply)

    def complete(self, number: int, body: bytes) -> tuple[int, dict]:
        """Status and body for chat request `number`."""
        options = self.server.options
        try:
            request = json.loads(body)
            prompt = last_user_message(request["messages"])
            answer = made_from(prompt, wanted_fields(request, options.fields))
            if request.get("stream"):
                raise ValueError("this mock does not stream")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.server.count("refused")
            return 400, error_body(400, f"bad request: {error!r}")

        delay = options.delay_ms
        if options.jitter_ms:
            delay += zlib.crc32(prompt.encode()) % (options.jitter_ms + 1)
        time.sleep(delay / 1000)

        if options.status != 200:
            self.server.count("failed")
            return options.status, error_body(options.status, f"mock was told to answer {options.status}")
        if options.fail_every and number % options.fail_every == 0:
            self.server.count("failed")
            return 500, error_body(500, f"mock was told to fail request {number}")
        if options.bad_json_every and number % options.bad_json_every == 0:
            self.server.count("bad_json")
            content = BROKEN
        else:
            self.server.count("ok")
            content = json.dumps(answer, ensure_ascii=False)
        return 200, completion(number, request.get("model", MODEL), prompt, content)

    def fail(self, status: int, message: str) -> None:
        self.answer(status, error_body(status, message))

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Say nothing: tests read what we print."""


def last_user_message(messages: list[dict]) -> str:
    """Text of the last message whose role is user; content may be a string or a list of text parts."""
    content = [message["content"] for message in messages if message["role"] == "user"]
    if not content:
        raise ValueError("no message with role user")
    if isinstance(content[-1], str):
        return content[-1]
    return "".join(part["text"] for part in content[-1] if part["type"] == "text")


def wanted_fields(request: dict, fallback: dict[str, str]) -> dict[str, str]:
    """Field names and JSON types: of the request's json_schema where it has one."""
    wanted = request.get("response_format") or {}
    if wanted.get("type") != "json_schema":
        return fallback
    properties = wanted["json_schema"]["schema"]["properties"]
    return {name: single_type(schema) for name, schema in properties.items()}


def single_type(schema: dict) -> str:
    """The type of a property; of `["integer", "null"]` the one that is not null."""
    kind = schema.get("type", "string")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "string")
    return kind


def made_from(prompt: str, fields: dict[str, str]) -> dict:
    """One value a field, a function of the prompt and the field's type alone."""
    digest = zlib.crc32(prompt.encode())
    values = {
        "string": " ".join(prompt.split())[:200],
        "integer": digest % 5 + 1,
        "number": digest % 1000 / 1000,
        "boolean": digest % 2 == 1,
        "array": [],
        "object": {},
        "null": None,
    }
    return {name: values[kind] for name, kind in fields.items()}


def completion(number: int, model: str, prompt: str, content: str) -> dict:
    """The chat completion object; a token is taken to be four characters."""
    sent, made = len(prompt) // 4 + 1, len(content) // 4 + 1
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 1767225600,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made},
    }


def error_body(status: int, message: str) -> dict:
    """An error as OpenAI words it."""
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def field_list(text: str) -> dict[str, str]:
    """`name:type,...` with JSON Schema's type names."""
    fields = dict(part.strip().split(":", 1) for part in text.split(","))
    known = {"string", "integer", "number", "boolean"}
    if not known.issuperset(fields.values()):
        raise ValueError(f"types are {sorted(known)}")
    return fields


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("port", type=int, help="0 takes a free one")
    arguments.add_argument("--delay-ms", type=int, default=0, help="wait before every answer")
    arguments.add_argument("--jitter-ms", type=int, default=0, help="wait up to this much more, by the prompt")
    arguments.add_argument("--fail-every", type=int, default=0, metavar="N", help="HTTP 500 for every Nth request")
    arguments.add_argument("--bad-json-every", type=int, default=0, metavar="N", help="broken JSON as every Nth answer")
    arguments.add_argument("--status", type=int, default=200, help="answer everything with this error status")
    arguments.add_argument(
        "--fields", type=field_list, default="summary:string,urgency:integer", metavar="NAME:TYPE,...",
        help="fields of the answer where the request names none",
    )
    server = Mock(arguments.parse_args())
    print(f"listening on {server.server_address[1]}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
