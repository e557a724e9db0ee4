"""Reads a Kafka topic from its beginning with confluent-kafka and prints one JSON object a record.

Usage: consume.py BROKERS TOPIC COUNT [SECONDS]

Waits until COUNT records are there, then until every partition is read to its end, so that what is too much
is seen, too. Prints {"partition", "offset", "key", "value", "headers"} in the order of partitions and offsets;
bytes are text in UTF-8. Exit 1, with what it got so far, when SECONDS (60) have passed. Nothing is committed.
"""

import json
import signal
import sys
import time
import uuid

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition


def text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def main() -> int:
    brokers, topic, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    deadline = time.monotonic() + (float(sys.argv[4]) if len(sys.argv) > 4 else 60)
    consumer = Consumer({"bootstrap.servers": brokers, "group.id": str(uuid.uuid4()), "enable.partition.eof": True,
                         "enable.auto.commit": False})
    partitions: list[int] = []
    while not partitions and time.monotonic() < deadline:
        described = consumer.list_topics(topic, timeout=10).topics[topic]
        partitions = sorted(described.partitions) if described.error is None else []
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
    records: list[dict] = []
    ended: set[int] = set()
    while time.monotonic() < deadline and not (len(records) >= count and len(ended) == len(partitions)):
        message = consumer.poll(0.5)
        if message is None:
            continue
        if message.error() is not None:
            if message.error().code() != KafkaError._PARTITION_EOF:
                sys.exit(f"{topic}: {message.error()}")
            ended.add(message.partition())
            continue
        ended.discard(message.partition())
        records.append({
            "partition": message.partition(),
            "offset": message.offset(),
            "key": text(message.key()),
            "value": text(message.value()),
            "headers": {name: text(value) for name, value in message.headers() or []},
        })
    consumer.close()
    # When whoever reads this has seen enough (`| head`), it ends without a word, as any other command does.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for record in sorted(records, key=lambda record: (record["partition"], record["offset"])):
        print(json.dumps(record, ensure_ascii=False))
    complete = len(records) >= count and len(ended) == len(partitions)
    if not complete:
        print(f"{topic}: {len(records)} of {count} records when the time was over", file=sys.stderr)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
