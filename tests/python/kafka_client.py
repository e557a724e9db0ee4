"""A Kafka client that is not ours: fills and reads topics.

Usage: kafka_client.py produce BROKER TOPIC ROWS     {"id": 0..ROWS-1} as JSON, keyed by id
       kafka_client.py consume BROKER TOPIC [FIELD]  prints FIELD (default id) of every message there is now
"""

import json
import sys

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient


def produce(broker: str, topic: str, rows: int) -> int:
    producer = Producer({"bootstrap.servers": broker, "linger.ms": 5})
    for number in range(rows):
        while True:
            try:
                producer.produce(topic, json.dumps({"id": number}), key=str(number))
                break
            except BufferError:
                producer.poll(0.1)
    return 1 if producer.flush(60) else 0


def consume(broker: str, topic: str, field: str) -> int:
    metadata = AdminClient({"bootstrap.servers": broker}).list_topics(timeout=20)
    if topic not in metadata.topics or metadata.topics[topic].error is not None:
        return 0
    consumer = Consumer({"bootstrap.servers": broker, "group.id": "outsider", "enable.auto.commit": False})
    partitions = [TopicPartition(topic, partition, 0) for partition in metadata.topics[topic].partitions]
    left = {}
    for partition in partitions:
        low, high = consumer.get_watermark_offsets(partition, timeout=20)
        partition.offset = low
        if high > low:
            left[partition.partition] = high
    consumer.assign(partitions)
    while left:
        message = consumer.poll(10)
        if message is None:
            return 1
        if message.error():
            raise KafkaException(message.error())
        print(json.loads(message.value())[field])
        if message.offset() + 1 >= left.get(message.partition(), 0):
            left.pop(message.partition(), None)
    consumer.close()
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "produce":
        sys.exit(produce(sys.argv[2], sys.argv[3], int(sys.argv[4])))
    sys.exit(consume(sys.argv[2], sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else "id"))
