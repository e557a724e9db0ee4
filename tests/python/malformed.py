"""Publishes readings over MQTT of which one in a hundred is malformed, and keeps what was malformed.

Usage: malformed.py PORT TOPIC COUNT FOLDER

Publishes COUNT messages at QoS 1, {"id": n, "value": n / 2} each, except that every hundredth is broken JSON, of
wrong types, 10 MB of text, empty, or binary, in turn. Whatever is malformed is written to FOLDER as a file,
byte by byte. Ends when the broker has acknowledged everything.
"""

import json
import os
import random
import sys
from pathlib import Path

import paho.mqtt.client as mqtt

EVERY = 100
LARGE = 10_000_000


def malformed(number: int) -> bytes:
    """The payload in place of reading `number`; each is another one, so that none can stand for two."""
    kinds = [
        lambda: f'{{"id": {number}, "value": '.encode(),
        lambda: json.dumps({"id": f"number {number}", "value": [1, 2]}).encode(),
        lambda: json.dumps({"id": number, "value": "x" * LARGE}).encode(),
        lambda: b"",
        lambda: bytes([0xFF, 0x00, number % 256]) + random.Random(number).randbytes(200),
    ]
    return kinds[number // EVERY % len(kinds)]()


def main() -> int:
    port, topic, count, folder = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=f"malformed-{os.getpid()}")
    client.max_inflight_messages_set(100)
    client.connect("127.0.0.1", port)
    client.loop_start()
    sent = []
    for number in range(count):
        if number % EVERY == EVERY // 2:
            payload = malformed(number)
            (folder / f"{number:06}.bin").write_bytes(payload)
        else:
            payload = json.dumps({"id": number, "value": number / 2}).encode()
        sent.append(client.publish(topic, payload, qos=1))
    for message in sent:
        message.wait_for_publish(60)
    published = sum(message.is_published() for message in sent)
    client.disconnect()
    client.loop_stop()
    print(f"published {published} of {count}", flush=True)
    return 0 if published == count else 1


if __name__ == "__main__":
    sys.exit(main())
