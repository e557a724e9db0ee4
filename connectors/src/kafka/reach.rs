//! The first question to a cluster, asked when a source or sink opens, and what librdkafka says in the background.
//! librdkafka connects by itself, without end, and answers the question with nothing but a time-out; why it cannot
//! connect it tells by callbacks. Here the two are brought together, so that a wrong password ends the run at once
//! with the broker's own words. Also where its log lines become ours.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use afferent_engine::{Error, Result};
use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::Metadata;
use tracing::{debug, warn};

/// How long the first answer of a broker may take.
const FIRST_ANSWER: Duration = Duration::from_secs(10);
/// How long the first attempt may take before trouble is looked for; each further one gets twice as long, for brokers
/// far away.
const FIRST_ATTEMPT: Duration = Duration::from_secs(1);
/// How long a consumer is polled for what it has to tell.
const LISTEN: Duration = Duration::from_millis(10);

/// Why there is no connection, as last told by librdkafka.
#[derive(Default)]
pub(super) struct Trouble(Mutex<Option<(RDKafkaErrorCode, String)>>);

impl Trouble {
    /// librdkafka reports an error.
    pub(super) fn told(&self, error: &KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(code) if is_logged(error) => {
                debug!(%error, reason, "kafka client reports an error");
                if code != RDKafkaErrorCode::AllBrokersDown {
                    *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((code, reason.to_owned()));
                }
            }
            _ => warn!(%error, reason, "kafka client reports an error"),
        }
    }

    fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The error to end an attempt with that failed with `error`; none while it is worth waiting for other brokers.
    fn verdict(&self, error: KafkaError, last: bool) -> Option<Error> {
        let told = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match told {
            Some((RDKafkaErrorCode::Authentication, reason)) => {
                Some(Error::fatal(reason).context("the broker refuses user and password (`sasl`)"))
            }
            Some((RDKafkaErrorCode::SSL, reason)) => Some(Error::retry(reason).context("there is no TLS connection (`tls`)")),
            Some((_, reason)) if last => Some(Error::retry(reason)),
            None if last => Some(Error::retry(error)),
            _ => None,
        }
    }
}

/// Connections that fail or close: librdkafka has written a log line about it, or it says nothing new.
pub(super) fn is_logged(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(
            RDKafkaErrorCode::AllBrokersDown
                | RDKafkaErrorCode::Authentication
                | RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::Resolve
                | RDKafkaErrorCode::SSL
        )
    )
}

/// Asks for a topic. Blocks; `listen` has callbacks called, for a client without a thread that does it.
///
/// # Errors
/// `Fatal` when the broker refuses us, `Retry` when it cannot be reached.
pub(super) fn ask<C: ClientContext>(client: &Client<C>, topic: &str, trouble: &Trouble, listen: impl Fn()) -> Result<Metadata> {
    let began = Instant::now();
    let mut attempt = FIRST_ATTEMPT;
    // What is left from an earlier question.
    trouble.forget();
    loop {
        let error = match client.fetch_metadata(Some(topic), attempt) {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        listen();
        if let Some(verdict) = trouble.verdict(error, began.elapsed() >= FIRST_ANSWER) {
            return Err(verdict.context(format!("asking for topic `{topic}`")));
        }
        attempt *= 2;
    }
}

/// A consumer that only asks.
struct Probe(Arc<Trouble>);

impl ClientContext for Probe {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        log_line(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.told(&error, reason);
    }
}

impl ConsumerContext for Probe {}

/// Asks for the topics, so that an unreachable broker or a missing topic is told when the pipeline starts. Blocks.
///
/// # Errors
/// As [`ask`]; `Retry` when a topic cannot be read.
pub(super) fn reach(config: &ClientConfig, topics: &[String]) -> Result<()> {
    let trouble = Arc::new(Trouble::default());
    let probe: BaseConsumer<Probe> =
        config.create_with_context(Probe(Arc::clone(&trouble))).map_err(|e| Error::fatal(e).context("making a kafka client"))?;
    let listen = || while probe.poll(LISTEN).is_some() {};
    for topic in topics {
        let answer = ask(probe.client(), topic, &trouble, listen)?;
        if let Some(code) = answer.topics().iter().find_map(|found| found.error()) {
            return Err(Error::retry(format!("topic `{topic}` cannot be read: {code:?}")));
        }
    }
    Ok(())
}

/// librdkafka's own log lines, among ours.
pub(super) fn log_line(level: RDKafkaLogLevel, facility: &str, line: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
            tracing::error!(target: "librdkafka", facility, "{line}");
        }
        // Asking for a producer id before the coordinator is there: librdkafka asks again by itself.
        RDKafkaLogLevel::Warning if facility == "GETPID" && line.ends_with("retrying") => {
            tracing::debug!(target: "librdkafka", facility, "{line}");
        }
        RDKafkaLogLevel::Warning => tracing::warn!(target: "librdkafka", facility, "{line}"),
        RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => tracing::info!(target: "librdkafka", facility, "{line}"),
        RDKafkaLogLevel::Debug => tracing::debug!(target: "librdkafka", facility, "{line}"),
    }
}

/// Tells errors that pass from those that do not: librdkafka reports both and goes on by itself after the former.
pub(super) fn judge(error: KafkaError) -> Result<()> {
    match error {
        KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset) => Err(Error::fatal(
            "a position is no longer in the topic: its records were deleted before they were read; \
             `options: { auto.offset.reset: earliest }` goes on behind the gap",
        )),
        KafkaError::MessageConsumptionFatal(RDKafkaErrorCode::FencedInstanceId) => Err(Error::fatal(
            "another process reads as the same member of the group (`group.instance.id`), which a data directory has of its \
             own: does it run on a copy of this one?",
        )),
        KafkaError::MessageConsumption(
            RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::GroupAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::Authentication
            | RDKafkaErrorCode::SaslAuthenticationFailed,
        )
        | KafkaError::MessageConsumptionFatal(_) => Err(Error::fatal(error)),
        passing => {
            if is_logged(&passing) {
                debug!(error = %passing, "kafka consumer reports an error and goes on");
            } else {
                warn!(error = %passing, "kafka consumer reports an error and goes on");
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use afferent_engine::Class;

    use super::*;

    fn timed_out() -> KafkaError {
        KafkaError::MetadataFetch(RDKafkaErrorCode::BrokerTransportFailure)
    }

    fn told(code: RDKafkaErrorCode, reason: &str) -> Trouble {
        let trouble = Trouble::default();
        trouble.told(&KafkaError::Global(code), reason);
        trouble.told(&KafkaError::Global(RDKafkaErrorCode::AllBrokersDown), "1/1 brokers are down");
        trouble
    }

    #[test]
    fn a_refused_password_ends_the_attempt_at_once_and_for_good() {
        let error = told(RDKafkaErrorCode::Authentication, "invalid credentials").verdict(timed_out(), false).unwrap();
        assert_eq!(error.class(), Class::Fatal);
        assert!(error.to_string().contains("`sasl`") && error.to_string().contains("invalid credentials"), "{error}");
    }

    #[test]
    fn a_certificate_that_nobody_trusts_is_told_at_once() {
        let error = told(RDKafkaErrorCode::SSL, "certificate verify failed").verdict(timed_out(), false).unwrap();
        assert_eq!(error.class(), Class::Retry);
        assert!(error.to_string().contains("`tls`") && error.to_string().contains("verify failed"), "{error}");
    }

    #[test]
    fn other_brokers_get_their_time_before_a_broken_connection_is_told() {
        assert!(told(RDKafkaErrorCode::BrokerTransportFailure, "refused").verdict(timed_out(), false).is_none());
        let error = told(RDKafkaErrorCode::BrokerTransportFailure, "connection refused").verdict(timed_out(), true).unwrap();
        assert!(error.to_string().contains("connection refused"), "{error}");
        assert!(Trouble::default().verdict(timed_out(), false).is_none());
        assert!(Trouble::default().verdict(timed_out(), true).is_some());
    }

    #[test]
    fn errors_that_pass_are_told_from_those_that_do_not() {
        assert!(judge(KafkaError::MessageConsumption(RDKafkaErrorCode::BrokerTransportFailure)).is_ok());
        assert!(judge(KafkaError::MessageConsumption(RDKafkaErrorCode::GroupAuthorizationFailed)).is_err());
        let gap = judge(KafkaError::MessageConsumption(RDKafkaErrorCode::AutoOffsetReset)).unwrap_err();
        assert!(gap.to_string().contains("auto.offset.reset"));
        let fenced = judge(KafkaError::MessageConsumptionFatal(RDKafkaErrorCode::FencedInstanceId)).unwrap_err();
        assert!(fenced.to_string().contains("a copy of this one"), "{fenced}");
    }
}
