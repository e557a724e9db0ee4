"""Publishes numbered readings over MQTT at QoS 1 and writes down which ones the broker acknowledged.

Usage: publisher.py PORT TOPIC RATE ACKED_FILE

Publishes {"id": n} to TOPIC at about RATE messages a second until standard input is closed, waits until
everything in flight is acknowledged, and ends. An id is in ACKED_FILE only after its PUBACK has come: only
then does it become an obligation of whoever is subscribed.
"""

import json
import sys
import threading
import time

import paho.mqtt.client as mqtt


def main() -> int:
    port, topic, rate, path = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    ids: dict[int, int] = {}
    lock = threading.Lock()
    early: set[int] = set()
    acked = open(path, "w", encoding="utf-8")

    def on_publish(_client, _userdata, mid, _reason, _properties) -> None:
        with lock:
            if mid in ids:
                acked.write(f"{ids.pop(mid)}\n")
            else:
                early.add(mid)

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="publisher", clean_session=False)
    client.max_inflight_messages_set(1000)
    client.max_queued_messages_set(0)
    client.on_publish = on_publish
    client.connect("127.0.0.1", port)
    client.loop_start()
    print("publishing", flush=True)
    began, number = time.monotonic(), 0
    while not stop.is_set():
        behind = int((time.monotonic() - began) * rate) - number
        for _ in range(max(behind, 0)):
            info = client.publish(topic, json.dumps({"id": number}), qos=1)
            with lock:
                if info.mid in early:
                    early.discard(info.mid)
                    acked.write(f"{number}\n")
                else:
                    ids[info.mid] = number
            number += 1
        time.sleep(0.002)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with lock:
            if not ids:
                break
        time.sleep(0.01)
    client.loop_stop()
    acked.close()
    print(f"published {number}, unacknowledged {len(ids)}", flush=True)
    return 1 if ids else 0


if __name__ == "__main__":
    sys.exit(main())
