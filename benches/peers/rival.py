"""The rival in Python over MQTT, as users write it: paho-mqtt, orjson, numpy and onnxruntime.

Usage: rival.py PORT QOS_IN QOS_OUT MODEL OUTPUT BATCH

Messages are collected up to BATCH (or for 50 ms), scored at once, and each result is published and appended to a
file. paho acknowledges a message when its callback returns and nothing is synced: this loop loses what it holds when
it dies, which the comparison grants it.
"""

import sys
import time

import numpy as np
import onnxruntime as ort
import orjson
import paho.mqtt.client as mqtt

WAIT = 0.05
SENSORS = ["s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9"]


def main():
    port, qos_in, qos_out, model, output, size = sys.argv[1:]
    port, qos_in, qos_out, size = int(port), int(qos_in), int(qos_out), int(size)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    file = open(output, "ab")
    batch, first = [], 0.0

    def process():
        readings = np.array([[row[name] for name in SENSORS] for row in batch], dtype=np.float32)
        (scores,) = session.run(["score"], {"readings": readings})
        lines = []
        for row, score in zip(batch, scores.tolist()):
            result = {"id": row["id"], "device": row["device"], "stamp": row["stamp"], "score": score}
            line = orjson.dumps(result)
            client.publish("results/" + row["device"], line, qos=qos_out)
            lines.append(line)
        file.write(b"\n".join(lines) + b"\n")
        file.flush()
        batch.clear()

    def on_message(client, userdata, message):
        nonlocal first
        if not batch:
            first = time.monotonic()
        batch.append(orjson.loads(message.payload))
        if len(batch) >= size:
            process()

    def on_connect(client, userdata, flags, reason_code, properties):
        client.subscribe("plant/+/reading", qos=qos_in)

    def on_subscribe(client, userdata, mid, reason_codes, properties):
        print("ready", flush=True)

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="rival", clean_session=qos_in == 0)
    client.max_inflight_messages_set(1000)
    client.max_queued_messages_set(0)
    client.on_message, client.on_connect, client.on_subscribe = on_message, on_connect, on_subscribe
    client.connect("127.0.0.1", port, keepalive=30)
    while client.loop(timeout=WAIT) == mqtt.MQTT_ERR_SUCCESS:
        if batch and time.monotonic() - first >= WAIT:
            process()
    sys.exit("the connection is lost")


main()
