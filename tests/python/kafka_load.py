"""Keeps a Kafka topic filling, and tells how far a group has got with it; a client that is not ours.

Usage: kafka_load.py publish BROKER TOPIC RATE ACKED_FILE
           Publishes {"id": n} at about RATE messages a second until standard input is closed, and ends when all are
           acknowledged. An id is in ACKED_FILE only after the broker has acknowledged it.
       kafka_load.py uncommitted BROKER GROUP TOPIC
           Prints how many messages of the topic lie behind the offsets that the group has committed.
"""

import json
import sys
import threading
import time

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient


def publish(broker: str, topic: str, rate: float, path: str) -> int:
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    failed = []
    with open(path, "w", encoding="utf-8", buffering=1) as acked:

        def delivered(error, message) -> None:
            if error is None:
                acked.write(f"{message.key().decode()}\n")
            else:
                failed.append(str(error))

        producer = Producer({"bootstrap.servers": broker, "linger.ms": 5, "enable.idempotence": True})
        began, number = time.monotonic(), 0
        while not stop.is_set():
            behind = int((time.monotonic() - began) * rate) - number
            for _ in range(max(behind, 0)):
                producer.produce(topic, json.dumps({"id": number}), key=str(number), on_delivery=delivered)
                number += 1
            producer.poll(0.005)
        left = producer.flush(60)
    print(f"published {number}, unacknowledged {left}, failed {failed[:3]}", flush=True)
    return 1 if left or failed else 0


def uncommitted(broker: str, group: str, topic: str) -> int:
    partitions = AdminClient({"bootstrap.servers": broker}).list_topics(topic, timeout=20).topics[topic].partitions
    consumer = Consumer({"bootstrap.servers": broker, "group.id": group, "enable.auto.commit": False})
    total = 0
    # Asking for offsets does not make it a member of the group.
    for partition in consumer.committed([TopicPartition(topic, number) for number in partitions], timeout=20):
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition.partition), timeout=20)
        total += high - max(partition.offset, low)
    consumer.close()
    print(total)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "publish":
        sys.exit(publish(sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5]))
    sys.exit(uncommitted(*sys.argv[2:5]))
