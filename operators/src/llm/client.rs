//! Speaks to a provider in the OpenAI wire format: one request, one answer, tried again within a deadline while the
//! provider is overloaded or out of reach. The `llm` operator holds one for each stage. Invariant: an answer that was
//! cut off, refused or too large is never passed on as one.
//!
//! Wire format: `POST {base}/chat/completions` of the OpenAI API reference, which llama.cpp's server, vLLM and Ollama
//! speak too.

use std::error::Error as _;
use std::net::IpAddr;
use std::time::Duration;

use afferent_engine::config::Interval;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use serde::Deserialize;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout_at};

use super::answer::quote;

/// How long a connection may take to come about; what takes longer is tried again.
const CONNECT: Duration = Duration::from_secs(5);
/// The pause before the second attempt; it doubles from attempt to attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Where the doubling ends, and the longest Retry-After that is understood.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
const LONGEST_WAIT: u64 = 86_400;
/// Bytes of an answer that are read.
const LARGEST_BODY: usize = 1 << 20;

/// What one row may cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// From the first attempt to the answer; at most a day.
    pub(super) deadline: Duration,
    /// Further attempts.
    pub(super) retries: u32,
}

/// Why requests cannot be made at all.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetUpError {
    /// The address is none.
    #[error("{0}")]
    Address(String),
    /// The HTTP client does not start.
    #[error("the HTTP client does not start: {0}")]
    Client(reqwest::Error),
}

/// One provider.
pub(super) struct ChatClient {
    http: Client,
    endpoint: Url,
    key: Option<String>,
    limits: Limits,
}

/// Why an attempt gave no answer.
enum Failure {
    /// It may go better the next time, which the provider may have named.
    Passing(String, Option<Duration>),
    /// It will not.
    Final(String),
}

impl ChatClient {
    /// The address of the endpoint below a base address.
    ///
    /// # Errors
    /// In words.
    pub(super) fn endpoint(base: &str) -> Result<Url, String> {
        let url = Url::parse(&format!("{}/chat/completions", base.trim_end_matches('/'))).map_err(|error| error.to_string())?;
        match url.scheme() {
            "http" | "https" => Ok(url),
            other => Err(format!("it starts with {other}:, not with http: or https:")),
        }
    }

    /// A client that sends nothing yet.
    ///
    /// # Errors
    /// See [`SetUpError`].
    pub(super) fn new(base: &str, key: Option<String>, limits: Limits) -> Result<Self, SetUpError> {
        let endpoint = Self::endpoint(base).map_err(SetUpError::Address)?;
        // A redirect would carry the rows and the key to an address that nobody wrote down.
        let mut builder = Client::builder().connect_timeout(CONNECT).redirect(redirect::Policy::none());
        if is_this_machine(&endpoint) {
            builder = builder.no_proxy();
        }
        Ok(Self { http: builder.build().map_err(SetUpError::Client)?, endpoint, key, limits })
    }

    /// What the model says to this request.
    ///
    /// # Errors
    /// Why there is no answer, in words for the error column.
    pub(super) async fn complete(&self, request: &Value) -> Result<String, String> {
        let until = Instant::now() + self.limits.deadline;
        let (mut attempts, mut pause, mut last) = (0, FIRST_PAUSE, None);
        loop {
            attempts += 1;
            let (reason, wait) = match timeout_at(until, self.attempt(request)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Failure::Final(reason))) => return Err(reason),
                Ok(Err(Failure::Passing(reason, wait))) => (reason, wait),
                Err(_) => {
                    let before = last.map_or(String::new(), |reason| format!("; before that: {reason}"));
                    return Err(format!("no answer within {}{before}", Interval(self.limits.deadline)));
                }
            };
            if attempts > self.limits.retries {
                return Err(format!("{reason} (after {attempts} attempts)"));
            }
            let wait = wait.unwrap_or(pause);
            if Instant::now() + wait >= until {
                return Err(format!(
                    "{reason}; the next attempt would be past the deadline of {}",
                    Interval(self.limits.deadline)
                ));
            }
            tracing::debug!(reason, "asking the language model again in {:.1} s", wait.as_secs_f64());
            sleep(wait).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            last = Some(reason);
        }
    }

    async fn attempt(&self, request: &Value) -> Result<String, Failure> {
        let mut post = self.http.post(self.endpoint.clone()).json(request);
        if let Some(key) = &self.key {
            post = post.bearer_auth(key);
        }
        let response = post.send().await.map_err(|error| unreachable(&error))?;
        let (status, wait) = (response.status(), retry_after(response.headers()));
        let body = body_of(response).await?;
        if status.is_success() {
            return message_in(&body).map_err(Failure::Final);
        }
        let reason = format!("the provider says {status}: {}", quote(String::from_utf8_lossy(&body).trim()));
        let passing =
            status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::REQUEST_TIMEOUT;
        Err(if passing { Failure::Passing(reason, wait) } else { Failure::Final(reason) })
    }
}

/// Whether no proxy can be meant.
fn is_this_machine(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn unreachable(error: &reqwest::Error) -> Failure {
    let mut reason = "no answer from the provider".to_owned();
    let mut cause = error.source();
    while let Some(error) = cause {
        reason.push_str(": ");
        reason.push_str(&error.to_string());
        cause = error.source();
    }
    if error.is_builder() {
        Failure::Final(format!("the request cannot be made: {error}"))
    } else {
        Failure::Passing(reason, None)
    }
}

/// The seconds of a Retry-After; its other form, a date, is taken as none.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds.min(LONGEST_WAIT)))
}

async fn body_of(mut response: Response) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() > LARGEST_BODY => {
                return Err(Failure::Final(format!("the provider's answer is over {LARGEST_BODY} bytes")));
            }
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => return Ok(body),
            Err(error) => return Err(unreachable(&error)),
        }
    }
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    refusal: Option<String>,
}

/// The text of the first choice, if it is whole.
fn message_in(body: &[u8]) -> Result<String, String> {
    let completion: Completion = serde_json::from_slice(body).map_err(|error| {
        format!("the provider's answer is no chat completion: {error}; it is {}", quote(&String::from_utf8_lossy(body)))
    })?;
    let Some(choice) = completion.choices.into_iter().next() else {
        return Err("the provider's answer has no choices".to_owned());
    };
    if let Some(refusal) = choice.message.refusal {
        return Err(format!("the model refuses: {}", quote(&refusal)));
    }
    match choice.finish_reason.as_deref() {
        Some("length") => return Err("the answer was cut off at max_tokens".to_owned()),
        Some("content_filter") => return Err("the answer was withheld by the provider's content filter".to_owned()),
        _ => {}
    }
    choice.message.content.ok_or_else(|| "the provider's answer has no content".to_owned())
}
