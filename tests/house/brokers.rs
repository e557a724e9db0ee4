//! The main job on real brokers: mosquitto and Apache Kafka, with clients that we did not write.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::tools::{Kafka, Mosquitto, Running, Scratch, free_port, python, succeed, wait_until};

const DECODE: &str = "decode: { format: json, schema: { id: int64, v: float64 } }";

fn mqtt_pipeline(broker: &Mosquitto, options: &str) -> String {
    format!(
        "name: mqtt\nsources:\n  readings:\n    mqtt: {{ url: \"{}\", topics: [\"plant/{{site}}/{{device}}/v\"], {options} }}\n\
         operators:\n  decoded:\n    {DECODE}\nsinks:\n  out:\n    table: {{ name: readings }}\n",
        broker.url()
    )
}

fn subscribed(scratch: &Scratch) {
    wait_until("it has subscribed", Duration::from_secs(20), || scratch.log("run").contains("subscribed"));
}

#[test]
fn topic_levels_become_columns_in_both_protocol_versions_and_qualities() {
    for options in ["protocol: v3_1_1, qos: at_least_once", "protocol: v5, qos: at_least_once", "protocol: v5, qos: at_most_once"]
    {
        let broker = Mosquitto::start("");
        let scratch = Scratch::new();
        let pipeline = scratch.write("mqtt.yaml", mqtt_pipeline(&broker, options));
        let running = scratch.start("run", &[&pipeline], |_| {});
        subscribed(&scratch);
        let lines = |from: i64| {
            (from..from + 300).map(|id| format!("{{\"id\": {id}, \"v\": {}}}\n", id as f64 / 2.0)).collect::<String>()
        };
        broker.publish_lines("plant/north/p1/v", &lines(0));
        broker.publish_lines("plant/south/p2/v", &lines(300));
        wait_until("all rows are there", Duration::from_secs(20), || scratch.number("select count(*) from readings") == 600);
        running.drain();
        let csv =
            scratch.sql("select site, device, count(*) as n, sum(v) as v from readings group by site, device order by site");
        assert_eq!(csv, "site,device,n,v\nnorth,p1,300,22425.0\nsouth,p2,300,67425.0\n", "{options}");
    }
}

#[test]
fn the_window_of_mosquitto_by_default_does_not_stall_the_pipeline() {
    let broker = Mosquitto::start("");
    let scratch = Scratch::new();
    let pipeline = scratch.write("mqtt.yaml", mqtt_pipeline(&broker, "protocol: v3_1_1"));
    let running = scratch.start("run", &[&pipeline], |_| {});
    subscribed(&scratch);
    let lines: String = (0..3000).map(|id| format!("{{\"id\": {id}, \"v\": 0.5}}\n")).collect();
    let began = Instant::now();
    broker.publish_lines("plant/n/p/v", &lines);
    wait_until("all rows are there", Duration::from_secs(60), || scratch.number("select count(*) from readings") == 3000);
    let took = began.elapsed();
    println!("3000 messages with 20 in flight, durable in the table: {:.0} messages/s", 3000.0 / took.as_secs_f64());
    running.drain();
    // The one assertion about time: 500 messages a second is what is promised with mosquitto as it comes.
    assert!(took < Duration::from_secs(6), "3000 messages took {took:?}, which is less than 500 a second");
}

#[test]
fn the_broker_may_go_away_and_come_back() {
    let scratch = Scratch::new();
    let port = free_port();
    let config = scratch.write(
        "mosquitto.conf",
        format!(
            "user root\nlistener {port} 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location {}/\nautosave_interval 1\n",
            scratch.path("").display()
        ),
    );
    let start = || {
        Running(
            Command::new("/usr/sbin/mosquitto")
                .arg("-c")
                .arg(&config)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        )
    };
    let pipeline = scratch.write(
        "mqtt.yaml",
        format!(
            "name: mqtt\nsources:\n  readings:\n    mqtt: {{ url: \"mqtt://127.0.0.1:{port}\", topics: [\"plant/v\"] }}\n\
             operators:\n  decoded:\n    {DECODE}\nsinks:\n  out:\n    table: {{ name: readings }}\n"
        ),
    );
    // The engine comes first: a broker that is not there yet is no reason to give up.
    let running = scratch.start("run", &[&pipeline], |_| {});
    let mut sent = 0;
    for round in 0..3 {
        let mut broker = start();
        wait_until("it has subscribed", Duration::from_secs(60), || scratch.log("run").matches("subscribed").count() > round);
        let lines: String = (sent..sent + 100).map(|id| format!("{{\"id\": {id}, \"v\": 1}}\n")).collect();
        sent += 100;
        let mut publisher = Command::new("mosquitto_pub")
            .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-t", "plant/v", "-q", "1", "-l"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut publisher.stdin.take().unwrap(), lines.as_bytes()).unwrap();
        assert!(publisher.wait().unwrap().success());
        wait_until("the rows are there", Duration::from_secs(60), || {
            scratch.number("select count(distinct id) from readings") == sent
        });
        broker.kill();
    }
    let broker = start();
    wait_until("it has subscribed", Duration::from_secs(60), || scratch.log("run").matches("subscribed").count() > 3);
    running.drain();
    drop(broker);
}

#[test]
fn an_mqtt_sink_publishes_to_the_topic_of_each_row_and_the_whole_way_back() {
    let broker = Mosquitto::start("");
    let scratch = Scratch::new();
    let watch = scratch.write("mqtt.yaml", mqtt_pipeline(&broker, "qos: at_least_once"));
    let devices = scratch.write(
        "devices.yaml",
        format!(
            "name: devices\nsources:\n  numbers:\n    generate: {{ rows: 500, columns: {{ id: sequence, device: {{ choice: [a, b] }}, v: {{ uniform: [0.0, 1.0] }} }} }}\n\
             sinks:\n  out:\n    mqtt: {{ url: \"{}\", topic: \"plant/x/{{device}}/v\", format: json }}\n",
            broker.url()
        ),
    );
    let running = scratch.start("run", &[&watch], |_| {});
    subscribed(&scratch);
    let other = Scratch::new();
    other.run(&[&devices]);
    wait_until("all rows are there", Duration::from_secs(20), || {
        scratch.number("select count(distinct id) from readings") == 500
    });
    running.drain();
    assert_eq!(scratch.number("select count(distinct device) from readings"), 2);
}

#[test]
fn outsiders_read_the_table_and_kafka_carries_ids_keys_and_headers() {
    let kafka = Kafka::start();
    let scratch = Scratch::new();
    let pipeline = scratch.write(
        "kafka.yaml",
        format!(
            "name: kafka\nsources:\n  numbers:\n    generate: {{ rows: 2000, columns: {{ id: sequence, device: {{ choice: [a, b] }} }} }}\n\
             sinks:\n  topic:\n    kafka: {{ brokers: [\"{}\"], topic: numbers, format: json, key: device }}\n\
             \x20 out:\n    inputs: [numbers]\n    table: {{ name: numbers }}\n",
            kafka.address()
        ),
    );
    scratch.run(&[&pipeline]);
    let output = succeed(python("kafka_client.py").args(["consume", &kafka.address(), "numbers"]));
    let mut ids: Vec<i64> = String::from_utf8(output.stdout).unwrap().lines().map(|id| id.parse().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..2000).collect::<Vec<_>>());
    let table = scratch.data_dir().join("tables/numbers");
    let output = succeed(python("delta_count.py").arg(&table));
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), "2000");
}
