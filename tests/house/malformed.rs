//! Malformed load over MQTT: one message in a hundred is broken JSON, of wrong types, 10 MB, empty or binary. The
//! invariant: each is in `dead_letters` with its very bytes, each other one in the table, and the process lives on.

use std::path::PathBuf;
use std::time::Duration;

use crate::tools::{Mosquitto, Running, Scratch, python, succeed, wait_until};

/// Messages published, and how many of them `malformed.py` makes malformed.
const MESSAGES: i64 = 3000;
const MALFORMED: i64 = 30;

const LIMIT: Duration = Duration::from_secs(120);

const PIPELINE: &str = r#"name: malformed
sources:
  readings:
    mqtt: { url: "${MQTT_URL}", topics: ["plant/{device}/reading"], max_payload: MAX_PAYLOAD, protocol: PROTOCOL }
operators:
  decoded:
    decode: { format: json, schema: { id: int64!, value: float64 } }
sinks:
  results:
    table: { name: results }
"#;

#[test]
fn malformed_messages_are_dead_letters_and_the_rest_flows() {
    let (broker, scratch) = (Mosquitto::start(""), Scratch::new());
    malformed_load(&broker, &scratch, "16MiB");
    let stages = scratch.sql("select stage, code, count(*) from dead_letters group by stage, code order by code");
    assert_eq!(stages.lines().skip(1).collect::<Vec<_>>(), ["decoded,malformed,18", "decoded,wrong_type,12"]);
}

#[test]
fn what_is_over_max_payload_is_rejected_with_its_bytes() {
    let (broker, scratch) = (Mosquitto::start(""), Scratch::new());
    malformed_load(&broker, &scratch, "1MiB");
    let stages = scratch.sql("select stage, code, count(*) from dead_letters group by stage, code order by stage, code");
    let expected = ["decoded,malformed,18", "decoded,wrong_type,6", "readings,too_large,6"];
    assert_eq!(stages.lines().skip(1).collect::<Vec<_>>(), expected);
}

#[test]
fn a_message_over_the_default_limit_makes_no_reconnect_loop() {
    for protocol in ["v5", "v3_1_1"] {
        let (broker, scratch) = (Mosquitto::start(""), Scratch::new());
        let running = start(&broker, &scratch, "16MiB", protocol);
        let bytes: Vec<u8> = (0..20_000_000_u32).map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        let payload = scratch.write("bad/large.bin", bytes);
        broker.publish_lines("plant/press-1/reading", "{\"id\": 1}\n");
        broker.publish_file("plant/press-1/reading", &payload);
        broker.publish_lines("plant/press-1/reading", "{\"id\": 2}\n");
        wait_until("what follows the large message is there", LIMIT, || ids(&scratch) == 2);
        running.drain();
        compare_dead_letters(&scratch);
        let log = scratch.log("malformed");
        assert_eq!(log.matches("mqtt connected").count(), 1, "{protocol}: {log}");
    }
}

/// Publishes the load, and sees that all of it is where it belongs.
fn malformed_load(broker: &Mosquitto, scratch: &Scratch, max_payload: &str) {
    let mut running = start(broker, scratch, max_payload, "v5");
    let (port, messages) = (broker.port.to_string(), MESSAGES.to_string());
    succeed(python("malformed.py").args([port.as_str(), "plant/press-1/reading", &messages]).arg(bad(scratch)));
    assert_eq!(std::fs::read_dir(bad(scratch)).unwrap().count(), usize::try_from(MALFORMED).unwrap());
    wait_until("every good message is there", LIMIT, || ids(scratch) == MESSAGES - MALFORMED);
    assert!(running.is_running());
    running.drain();
    assert_eq!(scratch.number("select count(*) from results"), MESSAGES - MALFORMED);
    assert_eq!(scratch.number("select count(*) from results where value <> id / 2.0"), 0);
    compare_dead_letters(scratch);
    let log = scratch.log("malformed");
    assert_eq!(log.matches("mqtt connected").count(), 1, "{log}");
}

fn start(broker: &Mosquitto, scratch: &Scratch, max_payload: &str, protocol: &str) -> Running {
    let text = PIPELINE.replace("MAX_PAYLOAD", max_payload).replace("PROTOCOL", protocol);
    let pipeline = scratch.write("malformed.yaml", text);
    let running = scratch.start("malformed", &[&pipeline], |command| {
        command.env("MQTT_URL", broker.url());
    });
    wait_until("it is subscribed", LIMIT, || scratch.log("malformed").contains("mqtt connected and subscribed"));
    running
}

/// Where what was published malformed lies.
fn bad(scratch: &Scratch) -> PathBuf {
    scratch.path("bad")
}

/// Different ids in the table, which may not be there yet.
fn ids(scratch: &Scratch) -> i64 {
    let query = "select count(distinct id) from results";
    let output = scratch.afferent("sql").args(["--format", "csv", "-c", query]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().nth(1).map_or(0, |number| number.parse().unwrap())
}

/// Another reader than ours finds each malformed payload once, byte by byte, and nothing else.
fn compare_dead_letters(scratch: &Scratch) {
    succeed(python("dead_letters.py").arg(scratch.data_dir()).arg(bad(scratch)));
}
