//! Secured brokers: TLS with an authority of one's own, user and password, client certificates. What is wrong with
//! them must be told at once, by the stage that has it, in the broker's words; and a password is never written anywhere.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::tools::{Certificates, Kafka, Mosquitto, Scratch, succeed, told, wait_until};

const USER: &str = "sensor";
const PASSWORD: &str = "s3cret-word-of-the-test";
const WRONG: &str = "wr0ng-word-of-the-test";

/// mosquitto with TLS, and whatever else.
fn mosquitto(certificates: &Certificates, extra: &str) -> Mosquitto {
    Mosquitto::start(&format!(
        "user root\ncafile {}\ncertfile {}\nkeyfile {}\n{extra}",
        certificates.path("ca.pem").display(),
        certificates.path("server.pem").display(),
        certificates.path("server.key").display()
    ))
}

/// mosquitto with TLS that lets only our user in.
fn mosquitto_with_password(certificates: &Certificates) -> Mosquitto {
    let passwords = certificates.path("passwords");
    succeed(Command::new("mosquitto_passwd").args(["-c", "-b"]).arg(&passwords).args([USER, PASSWORD]));
    mosquitto(certificates, &format!("allow_anonymous false\npassword_file {}", passwords.display()))
}

fn login() -> String {
    format!("username: {USER}, password: \"${{PASSWORD}}\"")
}

fn ca(certificates: &Certificates, name: &str) -> String {
    format!("tls: {{ ca: \"{}\" }}", certificates.path(name).display())
}

/// From a connector to the table `readings`.
fn reading(connector: &str) -> String {
    format!(
        "name: reading\nsources:\n  readings:\n    {connector}\noperators:\n  decoded:\n    \
         decode: {{ format: json, schema: {{ id: int64 }} }}\nsinks:\n  out:\n    table: {{ name: readings }}\n"
    )
}

/// 100 numbered rows into a connector.
fn writing(connector: &str) -> String {
    format!(
        "name: writing\nsources:\n  numbers:\n    generate: {{ rows: 100, columns: {{ id: sequence }} }}\nsinks:\n  \
         writer:\n    {connector}\n"
    )
}

fn mqtt_source(broker: &Mosquitto, options: &str) -> String {
    reading(&format!("mqtt: {{ url: \"mqtts://127.0.0.1:{}\", topics: [\"plant/v\"], {options} }}", broker.port))
}

fn mqtt_sink(broker: &Mosquitto, options: &str) -> String {
    writing(&format!("mqtt: {{ url: \"mqtts://127.0.0.1:{}\", topic: plant/v, format: json, {options} }}", broker.port))
}

fn kafka_source(broker: &Kafka, topic: &str, options: &str) -> String {
    let address = broker.address();
    reading(&format!(
        "kafka: {{ brokers: [\"{address}\"], topics: [{topic}], stop_at_end: true, security: sasl_ssl, {options} }}"
    ))
}

fn kafka_sink(broker: &Kafka, topic: &str, options: &str) -> String {
    let address = broker.address();
    writing(&format!("kafka: {{ brokers: [\"{address}\"], topic: {topic}, format: json, security: sasl_ssl, {options} }}"))
}

fn sasl(mechanism: &str) -> String {
    format!("sasl: {{ mechanism: {mechanism}, {} }}", login())
}

/// Runs a pipeline with the password to its end; it must succeed.
fn run(scratch: &Scratch, pipeline: &Path) {
    let output = succeed(scratch.afferent("run").arg(pipeline).env("PASSWORD", PASSWORD));
    assert!(!told(&output).contains(PASSWORD), "the password was written");
}

/// Starts a pipeline that cannot connect: soon a line of its log must have all of `words`, and no password.
fn complains(pipeline: &str, password: &str, words: &[&str]) {
    let scratch = Scratch::new();
    let file = scratch.write("pipeline.yaml", pipeline);
    let running = scratch.start("run", &[&file], |command| {
        command.env("PASSWORD", password);
    });
    let said = || scratch.log("run").lines().any(|line| words.iter().all(|word| line.contains(*word)));
    let began = Instant::now();
    while !said() {
        assert!(began.elapsed() < Duration::from_secs(15), "nobody said {words:?}:\n{}", scratch.log("run"));
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(running);
    let log = scratch.log("run");
    assert!(!log.contains(password), "the password was written:\n{log}");
}

#[test]
fn mqtt_over_tls_with_user_and_password() {
    let certificates = Certificates::make();
    let broker = mosquitto_with_password(&certificates);
    for protocol in ["v3_1_1", "v5"] {
        let options = format!("{}, {}, protocol: {protocol}", login(), ca(&certificates, "ca.pem"));
        let scratch = Scratch::new();
        let source = scratch.write("source.yaml", mqtt_source(&broker, &options));
        let running = scratch.start("run", &[&source], |command| {
            command.env("PASSWORD", PASSWORD);
        });
        wait_until("it has subscribed", Duration::from_secs(20), || scratch.log("run").contains("subscribed"));
        let other = Scratch::new();
        run(&other, &other.write("sink.yaml", mqtt_sink(&broker, &options)));
        wait_until("all rows are there", Duration::from_secs(20), || {
            scratch.number("select count(distinct id) from readings") == 100
        });
        running.drain();
        assert!(!scratch.log("run").contains(PASSWORD), "the password was written");
    }
}

#[test]
fn mqtt_says_what_is_wrong_with_password_authority_and_files() {
    let certificates = Certificates::make();
    let broker = mosquitto_with_password(&certificates);
    let refused = "the broker refused the connection";
    for protocol in ["v3_1_1", "v5"] {
        let options = format!("{}, {}, protocol: {protocol}", login(), ca(&certificates, "ca.pem"));
        // The run fails, which is what fatal means.
        complains(&mqtt_source(&broker, &options), WRONG, &["the pipeline failed", "stage readings", refused]);
        complains(&mqtt_sink(&broker, &options), WRONG, &["the pipeline failed", "stage writer", refused]);
        let options = format!("{}, {}, protocol: {protocol}", login(), ca(&certificates, "other.pem"));
        complains(&mqtt_source(&broker, &options), PASSWORD, &["stage=readings", "certificate", "UnknownIssuer"]);
        complains(&mqtt_sink(&broker, &options), PASSWORD, &["stage=writer", "certificate", "UnknownIssuer"]);
    }
    let options = format!("{}, {}", login(), ca(&certificates, "missing.pem"));
    complains(&mqtt_source(&broker, &options), PASSWORD, &["stage readings", "missing.pem", "No such file"]);
}

#[test]
fn mqtt_with_a_client_certificate() {
    let certificates = Certificates::make();
    let broker = mosquitto(&certificates, "require_certificate true");
    let path = |name: &str| certificates.path(name).display().to_string();
    let with =
        format!("tls: {{ ca: \"{}\", cert: \"{}\", key: \"{}\" }}", path("ca.pem"), path("device.pem"), path("device.key"));
    let scratch = Scratch::new();
    let pipeline = scratch.write("source.yaml", mqtt_source(&broker, &with));
    let running = scratch.start("run", &[&pipeline], |_| {});
    wait_until("it has subscribed", Duration::from_secs(20), || scratch.log("run").contains("subscribed"));
    running.drain();
    let without = ca(&certificates, "ca.pem");
    complains(&mqtt_source(&broker, &without), PASSWORD, &["stage=readings", "CertificateRequired"]);
}

#[test]
fn kafka_over_tls_with_user_and_password_and_what_it_says_is_wrong() {
    let certificates = Certificates::make();
    let broker = Kafka::start_secured(&certificates, USER, PASSWORD);
    for mechanism in ["plain", "scram_sha512"] {
        let topic = format!("by-{}", mechanism.replace('_', "-"));
        let options = format!("{}, {}", sasl(mechanism), ca(&certificates, "ca.pem"));
        let scratch = Scratch::new();
        run(&scratch, &scratch.write("sink.yaml", kafka_sink(&broker, &topic, &options)));
        let group = format!("{options}, group: {topic}");
        run(&scratch, &scratch.write("source.yaml", kafka_source(&broker, &topic, &group)));
        assert_eq!(scratch.number("select count(distinct id) from readings"), 100, "{mechanism}");

        let refused = ["the pipeline failed", "the broker refuses user and password", "uthentication"];
        complains(&kafka_source(&broker, &topic, &options), WRONG, &[&refused[..], &["stage readings"]].concat());
        complains(&kafka_sink(&broker, &topic, &options), WRONG, &[&refused[..], &["stage writer"]].concat());
    }
    let options = format!("{}, {}", sasl("plain"), ca(&certificates, "other.pem"));
    let untrusted = ["there is no TLS connection", "certificate verify failed"];
    complains(&kafka_source(&broker, "by-plain", &options), PASSWORD, &[&untrusted[..], &["stage=readings"]].concat());
    complains(&kafka_sink(&broker, "by-plain", &options), PASSWORD, &[&untrusted[..], &["stage=writer"]].concat());
    let options = format!("{}, {}", sasl("plain"), ca(&certificates, "missing.pem"));
    complains(&kafka_source(&broker, "by-plain", &options), PASSWORD, &["stage readings", "cannot read", "missing.pem"]);
}
